"""Fine-tunes that can be repeated: full weights and LoRA, on all images and on subsets."""

import json

import numpy as np
import pytest
import torch
from tiny_models import pictures, tiny_ddpm, tiny_stable_diffusion

from influence import finetuning, models, retraining
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
    (tmp_path / "finetune.json").write_text(json.dumps({"odd": 2}), encoding="utf-8")
    with pytest.raises(OptionError, match="is no fine-tune recipe"):
        finetuning.read_recipe(tmp_path)


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
