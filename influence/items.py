"""The table of images of a store, as snapshots: each names all images of the one before, and the latest holds.

A snapshot is an immutable Parquet file with a commit record, `items/000000.json`. Images keep their shard for good.
"""

import io
import itertools
import re
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from influence import commit, shards
from influence.commit import Committed
from influence.errors import StoreError
from influence.exclusions import Exclusions

ITEM_COLUMNS = ("item_id", "file_name", "caption", "creator", "licence")
SCHEMA = pa.schema([*((name, pa.string()) for name in ITEM_COLUMNS), ("shard", pa.int64())])

_REQUIRED = ("item_id", "file_name", "creator", "shard")
_MAX_SHARD = 999_999
_SHARD_BYTES = 128 << 20
_ITEM_ID = r"\A[!-~]{1,32}\z"
_FILE = re.compile(r"[0-9]{6}-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True)
class Snapshot(Committed):
    """Record of one table of images."""

    rows: int


def numbers(folder: Path) -> list[int]:
    """Numbers of the committed tables, in order."""
    return [int(name[:6]) for name in commit.names(folder) if re.fullmatch(r"[0-9]{6}\.json", name)]


def record_path(folder: Path, number: int) -> Path:
    """Where the record of a table belongs."""
    return folder / f"{number:06d}.json"


def read(folder: Path, number: int) -> pa.Table:
    """Read one table of images.

    Raises:
        StoreError: It is damaged, or not a table of images.
    """
    snapshot = commit.parsed(Snapshot, record_path(folder, number), _FILE)
    commit.check_size(folder, snapshot)
    commit.check_hash(folder, snapshot, thorough=True)
    path = folder / snapshot.file
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{path} is not a table: {str(error).splitlines()[0]}") from None
    if table.num_rows != snapshot.rows:
        raise StoreError(f"{path} has {table.num_rows} rows, its record says {snapshot.rows}")
    return _checked(table, str(path))


def _checked(table: pa.Table, where: str) -> pa.Table:
    table = table.replace_schema_metadata()
    if not table.schema.equals(SCHEMA):
        found = ", ".join(table.column_names)[:100]
        raise StoreError(f"{where} has columns {found}; expected {', '.join(SCHEMA.names)}")
    try:
        table.validate(full=True)  # text that is not UTF-8, offsets that lead elsewhere
    except pa.ArrowException as error:
        raise StoreError(f"{where} is damaged inside: {str(error).splitlines()[0]}") from None
    for name in _REQUIRED:
        if table[name].null_count:
            raise StoreError(f"{where} has rows without {name}")
    ids, shard = table["item_id"], table["shard"]
    for item_id in ids.filter(pc.invert(pc.match_substring_regex(ids, _ITEM_ID))).to_pylist()[:1]:
        raise StoreError(f"{where}: {item_id!r} is no id of an image; expected 1 to 32 printable ASCII characters")
    outside = table.filter(pc.or_(pc.less(shard, 0), pc.greater(shard, _MAX_SHARD)))
    for item_id, number in zip(*_pairs(outside.slice(0, 1)), strict=True):
        raise StoreError(f"{where}: image {item_id} is in shard {number}; expected 0 to {_MAX_SHARD}")
    if len(_distinct(table)) > pc.count_distinct(ids).as_py():
        raise StoreError(f"{where}: an image is in more than one shard")
    return table


def _distinct(table: pa.Table) -> pa.Table:
    """Shard and id of each image."""
    return table.group_by(["shard", "item_id"]).aggregate([])


def _pairs(table: pa.Table) -> tuple[list[str], list[int]]:
    return table["item_id"].to_pylist(), table["shard"].to_pylist()


def _assigned(table: pa.Table) -> dict[str, int]:
    """The shard of each image."""
    return dict(zip(*_pairs(table), strict=True))


def members(table: pa.Table) -> dict[int, list[str]]:
    """Ids of the images of each shard, in order."""
    images = _distinct(table).sort_by([("shard", "ascending"), ("item_id", "ascending")])
    shard, ids = images["shard"].to_numpy(), images["item_id"].to_pylist()
    bounds = [*np.flatnonzero(np.diff(shard, prepend=-1)), len(ids)]
    return {int(shard[start]): ids[start:stop] for start, stop in itertools.pairwise(bounds)}


def add(
    folder: Path,
    temporary: Path,
    files: pd.DataFrame,
    *,
    dim: int,
    curvature_rate: float,
    batches: int,
    out: Exclusions,
) -> None:
    """Commit a new table, if these are other files than those of the latest.

    Args:
        folder: Where tables are.
        temporary: Folder for temporary files.
        files: One row for each file, with `ITEM_COLUMNS`.
        dim: k; with the next, decides how many images a shard holds.
        curvature_rate: Curvature rows per image.
        batches: Batches of draws whose features are kept.
        out: What is excluded: such images are not added, and may be missing.

    Raises:
        StoreError: Images of the latest table are missing, or a value cannot be stored.
    """
    added = False
    while not added:  # if another builder added a table at this very moment, this one must be compared with it
        latest = numbers(folder)
        old = read(folder, latest[-1]) if latest else SCHEMA.empty_table()
        table = _assign(folder.parent.name, old, files, dim, curvature_rate, batches, out)
        if latest and table.equals(old):
            return
        added = _commit(folder, temporary, table, latest[-1] + 1 if latest else 0)


def _assign(
    store: str, old: pa.Table, files: pd.DataFrame, dim: int, curvature_rate: float, batches: int, out: Exclusions
) -> pa.Table:
    """Give new images, sorted by id, new shards."""
    known, before = _assigned(old), old.to_pandas()
    files = files[~out.cover(files) | files["item_id"].isin(known)]
    missing = before[~before["item_id"].isin(files["item_id"])]
    lost = missing[~out.cover(missing)].drop_duplicates("item_id")
    if len(lost):
        raise StoreError(
            f"store {store} holds {len(lost)} images that the data set has not, {lost['file_name'].min()} first; "
            "put them back, exclude them, or build another --store"
        )
    if len(missing):  # excluded, and taken out of the data set since: the store still has their features
        files = pd.concat([files, missing.drop(columns="shard")])
    if not len(files) or not all(isinstance(item_id, str) for item_id in files["item_id"]):
        raise StoreError("the table of images has no rows, or rows without item_id")
    given = set(files["item_id"])
    new = sorted(given - set(known))
    per_shard = images_per_shard(len(new), dim, curvature_rate, batches)
    first = max(known.values(), default=-1) + 1
    known |= {item_id: first + i // per_shard for i, item_id in enumerate(new)}
    frame = files[list(ITEM_COLUMNS)].assign(shard=files["item_id"].map(known).astype("int64"))
    frame = frame.sort_values(["shard", "item_id", "file_name"], ignore_index=True)
    try:
        table = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False)
    except (pa.ArrowException, UnicodeError, TypeError) as error:
        raise StoreError(f"the table of images cannot be stored: {str(error).splitlines()[0]}") from None
    return _checked(table, "the table of images")


def images_per_shard(count: int, dim: int, curvature_rate: float, batches: int) -> int:
    """About 64 shards, of 8 images at least and 128 MB at most."""
    sample = 1024
    bytes_per_image = shards.size(shards.layout(sample, ceil(curvature_rate * sample), dim, batches)) / sample
    return max(1, min(max(8, -(-count // 64)), int(_SHARD_BYTES / bytes_per_image)))


def _commit(folder: Path, temporary: Path, table: pa.Table, number: int) -> bool:
    """Commit a table; whether no other builder was first."""
    final = record_path(folder, number)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    with commit.writing(final), commit.aside(temporary) as path:
        commit.step("write")
        commit.write(path, buffer.getvalue())
        commit.step("hash")
        size, xxh, sha = commit.digest(path)
        snapshot = Snapshot(f"{number:06d}-{xxh}.parquet", size, xxh, sha, table.num_rows)
        commit.place(path, folder / snapshot.file)
    first = commit.publish(temporary, final, asdict(snapshot))
    if not first and commit.parsed(Snapshot, final, _FILE).file != snapshot.file:
        commit.drop(folder / snapshot.file)
    return first
