import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import independent_reader
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from stores import BUILD, SPEC, content_of, files, fill, filled, make, table, with_spec

from influence import commit, items, shards, store, verification
from influence.errors import SpecMismatchError, StoreError
from influence.exclusions import Exclusions

# Round trip ---------------------------------------------------------------------------------------------------------


def test_what_is_committed_is_read_back(tmp_path):
    made = filled(tmp_path / "s")
    again = store.open_store(tmp_path / "s")
    assert again.missing() == [] and again.complete() and len(again.records()) == 3
    assert again.spec == SPEC and again.build == BUILD and again.source == {"model": "m"}
    for shard, block in zip(again.records(), again.blocks(), strict=True):
        found, wanted = again.read("loss", shard), content_of(made, shard)
        assert found.item_ids == wanted.item_ids == block.item_ids and block.shard == shard
        for name, array in shards.arrays(wanted).items():
            np.testing.assert_array_equal(shards.arrays(found)[name], array)
            np.testing.assert_array_equal(shards.arrays(block)[name], array)
    assert verification.verify(again) == [] == verification.verify(tmp_path / "s")
    assert not list((tmp_path / "s" / "tmp").iterdir())


def test_a_reader_that_knows_no_hdf5_library_finds_the_same_bytes(tmp_path):
    made = filled(tmp_path / "s", 20)
    made.commit(content_of(made, 0, family="square"))  # without curvature rows: empty datasets
    for family, shard in (("loss", 0), ("loss", 2), ("square", 0)):
        found = independent_reader.read(tmp_path / "s" / "shards" / made.records(family)[shard].file)
        wanted = shards.arrays(made.read(family, shard))
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_equal_content_gives_equal_bytes(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_shard_file_is_of_the_oldest_hdf5_version_and_holds_little_else_than_its_data(tmp_path):
    data = shards.encode(shards.arrays(content_of(make(tmp_path / "s"), 0)))
    assert data[:9] == b"\x89HDF\r\n\x1a\n\0"
    assert len(data) - shards.size(shards.layout(8, 16, SPEC.dim, 2)) < 5120


def test_arrays_are_mapped_read_only(tmp_path):
    found = filled(tmp_path / "s").read("loss", 0)
    assert isinstance(found.phi.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.phi[0] = 0


def test_the_two_families_are_apart(tmp_path):
    made = filled(tmp_path / "s", 8)
    before = made.family_hash()
    assert made.missing("square") == [0] and not made.complete("square")
    fill(made, "square")
    assert made.complete("square") and made.read("square", 0).psi.shape == (0, 6)
    assert made.family_hash() == before != made.family_hash("square")
    for call in (made.records, made.missing, made.refused, made.family_hash):
        with pytest.raises(StoreError, match="'cube' are unknown; expected one of loss, square"):
            call("cube")


def test_the_hash_of_a_family_changes_with_what_is_committed(tmp_path):
    made = make(tmp_path / "s", 20)
    seen = {made.family_hash()}
    for shard in made.missing():
        made.commit(content_of(made, shard))
        seen.add(made.family_hash())
    assert len(seen) == 4
    other = make(tmp_path / "t", 20)
    other.commit(content_of(other, 0, loss=np.ones(8, np.float32)))
    for shard in other.missing():
        other.commit(content_of(other, shard))
    assert other.family_hash() != made.family_hash()


def test_a_shard_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match="store s has no loss shard 1; run influence build"):
        make(tmp_path / "s").read("loss", 1)


# Images and shards --------------------------------------------------------------------------------------------------


def test_the_order_of_files_changes_no_shard(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", items=table(20).iloc[::-1])
    assert [a.shard_items(i) for i in range(3)] == [b.shard_items(i) for i in range(3)]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_table_keeps_what_it_was_given(tmp_path):
    given = table(3).assign(caption=["a", None, "c\n☃"], licence=[None, "CC0", None])
    given = pd.concat([given, given.iloc[:1].assign(file_name="twin.png", creator="other")])
    made = make(tmp_path / "s", items=given)
    assert made.shard_items(0) == [f"{i:032x}" for i in range(3)]
    found = store.open_store(tmp_path / "s").items.sort_values(["item_id", "file_name"], ignore_index=True)
    assert found["file_name"].tolist() == ["0.png", "twin.png", "1.png", "2.png"]
    assert found["creator"].tolist() == ["creator 0", "other", "creator 1", "creator 0"]
    assert found["caption"].fillna("-").tolist() == ["a", "a", "-", "c\n☃"]
    assert found["licence"].fillna("-").tolist() == ["-", "-", "CC0", "-"]
    assert found["shard"].tolist() == [0] * 4


def test_added_images_get_new_shards_and_the_old_ones_stay(tmp_path):
    made = filled(tmp_path / "s", 20)
    before = files(tmp_path / "s")
    grown = make(tmp_path / "s", 30)
    assert grown.missing() == [3, 4]
    assert all(grown.shard_items(i) == made.shard_items(i) for i in range(3))
    assert {name: data for name, data in files(tmp_path / "s").items() if name in before} == before
    assert make(tmp_path / "s", 30).missing() == [3, 4]
    assert items.numbers(tmp_path / "s" / "items") == [0, 1]


def test_a_changed_creator_is_a_new_table_and_no_new_work(tmp_path):
    filled(tmp_path / "s", 8)
    again = make(tmp_path / "s", items=table(8).assign(creator="x"))
    assert again.complete() and set(again.items["creator"]) == {"x"}
    assert items.numbers(tmp_path / "s" / "items") == [0, 1]


def test_a_store_that_is_open_goes_on_while_another_builder_adds_images(tmp_path):
    made = filled(tmp_path / "s", 8)
    filled(tmp_path / "s", 20)
    assert made.complete() and len(list(made.blocks())) == 1 and len(made.items) == 8
    assert len(list(store.open_store(tmp_path / "s").blocks())) == 3


def test_a_data_set_that_lost_images_is_refused(tmp_path):
    filled(tmp_path / "s", 20)
    with pytest.raises(StoreError, match=r"holds 5 images that the data set has not, 15.png first; put them back"):
        make(tmp_path / "s", 15)


@given(st.integers(1, 10**7), st.integers(1, 10**6), st.floats(0, 100), st.integers(0, 16))
@example(2076846, 229, 0.0, 7)  # small rows, beside which ids and scales count
def test_shards_are_neither_tiny_nor_huge(count, dim, rate, batches):
    size = items.images_per_shard(count, dim, rate, batches)
    assert size >= 1
    assert size == 1 or shards.size(shards.layout(size, int(size * rate), dim, batches)) <= 128 << 20
    assert size <= max(8, -(-count // 64))


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 999), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_shards_depend_on_the_set_of_ids_alone(ids, random):
    rows = [(f"{i:032x}", f"{i}.png", None, "x", None) for i in ids]
    shuffled = random.sample(rows, len(rows))
    frames = [pd.DataFrame(r, columns=list(store.ITEM_COLUMNS)) for r in (rows, shuffled)]
    first, second = (
        items.members(items._assign("s", items.SCHEMA.empty_table(), frame, 6, 1.0, 2, Exclusions()))
        for frame in frames
    )
    assert first == second
    assert sorted(i for shard in first.values() for i in shard) == sorted(r[0] for r in rows)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("item_id", "ü", "is no id of an image"),
        ("item_id", "x" * 33, "is no id of an image"),
        ("item_id", None, "rows without item_id"),
        ("file_name", None, "rows without file_name"),
        ("creator", None, "rows without creator"),
        ("caption", 3, "cannot be stored"),
        ("caption", "\ud800", "cannot be stored"),
    ],
)
def test_a_table_that_could_not_be_read_back_is_not_written(tmp_path, column, value, message):
    given = table(8).astype(object)
    given.loc[3, column] = value
    with pytest.raises(StoreError, match=message):
        make(tmp_path / "s", items=given)
    assert items.numbers(tmp_path / "s" / "items") == []


def test_a_store_without_a_table_of_images_does_not_pass_for_complete(tmp_path):
    with pytest.raises(StoreError, match="no rows"):
        make(tmp_path / "s", 0)
    left = store.open_store(tmp_path / "s")
    assert left.build == BUILD
    for call in (left.missing, left.complete, left.family_hash, left.refused):
        with pytest.raises(StoreError, match="no table of images yet; run influence build again"):
            call()
    assert filled(tmp_path / "s").complete()


# Identity -----------------------------------------------------------------------------------------------------------


def test_another_spec_or_build_is_refused_naming_both_values(tmp_path):
    make(tmp_path / "s")
    advice = re.escape("Use the same options, or another --store folder.")
    with pytest.raises(
        SpecMismatchError,
        match=f"model is eeeeeeeeeeee…, store s has aaaaaaaaaaaa…; seed is 1, store s has 0. {advice}",
    ):
        make(tmp_path / "s", spec=with_spec(seed=1, model="e" * 64))
    with pytest.raises(SpecMismatchError, match=f"draws is 8, store s has 4. {advice}"):
        make(tmp_path / "s", build=BUILD | {"draws": 8})
    with pytest.raises(SpecMismatchError, match="new is 1, store s has None"):
        make(tmp_path / "s", build=BUILD | {"new": 1})
    assert items.numbers(tmp_path / "s" / "items") == [0]


def test_values_that_json_knows_in_another_form_are_the_same_values(tmp_path):
    build = BUILD | {"pair": (1, 2), "by number": {2: "b", 10: "a"}}
    make(tmp_path / "s", build=build)
    assert make(tmp_path / "s", build=build).build["pair"] == [1, 2]
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(StoreError, match="plain JSON"):
            make(tmp_path / "t", source=bad)
    assert not (tmp_path / "t").exists()


def test_a_folder_that_is_something_else_is_not_written_to(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"is not a store and not empty \(it holds holiday.jpg\); choose another"):
        make(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        make(tmp_path / "holiday.jpg")
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(StoreError, match=r"it has no store\.json; make one with influence build"):
        store.open_store(tmp_path)
    for call in (store.open_store, verification.verify):
        with pytest.raises(StoreError, match="there is no store at"):
            call(tmp_path / "absent")


def test_a_store_that_lost_its_identity_is_neither_read_nor_made_anew(tmp_path):
    filled(tmp_path / "s", 8)
    (tmp_path / "s" / "store.json").unlink()
    with pytest.raises(StoreError, match=r"restore its store\.json"):
        make(tmp_path / "s", 8)
    with pytest.raises(StoreError, match=r"has no store\.json"):
        store.open_store(tmp_path / "s")


def test_an_empty_folder_or_one_with_foreign_files_in_tmp_will_do(tmp_path):
    (tmp_path / "s" / "tmp").mkdir(parents=True)
    (tmp_path / "s" / "tmp" / "junk.h5").write_bytes(b"junk")
    made = filled(tmp_path / "s", 8)
    assert verification.verify(made) == [] and made.complete()
    assert (tmp_path / "s" / "tmp" / "junk.h5").exists()


def test_what_killed_builders_left_is_removed_after_a_day(tmp_path):
    make(tmp_path / "s")
    old, new = (tmp_path / "s" / "tmp" / name for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    make(tmp_path / "s")
    assert new.exists() and not old.exists()


def test_another_format_is_refused(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s" / "store.json"
    fields = json.loads(path.read_bytes())
    fields.pop("seal")
    for change in ({"format": 2}, {"kind": "bakery"}):
        path.write_bytes(commit.sealed(fields | change))
        with pytest.raises(StoreError, match="this program reads format 1"):
            store.open_store(tmp_path / "s")
    for change in ({"spec": []}, {"spec": fields["spec"] | {"sample_shape": 3}}, {"build": None}):
        path.write_bytes(commit.sealed(fields | change))
        with pytest.raises(StoreError, match="has no spec, build or source"):
            store.open_store(tmp_path / "s")
    for dim in (0, True, 2.0, "8"):
        path.write_bytes(commit.sealed(fields | {"spec": fields["spec"] | {"dim": dim}}))
        with pytest.raises(StoreError, match="expected a positive number"):
            store.open_store(tmp_path / "s")
    path.write_bytes(commit.sealed(fields | {"spec": fields["spec"] | {"flavour": 1}}))
    with pytest.raises(SpecMismatchError, match="unknown or missing fields: flavour"):
        store.open_store(tmp_path / "s")


# Commit -------------------------------------------------------------------------------------------------------------


def test_refused_images_are_recorded(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0, refuse=(f"{3:032x}",)))
    again = store.open_store(tmp_path / "s")
    assert again.refused() == {f"{3:032x}": "its gradient is not finite"} and again.complete()
    assert again.read("loss", 0).phi.shape == (7, 6)
    assert again.read("loss", 0).refused == again.refused()


def test_a_shard_may_consist_of_refused_images(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0, refuse=made.shard_items(0)))
    (block,) = store.open_store(tmp_path / "s").blocks()
    assert block.phi.shape == block.psi.shape == (0, 6) and block.item_ids == []
    assert verification.verify(tmp_path / "s") == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["phi", "psi", "loss"])
def test_no_number_that_is_not_finite_gets_in(tmp_path, field, value):
    made = make(tmp_path / "s", 8)
    content = content_of(made, 0)
    getattr(content, field).flat[3] = value
    with pytest.raises(StoreError, match=f"{field} of loss shard 0 holds NaN or infinity"):
        made.commit(content)
    assert made.missing() == [0] and not list((tmp_path / "s" / "tmp").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": 1}, "loss shard 1 must name each of its 7 images once"),
        ({"shard": 9}, "loss shard 9 has no images"),
        ({"family": "cube"}, "'cube' are unknown"),
        ({"phi": np.zeros((8, 6))}, "phi of loss shard 0 is float64"),
        ({"phi": np.zeros((8, 6), ">f4")}, "phi of loss shard 0 is >f4"),
        ({"phi": np.zeros((8, 5), np.float32)}, r"is float32 \(8, 5\); expected float32 \(8, 6\)"),
        ({"loss": np.zeros((8, 1), np.float32)}, "loss of loss shard 0 is"),
        ({"psi_item": np.zeros(16, np.int64)}, "psi_item of loss shard 0 is int64"),
        ({"psi_draw": np.zeros(3, np.int32)}, "psi_draw of loss shard 0 is"),
        ({"psi_item": np.repeat(np.arange(1, 9), 2).astype(np.int32)}, "not of its images"),
        ({"psi_item": np.repeat(np.arange(-1, 7), 2).astype(np.int32)}, "not of its images"),
        ({"psi_item": np.repeat(np.arange(7, -1, -1), 2).astype(np.int32)}, "in the order of images and draws"),
        ({"psi_draw": np.tile([2, 0], 8).astype(np.int32)}, "in the order of images and draws"),
        ({"psi_draw": np.full(16, -1, np.int32)}, "not of its images"),
        ({"refused": {f"{3:032x}": "twice"}}, "must name each of its 8 images once"),
        ({"item_ids": [f"{i:032x}" for i in (1, 0, *range(2, 8))]}, "not in the order"),
        ({"item_ids": [f"{i:032x}" for i in (0, 0, *range(2, 8))]}, "must name each"),
        ({"item_ids": [f"{i:032x}" for i in range(7)]}, r"must name each .*0{31}7"),
    ],
)
def test_rows_of_other_images_or_shapes_are_refused(tmp_path, changes, message):
    made = make(tmp_path / "s", 15)
    with pytest.raises(StoreError, match=message):
        made.commit(replace(content_of(made, 0), **changes))
    assert made.missing() == [0, 1]


