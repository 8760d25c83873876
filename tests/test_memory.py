import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from influence import memory
from influence.errors import OptionError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("64KiB", 65536),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text, count):
    assert memory.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "8", "GiB", "-8GiB", "8 gib", "8GiBs", "1e9B", "0GiB", "nanG", "8GiB 8GiB", "٨G"])
def test_what_is_no_size_is_refused_in_one_line(text):
    with pytest.raises(OptionError, match="expected a size such as 8GiB") as error:
        memory.parse_size(text)
    assert "\n" not in str(error.value)


@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 2000), st.integers(10**6, 10**11))
def test_the_largest_batch_that_fits_is_chosen_and_none_that_is_tried_is_larger(base, per_row, most, budget):
    tried = []

    def cost(rows):
        tried.append(rows)
        return base + per_row * rows

    largest = (0.9 * budget - base) // per_row
    if largest < 1:
        with pytest.raises(OptionError, match="one with one row in a batch takes"):
            memory.rows_within(budget, cost, most)
        assert max(tried) == 1
        return
    assert memory.rows_within(budget, cost, most) == min(largest, most)
    assert max(tried) <= min(largest, most)


def test_peak_counts_what_was_freed_again():
    device = torch.device("cpu")
    before = memory.peak(lambda: None, device)
    held = memory.peak(lambda: np.ones(25_000_000), device)
    assert 190e6 < held - before < 220e6
    assert memory.peak(lambda: None, device) - before < 20e6
