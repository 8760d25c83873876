"""A GPU computes what a CPU does, with the same bits again, and nobody waits for what is copied to it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from influence.errors import OptionError


def chosen(name: str) -> str:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        OptionError: It cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


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
