from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.capture import generate_budgets

# Multiples in tokens from a number of tokens on: with 4 rows a token, tiles of 256, 128, 64 rows.
STEPS = ((512, 64), (256, 32), (128, 16), (1, 8))

ranges = st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)).map(sorted)


@given(ranges)
def test_ladder_is_dense_aligned_and_within_range(bounds):
    minimum, maximum = bounds
    budgets = generate_budgets(minimum, maximum)
    assert budgets[-1] == maximum
    assert budgets[0] >= minimum
    assert budgets[0] <= max(minimum + 8, minimum * 1.125)
    for low, high in pairwise(budgets):
        assert low < high
        assert low < 64 or high <= low * 1.125
        assert low % next(step for start, step in STEPS if low >= start) == 0


def test_about_eight_rungs_an_octave():
    assert generate_budgets(64, 128) == (64, 72, 80, 88, 96, 104, 112, 120, 128)
    assert len(generate_budgets(64, 16384)) == 8 * 8 + 1


def test_a_whole_ladder_has_tens_of_rungs():
    budgets = generate_budgets(16, 16384)
    assert len(budgets) == 71
    assert budgets[:8] == (16, 24, 32, 40, 48, 56, 64, 72)
    assert budgets[-2:] == (15360, 16384)


def test_worst_padding_of_any_call():
    budgets = generate_budgets(16, 16384)
    padded = {n: next(b for b in budgets if b >= n) for n in range(1, 16385)}
    assert max(padded[n] / n for n in range(64, 16385)) < 1.125
    assert max(padded[n] - n for n in range(9, 64)) < 8


def test_single_budget():
    assert generate_budgets(100, 100) == (100,)
    assert generate_budgets(99, 100) == (100,)


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 64), (64, 0), (-1, 64), (0, 0)])
def test_refuses_non_positive(minimum, maximum):
    with pytest.raises(ValueError, match=rf"minimum={minimum} and maximum={maximum}.*at least 1"):
        generate_budgets(minimum, maximum)


def test_refuses_minimum_above_maximum():
    with pytest.raises(ValueError, match="minimum=65 exceeds maximum=64"):
        generate_budgets(65, 64)
