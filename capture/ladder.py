"""Which rungs a ladder should have: fitted to the sizes of the calls, under a memory cap.

Placing rungs is the k-median problem on a line: a call of n tokens pays for the smallest rung that
holds it, and for eager execution above the largest one. A rung that is not at the size of some call
could be lowered to one, so those sizes are the only candidates, and the least expected cost over
all ladders is found exactly by dynamic programming over (number of rungs, largest rung).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np

Cost = Callable[[int], float]

DEFAULT_MAX_RUNGS = 72  # those of the automatic ladder to 16,384 tokens

# Tokens that an eager token counts for where no cost is given: only what no rung holds is eager.
_EAGER = 1e6
# The table of the dynamic programme has the square of this many entries.
_MAX_CANDIDATES = 2048
_BLOCK = 64


@dataclass(frozen=True)
class MemoryModel:
    """Device bytes of a ladder.

    Attributes:
        bytes_per_token: static buffers and intermediates for each token of the largest rung; the
            other rungs share them.
        bytes_per_rung: one more graph.
        bytes_fixed: whatever the rungs.
    """

    bytes_per_token: float
    bytes_per_rung: float
    bytes_fixed: float = 0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"MemoryModel: {field.name}={value!r} must be a finite number of bytes, at "
                    "least 0; measure it again"
                )

    def total(self, budgets: Collection[int]) -> int:
        """Bytes of the ladder of `budgets`; ValueError if there are none."""
        return sum(self.of(budgets).values())

    def of(self, budgets: Collection[int]) -> dict[int, int]:
        """Bytes of each rung, ascending; the largest carries what all of them share."""
        ascending = _budgets("MemoryModel", budgets)
        graph, largest = math.ceil(self.bytes_per_rung), ascending[-1]
        return {b: graph + (self.shared(b) if b == largest else 0) for b in ascending}

    def shared(self, largest: int) -> int:
        """Bytes that all rungs together need once, under a largest rung of `largest` tokens."""
        return math.ceil(self.bytes_fixed + self.bytes_per_token * largest)

    def max_rungs(self, largest: int, max_bytes: int) -> int | None:
        """Rungs up to `largest` that `max_bytes` pays for; None if graphs are free."""
        left = max_bytes - self.shared(largest)
        graph = math.ceil(self.bytes_per_rung)
        if left < 0:
            return 0
        return left // graph if graph else None


def fit_budgets(
    histogram: Mapping[int, float],
    *,
    max_budget: int,
    max_rungs: int | None = None,
    max_bytes: int | None = None,
    memory: MemoryModel | None = None,
    cost: Cost | None = None,
    eager_cost: Cost | None = None,
    align: int = 8,
) -> tuple[int, ...]:
    """The ladder of least expected cost for calls of these sizes; of equal ones the shortest.

    Exact over rungs at the sizes of `histogram`, rounded up to `align`. (More than 2,048 of them
    are first rounded up further.)

    Args:
        histogram: tokens of a call -> how often, in any unit.
        max_budget: tokens of the largest rung allowed. Larger calls do not matter.
        max_rungs: None for 72.
        max_bytes: device memory for all rungs, which may call for a smaller largest rung.
        memory: what rungs take; needed with `max_bytes`.
        cost: of a replay of the rung of so many tokens; None for the tokens.
        eager_cost: of an eager call of so many tokens, in the same unit; None for more than any
            replay.
        align: tokens; budgets are multiples of it, but none exceeds `max_budget`.

    Returns:
        Token budgets, ascending, at least one.

    Raises:
        ValueError: an empty histogram, one above `max_budget` throughout, an argument that is not
            positive, a cost that is no number, or a cap that is too small for any rung.
    """
    max_rungs = DEFAULT_MAX_RUNGS if max_rungs is None else max_rungs
    for name, value in (("max_budget", max_budget), ("max_rungs", max_rungs), ("align", align)):
        if value < 1:
            raise ValueError(f"fit_budgets: {name}={value!r} must be at least 1")
    tokens, counts = _calls("fit_budgets", histogram)
    inside = tokens <= max_budget
    if not inside.any():
        raise ValueError(
            f"fit_budgets: no call has at most max_budget={max_budget} tokens, the smallest has "
            f"{tokens[0]}; raise max_budget to {tokens[0]} or more"
        )
    tokens, counts = tokens[inside], counts[inside]
    budgets, group = _candidates(tokens, max_budget, align)
    most = _affordable(budgets, max_rungs, max_bytes, memory)

    costs = _evaluate("fit_budgets", "cost", cost or float, budgets)
    eager_costs = _evaluate("fit_budgets", "eager_cost", eager_cost or _assumed_eager, tokens)
    eager_up_to = np.cumsum(np.bincount(group, weights=counts * eager_costs))
    above = eager_up_to[-1] - eager_up_to
    chosen = _cheapest(costs, np.bincount(group, weights=counts), above, most)
    return tuple(int(budgets[index]) for index in chosen)


def expected_cost(
    histogram: Mapping[int, float],
    budgets: Collection[int],
    cost: Cost | None = None,
    eager_cost: Cost | None = None,
) -> float:
    """Mean cost of a call under the ladder of `budgets`; costs as for `fit_budgets`.

    Raises:
        ValueError: an empty histogram or ladder, or sizes, counts or costs that are not positive.
    """
    replays, eager, counts, costs = _shares("expected_cost", histogram, budgets, cost, eager_cost)
    return float((replays @ costs + eager[-1]) / counts)


def least_useful(
    histogram: Mapping[int, float],
    budgets: Collection[int],
    cost: Cost | None = None,
    eager_cost: Cost | None = None,
) -> int:
    """The budget whose removal raises the expected cost least; of equal ones the smallest.

    Without a rung its calls move to the next larger one; those of the largest become eager.

    Raises:
        ValueError: as `expected_cost`.
    """
    replays, eager, _, costs = _shares("least_useful", histogram, budgets, cost, eager_cost)
    moved = np.append(replays[:-1] * costs[1:], eager[-2])
    return sorted(set(budgets))[int(np.argmin(moved - replays * costs))]


def _shares(
    operation: str,
    histogram: Mapping[int, float],
    budgets: Collection[int],
    cost: Cost | None,
    eager_cost: Cost | None,
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Calls of each rung; eager costs of the largest rung's and of larger calls; all calls; costs.

    The second has two entries: what the calls of the largest rung would cost eagerly, and what
    those above it do.
    """
    ascending = np.array(_budgets(operation, budgets))
    tokens, counts = _calls(operation, histogram)
    group = np.searchsorted(ascending, tokens)
    replays = np.bincount(group, weights=counts, minlength=len(ascending) + 1)
    outside = group >= len(ascending) - 1
    eager_costs = _evaluate(operation, "eager_cost", eager_cost or _assumed_eager, tokens[outside])
    eager = np.bincount(
        group[outside], weights=counts[outside] * eager_costs, minlength=len(ascending) + 1
    )
    costs = _evaluate(operation, "cost", cost or float, ascending)
    return replays[:-1], eager[-2:], counts.sum(), costs


