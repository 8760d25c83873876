"""Fine-tunes of each creator alone: made by the trainer, and counted in creators' totals."""

import dataclasses
import json
import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from influence_cli.main import cli
from scipy import sparse
from tiny_models import pictures, tiny_ddpm, tiny_stable_diffusion

import influence
from influence import finetuning, metrics, models, retraining, wholeway
from influence.errors import OptionError
from influence.finetuning import FineTune
from influence.scored import Creators
from influence.solo import INDEX, read_solo, works_hash
from influence.taking import encoded

DRAWS = 8
RECIPE = FineTune(epochs=2, batch_size=2, learning_rate=1e-3)


def written(path, recipe=RECIPE):
    path.mkdir(parents=True, exist_ok=True)
    (path / finetuning.RECIPE_FILE).write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("solo")
    data = pictures(path / "data", count=7, size=8, captions=False)
    tiny_ddpm(path / "base", seed=1)
    tiny_ddpm(path / "model", seed=2)
    influence.build(
        data, model=path / "model", store=path / "s", base=path / "base", dim=64, draws=DRAWS, metric="plain"
    )
    influence.solo(data, path / "solo", base=path / "base", recipe=written(path / "recipe"), seed=5)
    return path


def shares_of(made, estimator="group_sum"):
    rows = made.shares[(made.shares["estimator"] == estimator) & (made.shares["query_id"] != "ALL")]
    rows = rows[rows["n_works"].notna()]
    names = made.contributors.set_index("contributor_id")["name"]
    return rows.set_index(rows["contributor_id"].map(names))


