"""How well scores foretold what retraining showed: LDS, Shapley values of owners, scale; with intervals and a ceiling.

An *outcome* is −loss of a query under a model retrained on a subset: higher means that the subset helped. Scores are
τ [query, train], so a subset's prediction is Σ_{i ∈ S} τ(q, i) and should rise with the outcome.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from influence import keys
from influence.errors import OptionError


def predictions(
    scores: Float[np.ndarray, "query train"], masks: Bool[np.ndarray, "subset train"]
) -> Float[np.ndarray, "subset query"]:
    """Σ_{i ∈ S} τ(q, i)."""
    return masks.astype(np.float64) @ scores.T.astype(np.float64)


def correlations(a: Float[np.ndarray, "subset query"], b: Float[np.ndarray, "subset query"]) -> np.ndarray:
    """Spearman's rank correlation down the columns `[query]`, ties at their mean rank; 0 where a column is constant."""
    ranks_a, ranks_b = (rankdata(np.asarray(x), axis=0) for x in (a, b))
    ranks_a, ranks_b = ranks_a - ranks_a.mean(0), ranks_b - ranks_b.mean(0)
    norm = np.sqrt((ranks_a**2).sum(0) * (ranks_b**2).sum(0))
    return np.divide((ranks_a * ranks_b).sum(0), norm, out=np.zeros(norm.shape), where=norm > 0)


def lds(
    scores: Float[np.ndarray, "query train"],
    masks: Bool[np.ndarray, "subset train"],
    outcome: Float[np.ndarray, "subset query"],
) -> Float[np.ndarray, " query"]:
    """Linear datamodeling score of each query (Ilyas et al., 2022; Park et al., 2023).

    Spearman's correlation over the subsets between Σ_{i ∈ S} τ(q, i) and the outcome of the model trained on S.

    Raises:
        OptionError: Subsets have different sizes, which any constant score would profit from.
    """
    sizes = np.unique(masks.sum(1))
    if len(sizes) != 1:
        raise OptionError(
            f"subsets have {sizes.min()} to {sizes.max()} images; expected subsets of one size, so that a score which "
            "is the same for every image foretells nothing"
        )
    return correlations(predictions(scores, masks), outcome)


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    foretold: Float[np.ndarray, "method subset query"],
    outcome: Float[np.ndarray, "subset query"],
    *,
    repeats: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, "repeat method"]:
    """Mean LDS of methods when subsets *and* queries are drawn again, with replacement: the same draw for all methods.

    The difference of two columns is a paired difference.
    """
    _, subsets, queries = foretold.shape
    result = np.empty((repeats, len(foretold)))
    for r in range(repeats):
        s = keys.integers(("bootstrap-subsets", seed, r), subsets, subsets)
        q = keys.integers(("bootstrap-queries", seed, r), queries, queries)
        there = outcome[np.ix_(s, q)]
        result[r] = [correlations(one[np.ix_(s, q)], there).mean() for one in foretold]
    return result


def interval(value: float, repeats: Float[np.ndarray, " repeat"]) -> Interval:
    """Percentile interval."""
    low, high = np.quantile(repeats, [0.025, 0.975])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Reliability:
    """How far the truth agrees with itself when it is made again with another training seed."""

    split_seed: float
    """Mean over queries of Spearman's correlation between two seeds."""
    mean_of_seeds: float
    """The same for means over all seeds that there are (Spearman, 1910; Brown, 1910)."""
    ceiling: float
    """√(mean_of_seeds): the LDS that perfect scores can be expected to reach."""


def reliability(by_seed: Float[np.ndarray, "seed subset query"]) -> Reliability:
    """Split-seed reliability of outcomes, and with it the ceiling of the LDS.

    Raises:
        OptionError: There is only one seed.
    """
    seeds = len(by_seed)
    if seeds < 2:
        raise OptionError("there is one training seed; expected two at least, or the ceiling of the LDS is unknown")
    pairs = [correlations(by_seed[a], by_seed[b]).mean() for a, b in itertools.combinations(range(seeds), 2)]
    r = float(np.mean(pairs))
    whole = seeds * r / (1 + (seeds - 1) * r) if r > 0 else 0.0
    return Reliability(r, whole, math.sqrt(whole))


def shapley(values: Mapping[frozenset[str], Float[np.ndarray, " query"]]) -> dict[str, Float[np.ndarray, " query"]]:
    """Exact Shapley values of owners (Shapley, 1953), from the value v(S) of every coalition.

    φ_o = Σ_{S ∌ o} |S|! (n − |S| − 1)! / n! · (v(S ∪ o) − v(S)). They sum to v(all) − v(∅).

    Raises:
        OptionError: A coalition is missing.
    """
    owners = sorted(frozenset().union(*values))
    n = len(owners)
    if len(values) != 2**n:
        raise OptionError(f"there are {len(values)} coalitions of {n} owners; expected all {2**n}; retrain the others")
    shares = {}
    for owner in owners:
        without = [coalition for coalition in values if owner not in coalition]
        shares[owner] = np.sum(
            [
                (values[s | {owner}] - values[s]) / (n * math.comb(n - 1, len(s)))  # |S|!(n−|S|−1)!/n!
                for s in without
            ],
            axis=0,
        )
    return shares


def slope(measured: Float[np.ndarray, "*any"], predicted: Float[np.ndarray, "*any"]) -> float:
    """Of the line through the origin that foretells the measured from the predicted, by least squares."""
    return float((measured * predicted).sum() / (predicted**2).sum())


def total_variation(a: Float[np.ndarray, "owner query"], b: Float[np.ndarray, "owner query"]) -> np.ndarray:
    """½ Σ_o |a_o − b_o| of the shares, negative values cut to 0 per owner, of each query."""
    parts = []
    for x in (a, b):
        positive = np.clip(x, 0, None)
        total = positive.sum(0)
        parts.append(np.divide(positive, total, out=np.zeros_like(positive), where=total > 0))
    return 0.5 * np.abs(parts[0] - parts[1]).sum(0)
