import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped_inverse_times

from influence import curvature, scoring
from influence.errors import OptionError
from influence.scoring import METHODS

N, K, Q = 30, 12, 4


def features(seed, n):
    return np.random.default_rng(seed).standard_normal((n, K)).astype(np.float32)


PHI, PSI, PHI_Q = features(0, N), features(1, 80), features(2, Q)
IDS = [f"{i:032x}" for i in range(N)]


def two_points(rows):
    return np.concatenate([rows, 2 * rows[:, ::-1]], axis=1)


def solver_of(method, phi=PHI):
    if not method.curvature:
        return None
    source = PSI if method.curvature == "psi" else phi
    return curvature.curvature([(source, np.ones(len(source)))], dim=K, damping=0.1, num_rows=len(source))


def scored(name, phi=PHI, ids=IDS, block=7, phi_q=PHI_Q):
    method = METHODS[name]
    solver = solver_of(method, phi)
    if method.beside is not None:
        phi, phi_q = two_points(phi), two_points(phi_q)
    v = scoring.precondition(method, torch.from_numpy(phi_q), solver, float(len(phi)))
    blocks = [(ids[i : i + block], phi[i : i + block]) for i in range(0, len(phi), block)]
    return np.concatenate([tau for _, tau in scoring.scores(method, v, blocks)], axis=1)


def oracle(name):
    if name in ("gauss-newton", "path"):  # what differs are the features
        return damped_inverse_times(PSI, np.ones(80), 0.1, PHI_Q) @ PHI.T / N
    if name == "two-length":
        end = damped_inverse_times(PSI, np.ones(80), 0.1, PHI_Q) @ PHI.T / N
        return end + damped_inverse_times(PSI, np.ones(80), 0.1, 2 * PHI_Q[:, ::-1]) @ (2 * PHI[:, ::-1]).T / N
    if name == "two-point":
        end = damped_inverse_times(PSI, np.ones(80), 0.1, PHI_Q) @ PHI.T / N
        lam = 0.1 * np.trace(PSI.T.astype(float) @ PSI / 80) / K
        twice = damped_inverse_times(PSI, np.ones(80), 0.1, 2 * PHI_Q[:, ::-1])
        twice = damped_inverse_times(PSI, np.ones(80), 0.1, twice)
        return end + lam * twice @ (2 * PHI[:, ::-1]).T / N
    if name in ("trak", "d-trak"):
        gram = PHI.T.astype(float) @ PHI
        lam = 0.1 * np.trace(gram) / K
        return PHI_Q @ np.linalg.inv(gram + lam * np.eye(K)) @ PHI.T
    dots = PHI_Q.astype(float) @ PHI.T
    if name == "grad-cos":
        return dots / np.linalg.norm(PHI_Q, axis=1)[:, None] / np.linalg.norm(PHI, axis=1)
    return dots


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_its_formula_written_out(name):
    found = scored(name)
    assert found.shape == (Q, N)
    np.testing.assert_allclose(found, oracle(name), rtol=1e-4, atol=1e-5 * np.abs(oracle(name)).max())


