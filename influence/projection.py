"""Random projections g ↦ P W g with E[PᵀP] = I, applied parameter by parameter, so that no gradient is held whole.

P is keyed by (seed, parameter name, shape): adding or removing another parameter leaves a parameter's part of P as it
was. All integers are made on the host by `keys`, so a CPU and a GPU use the same P. W is one number for each parameter
tensor, 1 unless `scales` says otherwise: the metric that gradients are compared in (`horizon.py`).
"""

import math
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from influence import keys
from influence.errors import OptionError

Shapes = Mapping[str, tuple[int, ...]]
Scales = Mapping[str, float] | None


@dataclass(frozen=True)
class Projection:
    """One P: rows of gradients go in, one parameter at a time, and are added to the rows of features."""

    dim: int
    """k, the number of entries of a feature."""
    add: Callable[[Float[Tensor, "rows k"], str, Float[Tensor, "rows p"]], None]
    """`add(out, name, grads)`: out += grads · (P_name W_name)ᵀ, in place."""


def _scale(scales: Scales, name: str) -> float:
    return 1.0 if scales is None else scales[name]


def countsketch(shapes: Shapes, *, dim: int, seed: int, device: torch.device, scales: Scales = None) -> Projection:
    """CountSketch (Charikar et al., 2002) with shifted blocks: (P g)_c = Σ_{j: h(j) = c} s_j g_j.

    Entry j of a parameter lies in block b = ⌊j / k⌋ and falls into the bucket h(j) = (j + o_b) mod k, with a random
    offset o_b for each block and a random sign s_j for each entry. Unlike a free hash, a block fills every bucket once.
    Two entries still meet with probability at most 1/k and with independent signs, so P is unbiased and
    Var‖P g‖² ≤ 2/k · ‖g‖⁴ as with a free hash; and a block is two contiguous slices: no index table, no atomics.

    Args:
        shapes: Shape of each parameter, by name.
        dim: k.
        seed: Key of P.
        device: Where gradients will be.
        scales: W, by name.
    """
    add_blocks = _block_adder(device)
    tables = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        key = (seed, name, repr(tuple(shape)))
        signs = torch.from_numpy(keys.signs(("countsketch-signs", *key), size)).to(device)
        offsets = torch.from_numpy(keys.integers(("countsketch-offsets", *key, dim), -(-size // dim), dim))
        tables[name] = signs, offsets if device.type == "cpu" else offsets.to(device)

    def add(out: Tensor, name: str, grads: Tensor) -> None:
        add_blocks(out, grads, *tables[name], _scale(scales, name))

    return Projection(dim, add)


def _block_adder(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], None]:
    """The fastest of three forms of the same sum that the device has."""
    if device.type == "cpu":
        return _add_slices
    if device.type != "cuda" or find_spec("triton") is None:
        return _add_gathered
    from triton.errors import TritonError

    from influence import triton_sketch  # a CPU build of torch comes without triton

    one = torch.zeros(1, 1, device=device)
    try:
        triton_sketch.add_blocks(one, one, one.char(), one[0].long(), 1.0)
    # A C compiler that is absent is a RuntimeError, one that fails or cannot be started is one of subprocess or of the
    # operating system, and a GPU that triton's own assembler does not know is one of triton's.
    except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:
        warnings.warn(f"triton cannot compile here, so the sketch is slower: {error}", stacklevel=3)
        return _add_gathered
    return triton_sketch.add_blocks


def _add_slices(out: Tensor, grads: Tensor, signs: Tensor, offsets: Tensor, scale: float) -> None:
    """Add block by block, each as two slices: the cheapest on a CPU, where a gather costs more than the arithmetic."""
    k, size = out.shape[1], grads.shape[1]
    signs = signs.to(grads.dtype)  # once: `addcmul_` would do it for each slice
    for start, offset in zip(range(0, size, k), offsets.tolist(), strict=True):
        stop = min(start + k, size)
        split = min(start + k - offset, stop)  # first entry that wraps to bucket 0
        out[:, offset : offset + split - start].addcmul_(grads[:, start:split], signs[start:split], value=scale)
        if split < stop:
            out[:, : stop - split].addcmul_(grads[:, split:stop], signs[split:stop], value=scale)


_GATHER_ENTRIES = 1 << 24


def _add_gathered(out: Tensor, grads: Tensor, signs: Tensor, offsets: Tensor, scale: float) -> None:
    """Add many blocks at once: every bucket reads its entry of each block; deterministic, for there are no atomics."""
    (rows, k), size = out.shape, grads.shape[1]
    step = max(1, _GATHER_ENTRIES // (rows * k))  # blocks at a time, to bound memory
    buckets = torch.arange(k, device=out.device)
    for first in range(0, len(offsets), step):
        shift = offsets[first : first + step, None]
        index = (buckets - shift) % k + (torch.arange(len(shift), device=out.device)[:, None] + first) * k
        inside = index < size
        index = index.clamp(max=size - 1)
        signed = grads[:, index] * (signs[index] * inside)  # [rows, blocks, k]
        out.add_(signed.sum(1), alpha=scale)


_BLOCK = 256
_CACHE_BYTES = 1 << 30


def rademacher(shapes: Shapes, *, dim: int, seed: int, device: torch.device, scales: Scales = None) -> Projection:
    """Dense P with independent entries ±1/√k (Achlioptas, 2003), made in blocks of 256 columns.

    Costs 2·p·k operations a row: for adapters, and as the plain standard that the sketch is compared with. The signs
    are kept when they fit in 1 GiB, else made again for every batch.
    """
    keep = dim * sum(math.prod(shape) for shape in shapes.values()) <= _CACHE_BYTES
    kept: dict[tuple[str, int], Tensor] = {}

    def block(name: str, start: int) -> Tensor:
        width = min(_BLOCK, math.prod(shapes[name]) - start)
        key = ("rademacher", seed, name, repr(tuple(shapes[name])), dim, start)
        return torch.from_numpy(keys.signs(key, width * dim)).reshape(width, dim).to(device)

    def add(out: Tensor, name: str, grads: Tensor) -> None:
        for start in range(0, grads.shape[1], _BLOCK):
            signs = kept.get((name, start))
            if signs is None:
                signs = block(name, start)
                if keep:
                    kept[name, start] = signs
            out.addmm_(grads[:, start : start + _BLOCK], signs.to(out.dtype), alpha=_scale(scales, name) * dim**-0.5)

    return Projection(dim, add)


def identity(shapes: Shapes, *, dim: int, seed: int, device: torch.device, scales: Scales = None) -> Projection:
    """P = I: the gradient itself, parameters one after the other in the order of `shapes`; `seed` plays no part.

    Raises:
        OptionError: `dim` is not the number of parameter entries.
    """
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += math.prod(shape)
    if dim != total:
        raise OptionError(f"dim is {dim}, but the identity projection of these parameters has {total} entries")

    def add(out: Tensor, name: str, grads: Tensor) -> None:
        out[:, starts[name] : starts[name] + grads.shape[1]].add_(grads, alpha=_scale(scales, name))

    return Projection(dim, add)


PROJECTIONS: dict[str, Callable[..., Projection]] = {
    "countsketch": countsketch,
    "rademacher": rademacher,
    "identity": identity,
}
