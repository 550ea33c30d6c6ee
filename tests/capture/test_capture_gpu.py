"""What a manager promises on a GPU: bits, streams, memory, and a ladder that changes underway."""

import gc
import random
import time
from functools import partial

import pytest
import torch
from vitgraph.bench.towers_config import build_tower
from vitgraph.capture import EncoderCudaGraphManager, EncoderItemSpec, generate_budgets
from vitgraph.encoder import VisionEncoder

pytestmark = pytest.mark.gpu

CONFIG = {
    "token_budgets": [16, 24, 40, 64, 96, 128, 256, 1024],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 16,
}
SMALL = [(1, 4, 4)]
MIXED = [(1, 8, 8), (1, 4, 4), (3, 4, 6), (1, 2, 12)]
LARGE = [(1, 64, 64)]
MANY = [(1, 16, 16), (1, 4, 4)] * 10
WITH_EAGER = [(1, 4, 4), (300, 2, 2), (1, 8, 8)]
# Rungs exactly full: of tokens, of items, of frames.
FULL = [[(1, 8, 8)], [(1, 16, 32)], LARGE, [(1, 32, 64)] * 2, [(1, 2, 4)] * 8, [(16, 2, 2)]]
MIB = 1 << 20
BIG = generate_budgets(1 << 16, 1 << 18)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def encoder(fake_encoder):
    return fake_encoder("cuda")


@pytest.fixture
def big(fake_encoder):
    """An encoder whose largest rung takes hundreds of MiB, captured once: what CUDA loads is in."""

    class Big(fake_encoder):
        def item_specs(self, grid_thw):  # a side may have any length
            if any(h % 2 or w % 2 for _, h, w in grid_thw):
                raise ValueError("item_specs: an odd side")
            return [
                EncoderItemSpec(t * h * w, t * h * w // 4, t, 0, t * (h * w) ** 2)
                for t, h, w in grid_thw
            ]

    encoder = Big("cuda")
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": BIG})
    manager.capture()
    manager.clear()
    return encoder


@pytest.fixture
def make(encoder):
    made = []

    def make(**config):
        manager = EncoderCudaGraphManager(encoder, {**CONFIG, **config})
        manager.capture()
        made.append(manager)
        return manager

    yield make
    for manager in made:
        manager.clear()


def free_bytes():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def random_grid(rng):
    kind = rng.random()
    if kind < 0.04:
        return []
    if kind < 0.2:
        return rng.choice(FULL)
    most = rng.choice((2, 4, 8, 14))
    return [
        (rng.choice((1, 1, 1, 2, 3, 7)), 2 * rng.randint(1, most), 2 * rng.randint(1, most))
        for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 12)))
    ]


def poison(manager):
    """A graph that fills what those of `manager` leave free in their pool with NaN."""

    def fill():
        kept = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(6, 18)]
        kept += [torch.full((1 << 14,), torch.nan, device="cuda") for _ in range(16)]

    ladder = manager.ladder
    ladder.recorder.warm_up(fill)
    return ladder.recorder.record(fill, ladder.pool)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_six_hundred_random_layouts_equal_eager(encoder, make, pixels_for, num_slots):
    manager = make(num_slots=num_slots)
    poisoned = poison(manager)
    rng = random.Random(num_slots)
    items = 0
    for seed in range(600):
        grid = random_grid(rng)
        items += len(grid)
        pixels = pixels_for(grid, seed)
        place = rng.choice(("cuda", "cpu", "pinned"))
        given = {"cuda": pixels.cuda, "cpu": pixels.clone, "pinned": pixels.pin_memory}[place]()
        poisoned.replay()
        found = manager.execute(given, grid)
        if grid:
            assert_same(found, encoder.eager_forward(pixels, grid))
        else:
            assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(found, 0)
        del found, given
        if seed % 5 == 0:
            # freed memory, which a graph must not address
            torch.full((1 << rng.randint(8, 22),), torch.nan, device="cuda")
        if seed % 50 == 0:
            gc.collect()
            torch.cuda.empty_cache()
        if seed % 97 == 0:  # rows that no later batch fills
            for slot in manager.ladder.ring.slots:
                slot.inputs["pixel_values"].fill_(torch.nan)
                for buffer in slot.outputs.values():
                    buffer.fill_(torch.nan)
    stats = manager.stats()
    assert stats["hits"] + stats["misses"] == stats["items"] == items
    assert all(rung["replays"] for rung in stats["rungs"])


