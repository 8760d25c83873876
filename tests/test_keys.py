import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence import keys

PARTS = st.one_of(st.text(max_size=8), st.integers(-(2**70), 2**70))
KEYS = st.lists(PARTS, min_size=1, max_size=4).map(tuple)


@given(KEYS, KEYS)
def test_different_keys_have_different_digests(a, b):
    assert (keys.digest(*a) == keys.digest(*b)) == (a == b and [type(x) for x in a] == [type(x) for x in b])


def test_streams_have_not_moved():
    assert keys.digest("a", 1).hex() == "64c94e8ba6a60960c8f0d5c4ee7c25f8"
    assert keys.bits(("a", 1), 2).tolist() == [2933268875019558384, 8866221266410663119]
    assert keys.signs(("a", 1), 8).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]
    assert keys.integers(("a", 1), 4, 100).tolist() == [15, 48, 88, 42]
    np.testing.assert_allclose(keys.normal(("a", 1), (3,)), [0.43931198, -1.02259374, -0.39161551], rtol=1e-6)


def test_a_longer_stream_starts_with_the_shorter_one():
    assert (keys.bits(("a",), 100)[:10] == keys.bits(("a",), 10)).all()


@pytest.mark.parametrize("count", [1, 7, 64, 65])
def test_signs_are_signs_of_any_count(count):
    assert set(keys.signs(("s", count), count).tolist()) <= {-1, 1}
    assert len(keys.signs(("s", count), count)) == count


def test_moments_are_those_of_the_distributions_within_standard_errors():
    n = 200_000
    normal = keys.normal(("n",), (n,)).astype(float)
    uniform = keys.uniform(("u",), n)
    signs = keys.signs(("s",), n).astype(float)
    for values, mean, variance, fourth in ((normal, 0, 1, 3), (uniform, 0.5, 1 / 12, 1 / 80), (signs, 0, 1, 1)):
        centred = values - mean
        assert abs(centred.mean()) < 5 * (variance / n) ** 0.5
        assert abs((centred**2).mean() - variance) <= 5 * ((fourth - variance**2) / n) ** 0.5 + 1e-12


def test_uniform_numbers_lie_below_one_and_integers_below_their_bound():
    assert keys.uniform(("u",), 10_000).max() < 1
    assert set(keys.integers(("i",), 10_000, 7).tolist()) == set(range(7))
