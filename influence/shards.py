"""Shards of features: an HDF5 file and its record. A file is validated against a whitelist before it is believed.

An HDF5 file is native-code input. The caller checks the file's hash first; then exactly the expected datasets are
accepted: plain types, contiguous, inside the file, apart from each other, and nothing else. The library works in memory
when it writes, so that a full disk is an ordinary error of an ordinary write and never HDF5's.
"""

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Int32

from influence import commit
from influence.commit import ADVICE, Committed
from influence.errors import StoreError

FAMILIES = {
    "loss": "of the loss",
    "square": "of another output",
    "base": "under the model before the fine-tune",
    "middle": "at half of the way of the fine-tune",
    "late": "at ¾ of the way of the fine-tune",
    "half": "under a fine-tune of half the length",
}
"""Which gradients a store may hold."""

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of each dataset."""

_FILE = re.compile(r"[a-z]+-[0-9]{6}-[0-9a-f]{32}\.h5")
_OVERHEAD = 1 << 16  # HDF5's own share of a file; 4.4 kB as written


@dataclass(frozen=True)
class ShardContent:
    """Features of the images of one shard. Items and rows are in the order of `item_ids`."""

    family: str
    """What was differentiated: `loss` or `square`; the others are of the loss under other models."""
    shard: int
    item_ids: list[str]
    phi: np.ndarray
    """φ, float32 `[items, k]`."""
    phi_batch: np.ndarray
    """φ of disjoint batches of the draws, relative to `phi_scale`, float16 `[items, batches, k]`: for errors only."""
    phi_scale: np.ndarray
    """Largest entry of each row of `phi_batch`, float32 `[items, batches]`."""
    loss: np.ndarray
    """Mean of the output over the image's draws, float32 `[items]`."""
    psi: np.ndarray
    """Curvature rows, float32 `[rows, k]`, by item and draw."""
    psi_item: np.ndarray
    """Index of the item of each row, int32."""
    psi_draw: np.ndarray
    """Draw of each row, int32."""
    refused: dict[str, str] = field(default_factory=dict)
    """Images of this shard that have no features, and why."""


@dataclass(frozen=True)
class Record(Committed):
    """Commit record of one shard."""

    family: str
    shard: int
    rows: int
    """Images that have features."""
    psi_rows: int
    refused: dict[str, str]
    """Images that have none, and why."""
    spec: str
    """Fingerprint of the store's spec."""
    build: str
    """SHA-256 of the store's build options."""


# Records -------------------------------------------------------------------------------------------------------------


def check_family(family: str) -> None:
    """Refuse a family that there is not.

    Raises:
        StoreError: Its name is unknown.
    """
    if family not in FAMILIES:
        raise StoreError(f"features of {family!r} are unknown; expected one of {', '.join(FAMILIES)}")


def record_path(folder: Path, family: str, shard: int) -> Path:
    """Where the record of a shard belongs."""
    return folder / f"{family}-{shard:06d}.json"


def record_paths(folder: Path, family: str) -> dict[int, Path]:
    """Records of a family, by number.

    Raises:
        StoreError: A file looks like a record and is none.
    """
    found = {}
    for name in commit.names(folder):
        if name.startswith(f"{family}-") and name.endswith(".json"):
            if not re.fullmatch(r"[a-z]+-[0-9]{6}\.json", name):
                raise StoreError(f"{folder / name} has a name that this program does not write; remove it")
            found[int(name[-11:-5])] = folder / name
    return found


def read_record(path: Path, store: Mapping[str, str]) -> Record:
    """Read the record of a shard, and check all that can be checked without its file.

    Args:
        path: Where it is.
        store: `spec` and `build` that it must have, if known.

    Raises:
        StoreError: It is damaged, or belongs elsewhere.
    """
    record = commit.parsed(Record, path, _FILE)
    if f"{record.family}-{record.shard:06d}" != path.stem:
        raise StoreError(f"{path} is of {record.family} shard {record.shard}: records were moved; {ADVICE}")
    for name, expected in store.items():
        found = getattr(record, name)
        if found != expected:
            raise StoreError(f"{path} is of a store with another {name} ({found[:12]}, not {expected[:12]}); {ADVICE}")
    return record


@dataclass(frozen=True)
class Inside:
    """What is inside a shard's file, as it was found once."""

    offsets: Mapping[str, int | None]
    """Where the bytes of each dataset begin; `None` if it has none."""
    item_ids: list[str]


