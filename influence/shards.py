"""One shard of features as an HDF5 file: written once, validated against a whitelist before anything is believed.

An HDF5 file is native-code input. The caller checks the file's hash first; this module then accepts exactly the
expected datasets: plain types, contiguous, inside the file, apart from each other, and nothing else. The library works
in memory when it writes, so that a full disk is an ordinary error of an ordinary write and never HDF5's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from influence.errors import StoreError

FAMILIES = ("loss", "square")

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of each dataset."""

_OVERHEAD = 1 << 16  # HDF5's own share of a file; 2.9 kB as written


@dataclass(frozen=True)
class ShardContent:
    """Features of the images of one shard. Items and rows are in the order of `item_ids`."""

    family: str
    """What was differentiated: `loss` or `square`."""
    shard: int
    item_ids: list[str]
    phi: np.ndarray
    """φ, float32 `[items, k]`."""
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


def layout(items: int, rows: int, dim: int) -> Layout:
    """Shape and type of every dataset of a shard."""
    return {
        "phi": ((items, dim), np.dtype("<f4")),
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
        "loss": content.loss,
        "item_id": np.array([item_id.encode("ascii") for item_id in content.item_ids], dtype="S32"),
        "psi": content.psi,
        "psi_item": content.psi_item,
        "psi_draw": content.psi_draw,
    }


def encode(datasets: Mapping[str, np.ndarray]) -> bytes:
    """Make the bytes of a file: contiguous, without times, so that equal content gives equal bytes."""
    bounds = ("earliest", "v108")  # what every HDF5 since 2008 can read
    with h5py.File("memory", "w", driver="core", backing_store=False, libver=bounds, track_order=False) as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array, track_times=False)
        file.flush()
        return file.id.get_file_image()


def read(path: Path, expected: Layout) -> dict[str, np.ndarray]:
    """Map the datasets of a shard, read-only.

    Args:
        path: The file; its hash has been checked.
        expected: What `layout` says of it.

    Raises:
        StoreError: The file holds anything else than what is expected, or holds it in another way.
    """
    total, length = size(expected), path.stat().st_size
    if not total <= length <= total + _OVERHEAD:
        raise StoreError(f"{path.name} is {length} bytes; its datasets are {total}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            offsets = _offsets(file, path.name, length, expected)
    except StoreError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path.name} is not a readable HDF5 file: {str(error).splitlines()[0]}") from None
    found = {}
    for name, (shape, dtype) in expected.items():
        if offsets[name] is None:
            found[name] = np.empty(shape, dtype)
            found[name].flags.writeable = False
        else:
            mapped = np.memmap(path, dtype=dtype, mode="r", offset=offsets[name], shape=shape)
            found[name] = mapped.view(np.ndarray)
    return found


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
    ends = [start for start, _, _ in taken[1:]] + [length]
    for (_, end, key), limit in zip(taken, ends, strict=True):
        if end > limit:
            raise StoreError(f"{name}: {key} reaches into another dataset or beyond the end of the file")
    return offsets
