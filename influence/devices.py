"""A GPU computes what a CPU does, with the same bits again, and nobody waits for what is copied to it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Neither TF32 nor sums without an order, inside; settings are as before at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; a GPU copies it from pinned memory while it computes, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
