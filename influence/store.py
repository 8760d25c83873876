"""The HDF5 store: whole or absent. What has a commit record exists; anything else is garbage.

A file is written under `tmp/`, read back, hashed, synced and renamed; then its record is linked into place, and the
link is the commit: the first writer wins, and a second finds that the work is done. Records and sizes are checked when
they are listed, and a file's hash before its first use in a process.
"""

import hashlib
import io
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy
import xxhash

from influence import shards
from influence.errors import StoreError
from influence.shards import ShardContent, fsync
from influence.spec import FORMAT, FeatureSpec, check_equal

ITEM_COLUMNS = ("item_id", "file_name", "caption", "creator", "licence")
_MAX_JSON = 64 << 20
_MAX_DEPTH = 12
_SHARD_BYTES = 128 << 20
_NAME = re.compile(r"[a-z]+-[0-9]{6}-[0-9a-f]{32}\.h5|[0-9]{6}-[0-9a-f]{32}\.parquet")


@dataclass(frozen=True)
class Record:
    """Commit record of one file."""

    file: str
    bytes: int
    xxh3_128: str
    sha256: str
    spec: str
    """Fingerprint of the store's spec."""
    rows: int = 0
    psi_rows: int = 0
    refused: dict[str, str] | None = None


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not what it claims to be."""

    file: str
    found: str
    shard: str | None = None
    item_ids: tuple[str, ...] = ()


def step(name: str) -> None:
    """Called before each step of a commit; tests replace it to stop there."""


class Store:
    """One store folder. Open it with `open_store`, make it with `create`."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        """Take over what `store.json` says, and read the latest table of images."""
        self.path = path
        self.spec = FeatureSpec.from_json(record["spec"])
        self.build: dict[str, Any] = record["build"]
        self.source: dict[str, Any] = record["source"]
        self._verified: set[str] = set()
        self.items = _read_items(self)

    # Images and shards ----------------------------------------------------------------------------------------------

    def shard_items(self, shard: int) -> list[str]:
        """Ids of the images that belong to a shard, in order."""
        return sorted(self.items.loc[self.items["shard"] == shard, "item_id"].unique())

    def records(self, family: str = "loss") -> dict[int, Record]:
        """Commit records of a family's shards, by number; each file is there and has its size.

        Raises:
            StoreError: A record is damaged, or what it names is not there.
        """
        found = {}
        for path in sorted((self.path / "shards").glob(f"{family}-*.json")):
            match = re.fullmatch(rf"{family}-(\d{{6}})\.json", path.name)
            if match is None:
                raise StoreError(f"{path}: a record with a name that this program does not write; remove it")
            record = _record(path, self)
            _check_size(self.path / "shards", record)
            found[int(match[1])] = record
        return found

    def missing(self, family: str = "loss") -> list[int]:
        """Numbers of the shards that are not committed yet."""
        return sorted(set(self.items["shard"].tolist()) - set(self.records(family)))

    def refused(self, family: str = "loss") -> dict[str, str]:
        """Images without features, and why."""
        return {i: why for record in self.records(family).values() for i, why in (record.refused or {}).items()}

    def family_hash(self, family: str = "loss") -> str:
        """Hash of all that is committed of a family: the name of what is derived from it."""
        lines = [f"{shard} {record.sha256}" for shard, record in sorted(self.records(family).items())]
        return hashlib.sha256("\n".join([self.spec.fingerprint, *lines]).encode()).hexdigest()

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self, family: str, shard: int) -> ShardContent:
        """One committed shard; its arrays are mapped from the file.

        Raises:
            StoreError: The shard is absent or not what its record says.
        """
        records = self.records(family)
        if shard not in records:
            raise StoreError(f"store {self.path.name} has no {family} shard {shard}; run influence build to make it")
        return self._read(family, shard, records[shard])

    def blocks(self, family: str = "loss") -> Iterator[ShardContent]:
        """All committed shards, by number."""
        for shard, record in sorted(self.records(family).items()):
            yield self._read(family, shard, record)

    def _read(self, family: str, shard: int, record: Record) -> ShardContent:
        path = self.path / "shards" / record.file
        if record.file not in self._verified:
            _check_hash(path, record)
            self._verified.add(record.file)
        found = shards.read(path, shards.layout(record.rows, record.psi_rows, self.spec.dim))
        ids = [item_id.decode("ascii", "replace") for item_id in found["item_id"].tolist()]
        refused = record.refused or {}
        if sorted([*ids, *refused]) != self.shard_items(shard):
            raise StoreError(f"{path.name} holds other images than the store's items name; run influence verify")
        return ShardContent(
            family, shard, ids, found["phi"], found["loss"], found["psi"], found["psi_item"], found["psi_draw"], refused
        )

    # Writing --------------------------------------------------------------------------------------------------------

    def commit(self, content: ShardContent) -> None:
        """Commit one shard; if another builder was first, its shard stays.

        Raises:
            StoreError: The content is not of this store, or not finite, or another builder's shard has other images.
        """
        self._check_content(content)
        arrays = shards.arrays(content)
        name = f"{content.family}-{content.shard:06d}"
        final = self.path / "shards" / f"{name}.json"
        temporary = self.path / "tmp" / f"{uuid.uuid4().hex}.h5"
        step("write")
        try:
            shards.write(temporary, arrays)
            step("verify")
            back = shards.read(temporary, shards.layout(len(content.phi), len(content.psi), self.spec.dim))
            if any(not np.array_equal(back[key], array) for key, array in arrays.items()):
                raise StoreError(f"{temporary} read back other values than were written: check the disk")
            del back
            step("hash")
            size, xxh, sha = _hashes(temporary)
            record = Record(
                f"{name}-{xxh}.h5",
                size,
                xxh,
                sha,
                self.spec.fingerprint,
                len(content.phi),
                len(content.psi),
                content.refused,
            )
            step("fsync")
            fsync(temporary)
            step("rename")
            temporary.rename(self.path / "shards" / record.file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"shard {name} could not be written ({error}); free the disk and run the command again"
            ) from error
        step("fsync-folder")
        fsync(self.path / "shards")
        if not _link(self.path, final, json.dumps(_sealed(asdict(record)), indent=1).encode()):
            first = _record(final, self)
            if first.rows != record.rows or set(first.refused or {}) != set(content.refused):
                raise StoreError(
                    f"shard {name}: another builder committed {first.rows} images, this one has {record.rows}: "
                    "features are not reproducible on this machine"
                )
            if first.file != record.file:
                (self.path / "shards" / record.file).unlink(missing_ok=True)

    def _check_content(self, content: ShardContent) -> None:
        expected = self.shard_items(content.shard)
        if sorted([*content.item_ids, *content.refused]) != expected:
            raise StoreError(
                f"shard {content.shard} has {len(expected)} images; {len(content.item_ids)} others were given"
            )
        wanted = shards.layout(len(content.item_ids), len(content.psi), self.spec.dim)
        for name, array in shards.arrays(content).items():
            shape, dtype = wanted[name]
            if array.shape != shape or array.dtype != dtype:
                raise StoreError(
                    f"{name} of shard {content.shard} is {array.dtype} {array.shape}; expected {dtype} {shape}"
                )
            if dtype.kind == "f" and not np.isfinite(array).all():
                raise StoreError(f"{name} of shard {content.shard} holds NaN or infinity; refuse these images by name")

    # Derived --------------------------------------------------------------------------------------------------------

    def read_derived(self, name: str) -> dict[str, np.ndarray] | None:
        """What was derived before under this name, or `None`; a damaged file counts as absent, for it can be remade."""
        path = self.path / "derived" / name
        if not path.is_file():
            return None
        try:
            data = path.read_bytes()
            digest, body = data[:32], data[32:]
            return safetensors.numpy.load(body) if hashlib.sha256(body).digest() == digest else None
        except (OSError, safetensors.SafetensorError):
            return None

    def write_derived(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        """Keep something that can be remade."""
        body = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
        temporary = self.path / "tmp" / uuid.uuid4().hex
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
        temporary.rename(self.path / "derived" / name)


# Opening and making -------------------------------------------------------------------------------------------------


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store.

    Raises:
        StoreError: There is none at this path, or its records are damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise StoreError(f"there is no store at {folder}; make one with influence build")
    if not (folder / "store.json").is_file():
        raise StoreError(f"{folder} is not a store: it has no store.json; make one with influence build")
    record = _unsealed(folder / "store.json")
    if record.get("format") != FORMAT or not {"spec", "build", "source"} <= set(record):
        raise StoreError(f"{folder}/store.json has format {record.get('format')}; this program reads {FORMAT}")
    return Store(folder, record)


def create(
    path: str | os.PathLike[str],
    *,
    spec: FeatureSpec,
    build: dict[str, Any],
    source: dict[str, Any],
    items: pd.DataFrame,
) -> Store:
    """Make a store, or open it to go on: its spec and build must be these, and its images among `items`.

    Args:
        path: The folder.
        spec: What identifies the features.
        build: What else decides the rows: compared when the store exists.
        source: Where things came from: kept as first written.
        items: One row for each file, with `ITEM_COLUMNS`.

    Raises:
        SpecMismatchError: The store was made with another spec or build.
        StoreError: The folder is something else, or images of the store are missing from `items`.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "store.json").exists():
        foreign = [p.name for p in folder.iterdir() if p.name not in ("items", "shards", "derived", "tmp")]
        if foreign:
            raise StoreError(
                f"{folder} is not a store and not empty (it holds {foreign[0]}); choose another --store folder"
            )
    for name in ("items", "shards", "derived", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "kind": "influence store", "spec": spec.to_json(), "build": build, "source": source}
    if not (folder / "store.json").exists():
        _link(folder, folder / "store.json", json.dumps(_sealed(record), indent=1).encode())
    kept = _unsealed(folder / "store.json")
    advice = "Use the same options, or another --store folder."
    check_equal(spec.to_json(), kept["spec"], what="this build", where=f"store {folder.name}", advice=advice)
    check_equal(build, kept["build"], what="this build", where=f"store {folder.name}", advice=advice)
    _add_items(folder, spec, build, items)
    return open_store(folder)


