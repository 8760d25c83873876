import threading
import time

import numpy as np
import pytest
import torch
from stores import fill, filled

from influence import scanning, store
from influence.errors import StoreError
from influence.queries import Queries
from influence.readahead import ahead
from influence.scoring import METHODS

QUERIES = 3


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("readahead")]


def wait_until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "the thread did not get there"
        time.sleep(0.001)


def arrays(block):
    return [block]


def three():
    for i in range(3):
        yield np.full((2, 3), i)


def scanned(path, name):
    """The whole scan of a store: table, totals, errors."""
    made = store.open_store(path)
    method = METHODS[name]
    phi = np.random.default_rng(0).standard_normal((QUERIES, made.spec.dim * (1 + (method.beside is not None))))
    names = [f"query {i}" for i in range(QUERIES)]
    rows = phi.astype(np.float32)
    loss = np.ones((QUERIES, 1), np.float32)
    asked = Queries(names, [None] * QUERIES, names, [frozenset()] * QUERIES, rows, rows[:, None], loss, None)
    groups = scanning.groups_of(made, "loss")
    h = np.linspace(0, 0.5, len(groups.ids))
    v = torch.from_numpy(phi)
    table, creators = scanning.rank(made, method, v, asked, 4, groups, h, np.ones_like(h), None)
    return scanning.with_errors(made, method, v, torch.stack([v, 2 * v]), groups, h, table, creators)


@pytest.mark.parametrize("name", ["gauss-newton", "path", "two-point", "two-length", "grad-cos"])
@pytest.mark.parametrize("excluded", [False, True])
def test_a_scan_says_the_same_bit_by_bit_as_without_read_ahead(tmp_path, monkeypatch, name, excluded):
    made = filled(tmp_path / "s", count=40)
    for family in METHODS[name].elsewhere:
        fill(made, family)
    if excluded:
        store.exclude(tmp_path / "s", item=made.shard_items(1)[0])
    table, creators = scanned(tmp_path / "s", name)
    monkeypatch.setattr(scanning, "ahead", lambda blocks, arrays: blocks)
    plain, totals = scanned(tmp_path / "s", name)
    assert len(made.records()) > 2 and not threads()
    assert table.equals(plain)
    for part in ("totals", "squares", "by_batch", "train_variance"):
        np.testing.assert_array_equal(getattr(creators, part), getattr(totals, part))


def test_blocks_come_in_order_and_the_arrays_of_each_are_asked_for_once():
    asked = []
    found = list(ahead(three(), lambda block: asked.append(block) or [block, block[:0]]))
    assert [block[0, 0] for block in found] == [0, 1, 2] and len(asked) == 3
    assert list(ahead([], arrays)) == [] and not threads()


def test_one_block_is_taken_ahead_and_no_more():
    taken = []

    def blocks():
        for block in three():
            taken.append(len(taken))
            yield block

    coming = ahead(blocks(), arrays)
    assert taken == []  # nothing before it is asked for
    for i, _ in enumerate(coming):
        wait_until(lambda i=i: len(taken) >= min(i + 2, 3))
        time.sleep(0.02)
        assert len(taken) == min(i + 2, 3)


def test_an_error_is_raised_where_the_block_would_have_come():
    def blocks():
        yield from three()
        raise StoreError("the fourth is damaged")

    found, coming = [], ahead(blocks(), arrays)
    with pytest.raises(StoreError, match="the fourth is damaged"):
        found.extend(block[0, 0] for block in coming)
    assert not threads()
    coming = ahead(blocks(), arrays)
    assert [next(coming)[0, 0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError):
        next(coming)
    assert list(coming) == []


def test_a_damaged_shard_is_named_after_the_shards_before_it_were_scanned(tmp_path):
    made = filled(tmp_path / "s", count=40)
    broken = made.path / "shards" / made.records()[2].file
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    seen = []
    with pytest.raises(StoreError, match=f"{broken.name} is damaged"):
        for content in ahead(scanning.blocks(made, METHODS["grad-dot"]), lambda content: content.phi):
            seen += content.item_ids
    assert seen == made.shard_items(0) + made.shard_items(1)


def test_an_iterator_that_is_closed_early_leaves_no_thread():
    coming = ahead(three(), arrays)
    next(coming)
    assert threads()
    coming.close()
    assert not threads()
