"""Which items share a replay, and on which rung: plain Python on item sizes, deterministic."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from .protocol import EncoderItemSpec, RungLimits

# (tokens, patches, items, frames, windows): a load, or the room that a rung has for one.
_Load = tuple[int, int, int, int, int]

_token_budget = attrgetter("token_budget")


@dataclass(frozen=True)
class Batch:
    """Items computed together: `indices` ascending; `rung` None means eagerly, without a graph."""

    indices: tuple[int, ...]
    rung: RungLimits | None


def pack(items: Sequence[EncoderItemSpec], rungs: Sequence[RungLimits]) -> list[Batch]:
    """Partition `items` into batches that keep every limit of their rung.

    `rungs` ascend in every limit. An item that no rung holds is computed eagerly, all such items in
    one batch, the last. The others are packed against the largest rung, and every batch then takes
    the smallest rung that holds it. If one rung holds everything there is one batch, in order.

    Raises:
        ValueError: `rungs` is empty.
    """
    if not rungs:
        raise ValueError("pack: rungs is empty; at least one rung is needed")
    if not items:
        return []
    loads = [_load(item) for item in items]
    total = _total(loads)
    room = _room(rungs[-1])
    if _within(total, room):
        return [Batch(tuple(range(len(items))), _smallest(total, rungs))]

    packable = [index for index, load in enumerate(loads) if _within(load, room)]
    eager = [index for index, load in enumerate(loads) if not _within(load, room)]
    groups = _in_order(packable, loads, room)
    # Batches of neighbours are staged by one copy each: they win unless they need more replays.
    if len(groups) > _fewest(packable, loads, room):
        groups = min(groups, _best_fit_decreasing(packable, loads, room), key=len)
    batches = [
        Batch(tuple(group), _smallest(_total(loads[index] for index in group), rungs))
        for group in groups
    ]
    if eager:
        batches.append(Batch(tuple(eager), None))
    return batches


def fits(item: EncoderItemSpec, rung: RungLimits) -> bool:
    """True if `rung` holds `item` alone."""
    return _within(_load(item), _room(rung))


def _load(item: EncoderItemSpec) -> _Load:
    return item.output_tokens, item.input_size, 1, item.num_frames, item.num_windows


def _room(rung: RungLimits) -> _Load:
    return rung.token_budget, rung.max_patches, rung.max_items, rung.max_frames, rung.max_windows


def _within(load: _Load, room: _Load) -> bool:
    return all(used <= limit for used, limit in zip(load, room, strict=True))


def _plus(a: _Load, b: _Load) -> _Load:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4]


def _total(loads: Iterable[_Load]) -> _Load:
    tokens, patches, items, frames, windows = map(sum, zip(*loads, strict=True))
    return tokens, patches, items, frames, windows


def _smallest(total: _Load, rungs: Sequence[RungLimits]) -> RungLimits:
    """The smallest rung that holds `total`, which the largest one does."""
    first = bisect_left(rungs, total[0], key=_token_budget)
    return next(rung for rung in rungs[first:] if _within(total, _room(rung)))


def _fewest(indices: Sequence[int], loads: Sequence[_Load], room: _Load) -> int:
    """A number of batches below which no packing can go."""
    if not indices:
        return 0
    total = _total(loads[index] for index in indices)
    return max(-(-used // limit) for used, limit in zip(total, room, strict=True) if limit)


def _in_order(indices: Sequence[int], loads: Sequence[_Load], room: _Load) -> list[list[int]]:
    """Next-fit: a batch is closed by the first item that it has no room for."""
    groups: list[list[int]] = []
    used = room
    for index in indices:
        grown = _plus(used, loads[index])
        if groups and _within(grown, room):
            groups[-1].append(index)
            used = grown
        else:
            groups.append([index])
            used = loads[index]
    return groups


def _best_fit_decreasing(
    indices: Sequence[int], loads: Sequence[_Load], room: _Load
) -> list[list[int]]:
    """Largest item first, each into the fullest batch that has room for it.

    The size of a load is its largest share of a limit, so that long videos are placed by frames.
    """

    def share(load: _Load) -> float:
        return max(used / limit for used, limit in zip(load, room, strict=True) if limit)

    groups: list[list[int]] = []
    used: list[_Load] = []
    for index in sorted(indices, key=lambda index: (-share(loads[index]), index)):
        open_groups = [g for g, u in enumerate(used) if _within(_plus(u, loads[index]), room)]
        if open_groups:
            best = max(open_groups, key=lambda g: (share(used[g]), -g))
            groups[best].append(index)
            used[best] = _plus(used[best], loads[index])
        else:
            groups.append([index])
            used.append(loads[index])
    return [sorted(group) for group in groups]