@pytest.mark.parametrize("name", METHODS)
def test_scores_follow_a_permutation_of_the_training_set_and_of_the_queries(name):
    order, turn = np.random.default_rng(5).permutation(N), np.array([2, 0, 3, 1])
    permuted = scored(name, PHI[order], [IDS[i] for i in order], phi_q=PHI_Q[turn])
    np.testing.assert_allclose(permuted, scored(name)[turn][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_blocks_changes_nothing(name):
    np.testing.assert_allclose(scored(name, block=1), scored(name, block=N), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_what_an_image_does_for_itself_is_its_score_as_a_query(name):
    method = METHODS[name]
    rows = torch.from_numpy(PHI if method.beside is None else two_points(PHI))
    found = scoring.own(method, rows, solver_of(method), float(N)).numpy()
    np.testing.assert_allclose(found, np.diag(scored(name, phi_q=PHI)), rtol=1e-4)
    assert (found > 0).all()


def test_a_relative_score_is_blind_to_the_length_of_the_image_and_nothing_for_an_image_without_gradient():
    longer = np.concatenate([PHI[:3] * np.float32([[1], [3], [0]]), PHI[3:]])
    method, solver = METHODS["two-length"], solver_of(METHODS["two-length"])
    relative = [
        scoring.relative(
            scored("two-length", phi=phi),
            scoring.own(method, torch.from_numpy(two_points(phi)), solver, float(N)).numpy(),
        )
        for phi in (PHI, longer)
    ]
    np.testing.assert_allclose(relative[1][:, :2], relative[0][:, :2], rtol=1e-4)
    assert (relative[1][:, 2] == 0).all() and (relative[0] != 0).all()


def test_a_positive_score_means_that_a_step_on_the_image_lowers_the_querys_loss():
    """A linear model with squared loss: one small gradient step on image i, and the change of the query's loss."""
    rng = np.random.default_rng(0)
    x, y, theta = rng.standard_normal((N, K)), rng.standard_normal(N), rng.standard_normal(K)
    xq, yq = rng.standard_normal(K), 0.3

    def loss(theta, x, y):
        return (x @ theta - y) ** 2

    grads = (2 * (x @ theta - y)[:, None] * x).astype(np.float32)
    query = (2 * (xq @ theta - yq) * xq).astype(np.float32)[None]
    v = scoring.precondition(METHODS["grad-dot"], torch.from_numpy(query), None, float(N))
    tau = np.concatenate([t for _, t in scoring.scores(METHODS["grad-dot"], v, [(IDS, grads)])], axis=1)[0]
    step = 1e-6
    fall = np.array([loss(theta, xq, yq) - loss(theta - step * grads[i], xq, yq) for i in range(N)]) / step
    np.testing.assert_allclose(tau, fall, rtol=1e-2, atol=1e-2)


def test_gauss_newton_in_the_whole_space_is_the_exact_effect_of_a_unit_of_weight():
    """Ridge regression, refitted with a little more and a little less weight on image i."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((N, K)), rng.standard_normal(N)
    gauss_newton = 2 * x.T @ x / N
    damping = 0.1
    lam = damping * np.trace(gauss_newton) / K
    theta = np.linalg.solve(gauss_newton + lam * np.eye(K), 2 * x.T @ y / N)  # minimises mean loss + λ/2 ‖θ‖²
    xq, yq = rng.standard_normal(K), 0.3

    def fall(i, h=1e-5):
        """Central difference of the query's loss in the weight of image i, by refitting."""
        values = []
        for sign in (1, -1):
            w = np.ones(N)
            w[i] += sign * h
            a = 2 * (x.T * w) @ x / N + lam * np.eye(K)
            refitted = np.linalg.solve(a, 2 * (x.T * w) @ y / N)
            values.append((xq @ refitted - yq) ** 2)
        return (values[1] - values[0]) / (2 * h)

    phi = (2 * (x @ theta - y)[:, None] * x).astype(np.float32)
    psi = (np.sqrt(2) * x).astype(np.float32)
    solver = curvature.curvature([(psi, np.ones(N))], dim=K, damping=damping, num_rows=N)
    query = (2 * (xq @ theta - yq) * xq).astype(np.float32)[None]
    v = scoring.precondition(METHODS["gauss-newton"], torch.from_numpy(query), solver, float(N))
    tau = np.concatenate([t for _, t in scoring.scores(METHODS["gauss-newton"], v, [(IDS, phi)])], axis=1)[0]
    np.testing.assert_allclose(tau, [fall(i) for i in range(N)], rtol=1e-3, atol=1e-6)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 99)), unique_by=lambda p: p[1]), st.integers(1, 8), st.data()
)
def test_top_k_is_the_sorted_head_however_the_scores_come(pairs, k, data):
    pairs = [(float(score), f"{i:02d}") for score, i in pairs]
    expected = sorted(pairs, key=lambda p: (-p[0], p[1]))[:k]
    best, rest = [], list(pairs)
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        best = scoring.top(best, [i for _, i in rest[:cut]], np.array([s for s, _ in rest[:cut]]), k)
        rest = rest[cut:]
    assert best == expected


def test_totals_are_signed_sums_counting_every_file():
    groups = scoring.groups(pd.Series(["b", "a", "a", "a", "c"]), pd.Series(["x", "x", "y", "x", "z"]))
    first = scoring.group_totals(groups, groups.places(["b", "a"]), np.array([[-3.0, 1.0], [0.5, 0.25]]))
    second = scoring.group_totals(groups, groups.places(["c"]), np.array([[7.0], [0.0]]))
    assert groups.names == ["x", "y", "z"] and groups.files.sum() == 5
    assert (first + second).tolist() == [[-1.0, 1.0, 7.0], [1.0, 0.25, 0.0]]


def test_a_cosine_without_gradient_is_refused_not_made_up():
    zero = PHI.copy()
    zero[3] = 0
    with pytest.raises(OptionError, match=f"gradient of image {IDS[3]} is zero"):
        scored("grad-cos", zero)
    with pytest.raises(OptionError, match="picture whose gradient is zero"):
        scored("grad-cos", phi_q=np.zeros((1, K), np.float32))
