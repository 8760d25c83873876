"""From creators' totals to shares, and from shares to money: named choices, none of them a finding.

A share says how an estimator divides what the fine-tune did for one picture. It is an estimate for research: it does
not say that a picture was copied, nor that anything is due. T is a creator's total of the whole way from the base to
the fine-tune where the base is known (`wholeway.py`), or else at its end, Σ score / (1 − h). In the game whose value is
linear in the images such sums are Shapley values, and faithful to groups (Lee et al., 2025): dividing a catalogue
between two names changes no sum (but what its works do alone, where that is counted: `solo.py`). Values are cut at 0
for a creator, never for a work: cutting each work and adding up pays for the size of a catalogue.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np
from jaxtyping import Float
from scipy import stats

from influence import keys, significance
from influence.errors import OptionError

BASE_MODEL = "_base_model"
"""What the model could do before the fine-tune."""
UNATTRIBUTED = "_unattributed"
"""What the fine-tune did, and no creator is credited with."""
REPEATS = 499
_LARGEST_POOL = Decimal(10) ** 18
"""A pool must be below it: tables keep amounts with 6 decimals, and arithmetic with 28 digits."""
_UNITS = 2**40
_WHOLE = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THOUSANDTHS = "BHD IQD JOD KWD LYD OMR TND"
_MINOR_DIGITS = dict.fromkeys(_WHOLE.split(), 0) | dict.fromkeys(_THOUSANDTHS.split(), 3)
"""Decimals of the currencies of ISO 4217 that have not two."""


@dataclass(frozen=True)
class Evidence:
    """What is known of the creators for one picture; totals may have repeats of a bootstrap in front."""

    images: Float[np.ndarray, " creators"]
    """Works of each."""
    totals: Float[np.ndarray, "*repeats creators"]
    q_values: Float[np.ndarray, "*repeats creators"]
    """Of each total against controls; NaN without them."""
    reliability: float = float("nan")
    """Part of the totals' variance over creators that is not error of the draws, 0 … 1."""
    similarity: Float[np.ndarray, " creators"] | None = None
    """How much more than usual the creators' works look like the picture."""
    shapley: Float[np.ndarray, " creators"] | None = None
    """Exact Shapley values from retrained coalitions."""


def _normalised(values: np.ndarray) -> np.ndarray:
    """Cut at 0, divided by their sum; all 0 if none is above 0."""
    positive = np.maximum(values, 0)
    total = positive.sum(-1, keepdims=True)
    return np.divide(positive, total, out=np.zeros(positive.shape), where=total > 0)


def _group_sum(evidence: Evidence) -> np.ndarray:
    return _normalised(evidence.totals)


def _gated_group_sum(evidence: Evidence) -> np.ndarray:
    if np.isnan(evidence.q_values).any():
        raise OptionError("gated_group_sum compares with controls, and the store has none; pass build --controls DIR")
    return _normalised(evidence.totals) * (evidence.q_values <= significance.Q_VALUE)


def _shrunk(evidence: Evidence) -> np.ndarray:
    rho = evidence.reliability
    if np.isnan(rho):
        raise OptionError("shrunk needs standard errors of the totals; build the store with the default --draws")
    return rho * _group_sum(evidence) + (1 - rho) * _per_work_equal(evidence)


def _per_work_equal(evidence: Evidence) -> np.ndarray:
    return np.broadcast_to(evidence.images / evidence.images.sum(), evidence.totals.shape)


def _similarity(evidence: Evidence) -> np.ndarray:
    if evidence.similarity is None:
        raise OptionError("similarity needs the pictures of the data set")
    return np.broadcast_to(_normalised(evidence.similarity), evidence.totals.shape)


def _shapley(evidence: Evidence) -> np.ndarray:
    if evidence.shapley is None:
        raise OptionError("shapley needs the picture among the queries of a truth with retrained coalitions")
    return np.broadcast_to(_normalised(evidence.shapley), evidence.totals.shape)


