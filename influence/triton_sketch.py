"""CountSketch as one kernel for a GPU: every gradient is read once, and no bucket is written by two."""

from typing import no_type_check

import torch
import triton
from torch import Tensor
from triton import language as tl

_TILE = 512


@triton.jit
@no_type_check  # a check around it would be compiled
def _add(out, grads, signs, offsets, scale, size, k, blocks, out_stride, grads_stride, TILE: tl.constexpr):
    """out[r, c] += scale · Σ_b signs[j] · grads[r, j] with j = b k + (c − offsets[b]) mod k, for a tile of c."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for b in range(blocks):
        shifted = c - tl.load(offsets + b).to(tl.int32)
        j = tl.where(shifted < 0, shifted + k, shifted) + b * k
        inside = (c < k) & (j < size)
        total += tl.load(signs + j, inside, 0).to(tl.float32) * tl.load(grads + row * grads_stride + j, inside, 0.0)
    place = out + row * out_stride + c
    tl.store(place, tl.load(place, c < k) + scale * total, c < k)


def add_blocks(out: Tensor, grads: Tensor, signs: Tensor, offsets: Tensor, scale: float) -> None:
    """Add scale · grads · Pᵀ to out, in place: float32 rows on a GPU; `projection` has the other forms."""
    (rows, k), size = out.shape, grads.shape[1]
    grads = grads if grads.stride(1) == 1 else grads.contiguous()
    with torch.cuda.device(out.device):
        _add[rows, triton.cdiv(k, _TILE)](
            out, grads, signs, offsets, scale, size, k, len(offsets), out.stride(0), grads.stride(0), TILE=_TILE
        )