def test_the_first_of_two_builders_wins(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0))
    before = files(tmp_path / "s")
    made.commit(content_of(made, 0))
    assert files(tmp_path / "s") == before
    other = content_of(made, 0)
    other.phi[0] *= 1 + 1e-6
    made.commit(other)
    assert files(tmp_path / "s") == before
    with pytest.raises(
        StoreError, match="committed 8 images and refused 0, this one has 7 and 1: features are not rep"
    ):
        made.commit(content_of(made, 0, refuse=(f"{3:032x}",)))
    assert files(tmp_path / "s") == before and verification.verify(made) == []


def test_a_disk_that_returns_other_bytes_is_noticed_before_the_commit(tmp_path, monkeypatch):
    made = make(tmp_path / "s", 8)

    def faulty(path, data, write=commit.write):
        damaged = bytearray(data)
        damaged[2048] ^= 1  # within phi
        write(path, bytes(damaged))

    monkeypatch.setattr(commit, "write", faulty)
    with pytest.raises(StoreError, match="read back with other values than were written: check the disk"):
        made.commit(content_of(made, 0))
    assert made.missing() == [0] and not list((tmp_path / "s" / "tmp").iterdir())


def test_hdf5_never_touches_the_disk_when_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards.encode(shards.arrays(content_of(make(tmp_path / "s"), 0)))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_an_output_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    commit.write_atomic(path, b"old")
    commit.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space"):
                commit.write_atomic(path, b"newer")
        assert [p.name for p in tmp_path.iterdir()] == ["table.csv"] and path.read_bytes() == b"new"