@dataclass(frozen=True)
class Estimator:
    """One way to divide."""

    formula: str
    divide: Callable[[Evidence], np.ndarray]
    attribution: bool = True
    """Whether it says anything of influence; the others are baselines, and do not ask whether the model made it."""


DEFAULT_ESTIMATOR = "group_sum"
"""As near to exact Shapley shares as any (`paper/owners.py`). Not who is above chance: verdicts say that."""
ESTIMATORS: dict[str, Estimator] = {
    "group_sum": Estimator("T_g⁺ / Σ_h T_h⁺", _group_sum),
    "gated_group_sum": Estimator("a_g T_g⁺ / Σ_h T_h⁺,  a_g = [q_g ≤ 0.1 against controls]", _gated_group_sum),
    "shrunk": Estimator("ρ T_g⁺ / Σ_h T_h⁺ + (1 − ρ) n_g / Σ_h n_h,  ρ the reliability of the totals", _shrunk),
    "shapley": Estimator("φ_g⁺ / Σ_h φ_h⁺,  φ exact, of retrained coalitions (Wang et al., 2024)", _shapley),
    "similarity": Estimator("s_g⁺ / Σ_h s_h⁺,  s the likeness beyond the usual", _similarity, attribution=False),
    "per_work_equal": Estimator("n_g / Σ_h n_h", _per_work_equal, attribution=False),
}


def shares(estimator: str, evidence: Evidence, *, from_model: bool = True) -> Float[np.ndarray, "*repeats rows"]:
    """Divide one picture: a share for each creator, then `UNATTRIBUTED`, then `BASE_MODEL`.

    Every row of the result adds up to 1 exactly, in any order: shares are multiples of 2⁻⁴⁰.

    Args:
        estimator: Name in `ESTIMATORS`.
        evidence: What is known.
        from_model: Whether the fine-tune explains the picture better than its base; if not, the base has all of it.

    Raises:
        OptionError: The estimator is unknown, or needs what there is not.
    """
    if estimator not in ESTIMATORS:
        raise OptionError(f"estimator {estimator!r} is unknown; expected one of {', '.join(ESTIMATORS)}")
    chosen = ESTIMATORS[estimator]
    found = chosen.divide(evidence)
    if chosen.attribution and not from_model:
        found = np.zeros(found.shape)
    units = np.floor(found * _UNITS).astype(np.int64)
    rest = _UNITS - units.sum(-1)
    left_over = rest < found.shape[-1] + 1  # everything is divided: what rounding left goes to the largest
    largest = np.argmax(found, -1)
    np.put_along_axis(
        units, largest[..., None], np.take_along_axis(units, largest[..., None], -1) + (left_over * rest)[..., None], -1
    )
    rest = np.where(left_over, 0, rest)
    to_base = np.full(rest.shape, chosen.attribution and not from_model)
    rows = [units, np.where(to_base, 0, rest)[..., None], np.where(to_base, rest, 0)[..., None]]
    return np.concatenate(rows, -1) / _UNITS


def whole(
    parts: Float[np.ndarray, "queries *repeats rows"], usage: Float[np.ndarray, " queries"]
) -> Float[np.ndarray, "*repeats rows"]:
    """The statement over queries: Σ_q r_q s_g(q) / Σ_q r_q with usage r, in multiples of 2⁻⁴⁰ that add up to 1."""
    mean = np.tensordot(usage / usage.sum(), parts, axes=1)
    units = np.floor(mean * _UNITS).astype(np.int64)
    largest = np.argmax(mean, -1)[..., None]
    rest = (_UNITS - units.sum(-1))[..., None]
    np.put_along_axis(units, largest, np.take_along_axis(units, largest, -1) + rest, -1)
    return units / _UNITS


def reliability(totals: Float[np.ndarray, " creators"], variance: Float[np.ndarray, " creators"]) -> float:
    """ρ = 1 − mean error variance / variance over creators, within 0 … 1; NaN if the errors are not known."""
    spread = totals.var(ddof=1) if len(totals) > 1 else 0.0
    if np.isnan(variance).any():
        return float("nan")
    if not spread > 0:
        return 0.0
    return float(np.clip(1 - variance.mean() / spread, 0, 1))