# Items --------------------------------------------------------------------------------------------------------------


def _snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "items").glob("[0-9][0-9][0-9][0-9][0-9][0-9].json"))


def _read_items(store: Store) -> pd.DataFrame:
    """The latest table of images."""
    snapshots = _snapshots(store.path)
    if not snapshots:
        return pd.DataFrame({name: [] for name in (*ITEM_COLUMNS, "shard")}).astype({"shard": "int64"})
    record = _record(snapshots[-1], store)
    path = store.path / "items" / record.file
    _check_size(store.path / "items", record)
    _check_hash(path, record)
    return pd.read_parquet(path)


def _add_items(folder: Path, spec: FeatureSpec, build: dict[str, Any], items: pd.DataFrame) -> None:
    """Write a new table if the images changed; images keep their shards, new ones get new shards."""
    while True:
        current = open_store(folder)
        old = current.items
        known = dict(zip(old["item_id"], old["shard"], strict=True))
        gone = set(known) - set(items["item_id"])
        if gone:
            raise StoreError(
                f"store {folder.name} holds {len(gone)} images that the data set has not, {min(gone)} first; "
                "put them back, or build another --store"
            )
        table = items[list(ITEM_COLUMNS)].copy()
        new = sorted(set(table["item_id"]) - set(known))
        size = _images_per_shard(len(new), spec.dim, build.get("curvature_rate", 0.0))
        first = max(known.values(), default=-1) + 1
        known |= {item_id: first + i // size for i, item_id in enumerate(new)}
        table["shard"] = table["item_id"].map(known).astype("int64")
        table = table.sort_values(["shard", "item_id", "file_name"], ignore_index=True)
        if len(old) and table.equals(old.astype(table.dtypes.to_dict())):
            return
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        data = buffer.getvalue()
        xxh, sha = xxhash.xxh3_128_hexdigest(data), hashlib.sha256(data).hexdigest()
        number = len(_snapshots(folder))
        record = Record(f"{number:06d}-{xxh}.parquet", len(data), xxh, sha, spec.fingerprint, len(table))
        _write_synced(folder / "tmp" / uuid.uuid4().hex, data, folder / "items" / record.file)
        if _link(
            folder, folder / "items" / f"{number:06d}.json", json.dumps(_sealed(asdict(record)), indent=1).encode()
        ):
            return


def _images_per_shard(count: int, dim: int, curvature_rate: float) -> int:
    """About 64 shards, of 8 images at least and 128 MB at most."""
    bytes_per_image = 4 * dim * (1 + curvature_rate)
    return max(1, min(max(8, -(-count // 64)), int(_SHARD_BYTES / bytes_per_image)))


# Files --------------------------------------------------------------------------------------------------------------


def _write_synced(temporary: Path, data: bytes, final: Path) -> None:
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(final)
    fsync(final.parent)


def _link(folder: Path, final: Path, data: bytes) -> bool:
    """Put a file in place if it is not there yet, whole and at once; whether this call was first."""
    temporary = folder / "tmp" / uuid.uuid4().hex
    step("record")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        step("link")
        os.link(temporary, final)
        first = True
    except FileExistsError:
        first = False
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{final} could not be written ({error}); free the disk and run the command again") from error
    step("unlink")
    temporary.unlink(missing_ok=True)
    step("fsync-link")
    fsync(final.parent)
    return first


def _hashes(path: Path) -> tuple[int, str, str]:
    """Bytes, xxh3-128 and SHA-256 of a file."""
    xxh, sha, size = xxhash.xxh3_128(), hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            xxh.update(chunk)
            sha.update(chunk)
            size += len(chunk)
    return size, xxh.hexdigest(), sha.hexdigest()


def _check_size(folder: Path, record: Record) -> None:
    try:
        facts = (folder / record.file).lstat()
    except OSError:
        raise StoreError(f"{folder / record.file} is missing; run influence verify on the store") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_size != record.bytes:
        raise StoreError(
            f"{folder / record.file} is {facts.st_size} bytes, its record says {record.bytes}; run influence verify"
        )


def _check_hash(path: Path, record: Record) -> None:
    xxh = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            xxh.update(chunk)
    if xxh.hexdigest() != record.xxh3_128:
        raise StoreError(f"{path} is damaged: its bytes are not those that were committed; run influence verify")


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON record with its own SHA-256."""
    return {**record, "seal": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}


def _unsealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON record.

    Raises:
        StoreError: It is too large, not JSON, too deep, or not what was written.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise StoreError(f"{path} is larger than {_MAX_JSON >> 20} MiB; it is not a record of a store")
        record = json.loads(data, object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not a readable record: {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict) or _depth(record) > _MAX_DEPTH:
        raise StoreError(f"{path} is not a record of a store")
    seal = record.pop("seal", None)
    if _sealed(record)["seal"] != seal or json.dumps({**record, "seal": seal}, indent=1).encode() != data:
        raise StoreError(f"{path} is damaged: its contents do not fit its seal; restore it from a copy")
    return record


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _depth(value: Any) -> int:
    level, layer = 0, [value]
    while layer:
        level += 1
        layer = [c for v in layer for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return level


def _record(path: Path, store: Store) -> Record:
    fields = _unsealed(path)
    try:
        record = Record(**fields)
    except TypeError:
        raise StoreError(f"{path} has other fields than a commit record") from None
    numbers = (record.bytes, record.rows, record.psi_rows)
    if (
        not isinstance(record.file, str)
        or not _NAME.fullmatch(record.file)
        or not record.file.startswith(path.stem)
        or record.xxh3_128 not in record.file
        or any(not isinstance(n, int) or n < 0 for n in numbers)
    ):
        raise StoreError(f"{path} names {record.file!r}; expected a file of this store")
    if record.spec != store.spec.fingerprint:
        raise StoreError(
            f"{path} belongs to a store with another spec ({record.spec[:12]}, not {store.spec.fingerprint[:12]})"
        )
    return record


# Verifying ----------------------------------------------------------------------------------------------------------


def verify(store: Store) -> list[Problem]:
    """Check every byte of a store: records, sizes, hashes, contents. An empty list says that all is as committed."""
    problems = []
    for family in shards.FAMILIES:
        for path in sorted((store.path / "shards").glob(f"{family}-*.json")):
            number = int(path.stem.split("-")[1]) if path.stem.split("-")[1].isdecimal() else -1
            ids = tuple(store.shard_items(number))
            try:
                record = _record(path, store)
                _check_size(store.path / "shards", record)
                size, xxh, sha = _hashes(store.path / "shards" / record.file)
                if (size, xxh, sha) != (record.bytes, record.xxh3_128, record.sha256):
                    raise StoreError("its bytes are not those that were committed")
                content = store._read(family, number, record)
                if not np.isfinite(content.phi).all() or not np.isfinite(content.psi).all():
                    raise StoreError("it holds NaN or infinity")
            except StoreError as error:
                problems.append(Problem(path.name, str(error), path.stem, ids))
    return problems
