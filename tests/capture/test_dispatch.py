import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitgraph.capture.budgets import generate_budgets
from vitgraph.capture.cost import (
    AssumedCosts,
    EagerCurve,
    Load,
    MeasuredCosts,
    Terms,
)
from vitgraph.capture.dispatch import Dispatcher, SplitBound, plan
from vitgraph.capture.packing import Batch, exact, room_of, within
from vitgraph.capture.protocol import EncoderItemSpec, RungLimits


def image(tokens, frames=1, windows=0):
    patches = 4 * tokens
    return EncoderItemSpec(patches, tokens, frames, windows, patches * patches // frames)


def ladder(*budgets, items=8, frames=16, windows=0):
    return tuple(RungLimits(b, 4 * b, items, frames, windows) for b in budgets)


def load_of(items):
    return Load._make(map(sum, zip(*map(Load.of, items), strict=True)))


def best_single(items, rungs, costs):
    load = load_of(items)
    replays = [costs.replay(rung, load) for rung in rungs if within(load, room_of(rung))]
    return min([*replays, costs.eager(load)])


def partitions(indices):
    if not indices:
        yield []
        return
    first, *rest = indices
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]


item_specs = st.builds(image, st.integers(1, 150), st.integers(1, 12), st.integers(0, 6))
times = st.floats(0, 50)


@st.composite
def ladders(draw):
    """Rungs whose limits grow, each field at its own pace."""
    limits, rungs = (0, 0, 0, 0, 0), []
    for steps in draw(st.lists(st.tuples(*[st.integers(1, 30)] * 5), min_size=1, max_size=6)):
        limits = tuple(a + b for a, b in zip(limits, steps, strict=True))
        tokens, patches, items, frames, windows = limits
        rungs.append(RungLimits(5 * tokens, 20 * tokens + patches, items, frames, windows - 1))
    return tuple(rungs)


@st.composite
def any_costs(draw, rungs):
    """Anything that calibration could come up with, plausible or not."""
    replays = tuple(
        (rung.token_budget, Terms(1 + 9 * draw(times), draw(times), draw(times) / 400))
        for rung in rungs
    )
    knots = draw(st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True).map(sorted))
    us = sorted(100 * draw(times) for _ in range(len(knots) + 1))
    curve = EagerCurve(1 + 40 * draw(times), (0, *knots), tuple(us), draw(times) / 400)
    return draw(st.sampled_from([MeasuredCosts(replays, curve), AssumedCosts()]))


@st.composite
def cases(draw, most=30):
    rungs = draw(ladders())
    items = draw(st.lists(item_specs, min_size=1, max_size=most))
    return items, rungs, draw(any_costs(rungs))


@settings(max_examples=400)
@given(cases())
def test_partition_keeps_every_limit_and_beats_every_single_choice(case):
    items, rungs, costs = case
    dispatcher = Dispatcher(rungs, costs)
    batches = dispatcher.plan(items)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(items)))
    for batch in batches:
        members = [items[i] for i in batch.indices]
        assert members
        assert list(batch.indices) == sorted(batch.indices)
        if batch.rung is None:
            held = [within(Load.of(item), room_of(rungs[-1])) for item in members]
            assert (batch.reason == "cheaper") == all(held)
        else:
            assert batch.reason is None
            assert batch.rung in rungs
            assert within(load_of(members), room_of(batch.rung))
    assert [batch.rung is None for batch in batches] == sorted(b.rung is None for b in batches)
    most = best_single(items, rungs, costs) / (1 - costs.eager_margin)
    assert dispatcher.cost(batches, items) <= most * (1 + 1e-9)
    assert dispatcher.plan(items) == batches == plan(items, rungs, costs)


