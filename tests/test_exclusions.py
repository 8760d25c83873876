"""Exclusions: honoured by every reader at once, recorded, reversible, and no record of them can be lost unnoticed."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import content_of, fill, filled, make, table

from influence import commit, exclusions, shards, store, verification
from influence.errors import OptionError, StoreError


def ids(*numbers):
    return [f"{i:032x}" for i in numbers]


def test_every_reader_passes_over_excluded_images_and_nothing_else_changes(tmp_path):
    made = fill(filled(tmp_path / "s", 20), "square")
    whole = {content.shard: content for content in made.blocks()}
    assert store.exclude(tmp_path / "s", creator="creator 1") and store.exclude(tmp_path / "s", item=ids(4)[0])
    again = store.open_store(tmp_path / "s")
    left = [i for i in range(20) if i % 2 == 0 and i != 4]
    assert again.items["item_id"].tolist() == ids(*left)
    assert again.excluded == set(ids(4, *range(1, 20, 2)))
    for content in again.blocks():
        before = whole[content.shard]
        rows = [before.item_ids.index(item_id) for item_id in content.item_ids]
        assert content.item_ids == [i for i in before.item_ids if i in ids(*left)]
        np.testing.assert_array_equal(content.phi, before.phi[rows])
        np.testing.assert_array_equal(content.loss, before.loss[rows])
        kept = np.isin(before.psi_item, rows)
        np.testing.assert_array_equal(content.psi, before.psi[kept])
        np.testing.assert_array_equal(content.psi_draw, before.psi_draw[kept])
        assert [content.item_ids[i] for i in content.psi_item] == [before.item_ids[i] for i in before.psi_item[kept]]
        one = again.read("loss", content.shard)
        np.testing.assert_array_equal(one.phi, content.phi)
        shards.check_rows("x", len(content.item_ids), content.psi_item, content.psi_draw)
    assert again.num_rows() == (9, 18) and again.num_rows("square") == (9, 0)
    assert again.missing() == [] and again.shard_items(0) == ids(*range(8))
    assert verification.verify(again) == []


def test_a_store_that_is_open_honours_it_from_the_next_refresh(tmp_path):
    made = filled(tmp_path / "s", 8)
    store.exclude(tmp_path / "s", creator="creator 0")
    assert len(made.items) == 8
    made.refresh()
    assert made.items["item_id"].tolist() == ids(1, 3, 5, 7) and made.num_rows() == (4, 8)


def test_it_is_undone_by_one_more_record_and_everything_is_as_before(tmp_path):
    made = filled(tmp_path / "s", 8)
    before = (made.items.to_csv(), made.family_hash(), made.num_rows(), [c.phi.tobytes() for c in made.blocks()])
    for _ in range(2):
        assert store.exclude(tmp_path / "s", creator="creator 0") is True
        assert store.exclude(tmp_path / "s", creator="creator 0") is False
        made.refresh()
        assert made.family_hash() != before[1]
        assert store.exclude(tmp_path / "s", creator="creator 0", undo=True) is True
        made.refresh()
        assert before == (
            made.items.to_csv(), made.family_hash(), made.num_rows(), [c.phi.tobytes() for c in made.blocks()]
        )  # fmt: skip
    records = [json.loads(p.read_bytes()) for p in sorted((tmp_path / "s" / "exclusions").iterdir())]
    assert [r["excluded"] for r in records] == [True, False] * 2 and {r["name"] for r in records} == {"creator 0"}
    assert all(r["time"].endswith("Z") for r in records)


def test_what_is_derived_is_named_by_the_exclusions(tmp_path):
    made, seen = filled(tmp_path / "s", 8), set()
    seen.add(made.family_hash())
    for item in ids(1, 2):
        store.exclude(tmp_path / "s", item=item)
        seen.add(store.open_store(tmp_path / "s").family_hash())
    assert len(seen) == 3


def test_an_image_with_files_of_two_creators_is_out_when_both_are(tmp_path):
    twin = table(1).assign(file_name="twin.png", creator="other")
    made = fill(make(tmp_path / "s", items=pd.concat([table(8), twin])))
    store.exclude(tmp_path / "s", creator="creator 0")
    made.refresh()
    assert ids(0)[0] not in made.excluded and made.items["file_name"].tolist()[0] == "twin.png"
    store.exclude(tmp_path / "s", creator="other")
    made.refresh()
    assert ids(0)[0] in made.excluded


def test_refused_images_that_are_excluded_are_not_reported(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0, refuse=ids(2, 3)))
    store.exclude(tmp_path / "s", creator="creator 0")
    again = store.open_store(tmp_path / "s")
    assert list(again.refused()) == ids(3) and again.num_rows()[0] == 3
    assert list(again.read("loss", 0).refused) == ids(3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"creator": "nobody"}, StoreError, "store s has no creator 'nobody'"),
        ({"item": "0"}, StoreError, "store s has no item '0'"),
        ({"creator": "creator 0", "undo": True}, StoreError, "does not exclude creator 'creator 0'"),
        ({"item": ids(0)[0], "undo": True}, StoreError, "does not exclude item"),
        ({}, OptionError, "one of creator and item"),
        ({"creator": "creator 0", "item": ids(0)[0]}, OptionError, "one of creator and item"),
    ],
)
def test_what_makes_no_sense_is_refused_and_not_recorded(tmp_path, options, error, message):
    filled(tmp_path / "s", 8)
    with pytest.raises(error, match=message):
        store.exclude(tmp_path / "s", **options)
    assert list((tmp_path / "s" / "exclusions").iterdir()) == []


def test_images_of_an_excluded_creator_are_not_added_and_come_with_the_undo(tmp_path):
    filled(tmp_path / "s", 8)
    store.exclude(tmp_path / "s", creator="creator 1")
    grown = make(tmp_path / "s", 12)
    assert grown.shard_items(1) == ids(8, 10)
    fill(grown)
    store.exclude(tmp_path / "s", creator="creator 1", undo=True)
    again = make(tmp_path / "s", 12)
    assert again.shard_items(2) == ids(9, 11) and again.missing() == [2]


def test_excluded_images_may_be_taken_out_of_the_data_set_and_no_others(tmp_path):
    filled(tmp_path / "s", 8)
    rest = table(8)[lambda t: t["creator"] != "creator 1"]
    with pytest.raises(StoreError, match=r"4 images that the data set has not, 1.png first"):
        make(tmp_path / "s", items=rest)
    store.exclude(tmp_path / "s", creator="creator 1")
    again = make(tmp_path / "s", items=rest)
    assert again.missing() == [] and again.shard_items(0) == ids(*range(8))
    assert again.items["item_id"].tolist() == ids(0, 2, 4, 6)
    with pytest.raises(StoreError, match=r"1 images that the data set has not, 0.png first"):
        make(tmp_path / "s", items=rest[1:])


def test_a_record_that_is_lost_changed_moved_or_foreign_is_noticed(tmp_path):
    path = filled(tmp_path / "s", 8).path
    for item in ids(1, 2, 3):
        store.exclude(path, item=item)
    folder = path / "exclusions"
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}

    def noticed(message):
        with pytest.raises(StoreError, match=message):
            store.open_store(path)
        assert [p.file for p in verification.verify(path)] == ["exclusions"]
        for file in folder.iterdir():
            file.unlink()
        for name, data in kept.items():
            (folder / name).write_bytes(data)

    for name in ("000000.json", "000001.json"):
        (folder / name).unlink()
        noticed("a record of exclusions is lost")
    (folder / "000000.json").write_bytes(kept["000001.json"])
    noticed("does not follow")
    other = exclusions._read(folder)[0]
    assert other.items == set(ids(1, 2, 3))
    fields = json.loads(kept["000000.json"]) | {"name": ids(5)[0]}
    fields.pop("seal")
    (folder / "000000.json").write_bytes(commit.sealed(fields))
    noticed("000001.json does not follow")
    (folder / "000002.json").write_bytes(commit.sealed(fields | {"number": 2, "excluded": "yes"}))
    noticed("does not hold what")
    (folder / "note.json").write_bytes(b"{}")
    noticed("note.json is there")
    for name, data in kept.items():
        for position in range(0, len(data), 5):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(StoreError):
                store.open_store(path)
        (folder / name).write_bytes(data)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["creator", "item"]), st.integers(0, 2), st.booleans()), max_size=12))
def test_what_is_excluded_is_what_was_said_last(tmp_path_factory, said):
    folder = tmp_path_factory.mktemp("exclusions")
    (folder / "tmp").mkdir()
    state = {}
    for kind, name, excluded in said:
        changed = exclusions.add(folder / "x", folder / "tmp", kind, str(name), excluded=excluded)
        assert changed == (state.get((kind, str(name)), False) != excluded)
        state[kind, str(name)] = excluded
    found = exclusions.read(folder / "x")
    assert found.creators == {n for (k, n), on in state.items() if on and k == "creator"}
    assert found.items == {n for (k, n), on in state.items() if on and k == "item"}