def examine(folder: Path, record: Record, dim: int, batches: int, expected_ids: list[str] | None) -> Inside:
    """Look into a shard whose hash has been checked: its datasets, its images, and where curvature rows belong.

    Args:
        folder: Where its file is.
        record: Its record.
        dim: k.
        batches: Disjoint batches of the draws of an image.
        expected_ids: The images of the shard; `None` if nothing says whose features it has.

    Raises:
        StoreError: The file is not what its record says, or of other images.
    """
    expected = layout(record.rows, record.psi_rows, dim, batches)
    offsets = find(folder / record.file, expected)
    found = mapped(folder / record.file, expected, offsets)
    try:
        ids = found["item_id"].astype("U").tolist()
    except UnicodeDecodeError:
        raise StoreError(f"{record.file} has item ids that are not ASCII; {ADVICE}") from None
    if expected_ids is not None:
        if sorted([*ids, *record.refused]) != expected_ids:
            raise StoreError(f"{record.file} holds other images than the store's table names for its shard; {ADVICE}")
        if ids == sorted(ids):  # as every builder writes them: no second copy of the table's strings
            ids = [item_id for item_id in expected_ids if item_id not in record.refused]
    check_rows(record.file, len(ids), found["psi_item"], found["psi_draw"])
    return Inside(offsets, ids)


def content(folder: Path, record: Record, dim: int, batches: int, inside: Inside) -> ShardContent:
    """Map a shard that was examined.

    Raises:
        StoreError: It cannot be mapped.
    """
    found = mapped(folder / record.file, layout(record.rows, record.psi_rows, dim, batches), inside.offsets)
    del found["item_id"]
    return ShardContent(record.family, record.shard, inside.item_ids, **found, refused=record.refused)


def check_content(content: ShardContent, dim: int, batches: int, expected_ids: list[str]) -> None:
    """Refuse what must not be committed.

    Args:
        content: The shard.
        dim: k.
        batches: Disjoint batches of the draws of an image.
        expected_ids: The images of the shard, in order.

    Raises:
        StoreError: It is not of these images, or has other shapes or types, or is not finite.
    """
    check_family(content.family)
    name = f"{content.family} shard {content.shard}"
    if not expected_ids:
        raise StoreError(f"{name} has no images in this store")
    if sorted([*content.item_ids, *content.refused]) != expected_ids:
        odd = sorted({*content.item_ids, *content.refused} ^ set(expected_ids)) or ["given twice"]
        raise StoreError(
            f"{name} must name each of its {len(expected_ids)} images once, with features or as refused; "
            f"{len(content.item_ids)} and {len(content.refused)} were given ({odd[0]})"
        )
    if content.item_ids != sorted(content.item_ids):
        raise StoreError(f"images of {name} are not in the order of their ids")
    wanted = layout(len(content.item_ids), len(content.psi), dim, batches)
    for key, array in arrays(content).items():
        shape, dtype = wanted[key]
        if array.shape != shape or array.dtype != dtype:
            raise StoreError(f"{key} of {name} is {array.dtype} {array.shape}; expected {dtype} {shape}")
    check_finite(name, content)
    check_rows(name, len(content.item_ids), content.psi_item, content.psi_draw)


def check_finite(name: str, content: ShardContent) -> None:
    """Refuse features that no score can be made of.

    Raises:
        StoreError: Some are NaN or infinite.
    """
    for key in ("phi", "phi_batch", "phi_scale", "loss", "psi"):
        if not np.isfinite(getattr(content, key)).all():
            raise StoreError(f"{key} of {name} holds NaN or infinity; such images are refused by name")


def check_rows(
    name: str, images: int, psi_item: Int32[np.ndarray, " rows"], psi_draw: Int32[np.ndarray, " rows"]
) -> None:
    """Refuse curvature rows that are not of images that are there, in the order of images and draws.

    Raises:
        StoreError: A row is out of place.
    """
    item, draw = psi_item.astype(np.int64), psi_draw.astype(np.int64)
    place = item * (1 << 32) + draw
    inside = not len(item) or (item[0] >= 0 and item[-1] < images and draw.min() >= 0)
    if not inside or (np.diff(place) < 0).any():
        raise StoreError(f"curvature rows of {name} are not of its images, in the order of images and draws")


def without(content: ShardContent, excluded: set[str]) -> ShardContent:
    """A shard without some of its images; itself if it has none of them."""
    refused = {item_id: why for item_id, why in content.refused.items() if item_id not in excluded}
    good = np.array([item_id not in excluded for item_id in content.item_ids], bool)
    if good.all():
        return replace(content, refused=refused)
    keep = good[content.psi_item]
    return ShardContent(
        content.family,
        content.shard,
        [item_id for item_id in content.item_ids if item_id not in excluded],
        phi=content.phi[good],
        phi_batch=content.phi_batch[good],
        phi_scale=content.phi_scale[good],
        loss=content.loss[good],
        psi=content.psi[keep],
        psi_item=(np.cumsum(good) - 1)[content.psi_item[keep]].astype(np.int32),
        psi_draw=content.psi_draw[keep],
        refused=refused,
    )


# Files ---------------------------------------------------------------------------------------------------------------