@settings(max_examples=150)
@given(cases(most=6))
def test_a_few_items_are_divided_as_well_as_they_can_be(case):
    items, rungs, costs = case
    dispatcher = Dispatcher(rungs, costs)
    best = min(
        sum(best_single([items[i] for i in group], rungs, costs) for group in groups)
        for groups in partitions(range(len(items)))
    )
    # A split has to promise the margin; the rest is what the bound may call not worth looking for.
    found = dispatcher.cost(dispatcher.plan(items), items)
    margins = (1 - costs.split_margin) * (1 - costs.eager_margin)
    assert found * margins <= best * (1 + 1e-9)


@settings(max_examples=150)
@given(cases(most=5))
def test_bound_is_below_every_division(case):
    items, rungs, costs = case
    bound = SplitBound(rungs, [costs.terms(rung) for rung in rungs], costs.eager_curve)
    for groups in partitions(range(len(items))):
        cost = sum(best_single([items[i] for i in group], rungs, costs) for group in groups)
        for calls in range(1, len(groups) + 1):
            assert bound(load_of(items), calls) <= cost * (1 + 1e-9)


def test_more_items_are_divided_almost_as_well_as_they_can_be():
    rng = random.Random(0)
    ratios = []
    for _ in range(60):
        rungs = ladder(*generate_budgets(16, rng.choice([2048, 3072])), items=rng.choice([4, 64]))
        items = [image(rng.randint(20, 1500)) for _ in range(rng.randint(7, 9))]
        dispatcher = Dispatcher(rungs, AssumedCosts())
        best = sum(call.cost for call in exact([Load.of(item) for item in items], dispatcher.price))
        ratios.append(dispatcher.cost(dispatcher.plan(items), items) / best)
    assert max(ratios) <= 1.05
    assert sum(ratios) / len(ratios) <= 1.004


def test_nothing_to_plan():
    assert plan([], ladder(64), AssumedCosts()) == []


def test_refuses_no_rungs_and_rungs_that_shrink():
    with pytest.raises(ValueError, match="rungs is empty"):
        Dispatcher([], AssumedCosts())
    with pytest.raises(ValueError, match="items shrinks"):
        Dispatcher([RungLimits(64, 256, 9, 9, 0), RungLimits(128, 512, 8, 9, 0)], AssumedCosts())


def test_smallest_rung_that_holds_everything():
    rungs = ladder(64, 128, 256)
    assert plan([image(64)], rungs, AssumedCosts()) == [Batch((0,), rungs[0])]
    assert plan([image(65)], rungs, AssumedCosts()) == [Batch((0,), rungs[1])]
    assert plan([image(64)] * 2, rungs, AssumedCosts()) == [Batch((0, 1), rungs[1])]


@pytest.mark.parametrize("tokens", [1, 40, 64])
def test_a_larger_rung_is_taken_where_it_was_measured_to_be_faster(tokens):
    rungs = ladder(64, 128, 256)
    replays = ((64, Terms(90, 1.0, 0)), (128, Terms(100, 0.5, 0)), (256, Terms(80, 2.0, 0)))
    costs = MeasuredCosts(replays, EagerCurve(1e6, (0, 1), (0.0, 1.0), 0.0))
    (batch,) = plan([image(tokens)], rungs, costs)
    expected = min(rungs, key=lambda rung: costs.replay(rung, Load.of(image(tokens))))
    assert batch.rung == expected


def test_rung_is_raised_for_items_frames_and_windows():
    small = RungLimits(64, 256, 2, 2, 2)
    large = RungLimits(128, 512, 4, 4, 4)
    for items in ([image(4)] * 3, [EncoderItemSpec(8, 2, 3)], [EncoderItemSpec(8, 2, 1, 3)]):
        (batch,) = plan(items, [small, large], AssumedCosts())
        assert batch.rung == large


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (image(129), "tokens"),
        (EncoderItemSpec(513, 100), "patches"),
        (EncoderItemSpec(400, 100, num_frames=17), "frames"),
        (EncoderItemSpec(400, 100, num_windows=5), "windows"),
    ],
)
def test_items_beyond_every_rung_are_eager_together_and_alone(item, reason):
    rungs = ladder(64, 128, windows=4)
    for others in (1, 9):  # few items, and more than are divided exactly
        items = [image(8), item, *[image(8)] * others, item]
        *replays, eager = plan(items, rungs, AssumedCosts())
        assert eager == Batch((1, len(items) - 1), None, reason)
        assert all(batch.rung for batch in replays)


