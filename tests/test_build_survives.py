"""Real builds that meet damaged weights, pictures that give no numbers, new pictures, rivals and signals."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from real_stores import BATCH_SIZE, INFLUENCE, build, copy, new_world, rows_of
from safetensors.torch import load_file, save_file
from stores import files
from tiny_models import pictures

import influence
from influence import building, store, taking, verification


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return new_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("metric", ["plain", "adamw"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_without_finite_features_is_refused_by_name_and_the_others_are_bit_identical(
    world, tmp_path, monkeypatch, value, metric
):
    if metric == "plain":
        build(world, tmp_path / "whole", metric=metric)

    def load(item, load=taking.datasets.load, **options):
        pixels = load(item, **options)
        return np.full_like(pixels, value) if item.file_name == "003.png" else pixels

    monkeypatch.setattr(taking.datasets, "load", load)
    said = []
    build(world, tmp_path / "s", message=said.append, metric=metric)
    made, whole = influence.open_store(tmp_path / "s"), rows_of(world / "built.store")
    (item_id,) = set(whole) - set(rows_of(tmp_path / "s"))
    assert made.items.set_index("item_id").loc[item_id, "file_name"] == "003.png"
    assert list(made.refused()) == [item_id]
    assert any("003.png" in line and "not finite" in line for line in said)
    assert any("1 images have no features, 11 have" in line for line in said)
    if metric == "plain":  # that of AdamW is measured on pictures, without those that have no finite gradient
        whole = rows_of(tmp_path / "whole")
        assert rows_of(tmp_path / "s") == {i: row for i, row in whole.items() if i != item_id}
    assert len(influence.attribute(world / "data" / "003.png", made, k=None, draws=4)) == 11


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_stop_the_build_at_once_and_are_named(world, tmp_path, value):
    model = Path(shutil.copytree(world / "ddpm", tmp_path / "m"))
    (file,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(influence.ModelError, match=r"tensor conv_in.bias holds NaN or infinity"):
        influence.build(world / "data", model=model, store=tmp_path / "s", dim=16)
    assert not (tmp_path / "s").exists()


def test_a_build_after_pictures_were_added_takes_the_features_of_these_alone(world, tmp_path, monkeypatch):
    path, taken = copy(world, tmp_path), []

    def take(denoiser, recipe, items, take=building.take):
        taken.extend(item.file_name for item in items)
        return take(denoiser, recipe, items)

    monkeypatch.setattr(building, "take", take)
    before, kept = rows_of(path), files(path)
    build(world, path, data=pictures(tmp_path / "data", count=15))
    assert sorted(taken) == sorted(2 * ["012.png", "013.png", "014.png"])  # at both points of the way
    after = rows_of(path)
    assert len(after) == 15 and before.items() < after.items()
    assert kept.items() < files(path).items()
    build(world, path, data=tmp_path / "data")
    assert len(taken) == 6


def command(world, path, *more):
    return [
        INFLUENCE, "build", str(world / "data"), "--model", str(world / "ddpm"), "--base", str(world / "base"),
        "--store", str(path), "--dim", "16", "--draws", "4", "--curvature-rows", "24",
        "--batch-size", str(BATCH_SIZE), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_a_signal_to_stop_gives_one_line_and_keeps_what_was_committed(world, tmp_path, number, workers):
    data = pictures(tmp_path / "data", count=200)
    parts = command(world, tmp_path / "s", "--workers", workers)
    parts[2] = str(data)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(parts, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                               start_new_session=True)  # fmt: skip
    end = time.monotonic() + 600
    while not list((tmp_path / "s" / "shards").glob("*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: every process gets it
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    said = ("training loss assumed", "how the model was trained")
    lines = [line for line in stderr.splitlines() if not line.startswith(said)]
    assert lines == [f"Error: stopped by {number.name}; what was committed is kept: run the same command again"]
    left = store.open_store(tmp_path / "s")
    assert left.records() and left.missing() and verification.verify(left) == []
    assert not list((tmp_path / "s" / "tmp").iterdir())


def test_two_real_builders_of_one_store_both_finish_and_make_it_once(world, tmp_path):
    runs = [
        subprocess.Popen(command(world, tmp_path / "s"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr
    assert rows_of(tmp_path / "s") == rows_of(world / "built.store")
    wanted = {name: data for name, data in files(world / "built.store").items() if name.startswith("shards")}
    assert {name: data for name, data in files(tmp_path / "s").items() if name.startswith("shards")} == wanted
