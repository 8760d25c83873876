"""Every byte flipped, every length, every file missing, swapped or doubled: an error, never other numbers."""

import itertools
import shutil

import pytest
from stores import files, fill, filled, make, table, with_spec

from influence import shards, store, verification
from influence.errors import InfluenceError, StoreError


def small(path):
    """A store of two images with two tables of images."""
    fill(make(path, 2, spec=with_spec(dim=2)))
    make(path, spec=with_spec(dim=2), items=table(2).assign(creator="x"))
    return path


def opened(path):
    """What a reader gets to see when it opens a store."""
    made = store.open_store(path)
    return made, [made.items.to_csv(index=False), str(made.spec), repr((made.build, made.source))]


def contents(made):
    """What it gets to see of the features."""
    found = []
    for family in shards.FAMILIES:
        found.append(repr((made.missing(family), made.refused(family))))
        for content in made.blocks(family):
            found += [array.tobytes() for array in shards.arrays(content).values()]
    return found


def everything(path):
    made, facts = opened(path)
    return facts + contents(made)


def read_or_refused(path, whole):
    """Whether a store is read exactly as it was; `False` if it is refused with a typed error on one line."""
    try:
        assert everything(path) == whole, "a silent wrong read"
    except InfluenceError as error:
        assert len(str(error).splitlines()) == 1
        return False
    return True


def damaged_in_turn(path, damages):
    """Put each damaged form of each file in its place, and read; how many there were."""
    made, facts = opened(path)
    features, count = contents(made), 0
    for name, data in files(path).items():
        for what, damaged in damages(data):
            (path / name).write_bytes(damaged)
            try:
                # What lies in shards/ is read anew by a store that is open already: the quicker way to ask.
                read = contents(made) == features if name.startswith("shards") else opened(path)[1] == facts
                assert read, f"a silent wrong read: {name}, {what}"
            except InfluenceError as error:
                assert len(str(error).splitlines()) == 1
                read = False
            # A reader needs the latest table of images alone; the one before is verify's.
            assert read == name.startswith("items/000000"), f"{name}, {what}"
            count += 1
        (path / name).write_bytes(data)
    assert contents(made) == features
    return count


@pytest.mark.slow
def test_every_single_byte_of_a_store_flipped_is_noticed_before_anything_is_read(tmp_path):
    def flips(data):
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            yield f"byte {position}", damaged

    assert damaged_in_turn(small(tmp_path / "s"), flips) > 10_000


@pytest.mark.slow
def test_every_file_of_a_store_cut_at_every_length_is_noticed(tmp_path):
    def cuts(data):
        return ((f"cut to {length}", data[:length]) for length in range(len(data)))

    assert damaged_in_turn(small(tmp_path / "s"), cuts) > 10_000


def test_each_file_replaced_by_each_other_is_noticed(tmp_path):
    path = filled(tmp_path / "s", 20).path
    whole, kept = everything(path), files(path)
    for name, other in itertools.permutations(kept, 2):
        (path / name).write_bytes(kept[other])
        assert not read_or_refused(path, whole), f"{other} as {name}"
        assert verification.verify(path), f"{other} as {name}"
        (path / name).write_bytes(kept[name])


def test_each_pair_of_files_swapped_is_noticed(tmp_path):
    path = filled(tmp_path / "s", 20).path
    whole, kept = everything(path), files(path)
    for name, other in itertools.combinations(kept, 2):
        (path / name).write_bytes(kept[other])
        (path / other).write_bytes(kept[name])
        assert not read_or_refused(path, whole), f"{other} and {name}"
        for one in (name, other):
            (path / one).write_bytes(kept[one])


def test_each_file_missing_is_noticed_or_makes_the_store_incomplete(tmp_path):
    path = filled(tmp_path / "s", 20).path
    kept = files(path)
    for name in kept:
        (path / name).unlink()
        if name.startswith("shards") and name.endswith(".json"):
            assert store.open_store(path).missing() == [int(name[-11:-5])]  # without its record it does not exist
        else:
            with pytest.raises(StoreError):
                everything(path)
        (path / name).write_bytes(kept[name])


def test_a_shard_under_a_second_name_is_refused_with_a_record_and_ignored_without(tmp_path):
    path = filled(tmp_path / "s", 20).path
    folder, whole = path / "shards", everything(path)
    (name,) = (p.name for p in folder.glob("loss-000001-*.h5"))
    shutil.copy(folder / name, folder / name.replace("000001", "000002"))
    shutil.copy(folder / name, folder / "copy of it.h5")
    assert everything(path) == whole and verification.verify(path) == []
    shutil.copy(folder / "loss-000001.json", folder / "loss-000007.json")
    assert not read_or_refused(path, whole)
    assert [problem.shard for problem in verification.verify(path)] == [7]


@pytest.mark.parametrize("name", ["junk", "junk.h5", "loss-000000.json", ".hidden", "\x1b[31mred.h5"])
def test_foreign_and_empty_files_in_tmp_do_no_harm(tmp_path, name):
    path = filled(tmp_path / "s", 8).path
    whole = everything(path)
    for data in (b"", b"junk", b"\x89HDF\r\n\x1a\n"):
        (path / "tmp" / name).write_bytes(data)
        assert everything(path) == whole and verification.verify(path) == []
        assert filled(path, 8).complete()


def test_empty_files_and_folders_in_place_of_files_are_noticed(tmp_path):
    path = filled(tmp_path / "s", 8).path
    whole, kept = everything(path), files(path)
    for name, data in kept.items():
        (path / name).write_bytes(b"")
        assert not read_or_refused(path, whole), name
        (path / name).unlink()
        (path / name).mkdir()
        assert not read_or_refused(path, whole), name
        (path / name).rmdir()
        (path / name).write_bytes(data)