# Corruption ---------------------------------------------------------------------------------------------------------


def read_everything(path):
    made = store.open_store(path)
    made.refused()
    return [shards.arrays(content) for content in made.blocks()]


def test_every_flipped_byte_is_noticed_by_readers_and_by_verify(tmp_path):
    path = tmp_path / "s"
    filled(path, 8)
    make(path, items=table(8).assign(creator="x"))  # a second table: readers use it, verify checks the first as well
    for name, data in files(path).items():
        for position in range(0, len(data), 11 if name.endswith(".json") else 41):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (path / name).write_bytes(damaged)
            problems = verification.verify(path)
            assert problems, f"{name} at {position}"
            stem = name.split("-")[0].removesuffix(".json")
            assert all(problem.file.startswith((stem, name.removesuffix(".json"))) for problem in problems)
            if name.startswith("shards"):
                (problem,) = problems
                assert (problem.family, problem.shard) == ("loss", 0)
                assert problem.item_ids == tuple(f"{i:032x}" for i in range(8))
            if not name.startswith("items/000000"):
                with pytest.raises(StoreError):
                    read_everything(path)
        (path / name).write_bytes(data)
    assert verification.verify(path) == [] and read_everything(path)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_damage_to_a_record_is_an_error_of_the_store_and_no_other(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("record") / "loss-000000.json"
    record = {"file": "x", "bytes": 3, "refused": {"a": "b"}, "deep": [[1.5, None, True]]}
    whole = commit.sealed(record)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]
    path.write_bytes(damaged)
    if damaged == whole:
        assert commit.unsealed(path) == record
    else:
        with pytest.raises(StoreError):
            commit.unsealed(path)


