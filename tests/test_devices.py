import contextlib

import pytest
import torch
from torch.nn import functional as F

from influence.devices import exact, passes

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


def attention_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 4, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_bf16_attention_on_a_cpu_is_that_of_float32_rounded_and_so_is_its_backward(mask):
    q, k, v = attention_inputs()
    bias = {None: None, "bool": torch.ones(8, 8).tril().bool(), "float": torch.ones(8, 8).bfloat16()}[mask]
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, bias.float() if mask == "float" else bias)
    with passes(torch.device("cpu"), bf16=True):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        by_place = F.scaled_dot_product_attention(q, k, v, bias, 0.0, False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(found, by_place)
    cotangent = torch.ones_like(found)
    grads = torch.autograd.grad(found, (q, k, v), cotangent)
    for grad, right in zip(grads, torch.autograd.grad(expected, wide, cotangent.float()), strict=True):
        assert torch.equal(grad, right.bfloat16())


@pytest.mark.parametrize(("positions", "wide"), [(256, True), (257, False)])
def test_attention_of_many_positions_is_left_in_bf16(positions, wide):
    q = attention_inputs()[0].detach().repeat(1, 1, positions, 1)[:, :, :positions]
    with passes(torch.device("cpu"), bf16=True):
        found = F.scaled_dot_product_attention(q, q, q)
    rounded = F.scaled_dot_product_attention(*[q.float()] * 3).bfloat16()
    as_it_is = F.scaled_dot_product_attention(q, q, q)
    assert found.dtype == torch.bfloat16 and not torch.equal(rounded, as_it_is)
    assert torch.equal(found, rounded if wide else as_it_is)


def test_without_bf16_nothing_is_cast_and_products_are_in_bf16_with_it():
    a = torch.ones(2, 2)
    with passes(torch.device("cpu"), bf16=False):
        assert (a @ a).dtype == torch.float32
    with passes(torch.device("cpu"), bf16=True):
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).dtype == torch.float32
