"""Stores of a real model: exclusions, and repair."""

import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from influence_cli.main import cli
from real_stores import BATCH_SIZE, build, copy, new_world, rows_of, scores, without
from stores import files
from tiny_models import tiny_ddpm

import influence


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return new_world(tmp_path_factory.mktemp("world"))


def invoked(*parts):
    return CliRunner().invoke(cli, [str(part) for part in parts])


# Exclusions ---------------------------------------------------------------------------------------------------------


EXCLUDED = (["creator 1"], ["000.png"])


@pytest.fixture(scope="module", params=[16, 64])  # with 24 rows: H itself, and its dual
def whole_and_less(world, tmp_path_factory, request):
    """A store of all pictures, and one of those that an exclusion leaves."""
    path = tmp_path_factory.mktemp("exclusions")
    options = {"dim": request.param, "batch_size": 1, "half": world / "half"}
    options["metric"] = "plain"  # AdamW's is that of the images it was given
    build(world, path / "whole.store", **options)  # one row in a batch: rounding depends on what else is in a forward
    data, left = without(world, path, *EXCLUDED)
    assert left == 7
    # As many curvature rows for each image: 24 for 12 images, 14 for 7.
    build(world, path / "less.store", data=data, **options, curvature_rows=2 * left)
    return path


@pytest.mark.parametrize("method", influence.METHODS)
def test_scores_after_an_exclusion_are_those_of_a_store_without_these_images(world, whole_and_less, tmp_path, method):
    store, less = (shutil.copytree(whole_and_less / name, tmp_path / name) for name in ("whole.store", "less.store"))
    before = scores(world, store, method)
    ((creator,), (file_name,)) = EXCLUDED
    item = influence.open_store(store).items.set_index("file_name").loc[file_name, "item_id"]
    influence.exclude(store, creator=creator)
    influence.exclude(store, item=item)
    found, totals = scores(world, store, method)
    assert len(found) == 2 * 7
    wanted, wanted_totals = scores(world, less, method)
    assert found.index.equals(wanted.index)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max())
    assert totals.keys() == wanted_totals.keys()
    for key, (total, images) in totals.items():
        assert total == pytest.approx(wanted_totals[key][0], rel=1e-5, abs=1e-5 * wanted.abs().max())
        assert images == wanted_totals[key][1]
    influence.exclude(store, creator=creator, undo=True)
    influence.exclude(store, item=item, undo=True)
    again = scores(world, store, method)
    pd.testing.assert_series_equal(again[0], before[0])
    assert again[1] == before[1]


def test_a_store_that_is_open_honours_an_exclusion_at_once(world, tmp_path):
    store = influence.open_store(copy(world, tmp_path))
    assert len(scores(world, store, "gauss-newton")[0]) == 24
    influence.exclude(store.path, creator="creator 1")
    said = []
    assert len(scores(world, store, "gauss-newton", message=said.append)[0]) == 16
    assert "4 images of store s are excluded" in said
    facts = influence.inspect(store.path)
    assert facts["whole"] and facts["features"]["loss"]["images"] == 8
    assert facts["excluded"] == {"creators": ["creator 1"], "items": [], "images": 4}


def test_excluded_pictures_may_be_deleted_and_the_build_and_other_features_go_on(world, tmp_path):
    store = copy(world, tmp_path)
    (store / "shards" / "loss-000001.json").unlink()  # a shard that is still to be built when its pictures are gone
    data, _ = without(world, tmp_path, ["creator 1"])
    with pytest.raises(influence.StoreError, match=r"holds 4 images that the data set has not, 001.png first"):
        build(world, store, data=data)
    influence.exclude(store, creator="creator 1")
    build(world, store, data=data)
    assert rows_of(store).keys() == {i for i in rows_of(world / "built.store") if i in rows_of(store)}
    assert len(rows_of(store)) == 8
    fields = influence.open_store(store).source
    assert fields["dataset"] == str(world / "data")
    assert len(scores(world, store, "gauss-newton")[0]) == 16


# Verify and repair --------------------------------------------------------------------------------------------------


def damaged(store, shard=0):
    """Change one byte of a shard."""
    (path,) = (store / "shards").glob(f"loss-{shard:06d}-*.h5")
    data = bytearray(path.read_bytes())
    data[2100] ^= 1
    path.write_bytes(data)
    return path


def test_repair_builds_again_the_damaged_shards_and_touches_no_other(world, tmp_path):
    store = copy(world, tmp_path)
    scores(world, store, "gauss-newton")
    whole = files(store)
    times = {p.name: p.stat().st_mtime_ns for p in (store / "shards").iterdir()}
    bad = damaged(store)
    run = invoked("verify", store)
    made = influence.open_store(store)
    names = made.items[made.items["shard"] == 0]["file_name"]
    assert run.exit_code == 1 and run.stderr.count("\n") == 1 and "1 problems, 8 images affected" in run.stderr
    assert run.stdout.splitlines()[0].startswith("shards/loss-000000.json: ") and "is damaged" in run.stdout
    assert {line.split()[-1] for line in run.stdout.splitlines()[1:]} == set(names)
    with pytest.raises(influence.StoreError, match="is damaged"):
        scores(world, store, "gauss-newton")
    run = invoked("verify", store, "--repair", "--batch-size", BATCH_SIZE)
    assert run.exit_code == 0 and "1 problems repaired, 8 images built again" in run.stdout, run.stderr
    assert files(store) == whole and influence.verify(store) == []
    for path in (store / "shards").iterdir():
        assert (path.stat().st_mtime_ns == times[path.name]) == (path.name not in (bad.name, "loss-000000.json"))


def test_repair_leaves_shards_that_were_never_built_alone(world, tmp_path):
    store = copy(world, tmp_path)
    (store / "shards" / "loss-000001.json").unlink()
    damaged(store)
    assert [problem.shard for problem in influence.repair(store)] == [0]
    assert influence.open_store(store).missing() == [1]


def test_nothing_is_dropped_when_it_could_not_be_built_again(world, tmp_path):
    store = copy(world, tmp_path)
    damaged(store)
    left = files(store)
    data, _ = without(world, tmp_path, ["creator 1"])
    with pytest.raises(influence.StoreError, match="nothing was dropped"):
        influence.repair(store, dataset=data)
    with pytest.raises(influence.InfluenceError, match="is not there"):
        influence.repair(store, model=tmp_path / "nowhere")
    other = tiny_ddpm(tmp_path / "other", seed=1)
    with pytest.raises(influence.SpecMismatchError, match="model is"):
        influence.repair(store, model=other)
    (record,) = (store / "items").glob("*.json")
    record.write_bytes(b"{}")
    with pytest.raises(influence.StoreError, match=r"items/000000.json cannot be built again, restore it from a copy"):
        influence.repair(store)
    record.write_bytes(left[f"items/{record.name}"])
    assert files(store) == left


def test_a_damaged_derived_file_is_told_dropped_and_made_again(world, tmp_path):
    store = copy(world, tmp_path)
    before = scores(world, store, "gauss-newton")
    made = sorted((store / "derived").iterdir())
    assert [path.name.split("-")[0] for path in made] == ["curvature", "leverage", "own"]
    for derived in made:
        derived.write_bytes(derived.read_bytes()[:-1])
    assert [problem.file for problem in influence.verify(store)] == [f"derived/{path.name}" for path in made]
    influence.repair(store)
    assert not any(path.exists() for path in made) and influence.verify(store) == []
    pd.testing.assert_series_equal(scores(world, store, "gauss-newton")[0], before[0])
