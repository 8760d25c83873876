"""Metrics: known answers, published and exact."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from influence import keys, metrics
from influence.errors import OptionError


def masks_of(subsets, images):
    """Boolean masks of index sets."""
    masks = np.zeros((len(subsets), images), dtype=bool)
    for row, subset in enumerate(subsets):
        masks[row, list(subset)] = True
    return masks


def test_scores_that_define_the_truth_have_lds_one():
    scores = keys.normal(("scores",), (5, 20)).astype(np.float64)
    masks = np.stack([np.argsort(keys.uniform(("mask", i), 20)) < 10 for i in range(12)])
    outcome = metrics.predictions(scores, masks)
    assert metrics.lds(scores, masks, outcome) == pytest.approx(np.ones(5))
    assert metrics.lds(-scores, masks, outcome) == pytest.approx(-np.ones(5))


def test_the_published_unit_case_of_dattri():
    scores = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
    outcome = np.array([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]])
    masks = masks_of([{0, 1}, {0, 2}, {1, 2}], 4)
    assert metrics.lds(scores, masks, outcome) == pytest.approx([1.0, 0.8660254])


def test_correlations_are_scipys_with_ties_and_zero_for_a_constant():
    a = keys.integers(("a",), 60, 5).reshape(20, 3).astype(float)
    b = keys.integers(("b",), 60, 5).reshape(20, 3).astype(float)
    expected = [spearmanr(a[:, j], b[:, j]).statistic for j in range(3)]
    assert metrics.correlations(a, b) == pytest.approx(expected)
    assert metrics.correlations(np.ones((20, 3)), b) == pytest.approx(np.zeros(3))


def test_subsets_of_different_sizes_are_refused():
    with pytest.raises(OptionError, match="1 to 2 images"):
        metrics.lds(np.ones((1, 3)), masks_of([{0}, {1, 2}], 3), np.ones((2, 1)))


def test_ridge_regression_leave_one_out_is_exact():
    """Gauss–Newton influence with its leave-one-out correction foretells ridge regression's retraining exactly."""
    x = keys.normal(("x",), (30, 4)).astype(np.float64)
    y = keys.normal(("y",), (30,)).astype(np.float64)
    ridge = 0.7 * np.eye(4)
    query = keys.normal(("q",), (4,)).astype(np.float64)
    inverse = np.linalg.inv(x.T @ x + ridge)
    theta = inverse @ x.T @ y
    leverage = np.einsum("ij,jk,ik->i", x, inverse, x)
    foretold = (y - x @ theta) * (x @ inverse @ query) / (1 - leverage)
    for i in range(30):
        kept = np.arange(30) != i
        left_out = np.linalg.solve(x[kept].T @ x[kept] + ridge, x[kept].T @ y[kept])
        assert foretold[i] == pytest.approx(query @ theta - query @ left_out, abs=1e-12)


def additive(weights):
    """The game in which each owner adds a fixed amount."""
    owners = list(weights)
    subsets = [frozenset(c) for n in range(len(owners) + 1) for c in itertools.combinations(owners, n)]
    return {s: np.array([float(sum(weights[o] for o in s))]) for s in subsets}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_shapley_of_an_additive_game_is_each_owners_amount(amounts):
    weights = {f"owner {i}": amount for i, amount in enumerate(amounts)}
    values = metrics.shapley(additive(weights))
    assert {o: float(v[0]) for o, v in values.items()} == pytest.approx(weights, abs=1e-9)


def test_shapley_of_the_glove_game():
    """One left glove, two right ones: 2/3, 1/6, 1/6 (a textbook example)."""
    subsets = [frozenset(c) for n in range(4) for c in itertools.combinations("LRr", n)]
    values = metrics.shapley({s: np.array([float("L" in s and len(s) > 1)]) for s in subsets})
    assert {o: float(v[0]) for o, v in values.items()} == pytest.approx({"L": 2 / 3, "R": 1 / 6, "r": 1 / 6})
    assert sum(float(v[0]) for v in values.values()) == pytest.approx(1.0)


def test_shapley_refuses_a_missing_coalition():
    values = additive({"a": 1.0, "b": 2.0})
    del values[frozenset("a")]
    with pytest.raises(OptionError, match="3 coalitions of 2 owners"):
        metrics.shapley(values)


def test_reliability_of_known_noise():
    """Signal and noise of equal variance: one seed agrees with another at about 1/2, two with two at 2/3."""
    signal = keys.normal(("signal",), (2000, 4))
    by_seed = np.stack([signal + keys.normal(("noise", s), (2000, 4)) for s in range(2)])
    found = metrics.reliability(by_seed)
    assert found.split_seed == pytest.approx(0.48, abs=0.03)  # Spearman of a Gaussian correlation of 1/2
    assert found.mean_of_seeds == pytest.approx(2 * found.split_seed / (1 + found.split_seed))
    assert found.ceiling == pytest.approx(found.mean_of_seeds**0.5)
    with pytest.raises(OptionError, match="one training seed"):
        metrics.reliability(by_seed[:1])


def test_the_bootstrap_is_paired_and_covers():
    truth = keys.normal(("truth",), (64, 20)).astype(np.float64)
    good, same = truth + keys.normal(("good",), (64, 20)), truth + keys.normal(("good",), (64, 20))
    repeats = metrics.bootstrap(np.stack([good, same, -truth]), truth, repeats=200)
    assert np.array_equal(repeats[:, 0], repeats[:, 1])
    assert repeats[:, 2] == pytest.approx(-np.ones(200))
    value = metrics.correlations(good, truth).mean()
    found = metrics.interval(value, repeats[:, 0])
    assert found.low < value < found.high
    assert 0.02 < found.high - found.low < 0.3


def test_slope_and_total_variation():
    predicted = np.array([1.0, 2.0, 3.0])
    assert metrics.slope(1.3 * predicted, predicted) == pytest.approx(1.3)
    a, b = np.array([[1.0, 2.0], [1.0, -3.0]]), np.array([[3.0, 1.0], [1.0, 1.0]])
    assert metrics.total_variation(a, a) == pytest.approx([0.0, 0.0])
    assert metrics.total_variation(a, b) == pytest.approx([0.25, 0.5])