@pytest.mark.parametrize(
    "grids",
    [[SMALL, LARGE, SMALL], [[(7, 4, 4)], SMALL, [(7, 4, 4), (1, 8, 8)], MIXED], FULL],
    ids=["small-large-small", "image after video", "full"],
)
def test_what_a_call_leaves_behind_does_not_reach_the_next(encoder, make, pixels_for, grids):
    manager = make()
    for seed, grid in enumerate(grids * 3):
        pixels = pixels_for(grid, seed)
        assert_same(manager.execute(pixels.cuda(), grid), encoder.eager_forward(pixels, grid))
    assert manager.stats()["misses"] == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("num_slots", [1, 2])
def test_capture_and_leases_under_sync_debug_mode(encoder, pixels_for, num_slots):
    manager = EncoderCudaGraphManager(encoder, {**CONFIG, "num_slots": num_slots})
    pixels = pixels_for(MIXED)
    pinned, out = pixels.pin_memory(), encoder.eager_forward(pixels, MIXED)
    expected = {name: value.clone() for name, value in out.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        manager.capture()
        manager.execute(pinned, MIXED, out=out)
        with manager.lease(pinned, MIXED) as lease:
            leased = {name: value.clone() for name, value in lease.outputs.items()}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(out, expected)
    assert_same(leased, expected)
    manager.clear()


# out= and leases


@pytest.mark.parametrize("grid", [MIXED, MANY, WITH_EAGER], ids=["one", "several", "eager"])
def test_strided_out(encoder, make, pixels_for, grid):
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid)
    wide = {n: torch.full((len(v), 12), 7.0, device="cuda") for n, v in expected.items()}
    out = {name: tensor[:, ::2] for name, tensor in wide.items()}
    found = make().execute(pixels.cuda(), grid, out=out)
    assert all(found[name] is out[name] for name in out)
    assert_same(found, expected)
    assert all((tensor[:, 1::2] == 7).all() for tensor in wide.values())


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_leases_copy_nothing_and_are_overtaken(encoder, make, pixels_for, num_slots):
    manager = make(num_slots=num_slots)
    buffers = {s.outputs["pooler_output"].data_ptr() for s in manager.ladder.ring.slots}
    held = []
    for seed in range(7):
        pixels = pixels_for(MIXED, seed)
        before = torch.cuda.memory_allocated()
        lease = manager.lease(pixels.pin_memory(), MIXED)
        assert torch.cuda.memory_allocated() - before < 4096
        assert lease.outputs["pooler_output"].data_ptr() in buffers
        held.append((lease, encoder.eager_forward(pixels, MIXED)))
        for lease, expected in held[-num_slots:]:
            assert_same(lease.outputs, expected)
        for lease, _ in held[:-num_slots]:
            with pytest.raises(RuntimeError, match="its slot was taken"):
                _ = lease.outputs


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("place", ["cuda", "pinned"])
def test_a_slot_is_reused_after_the_stream_that_released_it(
    encoder, make, pixels_for, num_slots, place
):
    manager = make(num_slots=num_slots)
    first, second = pixels_for(LARGE, 1), pixels_for(LARGE, 2)
    expected = encoder.eager_forward(first, LARGE)
    given = second.cuda() if place == "cuda" else second.pin_memory()
    reader = torch.cuda.Stream()
    lease = manager.lease(first.cuda(), LARGE)
    reader.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(reader):
        torch.cuda._sleep(50_000_000)
        copied = {name: value.clone() for name, value in lease.outputs.items()}
        lease.release()
    for _ in range(num_slots):
        manager.execute(given, LARGE)
    torch.cuda.synchronize()
    assert_same(copied, expected)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("late", ["caller", "copies"])
@pytest.mark.parametrize("leased", [False, True], ids=["fresh", "leased"])
def test_staging_waits_for_replays_and_replays_for_staging(
    encoder, make, pixels_for, num_slots, late, leased
):
    manager = make(num_slots=num_slots)
    layouts = [LARGE, MIXED, [(1, 32, 64)] * 2, SMALL]
    calls = [(pixels_for(layouts[i % 4], i).pin_memory(), layouts[i % 4]) for i in range(24)]
    expected = [encoder.eager_forward(pixels, grid) for pixels, grid in calls]
    copies = manager._executor._copy_stream or torch.cuda.current_stream()
    delayed = torch.cuda.current_stream() if late == "caller" else copies
    torch.cuda.synchronize()
    found = []
    for pixels, grid in calls:
        with torch.cuda.stream(delayed):
            torch.cuda._sleep(2_000_000)
        if leased:
            with manager.lease(pixels, grid) as lease:
                found.append({name: value.clone() for name, value in lease.outputs.items()})
        else:
            found.append(manager.execute(pixels, grid))
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)


