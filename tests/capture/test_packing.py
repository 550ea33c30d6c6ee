import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.capture import Batch, EncoderItemSpec, RungLimits, generate_budgets, pack

FIELDS = ("token_budget", "max_patches", "max_items", "max_frames", "max_windows")


def used(items):
    return (
        sum(i.output_tokens for i in items),
        sum(i.input_size for i in items),
        len(items),
        sum(i.num_frames for i in items),
        sum(i.num_windows for i in items),
    )


def holds(rung, items):
    return all(u <= getattr(rung, f) for u, f in zip(used(items), FIELDS, strict=True))


def image(tokens, windows=0):
    return EncoderItemSpec(4 * tokens, tokens, 1, windows)


def ladder(*budgets, items=8, frames=16, windows=0):
    return [RungLimits(b, 4 * b, items, frames, windows) for b in budgets]


item_specs = st.builds(
    lambda tokens, frames, windows: EncoderItemSpec(4 * tokens, tokens, frames, windows),
    st.integers(1, 150),
    st.integers(1, 12),
    st.integers(0, 6),
)
columns = st.lists(st.tuples(*[st.integers(1, 30)] * 5), min_size=1, max_size=6)


@st.composite
def rungs_ascending(draw):
    """Rungs whose limits grow, each field at its own pace."""
    limits, rungs = (0, 0, 0, 0, 0), []
    for steps in draw(columns):
        limits = tuple(a + b for a, b in zip(limits, steps, strict=True))
        tokens, patches, items, frames, windows = limits
        rungs.append(RungLimits(5 * tokens, 20 * tokens + patches, items, frames, windows - 1))
    return rungs


@given(st.lists(item_specs, max_size=40), rungs_ascending())
def test_partition_keeps_every_limit(items, rungs):
    batches = pack(items, rungs)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(items)))
    for batch in batches:
        members = [items[i] for i in batch.indices]
        assert members
        assert list(batch.indices) == sorted(batch.indices)
        if batch.rung is None:
            assert not any(holds(rung, [item]) for rung in rungs for item in members)
        else:
            assert batch.rung == next(rung for rung in rungs if holds(rung, members))
    assert sum(batch.rung is None for batch in batches) <= 1
    assert pack(items, rungs) == batches


@given(st.lists(item_specs, min_size=1, max_size=40), rungs_ascending())
def test_one_batch_when_a_rung_holds_everything(items, rungs):
    if holds(rungs[-1], items):
        (batch,) = pack(items, rungs)
        assert batch.indices == tuple(range(len(items)))


def test_nothing_to_pack():
    assert pack([], ladder(64)) == []


def test_refuses_no_rungs():
    with pytest.raises(ValueError, match="rungs is empty"):
        pack([image(4)], [])


def test_smallest_fitting_rung():
    rungs = ladder(64, 128, 256)
    assert pack([image(64)], rungs) == [Batch((0,), rungs[0])]
    assert pack([image(65)], rungs) == [Batch((0,), rungs[1])]
    assert pack([image(64), image(64)], rungs) == [Batch((0, 1), rungs[1])]


def test_rung_is_raised_for_items_frames_and_windows():
    small = RungLimits(64, 256, 2, 2, 2)
    large = RungLimits(128, 512, 4, 4, 4)
    for item in (image(4), EncoderItemSpec(8, 2, 3), EncoderItemSpec(8, 2, 1, 3)):
        count = 3 if item == image(4) else 1
        (batch,) = pack([item] * count, [small, large])
        assert batch.rung == large


@pytest.mark.parametrize(
    "item",
    [
        image(129),
        EncoderItemSpec(513, 100),
        EncoderItemSpec(400, 100, num_frames=17),
        EncoderItemSpec(400, 100, num_windows=5),
    ],
    ids=["tokens", "patches", "frames", "windows"],
)
def test_item_beyond_every_rung_is_eager_and_alone(item):
    rungs = ladder(64, 128, windows=4)
    batches = pack([image(8), item, image(8), item], rungs)
    assert batches == [Batch((0, 2), rungs[0]), Batch((1, 3), None)]


def test_frames_split_videos_that_tokens_would_allow():
    rungs = ladder(1024, frames=16)
    batches = pack([EncoderItemSpec(40, 10, 9)] * 3, rungs)
    assert [batch.indices for batch in batches] == [(0,), (1,), (2,)]


def test_single_item_may_take_a_whole_budget():
    for budget in generate_budgets(49, 5000):
        rungs = ladder(budget)
        assert pack([image(budget)], rungs) == [Batch((0,), rungs[0])]


def test_equal_totals_of_other_layouts_are_different_batches():
    # The grid table, not a key of totals, carries the segmentation: the same rung serves both.
    rungs = ladder(16)
    for sizes in ([4, 6, 5], [5, 5, 5]):
        assert pack([image(size) for size in sizes], rungs) == [Batch((0, 1, 2), rungs[0])]


def test_neighbours_stay_together_when_that_costs_no_replay():
    batches = pack([image(size) for size in (10, 20, 30, 40)], ladder(64))
    assert [batch.indices for batch in batches] == [(0, 1, 2), (3,)]


def test_best_fit_saves_replays():
    sizes = [40, 40, 24, 24, 40, 24]
    batches = pack([image(size) for size in sizes], ladder(64))
    assert len(batches) == 3
    assert all(sum(sizes[i] for i in batch.indices) == 64 for batch in batches)
