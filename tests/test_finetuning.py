"""Fine-tunes that can be repeated: full weights and LoRA, on all images and on subsets."""

import dataclasses
import json
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from tiny_models import pictures, tiny_ddpm, tiny_stable_diffusion

from influence import datasets, finetuning, keys, models, retraining
from influence.errors import ModelError, OptionError
from influence.finetuning import FineTune
from influence.retraining import Query, Run

FULL = FineTune(epochs=1, batch_size=4, learning_rate=1e-3)
LORA = FineTune(epochs=1, batch_size=4, learning_rate=1e-2, lora_rank=2)


@pytest.fixture(scope="module", params=["full", "lora"])
def truth(request, tmp_path_factory):
    """A small truth, its folder of pictures beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    lora = request.param == "lora"
    base = tiny_stable_diffusion(folder / "base") if lora else tiny_ddpm(folder / "base")
    data = pictures(folder / "data", count=8, size=16 if lora else 8)
    queries = [Query(str(data / "000.png"), "trained", "picture 0" if lora else None)]
    recipe = LORA if lora else FULL
    return retraining.create(folder / "truth", base=base, dataset=data, recipe=recipe, queries=queries, draws=8)


def test_what_is_saved_is_what_was_trained(truth, tmp_path):
    maker = retraining.Retrainer(truth)
    maker.retrain(Run("all", np.ones(8, dtype=bool), 0))
    finetuning.save(maker.denoiser, truth.recipe, tmp_path / "model", base=truth.base)
    adapted = truth.recipe.lora_rank is not None
    loaded = models.load_denoiser(
        truth.base if adapted else tmp_path / "model", lora=tmp_path / "model" if adapted else None
    )
    assert loaded.parameters.keys() == maker.denoiser.parameters.keys()
    before, after = maker.initial, finetuning.weights(loaded)
    for name, trained in finetuning.weights(maker.denoiser).items():
        assert torch.equal(after[name], trained), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    ids, draws = truth.query_ids, truth.draws
    found = retraining.losses(loaded, maker.query_x0, maker.query_cond, ids, draws)
    assert found == pytest.approx(maker.measure(), rel=1e-6)
    assert finetuning.read_recipe(tmp_path / "model") == truth.recipe
    with pytest.raises(ModelError, match="exists already"):
        finetuning.save(maker.denoiser, truth.recipe, tmp_path / "model", base=truth.base)


def test_a_run_depends_on_its_members_and_seed_alone(truth):
    maker = retraining.Retrainer(truth)
    half = retraining.halves(0, 1, 8)[0]
    first, other_seed, others = (maker(Run("a", m, s)) for m, s in ((half, 0), (half, 1), (~half, 0)))
    assert maker(Run("a", half, 0)) == first
    assert len({first["weights"], other_seed["weights"], others["weights"]}) == 3


def test_no_members_leave_the_base_as_it_is(truth):
    maker = retraining.Retrainer(truth)
    base = maker.measure()
    maker.retrain(Run("all", np.ones(8, dtype=bool), 0))
    assert not np.array_equal(maker.measure(), base)
    maker.retrain(Run("none", np.zeros(8, dtype=bool), 0))
    assert np.array_equal(maker.measure(), base)


def test_images_left_out_play_no_part(truth):
    """Retraining on a half is the same whatever the pictures of the other half show."""
    maker = retraining.Retrainer(truth)
    half = retraining.halves(0, 1, 8)[0]
    expected = maker(Run("a", half, 0))
    maker.x0 = torch.where(torch.from_numpy(half)[:, None, None, None], maker.x0, torch.nan)
    assert maker(Run("a", half, 0)) == expected


def test_steps_are_epochs():
    assert FineTune(epochs=3, batch_size=8, learning_rate=1.0).steps(20) == 8
    assert FineTune(epochs=3, batch_size=8, learning_rate=1.0).steps(10) == 4


def test_a_recipe_that_is_none_is_refused(tmp_path):
    with pytest.raises(OptionError, match="is no fine-tune recipe"):
        finetuning.read_recipe(tmp_path)
    others = [({"odd": 2}, "argument"), ([1], "it holds a list"), (GOOD | {"odd": 2}, "odd")]
    others.append(({"epochs": 3, "batch_size": 4}, "missing a required argument: 'learning_rate'"))
    for other, words in others:
        (tmp_path / "finetune.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(OptionError, match=rf"is no fine-tune recipe \(.*{words}.*\); expected a JSON object of ep"):
            finetuning.read_recipe(tmp_path)


GOOD = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3}
BAD = [
    ("epochs", 0, "epochs is 0; expected a positive number; correct"),
    ("epochs", "3", 'epochs is "3"; expected a positive number'),
    ("epochs", float("nan"), "epochs is NaN; expected a positive number"),
    ("epochs", 10**400, "expected a positive number"),
    ("batch_size", 0, "batch_size is 0; expected a whole number of 1 or more"),
    ("batch_size", 2.5, "batch_size is 2.5; expected a whole number of 1 or more"),
    ("batch_size", None, "batch_size is null; expected a whole number"),
    ("batch_size", True, "batch_size is true; expected a whole number"),
    ("learning_rate", 0, "learning_rate is 0; expected a positive number"),
    ("learning_rate", -1e-3, "learning_rate is -0.001; expected a positive number"),
    ("learning_rate", float("inf"), "learning_rate is Infinity; expected a positive number"),
    ("learning_rate", "1e-4", 'learning_rate is "1e-4"; expected a positive number'),
    ("learning_rate_schedule", "constant_with_warmup", 'is "constant_with_warmup"; expected cosine or constant'),
    ("learning_rate_schedule", "Constant", 'is "Constant"; expected cosine or constant'),
    ("learning_rate_schedule", None, "is null; expected cosine or constant"),
    ("weight_decay", -0.1, "weight_decay is -0.1; expected a number of 0 or more"),
    ("ema_decay", 1, "ema_decay is 1; expected a number in 0 … 1, or null"),
    ("stratified", 1, "stratified is 1; expected true or false"),
    ("lora_rank", 0, "lora_rank is 0; expected a whole number of 1 or more, or null"),
    ("lora_rank", 2.0, "lora_rank is 2.0; expected a whole number of 1 or more, or null"),
    ("lora_alpha", 0, "lora_alpha is 0; expected a positive number, or null"),
    ("lora_alpha", [1], r"lora_alpha is \[1\]; expected a positive number, or null"),
    ("lora_targets", "to_q,", 'lora_targets is "to_q,"; expected ends of names of layers'),
    ("lora_targets", None, "lora_targets is null; expected ends of names of layers"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_recipe_with_a_value_that_no_fine_tune_has_is_refused(tmp_path, name, value, words):
    file = tmp_path / "finetune.json"
    file.write_text(json.dumps(GOOD | {name: value}), encoding="utf-8")
    with pytest.raises(OptionError, match=f"^{file}: .*{words}") as refused:
        finetuning.read_recipe(file)
    assert len(str(refused.value)) < 1000 and "correct it there" in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"epochs": 0.5, "learning_rate": 1, "learning_rate_schedule": "constant", "weight_decay": 0, "ema_decay": 0.9},
        {"stratified": False, "lora_rank": 4, "lora_alpha": 8, "lora_targets": "to_q, to_k"},
        {"lora_rank": None, "lora_alpha": None, "ema_decay": None},
    ],
)
def test_a_recipe_that_can_be_is_read(tmp_path, more):
    (tmp_path / "finetune.json").write_text(json.dumps(GOOD | more), encoding="utf-8")
    assert finetuning.read_recipe(tmp_path) == FineTune(**GOOD | more)


def test_a_lora_needs_a_conditional_base_and_known_layers(tmp_path):
    with pytest.raises(ModelError, match="unconditional"):
        finetuning.start(tiny_ddpm(tmp_path / "a"), LORA)
    odd = FineTune(epochs=1, batch_size=4, learning_rate=1.0, lora_rank=2, lora_targets="nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        finetuning.start(tiny_stable_diffusion(tmp_path / "b"), odd)


def test_halves_are_exact_and_independent():
    masks = np.stack(retraining.halves(0, 200, 30))
    assert (masks.sum(1) == 15).all()
    together = (masks[:, :1] & masks[:, 1:]).mean()
    assert together == pytest.approx(0.5 * 14 / 29, abs=0.02)
    assert not np.array_equal(masks[0], retraining.halves(1, 1, 30)[0])


def test_coalitions_are_all_sets_of_owners():
    found = retraining.coalitions(["a", "b", "a", "c"])
    assert len(found) == 8
    assert found[frozenset()].tolist() == [False] * 4
    assert found[frozenset({"a", "c"})].tolist() == [True, False, True, True]


def test_coalitions_of_many_owners_are_refused_before_they_are_made():
    with pytest.raises(OptionError, match=r"250 creators have 2\^250 coalitions, .* at most 12 creators"):
        retraining.coalitions([str(i) for i in range(250)])


def test_retraining_goes_on_where_it_stopped(truth, tmp_path):
    runs = [Run(f"half-{i}", mask, 0) for i, mask in enumerate(retraining.halves(0, 3, 8))]
    whole = retraining.retrain(truth, runs)
    assert whole["name"].tolist() == [run.name for run in runs]
    assert all(np.array_equal(a, b.members) for a, b in zip(whole["members"], runs, strict=True))
    journal = truth.folder / "runs.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][:40])  # torn: the second and third runs were lost
    assert len(truth.runs()) == 1
    again = retraining.retrain(truth, runs, workers=2)
    assert sorted(journal.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)
    assert np.array_equal(np.stack(again.sort_values("name")["loss"]), np.stack(whole["loss"]))


def test_a_run_that_is_planned_twice_is_trained_once(truth):
    run = Run("twice", np.arange(8) < 5, 0)
    found = retraining.retrain(truth, [run, run])
    assert (found["name"] == "twice").sum() == 1
    lines = (truth.folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"twice"' in line for line in lines) == 1


def test_another_truth_in_the_folder_is_refused(truth):
    with pytest.raises(OptionError, match="is of other draws"):
        retraining.create(
            truth.folder, base=truth.base, dataset=truth.dataset, recipe=truth.recipe, queries=truth.queries, draws=4
        )


def test_a_query_without_the_caption_that_the_model_reads_is_refused(tmp_path):
    base, data = tiny_stable_diffusion(tmp_path / "base"), pictures(tmp_path / "data", count=2)
    bare = [Query(str(data / "000.png"), "trained")]
    with pytest.raises(OptionError, match=r"000\.png has no caption"):
        retraining.create(tmp_path / "truth", base=base, dataset=data, recipe=LORA, queries=bare)


def test_the_alpha_of_a_recipe_is_trained_with_and_saved(tmp_path):
    base = tiny_stable_diffusion(tmp_path / "base")
    recipe = dataclasses.replace(LORA, lora_alpha=6.0)
    denoiser = finetuning.start(base, recipe)
    x = torch.from_numpy(keys.normal(("latents",), (4, *denoiser.sample_shape)))
    cond = denoiser.encode_captions(["a", "b", "c", "d"])
    finetuning.fine_tune(denoiser, recipe, x, cond, seed=0)
    finetuning.save(denoiser, recipe, tmp_path / "lora", base=base)
    found = models.load_denoiser(base, lora=tmp_path / "lora")
    for each in (denoiser, found):
        scalings = {s for module in each.network.modules() for s in getattr(module, "scaling", {}).values()}
        assert scalings == {3.0}
    with torch.no_grad():
        predicted = [each.network(x, torch.tensor([3, 200, 500, 900]), cond) for each in (denoiser, found)]
    assert torch.equal(*predicted)


def with_copies(path, size, captions):
    """Three pictures, the first of which is there three times."""
    data = pictures(path, count=3, size=size, captions=captions)
    with (data / "metadata.csv").open("a", encoding="utf-8") as file:
        for name in ("a.png", "b.png"):
            shutil.copy(data / "000.png", data / name)
            file.write(f"{name},{'picture 0' if captions else ''},creator 0\n")
    return data


@pytest.mark.parametrize("lora", [False, True])
def test_a_picture_of_which_there_are_several_files_is_encoded_once_and_trained_on_as_often(
    tmp_path, monkeypatch, lora
):
    base = tiny_stable_diffusion(tmp_path / "base") if lora else tiny_ddpm(tmp_path / "base")
    data = with_copies(tmp_path / "data", 16 if lora else 8, lora)
    queries = [Query(str(data / "001.png"), "trained", "picture 1" if lora else None)]
    recipe = LORA if lora else FULL
    truth = retraining.create(tmp_path / "truth", base=base, dataset=data, recipe=recipe, queries=queries, draws=8)
    decoded = []
    real = datasets.decode
    monkeypatch.setattr(datasets, "decode", lambda path: decoded.append(path) or real(path))
    maker = retraining.Retrainer(truth)
    assert len(decoded) == 3 + 1  # and the query
    everything = maker(Run("all", np.ones(5, dtype=bool), 0))

    by_hand = finetuning.start(base, recipe)
    items = retraining.in_order(datasets.read_dataset(data).items)
    x0, cond = retraining.encode(by_hand, [item.path for item in items], [item.caption for item in items])
    torch.testing.assert_close(maker.x0, x0, rtol=1e-5, atol=1e-6)
    finetuning.fine_tune(by_hand, recipe, x0, cond, seed=0)
    for name, value in by_hand.parameters.items():
        torch.testing.assert_close(maker.denoiser.parameters[name], value, rtol=1e-5, atol=1e-6)
    one_less = np.ones(5, dtype=bool)
    one_less[[item.file_name for item in items].index("a.png")] = False
    assert maker(Run("one less", one_less, 0))["loss"] != everything["loss"]


@pytest.mark.parametrize(("side", "batches"), [(16, [3]), (128, [3]), (256, [1, 1, 1]), (512, [1, 1, 1])])
def test_few_pixels_at_a_time_are_decoded_and_encoded(tmp_path, monkeypatch, side, batches):
    base, data = tiny_stable_diffusion(tmp_path / "base"), pictures(tmp_path / "data", count=3)
    denoiser = finetuning.start(base, LORA, resolution=side)
    done = []
    decode, encode = datasets.decode, denoiser.encode_images
    monkeypatch.setattr(datasets, "decode", lambda path: done.append("decode") or decode(path))
    monkeypatch.setattr(denoiser, "encode_images", lambda images: done.append(len(images)) or encode(images))
    paths = [data / f"{i:03d}.png" for i in range(3)]
    x0, _ = retraining.encode(denoiser, paths, ["a", "b", "c"])
    assert done == [step for count in batches for step in ["decode"] * count + [count]]
    alone = torch.cat([retraining.encode(denoiser, [path], ["a"])[0] for path in paths])
    torch.testing.assert_close(x0, alone, rtol=1e-5, atol=1e-5)


def test_a_truth_of_another_set_up_is_refused(tmp_path):
    base, data = tiny_stable_diffusion(tmp_path / "base"), pictures(tmp_path / "data", count=3)
    options = {"dataset": data, "recipe": FineTune(1, 3, 1e-3, lora_rank=2), "draws": 4}
    options["queries"] = [Query(str(data / "000.png"), "trained", "a")]
    first = retraining.create(tmp_path / "t", base=base, **options)
    assert retraining.create(tmp_path / "t", base=base, **options).query_ids == first.query_ids
    with pytest.raises(OptionError, match=r"truth.json is of other sample_shape; expected the same"):
        retraining.create(tmp_path / "t", base=base, resolution=32, **options)
    other = shutil.copytree(base, tmp_path / "other")
    shutil.rmtree(other / "vae")
    tiny_stable_diffusion(tmp_path / "again", seed=5)
    shutil.copytree(tmp_path / "again" / "vae", other / "vae")
    with pytest.raises(OptionError, match=r"truth.json is of other encoders; expected the same"):
        retraining.create(tmp_path / "t", base=other, **options)


def test_a_damaged_truth_is_told_by_file_and_line(truth, tmp_path):
    folder = shutil.copytree(truth.folder, tmp_path / "t")
    retraining.retrain(dataclasses.replace(truth, folder=folder), [Run("a", np.zeros(len(truth.items), bool), 0)])
    lines = (folder / "runs.jsonl").read_bytes()
    (folder / "runs.jsonl").write_bytes(b'{"name": "b"}\n' + lines)
    with pytest.raises(OptionError, match=r"line 1 of .*runs.jsonl is no retrained model .*remove the line"):
        retraining.read_runs(folder, len(truth.items))
    (folder / "runs.jsonl").write_bytes(lines)
    with pytest.raises(OptionError, match=r"has 'a' of other images than are to be trained on"):
        retraining.retrain(dataclasses.replace(truth, folder=folder), [Run("a", np.ones(len(truth.items), bool), 0)])
    facts = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    (folder / "truth.json").write_text(json.dumps(facts | {"format": 1}), encoding="utf-8")
    with pytest.raises(OptionError, match="is of format 1, which does not say of which set-up it is"):
        retraining.create(folder, base=truth.base, dataset=truth.dataset, recipe=truth.recipe, queries=truth.queries)
    for content in ('{"format": 1', "[]"):
        (folder / "truth.json").write_text(content)
        with pytest.raises(OptionError, match=r"truth.json (cannot be read|holds a list)"):
            retraining.read_json(folder / "truth.json")


def test_the_first_error_of_several_processes_ends_them_all_and_what_was_done_is_kept(truth, tmp_path):
    folder = shutil.copytree(truth.folder, tmp_path / "t", ignore=shutil.ignore_patterns("runs.jsonl"))
    (folder / "runs.jsonl").unlink(missing_ok=True)
    runs = [Run(f"r{i}", np.zeros(len(truth.items), bool), i) for i in range(4)]

    def stop(what, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retraining.retrain(dataclasses.replace(truth, folder=folder), runs, workers=2, progress=stop)
    assert len(retraining.read_runs(folder, len(truth.items))) == 1
    assert not multiprocessing.active_children()
