"""One shard of features as an HDF5 file: written once, validated against a whitelist before anything is believed.

An HDF5 file is native-code input. The caller checks the file's hash first; this module then accepts exactly the
expected datasets, plain types, contiguous, inside the file.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from influence.errors import StoreError

FAMILIES = ("loss", "square")


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
    """Curvature rows, float32 `[rows, k]`."""
    psi_item: np.ndarray
    """Index of the item of each row, int32."""
    psi_draw: np.ndarray
    """Draw of each row, int32."""
    refused: dict[str, str] = field(default_factory=dict)
    """Images of this shard that have no features, and why."""


def layout(items: int, rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every dataset of a shard."""
    return {
        "phi": ((items, dim), np.dtype("<f4")),
        "loss": ((items,), np.dtype("<f4")),
        "item_id": ((items,), np.dtype("S32")),
        "psi": ((rows, dim), np.dtype("<f4")),
        "psi_item": ((rows,), np.dtype("<i4")),
        "psi_draw": ((rows,), np.dtype("<i4")),
    }


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


def write(path: Path, datasets: Mapping[str, np.ndarray]) -> None:
    """Write a new file: contiguous, without times, so that equal content gives equal bytes."""
    with h5py.File(path, "w", libver=("earliest", "v108"), locking=False, track_order=False) as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array, track_times=False)


def read(path: Path, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """Map the datasets of a shard, read-only.

    Args:
        path: The file; its hash has been checked.
        expected: What `layout` says of it.

    Raises:
        StoreError: The file holds anything else than what is expected, or holds it in another way.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            extents = _extents(file, path, expected)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path.name} is not a readable HDF5 file: {str(error).splitlines()[0]}") from None
    found = {}
    for name, (offset, (shape, dtype)) in extents.items():
        if offset is None:
            found[name] = np.empty(shape, dtype)
        else:
            found[name] = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    return found


def _extents(
    file: h5py.File, path: Path, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> dict[str, tuple[int | None, tuple[tuple[int, ...], np.dtype]]]:
    """Where the bytes of each dataset lie; refuses what is not on the whitelist."""
    if sorted(file.keys()) != sorted(expected):
        raise StoreError(f"{path.name} holds {', '.join(sorted(file.keys()))[:100]}; expected {', '.join(expected)}")
    size = path.stat().st_size
    extents = {}
    for name, (shape, dtype) in expected.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or file.get(name, getclass=True) != h5py.Dataset:
            raise StoreError(f"{path.name}: {name} is not a plain dataset of this file")
        dataset = file[name]
        if dataset.shape != shape or dataset.dtype != dtype:
            raise StoreError(f"{path.name}: {name} is {dataset.dtype} {dataset.shape}; expected {dtype} {shape}")
        properties = dataset.id.get_create_plist()
        if (
            properties.get_layout() != h5py.h5d.CONTIGUOUS
            or properties.get_nfilters()
            or properties.get_external_count()
            or dataset.is_virtual
        ):
            raise StoreError(f"{path.name}: {name} is chunked, filtered, external or virtual; expected contiguous")
        offset = dataset.id.get_offset()
        if dataset.nbytes and (offset is None or offset + dataset.nbytes > size):
            raise StoreError(f"{path.name}: {name} reaches beyond the end of the file")
        extents[name] = (offset if dataset.nbytes else None, (shape, dtype))
    return extents


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