def resampled(
    key: Sequence[str | int],
    images: Float[np.ndarray, " creators"],
    totals: Float[np.ndarray, " creators"],
    squares: Float[np.ndarray, " creators"],
    by_batch: Float[np.ndarray, "batches creators"],
    train_variance: Float[np.ndarray, " creators"],
    by_model: Float[np.ndarray, "models creators"] | None = None,
    repeats: int = REPEATS,
) -> Float[np.ndarray, "repeats creators"]:
    """Totals as they could have come out: other draws of the query and of training images, other works of a creator.

    Batches of the query's draws are drawn again with replacement, the same for all creators, and their deviations
    widened by √(b/(b−1)). A sum over many works is close to normal: the draws of the training images, and n works drawn
    again from a creator's own, are normal deviates of the variances measured, in place of a resampling of all works.
    What training again changes is known from the totals of a few models: their deviations from the mean are mixed at
    random, to deviates of Student's t with one degree of freedom less than there are models.

    Repeat r has the same works, training draws and trainings for every picture, as `key` names only draws of its own:
    over many pictures these do not average out.
    """
    batches = len(by_batch)
    moved = np.zeros((repeats, len(totals)))
    if batches > 1:
        drawn = keys.integers(("query batches", *key), repeats * batches, batches).reshape(repeats, batches)
        moved = (by_batch - by_batch.mean(0))[drawn].mean(1) * (batches / (batches - 1)) ** 0.5
    works = images / np.maximum(images - 1, 1) * np.maximum(squares - totals**2 / images, 0)
    deviates = keys.normal(("works and draws",), (repeats, len(totals))).astype(float)
    found = totals + moved + deviates * np.sqrt(train_variance + works)
    if by_model is None:
        return found
    models, free = len(by_model), len(by_model) - 1
    mixed = keys.normal(("models", models), (repeats, models)).astype(float) @ (by_model - by_model.mean(0))
    spread = stats.chi2.ppf(1 - keys.uniform(("spread of models", models), repeats), free) / free
    return found + mixed / np.sqrt(models * free * spread)[:, None]


# Money ----------------------------------------------------------------------------------------------------------------


def amounts(pool: Decimal, currency: str, divided: Sequence[float]) -> list[Decimal]:
    """Divide a sum of money: minor units by largest remainder, so that they add up to the pool; ties to the first.

    Args:
        pool: The sum.
        currency: Code of ISO 4217; decides the smallest unit.
        divided: Shares, of which the sum is 1.

    Raises:
        OptionError: The pool is not a sum of this currency, or shares do not add up.
    """
    smallest = require_money(pool, currency)
    exact = [Fraction(share) for share in divided]
    if sum(exact) != 1:
        raise OptionError("shares do not add up to 1: no money can be divided by them")
    units = int(pool / smallest)
    counts = [int(share * units) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i] * units, i))
    for i in order[: units - sum(counts)]:
        counts[i] += 1
    return [Decimal(count) * smallest for count in counts]


def require_money(pool: Decimal, currency: str) -> Decimal:
    """The currency's smallest unit.

    Raises:
        OptionError: The pool is not a sum of this currency.
    """
    digits = _MINOR_DIGITS.get(currency, 2)
    if len(currency) != 3 or not (currency.isascii() and currency.isalpha() and currency.isupper()):
        raise OptionError(f"currency {currency!r} is no code of ISO 4217; expected three capitals, as EUR")
    smallest = Decimal(1).scaleb(-digits)
    try:
        whole = pool.is_finite() and pool >= 0 and pool % smallest == 0
    except InvalidOperation:
        whole = False
    if not whole or pool >= _LARGEST_POOL:
        found = f"pool is {pool}; expected a sum of {currency} from 0 to below {_LARGEST_POOL}"
        raise OptionError(f"{found}, with {digits} decimals at most")
    return smallest
