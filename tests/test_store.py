import json
import multiprocessing
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from influence import shards, store
from influence.errors import SpecMismatchError, StoreError
from influence.shards import ShardContent
from influence.spec import FeatureSpec

SPEC = FeatureSpec(
    model="a" * 64,
    encoders="b" * 64,
    lora=None,
    parameters="c" * 64,
    prediction="epsilon",
    weighting="uniform",
    schedule="d" * 64,
    sample_shape=(3, 8, 8),
    conditional=False,
    projection="countsketch",
    dim=6,
    seed=0,
    dtype="fp32",
)
BUILD = {"draws": 4, "curvature_rows": 12, "curvature_rate": 1.0}


def table(count, start=0):
    rows = [(f"{i:032x}", f"{i}.png", None, f"creator {i % 2}", None) for i in range(start, start + count)]
    return pd.DataFrame(rows, columns=list(store.ITEM_COLUMNS))


def make(path, count=20, **changes):
    options = {"spec": SPEC, "build": BUILD, "source": {"model": "m"}, "items": table(count)} | changes
    return store.create(path, **options)


def content_of(made, shard, refuse=()):
    ids = [i for i in made.shard_items(shard) if i not in refuse]
    rng = np.random.default_rng(shard)
    n, k = len(ids), made.spec.dim
    return ShardContent(
        family="loss",
        shard=shard,
        item_ids=ids,
        phi=rng.standard_normal((n, k), dtype=np.float32),
        loss=rng.random(n, dtype=np.float32),
        psi=rng.standard_normal((n, k), dtype=np.float32),
        psi_item=np.arange(n, dtype=np.int32),
        psi_draw=np.zeros(n, np.int32),
        refused=dict.fromkeys(refuse, "its gradient is not finite"),
    )


def filled(path, count=20):
    made = make(path, count)
    for shard in made.missing():
        made.commit(content_of(made, shard))
    return made


