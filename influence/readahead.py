"""Read-ahead: the next block of a scan is read from the disk while the caller works on this one."""

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_B = TypeVar("_B")


def ahead(blocks: Iterable[_B], arrays: Callable[[_B], Iterable[np.ndarray]]) -> Iterator[_B]:
    """The same blocks in the same order; a thread takes the next one, and only that, while the caller has this one.

    What taking a block raises is raised where the block would have come. The thread is gone when the iterator is
    exhausted, raises or is closed.

    Args:
        blocks: What is taken block by block: for those of a store, opened, and hashed at their first use.
        arrays: The arrays of a block that the caller is going to read; the thread reads their pages first.
    """
    source = iter(blocks)

    def take() -> tuple[_B, ...]:
        for block in source:
            for array in arrays(block):
                _fault(array)
            return (block,)
        return ()

    with ThreadPoolExecutor(1, "readahead") as thread:
        coming = thread.submit(take)
        while taken := coming.result():
            coming = thread.submit(take)
            yield from taken


def _fault(array: np.ndarray) -> None:
    """Read one byte of every page of a contiguous array: the rest of the page comes with it; numpy frees the GIL."""
    np.bitwise_or.reduce(array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE])
