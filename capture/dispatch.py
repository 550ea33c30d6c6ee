"""Which calls serve a batch of items: one replay, several, or eager, whatever costs least."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from .cost import Costs, EagerCurve, Load, Terms
from .packing import (
    CHEAPER,
    LIMITS,
    Batch,
    Call,
    Runs,
    absorb,
    best_fit_decreasing,
    call_of,
    exact,
    exceeded,
    fewest_calls,
    holding,
    improve,
    room_of,
    total_of,
    within,
)
from .protocol import EncoderItemSpec, RungLimits

# Up to so many items every division is looked at (3^N steps), and
_EXACT_ITEMS = 6
# up to so many, and in so few calls, changes of single items.
_LOCAL_ITEMS, _LOCAL_CALLS = 16, 8
# Places where eager calls may begin or end when items are divided in order.
_EAGER_CUTS = 32


def plan(
    items: Sequence[EncoderItemSpec], rungs: Sequence[RungLimits], costs: Costs
) -> list[Batch]:
    """`Dispatcher(rungs, costs).plan(items)`, for a single plan."""
    return Dispatcher(rungs, costs).plan(items)


class Dispatcher:
    """Plans calls for any items on one ladder, under one set of costs.

    Args:
        rungs: ascending in every limit.
        costs: what replays and eager calls cost.

    Raises:
        ValueError: no rungs, or rungs whose limits shrink.
    """

    def __init__(self, rungs: Sequence[RungLimits], costs: Costs):
        if not rungs:
            raise ValueError("Dispatcher: rungs is empty; at least one rung is needed")
        rooms = [room_of(rung) for rung in rungs]
        for small, large in pairwise(rooms):
            shrunk = exceeded(Load(*small, 0), large)
            if shrunk is not None:
                raise ValueError(
                    f"Dispatcher: {shrunk} shrinks from {small} to {large} ({', '.join(LIMITS)}); "
                    "pass rungs that ascend in every limit"
                )
        self.rungs = tuple(rungs)
        self.costs = costs
        self._room = rooms[-1]
        self._rooms = rooms
        self._columns = tuple(zip(*rooms, strict=True))
        # Choices go by it, so that every eager call of a plan, alone or in a division, saves the
        # margin over the replays that it stands for.
        self._eager = costs.eager_curve.with_margin(costs.eager_margin)
        self._margin = costs.split_margin
        terms = np.array([costs.terms(rung) for rung in rungs], dtype=float)
        self._runs = Runs(rooms, terms)
        # For each rung its terms, and the least of all from it on: where to stop looking.
        least = np.minimum.accumulate(terms[::-1])[::-1]
        self._terms = [tuple(row) for row in np.concatenate([terms, least], axis=1).tolist()]
        self._bound = SplitBound(self.rungs, [Terms(*row) for row in terms.tolist()], self._eager)

    def plan(self, items: Sequence[EncoderItemSpec]) -> list[Batch]:
        """Every item in exactly one batch that keeps every limit of its rung; replays first.

        Where a bound shows that no split can win, this takes microseconds, else up to milliseconds.
        The predicted cost is never above that of the best single choice, which is any rung that
        holds all items or one eager call, but for the margin that eager calls have to save.
        """
        if not items:
            return []
        # Columns, not a Load for each item: most calls are served at once and need only the total.
        total = Load(
            sum([item.output_tokens for item in items]),
            sum([item.input_size for item in items]),
            len(items),
            sum([item.num_frames for item in items]),
            sum([item.num_windows for item in items]),
            sum([item.attention_pairs for item in items]),
        )
        cost, rung = self.price(total)
        if len(items) > 1 and cost * (1 - self._margin) > self._bound(total, 2):
            loads = [Load.of(item) for item in items]
            calls = self._divide(loads, total)
            if _cost(calls) < cost * (1 - self._margin):
                return [self._batch(c.indices, c.rung, c.load, items) for c in calls]
        return [self._batch(tuple(range(len(items))), rung, total, items)]

    def price(self, load: Load) -> tuple[float, int]:
        """Cost of the cheapest single call for `load` and its rung's index, -1 for eager.

        The cost of an eager call is with the margin by which it has to beat replays.
        """
        tokens, pairs = load.tokens, load.pairs
        cost, rung = float("inf"), -1
        # The first rung that holds it is rarely beaten, but times are measured: look on while the
        # least terms of larger rungs promise less.
        for index in range(holding(load, self._columns), len(self._terms)):
            base, per_token, per_pair, least, least_token, least_pair = self._terms[index]
            if least + least_token * tokens + least_pair * pairs >= cost:
                break
            here = base + per_token * tokens + per_pair * pairs
            if here < cost:
                cost, rung = here, index
        if cost > self._eager.floor:
            eager = self._eager.of(load)
            if eager < cost:
                return eager, -1
        return cost, rung

    def cost(self, batches: Sequence[Batch], items: Sequence[EncoderItemSpec]) -> float:
        """Predicted cost of `batches` of `items`."""
        total = 0.0
        for batch in batches:
            load = total_of([Load.of(items[index]) for index in batch.indices])
            rung = batch.rung
            total += self.costs.eager(load) if rung is None else self.costs.replay(rung, load)
        return total

    def _divide(self, loads: Sequence[Load], total: Load) -> list[Call]:
        """A cheap division into several calls, replays first."""
        calls = self._proposal(loads, total)
        return sorted(calls, key=lambda call: (call.rung < 0, call.indices))

    def _proposal(self, loads: Sequence[Load], total: Load) -> list[Call]:
        if len(loads) <= _EXACT_ITEMS:
            return exact(loads, self.price)
        held = [index for index, load in enumerate(loads) if within(load, self._room)]
        over = [index for index in range(len(loads)) if not within(loads[index], self._room)]
        eager = [call_of(over, loads, self.price)] if over else []
        if not held:
            return eager
        part = total
        for index in over:
            part = part.minus(loads[index])
        fewest = fewest_calls(part, self._room)
        enough = self._bound(part, max(fewest, 1)) / (1 - self._margin)
        best = self._in_order(held, loads, bool(over))
        few = len(loads) <= _LOCAL_ITEMS
        # Neighbours are staged by one copy each: they win unless other divisions are cheaper.
        for batches in (fewest, fewest + 1, fewest + 2) if few else (1,):
            if _cost(best) <= enough:
                break
            groups = best_fit_decreasing(held, loads, self._share(held, loads, part, batches))
            calls = [call_of(group, loads, self.price) for group in groups]
            if few and len(calls) <= _LOCAL_CALLS:
                calls = improve(calls, loads, self.price)
            best = min(best, calls, key=_cost)
        calls = eager + best
        return absorb(calls, self.price) if any(call.rung < 0 for call in calls) else calls

    def _share(
        self, held: Sequence[int], loads: Sequence[Load], part: Load, batches: int
    ) -> tuple[int, int, int, int, int]:
        """Limits of the smallest rung that holds a share of `part`, and each item alone."""
        needed = [-(-used // max(batches, 1)) for used in part]
        most = map(max, zip(*(loads[index] for index in held), strict=True))
        load = Load._make(map(max, needed, most))
        return self._rooms[min(holding(load, self._columns), len(self._rooms) - 1)]

    def _in_order(self, held: Sequence[int], loads: Sequence[Load], eager_too: bool) -> list[Call]:
        """Stretches of neighbours, of which the first or the last may be eager."""
        runs = self._runs.divide([loads[index] for index in held])
        calls = [call_of(held[start:stop], loads, self.price) for start, stop in runs]
        if eager_too:
            return calls
        # Calls before or after each cut merged: that is where one eager call may replace several.
        befores = list(accumulate((call.load for call in calls), Load.plus))
        spent = list(accumulate(call.cost for call in calls))
        best, least = calls, spent[-1]
        for cut in range(1, len(calls), -(-len(calls) // _EAGER_CUTS)):
            before = befores[cut - 1]
            after = befores[-1].minus(before)
            for load, rest, side in (
                (before, spent[-1] - spent[cut - 1], slice(cut)),
                (after, spent[cut - 1], slice(cut, None)),
            ):
                cost = self._eager.of(load)
                if cost + rest < least:
                    indices = tuple(index for call in calls[side] for index in call.indices)
                    others = calls[cut:] if side.stop else calls[:cut]
                    best, least = [*others, Call(indices, load, cost, -1)], cost + rest
        return best

    def _batch(
        self, indices: tuple[int, ...], rung: int, load: Load, items: Sequence[EncoderItemSpec]
    ) -> Batch:
        if rung >= 0:
            return Batch(indices, self.rungs[rung])
        if within(load, self._room):
            return Batch(indices, None, CHEAPER)
        reasons = (exceeded(Load.of(items[index]), self._room) for index in indices)
        return Batch(indices, None, next(filter(None, reasons), CHEAPER))


class SplitBound:
    """A lower bound on the cost of a load divided into at least so many calls.

    It is the best of a few planes below the cost of every replay: `start + slope * tokens + tilt *
    pairs`. For an eager call the start is another. The pairs of a call are at most its squared
    patches, which are in proportion to its tokens.
    """

    def __init__(self, rungs: Sequence[RungLimits], terms: Sequence[Terms], eager: EagerCurve):
        self._base = min(base for base, _, _ in terms)
        self._floor = eager.floor
        points = [(0.0, self._base)] + [
            (rung.token_budget, t.base + t.per_token * rung.token_budget)
            for rung, t in zip(rungs, terms, strict=True)
        ]
        tilts = {min(t.per_pair for t in terms), min(terms[-1].per_pair, eager.per_pair), 0.0}
        self._planes = []
        eager_points = list(zip(eager.tokens, eager.us, strict=True))
        for slope in {*_hull_slopes(points), *_hull_slopes(eager_points), eager.end_slope}:
            for tilt in tilts:
                start = min(
                    min(
                        t.base,
                        t.base
                        + (t.per_token - slope) * rung.token_budget
                        - max(tilt - t.per_pair, 0.0) * rung.max_patches**2,
                    )
                    for rung, t in zip(rungs, terms, strict=True)
                )
                below = slope <= eager.end_slope and tilt <= eager.per_pair
                eager_start = min(us - slope * tokens for tokens, us in eager_points)
                # Below zero it would say nothing: more calls would then cost less.
                if start > 0:
                    usable = below and eager_start >= 0
                    plane = start, eager_start if usable else -np.inf, slope, tilt
                    self._planes.append(plane)

    def __call__(self, load: Load, calls: int) -> float:
        """What `load` costs at least in `calls` calls or more."""
        tokens, pairs = load.tokens, load.pairs
        others = calls - 1
        replays = calls * self._base
        mixed = others * min(self._base, self._floor) + self._floor
        for start, eager_start, slope, tilt in self._planes:
            variable = slope * tokens + tilt * pairs
            if calls * start + variable > replays:
                replays = calls * start + variable
            with_eager = eager_start + others * min(start, eager_start) + variable
            if with_eager > mixed:
                mixed = with_eager
        return min(replays, mixed)


def _hull_slopes(points: Sequence[tuple[float, float]], most: int = 4) -> list[float]:
    """Slopes of the lower convex hull of ascending `points`, at most so many, not negative."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    slopes = sorted({max(0.0, (y1 - y0) / (x1 - x0)) for (x0, y0), (x1, y1) in pairwise(hull)})
    return slopes[:: -(-len(slopes) // most)]


def _cost(calls: Sequence[Call]) -> float:
    return sum(call.cost for call in calls)