@pytest.mark.parametrize("change", [lambda d: d.replace(b"\n", b" "), lambda d: d + b"\n", lambda d: b" " + d])
def test_a_record_with_other_white_space_is_damaged(tmp_path, change):
    made = filled(tmp_path / "s", 8)
    path = tmp_path / "s" / "shards" / "loss-000000.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreError, match="do not fit its seal"):
        made.records()


def test_verify_tells_exactly_which_images_are_affected(tmp_path):
    made = fill(filled(tmp_path / "s", 20), "square")
    for family, shard in (("loss", 1), ("square", 2)):
        path = tmp_path / "s" / "shards" / made.records(family)[shard].file
        data = bytearray(path.read_bytes())
        data[2100] ^= 1
        path.write_bytes(data)
    seen = []
    problems = verification.verify(tmp_path / "s", lambda *values: seen.append(values))
    assert [(p.family, p.shard, p.item_ids) for p in problems] == [
        ("loss", 1, tuple(made.shard_items(1))),
        ("square", 2, tuple(made.shard_items(2))),
    ]
    assert all("is damaged" in p.found and p.file == f"shards/{p.family}-{p.shard:06d}.json" for p in problems)
    assert seen == [("verifying", i, 6) for i in range(7)]


def test_verify_reports_on_a_store_that_cannot_be_opened(tmp_path):
    made = filled(tmp_path / "s", 20)
    (tmp_path / "s" / "store.json").write_bytes(b"{}")
    assert [p.file for p in verification.verify(tmp_path / "s")] == ["store.json"]
    (tmp_path / "s" / "items" / "000000.json").write_bytes(b"{}")
    path = tmp_path / "s" / "shards" / made.records()[1].file
    path.write_bytes(path.read_bytes()[:-1])
    found = verification.verify(tmp_path / "s")
    assert [p.file for p in found] == ["store.json", "items/000000.json", "shards/loss-000001.json"]
    path.unlink()
    (tmp_path / "s" / "shards" / "loss-1.json").write_bytes(b"")
    assert "a name that this program does not write" in verification.verify(tmp_path / "s")[-1].found


def test_a_file_cut_at_any_length_is_noticed(tmp_path):
    made = filled(tmp_path / "s", 8)
    path = tmp_path / "s" / "shards" / made.records()[0].file
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        os.truncate(path, len(data) - 1 - length)
        with pytest.raises(
            StoreError, match=f"is {len(data) - 1 - length} bytes, its record says {len(data)}; run infl"
        ):
            made.records()
    path.write_bytes(data + b"\0")
    with pytest.raises(StoreError, match="its record says"):
        made.read("loss", 0)