@pytest.mark.parametrize("lora", [False, True])
def test_solo_is_the_trainer_on_the_works_of_one_creator(tmp_path, lora):
    base = tiny_stable_diffusion(tmp_path / "base") if lora else tiny_ddpm(tmp_path / "base")
    data = pictures(tmp_path / "data", count=6, size=16 if lora else 8, captions=lora)
    recipe = replace(RECIPE, lora_rank=2) if lora else RECIPE
    seen = []
    influence.solo(
        data, tmp_path / "out", base=base, recipe=written(tmp_path / "r", recipe), seed=5,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    alone = read_solo(tmp_path / "out")
    assert [one.creator for one in alone] == ["creator 0", "creator 1", "creator 2"]
    assert seen[-1] == ("fine-tunes", 3, 3)
    items = retraining.in_order(influence.datasets.read_dataset(data).items)
    for one in alone:
        found = models.load_denoiser(base if lora else one.path, lora=one.path if lora else None)
        expected = finetuning.start(base, recipe)
        mine = [item for item in items if item.creator == one.creator]
        assert one.works == works_hash(item.item_id for item in mine) and len(mine) == 2
        members = np.array([item.creator == one.creator for item in items])
        finetuning.fine_tune(expected, recipe, *retraining.encode_items(expected, items), seed=5, members=members)
        for name, value in expected.parameters.items():
            torch.testing.assert_close(found.parameters[name], value, rtol=1e-5, atol=1e-6)
        assert finetuning.read_recipe(one.path) == recipe


def test_a_run_that_was_stopped_goes_on_and_leaves_what_is_there(world, tmp_path):
    out = shutil.copytree(world / "solo", tmp_path / "solo")
    first, second, _ = read_solo(out)
    whole = {path.name: path.read_bytes() for path in second.path.rglob("*") if path.is_file()}
    kept = next(path for path in first.path.rglob("*.safetensors"))
    kept.write_bytes(b"kept")
    second.path.rename(second.path.with_name(second.path.name + ".part"))
    with pytest.raises(OptionError, match="lacks the models of 1 creators; run the same influence solo again"):
        read_solo(out)
    influence.solo(world / "data", out, base=world / "base", recipe=world / "recipe", seed=5)
    assert {path.name: path.read_bytes() for path in second.path.rglob("*") if path.is_file()} == whole
    assert kept.read_bytes() == b"kept" and not list(out.glob("*.part"))


def test_a_folder_of_other_fine_tunes_is_left_as_it_is(world, tmp_path):
    before = (world / "solo" / INDEX).read_bytes()
    for options in ({"seed": 6}, {"recipe": written(tmp_path, replace(RECIPE, epochs=3))}, {"base": world / "model"}):
        given = {"base": world / "base", "recipe": world / "recipe", "seed": 5} | options
        with pytest.raises(OptionError, match="holds fine-tunes of other works, or of another recipe; choose another"):
            influence.solo(world / "data", world / "solo", **given)
    assert (world / "solo" / INDEX).read_bytes() == before


def test_totals_count_what_works_do_alone_and_add_up_to_the_gain(world):
    picture = world / "data" / "003.png"
    without = influence.answer(picture, world / "s", draws=DRAWS)
    made = influence.answer(picture, world / "s", draws=DRAWS, solo=world / "solo")
    assert (without.facts["totals"], made.facts["totals"]) == ("whole way", "whole way and alone")
    after = shares_of(made)
    assert shares_of(without)["gain_alone"].isna().all() and after["gain_alone"].notna().all()
    end, path = (
        influence.attribute(picture, world / "s", method=method, k=None, draws=DRAWS)
        for method in ("two-point", "path")
    )
    e, p = end.groupby("creator")["score"].sum(), path.groupby("creator")["score"].sum()
    n, gain = end.groupby("creator").size(), made.queries["finetune_gain"].iloc[0]
    mixed = after["gain_alone"][e.index].astype(float) / 3 + e * 2 / 3
    rest = gain - mixed.sum()
    c = abs(rest) / path["score"].abs().sum() if rest * p.sum() > 0 else 0.0
    expected = mixed + c * p + (rest - c * p.sum()) * n / n.sum()
    found = after["group_score"][e.index].astype(float)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
    assert found.sum() == pytest.approx(gain, rel=1e-4)
    assert (after["group_score_se"] > 0).all()


def test_what_works_do_alone_is_the_base_s_loss_less_that_of_their_fine_tune(world):
    picture = world / "data" / "003.png"
    made = influence.answer(picture, world / "s", draws=DRAWS, solo=world / "solo")
    store = influence.open_store(world / "s")
    loaded, _ = influence.loading.load_for(
        store, model=None, lora=None, draws=DRAWS, engine="auto", batch_size=64, device="cpu", message=print
    )
    recipe = replace(loaded.recipe, role="query")
    image, _ = influence.datasets.decode(picture)
    pixels = influence.datasets.to_array(image, height=8, width=8, channels=3)
    item_id = influence.datasets.item_id(image, None)
    losses = {}
    for name, path in [("base", world / "base"), *((one.creator, one.path) for one in read_solo(world / "solo"))]:
        of = models.load_denoiser(path)
        found, _ = influence.features.losses(of.network, recipe, [item_id], *encoded(of, [pixels], [None]))
        losses[name] = found.mean()
    for creator, gain in shares_of(made)["gain_alone"].items():
        assert gain == pytest.approx(losses["base"] - losses[creator], rel=1e-3, abs=1e-6)


def test_several_trainings_count_by_their_mean(world, tmp_path):
    ask = {"images": world / "data" / "003.png", "store": world / "s", "draws": DRAWS}
    again = influence.solo(world / "data", tmp_path / "again", base=world / "base", recipe=world / "recipe", seed=6)
    one, other = (shares_of(influence.answer(**ask, solo=folder)) for folder in (world / "solo", again))
    both = shares_of(influence.answer(**ask, solo=[world / "solo", again]))
    assert (one["gain_alone"] != other["gain_alone"]).all()
    mean = (one["gain_alone"] + other["gain_alone"]) / 2
    np.testing.assert_allclose(both["gain_alone"].astype(float), mean.astype(float), rtol=1e-4, atol=1e-7)


def test_several_trainings_differ_in_the_seed_alone(world, tmp_path):
    def answer(*folders):
        return influence.answer(world / "data" / "003.png", world / "s", draws=DRAWS, solo=folders)

    with pytest.raises(OptionError, match=r"are one training, of seed 5; pass each once"):
        answer(world / "solo", shutil.copytree(world / "solo", tmp_path / "copy"))
    longer = written(tmp_path, replace(RECIPE, epochs=3))
    influence.solo(world / "data", tmp_path / "longer", base=world / "base", recipe=longer, seed=6)
    with pytest.raises(OptionError, match="differ in more than the seed; run influence solo with the same data set"):
        answer(world / "solo", tmp_path / "longer")


def test_fine_tunes_of_other_works_or_of_another_network_are_refused(world, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "metadata.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    (data / "006.png").unlink()
    influence.solo(data, tmp_path / "fewer", base=world / "base", recipe=world / "recipe")
    ask = {"draws": DRAWS}
    with pytest.raises(OptionError, match=r"not of the works of this store: those of 'creator 0' .*what is excluded"):
        influence.answer(world / "data" / "003.png", world / "s", solo=tmp_path / "fewer", **ask)
    influence.solo(world / "data", tmp_path / "elsewhere", base=world / "model", recipe=world / "recipe")
    with pytest.raises(OptionError, match=r"started from another model than .* run influence solo with its base"):
        influence.answer(world / "data" / "003.png", world / "s", solo=tmp_path / "elsewhere", **ask)
    wide = tiny_ddpm(tmp_path / "wide", width=16)
    influence.solo(world / "data", tmp_path / "other", base=wide, recipe=world / "recipe")
    for entry in read_solo(world / "solo"):  # the index says it is of this base
        shutil.copytree(tmp_path / "other" / entry.path.name, tmp_path / "mixed" / entry.path.name)
    shutil.copy(world / "solo" / INDEX, tmp_path / "mixed" / INDEX)
    with pytest.raises(OptionError, match="has other parameters than the fine-tuned model"):
        influence.answer(world / "data" / "003.png", world / "s", solo=tmp_path / "mixed", **ask)
    with pytest.raises(OptionError, match=r"solo.json cannot be read .*expected what influence solo makes"):
        influence.answer(world / "data" / "003.png", world / "s", solo=tmp_path, **ask)
    (tmp_path / INDEX).write_text("[]", encoding="utf-8")
    with pytest.raises(OptionError, match=r"solo.json holds a list; expected what influence solo makes"):
        read_solo(tmp_path)
    (tmp_path / INDEX).write_text('{"base": "", "creators": [{}]}', encoding="utf-8")
    with pytest.raises(OptionError, match=r"solo.json lacks 'creator'; expected what influence solo makes"):
        read_solo(tmp_path)


def test_totals_without_a_base_or_of_another_method_take_no_solo(world, tmp_path):
    influence.build(world / "data", model=world / "model", store=tmp_path / "s", dim=64, draws=DRAWS, metric="plain")
    with pytest.raises(OptionError, match="store s was built without --base DIR; leave it out"):
        influence.answer(world / "data" / "003.png", tmp_path / "s", draws=DRAWS, solo=world / "solo")
    with pytest.raises(OptionError, match="trak has no such totals; leave it out"):
        influence.answer(world / "data" / "003.png", world / "s", draws=DRAWS, solo=world / "solo", method="trak")


def test_an_export_with_it_is_replayed_from_the_command_line(world, tmp_path):
    def run(*parts):
        return CliRunner().invoke(cli, [str(part) for part in parts])

    out = tmp_path / "solo"
    made = run("solo", world / "data", "--base", world / "base", "--recipe", world / "recipe", "-o", out, "--seed", 5)
    assert made.exit_code == 0 and "pass it to influence export --solo" in made.output, made.output
    assert (out / INDEX).read_bytes() == (world / "solo" / INDEX).read_bytes()
    ask = [world / "data" / "003.png", "--store", world / "s", "--draws", DRAWS, "--solo", out]
    result = run("export", *ask, "-o", tmp_path / "tables")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "tables" / "run.json").read_text(encoding="utf-8"))["options"]["solo"] == [str(out)]
    result = run("replay", tmp_path / "tables" / "run.json", "-o", tmp_path / "again")
    assert result.exit_code == 0 and "every table has the bytes" in result.output, result.output


