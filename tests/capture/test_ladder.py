import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.capture.ladder import MemoryModel, expected_cost, fit_budgets, least_useful

TRAFFIC = {8: 5, 16: 1, 40: 2, 64: 4}
MEMORY = MemoryModel(bytes_per_token=10, bytes_per_rung=100, bytes_fixed=1000)

counts = st.floats(0.01, 100, allow_nan=False)
histograms = st.dictionaries(st.integers(1, 90), counts, min_size=1, max_size=9)
# One cost for every number of tokens up to 104, in no order: measured curves are not smooth.
curves = st.lists(st.floats(0, 50), min_size=105, max_size=105)


def mean_cost(histogram, budgets, cost, eager_cost):
    """The definition, call by call."""
    total = 0.0
    for tokens, count in histogram.items():
        holding = [b for b in budgets if b >= tokens]
        total += count * (cost(min(holding)) if holding else eager_cost(tokens))
    return total / sum(histogram.values())


class TestMemoryModel:
    def test_largest_rung_carries_what_is_shared(self):
        assert MEMORY.of((64, 16)) == {16: 100, 64: 100 + 640 + 1000}
        assert MEMORY.total((64, 16)) == 1840

    def test_bytes_are_whole_and_add_up(self):
        memory = MemoryModel(0.3, 0.5, 0.1)
        assert memory.of([1, 2]) == {1: 1, 2: 1 + 1}
        assert memory.total([1, 2]) == 3

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["bytes_per_token", "bytes_per_rung", "bytes_fixed"])
    def test_refuses_bytes(self, name, value):
        sizes = {"bytes_per_token": 1, "bytes_per_rung": 1, name: value}
        with pytest.raises(ValueError, match=rf"MemoryModel: {name}={value!r} must be a finite"):
            MemoryModel(**sizes)

    @pytest.mark.parametrize("budgets", [[], [0, 8]])
    def test_refuses_budgets(self, budgets):
        with pytest.raises(ValueError, match="must hold at least one, each at least 1 token"):
            MEMORY.total(budgets)