def test_missing_swapped_and_linked_files_are_noticed(tmp_path):
    made = filled(tmp_path / "s", 24)
    folder = tmp_path / "s" / "shards"
    first, second = (folder / made.records()[i].file for i in (0, 1))
    first.rename(tmp_path / "kept")
    with pytest.raises(
        StoreError, match=r"loss-000000-\w+.h5 is missing, though it was committed; run influence verify"
    ):
        made.records()
    shutil.copy(second, first)
    with pytest.raises(StoreError, match="is damaged"):
        store.open_store(tmp_path / "s").read("loss", 0)
    with pytest.raises(StoreError, match="is damaged"):
        made.read("loss", 0)
    first.unlink()
    for target in (second, tmp_path / "kept"):
        first.symlink_to(target)
        with pytest.raises(StoreError, match="is a link, folder or device; expected a plain file"):
            made.records()
        first.unlink()
    first.mkdir()
    with pytest.raises(StoreError, match="expected a plain file"):
        made.records()
    first.rmdir()
    shutil.copy(tmp_path / "kept", first)
    assert verification.verify(made) == []
    (folder / "loss-000001.json").replace(folder / "loss-000000.json")
    with pytest.raises(StoreError, match=r"expected a file of this store|records were moved"):
        made.records()


def test_a_damaged_file_is_noticed_though_an_earlier_version_of_it_was_read(tmp_path):
    made = filled(tmp_path / "s", 8)
    made.read("loss", 0)
    path = tmp_path / "s" / "shards" / made.records()[0].file
    data = bytearray(path.read_bytes())
    data[2100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        made.read("loss", 0)


def test_a_record_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    made = filled(tmp_path / "s", 8)
    path = tmp_path / "s" / "shards" / "loss-000000.json"
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    with pytest.raises(StoreError, match="a store holds plain files only"):
        made.records()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="a store holds plain files only"):
        made.records()


def test_a_folder_of_a_store_that_leads_elsewhere_is_refused(tmp_path):
    filled(tmp_path / "s", 8)
    (tmp_path / "s" / "shards").rename(tmp_path / "away")
    (tmp_path / "s" / "shards").symlink_to(tmp_path / "away")
    with pytest.raises(StoreError, match="expected a folder inside the store"):
        store.open_store(tmp_path / "s")


def test_a_folder_that_cannot_be_listed_does_not_pass_for_an_empty_one(tmp_path, monkeypatch):
    made = filled(tmp_path / "s", 8)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(StoreError, match="Permission denied"):
        made.missing()


def test_a_shard_that_no_table_names_is_noticed(tmp_path):
    filled(tmp_path / "s", 8)
    filled(tmp_path / "s", 20)
    for path in (tmp_path / "s" / "items").glob("000001*"):
        path.unlink()
    with pytest.raises(StoreError, match="a shard that no table of images names"):
        store.open_store(tmp_path / "s").missing()
    assert {(p.family, p.shard) for p in verification.verify(tmp_path / "s")} == {("loss", 1), ("loss", 2)}


def test_a_table_that_lost_or_moved_images_is_noticed_by_verify(tmp_path):
    made = filled(tmp_path / "s", 20)
    folder = tmp_path / "s" / "items"
    old = items.read(folder, 0)
    moved = old.set_column(5, "shard", pa.array([2 - i for i in old["shard"].to_pylist()]))
    for table_ in (old.slice(0, 19), moved):
        items._commit(folder, tmp_path / "s" / "tmp", table_, 1)
        assert "not those of the table before" in verification.verify(made)[0].found
        with pytest.raises(StoreError, match="holds other images"):
            read_everything(tmp_path / "s")
        for path in folder.glob("000001*"):
            path.unlink()
    (folder / "000000.json").rename(folder / "000001.json")
    assert [p.file for p in verification.verify(made)][:2] == ["items/000000.json", "items/000001.json"]


@pytest.mark.parametrize("change", [{"spec": with_spec(seed=5)}, {"build": BUILD | {"draws": 5}}])
def test_a_shard_of_another_store_does_not_pass_for_one_of_this(tmp_path, change):
    filled(tmp_path / "a", 8)
    other = make(tmp_path / "b", 8, **change)
    for file in (tmp_path / "a" / "shards").iterdir():
        shutil.copy(file, tmp_path / "b" / "shards")
    with pytest.raises(StoreError, match=f"is of a store with another {next(iter(change))}"):
        other.records()


def test_shards_of_an_equal_store_may_be_copied(tmp_path):
    filled(tmp_path / "a", 20)
    other = make(tmp_path / "b", 20, source={"model": "elsewhere"})
    for file in (tmp_path / "a" / "shards").glob("loss-000001*"):
        shutil.copy(file, tmp_path / "b" / "shards")
    assert other.missing() == [0, 2] and verification.verify(other) == []


# Hostile input ------------------------------------------------------------------------------------------------------


def with_record(path, data=None, **changes):
    """Put a shard file and a matching, sealed record of it into a store: what an attacker would send."""
    folder = path / "shards"
    fields = json.loads((folder / "loss-000000.json").read_bytes())
    fields.pop("seal")
    if data is not None:
        (folder / "new").write_bytes(data)
        size, xxh, sha = commit.digest(folder / "new")
        fields |= {"file": f"loss-000000-{xxh}.h5", "bytes": size, "xxh3_128": xxh, "sha256": sha}
        (folder / "new").replace(folder / fields["file"])
    (folder / "loss-000000.json").write_bytes(commit.sealed(fields | changes))


def plain(file, name, array):
    file.create_dataset(name, data=array, track_times=False)


def soft_link(file, name, array):
    file[name] = h5py.SoftLink("/psi_item")


def external_link(file, name, array):
    """A link to a file that is there, and holds what is expected."""
    path = Path(file.filename).with_suffix(".other")
    with h5py.File(path, "w") as other:
        plain(other, name, array)
    file[name] = h5py.ExternalLink(path, name)


def nested(file, name, array):
    file[f"{name}/{name}"] = array


def with_attribute(file, name, array):
    plain(file, name, array)
    file[name].attrs["note"] = "x"