def files(path):
    """Every file that matters, by name; tmp is garbage."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(Path(path).rglob("*"))
        if p.is_file() and p.parent.name != "tmp"
    }


def test_what_is_committed_is_read_back(tmp_path):
    made = filled(tmp_path / "s")
    again = store.open_store(tmp_path / "s")
    assert again.missing() == [] and len(again.records()) == 3
    for shard in again.records():
        found, wanted = again.read("loss", shard), content_of(made, shard)
        for name, array in shards.arrays(wanted).items():
            np.testing.assert_array_equal(shards.arrays(found)[name], array)
    assert store.verify(again) == []
    assert not list((tmp_path / "s" / "tmp").iterdir())


def test_equal_content_gives_equal_bytes(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_arrays_are_mapped_read_only(tmp_path):
    found = filled(tmp_path / "s").read("loss", 0)
    assert isinstance(found.phi, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.phi[0] = 0


def test_the_order_of_files_changes_no_shard(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", items=table(20).iloc[::-1])
    assert [a.shard_items(i) for i in range(3)] == [b.shard_items(i) for i in range(3)]


def test_added_images_get_new_shards_and_the_old_ones_stay(tmp_path):
    made = filled(tmp_path / "s", 20)
    before = files(tmp_path / "s")
    grown = make(tmp_path / "s", 30)
    assert grown.missing() == [3, 4]
    assert all(grown.shard_items(i) == made.shard_items(i) for i in range(3))
    assert {name: data for name, data in files(tmp_path / "s").items() if name in before} == before
    assert make(tmp_path / "s", 30).missing() == [3, 4]
    assert len(list((tmp_path / "s" / "items").glob("*.json"))) == 2


def test_a_data_set_that_lost_images_is_refused(tmp_path):
    filled(tmp_path / "s", 20)
    with pytest.raises(StoreError, match="holds 5 images that the data set has not, 0{31}f first"):
        make(tmp_path / "s", 15)


def test_another_spec_or_build_is_refused_naming_both_values(tmp_path):
    make(tmp_path / "s")
    other = FeatureSpec(**vars(SPEC) | {"seed": 1, "model": "e" * 64})
    with pytest.raises(
        SpecMismatchError, match=r"model is eeeeeeeeeeee…, store s has aaaaaaaaaaaa…; seed is 1, store s has 0"
    ):
        make(tmp_path / "s", spec=other)
    with pytest.raises(SpecMismatchError, match="draws is 8, store s has 4"):
        make(tmp_path / "s", build=BUILD | {"draws": 8})


def test_a_folder_that_is_something_else_is_not_written_to(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"is not a store and not empty \(it holds holiday.jpg\)"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(StoreError, match="it has no store.json"):
        store.open_store(tmp_path)
    with pytest.raises(StoreError, match="there is no store at"):
        store.open_store(tmp_path / "absent")


def test_refused_images_are_recorded(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0, refuse=(f"{3:032x}",)))
    assert store.open_store(tmp_path / "s").refused() == {f"{3:032x}": "its gradient is not finite"}
    assert made.read("loss", 0).phi.shape == (7, 6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["phi", "psi", "loss"])
def test_no_number_that_is_not_finite_gets_in(tmp_path, field, value):
    made = make(tmp_path / "s", 8)
    content = content_of(made, 0)
    getattr(content, field).flat[3] = value
    with pytest.raises(StoreError, match=f"{field} of shard 0 holds NaN or infinity"):
        made.commit(content)
    assert made.missing() == [0]


def test_rows_of_other_images_or_shapes_are_refused(tmp_path):
    made = make(tmp_path / "s", 20)
    with pytest.raises(StoreError, match="shard 1 has 8 images"):
        made.commit(ShardContent(**vars(content_of(made, 0)) | {"shard": 1}))
    with pytest.raises(StoreError, match="phi of shard 0 is float64"):
        made.commit(ShardContent(**vars(content_of(made, 0)) | {"phi": np.zeros((8, 6))}))


def test_the_first_of_two_builders_wins(tmp_path):
    made = make(tmp_path / "s", 8)
    made.commit(content_of(made, 0))
    before = files(tmp_path / "s")
    made.commit(content_of(made, 0))
    assert files(tmp_path / "s") == before
    other = content_of(made, 0)
    other.phi[0] *= 1 + 1e-7
    made.commit(other)
    assert files(tmp_path / "s") == before
    with pytest.raises(StoreError, match="features are not reproducible"):
        made.commit(content_of(made, 0, refuse=(f"{3:032x}",)))
    assert store.verify(made) == []


STEPS = ("write", "verify", "hash", "fsync", "rename", "fsync-folder", "record", "link", "unlink", "fsync-link")


def _die(path, count, stop, occurrence):
    """In a process of its own: build, and be killed before the given step."""
    seen = 0

    def step(name):
        nonlocal seen
        seen += name == stop
        if name == stop and seen == occurrence:
            os._exit(9)

    store.step = step
    made = make(path, count)
    for shard in made.missing():
        made.commit(content_of(made, shard))


@pytest.mark.parametrize("occurrence", [1, 2, 3])
@pytest.mark.parametrize("stop", STEPS)
def test_killed_at_any_step_nothing_committed_is_lost_and_the_result_is_the_same(tmp_path, stop, occurrence):
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "s", 20, stop, occurrence))
    process.start()
    process.join()
    assert process.exitcode == 9
    if (tmp_path / "s" / "store.json").exists():
        left = store.open_store(tmp_path / "s")
        assert store.verify(left) == []
        committed = {shard: left.read("loss", shard).phi.tobytes() for shard in left.records()}
        assert all(content_of(left, shard).phi.tobytes() == data for shard, data in committed.items())
    filled(tmp_path / "s", 20)
    filled(tmp_path / "whole", 20)
    found, whole = files(tmp_path / "s"), files(tmp_path / "whole")
    assert {name: found[name] for name in whole} == whole


def test_every_flipped_byte_is_noticed(tmp_path):
    filled(tmp_path / "s", 8)
    whole = files(tmp_path / "s")
    for name, data in whole.items():
        for position in range(0, len(data), max(1, len(data) // 150)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (tmp_path / "s" / name).write_bytes(damaged)
            with pytest.raises(StoreError):
                made = store.open_store(tmp_path / "s")
                if problems := store.verify(made):
                    assert problems[0].item_ids == tuple(made.shard_items(0))
                    made.read("loss", 0)
        (tmp_path / "s" / name).write_bytes(data)
    assert store.verify(store.open_store(tmp_path / "s")) == []


def test_truncated_missing_and_swapped_files_are_noticed(tmp_path):
    made = filled(tmp_path / "s", 20)
    folder = tmp_path / "s" / "shards"
    first, second = (folder / made.records()[i].file for i in (0, 1))
    data = first.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        first.write_bytes(data[:length])
        with pytest.raises(StoreError, match=f"is {length} bytes, its record says {len(data)}"):
            made.records()
    first.unlink()
    with pytest.raises(StoreError, match="is missing"):
        made.records()
    shutil.copy(second, first)
    with pytest.raises(StoreError, match="is damaged"):
        store.open_store(tmp_path / "s").read("loss", 0)
    first.unlink()
    first.symlink_to(second)
    with pytest.raises(StoreError, match="run influence verify"):
        made.records()


def test_a_shard_of_another_store_does_not_pass_for_one_of_this(tmp_path):
    filled(tmp_path / "a", 8)
    other = make(tmp_path / "b", 8, spec=FeatureSpec(**vars(SPEC) | {"seed": 5}))
    for file in (tmp_path / "a" / "shards").iterdir():
        shutil.copy(file, tmp_path / "b" / "shards")
    with pytest.raises(StoreError, match="belongs to a store with another spec"):
        other.records()


def hostile(path, kind):
    """An HDF5 file with the right names and something wrong in it."""
    wanted = shards.layout(2, 1, 6)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()}
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            options = {}
            if name == "phi":
                options = {
                    "filter": {"chunks": (1, 6), "fletcher32": True},
                    "chunks": {"chunks": (1, 6)},
                    "external": {"external": [("/etc/hostname", 0, 48)]},
                }.get(kind, {})
                if kind == "dtype":
                    array = array.astype("f8")
                if kind == "shape":
                    file.create_dataset(name, shape=(2**40, 6), dtype="f4")
                    continue
                if kind == "soft link":
                    file["other"] = array
                    file[name] = h5py.SoftLink("/other")
                    continue
                if kind == "external link":
                    file[name] = h5py.ExternalLink("/etc/passwd", "/x")
                    continue
                if kind == "object":
                    file.create_dataset(name, data=["a"] * 2, dtype=h5py.string_dtype())
                    continue
                if kind == "group":
                    file.create_group(name)
                    continue
            file.create_dataset(name, data=array, **options)
        if kind == "extra":
            file["extra"] = 1
    return wanted


@pytest.mark.parametrize(
    "kind",
    ["filter", "chunks", "external", "dtype", "shape", "soft link", "external link", "object", "group", "extra"],
)
def test_hostile_files_are_refused_even_with_a_matching_hash(tmp_path, kind):
    wanted = hostile(tmp_path / "x.h5", kind)
    with pytest.raises(StoreError):
        shards.read(tmp_path / "x.h5", wanted)


def test_records_that_leave_the_store_or_lie_about_numbers_are_refused(tmp_path):
    made = filled(tmp_path / "s", 8)
    path = tmp_path / "s" / "shards" / "loss-000000.json"
    fields = json.loads(path.read_text())
    fields.pop("seal")
    for change in (
        {"file": "../../etc/passwd"},
        {"file": "/etc/passwd"},
        {"rows": 10**12},
        {"rows": -1},
        {"bytes": "many"},
        {"extra": 1},
    ):
        path.write_text(json.dumps(store._sealed(fields | change), indent=1))
        with pytest.raises(StoreError):
            made.read("loss", 0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, '{"seal": 3}', '{"a":' * 500 + "1" + "}" * 500]
)
def test_json_that_is_no_record_is_refused(tmp_path, text):
    filled(tmp_path / "s", 8)
    (tmp_path / "s" / "store.json").write_text(text)
    with pytest.raises(StoreError, match="store.json"):
        store.open_store(tmp_path / "s")


def test_foreign_files_in_tmp_do_no_harm(tmp_path):
    (tmp_path / "s" / "tmp").mkdir(parents=True)
    (tmp_path / "s" / "tmp" / "junk.h5").write_bytes(b"junk")
    assert store.verify(filled(tmp_path / "s", 8)) == []


def test_derived_files_are_believed_only_when_whole(tmp_path):
    made = make(tmp_path / "s", 8)
    made.write_derived("x.safetensors", {"a": np.arange(4.0)})
    np.testing.assert_array_equal(made.read_derived("x.safetensors")["a"], np.arange(4.0))
    path = tmp_path / "s" / "derived" / "x.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert made.read_derived("x.safetensors") is None
    assert made.read_derived("y.safetensors") is None


@pytest.mark.parametrize("count", [1, 7, 8, 9, 600, 100_000])
def test_shards_are_neither_tiny_nor_huge(count):
    size = store._images_per_shard(count, 8192, 10.0)
    assert size >= 1 and size * 4 * 8192 * 11 <= store._SHARD_BYTES