class TestFit:
    @given(histograms, curves, curves, st.integers(1, 9), st.integers(1, 5), st.integers(30, 100))
    def test_no_ladder_is_cheaper(self, histogram, curve, eager, align, max_rungs, max_budget):
        cost, eager_cost = curve.__getitem__, eager.__getitem__
        candidates = {min(-(-t // align) * align, max_budget) for t in histogram if t <= max_budget}
        if not candidates:
            return
        fitted = fit_budgets(
            histogram,
            max_budget=max_budget,
            max_rungs=max_rungs,
            cost=cost,
            eager_cost=eager_cost,
            align=align,
        )
        assert set(fitted) <= candidates
        assert 1 <= len(fitted) <= max_rungs
        assert list(fitted) == sorted(set(fitted))
        best = min(
            mean_cost(histogram, ladder, cost, eager_cost)
            for size in range(1, max_rungs + 1)
            for ladder in combinations(candidates, size)
        )
        assert mean_cost(histogram, fitted, cost, eager_cost) == pytest.approx(best)

    @given(histograms, curves, st.integers(0, 50), st.integers(0, 300), st.integers(0, 1000))
    def test_no_ladder_under_the_cap_is_cheaper(self, histogram, eager, token, rung, spare):
        memory = MemoryModel(token, rung, 77)
        candidates = sorted({-(-t // 8) * 8 for t in histogram})
        max_bytes = memory.total(candidates[:1]) + spare
        eager_cost = eager.__getitem__
        fitted = fit_budgets(
            histogram, max_budget=96, max_bytes=max_bytes, memory=memory, eager_cost=eager_cost
        )
        assert memory.total(fitted) <= max_bytes
        best = min(
            mean_cost(histogram, ladder, float, eager_cost)
            for size in range(1, len(candidates) + 1)
            for ladder in combinations(candidates, size)
            if memory.total(ladder) <= max_bytes
        )
        assert mean_cost(histogram, fitted, float, eager_cost) == pytest.approx(best)

    def test_hand_made(self):
        assert fit_budgets(TRAFFIC, max_budget=64) == (8, 16, 40, 64)
        assert fit_budgets(TRAFFIC, max_budget=64, max_rungs=3) == (8, 40, 64)
        assert fit_budgets(TRAFFIC, max_budget=64, max_rungs=2) == (16, 64)
        assert fit_budgets(TRAFFIC, max_budget=64, max_rungs=1) == (64,)

    def test_equal_ladders_give_the_shortest(self):
        assert fit_budgets(TRAFFIC, max_budget=64, cost=lambda tokens: 3) == (64,)

    def test_without_a_cost_nothing_that_a_rung_can_hold_is_eager(self):
        assert fit_budgets({8: 1e5, 1000: 1}, max_budget=1000, max_rungs=1) == (1000,)

    def test_cheap_eager_calls_leave_the_largest_rung_out(self):
        fitted = fit_budgets({8: 100, 1000: 1}, max_budget=1000, max_rungs=1, eager_cost=float)
        assert fitted == (8,)

    def test_a_cap_lowers_the_largest_rung(self):
        options = {"max_budget": 64, "memory": MEMORY}
        assert fit_budgets(TRAFFIC, **options, max_bytes=2040) == (8, 16, 40, 64)
        assert fit_budgets(TRAFFIC, **options, max_bytes=2039) == (8, 40, 64)
        assert fit_budgets(TRAFFIC, **options, max_bytes=1739) == (8, 16, 40)
        assert fit_budgets(TRAFFIC, **options, max_bytes=1180) == (8,)
        assert fit_budgets(TRAFFIC, **options, max_bytes=9999, max_rungs=2) == (16, 64)

    def test_budgets_are_aligned_but_within_max_budget(self):
        traffic = {3: 1, 60: 1, 97: 1, 200: 9}
        assert fit_budgets(traffic, max_budget=100, align=16) == (16, 64, 100)
        assert fit_budgets({3: 1}, max_budget=5) == (5,)

    def test_72_rungs_by_default(self):
        traffic = {8 * n: 1 for n in range(1, 101)}
        assert len(fit_budgets(traffic, max_budget=800)) == 72
        assert len(fit_budgets(traffic, max_budget=800, max_rungs=100)) == 100

    def test_takes_counters_of_numpy_values(self):
        traffic = Counter(np.array([8, 8, 64]).tolist())
        assert fit_budgets(traffic, max_budget=64) == (8, 64)
        assert fit_budgets({np.int64(8): np.float32(2)}, max_budget=64) == (8,)

    def test_fast_enough_for_thousands_of_sizes(self):
        random = np.random.default_rng(0)
        traffic = Counter(random.integers(1, 16_385, 20_000).tolist())
        took = []
        for _ in range(3):
            start = time.process_time()
            fitted = fit_budgets(traffic, max_budget=16_384)
            took.append(time.process_time() - start)
        assert len(fitted) == 72
        assert min(took) < 1  # 0.2 s on a machine with nothing else to do

    def test_more_sizes_than_candidates(self):
        traffic = dict.fromkeys(range(1, 60_000, 7), 1.0)
        fitted = fit_budgets(traffic, max_budget=60_000, max_rungs=10)
        assert len(fitted) == 10
        assert fitted[-1] >= max(traffic)
        even = tuple(range(6000, 60_001, 6000))
        assert expected_cost(traffic, fitted) < 1.001 * expected_cost(traffic, even)

    @pytest.mark.parametrize("name", ["max_budget", "max_rungs", "align"])
    def test_refuses_limits(self, name):
        with pytest.raises(ValueError, match=f"fit_budgets: {name}=0 must be at least 1"):
            fit_budgets(TRAFFIC, **{"max_budget": 64, name: 0})

    def test_refuses_a_cap_for_no_rung(self):
        message = r"max_bytes=1179 is too small .* 8 tokens, needs max_bytes=1180"
        with pytest.raises(ValueError, match=message):
            fit_budgets(TRAFFIC, max_budget=64, max_bytes=1179, memory=MEMORY)

    def test_refuses_a_cap_without_a_model(self):
        with pytest.raises(ValueError, match=r"max_bytes=5 needs memory.*both or neither"):
            fit_budgets(TRAFFIC, max_budget=64, max_bytes=5)

    def test_refuses_traffic_above_max_budget(self):
        with pytest.raises(ValueError, match=r"max_budget=7 tokens, the smallest has 8; raise"):
            fit_budgets(TRAFFIC, max_budget=7)


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ({}, "the histogram is empty"),
        ({0: 1}, "calls of 0 tokens"),
        ({-3: 1}, "calls of -3 tokens"),
        ({2.5: 1}, r"calls of 2\.5 tokens"),
        ({"64": 1}, "calls of '64' tokens"),
        ({64: 0}, "says 0 for 64 tokens"),
        ({64: -1.5}, r"says -1\.5 for 64 tokens"),
        ({64: float("nan")}, "says nan for 64 tokens"),
        ({64: float("inf")}, "says inf for 64 tokens"),
        ({64: "2"}, "says '2' for 64 tokens"),
    ],
)
def test_refuses_histogram(histogram, message):
    for operation in (expected_cost, least_useful):
        with pytest.raises(ValueError, match=f"{operation.__name__}: .*{message}"):
            operation(histogram, (64,))
    with pytest.raises(ValueError, match=f"fit_budgets: .*{message}"):
        fit_budgets(histogram, max_budget=64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_refuses_costs(value):
    for name in ("cost", "eager_cost"):
        message = rf"{name}\(64\)={float(value)} must be finite"
        costs = {name: lambda tokens: value if tokens == 64 else 1}
        with pytest.raises(ValueError, match=f"fit_budgets: {message}"):
            fit_budgets(TRAFFIC, max_budget=64, **costs)
        for operation in (expected_cost, least_useful):
            with pytest.raises(ValueError, match=f"{operation.__name__}: {message}"):
                operation(TRAFFIC, (8, 64), **costs)


@pytest.mark.parametrize("operation", [expected_cost, least_useful])
def test_refuses_no_budgets(operation):
    with pytest.raises(ValueError, match=r"budgets=\[\] must hold at least one"):
        operation(TRAFFIC, ())


@given(histograms, st.sets(st.integers(1, 100), min_size=1, max_size=6), curves, curves)
def test_expected_cost(histogram, budgets, curve, eager):
    cost, eager_cost = curve.__getitem__, eager.__getitem__
    expected = mean_cost(histogram, budgets, cost, eager_cost)
    assert expected_cost(histogram, budgets, cost, eager_cost) == pytest.approx(expected)


def test_expected_cost_is_a_mean():
    assert expected_cost({8: 3, 100: 1}, (16, 8), eager_cost=lambda tokens: 400) == 106
    assert expected_cost({8: 6, 100: 2}, (16, 8), eager_cost=lambda tokens: 400) == 106


# Whole numbers are exact, so that ties are ties.
whole_curves = st.lists(st.integers(0, 5), min_size=105, max_size=105)
whole_histograms = st.dictionaries(st.integers(1, 90), st.integers(1, 3), min_size=1, max_size=6)


@given(
    whole_histograms,
    st.sets(st.integers(1, 100), min_size=2, max_size=6),
    whole_curves,
    whole_curves,
)
def test_least_useful(histogram, budgets, curve, eager):
    cost, eager_cost = curve.__getitem__, eager.__getitem__

    def without(budget):
        rest = sum(histogram.values()) * mean_cost(histogram, budgets - {budget}, cost, eager_cost)
        return round(rest), budget

    assert least_useful(histogram, budgets, cost, eager_cost) == min(map(without, budgets))[1]


def test_least_useful_of_a_few():
    assert least_useful({8: 1}, (16, 8, 64)) == 16
    assert least_useful(TRAFFIC, (8, 16, 40, 64)) == 16
    assert least_useful({8: 1}, (8,)) == 8