def virtual(file, name, array):
    layout = h5py.VirtualLayout(array.shape, array.dtype)
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", array.shape)
    file.create_virtual_dataset(name, layout)


def compact(file, name, array):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(array.shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, properties)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, array)


def two_names(file, name, array):
    file[name] = file["psi_item"]


def written(file, name, array, dtype):
    file.create_dataset(name, array.shape, dtype)
    file[name].id.write(h5py.h5s.ALL, h5py.h5s.ALL, array, file[name].id.get_type())


HOSTILE = {
    "filtered": ("phi", lambda f, n, a: f.create_dataset(n, data=a, fletcher32=True), "expected contiguous"),
    "compressed": ("phi", lambda f, n, a: f.create_dataset(n, data=a, compression="gzip"), "expected contiguous"),
    "chunked": ("phi", lambda f, n, a: f.create_dataset(n, data=a, chunks=(1, 6)), "expected contiguous"),
    "growing": ("phi", lambda f, n, a: f.create_dataset(n, data=a, maxshape=(None, 6)), "expected contiguous"),
    "compact": ("loss", compact, "expected contiguous"),
    "external": (
        "phi",
        lambda f, n, a: f.create_dataset(n, a.shape, a.dtype, external=[("/etc/passwd", 0, 48)]),
        "expected contiguous",
    ),
    "virtual": ("phi", virtual, "expected contiguous"),
    "float64": ("phi", lambda f, n, a: plain(f, n, a.astype("<f8")), "phi is float64"),
    "big-endian": ("phi", lambda f, n, a: plain(f, n, a.astype(">f4")), "phi is >f4"),
    "unsigned": ("psi_item", lambda f, n, a: plain(f, n, a.astype("<u4")), "psi_item is uint32"),
    "enumerated": (
        "psi_item",
        lambda f, n, a: written(f, n, a, h5py.enum_dtype({"x": 0}, "<i4")),
        "psi_item is int32",
    ),
    "utf-8": ("item_id", lambda f, n, a: written(f, n, a, h5py.string_dtype("utf-8", 32)), "item_id is"),
    "objects": ("item_id", lambda f, n, a: f.create_dataset(n, data=["a", "b"], dtype=h5py.string_dtype()), "object"),
    "ragged": ("phi", lambda f, n, a: f.create_dataset(n, (2, 6), h5py.vlen_dtype(np.dtype("<f4"))), "object"),
    "references": ("phi", lambda f, n, a: f.create_dataset(n, (2, 6), h5py.ref_dtype), "object"),
    "compound": ("phi", lambda f, n, a: f.create_dataset(n, (2, 6), [("x", "<f4")]), "phi is"),
    "huge": ("phi", lambda f, n, a: f.create_dataset(n, (2**40, 6), "<f4"), r"\(1099511627776, 6\)"),
    "short": ("phi", lambda f, n, a: plain(f, n, a[:1]), r"phi is float32 \(1, 6\)"),
    "flat": ("phi", lambda f, n, a: plain(f, n, a.reshape(-1)), r"phi is float32 \(12,\)"),
    "without space": ("loss", lambda f, n, a: f.create_dataset(n, data=h5py.Empty("<f4")), "loss is float32 None"),
    "never written": ("phi", lambda f, n, a: f.create_dataset(n, a.shape, a.dtype), "phi was never written"),
    "soft link": ("psi_draw", soft_link, "psi_draw is not a plain dataset of this file"),
    "external link": ("phi", external_link, "phi is not a plain dataset of this file"),
    "dead link": ("phi", lambda f, n, a: f.__setitem__(n, h5py.ExternalLink("/etc/passwd", "/x")), "not a plain data"),
    "group": ("phi", nested, "phi is not a plain dataset"),
    "absent": ("phi", lambda f, n, a: None, "holds item_id, loss, phi_batch"),
    "extra": ("phi", lambda f, n, a: (plain(f, n, a), plain(f, "extra", a)), "holds extra, item_id"),
    "attribute": ("phi", with_attribute, "phi has attributes"),
    "attribute of the file": ("phi", lambda f, n, a: (plain(f, n, a), f.attrs.update(note="x")), "more than its data"),
    "two names for one": ("psi_draw", two_names, "reaches into another dataset"),
}


def hostile(path, kind):
    """The bytes of an HDF5 file with the right names and something wrong in it."""
    field, crafted, _ = HOSTILE.get(kind, ("", None, ""))
    with h5py.File(path, "w") as file:
        for name, (shape, dtype) in shards.layout(2, 1, 6, 2).items():
            array = np.array([b"0" * 31 + b"0", b"0" * 31 + b"1"]) if name == "item_id" else np.zeros(shape, dtype)
            if name == field:
                crafted(file, name, array)
            elif name not in file:
                plain(file, name, array)
    return path.read_bytes()


def test_a_crafted_file_without_anything_wrong_is_read(tmp_path):
    filled(tmp_path / "s", 2)
    with_record(tmp_path / "s", hostile(tmp_path / "x.h5", "none"), psi_rows=1)
    (found,) = read_everything(tmp_path / "s")
    assert not found["phi"].any()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_even_with_a_matching_record(tmp_path, kind):
    filled(tmp_path / "s", 2)
    with_record(tmp_path / "s", hostile(tmp_path / "x.h5", kind), psi_rows=1)
    with pytest.raises(StoreError, match=f"loss-000000-.*{HOSTILE[kind][2]}"):
        read_everything(tmp_path / "s")
    (problem,) = verification.verify(tmp_path / "s")
    assert problem.item_ids == (f"{0:032x}", f"{1:032x}")


