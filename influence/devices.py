"""A GPU computes what a CPU does, with the same bits again, and nobody waits for what is copied to it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
    """Neither TF32 nor sums without an order, inside; settings are as before at the end.

    From 2.9 on torch keeps precisions in two places, and refuses to read the older one where they say different things.
    """
    backends = torch.backends
    kept: list[tuple[Any, str]] = [(backends.cudnn, "deterministic")]
    if newer := hasattr(backends.cuda.matmul, "fp32_precision"):
        convolutions = [(backends.cudnn.conv, "fp32_precision"), (backends.mkldnn.conv, "fp32_precision")]
        kept += [(backends.cuda.matmul, "fp32_precision"), (backends.mkldnn.matmul, "fp32_precision"), *convolutions]
    else:
        convolutions = [(backends.cudnn, "allow_tf32")]
        kept += convolutions
    before = [getattr(owner, name) for owner, name in kept]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"  # they differ: whoever set the newer one left this as it is at first
    try:
        backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("highest")
        for owner, name in convolutions:
            setattr(owner, name, "ieee" if newer else False)
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for (owner, name), value in zip(kept, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def passes(device: torch.device, bf16: bool) -> Iterator[None]:
    """Forward and backward passes inside are in bfloat16 autocast if `bf16` says so, else as they are.

    On a CPU two functions stay in float32: the normalisation of layers, as on a GPU, since `vmap` cannot take its
    gradient otherwise, and attention of few positions, whose backward is slower in bfloat16 (`_FEW`).
    """
    widened = _Float32() if bf16 and device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), widened:
        yield


_FEW = 256
"""Positions of a query up to which the backward of attention is 1.3 to 8 times slower in bfloat16, with AVX-512 BF16;
with 512 both are alike, with 1024 bfloat16 is 1.3 times faster."""


class _Float32(TorchFunctionMode):
    """Some functions are computed in float32 inside, and their results given back in the dtype that went in."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Of these two; all else is left as it is."""
        kwargs = kwargs or {}
        if func not in (F.scaled_dot_product_attention, F.layer_norm):
            return func(*args, **kwargs)
        first = next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
        if func is F.scaled_dot_product_attention and first.shape[-2] > _FEW:
            return func(*args, **kwargs)
        wide = {name: _float32(given) for name, given in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float32, args), **wide).to(first.dtype)


def _float32(given: Any) -> Any:
    return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; a GPU copies it from pinned memory while it computes, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