def test_calls_from_alternating_streams_share_slots(encoder, make, pixels_for):
    manager = make(num_slots=2)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    calls = [(pixels_for(LARGE, seed).pin_memory(), LARGE) for seed in range(8)]
    expected = [encoder.eager_forward(pixels, grid) for pixels, grid in calls]
    torch.cuda.synchronize()
    found = []
    for number, (pixels, grid) in enumerate(calls):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(5_000_000)
            found.append(manager.execute(pixels, grid))
    torch.cuda.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)


# a ladder that changes


@pytest.mark.parametrize(
    ("histogram", "expected"),
    [
        ({16: 1, 32: 1, 72: 1, 200: 1, 512: 1, 1024: 1}, (16, 32, 72, 200, 512, 1024)),
        ({16: 1, 32: 1, 64: 1, 512: 1}, (16, 32, 64, 512)),
    ],
    ids=["same buffers", "smaller buffers"],
)
@pytest.mark.parametrize("num_slots", [1, 2])
def test_calls_during_a_refit_stay_right(encoder, make, pixels_for, histogram, expected, num_slots):
    manager = make(num_slots=num_slots)
    layouts = [SMALL, MIXED, LARGE, MANY, WITH_EAGER, [(1, 8, 8)]]
    pixels = [pixels_for(grid, seed) for seed, grid in enumerate(layouts)]
    right = [encoder.eager_forward(*call) for call in zip(pixels, layouts, strict=True)]
    on_device = [rows.cuda() for rows in pixels]
    pinned = [rows.pin_memory() for rows in pixels]
    torch.cuda.synchronize()
    deadline = time.monotonic() + 60
    future = manager.refit(histogram, max_rungs=len(expected))
    rounds = 0
    while not future.done() or rounds < 3:
        assert time.monotonic() < deadline
        for place in (on_device, pinned):
            for rows, grid, wanted in zip(place, layouts, right, strict=True):
                assert_same(manager.execute(rows, grid), wanted)
        torch.full((1 << 20,), torch.nan, device="cuda")
        rounds += 1
    assert future.result() == expected
    assert tuple(rung.token_budget for rung in manager.rungs) == expected
    poisoned = poison(manager)
    for rows, grid, wanted in zip(on_device, layouts, right, strict=True):
        poisoned.replay()
        assert_same(manager.execute(rows, grid), wanted)
    # and the ladder that was replaced is gone
    del poisoned
    manager.clear()


def test_a_failed_refit_keeps_serving(encoder, make, pixels_for):
    manager = make()
    encoder.fail_at = 48
    pixels = pixels_for(MIXED)
    expected = encoder.eager_forward(pixels, MIXED)
    future = manager.refit({16: 1, 48: 1, 1024: 1})
    with pytest.raises(FloatingPointError):
        future.result(timeout=60)
    assert_same(manager.execute(pixels.cuda(), MIXED), expected)
    encoder.fail_at = None
    assert manager.refit({16: 1, 48: 1, 1024: 1}).result(timeout=60) == (16, 48, 1024)
    assert_same(manager.execute(pixels.cuda(), MIXED), expected)


def test_evicted_rungs_leave_the_others_right(encoder, make, pixels_for):
    manager = make()
    for budget in (40, 1024, 16, 128):
        assert manager.evict(budget) == budget
        gc.collect()
        torch.full((1 << 22,), torch.nan, device="cuda")
        for grid in (SMALL, MIXED, LARGE, MANY):
            pixels = pixels_for(grid, budget)
            assert_same(manager.execute(pixels.cuda(), grid), encoder.eager_forward(pixels, grid))


# memory