def layout(items: int, rows: int, dim: int, batches: int) -> Layout:
    """Shape and type of every dataset of a shard."""
    return {
        "phi": ((items, dim), np.dtype("<f4")),
        "phi_batch": ((items, batches, dim), np.dtype("<f2")),
        "phi_scale": ((items, batches), np.dtype("<f4")),
        "loss": ((items,), np.dtype("<f4")),
        "item_id": ((items,), np.dtype("S32")),
        "psi": ((rows, dim), np.dtype("<f4")),
        "psi_item": ((rows,), np.dtype("<i4")),
        "psi_draw": ((rows,), np.dtype("<i4")),
    }


def size(expected: Layout) -> int:
    """Bytes of the datasets."""
    total = 0
    for shape, dtype in expected.values():
        count = dtype.itemsize
        for length in shape:
            count *= length
        total += count
    return total


def arrays(content: ShardContent) -> dict[str, np.ndarray]:
    """The datasets of a shard, by name."""
    return {
        "phi": content.phi,
        "phi_batch": content.phi_batch,
        "phi_scale": content.phi_scale,
        "loss": content.loss,
        "item_id": np.array([item_id.encode("ascii") for item_id in content.item_ids], dtype="S32"),
        "psi": content.psi,
        "psi_item": content.psi_item,
        "psi_draw": content.psi_draw,
    }


def encode(datasets: Mapping[str, np.ndarray]) -> bytes:
    """Make the bytes of a file: contiguous, without times, so that equal content gives equal bytes."""
    bounds = ("earliest", "v108")  # what every HDF5 since 2008 can read
    name = uuid.uuid4().hex  # of no file: no two may be open in memory under one name
    with h5py.File(name, "w", driver="core", backing_store=False, libver=bounds, track_order=False) as file:
        for key, array in datasets.items():
            file.create_dataset(key, data=array, track_times=False)
        file.flush()
        return file.id.get_file_image()


def find(path: Path, expected: Layout) -> dict[str, int | None]:
    """Where the bytes of each dataset of a shard begin, `None` if it has none.

    Args:
        path: The file; its hash has been checked.
        expected: What `layout` says of it.

    Raises:
        StoreError: The file holds anything else than what is expected, or holds it in another way.
    """
    total = size(expected)
    with _reading(path):
        length = path.stat().st_size
        if not total <= length <= total + _OVERHEAD:
            raise StoreError(f"{path.name} is {length} bytes; its datasets are {total}")
        with h5py.File(path, "r", locking=False) as file:
            return _offsets(file, path.name, length, expected)


def mapped(path: Path, expected: Layout, offsets: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    """Map the datasets of a shard, read-only.

    Raises:
        StoreError: It cannot be mapped.
    """
    with _reading(path):
        whole = np.memmap(path, mode="r")
        return {name: _view(whole, offsets[name], *expected[name]) for name in expected}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in errors of HDF5 and of the system."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path.name} is not a readable HDF5 file: {str(error).splitlines()[0]}") from None


def _view(whole: np.memmap, offset: int | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if offset is None:
        found = np.empty(shape, dtype)
        found.flags.writeable = False
        return found
    return np.ndarray(shape, dtype, whole, offset)


def _offsets(file: h5py.File, name: str, length: int, expected: Layout) -> dict[str, int | None]:
    """Where the bytes of each dataset begin, `None` if it has none; refuses what is not on the whitelist."""
    if len(file) != len(expected) or set(file) != set(expected):
        raise StoreError(f"{name} holds {', '.join(sorted(file))[:100]}; expected {', '.join(expected)}")
    if file.userblock_size or h5py.h5a.get_num_attrs(file.id):
        raise StoreError(f"{name} holds more than its datasets")
    offsets: dict[str, int | None] = {}
    taken = []
    for key, (shape, dtype) in expected.items():
        if not isinstance(file.get(key, getlink=True), h5py.HardLink) or file.get(key, getclass=True) != h5py.Dataset:
            raise StoreError(f"{name}: {key} is not a plain dataset of this file")
        dataset = file[key].id
        if file[key].shape != shape or not dataset.get_type().equal(h5py.h5t.py_create(dtype)):
            raise StoreError(f"{name}: {key} is {file[key].dtype} {file[key].shape}; expected {dtype} {shape}")
        if h5py.h5a.get_num_attrs(dataset):
            raise StoreError(f"{name}: {key} has attributes; expected none")
        properties = dataset.get_create_plist()
        if (
            properties.get_layout() != h5py.h5d.CONTIGUOUS
            or properties.get_nfilters()
            or properties.get_external_count()
        ):
            raise StoreError(f"{name}: {key} is compact, chunked, filtered, external or virtual; expected contiguous")
        nbytes = size({key: (shape, dtype)})
        offsets[key] = dataset.get_offset() if nbytes else None
        if nbytes and offsets[key] is None:
            raise StoreError(f"{name}: {key} was never written")
        if nbytes:
            taken.append((offsets[key], offsets[key] + nbytes, key))
    taken.sort()
    limits = [*(start for start, _, _ in taken), length][1:]
    for (_, end, key), limit in zip(taken, limits, strict=True):
        if end > limit:
            raise StoreError(f"{name}: {key} reaches into another dataset or beyond the end of the file")
    return offsets
