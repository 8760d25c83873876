"""Check every byte of a store, and say which shards and which images are affected by what is wrong."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influence import commit, exclusions, shards
from influence import items as tables
from influence import store as stores
from influence.errors import InfluenceError, StoreError
from influence.shards import FAMILIES
from influence.store import Store


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not what it claims to be."""

    file: str
    """Path inside the store."""
    found: str
    family: str | None = None
    shard: int | None = None
    item_ids: tuple[str, ...] = ()
    """Images whose features are affected, as far as the tables of images can be read."""
    file_names: tuple[str, ...] = ()
    """Files of these images."""


def verify(
    store: Store | str | os.PathLike[str], progress: Callable[[str, int, int], Any] | None = None
) -> list[Problem]:
    """Check every byte of a store: records, sizes, hashes, contents. An empty list says that all is as committed.

    Shards that are not committed yet are no problem (see `Store.missing`), nor is a file that no record names.

    Args:
        store: A store, or its folder; the folder is read anew in any case, and may be too damaged to be opened.
        progress: Called with `verifying`, the number of records done, and of all.

    Raises:
        StoreError: There is no store at this path.
    """
    folder = store.path if isinstance(store, Store) else stores.found(store)
    problems: list[Problem] = []

    @contextlib.contextmanager
    def noting(path: Path, **affected: Any) -> Iterator[None]:
        try:
            yield
        except (InfluenceError, OSError) as error:
            problems.append(Problem(path.relative_to(folder).as_posix(), str(error), **affected))

    identity = None
    with noting(folder / "store.json"):
        identity = stores.read_identity(folder)
    with noting(folder / "exclusions"):
        exclusions.read(folder / "exclusions")
    members: dict[int, list[str]] = {}
    names: dict[str, list[str]] = {}
    whole = True
    for number in range(max(tables.numbers(folder / "items"), default=-1) + 1):
        whole = False
        with noting(tables.record_path(folder / "items", number)):
            table = tables.read(folder / "items", number)
            later = tables.members(table)
            changed = [shard for shard in members if later.get(shard) != members[shard]]
            members = later
            names = {}
            for item_id, file_name in zip(table["item_id"].to_pylist(), table["file_name"].to_pylist(), strict=True):
                names.setdefault(item_id, []).append(file_name)
            whole = True
            if changed:
                raise StoreError(f"images of shard {changed[0]} are not those of the table before")
    paths = []
    for family in FAMILIES:
        with noting(folder / "shards"):
            paths += [(family, *pair) for pair in shards.record_paths(folder / "shards", family).items()]
    for done, (family, shard, path) in enumerate(paths):
        if progress is not None:
            progress("verifying", done, len(paths))
        ids = tuple(members.get(shard, []))
        affected = {"item_ids": ids, "file_names": tuple(name for item_id in ids for name in names[item_id])}
        with noting(path, family=family, shard=shard, **affected):
            record = shards.read_record(path, {} if identity is None else identity.names)
            commit.check_size(path.parent, record)
            commit.check_hash(path.parent, record, thorough=True)
            if identity is not None:
                shape = identity.spec.dim, identity.batches
                inside = shards.examine(path.parent, record, *shape, list(ids) if whole else None)
                shards.check_finite(record.file, shards.content(path.parent, record, *shape, inside))
    if progress is not None:
        progress("verifying", len(paths), len(paths))
    for name in commit.names(folder / "derived"):
        with noting(folder / "derived" / name):
            if name.endswith(".safetensors") and stores.read_tensors(folder / "derived" / name) is None:
                raise StoreError(f"{name} is damaged; it is ignored, and made again when it is needed")
    if os.path.lexists(folder / stores.CONTROLS):
        with noting(folder / stores.CONTROLS):
            for found in verify(stores.found(folder / stores.CONTROLS)):
                problems.append(replace(found, file=f"{stores.CONTROLS}/{found.file}"))
    return problems


def drop(folder: Path, problems: Iterable[Problem]) -> None:
    """Remove shards and derived files that have a problem.

    The file goes first: while its record stands no other builder takes the shard up, and no reader gets a value.

    Raises:
        StoreError: Something cannot be removed.
    """
    for problem in problems:
        path = folder / problem.file
        with commit.writing(path):
            if problem.family is not None:
                for file in path.parent.glob(f"{path.stem}-*.h5"):
                    file.unlink()
            path.unlink()
            commit.sync(path.parent)