def test_eager_where_that_is_cheaper():
    rungs = ladder(64, 128)
    costs = MeasuredCosts(
        ((64, Terms(100, 0, 0)), (128, Terms(150, 0, 0))),
        EagerCurve(120.0, (0, 128), (0.0, 125.0), 0.0),
    )
    assert plan([image(50)], rungs, costs) == [Batch((0,), rungs[0])]
    assert plan([image(100)], rungs, costs) == [Batch((0,), None, "cheaper")]


@pytest.mark.parametrize(("eager_us", "rung"), [(98.5, None), (99.5, 0)])
def test_a_replay_where_an_eager_call_saves_less_than_predictions_err(eager_us, rung):
    rungs = ladder(64)
    costs = MeasuredCosts(((64, Terms(100, 0, 0)),), EagerCurve(eager_us, (0, 64), (0.0, 0.0), 0.0))
    (batch,) = plan([image(50)], rungs, costs)
    assert batch.rung == (None if rung is None else rungs[rung])


# exactly, with changes of single items, and in order alone
@pytest.mark.parametrize("count", [3, 9, 20])
@pytest.mark.parametrize(("eager_us", "is_taken"), [(98.5, True), (99.5, False)])
def test_an_eager_call_of_a_division_saves_the_margin_too(eager_us, is_taken, count):
    """Two replays of 50 us, or one eager call for what both hold; more items cost far more."""
    rungs = ladder(64)
    curve = EagerCurve(eager_us, (0, 120, 180), (0.0, eager_us, 1000.0), 0.0)
    batches = plan([image(60)] * count, rungs, MeasuredCosts(((64, Terms(50, 0, 0)),), curve))
    assert len(batches) == (count - 1 if is_taken else count)
    assert [len(batch.indices) for batch in batches if batch.rung is None] == [2] * is_taken


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("us", "joins"), [(49.2, True), (49.7, False)])
def test_an_item_joins_an_eager_call_where_that_saves_the_margin(us, joins, count):
    """A replay of 50 us, or `us` more of the eager call that an item beyond the ladder needs."""
    rungs = ladder(64)
    curve = EagerCurve(1.0, (0, 6400), (5.0, 5.0 + 100 * us), per_pair=1e-3)
    costs = MeasuredCosts(((64, Terms(50, 0, 0)),), curve)
    over, small = EncoderItemSpec(2560, 640), [EncoderItemSpec(256, 64)] * count
    dear = [EncoderItemSpec(256, 64, attention_pairs=1_000_000)] * count  # as part of that call
    *replays, eager = plan([over, *dear, *small], rungs, costs)
    assert [batch.rung for batch in replays] == [rungs[0]] * len(replays)
    assert eager.indices == (0, *(range(1 + count, 1 + 2 * count) if joins else ()))


def test_curve_with_a_margin():
    curve = EagerCurve(40.0, (0, 10, 30), (0.0, 50.0, 90.0), 0.01, (0.0, 0.02, 0.03), ((5, 45.0),))
    for tokens in (1, 7, 10, 25, 30, 80):
        for pairs in (0, 3000):
            load = Load(tokens, 4 * tokens, 1, 1, 0, pairs)
            assert curve.with_margin(0.2).of(load) == pytest.approx(curve.of(load) / 0.8)


