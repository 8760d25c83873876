"""How much memory work takes, measured, and how many rows of a batch fit in a budget."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from influence.errors import OptionError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(iB|B)?")
_POWERS = {letter: power for power, letter in enumerate("KMGT", 1)}
_SHARE = 0.9  # of a budget that is planned with: a measured line is not exact
_TRIED = (1, 4, 16)  # rows of the batches that are measured


def parse_size(text: str) -> int:
    """Read bytes: `8GiB` and `8G` are 8 · 2³⁰, `8GB` is 8 · 10⁹.

    Raises:
        OptionError: It is something else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise OptionError(f"memory is {text!r}; expected a size such as 8GiB or 500MB")
    return int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** _POWERS[match[2]])


def format_size(count: int) -> str:
    """Bytes for a person, in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that are held at the highest while `work` runs: on the device, or in this process if that is the CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(OSError):  # only Linux can forget an earlier peak; elsewhere it is counted in
        Path("/proc/self/clear_refs").write_text("5")
    work()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows_within(budget: int, cost: Callable[[int], int], most: int) -> int:
    """The largest batch that fits: a line, bytes = a + b · rows, through the last two of three small batches.

    Args:
        budget: Bytes.
        cost: Runs a batch of so many rows, of none as well, and says how many bytes were held at the highest.
        most: Rows beyond which a batch is no faster.

    Raises:
        OptionError: Not one row fits.
    """
    cost(1)  # what is loaded and kept at a first use belongs to all batches
    fewer, before, fitting = 0, cost(0), most
    for rows in _TRIED:
        if rows > min(fitting, most):
            break
        held = cost(rows)
        slope = max((held - before) / (rows - fewer), 1.0)
        fitting = int(rows + (_SHARE * budget - held) // slope)
        fewer, before = rows, held
    if fitting < 1:
        raise OptionError(
            f"memory is {format_size(budget)} for a process, and one with one row in a batch takes "
            f"{format_size(held)}; give more, or take a smaller --resolution"
        )
    return min(fitting, most)
