"""Ways to divide items into calls: in order, best-fit-decreasing, exactly, and step by step.

Each way proposes groups of items; what a group costs is the caller's `price`. All are
deterministic.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import le
from typing import NamedTuple

import numpy as np

from .cost import Load
from .protocol import EncoderItemSpec, RungLimits

LIMITS = ("tokens", "patches", "items", "frames", "windows")
# Why an item that a rung holds is computed eagerly.
CHEAPER = "cheaper"
Room = tuple[int, int, int, int, int]

# Open batches that best-fit looks at for one item, fullest first.
_MOST_LOOKS = 32


@dataclass(frozen=True)
class Batch:
    """Items computed together.

    Attributes:
        indices: which items, ascending.
        rung: the graph to replay; None to compute them eagerly.
        reason: why eagerly: the first limit of the largest rung that an item exceeds ("tokens",
            "patches", "items", "frames" or "windows") or "cheaper"; None for a replay.
    """

    indices: tuple[int, ...]
    rung: RungLimits | None
    reason: str | None = None


class Call(NamedTuple):
    """A group of items with its load, its cost by `Price`, and its rung (-1: eager)."""

    indices: tuple[int, ...]
    load: Load
    cost: float
    rung: int


# (cost, rung) of the cheapest call that serves a load.
Price = Callable[[Load], tuple[float, int]]


def room_of(rung: RungLimits) -> Room:
    """The limits of `rung`, in the order of `LIMITS`."""
    return rung.token_budget, rung.max_patches, rung.max_items, rung.max_frames, rung.max_windows


def within(load: Load, room: Room) -> bool:
    """True if `load` keeps every limit of `room`."""
    # `room` is the shorter one: the pairs of a load have no limit.
    return all(map(le, load, room))


def fits(item: EncoderItemSpec, rung: RungLimits) -> bool:
    """True if `rung` holds `item` alone."""
    return within(Load.of(item), room_of(rung))


def exceeded(load: Load, room: Room) -> str | None:
    """The first limit of `room` that `load` exceeds."""
    return next((name for name, u, v in zip(LIMITS, load, room, strict=False) if u > v), None)


def total_of(loads: Sequence[Load]) -> Load:
    """All of `loads`, of which there is at least one, in one batch."""
    return Load._make(map(sum, zip(*loads, strict=True)))


def fewest_calls(total: Load, room: Room) -> int:
    """A number of batches below which `total` cannot go in batches of `room`."""
    return max(-(-used // limit) for used, limit in zip(total, room, strict=False) if limit)


def call_of(indices: Sequence[int], loads: Sequence[Load], price: Price) -> Call:
    """`indices` as one call."""
    load = total_of([loads[index] for index in indices])
    return Call(tuple(indices), load, *price(load))


class Runs:
    """Divides items into stretches of neighbours, each one replay: the cheapest such division.

    Every stretch is the longest that its rung holds. Nothing is lost by that while rungs agree on
    what a token and a pair cost, since the stretch before it only becomes lighter.

    Args:
        rooms: limits of every rung.
        terms: [R, 3] base, per_token and per_pair of every rung.
    """

    def __init__(self, rooms: Sequence[Room], terms: np.ndarray):
        self._rooms = np.array(rooms)
        self._base, self._per_token, self._per_pair = terms.T

    def divide(self, loads: Sequence[Load]) -> list[tuple[int, int]]:
        """Half-open stretches covering `loads`, each of which the largest rung holds."""
        sums = np.zeros((len(loads) + 1, len(Load._fields)), np.int64)
        np.cumsum(loads, axis=0, out=sums[1:])
        ends = np.arange(1, len(loads) + 1)[:, None]
        starts = np.zeros((len(loads), len(self._rooms)), np.int64)
        for column in range(len(LIMITS)):
            limits, used = self._rooms[:, column], sums[:, column]
            if limits[0] < used[-1]:
                np.maximum(starts, np.searchsorted(used, used[1:, None] - limits), out=starts)
        tokens, pairs = (sums[:, LIMITS.index("tokens")], sums[:, len(LIMITS)])
        costs = self._base + self._per_token * (tokens[ends] - tokens[starts])
        costs += self._per_pair * (pairs[ends] - pairs[starts])
        costs[starts >= ends] = np.inf
        least = np.zeros(len(sums))
        origin = np.zeros(len(sums), np.int64)
        for end in range(1, len(sums)):
            row = least[starts[end - 1]] + costs[end - 1]
            rung = row.argmin()
            least[end], origin[end] = row[rung], starts[end - 1, rung]
        runs, end = [], len(loads)
        while end:
            runs.append((int(origin[end]), end))
            end = runs[-1][0]
        return runs[::-1]


def best_fit_decreasing(
    indices: Sequence[int], loads: Sequence[Load], room: Room
) -> list[list[int]]:
    """Largest item first, each into the fullest batch that has room for it.

    The size of an item is its largest share of a limit, so that long videos are placed by frames;
    the fullness of a batch is its share of the limit that all items together strain most.
    `room` holds every item alone.
    """

    def share(load: Load) -> float:
        return max(used / limit for used, limit in zip(load, room, strict=False) if limit)

    total = total_of([loads[index] for index in indices])
    strained = max(range(len(room)), key=lambda i: total[i] / room[i] if room[i] else 0.0)
    groups: list[list[int]] = []
    loaded: list[Load] = []
    fullness: list[tuple[int, int]] = []  # (what is used of the strained limit, group), ascending
    for index in sorted(indices, key=lambda index: (-share(loads[index]), index)):
        load = loads[index]
        last = bisect_right(fullness, (room[strained] - load[strained], len(groups)))
        for place in range(last - 1, max(last - 1 - _MOST_LOOKS, -1), -1):
            group = fullness[place][1]
            grown = loaded[group].plus(load)
            if within(grown, room):
                del fullness[place]
                groups[group].append(index)
                loaded[group] = grown
                break
        else:
            group = len(groups)
            groups.append([index])
            loaded.append(load)
        insort(fullness, (loaded[group][strained], group))
    return [sorted(group) for group in groups]


def exact(loads: Sequence[Load], price: Price) -> list[Call]:
    """The cheapest division of a few items: 3^N steps."""
    sets: list[Call] = [call_of((0,), loads, price)]
    for index in range(1, len(loads)):
        alone = call_of((index,), loads, price)
        sets.append(alone)
        for mask in range(1, 1 << index):
            before = sets[mask - 1]
            load = before.load.plus(loads[index])
            sets.append(Call((*before.indices, index), load, *price(load)))
    # sets[mask - 1] are the items whose bits are set in `mask`
    least, last = [0.0], [0]
    for mask in range(1, 1 << len(loads)):
        highest = 1 << (mask.bit_length() - 1)
        rest = mask ^ highest
        part, best, chosen = rest, sets[mask - 1].cost, mask
        while part:
            cost = least[part] + sets[mask - part - 1].cost
            if cost < best:
                best, chosen = cost, mask - part
            part = (part - 1) & rest
        least.append(best)
        last.append(chosen)
    calls, mask = [], (1 << len(loads)) - 1
    while mask:
        calls.append(sets[last[mask] - 1])
        mask -= last[mask]
    return calls


def improve(calls: Sequence[Call], loads: Sequence[Load], price: Price) -> list[Call]:
    """`calls` after every merge of two, move of an item and swap of two items that pays.

    For a few calls of a few items: a pass prices each such change.
    """
    calls = list(calls)
    while True:
        for a, b in combinations(range(len(calls)), 2):
            better = _better_pair(calls[a], calls[b], loads, price)
            if better is not None:
                rest = [call for i, call in enumerate(calls) if i not in (a, b)]
                calls = [*rest, *better]
                break
        else:
            return calls


def absorb(calls: Sequence[Call], price: Price) -> list[Call]:
    """`calls`, of which one at least is eager, with those merged into it that cost less there."""
    at = next(i for i, call in enumerate(calls) if call.rung < 0)
    eager, left = calls[at], []
    for call in (*calls[:at], *calls[at + 1 :]):
        merged = merge(eager, call, price)
        if merged.cost < eager.cost + call.cost:
            eager = merged
        else:
            left.append(call)
    return [*left, eager]


def merge(a: Call, b: Call, price: Price) -> Call:
    """Both calls as one."""
    load = a.load.plus(b.load)
    return Call(tuple(sorted(a.indices + b.indices)), load, *price(load))


def _better_pair(a: Call, b: Call, loads: Sequence[Load], price: Price) -> list[Call] | None:
    """The items of two calls divided in a cheaper way; None if no single change pays."""
    # A change has to gain more than rounding, or it could be undone for ever.
    now = (a.cost + b.cost) * (1 - 1e-9)
    merged = merge(a, b, price)
    if merged.cost < now:
        return [merged]
    outs = [(index,) for index in a.indices] if len(a.indices) > 1 else []
    backs = [(index,) for index in b.indices] if len(b.indices) > 1 else []
    swaps = [(out, back) for out in a.indices for back in b.indices]
    for out, back in [*((o, ()) for o in outs), *(((), o) for o in backs), *_pairs(swaps)]:
        change = a.load
        for index in out:
            change = change.minus(loads[index])
        for index in back:
            change = change.plus(loads[index])
        other = a.load.plus(b.load).minus(change)
        first, second = price(change), price(other)
        if first[0] + second[0] < now:
            one = sorted({*a.indices, *back} - set(out))
            two = sorted({*b.indices, *out} - set(back))
            return [Call(tuple(one), change, *first), Call(tuple(two), other, *second)]
    return None


def _pairs(swaps: Sequence[tuple[int, int]]) -> list[tuple[tuple[int], tuple[int]]]:
    return [((out,), (back,)) for out, back in swaps]


def holding(load: Load, columns: Sequence[Sequence[int]]) -> int:
    """Index of the first rung that holds `load`; the number of rungs if none does.

    `columns` are the limits of the rungs by kind, each ascending.
    """
    tokens, patches, items, frames, windows, _ = load
    a, b, c, d, e = columns
    return max(
        bisect_left(a, tokens),
        bisect_left(b, patches),
        bisect_left(c, items),
        bisect_left(d, frames),
        bisect_left(e, windows),
    )
