import contextlib

import pytest
import torch

from influence.devices import exact

backends = torch.backends


@contextlib.contextmanager
def older():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def newer(owner):
    before = owner.fp32_precision
    owner.fp32_precision = "tf32"
    try:
        yield
    finally:
        owner.fp32_precision = before


def state():
    return [backends.cudnn.deterministic, *(each.fp32_precision for each in OWNERS)]


NEW = hasattr(backends.cuda.matmul, "fp32_precision")
OWNERS = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv] if NEW else []


@pytest.mark.skipif(not NEW, reason="torch before 2.9 has one place for precisions")
@pytest.mark.parametrize("setting", ["none", "older", "matmul", "conv"])
def test_inside_float32_is_float32_however_the_caller_set_it_and_afterwards_all_is_as_it_was(setting):
    context = {
        "none": contextlib.nullcontext,
        "older": older,
        "matmul": lambda: newer(backends.cuda.matmul),
        "conv": lambda: newer(backends.cudnn.conv),
    }[setting]
    with context():
        before = state()
        with pytest.raises(ZeroDivisionError), exact():
            assert state() == [True, "ieee", "ieee", "ieee", "ieee"]
            assert torch.get_float32_matmul_precision() == "highest"
            _ = 1 / 0
        assert state() == before
        if setting == "older":
            assert torch.get_float32_matmul_precision() == "high"