@pytest.mark.parametrize("kind", ["external", "soft link", "filtered"])
def test_a_hostile_file_without_a_matching_record_is_never_opened(tmp_path, kind, monkeypatch):
    made = filled(tmp_path / "s", 2)
    path = tmp_path / "s" / "shards" / made.records()[0].file
    data, size = hostile(tmp_path / "x.h5", kind), path.stat().st_size
    path.write_bytes(data[:size].ljust(size, b"\0"))

    def opened(*_, **__):
        raise AssertionError("HDF5 opened a file whose hash was wrong")

    monkeypatch.setattr(h5py, "File", opened)
    with pytest.raises(StoreError, match="is damaged"):
        made.read("loss", 0)
    assert "is damaged" in verification.verify(made)[0].found


@pytest.mark.parametrize("data", [b"", b"\x89HDF\r\n\x1a\n", b"x" * 3000, b"\x89HDF\r\n\x1a\n" + b"\xff" * 3000])
def test_what_is_no_hdf5_file_is_refused(tmp_path, data):
    filled(tmp_path / "s", 2)
    with_record(tmp_path / "s", data)
    with pytest.raises(StoreError, match=r"not a readable HDF5 file|its datasets are"):
        read_everything(tmp_path / "s")


def test_a_file_with_room_for_something_else_is_refused(tmp_path):
    made = filled(tmp_path / "s", 2)
    data = (tmp_path / "s" / "shards" / made.records()[0].file).read_bytes()
    with_record(tmp_path / "s", data + bytes(1 << 20))
    with pytest.raises(StoreError, match="its datasets are"):
        read_everything(tmp_path / "s")
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512, libver=("earliest", "v108")) as file:
        for name, array in shards.arrays(content_of(made, 0)).items():
            plain(file, name, array)
    with_record(tmp_path / "s", (tmp_path / "x.h5").read_bytes())
    with pytest.raises(StoreError, match="more than its datasets"):
        read_everything(tmp_path / "s")


def test_curvature_rows_of_images_that_are_not_there_are_refused(tmp_path):
    made = filled(tmp_path / "s", 2)
    for wrong in ([0, 0, 1, 2], [-1, 0, 0, 1], [1, 1, 0, 0]):
        arrays = shards.arrays(content_of(made, 0)) | {"psi_item": np.array(wrong, np.int32)}
        with_record(tmp_path / "s", shards.encode(arrays))
        with pytest.raises(StoreError, match="curvature rows of loss-000000"):
            read_everything(tmp_path / "s")


def test_nan_that_was_smuggled_in_is_found_by_verify(tmp_path):
    made = filled(tmp_path / "s", 2)
    arrays = shards.arrays(content_of(made, 0))
    arrays["phi"][0, 0] = np.nan
    with_record(tmp_path / "s", shards.encode(arrays))
    assert "holds NaN" in verification.verify(made)[0].found


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../etc/passwd"},
        {"file": "/etc/passwd"},
        {"file": "loss-000000-../../../../etc/passwd"},
        {"file": "loss-000001-" + "0" * 32 + ".h5"},
        {"file": 3},
        {"rows": 10**12},
        {"rows": 10**30},
        {"rows": 3},
        {"psi_rows": 5},
        {"rows": -1},
        {"rows": True},
        {"rows": 2.0},
        {"bytes": "many"},
        {"bytes": 10**15},
        {"refused": []},
        {"refused": {"x": 1}},
        {"refused": {f"{0:032x}": "refused and there"}},
        {"family": "square"},
        {"shard": 1},
        {"extra": 1},
        {"spec": "0" * 64},
        {"xxh3_128": "0" * 32},
    ],
)
def test_records_that_leave_the_store_or_lie_are_refused(tmp_path, change):
    made = filled(tmp_path / "s", 2)
    with_record(tmp_path / "s", **change)
    with pytest.raises(StoreError):
        made.read("loss", 0)
    assert len(verification.verify(made)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"seal": 3}',
        '{"a":' * 500 + "1" + "}" * 500,
        '{"a": 1e999, "seal": ""}',
        '{"a": NaN, "seal": ""}',
        "9" * 10_000,
        "\ufeff{}",
        "\0",
    ],
)
def test_json_that_is_no_record_is_refused(tmp_path, text):
    filled(tmp_path / "s", 8)
    (tmp_path / "s" / "store.json").write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"store\.json"):
        store.open_store(tmp_path / "s")


