"""Axioms of shares, as tests; money to the cent."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from influence import royalties
from influence.errors import OptionError
from influence.royalties import ESTIMATORS, Evidence

G = 5
TOTALS = st.lists(st.floats(-1e3, 1e3), min_size=G, max_size=G).map(np.array)


def evidence(totals, images=None, q=None, **known):
    totals = np.asarray(totals, float)
    images = np.full(totals.shape[-1], 10.0) if images is None else np.asarray(images, float)
    q = np.zeros(totals.shape) if q is None else np.asarray(q, float)
    known = {
        "reliability": 0.5,
        "similarity": np.ones(len(images)),
        "shapley": totals[..., :],
    } | known
    return Evidence(images, totals, q, **known)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=60, deadline=None)
@given(totals=TOTALS, q=st.lists(st.floats(0, 1), min_size=G, max_size=G), from_model=st.booleans())
def test_shares_sum_to_one_exactly_in_any_order_and_none_is_negative(estimator, totals, q, from_model):
    found = royalties.shares(estimator, evidence(totals, q=q), from_model=from_model)
    assert len(found) == G + 2 and (found >= 0).all()
    for order in (slice(None), slice(None, None, -1), np.argsort(found)):
        assert sum(found[order].tolist()) == 1.0
    if not from_model and ESTIMATORS[estimator].attribution:
        assert found[-1] == 1.0
    else:
        assert found[-1] == 0.0


@pytest.mark.parametrize("estimator", ["group_sum", "gated_group_sum", "shapley"])
def test_null_player_symmetry_order_and_monotonicity(estimator):
    base = [3.0, 1.0, 0.0, 1.0, -2.0]
    found = royalties.shares(estimator, evidence(base))
    assert found[2] == found[4] == 0, "null and negative players"
    assert found[1] == pytest.approx(found[3], abs=1e-11), "symmetry"
    turned = royalties.shares(estimator, evidence(base[::-1]))
    np.testing.assert_allclose(turned[:G], found[:G][::-1], atol=1e-11)
    more = royalties.shares(estimator, evidence([3.0, 1.5, 0.0, 1.0, -2.0]))
    assert more[1] > found[1] and more[0] < found[0]


def test_dividing_a_catalogue_between_two_names_changes_no_sum():
    """While both parts are on the same side of 0; a part below 0 is cut, and the audit shows it."""
    whole = royalties.shares("group_sum", evidence([3.0, 1.0], images=[10, 10]))
    parts = royalties.shares("group_sum", evidence([2.0, 1.0, 1.0], images=[6, 4, 10]))
    assert parts[0] + parts[1] == pytest.approx(whole[0], abs=1e-11)


def test_the_gate_leaves_what_is_not_more_than_chance_to_nobody():
    found = royalties.shares("gated_group_sum", evidence([3.0, 1.0], q=[0.05, 0.4]))
    np.testing.assert_allclose(found, [0.75, 0, 0.25, 0], atol=1e-11)
    with pytest.raises(OptionError, match="compares with controls, and the store has none"):
        royalties.shares("gated_group_sum", evidence([3.0, 1.0], q=[np.nan, np.nan]))


def test_shrinking_goes_from_equal_per_work_to_attribution():
    for rho, expected in ((0.0, [0.25, 0.75]), (1.0, [1.0, 0.0]), (0.5, [0.625, 0.375])):
        found = royalties.shares("shrunk", evidence([2.0, -1.0], images=[5, 15], reliability=rho))
        np.testing.assert_allclose(found[:2], expected, atol=1e-11)


def test_estimators_say_what_they_need():
    for name, lacking in (("similarity", {"similarity": None}), ("shapley", {"shapley": None})):
        with pytest.raises(OptionError, match="needs the picture"):
            royalties.shares(name, evidence([1.0, 2.0], **lacking))
    with pytest.raises(OptionError, match="expected one of group_sum, gated_group_sum"):
        royalties.shares("softmax", evidence([1.0]))


def test_repeats_divide_like_single_totals():
    totals = np.random.Generator(np.random.PCG64(0)).normal(size=(7, G))
    for estimator in ("group_sum", "shrunk", "per_work_equal", "similarity"):
        known = {"shapley": None}
        found = royalties.shares(estimator, evidence(totals, **known))
        for row, expected in zip(found, totals, strict=True):
            np.testing.assert_array_equal(row, royalties.shares(estimator, evidence(expected, **known)))


def several(models, query="a"):
    """Totals of two creators, of whom the models agree on one, resampled."""
    zero, by_model = np.zeros(2), np.full((models, 2), 5.0)
    by_model[:, 0] = 3 + np.linspace(-1, 1, models)
    again = royalties.resampled(
        (query,), np.ones(2), by_model.mean(0), by_model.mean(0) ** 2, np.zeros((2, 2)), zero, by_model=by_model,
        repeats=200_000,
    )  # fmt: skip
    return again, by_model[:, 0].std(ddof=1) / models**0.5


@pytest.mark.parametrize("models", [2, 3, 5])
def test_totals_of_a_few_models_vary_as_students_t_does(models):
    again, se = several(models)
    low, high = np.quantile(again[:, 0], [0.025, 0.975])
    np.testing.assert_allclose([high - 3, 3 - low], se * stats.t.ppf(0.975, models - 1), rtol=0.1)
    np.testing.assert_allclose(again[:, 1], 5)


def test_training_again_and_other_works_are_the_same_for_all_pictures():
    (first, _), (second, _) = several(3, "a"), several(3, "b")
    assert (first == second).all(), "so that over many pictures they do not average out"
    images, totals, squares, none = np.full(2, 5.0), np.array([3.0, 5.0]), np.array([9.0, 9.0]), np.zeros((2, 2))
    batches = np.array([[2.0, 5.0], [4.0, 5.0]])
    one, other = (
        royalties.resampled((name,), images, totals, squares, none, np.array([0.1, 0.2])) for name in ("a", "b")
    )
    assert (one == other).all()
    one, other = (
        royalties.resampled((name,), images, totals, squares, batches, np.array([0.1, 0.2])) for name in ("a", "b")
    )
    assert (one[:, 0] != other[:, 0]).any() and (one[:, 1] == other[:, 1]).all(), "draws of a picture are its own"


def test_resampled_totals_vary_by_draws_and_works():
    rng = np.random.Generator(np.random.PCG64(1))
    images, by_batch = np.array([50.0, 5.0]), rng.normal(size=(8, 2))
    totals, sd = by_batch.mean(0), 0.3
    squares = images * sd**2 + totals**2 / images
    again = royalties.resampled(("a",), images, totals, squares, by_batch, np.array([0.1, 0.2]), repeats=20_000)
    works = images / (images - 1) * images * sd**2
    expected = by_batch.var(0, ddof=1) / 8 + np.array([0.1, 0.2]) + works
    np.testing.assert_allclose(again.var(0), expected, rtol=0.05)
    np.testing.assert_allclose(again.mean(0), totals, atol=0.06)


def test_a_statement_weighs_pictures_by_use_and_sums_to_one():
    parts = np.array([[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = royalties.whole(parts, np.array([3.0, 1.0]))
    np.testing.assert_allclose(found, [0.5625, 0.1875, 0, 0.25], atol=1e-11)
    assert sum(found.tolist()) == 1.0


@settings(max_examples=200, deadline=None)
@given(
    totals=TOTALS,
    cents=st.integers(0, 10**12),
    currency=st.sampled_from(["EUR", "JPY", "KWD"]),
)
def test_money_adds_up_to_the_smallest_unit(totals, cents, currency):
    smallest = {"EUR": Decimal("0.01"), "JPY": Decimal(1), "KWD": Decimal("0.001")}[currency]
    divided = royalties.shares("group_sum", evidence(totals)).tolist()
    found = royalties.amounts(cents * smallest, currency, divided)
    assert sum(found) == cents * smallest
    for amount, share in zip(found, divided, strict=True):
        assert amount % smallest == 0 and abs(amount - Decimal(share) * cents * smallest) < smallest


def test_money_refuses_what_is_no_sum():
    for pool, currency, message in (
        (Decimal("10.005"), "EUR", "with 2 decimals at most"),
        (Decimal(-1), "EUR", "expected a sum of EUR"),
        (Decimal("NaN"), "EUR", "expected a sum"),
        (Decimal("1.5"), "JPY", "with 0 decimals"),
        (Decimal(1), "euro", "no code of ISO 4217"),
    ):
        with pytest.raises(OptionError, match=message):
            royalties.amounts(pool, currency, [0.5, 0.5])
    with pytest.raises(OptionError, match="do not add up"):
        royalties.amounts(Decimal(1), "EUR", [0.5, 0.4])


def test_ten_copies_of_works_gain_less_than_half_more():
    """Copies count as one work; they are in H too, which lowers the score of each."""
    import pandas as pd
    import torch

    from influence import curvature, scoring

    rng = np.random.Generator(np.random.PCG64(2))
    works, k = 60, 24
    phi = rng.normal(size=(works, k)).astype(np.float32)
    query = torch.tensor(phi[:6].mean(0, keepdims=True) + 0.1 * rng.normal(size=(1, k)).astype(np.float32))

    def total(copies):
        rows = np.concatenate([phi] + [phi[:6]] * copies)
        ids = [f"{i:03}" for i in range(len(rows))]
        clusters = dict(zip(ids, [*range(works), *(list(range(6)) * copies)], strict=True))
        owners = pd.Series(["mine" if int(clusters[item_id]) < 6 else "theirs" for item_id in ids])
        groups = scoring.shared(scoring.groups(pd.Series(ids), owners), {i: str(c) for i, c in clusters.items()})
        assert groups.files.sum(0).tolist() == pytest.approx([6, works - 6])
        factored = curvature.curvature([(rows, np.ones(len(rows)))], dim=k, damping=0.1, num_rows=len(rows))
        v = scoring.precondition(scoring.METHODS["trak"], query, factored, float(len(rows)))
        tau = (v @ torch.tensor(rows).double().T).numpy()
        return scoring.group_totals(groups, groups.places(ids), tau)[0, 0]

    assert total(0) > 0
    assert 0 < total(10) / total(0) <= 1.5


def test_near_duplicates_under_two_names_share_one_credit():
    import pandas as pd

    from influence import scoring

    ids, owners = pd.Series(["a", "b", "b", "c"]), pd.Series(["x", "y", "y", "x"])
    groups = scoring.shared(scoring.groups(ids, owners), {"a": "1", "b": "1", "c": "2"})
    totals = scoring.group_totals(groups, groups.places(["a", "b", "c"]), np.array([[3.0, 1.0, 5.0]]))
    np.testing.assert_allclose(totals, [[5 + 2 / 3, 2 * 2 / 3]])


def test_totals_of_unknown_error_are_not_shrunk():
    rho = royalties.reliability(np.array([2.0, -1.0]), np.array([0.1, np.nan]))
    assert np.isnan(rho)
    with pytest.raises(OptionError, match="shrunk needs standard errors"):
        royalties.shares("shrunk", evidence([2.0, -1.0], reliability=rho))
