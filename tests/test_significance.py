"""p-values, false discovery rates, group nulls and standard errors, against their definitions and by simulation."""

import numpy as np
import pytest
from scipy import stats

from influence import curvature as curvatures
from influence import keys, significance
from influence.diffusion import batch_of

RNG = np.random.Generator(np.random.PCG64(0))


def test_p_values_count_controls_at_least_as_high():
    controls = np.array([1.0, 2.0, 2.0, 5.0])
    above = significance.exceedances(np.array([0.0, 1.0, 2.0, 2.1, 5.0, 6.0]), controls)
    assert above.tolist() == [4, 4, 3, 1, 1, 0]
    np.testing.assert_allclose(significance.p_values(above, 4), [1, 1, 0.8, 0.4, 0.4, 0.2])


def test_q_values_from_a_histogram_are_those_of_benjamini_and_hochberg():
    controls = RNG.normal(size=30)
    scores = RNG.normal(size=200) + (np.arange(200) < 40) * 3
    above = significance.exceedances(scores, controls)
    counts = np.bincount(above, minlength=31)
    expected = stats.false_discovery_control(significance.p_values(above, 30))
    np.testing.assert_allclose(significance.q_values(counts)[above], expected)


def test_p_values_of_strangers_are_uniform():
    p = [
        significance.p_values(significance.exceedances(RNG.normal(size=1), RNG.normal(size=99)), 99)[0]
        for _ in range(2000)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("size", [1, 10, 100])
@pytest.mark.parametrize("outlier", [False, True])
def test_groups_of_strangers_are_significant_as_often_as_they_should_be(size, outlier):
    """Also with fewer controls than works, or one score that dwarfs all others, wherever it falls."""
    found = []
    for _ in range(400):
        pool = RNG.standard_t(5, size=size + 60)
        if outlier:
            pool[RNG.integers(len(pool))] = 1000.0
        works, controls = pool[:size], pool[size:]
        null = significance.group_null(works, np.ones(size), controls, repeats=499)
        found.append(significance.group_p_values(np.array([works.sum()]), [null])[0])
    _, high = stats.binom.interval(0.998, 400, 0.05)
    assert np.sum(np.array(found) <= 0.05) <= high
    if not outlier:
        low, _ = stats.binom.interval(0.998, 400, 0.05)
        assert np.sum(np.array(found) <= 0.05) >= low
        assert abs(np.mean(found) - 0.5) < 0.06


def test_a_group_that_differs_is_found():
    works, controls = RNG.normal(size=20) + 1.5, RNG.normal(size=100)
    null = significance.group_null(works, np.ones(20), controls)
    assert significance.group_p_values(np.array([works.sum()]), [null])[0] == pytest.approx(1 / 2000)


def test_a_group_of_one_has_the_p_value_of_its_image():
    controls = RNG.normal(size=50)
    for score in (-1.0, 0.3, 2.0):
        null = significance.group_null(np.array([score]), np.ones(1), controls, repeats=20_000)
        group = significance.group_p_values(np.array([score]), [null])[0]
        single = significance.p_values(significance.exceedances(np.array([score]), controls), 50)[0]
        assert group == pytest.approx(single, abs=0.02)


def test_a_null_has_the_moments_of_drawing_without_replacement_with_parts_of_works():
    works, parts, controls = np.array([3.0, -1.0, 0.5]), np.array([1.0, 0.5, 2.0]), RNG.normal(size=7)
    null = significance.group_null(works, parts, controls, repeats=40_000)
    pool = np.concatenate([works, controls])
    variance, n = pool.var(), len(pool)
    cross = -variance / (n - 1)
    expected = variance * (parts**2).sum() + cross * (parts.sum() ** 2 - (parts**2).sum())
    assert null.mean() == pytest.approx(pool.mean() * parts.sum(), abs=0.05)
    assert null.var() == pytest.approx(expected, rel=0.05)
    assert (np.diff(null) >= 0).all()


def test_without_controls_there_is_no_p_value():
    p = significance.group_p_values(np.zeros(2), [])
    assert np.isnan(p).all() and np.isnan(significance.false_discovery_rates(p)).all()


@pytest.mark.parametrize("means", [(2.0, 1.0), (0.3, 0.3), (0.0, 0.0)])
def test_intervals_cover_the_value_of_infinitely_many_draws(means):
    """τ is an inner product of two noisy means: with small ones, the product of both errors is all of its error, and
    what is left of the other two, which are at least 0, makes intervals wider.
    """
    dim, repeats = 32, 1500
    query, train = (mean * RNG.normal(size=dim) for mean in means)
    queries, trains = (x + RNG.normal(size=(batches, repeats, dim)) for x, batches in ((query, 8), (train, 5)))
    errors = significance.errors(np.einsum("brk,crk->bcr", queries, trains))
    estimates = (queries.mean(0) * trains.mean(0)).sum(1)
    low, high = errors.interval(estimates)
    assert 0.92 <= ((low <= query @ train) & (query @ train <= high)).mean() <= 0.99
    assert 0.9 <= np.square(errors.se).mean() / estimates.var(ddof=1) <= 1.75  # twice its product would be 2 at least


def test_the_variance_of_a_score_is_that_of_the_analysis_of_variance():
    tau = RNG.normal(size=(4, 3)) + 2 * RNG.normal(size=(4, 1)) + 3 * RNG.normal(size=(1, 3))
    rows, columns, mean = tau.mean(1), tau.mean(0), tau.mean()
    residual = sum((tau[b, c] - rows[b] - columns[c] + mean) ** 2 for b in range(4) for c in range(3)) / (3 * 2)
    by_rows, by_columns = 3 * rows.var(ddof=1), 4 * columns.var(ddof=1)  # mean squares
    expected = (by_rows + by_columns - residual) / 12
    assert min(by_rows, by_columns) > residual
    found = significance.errors(tau[:, :, None])
    assert found.se[0] ** 2 == pytest.approx(expected)
    parts = np.array([by_rows - residual, by_columns - residual, residual]) / 12
    assert found.dof[0] == pytest.approx(expected**2 / (parts**2 / [3, 2, 6]).sum())


def test_standard_errors_need_two_batches_of_each_kind():
    for b, c in ((3, 1), (1, 3), (0, 3)):
        errors = significance.errors(np.ones((b, c, 4)))
        assert errors.se.shape == (4,) and np.isnan(errors.se).all() and np.isnan(errors.interval(np.ones(4))[0]).all()


def test_a_mean_is_tested_against_zero():
    values = RNG.normal(0.3, 1, 20)
    expected = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    found = significance.above_zero(values.mean(), values.std(ddof=1) / 20**0.5, 19.0)
    assert found == pytest.approx(expected)
    assert significance.above_zero(0.0, 0.0, 1.0) == 1 and significance.above_zero(1.0, 0.0, 1.0) == 0


def _linear_model(images=40, k=12, damping=0.3):
    """Least squares: residuals and Jacobians of a model that was trained on all images, in closed form."""
    import torch

    generator = np.random.Generator(np.random.PCG64(3))
    x, y = generator.normal(size=(images, k)), generator.normal(size=images)
    h = 2 * x.T @ x / images
    lam = damping * np.trace(h) / k

    def fit(keep):
        return np.linalg.solve(2 * x[keep].T @ x[keep] / images + lam * np.eye(k), 2 * x[keep].T @ y[keep] / images)

    return torch, x, y, lam, fit


def test_leverage_gives_the_gradient_of_an_image_left_out():
    """Of a damped linear model, where leaving out is exact: g_without = g / (1 − h) along g, and here g is a line."""
    torch, x, y, lam, fit = _linear_model()
    images, k = x.shape
    everything = np.ones(images, bool)
    theta = fit(everything)
    phi = torch.tensor(2 * (x @ theta - y)[:, None] * x)
    psi = torch.tensor(2**0.5 * x)
    blocks = [(psi.numpy().astype(np.float32), np.ones(images))]
    damping = lam / (2 * (x**2).sum() / images / k)
    factored = curvatures.curvature(blocks, dim=k, damping=damping, num_rows=images)
    # One exact row for each image: it is in H for good, so the row itself is not to be left out.
    solved = curvatures.solve(factored, phi)
    h = ((psi * solved).sum(1) ** 2 / (phi * solved).sum(1) / images).numpy()
    for i in range(images):
        keep = everything.copy()
        keep[i] = False
        without = 2 * (x[i] @ fit(keep) - y[i]) * x[i]
        np.testing.assert_allclose(phi[i].numpy() / (1 - h[i]), without, rtol=1e-4)


def test_leverage_leaves_each_curvature_row_out_of_itself_and_is_the_mean_over_rows():
    torch, x, _, _, _ = _linear_model(images=30, k=8)
    psi = torch.tensor(np.concatenate([x, x[::-1] * 0.7]).astype(np.float32))
    item = torch.cat([torch.arange(30), torch.arange(29, -1, -1)])
    phi = torch.tensor(np.random.Generator(np.random.PCG64(5)).normal(size=(30, 8)).astype(np.float32))
    factored = curvatures.curvature([(psi.numpy(), np.ones(60))], dim=8, damping=0.2, num_rows=60)
    solved, ones = curvatures.solve(factored, phi), torch.ones(60, dtype=torch.float64)
    found = curvatures.leverage(factored, phi, solved, psi, item, ones, 30.0).numpy()
    h = psi.double().T @ psi.double() / 60 + factored.damping * torch.eye(8)
    for i in range(30):
        parts = []
        for r in np.flatnonzero(item.numpy() == i):
            row = psi[r].double()
            inside = row @ torch.linalg.solve(h, row) / 60
            parts.append(((row @ torch.linalg.solve(h, phi[i].double())) / (1 - inside)) ** 2)
        own = phi[i].double() @ torch.linalg.solve(h, phi[i].double())
        assert found[i] == pytest.approx(float(np.mean(parts) / own / 30), rel=1e-5)


@pytest.mark.parametrize("k", [8, 100])
def test_a_row_of_several_files_is_left_out_of_curvature_with_all_of_them(k):
    torch, x, *_ = _linear_model(images=30, k=k)
    w = np.array([4.0, 3.0, *np.ones(28)])
    psi, item = torch.tensor(x.astype(np.float32)), torch.arange(30)
    phi = torch.tensor(np.random.Generator(np.random.PCG64(5)).normal(size=(30, k)).astype(np.float32))
    factored = curvatures.curvature([(psi.numpy(), w)], dim=k, damping=5.0, num_rows=30)
    assert (factored.psi is not None) == (k == 100)
    solved, own = curvatures.solve(factored, phi), curvatures.own_parts(factored)
    found = curvatures.leverage(factored, phi, solved, psi, item, torch.tensor(w), w.sum(), own)
    h = (psi.double().T * torch.tensor(w)) @ psi.double() / w.sum() + factored.damping * torch.eye(k)
    for i in (0, 1, 7):
        row, g = psi[i].double(), phi[i].double()
        without = h - w[i] * torch.outer(row, row) / w.sum()
        expected = (row @ torch.linalg.solve(without, g)) ** 2 / (g @ torch.linalg.solve(h, g)) / w.sum()
        assert float(found[i]) == pytest.approx(min(float(expected), curvatures.MAX_LEVERAGE), rel=1e-3)


@pytest.mark.parametrize("rows", [6, 40])
def test_quadratic_forms_agree_with_solves_in_the_primal_and_the_dual(rows):
    torch, *_ = _linear_model()
    generator = np.random.Generator(np.random.PCG64(7))
    psi = generator.normal(size=(rows, 12)).astype(np.float32)
    factored = curvatures.curvature([(psi, np.ones(rows))], dim=12, damping=0.1, num_rows=rows)
    asked = torch.tensor(generator.normal(size=(5, 12)))
    expected = (asked * curvatures.solve(factored, asked)).sum(1)
    np.testing.assert_allclose(curvatures.quadratic(factored, asked), expected, rtol=1e-6)


def test_feature_leverage_is_the_hat_matrix_of_ridge_regression():
    torch, x, *_ = _linear_model()
    phi = x.astype(np.float32)
    factored = curvatures.curvature([(phi, np.ones(len(phi)))], dim=12, damping=0.1, num_rows=len(phi))
    hat = phi @ np.linalg.solve(phi.T @ phi + len(phi) * factored.damping * np.eye(12), phi.T)
    np.testing.assert_allclose(curvatures.feature_leverage(factored, torch.tensor(phi)), np.diag(hat), rtol=1e-4)


@pytest.mark.parametrize("models", [2, 3, 6])
def test_intervals_of_a_mean_over_models_cover_training_again(models):
    repeats, draws = 4000, 64
    noise = keys.normal(("draws", models), (draws, repeats)).astype(float)  # the same for all models
    own = keys.normal(("models", models), (models, repeats)).astype(float)
    found = significance.stratified_errors(noise)
    each = 1.0 + own
    errors = significance.with_training(found, each.var(0, ddof=1) / models, models)
    low, high = errors.interval(each.mean(0) + noise.mean(0))
    assert 0.94 <= ((low <= 1) & (high >= 1)).mean() <= 0.98
    low, high = found.interval(each.mean(0) + noise.mean(0))
    assert ((low <= 1) & (high >= 1)).mean() < 0.5, "that of the draws alone does not"
    draws, quantile = errors.se**2 - each.var(0, ddof=1) / models, stats.t.ppf(0.975, models - 1)
    expected = stats.t.ppf(0.975, found.dof) ** 2 * draws + quantile**2 * each.var(0, ddof=1) / models
    low, high = errors.interval(np.zeros(repeats))
    np.testing.assert_allclose(high, np.sqrt(expected), rtol=1e-3)


def test_the_error_of_a_stratified_mean_is_without_the_trend_over_the_strata():
    repeats, draws = 4000, 64
    noise = keys.normal(("stratified", repeats), (draws, repeats)).astype(float)
    t = np.arange(draws)[:, None] / draws
    values = 3 * (1 - t) ** 3 + (0.5 + t) * noise  # noise that is not the same everywhere
    exact = float(np.sqrt(((0.5 + t) ** 2).sum()) / draws)
    found = significance.stratified_errors(values)
    assert np.sqrt(np.square(found.se).mean()) == pytest.approx(exact, rel=0.05)
    low, high = found.interval(values.mean(0))
    truth = float((3 * (1 - t) ** 3).mean())
    assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97
    by_batches = np.stack([values[batch_of(draws) == b].mean(0) for b in range(8)]).var(0, ddof=1) / 8
    assert np.square(found.se).mean() < by_batches.mean()


def test_one_creator_of_many_can_be_more_than_chance():
    controls = keys.normal(("many creators",), (5000,)).astype(float)
    nulls = [significance.null_among(np.full(5, 50.0), np.ones(5), controls, 250)]
    nulls += [significance.null_among(controls[i : i + 5], np.ones(5), controls, 250) for i in range(0, 1245, 5)]
    assert len(nulls[0]) == 5000 and {len(null) for null in nulls[1:]} <= {1999, 5000}
    totals = np.array([250.0, *(controls[i : i + 5].sum() for i in range(0, 1245, 5))])
    q = significance.false_discovery_rates(significance.group_p_values(totals, nulls))
    assert q[0] <= significance.Q_VALUE and (q[1:] > significance.Q_VALUE).all()