def creators(totals, by_batch, images):
    count = totals.shape[1]
    return Creators(
        [f"c{i}" for i in range(count)], np.asarray(images, float), totals, totals**2, np.full(len(totals), 9.0),
        np.full(len(totals), np.nan), by_batch, np.full(totals.shape, 0.16), None, sparse.csr_array(np.eye(count)),
    )  # fmt: skip


def test_each_batch_of_draws_has_the_totals_that_it_alone_would_give():
    rng = np.random.default_rng(0)
    by_batch, alone = rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 4, 3))
    images = [1.0, 5.0, 2.0]
    found = wholeway.with_alone(creators(by_batch.mean(0), by_batch, images), alone)
    np.testing.assert_allclose(found.totals, alone.mean(1) / 3 + by_batch.mean(0) * 2 / 3)
    np.testing.assert_allclose(found.by_batch.mean(0), found.totals)
    np.testing.assert_allclose(found.train_variance, 0.16 * 4 / 9)
    for b in range(4):
        one = wholeway.with_alone(creators(by_batch[b], by_batch[:0], images), alone[:, b : b + 1])
        np.testing.assert_allclose(found.by_batch[b], one.totals)


def test_with_the_other_terms_of_the_mean_totals_are_shapley_values():
    """Of a game of 3 creators with interactions: the first of the 3 terms is measured, the others are foretold."""
    rng = np.random.default_rng(1)
    values = {frozenset(c): rng.normal(size=2) for k in range(4) for c in combinations("abc", k)}
    alone = np.stack([values[frozenset(g)] - values[frozenset()] for g in "abc"], axis=1)
    others = []
    for g in "abc":
        rest = sorted({*"abc"} - {g})
        pairs = np.mean([values[frozenset({g, o})] - values[frozenset(o)] for o in rest], axis=0)
        others.append((pairs + values[frozenset("abc")] - values[frozenset(rest)]) / 2)
    end = creators(np.stack(others, axis=1), np.empty((0, 2, 3)), [1.0, 2.0, 3.0])
    exact = metrics.shapley(values)
    found = wholeway.with_alone(end, alone[:, None])
    np.testing.assert_allclose(found.totals, np.stack([exact[g] for g in "abc"], axis=1))
