"""Is a score more than chance? p-values against controls, false discovery rates, standard errors, intervals.

Controls are images that were never trained on and went through the same code. Under the null hypothesis that training
on an image did no more for the query than training on a stranger would have done, its relative score
(`scoring.relative`) and theirs can be exchanged, and so can its leave-one-out-corrected score (`score / (1 − h)`, see
`curvature.leverage`), of which creators' totals are made.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32, Int64
from scipy import stats

from influence import keys

MIN_CONTROLS = 99
"""With fewer the smallest p-value is above 0.01."""
LEVEL = 0.95
Q_VALUE = 0.1
"""False discovery rate at which a score or a creator counts as more than chance."""
REPEATS = 1999
_FOR_EACH = 20  # repeats, where there are many creators
_BLOCK = 1 << 22
_ROUNDING = 1e-9


def exceedances(scores: Float[np.ndarray, " n"], controls: Float[np.ndarray, " controls"]) -> Int64[np.ndarray, " n"]:
    """How many controls score at least as high."""
    return len(controls) - np.searchsorted(np.sort(controls), scores, side="left").astype(np.int64)


def p_values(exceeding: Int64[np.ndarray, " n"], controls: int) -> Float[np.ndarray, " n"]:
    """P = (1 + #{controls ≥ score}) / (1 + #controls), never 0 (Phipson & Smyth, 2010)."""
    return (1 + exceeding) / (1 + controls)


def q_values(counts: Int64[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
    """Benjamini & Hochberg (1995) from a histogram, so that no list of all images is needed.

    Args:
        counts: How many images are exceeded by 0, 1, …, n controls.

    Returns:
        The q-value of an image that so many controls exceed: min over p′ ≥ p of p′ · images / #{images with p ≤ p′}.
    """
    p = p_values(np.arange(len(counts)), len(counts) - 1)
    below = np.cumsum(counts)
    found = np.divide(p * below[-1], below, out=np.ones(len(p)), where=below > 0)
    return np.minimum(np.minimum.accumulate(found[::-1])[::-1], 1.0)


def group_null(
    works: Float[np.ndarray, " works"],
    parts: Float[np.ndarray, " works"],
    controls: Float[np.ndarray, " controls"],
    repeats: int = REPEATS,
) -> Float[np.ndarray, " repeats"]:
    """What a creator's total is, in order, when his works and the controls change places at random.

    If his works did no more for the query than controls do, all of them can be exchanged, and the test is exact
    whatever the distribution (Fisher, 1935): with few controls or one outlier among his works it says less, and never
    too much. Groups of controls alone, which take the controls' distribution for known, call too many significant.

    Args:
        works: Scores of his works.
        parts: How much of each work is his, in the total Σ parts · score.
        controls: Scores of the controls.
        repeats: How many times.
    """
    pool, count = np.concatenate([works, controls]), len(works)
    step = max(1, _BLOCK // len(pool))
    blocks = [(start, min(step, repeats - start)) for start in range(0, repeats, step)]
    draw = _exchanged if count * repeats <= _BLOCK else _exchanged.__wrapped__  # large ones are not worth the memory
    return np.sort(np.concatenate([pool[draw(count, len(controls), *block)] @ parts for block in blocks]))


def null_among(
    works: Float[np.ndarray, " works"],
    parts: Float[np.ndarray, " works"],
    controls: Float[np.ndarray, " controls"],
    creators: int,
) -> Float[np.ndarray, " repeats"]:
    """`group_null` of one of several creators: often enough for a q-value.

    1999 repeats give a p-value of 1/2000 at least, with which one creator of more than 200 cannot have q ≤ 0.1. A total
    that none of them reaches is compared with 20 for each creator. That keeps the test's level: below 1/2000 the second
    number of repeats decides alone, and above it the first.
    """
    null = group_null(works, parts, controls)
    more = _FOR_EACH * creators
    return group_null(works, parts, controls, more) if more > REPEATS and null[-1] < works @ parts else null


@functools.lru_cache(maxsize=64)
def _exchanged(works: int, controls: int, start: int, rows: int) -> Int32[np.ndarray, "rows works"]:
    """Which of all works and controls stand in the works' places: the same for every query and creator of this size."""
    order = keys.uniform(("exchange", works, controls, start), rows * (works + controls)).reshape(rows, -1)
    return np.argsort(order, 1)[:, :works].astype(np.int32)


def group_p_values(
    totals: Float[np.ndarray, "*repeats groups"], nulls: Sequence[Float[np.ndarray, " n"]]
) -> Float[np.ndarray, "*repeats groups"]:
    """P of each creator's total by its null; NaN without controls, where there are no nulls."""
    p = np.full(totals.shape, np.nan)
    for group, null in enumerate(nulls):
        slack = _ROUNDING * np.abs(null).max()  # the same works, added up in another order
        above = len(null) - np.searchsorted(null, totals[..., group] - slack, side="left")
        p[..., group] = (1 + above) / (1 + len(null))
    return p


def false_discovery_rates(p: Float[np.ndarray, "*repeats groups"]) -> Float[np.ndarray, "*repeats groups"]:
    """Benjamini & Hochberg (1995) over the last axis; NaN where p is."""
    return p if np.isnan(p).any() else stats.false_discovery_control(p, axis=-1)


@dataclass(frozen=True)
class Errors:
    """Standard errors of scores, and their degrees of freedom; NaN where the draws cannot be divided."""

    se: Float[np.ndarray, "*shape"]
    dof: Float[np.ndarray, "*shape"]

    def interval(self, value: Float[np.ndarray, "*shape"]) -> tuple[np.ndarray, np.ndarray]:
        """Limits of the 95 % interval of Student's t."""
        half = stats.t.ppf((1 + LEVEL) / 2, self.dof) * self.se
        return value - half, value + half


def errors(tau: Float[np.ndarray, "query_batches train_batches *shape"]) -> Errors:
    """Standard error of a score from its values over disjoint batches of draws of either picture.

    τ_bc, with batch b of the query's draws and batch c of the training image's, is linear in each, and so its mean has
    three independent errors: the query's, the training image's, and the product of both, which is much of the variance
    with weak damping. With B and C batches, τ̄_b over c and τ̄_c over b, two-way analysis of variance (Searle, Casella
    & McCulloch, 1992) tells them apart:

        D = Σ_bc (τ_bc − τ̄_b − τ̄_c + τ̄)² / (B C (B − 1) (C − 1))
        A = Σ_b (τ̄_b − τ̄)² / (B (B − 1)) − D,   A' = Σ_c (τ̄_c − τ̄)² / (C (C − 1)) − D,   se² = A + A' + D

    A and A' are at least 0. They are without bias as far as all batches have the same expectation, and too high by what
    their expectations differ by. Degrees of freedom as Satterthwaite (1946) has them, of the three parts.

    Args:
        tau: The score with one batch in place of all, for each pair of batches.
    """
    b, c = tau.shape[:2]
    if min(b, c) < 2:
        return Errors(*np.full((2, *tau.shape[2:]), np.nan))
    by_query, by_train = tau.mean(1, keepdims=True), tau.mean(0, keepdims=True)
    product = np.square(tau - by_query - by_train + tau.mean((0, 1))).sum((0, 1)) / (b * c * (b - 1) * (c - 1))
    query = np.maximum(by_query[:, 0].var(0, ddof=1) / b - product, 0)
    train = np.maximum(by_train[0].var(0, ddof=1) / c - product, 0)
    total = query + train + product
    weighted = query**2 / (b - 1) + train**2 / (c - 1) + product**2 / ((b - 1) * (c - 1))
    dof = np.divide(total**2, weighted, out=np.ones_like(total), where=weighted > 0)
    return Errors(np.sqrt(total), dof)


def stratified_errors(draws: Float[np.ndarray, "draws *shape"]) -> Errors:
    """Standard error of a mean over stratified antithetic draws, from what neighbouring pairs differ by.

    The mean m_p of a pair varies with t; the mean over all strata does not vary with that, and differences of
    neighbours hardly: Σ_p (m_{p+1} − m_p)² / (2 P (P − 1)) over P pairs (von Neumann, 1941; for systematic samples
    Wolter, 1984). Of batches of draws (`errors`) each has less of the schedule, and their spread has a part of the
    trend. Neighbouring differences overlap, and P − 1 of them have the freedom of two thirds as many.

    Args:
        draws: Values in the order of their strata, an even number of them.
    """
    pairs = draws.reshape(-1, 2, *draws.shape[1:]).mean(1)
    count = len(pairs)
    variance = np.square(np.diff(pairs, axis=0)).sum(0) / (2 * count * (count - 1))
    return Errors(np.sqrt(variance), np.full(variance.shape, max(2 * (count - 1) / 3, 1.0)))


def with_training(found: Errors, between: Float[np.ndarray, "*shape"], models: int) -> Errors:
    """Errors of a mean over models that vary by training as well.

    With two or three models degrees of freedom as Satterthwaite (1946) has them give intervals that are too short. Here
    they are those with which the interval has t² se² = t₁² draws + t₂² between, the quantiles of either part: no
    shorter than it should be, as in the test of Cochran & Cox (1950), and as intervals of scores are.

    Args:
        found: Errors of the draws, which are the same for all models.
        between: Variance over models, divided by their number.
        models: Their number, 2 or more.
    """
    draws, tail = found.se**2, (1 + LEVEL) / 2
    total = draws + between
    squared = stats.t.ppf(tail, found.dof) ** 2 * draws + stats.t.ppf(tail, models - 1) ** 2 * between
    known = np.geomspace(1, 1e6, 2000)
    quantile = np.sqrt(np.divide(squared, total, out=np.zeros_like(total), where=total > 0))
    return Errors(np.sqrt(total), np.interp(-quantile, -stats.t.ppf(tail, known), known))


def difference(variance: float, n: float, other_variance: float, other_n: float) -> Errors:
    """Standard error of a difference of two means, with the degrees of freedom of Welch (1947)."""
    a, b = variance / n, other_variance / other_n
    dof = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (other_n - 1)) if a + b > 0 else 1.0
    return Errors(np.array([(a + b) ** 0.5]), np.array([dof]))


def two_sided(value: float, se: float, dof: float) -> float:
    """p-value of a difference from 0 (Student's t)."""
    return float(2 * stats.t.sf(abs(value) / se, dof)) if se > 0 else float(value == 0)


def above_zero(value: float, se: float, dof: float) -> float:
    """One-sided p-value of a mean against 0 (Student's t)."""
    return float(stats.t.sf(value / se, dof)) if se > 0 else float(value <= 0)