@pytest.mark.parametrize("num_slots", [1, 2])
def test_profile_memory_is_right_and_leaves_nothing(big, num_slots):
    manager = EncoderCudaGraphManager(big, {"token_budgets": BIG, "num_slots": num_slots})
    before = free_bytes()
    profile = manager.profile_memory()
    assert abs(before - free_bytes()) <= 4 * MIB
    manager.capture()
    whole = before - free_bytes()
    assert whole > 100 * MIB
    assert profile.total_bytes == pytest.approx(whole, rel=0.1)
    assert manager.stats()["bytes"] == pytest.approx(whole, rel=0.1)
    manager.clear()
    assert before - free_bytes() <= 4 * MIB


def test_refits_and_evictions_give_memory_back(big):
    manager = EncoderCudaGraphManager(big, {"token_budgets": BIG})
    before = free_bytes()
    manager.capture()
    whole = before - free_bytes()
    manager.refit({BIG[0]: 1, BIG[4]: 1}, background=False).result()  # smaller buffers
    assert before - free_bytes() < 0.6 * whole
    manager.clear()
    assert before - free_bytes() <= 4 * MIB


def test_max_bytes_is_kept(big, pixels_for):
    manager = EncoderCudaGraphManager(big, {"token_budgets": BIG})
    before = free_bytes()
    most = manager.profile_memory().total_bytes * 6 // 10
    manager = EncoderCudaGraphManager(big, {"token_budgets": BIG, "max_bytes": most})
    manager.capture()
    assert 1 <= len(manager.rungs) < len(BIG)
    assert before - free_bytes() <= 1.1 * most
    pixels = pixels_for(MIXED)
    assert_same(manager.execute(pixels, MIXED), big.eager_forward(pixels, MIXED))
    manager.clear()


def test_two_managers_in_the_callers_pool(encoder, make, pixels_for):
    make().clear()  # whatever CUDA loads once
    before = free_bytes()
    pool = torch.cuda.graph_pool_handle()
    managers = [EncoderCudaGraphManager(encoder, CONFIG) for _ in range(2)]
    for manager in managers:
        manager.capture(graph_pool=pool)
        assert manager.graph_pool == pool
    for seed in range(12):
        grid = (SMALL, MIXED, LARGE)[seed % 3]
        pixels = pixels_for(grid, seed)
        for manager in managers:
            assert_same(manager.execute(pixels.cuda(), grid), encoder.eager_forward(pixels, grid))
    managers[0].clear()
    pixels = pixels_for(MIXED)
    assert_same(managers[1].execute(pixels, MIXED), encoder.eager_forward(pixels, MIXED))
    managers[1].clear()
    del pool
    assert before - free_bytes() <= 8 * MIB


# a real tower


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl"])
def test_a_tower_through_slots_leases_and_refits(name):
    """Bit for bit what the same rung gives alone, which test_tower_gpu compares with eager."""
    tower = build_tower(name, device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(tower)
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [16, 64, 256], "num_slots": 2})
    torch.cuda.set_sync_debug_mode("error")
    try:
        manager.capture()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rng = random.Random(1)
    layouts = [
        [
            (rng.choice((1, 1, 2)), 2 * rng.randint(1, 6), 2 * rng.randint(1, 6))
            for _ in range(rng.randint(1, 3))
        ]
        for _ in range(40)
    ]
    layouts += [[(1, 32, 32)], [(1, 16, 16)], [(1, 8, 8)]]  # full rungs

    def pixels_of(grid):
        rows = sum(t * h * w for t, h, w in grid)
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, encoder.spec.patch_values, generator=generator).pin_memory()

    def alone(pixels, grid):
        """What its rung gives; of a call in several batches, what another call gives."""
        before = [rung["replays"] for rung in manager.stats()["rungs"]]
        found = manager.execute(pixels, grid)
        after = [rung["replays"] for rung in manager.stats()["rungs"]]
        if sum(after) != sum(before) + 1:
            return found
        (rung,) = [r for r, a, b in zip(manager.rungs, before, after, strict=True) if a != b]
        return manager.run_on(rung, pixels, grid)

    def check():
        for grid in layouts:
            pixels = pixels_of(grid)
            expected = alone(pixels, grid)
            torch.full((1 << 20,), torch.nan, device="cuda")
            assert all(value.isfinite().all() for value in expected.values())
            assert_same(manager.execute(pixels, grid), expected)
            with manager.lease(pixels, grid) as lease:
                assert_same(lease.outputs, expected)
        assert manager.stats()["misses"] == 0

    check()
    manager.refit({16: 1, 32: 1, 128: 1, 256: 1}, max_rungs=4).result(timeout=120)
    check()
    manager.clear()
