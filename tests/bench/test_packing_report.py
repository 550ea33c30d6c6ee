from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.bench.mixes import FAMILIES, mixes
from vitgraph.bench.packing import Tally, least_padding, next_fit, summary, waste_rows
from vitgraph.capture.cost import Load
from vitgraph.capture.packing import fewest_calls, room_of, total_of, within
from vitgraph.capture.protocol import EncoderItemSpec, RungLimits

QWEN3, QWEN25 = FAMILIES["qwen3-vl"], FAMILIES["qwen2.5-vl"]


def image(tokens, frames=1):
    return EncoderItemSpec(4 * tokens, tokens, frames)


def theirs(tokens, budgets, most_items):
    call = [(1, 2, 2 * count) for count in tokens]
    tally = Tally()
    next_fit(tuple(call), [image(count) for count in tokens], budgets, most_items, tally)
    return tally


def test_sizes_in_patches():
    assert QWEN3.grid((224, 224)) == (1, 14, 14)
    assert QWEN3.grid((720, 1280), frames=8) == (8, 44, 80)
    assert QWEN25.grid((224, 224)) == (1, 16, 16)
    assert QWEN25.item((2, 16, 20)) == EncoderItemSpec(640, 160, 2, 12, 2 * 320**2)
    assert QWEN3.rung(4096) == RungLimits(4096, 16384, 64, 64, 0)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nine_mixes_that_towers_take(family):
    found = mixes(family)
    assert list(found) == [f"W{i}" for i in range(1, 10)]
    assert mixes(family) == found
    assert mixes(family, seed=1) != found
    for calls in found.values():
        assert all(t > 0 and h % 2 == w % 2 == 0 < h * w for call in calls for t, h, w in call)
    assert [len(call) for call in found["W2"]] == [20, 5]
    assert all(10 <= len(call) <= 30 for call in found["W3"])
    assert any({t > 1 for t, _, _ in call} == {True, False} for call in found["W7"])


def test_next_fit_pads_the_documented_case_as_described():
    # 8 + 8 + 4 images of 100 tokens in 1024 + 1024 + 512
    tally = theirs([100] * 20, (512, 1024, 1536, 2048), 8)
    assert (tally.live, tally.padded, tally.replays, tally.eager) == (2000, 2560, 3, 0)
    assert tally.waste == pytest.approx(0.28)


@pytest.mark.parametrize(
    ("tokens", "padded", "replays", "eager"),
    [
        ([60, 64], 128, 1, 0),
        ([9000], 0, 0, 1),
        ([9000, 64], 64, 1, 1),
        ([100, 128], 256, 1, 0),
        ([60, 100, 128], 64 + 256, 2, 0),  # deferred: 64 + 128 < 256
        ([120, 120, 125], 512, 1, 0),  # 256 + 128 would do, but 128 is below 256
        ([64, 65], 64 + 128, 2, 0),
    ],
)
def test_next_fit(tokens, padded, replays, eager):
    tally = theirs(tokens, (64, 128, 256, 512), 64)
    assert (tally.padded, tally.replays, tally.eager) == (padded, replays, eager)


def test_next_fit_keeps_videos_apart():
    tally = Tally()
    next_fit(((1, 8, 8), (2, 8, 8)), [image(16), image(32, 2)], (64, 128), 64, tally)
    assert (tally.padded, tally.replays) == (128, 2)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_bound_is_below_every_choice_of_rungs_that_has_the_room(sizes, steps, slots):
    rungs, budget = [], 0
    for step in steps:
        budget += 8 * step
        rungs.append(RungLimits(budget, 4 * budget, slots, slots, 0))
    items = [image(tokens, frames) for tokens, frames in sizes]
    bound = Tally()
    least_padding(items, rungs, bound)
    held = [Load.of(i) for i in items if within(Load.of(i), room_of(rungs[-1]))]
    assert bound.eager == len(items) - len(held)
    if not held:
        return
    total = total_of(held)
    assert bound.replays == max(1, fewest_calls(total, room_of(rungs[-1])))
    for count in range(1, 6):
        for chosen in combinations_with_replacement(rungs, count):
            room = tuple(map(sum, zip(*map(room_of, chosen), strict=True)))
            alone = all(any(within(load, room_of(rung)) for rung in chosen) for load in held)
            if alone and within(total, room):
                assert bound.padded <= sum(rung.token_budget for rung in chosen)
                assert bound.replays <= count


def test_report():
    rows = waste_rows()
    assert rows == waste_rows()
    assert [(row["family"], row["mix"]) for row in rows] == [
        (family, f"W{i}") for family in FAMILIES for i in range(1, 10)
    ]
    for row in rows:
        assert row["waste"] >= row["bound_waste"] - 1e-12
        # Padding is near the least there can be, and replays are not bought with padding.
        assert 1 <= row["cost_over_bound"] <= 1.05
        assert row["waste"] <= row["vllm_waste"]
        # Only the image that no rung holds is eager.
        assert row["eager_items"] == (row["mix"] == "W9")
    table = summary(rows).splitlines()
    assert len(table) == 1 + len(rows)
    assert "waste %" in table[0]