def test_records_too_large_or_too_deep_are_neither_read_nor_written(tmp_path, monkeypatch):
    made = filled(tmp_path / "s", 8)
    deep = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(StoreError, match="levels deep"):
        commit.sealed(deep)
    with (tmp_path / "s" / "store.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing on the disk
    with pytest.raises(StoreError, match=r"store\.json is larger than 64 MiB"):
        store.open_store(tmp_path / "s")
    monkeypatch.setattr(commit, "_MAX_RECORD", 100)
    with pytest.raises(StoreError, match="at most"):
        commit.sealed({"a": "x" * 100})
    with pytest.raises(StoreError, match="larger than"):
        made.records()


@pytest.mark.parametrize(
    "broken",
    [
        pa.table({"x": [1]}),
        items.SCHEMA.empty_table().slice(0, 0),
        pa.table({name: ["x"] for name in items.ITEM_COLUMNS} | {"shard": ["0"]}),
        pa.table({name: ["x"] for name in items.ITEM_COLUMNS} | {"shard": [-1]}, schema=items.SCHEMA),
        pa.table({name: [None] for name in items.ITEM_COLUMNS} | {"shard": [0]}, schema=items.SCHEMA),
        pa.table({name: ["x", "x"] for name in items.ITEM_COLUMNS} | {"shard": [0, 1]}, schema=items.SCHEMA),
        pa.table(
            {
                name: pa.array([b"\xff"]).cast(pa.string(), safe=False) if name == "file_name" else ["x"]
                for name in items.ITEM_COLUMNS
            }
            | {"shard": [0]}
        ),
        b"PAR1 and so on",
    ],
    ids=["columns", "rows", "types", "negative", "null", "two shards", "not UTF-8", "not a table"],
)
def test_a_hostile_table_is_refused_even_with_a_matching_record(tmp_path, broken):
    filled(tmp_path / "s", 1)
    folder = tmp_path / "s" / "items"
    if isinstance(broken, bytes):
        (folder / "new").write_bytes(broken)
    else:
        parquet.write_table(broken, folder / "new")
    size, xxh, sha = commit.digest(folder / "new")
    (folder / "new").replace(folder / f"000000-{xxh}.parquet")
    fields = {"file": f"000000-{xxh}.parquet", "bytes": size, "xxh3_128": xxh, "sha256": sha}
    rows = 1 if isinstance(broken, bytes) else max(1, broken.num_rows)
    (folder / "000000.json").write_bytes(commit.sealed(fields | {"rows": rows}))
    with pytest.raises(StoreError, match=f"000000-{xxh}.parquet"):
        store.open_store(tmp_path / "s")


# Derived ------------------------------------------------------------------------------------------------------------


def test_derived_files_are_believed_only_when_whole(tmp_path):
    made = make(tmp_path / "s", 8)
    tensors = {"a": np.arange(4.0), "b": np.zeros((0, 3), np.float32), "c": np.ones((2, 3), order="F")}
    assert made.write_derived("x-1.safetensors", tensors)
    found = made.read_derived("x-1.safetensors")
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    path = made.derived("x-1.safetensors")
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        found = made.read_derived("x-1.safetensors")
        # Padding of the header may change; values, names and shapes may not.
        assert found is None or all(np.array_equal(found[name], array) for name, array in tensors.items())
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert made.read_derived("x-1.safetensors") is None
    assert made.read_derived("y.safetensors") is None


def test_derived_files_are_what_other_tools_can_read(tmp_path):
    import safetensors.numpy

    made = make(tmp_path / "s", 8)
    made.write_derived("x.safetensors", {"a": np.arange(4.0)})
    found = safetensors.numpy.load_file(made.derived("x.safetensors"))
    np.testing.assert_array_equal(found["a"], np.arange(4.0))


@pytest.mark.parametrize("name", ["../x.safetensors", "x.h5", "/x.safetensors", "", "X.safetensors"])
def test_derived_files_stay_in_their_folder(tmp_path, name):
    with pytest.raises(StoreError, match="is no name for a derived file"):
        make(tmp_path / "s").derived(name)


def test_a_store_without_its_disposable_folders_works(tmp_path):
    made = make(tmp_path / "s", 8)
    for name in ("derived", "tmp", "shards"):
        (tmp_path / "s" / name).rmdir()
    assert store.open_store(tmp_path / "s").missing() == [0]
    fill(made)
    assert made.write_derived("x.safetensors", {"a": np.arange(4.0)}) and made.complete()


def test_what_cannot_be_kept_is_no_error(tmp_path, monkeypatch):
    made = make(tmp_path / "s", 8)
    (tmp_path / "s" / "derived").rmdir()
    (tmp_path / "s" / "derived").write_bytes(b"")
    assert made.write_derived("x.safetensors", {"a": np.arange(4.0)}) is False
    assert made.read_derived("x.safetensors") is None


# Identity, field by field -------------------------------------------------------------------------------------------

OTHER = {
    "model": "f" * 64, "config": "f" * 64, "encoders": "e" * 64, "lora": "e" * 64, "parameters": "e" * 64,
    "prediction": "sample", "weighting": "snr", "schedule": "e" * 64, "sample_shape": (1, 8, 8), "conditional": True,
    "projection": "rademacher", "dim": 7, "seed": 1, "dtype": "bf16", "metric": "e" * 64, "output": "square",
    "format": 3,
}  # fmt: skip


def test_another_value_is_known_for_every_field():
    assert OTHER.keys() == vars(SPEC).keys()


@pytest.mark.parametrize("field", OTHER)
def test_a_store_of_another_value_of_any_field_is_refused_by_its_name_and_left_alone(tmp_path, field):
    made = filled(tmp_path / "s", 8)
    before = files(tmp_path / "s")
    with pytest.raises(SpecMismatchError, match=rf"this build does not fit: {field} is .*, store s has .*Use the same"):
        make(tmp_path / "s", 8, spec=with_spec(**{field: OTHER[field]}))
    assert files(tmp_path / "s") == before
    assert with_spec(**{field: OTHER[field]}).fingerprint != made.spec.fingerprint


def test_control_characters_in_names_of_datasets_are_not_repeated(tmp_path):
    filled(tmp_path / "s", 2)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, array in shards.arrays(content_of(store.open_store(tmp_path / "s"), 0)).items():
            plain(file, {"loss": "lo\r\n\x1b[31mss"}.get(name, name), array)
    with_record(tmp_path / "s", (tmp_path / "x.h5").read_bytes())
    with pytest.raises(StoreError, match="holds item_id, lo") as caught:
        read_everything(tmp_path / "s")
    assert str(caught.value).isprintable()
