import hashlib
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_countsketch, dense_rademacher, project

import influence
from influence import keys
from influence import projection as projections
from influence.errors import OptionError
from influence.projection import PROJECTIONS, countsketch, identity, rademacher

CPU = torch.device("cpu")
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "conv": (3, 2, 3, 3), "big": (40, 11)}
TOTAL = 35 + 7 + 54 + 440


def rows(n, p, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, p), dtype=np.float32))


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 1000])
def test_countsketch_equals_its_dense_matrix(dim):
    grads = rows(3, TOTAL)
    found = project(countsketch(SHAPES, dim=dim, seed=4, device=CPU), SHAPES, grads)
    expected = grads.double().numpy() @ dense_countsketch(SHAPES, dim, 4).T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("entries", [1, 1 << 24])
@pytest.mark.parametrize("dim", [1, 2, 16, 64, 1000])
def test_the_gather_of_accelerators_equals_the_slices_of_the_cpu(dim, entries, monkeypatch):
    monkeypatch.setattr(projections, "_GATHER_ENTRIES", entries)
    grads = rows(3, 440)
    signs = torch.from_numpy(np.random.default_rng(1).choice([-1, 1], 440).astype(np.int8))
    offsets = torch.from_numpy(np.random.default_rng(2).integers(0, dim, -(-440 // dim)))
    by_slices, by_gather = torch.zeros(3, dim), torch.zeros(3, dim)
    projections._add_slices(by_slices, grads, signs, offsets, 0.7)
    projections._add_gathered(by_gather, grads, signs, offsets, 0.7)
    torch.testing.assert_close(by_gather, by_slices, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_scale_multiplies_the_gradient_of_its_parameter(name):
    dim = TOTAL if name == "identity" else 24
    scales = {parameter: 0.5 + i for i, parameter in enumerate(SHAPES)}
    plain, scaled = (PROJECTIONS[name](SHAPES, dim=dim, seed=4, device=CPU, scales=s) for s in (None, scales))
    grads, start, by_hand = rows(3, TOTAL), 0, []
    for parameter, shape in SHAPES.items():
        stop = start + math.prod(shape)
        by_hand.append(grads[:, start:stop] * scales[parameter])
        start = stop
    expected = project(plain, SHAPES, torch.cat(by_hand, 1))
    torch.testing.assert_close(project(scaled, SHAPES, grads), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_rademacher_equals_its_dense_matrix(cache, monkeypatch):
    monkeypatch.setattr(projections, "_CACHE_BYTES", cache)
    grads = rows(3, TOTAL)
    made = rademacher(SHAPES, dim=24, seed=4, device=CPU)
    expected = grads.double().numpy() @ dense_rademacher(SHAPES, 24, 4).T
    for _ in range(2):  # the second time from what was kept
        np.testing.assert_allclose(project(made, SHAPES, grads).numpy(), expected, atol=1e-4)


def test_identity_keeps_the_gradient_in_order():
    grads = rows(3, TOTAL)
    torch.testing.assert_close(project(identity(SHAPES, dim=TOTAL, seed=0, device=CPU), SHAPES, grads), grads)
    with pytest.raises(OptionError, match="dim is 10, but the identity projection of these parameters has 536"):
        identity(SHAPES, dim=10, seed=0, device=CPU)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_linear_and_treat_rows_apart(name):
    made = PROJECTIONS[name](SHAPES, dim=TOTAL, seed=0, device=CPU)
    grads = rows(4, TOTAL)
    together = project(made, SHAPES, grads)
    for i in range(4):
        torch.testing.assert_close(project(made, SHAPES, grads[i : i + 1]), together[i : i + 1])
    torch.testing.assert_close(
        project(made, SHAPES, 2 * grads[:2] - grads[2:]), 2 * together[:2] - together[2:], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["countsketch", "rademacher"])
@pytest.mark.parametrize("kind", ["gaussian", "one-hot", "one huge coordinate", "constant", "two blocks"])
def test_squared_norms_are_unbiased_within_standard_errors_and_the_variance_is_bounded(name, kind):
    p, k, seeds = 300, 32, 400
    g = {
        "gaussian": rows(1, p)[0],
        "one-hot": torch.eye(p)[7],
        "one huge coordinate": rows(1, p)[0] + 1000 * torch.eye(p)[123],
        "constant": torch.ones(p),
        "two blocks": torch.cat([torch.ones(k), torch.zeros(k), torch.ones(k), torch.zeros(p - 3 * k)]),
    }[kind]
    g = g / g.norm()
    shapes = {"w": (p,)}
    norms = torch.stack(
        [
            project(PROJECTIONS[name](shapes, dim=k, seed=s, device=CPU), shapes, g[None])[0].square().sum()
            for s in range(seeds)
        ]
    )
    error = norms.std() / seeds**0.5
    assert (norms.mean() - 1).abs() <= 5 * error + 1e-5, "a factor p/k or √k indicates the wrong scale"
    # Var‖Pg‖² ≤ 2/k; the fourth moment of a variance estimate allows a wide factor
    assert norms.var() <= 2 * (2 / k)


@pytest.mark.parametrize("name", ["countsketch", "rademacher"])
def test_inner_products_are_unbiased_within_standard_errors(name):
    p, k, seeds = 200, 24, 400
    pair = rows(2, p)
    pair = pair / pair.norm(dim=1, keepdim=True)
    shapes = {"a": (50,), "b": (150,)}
    dots = []
    for seed in range(seeds):
        a, b = project(PROJECTIONS[name](shapes, dim=k, seed=seed, device=CPU), shapes, pair)
        dots.append(float(a @ b))
    error = np.std(dots) / seeds**0.5
    assert abs(np.mean(dots) - float(pair[0] @ pair[1])) < 5 * error


@pytest.mark.parametrize("name", ["countsketch", "rademacher"])
def test_another_parameter_leaves_this_ones_part_alone(name):
    grads = rows(2, 54)
    outs = []
    for shapes in ({"conv": (3, 2, 3, 3)}, {"new": (9,), "conv": (3, 2, 3, 3)}):
        out = torch.zeros(2, 16)
        PROJECTIONS[name](shapes, dim=16, seed=0, device=CPU).add(out, "conv", grads)
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shape": (54,)}, {"name": "other"}])
@pytest.mark.parametrize("name", ["countsketch", "rademacher"])
def test_seed_name_and_shape_are_all_in_the_key(name, change):
    def of(seed=0, shape=(3, 2, 3, 3), name_="conv"):
        out = torch.zeros(2, 16)
        PROJECTIONS[name]({name_: shape}, dim=16, seed=seed, device=CPU).add(out, name_, rows(2, 54))
        return out

    changed = {("name_" if key == "name" else key): value for key, value in change.items()}
    assert not torch.equal(of(), of(**changed))


def integers_of(name):
    """A digest of P itself, as integers: P · 1-hot rows, scaled back."""
    shapes = {"unet.conv_in.weight": (5, 3, 3, 3), "unet.conv_in.bias": (5,)}
    made = PROJECTIONS[name](shapes, dim=16, seed=7, device=CPU)
    dense = project(made, shapes, torch.eye(140)) * (4.0 if name == "rademacher" else 1.0)
    return hashlib.sha256(dense.round().to(torch.int8).numpy().tobytes()).hexdigest()[:16]


GOLDEN = {"countsketch": "98f0047125176fa8", "rademacher": "8c36ae9e5ce93cd0"}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors_have_not_moved(name):
    assert integers_of(name) == GOLDEN[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GOLDEN)
def test_a_gpu_uses_the_integers_of_the_cpu(name):
    grads = rows(3, TOTAL)
    found = {}
    for device in ("cpu", "cuda"):
        made = PROJECTIONS[name](SHAPES, dim=64, seed=0, device=torch.device(device))
        out = torch.zeros(3, 64, device=device)
        start = 0
        for parameter, shape in SHAPES.items():
            size = int(np.prod(shape))
            made.add(out, parameter, grads[:, start : start + size].to(device))
            start += size
        found[device] = out.cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "size"), [(64, 5000), (700, 10), (513, 1537), (2048, 70_000)])
def test_every_form_of_the_sketch_gives_the_same_on_a_gpu(k, size):
    from influence import triton_sketch

    signs = torch.from_numpy(keys.signs(("signs", size), size)).cuda()
    offsets = torch.from_numpy(keys.integers(("offsets", size), -(-size // k), k))
    grads = rows(6, 2 * size).cuda()[::2, :size]  # rows that do not lie one after the other
    sums = []
    for form in (triton_sketch.add_blocks, projections._add_gathered, projections._add_slices):
        out = torch.ones(3, 2 * k, device="cuda")
        form(out[:, k:], grads, signs, offsets.cpu() if form is projections._add_slices else offsets.cuda(), 0.7)
        assert (out[:, :k] == 1).all()
        sums.append(out[:, k:])
    torch.testing.assert_close(sums[0], sums[2], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[1], sums[2], rtol=1e-5, atol=1e-4)


FAILURES = [
    RuntimeError("Failed to find C compiler"),
    FileNotFoundError("[Errno 2] No such file or directory: 'cc'"),
    subprocess.CalledProcessError(1, ["cc", "main.c"]),
    subprocess.TimeoutExpired(["cc", "main.c"], 60),
    AssertionError("a PTXASError, in place of triton's own"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_where_triton_cannot_compile_the_sketch_gathers_and_says_so(failure, monkeypatch):
    def fail(*_):
        raise failure

    fake = types.SimpleNamespace(add_blocks=fail)
    monkeypatch.setitem(sys.modules, "influence.triton_sketch", fake)
    monkeypatch.setattr(influence, "triton_sketch", fake, raising=False)
    monkeypatch.setitem(sys.modules, "triton.errors", types.SimpleNamespace(TritonError=AssertionError))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace())
    monkeypatch.setattr(projections, "find_spec", lambda _: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))  # as if there were a GPU
    with pytest.warns(UserWarning, match="triton cannot compile here, so the sketch is slower: "):
        assert projections._block_adder(torch.device("cuda")) is projections._add_gathered


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), st.integers(0, 3))
def test_every_entry_falls_into_exactly_one_bucket_with_a_sign(dim, size, seed):
    shapes = {"w": (size,)}
    dense = project(countsketch(shapes, dim=dim, seed=seed, device=CPU), shapes, torch.eye(size))
    assert ((dense != 0).sum(1) == 1).all()
    assert (dense.abs().sum(1) == 1).all()
