"""What a manager does besides plain calls, on the CPU: `rerun_recorder` repeats recorded work."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitgraph.capture import EncoderCudaGraphManager, refit

CONFIG = {
    "token_budgets": [16, 64, 128],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 32,
}
IMAGE = (1, 8, 8)  # 16 tokens
SMALL = (1, 4, 4)  # 4 tokens
HUGE = (1, 32, 32)  # 256 tokens, more than any budget
LAYOUTS = {
    "one replay": [IMAGE, SMALL, (3, 4, 6)],
    "two replays": [IMAGE] * 9,
    "eager": [HUGE],
    "eager and replay": [SMALL, HUGE, IMAGE],
    "nothing": [],
}
POOLED = "pooler_output"
each_layout = pytest.mark.parametrize("grid", LAYOUTS.values(), ids=LAYOUTS.keys())
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def budgets(manager):
    return [rung.token_budget for rung in manager.rungs]


# out= and names=


@each_layout
def test_out_is_written_and_returned(encoder, manager, pixels_for, grid):
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid) if grid else manager.execute(pixels, grid)
    out = {  # strided: every other column of something wider
        name: torch.full((len(value), 12), 7.0)[:, ::2] for name, value in expected.items()
    }
    found = manager.execute(pixels, grid, out=out)
    assert all(found[name] is out[name] for name in expected)
    assert_same(found, expected)


@each_layout
@pytest.mark.parametrize("given_by", ["names", "out"])
def test_only_what_is_named(encoder, manager, pixels_for, grid, given_by):
    pixels = pixels_for(grid)
    tokens = sum(t * h * w for t, h, w in grid) // 4
    arguments = (
        {"names": (POOLED,)} if given_by == "names" else {"out": {POOLED: torch.empty(tokens, 6)}}
    )
    found = manager.execute(pixels, grid, **arguments)
    assert list(found) == [POOLED]
    if grid:
        assert torch.equal(found[POOLED], encoder.eager_forward(pixels, grid)[POOLED])


def test_no_names_at_all(manager, pixels_for):
    assert manager.execute(pixels_for([IMAGE]), [IMAGE], names=()) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": ("pooled",)}, ValueError, "no output is named pooled; the outputs are last_h"),
        ({"out": {"pooled": torch.empty(16, 6)}}, ValueError, "pooled"),
        ({"out": {POOLED: torch.empty(15, 6)}}, ValueError, r"\[15, 6\] on cpu; pass \[16, 6\]"),
        ({"out": {POOLED: torch.empty(16, 6).half()}}, TypeError, "float16; pass torch.float32"),
        (
            {"out": {POOLED: torch.empty(16, 6, device="meta")}},
            ValueError,
            r"on meta; pass \[16, 6\] on cpu",
        ),
        (
            {"out": {POOLED: torch.empty(16, 6)}, "names": ("last_hidden_state",)},
            ValueError,
            "pass one of them",
        ),
    ],
)
def test_refused_outputs(manager, pixels_for, arguments, error, message):
    with pytest.raises(error, match=message):
        manager.execute(pixels_for([IMAGE]), [IMAGE], **arguments)


# what is kept from call to call


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_layout_is_served_again_after_others(encoder, make, pixels_for, num_slots):
    manager = make(num_slots=num_slots)
    # on rungs of 16, 64 and 128 tokens, whose tables are the leading rows of one
    layouts = [[SMALL], [IMAGE, SMALL], [SMALL, IMAGE], [IMAGE] * 5, [(2, 4, 4), SMALL]]
    order = [0, 0, 1, 0, 2, 2, 1, 3, 3, 0, 4, 1, 1, 4, 4, 3, 2]
    for seed, index in enumerate(order):
        pixels = pixels_for(layouts[index], seed)
        expected = encoder.eager_forward(pixels, layouts[index])
        assert_same(manager.execute(pixels, layouts[index]), expected)
    assert manager.stats()["replays"] == len(order)


def test_a_table_that_lies_in_its_slot_is_not_copied_again(manager, pixels_for, monkeypatch):
    copied = []
    copy = torch.Tensor.copy_

    def counting(self, source, non_blocking=False):
        if self.dtype == torch.int32:
            copied.append(source.tolist())
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    for grid in ([SMALL], [SMALL], [IMAGE], [SMALL], [SMALL]):
        manager.execute(pixels_for(grid), grid)
    assert [rows[0] for rows in copied] == [list(SMALL), list(IMAGE), list(SMALL)]


def test_what_a_caller_does_to_leased_tensors_stays_there(encoder, manager, pixels_for):
    pixels = pixels_for([IMAGE])
    expected = encoder.eager_forward(pixels, [IMAGE])
    for _ in range(2):
        assert_same(manager.execute(pixels, [IMAGE]), expected)
        with manager.lease(pixels, [IMAGE]) as lease:
            for tensor in lease.outputs.values():
                tensor.t_().unsqueeze_(0)


def test_a_call_on_a_given_rung_is_checked_and_not_counted(encoder, manager, pixels_for):
    pixels = pixels_for([IMAGE, SMALL])
    expected = encoder.eager_forward(pixels, [IMAGE, SMALL])
    for rung in (None, *manager.rungs[1:], manager.rungs[1]):
        results = manager.run_on(rung, pixels, [IMAGE, SMALL])
        assert_same(results, expected)
        # the caller's own: a later call leaves them alone
        manager.run_on(manager.rungs[-1], pixels + 1, [IMAGE, SMALL])
        assert_same(results, expected)
        with pytest.raises(ValueError, match="ask for"):
            manager.run_on(rung, pixels[1:], [IMAGE, SMALL])
    assert manager.stats()["items"] == 0
    assert manager.stats()["histogram"] == {}


# leases


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_lease_outlives_all_slots_but_its_own(encoder, make, pixels_for, num_slots):
    manager = make(num_slots=num_slots)
    assert manager.get_num_graphs_to_capture() == 3 * num_slots
    held = []
    for call in range(8):
        pixels = pixels_for([IMAGE], call)
        held.append((manager.lease(pixels, [IMAGE]), encoder.eager_forward(pixels, [IMAGE])))
        for lease, expected in held[-num_slots:]:
            assert lease.valid
            assert lease.zero_copy
            assert_same(lease.outputs, expected)
        for lease, _ in held[:-num_slots]:
            assert not lease.valid
            with pytest.raises(RuntimeError, match="its slot was taken by a later call"):
                _ = lease.outputs


def test_leases_lie_in_the_slots(make, pixels_for):
    manager = make(num_slots=2)
    slots = manager.ladder.ring.slots
    leases = [manager.lease(pixels_for([IMAGE]), [IMAGE]) for _ in range(2)]
    assert {lease.outputs[POOLED].data_ptr() for lease in leases} == {
        slot.outputs[POOLED].data_ptr() for slot in slots
    }


def test_a_released_slot_is_taken_first(make, pixels_for):
    manager = make(num_slots=3)
    first, second, third = (manager.lease(pixels_for([SMALL]), [SMALL]) for _ in range(3))
    second.release()
    for _ in range(4):
        manager.execute(pixels_for([IMAGE]), [IMAGE])
        assert (first.valid, second.valid, third.valid) == (True, False, True)
    with pytest.raises(RuntimeError, match="it was released"):
        _ = second.outputs
    second.release()  # again: nothing happens


def test_a_lease_as_context_manager(make, pixels_for):
    manager = make()
    with manager.lease(pixels_for([IMAGE]), [IMAGE]) as lease:
        assert lease.valid
    assert not lease.valid


@pytest.mark.parametrize("name", ["two replays", "eager", "eager and replay", "nothing"])
def test_a_lease_of_several_batches_owns_its_results(encoder, manager, pixels_for, name):
    grid = LAYOUTS[name]
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid) if grid else manager.execute(pixels, grid)
    lease = manager.lease(pixels, grid)
    for seed in range(3):
        manager.execute(pixels_for([IMAGE], seed), [IMAGE])
    assert not lease.zero_copy
    assert lease.valid
    assert_same(lease.outputs, expected)


def test_clear_revokes_leases(make, pixels_for):
    manager = make(num_slots=2)
    lease = manager.lease(pixels_for([IMAGE]), [IMAGE])
    assert manager.stats()["items"] == 1
    manager.clear()
    assert manager.stats()["items"] == 0
    with pytest.raises(RuntimeError, match="the graphs were cleared"):
        _ = lease.outputs
    lease.release()
    with pytest.raises(RuntimeError, match="call capture"):
        manager.lease(pixels_for([IMAGE]), [IMAGE])


# counters

sides = st.sampled_from([2, 4, 6, 8, 16, 32])
items = st.tuples(st.integers(1, 5) | st.just(40), sides, sides)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(calls=st.lists(st.tuples(st.lists(items, max_size=12), st.booleans()), max_size=6))
def test_counters_add_up(fake_encoder, rerun_recorder, pixels_for, calls):
    encoder = fake_encoder()
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    manager.capture()
    for grid, leased in calls:
        pixels = pixels_for(grid)
        found = manager.lease(pixels, grid).outputs if leased else manager.execute(pixels, grid)
        if grid:
            assert_same(found, encoder.eager_forward(pixels, grid))
    stats = manager.stats()
    assert stats["hits"] + stats["misses"] == stats["items"] == sum(len(g) for g, _ in calls)
    assert stats["misses"] == sum(stats["eager_reasons"].values())
    assert sum(stats["histogram"].values()) == len(calls)
    assert stats["live_tokens"] <= stats["padded_tokens"]
    assert stats["live_patches"] <= stats["padded_patches"]
    assert stats["live_patches"] == 4 * stats["live_tokens"]
    for total, part in {
        "replays": "replays",
        "hits": "items",
        "live_tokens": "live_tokens",
    }.items():
        assert stats[total] == sum(rung[part] for rung in stats["rungs"])
    assert stats["padded_tokens"] == sum(r["replays"] * r["token_budget"] for r in stats["rungs"])


# refit and evict


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("histogram", "expected"),
    [({16: 5, 40: 5, 128: 1}, [16, 40, 128]), ({16: 5, 32: 5}, [16, 32])],
    ids=["same buffers", "smaller buffers"],
)
def test_refit(encoder, make, pixels_for, background, histogram, expected):
    manager = make(num_slots=2)
    old = manager.ladder
    future = manager.refit(histogram, background=background)
    assert background or future.done()
    assert future.result(timeout=30) == tuple(expected)
    assert budgets(manager) == expected
    assert manager.ladder is not old
    assert (manager.ladder.ring is old.ring) == (expected[-1] == 128)
    rows = [len(slot.outputs[POOLED]) for slot in manager.ladder.ring.slots]
    assert rows == [expected[-1]] * 2
    stats = manager.stats()
    assert (stats["refits"], stats["ladder_generation"]) == (1, 2)
    for grid in LAYOUTS.values():
        if grid:
            pixels = pixels_for(grid)
            assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))


def test_refit_to_the_calls_seen(manager, pixels_for):
    for grid in ([IMAGE], [IMAGE, SMALL], [IMAGE, SMALL], [(1, 16, 32)]):
        manager.execute(pixels_for(grid), grid)
    manager.refit(max_rungs=2, background=False).result()
    assert budgets(manager) == [24, 128]


def test_kept_rungs_keep_their_graphs_and_results(encoder, manager, pixels_for):
    kept = manager.ladder.rungs[manager.rungs[0]]
    lease = manager.lease(pixels_for([IMAGE]), [IMAGE])
    (slot,) = manager.ladder.ring.slots
    slot.inputs["pixel_values"].zero_()  # a warm-up on these buffers would change the results
    manager.refit({16: 1, 40: 1, 128: 1}, background=False).result()
    assert manager.ladder.rungs[manager.rungs[0]] is kept
    assert lease.valid  # the slots are the same ones
    assert_same(lease.outputs, encoder.eager_forward(pixels_for([IMAGE]), [IMAGE]))


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_refit_keeps_the_old_ladder(encoder, manager, pixels_for, background, caplog):
    old = manager.ladder
    encoder.fail_at = 40
    future = manager.refit({16: 1, 40: 1, 128: 1}, background=background)
    with pytest.raises(FloatingPointError, match="kernel went wrong"):
        future.result(timeout=30)
    assert "refit failed, the old ladder stays" in caplog.text
    assert manager.ladder is old
    assert manager.stats()["refits"] == 0
    pixels = pixels_for([IMAGE, SMALL])
    assert_same(
        manager.execute(pixels, [IMAGE, SMALL]), encoder.eager_forward(pixels, [IMAGE, SMALL])
    )
    encoder.fail_at = None
    assert manager.refit({16: 1, 40: 1, 128: 1}, background=False).result() == (16, 40, 128)


@pytest.fixture
def paused_refit(fake_encoder, rerun_recorder):
    """A manager whose refit in the background waits, the future, and the event that lets it go."""
    go, waits = threading.Event(), threading.Event()

    class Slow(fake_encoder):
        def graph_forward(self, inputs, outputs, limits):
            if limits.token_budget == 40:
                waits.set()
                go.wait(30)
            super().graph_forward(inputs, outputs, limits)

    manager = EncoderCudaGraphManager(Slow(), CONFIG, recorder=rerun_recorder)
    manager.capture()
    future = manager.refit({16: 1, 40: 1, 128: 1})
    assert waits.wait(30)
    yield manager, future, go
    go.set()


def test_calls_go_on_during_a_refit(paused_refit, fake_encoder, pixels_for):
    manager, future, go = paused_refit
    grid = [IMAGE, SMALL]
    pixels = pixels_for(grid)
    for _ in range(3):
        assert_same(manager.execute(pixels, grid), fake_encoder().eager_forward(pixels, grid))
    assert budgets(manager) == [16, 64, 128]
    with pytest.raises(RuntimeError, match="refit: a refit is running"):
        manager.refit({16: 1})
    with pytest.raises(RuntimeError, match="evict: a refit is running"):
        manager.evict(16)
    go.set()
    assert future.result(timeout=30) == (16, 40, 128)
    assert budgets(manager) == [16, 40, 128]


def test_clear_waits_for_a_refit(paused_refit):
    manager, future, go = paused_refit
    threading.Timer(0.05, go.set).start()
    manager.clear()
    assert future.done()
    assert manager.ladder is None
    assert manager.stats()["refits"] == 0


@pytest.mark.parametrize("first", ["refit", "evict"])
def test_another_thread_is_faster(manager, monkeypatch, first):
    """It changes the ladder while this one still fits budgets."""
    fit, begun = refit.fit_budgets, []

    def slowly(*args, **options):
        budgets = fit(*args, **options)
        if not begun:
            begun.append(True)
            if first == "evict":
                manager.evict(budgets_before[0])
            else:
                manager.refit({16: 1, 128: 1}, background=False)
        return budgets

    budgets_before = budgets(manager)
    monkeypatch.setattr(refit, "fit_budgets", slowly)
    with pytest.raises(RuntimeError, match="the ladder was replaced meanwhile; call refit again"):
        manager.refit({40: 1, 128: 1}, background=False)
    assert budgets(manager) == ([16, 128] if first == "refit" else budgets_before[1:])
    assert manager.stats()["ladder_generation"] == 2


def test_refit_refuses(make, pixels_for):
    manager = make()
    manager.execute(pixels_for([]), [])  # no traffic to go by
    with pytest.raises(ValueError, match="no call was served since capture"):
        manager.refit()
    with pytest.raises(ValueError, match="histogram is empty"):
        manager.refit({})
    with pytest.raises(ValueError, match="max_rungs=0"):
        manager.refit({16: 1}, max_rungs=0)
    manager.clear()
    with pytest.raises(RuntimeError, match="refit: nothing is captured"):
        manager.refit({16: 1})
    with pytest.raises(RuntimeError, match="evict: nothing is captured"):
        manager.evict()


def test_evict(encoder, manager, pixels_for):
    with pytest.raises(ValueError, match=r"no rung of 32 tokens; the rungs are \[16, 64, 128\]"):
        manager.evict(32)
    with pytest.raises(ValueError, match="evict: no call was served"):
        manager.evict()
    for grid in ([IMAGE], [IMAGE], [(1, 16, 32)]):
        manager.execute(pixels_for(grid), grid)
    assert manager.evict() == 64  # no call needs it
    assert manager.evict(128) == 128
    assert budgets(manager) == [16]
    pixels = pixels_for([(1, 16, 32)])
    assert_same(
        manager.execute(pixels, [(1, 16, 32)]), encoder.eager_forward(pixels, [(1, 16, 32)])
    )
    with pytest.raises(RuntimeError, match="16 tokens is the only one"):
        manager.evict()


def test_an_evicted_rung_is_let_go(manager, pixels_for):
    """What its replays were prepared with goes with it, in every slot."""
    for _ in range(3):
        manager.execute(pixels_for([IMAGE]), [IMAGE])
    manager.run_on(manager.rungs[1], pixels_for([IMAGE]), [IMAGE])
    ladder = manager.ladder
    gone = [weakref.ref(g) for rung in manager.rungs[:2] for g in ladder.rungs[rung].graphs]
    del ladder
    manager.evict(16)
    manager.evict(64)
    gc.collect()  # the recordings of this test are closures
    assert [graph() for graph in gone] == [None] * len(gone)