def test_small_item_joins_an_eager_call_that_is_made_anyway():
    rungs = ladder(64, 128)
    costs = MeasuredCosts(
        ((64, Terms(100, 0, 0)), (128, Terms(120, 0, 0))),
        EagerCurve(500.0, (0, 1000), (0.0, 1000.0), 0.0),
    )
    for count in (2, 12):
        items = [image(600), *[image(3)] * (count - 1)]
        assert plan(items, rungs, costs) == [Batch(tuple(range(count)), None, "tokens")]


def test_items_join_an_eager_call_only_where_that_is_cheaper():
    rungs = ladder(64, 128, items=16)
    costs = MeasuredCosts(
        ((64, Terms(50, 0, 0)), (128, Terms(51, 0, 0))),
        EagerCurve(500.0, (0, 1000), (0.0, 1000.0), 0.0),
    )
    items = [image(600), image(128), *[image(3)] * 10]
    expected = [Batch((1,), rungs[1]), Batch((0, *range(2, 12)), None, "tokens")]
    assert plan(items, rungs, costs) == expected


def test_all_items_eager_where_every_split_found_costs_more():
    # The tiny rung holds no item, but the bound does not know.
    rungs = (RungLimits(8, 32, 4, 4, 0), RungLimits(128, 512, 4, 4, 0))
    costs = MeasuredCosts(
        ((8, Terms(10, 0, 0)), (128, Terms(600, 0, 0))),
        EagerCurve(1000.0, (0, 1000), (900.0, 1000.0), 0.0),
    )
    assert plan([image(20)] * 8, rungs, costs) == [Batch(tuple(range(8)), None, "cheaper")]


def test_bound_allows_for_eager_calls_that_are_cheaper_apart():
    curve = EagerCurve(1.0, (0, 1, 2), (0.0, 0.0, 100.0), 0.0)
    bound = SplitBound(ladder(5), [Terms(1.0, 3.0, 0.0)], curve)
    assert bound(load_of([image(1)] * 2), 1) <= 2 * curve.of(Load.of(image(1)))


def test_frames_split_videos_that_tokens_would_allow():
    batches = plan([EncoderItemSpec(40, 10, 9)] * 3, ladder(1024), AssumedCosts())
    assert [batch.indices for batch in batches] == [(0,), (1,), (2,)]


def test_images_and_videos_share_a_replay():
    rungs = ladder(256)
    items = [image(20), image(40, frames=4), image(16), image(24, frames=8)]
    assert plan(items, rungs, AssumedCosts()) == [Batch((0, 1, 2, 3), rungs[0])]


def test_single_item_may_take_a_whole_budget():
    for budget in generate_budgets(49, 5000):
        rungs = ladder(budget)
        assert plan([image(budget)], rungs, AssumedCosts()) == [Batch((0,), rungs[0])]


def test_equal_totals_of_other_layouts_are_different_batches():
    # The grid table, not a key of totals, carries the segmentation: the same rung serves both.
    rungs = ladder(16)
    for sizes in ([4, 6, 5], [5, 5, 5]):
        items = [image(size) for size in sizes]
        assert plan(items, rungs, AssumedCosts()) == [Batch((0, 1, 2), rungs[0])]


def test_neighbours_stay_together_when_that_costs_no_replay():
    batches = plan([image(size) for size in (10, 20, 30, 40)], ladder(64), AssumedCosts())
    assert [batch.indices for batch in batches] == [(0, 1, 2), (3,)]


@pytest.mark.parametrize("times", [1, 4, 20])
def test_best_fit_saves_replays(times):
    sizes = [40, 40, 24, 24, 40, 24] * times
    batches = plan([image(size) for size in sizes], ladder(64), AssumedCosts())
    assert len(batches) == 3 * times
    assert all(sum(sizes[i] for i in batch.indices) == 64 for batch in batches)


def test_split_in_two_where_a_coarse_ladder_pads_too_much():
    rungs = ladder(512, 4096)
    items = [image(250)] * 4
    assert [b.rung for b in plan(items, rungs, AssumedCosts())] == [rungs[0], rungs[0]]
