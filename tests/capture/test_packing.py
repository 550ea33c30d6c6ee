import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.capture.cost import Load
from vitgraph.capture.packing import (
    Call,
    absorb,
    best_fit_decreasing,
    call_of,
    exact,
    exceeded,
    fewest_calls,
    fits,
    holding,
    improve,
    room_of,
    total_of,
    within,
)
from vitgraph.capture.protocol import EncoderItemSpec, RungLimits

ROOM = (64, 256, 8, 16, 4)


def images(*sizes):
    return [Load(size, 4 * size, 1, 1, 0, 16 * size * size) for size in sizes]


def replays_of(room):
    """Every load that `room` holds costs 1, any other 100."""
    return lambda load: (1.0, 0) if within(load, room) else (100.0, -1)


def stepped(load):
    """Rungs of 16, 32 and 64 tokens, with an overhead; else eager."""
    for rung, budget in enumerate((16, 32, 64)):
        if load.tokens <= budget and load.items <= 4:
            return budget + 5.0, rung
    return 40.0 + 2 * load.tokens, -1


def flat(groups):
    return sorted(index for group in groups for index in group)


loads = st.builds(
    lambda tokens, frames, windows: Load(tokens, 4 * tokens, 1, frames, windows, 16 * tokens**2),
    st.integers(1, 64),
    st.integers(1, 16),
    st.integers(0, 4),
)
# Loads priced by `stepped`, small enough for every division to be tried.
few_loads = st.lists(loads, min_size=1, max_size=6)


def divisions(indices):
    if not indices:
        yield []
        return
    first, *rest = indices
    for smaller in divisions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]


@pytest.mark.parametrize(
    ("item", "limit"),
    [
        (EncoderItemSpec(256, 64, 16, 4), None),
        (EncoderItemSpec(256, 65, 16, 4), "tokens"),
        (EncoderItemSpec(257, 64, 17, 4), "patches"),
        (EncoderItemSpec(256, 64, 17, 5), "frames"),
        (EncoderItemSpec(256, 64, 16, 5), "windows"),
    ],
)
def test_fits_names_the_first_limit_that_is_exceeded(item, limit):
    rung = RungLimits(*ROOM)
    assert fits(item, rung) == (limit is None)
    assert exceeded(Load.of(item), room_of(rung)) == limit


@given(loads, st.lists(st.tuples(*[st.integers(0, 9)] * 5), min_size=1, max_size=8))
def test_holding_is_the_first_rung_that_holds(load, steps):
    rooms, room = [], (0, 0, 0, 0, 0)
    for step in steps:
        room = tuple(a + 4 * b for a, b in zip(room, step, strict=True))
        rooms.append(room)
    expected = next((i for i, room in enumerate(rooms) if within(load, room)), len(rooms))
    assert holding(load, list(zip(*rooms, strict=True))) == expected


@given(st.lists(loads, min_size=1, max_size=60))
def test_best_fit_keeps_every_limit_and_no_two_batches_could_be_one(found):
    groups = best_fit_decreasing(range(len(found)), found, ROOM)
    assert flat(groups) == list(range(len(found)))
    assert all(group == sorted(group) for group in groups)
    totals = [total_of([found[i] for i in group]) for group in groups]
    assert all(within(total, ROOM) for total in totals)
    assert len(groups) >= fewest_calls(total_of(found), ROOM)
    if len(groups) <= 32:  # as many as it looks at
        for i, one in enumerate(totals):
            assert not any(within(one.plus(other), ROOM) for other in totals[:i])


def test_best_fit_places_long_videos_by_frames():
    videos = [Load(4, 16, 1, frames, 0, 0) for frames in (5, 11, 6, 10)]
    assert best_fit_decreasing(range(4), videos, ROOM) == [[0, 1], [2, 3]]


def test_best_fit_fills_three_batches_where_next_fit_needs_four():
    groups = best_fit_decreasing(range(6), images(40, 40, 24, 24, 40, 24), ROOM)
    assert len(groups) == 3


@given(few_loads)
def test_exact_is_the_cheapest_of_all_divisions(found):
    calls = exact(found, stepped)
    assert flat(call.indices for call in calls) == list(range(len(found)))
    for call in calls:
        assert call == call_of(call.indices, found, stepped)
    best = min(
        sum(call_of(group, found, stepped).cost for group in groups)
        for groups in divisions(range(len(found)))
    )
    assert sum(call.cost for call in calls) == pytest.approx(best)


@given(few_loads)
def test_improve_only_improves_and_stays_consistent(found):
    start = [call_of([index], found, stepped) for index in range(len(found))]
    calls = improve(start, found, stepped)
    assert flat(call.indices for call in calls) == list(range(len(found)))
    for call in calls:
        assert call == call_of(call.indices, found, stepped)
    cost = sum(call.cost for call in calls)
    assert cost <= sum(call.cost for call in start)
    assert improve(calls, found, stepped) == calls


@pytest.mark.parametrize(
    ("sizes", "groups", "expected"),
    [
        ((30, 30), [[0], [1]], 1),  # a merge
        ((60, 2, 60, 4, 40, 20), [[0, 1], [2, 3], [4], [5]], 3),  # a merge of the last two
        ((40, 20, 30, 36), [[0, 1], [2], [3]], 3),  # nothing: three are needed
    ],
)
def test_improve_saves_calls(sizes, groups, expected):
    found = images(*sizes)
    price = replays_of(ROOM)
    calls = improve([call_of(group, found, price) for group in groups], found, price)
    assert len(calls) == expected


def test_improve_moves_items():
    found = images(14, 4, 12)

    def price(load):
        return stepped(load) if load.items <= 2 else (1000.0, -1)

    start = [call_of(group, found, price) for group in ([0, 1], [2])]
    calls = improve(start, found, price)
    assert sorted(call.indices for call in calls) == [(0,), (1, 2)]


def test_improve_swaps_items():
    found = images(16, 20, 12, 16)

    def price(load):
        return stepped(load) if load.items == 2 else (1000.0, -1)

    start = [call_of(group, found, price) for group in ([0, 1], [2, 3])]
    calls = improve(start, found, price)
    assert sorted(call.indices for call in calls) == [(0, 3), (1, 2)]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_absorb_takes_what_is_cheaper_in_the_eager_call(order):
    found = images(200, 1, 60)

    def price(load):
        return (8.0, 0) if load.tokens <= 64 else (100.0 + load.tokens / 4, -1)

    calls = [call_of([index], found, price) for index in range(3)]
    absorbed = absorb([calls[index] for index in order], price)
    assert absorbed == [calls[2], Call((0, 1), total_of(found[:2]), 150.25, -1)]


@given(loads, loads)
def test_loads_add_and_subtract(a, b):
    assert a.plus(b) == total_of([a, b])
    assert a.plus(b).minus(b) == a