def _cheapest(
    costs: np.ndarray, weights: np.ndarray, above: np.ndarray, most: np.ndarray
) -> list[int]:
    """Indices of the best ladder: at most `most[j]` rungs if j is the largest.

    `costs` of a call on each rung, `weights` of the calls that end there, `above` [j] the cost of
    all calls beyond j.
    """
    served = np.cumsum(weights)
    blocks = []  # rows j of the cost of all calls between rungs i and j; infinite unless i < j
    for start in range(0, len(costs), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(costs)))
        between = costs[rows, None] * (served[rows, None] - served[: rows[-1] + 1])
        between[np.arange(rows[-1] + 1) >= rows[:, None]] = np.inf
        blocks.append(between)

    layers = [costs * served]  # layers[k - 1][j]: k rungs, the largest j, for all calls up to j
    best, count, last = np.inf, 0, 0
    for k in range(1, int(most.max()) + 1):
        if k > 1:
            below = layers[-1]
            layers.append(np.concatenate([(b + below[: b.shape[1]]).min(1) for b in blocks]))
        totals = np.where(most >= k, layers[-1] + above, np.inf)
        if totals.min() < best:
            best, count, last = totals.min(), k, int(np.argmin(totals))

    chosen = [last]
    for layer in layers[: count - 1][::-1]:
        block, row = divmod(chosen[-1], _BLOCK)
        between = blocks[block][row]
        chosen.append(int(np.argmin(between + layer[: len(between)])))
    return chosen[::-1]


def _candidates(tokens: np.ndarray, max_budget: int, align: int) -> tuple[np.ndarray, np.ndarray]:
    """Budgets that could be rungs, ascending, and for each size the index of the next of them."""
    while True:
        rounded = np.minimum(-(-tokens // align) * align, max_budget)
        budgets, group = np.unique(rounded, return_inverse=True)
        if len(budgets) <= _MAX_CANDIDATES:
            return budgets, group
        align *= 2


def _affordable(
    budgets: np.ndarray, max_rungs: int, max_bytes: int | None, memory: MemoryModel | None
) -> np.ndarray:
    """How many rungs there may be under each largest one."""
    most = np.minimum(np.arange(1, len(budgets) + 1), max_rungs)
    if max_bytes is None:
        return most
    if memory is None:
        raise ValueError(
            f"fit_budgets: max_bytes={max_bytes} needs memory, the MemoryModel of the rungs; pass "
            "both or neither"
        )
    for index, budget in enumerate(budgets.tolist()):
        affordable = memory.max_rungs(budget, max_bytes)
        if affordable is not None:
            most[index] = min(most[index], affordable)
    if not most.any():
        least = int(budgets[0])
        raise ValueError(
            f"fit_budgets: max_bytes={max_bytes} is too small for any rung; the smallest one that "
            f"calls can use, {least} tokens, needs max_bytes={memory.total([least])}"
        )
    return most


def _calls(operation: str, histogram: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes ascending, and how often each occurs."""
    if not histogram:
        raise ValueError(f"{operation}: the histogram is empty; at least one call is needed")
    for tokens, count in histogram.items():
        if not isinstance(tokens, Integral) or tokens < 1:
            raise ValueError(
                f"{operation}: the histogram has calls of {tokens!r} tokens; sizes must be whole "
                "numbers of at least 1"
            )
        if not isinstance(count, Real) or not 0 < count < math.inf:
            raise ValueError(
                f"{operation}: the histogram says {count!r} for {tokens} tokens; it must be finite "
                "and above 0: leave sizes out that do not occur"
            )
    tokens = np.array(sorted(histogram), dtype=np.int64)
    return tokens, np.array([histogram[t] for t in tokens.tolist()], dtype=np.float64)


def _budgets(operation: str, budgets: Collection[int]) -> list[int]:
    ascending = sorted(set(budgets))
    if not ascending or ascending[0] < 1:
        raise ValueError(
            f"{operation}: budgets={list(budgets)} must hold at least one, each at least 1 token"
        )
    return ascending


def _evaluate(operation: str, name: str, cost: Cost, tokens: np.ndarray) -> np.ndarray:
    values = np.array([cost(t) for t in tokens.tolist()], dtype=np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{operation}: {name}({tokens[first]})={values[first]} must be finite and at least 0"
        )
    return values


def _assumed_eager(tokens: int) -> float:
    return _EAGER * tokens
