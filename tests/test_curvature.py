import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import damped_inverse_times

from influence import curvature
from influence.errors import OptionError


def rows(n, k, seed=0, decay=3):
    scales = 10.0 ** np.linspace(0, -decay, k)
    return (np.random.default_rng(seed).standard_normal((n, k)) * scales).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.sampled_from([1.0, 0.1, 0.01]), st.integers(0, 59), st.booleans())
def test_primal_and_dual_equal_a_dense_solve(n, k, damping, cut, weighted):
    psi, v = rows(n, k), rows(3, k, seed=1)
    w = np.random.default_rng(2).integers(1, 4, n).astype(float) if weighted else np.ones(n)
    blocks = [(psi[:cut], w[:cut]), (psi[cut:], w[cut:])]
    made = curvature.curvature(blocks, dim=k, damping=damping, num_rows=n)
    assert (made.psi is not None) == (n < k)
    found = curvature.solve(made, torch.from_numpy(v)).numpy()
    expected = damped_inverse_times(psi, w, damping, v)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


def test_many_rows_are_taken_in_blocks(monkeypatch):
    psi, v, w = rows(50, 8), rows(2, 8, seed=1), np.ones(50)
    whole = curvature.solve(curvature.curvature([(psi, w)], dim=8, damping=0.1, num_rows=50), torch.from_numpy(v))
    monkeypatch.setattr(curvature, "_BLOCK", 7)
    parts = curvature.solve(curvature.curvature([(psi, w)], dim=8, damping=0.1, num_rows=50), torch.from_numpy(v))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


def test_a_solve_of_many_columns_takes_them_in_blocks():
    g = np.random.default_rng(0)
    psi = g.standard_normal((300, 20_000)).astype(np.float32)
    made = curvature.curvature([(psi, np.ones(300))], dim=20_000, damping=1.0, num_rows=300)
    m = psi.astype(float) @ psi.T.astype(float) + made.rows * made.damping * np.eye(300)
    v = psi[:4].astype(float)
    expected = (v - np.linalg.solve(m, psi.astype(float) @ v.T).T @ psi.astype(float)) / made.damping @ psi.T
    found = curvature.solve(made, torch.from_numpy(psi[:4])).numpy() @ psi.T
    assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()  # 2e-5 with a solve that takes no blocks


def test_a_weight_of_two_equals_the_row_twice():
    psi, v = rows(9, 4), torch.from_numpy(rows(2, 4, seed=1))
    twice = np.concatenate([psi, psi[:1]])
    a = curvature.curvature([(psi, np.array([2.0] + [1.0] * 8))], dim=4, damping=0.1, num_rows=9)
    b = curvature.curvature([(twice, np.ones(10))], dim=4, damping=0.1, num_rows=10)
    torch.testing.assert_close(curvature.solve(a, v), curvature.solve(b, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_damping_must_be_a_positive_number(damping):
    with pytest.raises(OptionError, match="damping is"):
        curvature.curvature([(rows(9, 4), np.ones(9))], dim=4, damping=damping, num_rows=9)


def test_no_rows_and_zero_rows_are_refused():
    with pytest.raises(OptionError, match="no curvature rows"):
        curvature.curvature([], dim=4, damping=0.1, num_rows=0)
    with pytest.raises(OptionError, match="all curvature rows are zero"):
        curvature.curvature([(np.zeros((9, 4), np.float32), np.ones(9))], dim=4, damping=0.1, num_rows=9)


def test_a_kept_factor_serves_the_dual_again():
    psi, v = rows(5, 9), torch.from_numpy(rows(2, 9, seed=1))
    made = curvature.curvature([(psi, np.ones(5))], dim=9, damping=0.1, num_rows=5)
    again = curvature.Curvature(
        made.factor,
        made.damping,
        made.rows,
        made.unit,
        curvature.stack([(psi, np.ones(5))], rows=made.rows, damping=made.damping),
    )
    torch.testing.assert_close(curvature.solve(again, v), curvature.solve(made, v))


@pytest.mark.parametrize("weighted", [False, True])
def test_what_rows_of_the_dual_are_in_h_themselves_is_the_quadratic_form(weighted):
    psi = rows(7, 15)
    w = np.array([1.0, 2, 1, 3, 1, 1, 2]) if weighted else np.ones(7)
    made = curvature.curvature([(psi, w)], dim=15, damping=0.1, num_rows=7)
    expected = w * curvature.quadratic(made, torch.from_numpy(psi)).numpy() / made.rows
    np.testing.assert_allclose(curvature.own_parts(made).numpy(), expected, rtol=1e-4)
    assert curvature.own_parts(curvature.curvature([(psi, w)], dim=15, damping=0.1, num_rows=20)) is None


def test_the_dual_takes_its_columns_in_blocks(monkeypatch):
    psi, v, w = rows(5, 50), torch.from_numpy(rows(2, 50, seed=1)), np.ones(5)
    made = curvature.curvature([(psi, w)], dim=50, damping=0.1, num_rows=5)
    whole = curvature.solve(made, v), curvature.quadratic(made, v)
    monkeypatch.setattr(curvature, "_BLOCK", 7)
    made = curvature.curvature([(psi, w)], dim=50, damping=0.1, num_rows=5)
    torch.testing.assert_close((curvature.solve(made, v), curvature.quadratic(made, v)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("damping", [0.1, 0.001])
def test_few_rows_that_have_much_in_common_are_solved_for_as_exactly_as_many(damping, kept):
    g = np.random.default_rng(0)
    psi = (g.standard_normal((40, 1000)) + 3 * g.standard_normal(1000)).astype(np.float32)
    made = curvature.curvature([(psi, np.ones(40))], dim=1000, damping=damping, num_rows=40)
    if kept:
        again = curvature.stack([(psi, np.ones(40))], rows=made.rows, damping=made.damping)
        made = curvature.Curvature(made.factor, made.damping, made.rows, made.unit, again)
    expected = damped_inverse_times(psi, np.ones(40), damping, psi[:3]) @ psi.T
    found = curvature.solve(made, torch.from_numpy(psi[:3])).numpy() @ psi.T
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()  # float32 has 1e-4 and 1e-2
