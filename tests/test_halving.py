"""A fine-tune of half the length: made by the trainer, taken by a build, and scored beside the whole one."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from influence_cli.main import cli
from real_stores import stacked
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import finetuning, models, retraining
from influence.errors import ModelError, OptionError
from influence.finetuning import FineTune

DRAWS = 8
WHOLE = FineTune(epochs=3, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("half")
    pictures(path / "data", count=7, size=8, captions=False)
    pictures(path / "controls", count=5, size=8, captions=False, key=1)
    for name, seed in (("base", 1), ("model", 2), ("half", 3)):
        tiny_ddpm(path / name, seed=seed)
    options = {"dim": 64, "draws": DRAWS, "controls": path / "controls", "metric": "plain"}
    both = {"base": path / "base", "half": path / "half"}
    influence.build(path / "data", model=path / "model", store=path / "s", **both, **options)
    influence.build(path / "data", model=path / "half", store=path / "of_half", **options)
    return path


def test_scores_add_up_those_of_both_models_and_are_the_default(world):
    picture = world / "controls" / "002.png"
    table = influence.attribute(picture, world / "s", k=None, draws=DRAWS, damping=0.3)
    assert table.attrs["method"] == "two-length"
    made = influence.open_store(world / "s")
    assert made.complete("half") and made.controls().complete("half") and made.missing("late")
    ids, end, psi = stacked(world / "s")
    others, half, _ = stacked(world / "of_half")
    assert ids == others
    np.testing.assert_allclose(stacked(world / "s", "half")[1], half, rtol=1e-5, atol=1e-6 * np.abs(half).max())
    silent, asked = influence.progress.silent, []
    for store in ("s", "of_half"):
        loaded, _ = influence.loading.load_for(
            influence.open_store(world / store), model=None, lora=None, draws=DRAWS, engine="auto", batch_size=64,
            device="cpu", message=print,
        )  # fmt: skip
        asked.append(influence.queries.read_queries(loaded, "loss", [picture], [None], silent, silent).phi[0])
    inverse = np.linalg.inv(psi.T @ psi / len(psi) + 2 * 0.3 * (psi**2).sum() / len(psi) / 64 * np.eye(64))
    expected = (end @ inverse @ asked[0] + half @ inverse @ asked[1]) / len(ids)
    by_item = table.set_index("item_id")["score"]
    np.testing.assert_allclose([by_item[i] for i in ids], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert table["p_value"].between(1 / 6, 1).all() and (table["score_se"] > 0).all()
    assert (table["leverage"] > 0).any()


def test_where_it_was_moved_can_be_said(world, tmp_path):
    picture, options = world / "controls" / "002.png", {"draws": DRAWS, "damping": 0.3}
    shutil.copytree(world / "half", tmp_path / "half")
    build = {"model": world / "model", "dim": 64, "draws": DRAWS, "metric": "plain"}
    influence.build(world / "data", store=tmp_path / "s", half=tmp_path / "half", **build)
    before = influence.attribute(picture, tmp_path / "s", **options)
    (tmp_path / "half").rename(tmp_path / "moved")
    with pytest.raises(OptionError, match="was at .*half and is not there; say where with --half DIR"):
        influence.attribute(picture, tmp_path / "s", **options)
    pd.testing.assert_frame_equal(
        influence.attribute(picture, tmp_path / "s", half=tmp_path / "moved", **options), before
    )


def test_answers_are_of_the_whole_way_with_it_too(world):
    made = influence.answer(world / "controls" / "002.png", world / "s", draws=DRAWS)
    assert made.facts["totals"] == "whole way" and made.facts["method"] == "two-length"


def test_a_damaged_shard_of_it_is_built_again_of_it(world, tmp_path):
    store = shutil.copytree(world / "s", tmp_path / "s")
    file = next((store / "shards").glob("half-*.h5"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes(100))
    assert [problem.family for problem in influence.verify(store)] == ["half"]
    influence.repair(store)
    assert file.read_bytes() == whole


def test_a_store_without_it_says_how_to_make_it(world):
    with pytest.raises(OptionError, match="was built without: make it with influence halve, and build another store"):
        influence.attribute(world / "data" / "003.png", world / "of_half", method="two-length", draws=DRAWS)


def test_another_model_of_half_the_length_is_refused(world, tmp_path):
    options = {"model": world / "model", "dim": 64, "draws": DRAWS, "metric": "plain"}
    tiny_ddpm(tmp_path / "wide", size=8, width=16)
    with pytest.raises(OptionError, match=r"the model of half the length has other parameters .* pass what the same"):
        influence.build(world / "data", store=tmp_path / "new", half=tmp_path / "wide", **options)
    with pytest.raises(OptionError, match="the model of half the length at .* is the fine-tuned model itself; pass"):
        influence.build(world / "data", store=tmp_path / "new", half=world / "model", **options)
    assert not (tmp_path / "new").exists()
    for store in ("s", "of_half"):
        with pytest.raises(OptionError, match=f"store {store} was made without this model of half the length; leave"):
            influence.build(world / "data", store=world / store, half=world / "base", **options)
    shutil.copytree(world / "half", tmp_path / "half")
    influence.build(world / "data", store=tmp_path / "s", half=tmp_path / "half", **options)
    shutil.rmtree(tmp_path / "half")
    tiny_ddpm(tmp_path / "half", seed=4)
    with pytest.raises(OptionError, match="is not the one that the store was built with"):
        influence.attribute(world / "data" / "003.png", tmp_path / "s", draws=DRAWS)


@pytest.mark.parametrize("lora", [False, True])
def test_halve_is_the_trainer_for_half_of_the_epochs(tmp_path, lora):
    base = tiny_stable_diffusion(tmp_path / "base") if lora else tiny_ddpm(tmp_path / "base")
    data = pictures(tmp_path / "data", count=6, size=16 if lora else 8, captions=lora)
    recipe = dataclasses.replace(WHOLE, lora_rank=2) if lora else WHOLE
    (tmp_path / "finetune.json").write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
    steps = []
    influence.halve(
        data, tmp_path / "half", base=base, recipe=tmp_path, seed=5, progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == ("fine-tune", 3, 3)  # ⌈1.5 · 6 / 4⌉
    found = models.load_denoiser(base if lora else tmp_path / "half", lora=tmp_path / "half" if lora else None)
    half = dataclasses.replace(recipe, epochs=1.5)
    assert finetuning.read_recipe(tmp_path / "half") == half
    expected = finetuning.start(base, half)
    items = sorted(influence.datasets.read_dataset(data).items, key=lambda item: item.item_id)
    encoded = retraining.encode(expected, [item.path for item in items], [item.caption for item in items])
    finetuning.fine_tune(expected, half, *encoded, seed=5)
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], value.detach(), rtol=1e-5, atol=1e-7)
    with pytest.raises(ModelError, match="exists already; choose another folder"):
        influence.halve(data, tmp_path / "half", base=base, recipe=tmp_path)


def test_a_lora_of_half_the_length_goes_from_the_command_line_into_scores(tmp_path):
    base = tiny_stable_diffusion(tmp_path / "base")
    tiny_lora(base, tmp_path / "lora")
    data = pictures(tmp_path / "data", count=5, size=16)
    recipe = dataclasses.replace(WHOLE, lora_rank=2, lora_alpha=4.0)
    (tmp_path / "lora" / "finetune.json").write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
    half, store = tmp_path / "half", tmp_path / "s"
    parts = ["halve", data, "--base", base, "--recipe", tmp_path / "lora", "-o", half]
    result = CliRunner().invoke(cli, [str(part) for part in parts])
    assert result.exit_code == 0 and "pass it to influence build --half" in result.stdout, result.output
    parts = ["build", data, "--model", base, "--lora", tmp_path / "lora", "--half", half, "--dim", 32, "--draws", 4]
    planned = CliRunner().invoke(cli, [str(part) for part in [*parts, "--plan"]])
    assert planned.exit_code == 0, planned.output
    result = CliRunner().invoke(cli, [str(part) for part in [*parts, "--store", store]])
    assert result.exit_code == 0, result.output
    table = influence.attribute(data / "001.png", store, k=None, draws=4, prompt="picture 1")
    assert table.attrs["method"] == "two-length" and np.isfinite(table["score"]).all()


def test_halve_saves_the_alpha_that_it_trained_with(tmp_path):
    base = tiny_stable_diffusion(tmp_path / "base")
    data = pictures(tmp_path / "data", count=4, size=16)
    recipe = dataclasses.replace(WHOLE, lora_rank=2, lora_alpha=8.0)
    (tmp_path / "finetune.json").write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
    influence.halve(data, tmp_path / "half", base=base, recipe=tmp_path)
    found = models.load_denoiser(base, lora=tmp_path / "half")
    assert {s for module in found.network.modules() for s in getattr(module, "scaling", {}).values()} == {4.0}


def test_halve_trains_on_every_file_as_build_counts_them_and_says_what_it_leaves_out(tmp_path):
    base, data = tiny_ddpm(tmp_path / "base"), pictures(tmp_path / "data", count=3, size=8, captions=False)
    with (data / "metadata.csv").open("a", encoding="utf-8") as file:
        for name in ("a.png", "b.png", "c.png"):
            shutil.copy(data / "001.png", data / name)
            file.write(f"{name},,creator 0\n")
        (data / "odd.png").write_text("no picture", encoding="utf-8")
        file.write("odd.png,,creator 0\n")
    (tmp_path / "finetune.json").write_text(json.dumps(dataclasses.asdict(WHOLE)), encoding="utf-8")
    steps, said = [], []
    influence.halve(
        data, tmp_path / "half", base=base, recipe=tmp_path, progress=lambda *step: steps.append(step),
        message=said.append,
    )  # fmt: skip
    assert steps[-1] == ("fine-tune", 3, 3)  # ⌈1.5 · 6 / 4⌉
    assert any(line.startswith("training loss assumed") for line in said)
    assert any("occur more than once" in line for line in said)
    assert any(line.startswith("refused odd.png: ") for line in said)
    found, expected = models.load_denoiser(tmp_path / "half"), finetuning.start(base, WHOLE)
    files = [tmp_path / "data" / f"{name}.png" for name in ("000", "001", "002", "a", "b", "c")]
    ids = {path: influence.datasets.item_id(influence.datasets.decode(path)[0], "") for path in files}
    files.sort(key=lambda path: ids[path])
    x0, _ = retraining.encode(expected, files, [None] * len(files))
    finetuning.fine_tune(expected, dataclasses.replace(WHOLE, epochs=1.5), x0, None, seed=0)
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], value.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_goes_on_where_its_models_are_now(world, tmp_path, workers):
    for name in ("base", "model", "half"):
        shutil.copytree(world / name, tmp_path / name)
    pictures(tmp_path / "data", count=7, size=8, captions=False)
    options = {"dim": 64, "draws": DRAWS, "metric": "plain", "store": tmp_path / "s"}
    influence.build(
        tmp_path / "data", model=tmp_path / "model", base=tmp_path / "base", half=tmp_path / "half", **options
    )
    for name in ("base", "model", "half"):
        (tmp_path / name).rename(tmp_path / f"{name}2")
    pictures(tmp_path / "more", count=9, size=8, captions=False)
    for i in (7, 8):
        shutil.copy(tmp_path / "more" / f"{i:03d}.png", tmp_path / "data")
    shutil.copy(tmp_path / "more" / "metadata.csv", tmp_path / "data")
    made = influence.build(
        tmp_path / "data", model=tmp_path / "model2", base=tmp_path / "base2", half=tmp_path / "half2",
        workers=workers, **options,
    )  # fmt: skip
    assert made.complete("half") and made.num_rows("half")[0] == 9


def test_repair_takes_what_was_moved_from_where_it_is_now(world, tmp_path):
    for name in ("half", "model", "controls", "data"):
        shutil.copytree(world / name, tmp_path / name)
    store = shutil.copytree(world / "s", tmp_path / "s")
    for part in (store / "shards", store / "controls" / "shards"):
        (file,) = part.glob("half-000000-*.h5")
        file.write_bytes(file.read_bytes()[:-7])
    there = {name: world / name for name in ("half", "model", "controls")}
    try:
        for path in there.values():
            path.rename(path.with_name(f"{path.name}-away"))
        moved = {name: tmp_path / name for name in there}
        influence.repair(store, **moved)
    finally:
        for path in there.values():
            path.with_name(f"{path.name}-away").rename(path)
    assert influence.verify(store) == []


def test_a_half_of_another_config_is_refused(world, tmp_path):
    half = shutil.copytree(world / "half", tmp_path / "half")
    file = half / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_head_dim": 4}), encoding="utf-8")
    with pytest.raises(OptionError, match="the model of half the length has another config.json than the fine-tuned"):
        influence.build(
            world / "data", model=world / "model", half=half, store=tmp_path / "s", dim=64, draws=2, metric="plain"
        )


def test_a_folder_that_cannot_be_made_is_refused_before_the_training(world, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "r.json").write_text(json.dumps(dataclasses.asdict(WHOLE)))
    with pytest.raises(ModelError, match="cannot be made: .*; choose another folder"):
        influence.halve(world / "data", tmp_path / "file" / "half", base=world / "base", recipe=tmp_path / "r.json")
