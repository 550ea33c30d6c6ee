"""Real graphs: the same work eagerly, recorded and replayed has to agree bit by bit."""

import gc
from functools import partial

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphManager

pytestmark = pytest.mark.gpu

CONFIG = {"token_budgets": [16, 64, 128, 1024], "max_vision_items_per_batch": 8}
SMALL = [(1, 4, 4)]
MIXED = [(1, 8, 8), (1, 4, 4), (3, 4, 6), (1, 2, 12)]
LARGE = [(1, 64, 64)]
MANY = [(1, 16, 16), (1, 4, 4)] * 10
WITH_EAGER = [(1, 4, 4), (300, 2, 2), (1, 8, 8)]
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def encoder(fake_encoder):
    return fake_encoder("cuda")


@pytest.fixture
def manager(encoder):
    manager = EncoderCudaGraphManager(encoder, CONFIG)
    manager.capture()
    yield manager
    manager.clear()


@pytest.mark.parametrize("grid", [SMALL, MIXED, LARGE, MANY, WITH_EAGER])
@pytest.mark.parametrize("place", ["cuda", "cpu", "pinned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_eager(encoder, manager, pixels_for, grid, place, dtype):
    pixels = pixels_for(grid).to(dtype)
    expected = encoder.eager_forward(pixels, grid)
    if place != "cpu":
        pixels = pixels.cuda() if place == "cuda" else pixels.pin_memory()
    assert_same(manager.execute(pixels, grid), expected)


def test_small_large_small(encoder, manager, pixels_for):
    held = []
    for seed, grid in enumerate([SMALL, LARGE, SMALL, MIXED, LARGE, MIXED, SMALL]):
        pixels = pixels_for(grid, seed)
        held.append((manager.execute(pixels.cuda(), grid), encoder.eager_forward(pixels, grid)))
        # Churn: memory that a graph should have kept would be handed out and overwritten here.
        gc.collect()
        del pixels
        torch.full((1 << 22,), torch.nan, device="cuda")
    # Compared only now: results must not share memory with the static buffers.
    for actual, expected in held:
        assert_same(actual, expected)


def test_stale_nan_pixels(encoder, manager, pixels_for):
    manager.execute(torch.full((4096, 6), torch.nan, device="cuda"), LARGE)
    for grid in (SMALL, MIXED):
        pixels = pixels_for(grid)
        assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("grid", [SMALL, MIXED, MANY])
def test_replay_does_not_synchronise(encoder, manager, pixels_for, grid):
    pixels = pixels_for(grid)
    on_device, table = pixels.to("cuda", torch.bfloat16), torch.tensor(grid)
    pinned = pixels.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = manager.execute(on_device, table)
        from_pinned = manager.execute(pinned, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = encoder.eager_forward(pixels, grid)
    assert_same(results, expected)
    assert_same(from_pinned, expected)


def test_many_replays_in_flight_keep_their_grids(encoder, manager, pixels_for):
    # A reused pinned table would be overwritten while earlier copies of it still wait.
    layouts = [[(1, 2, 8), (1, 8, 8)], [(1, 8, 8), (1, 2, 8)], [(1, 4, 10), (1, 4, 10)]]
    pixels = pixels_for(layouts[0]).cuda()
    expected = [encoder.eager_forward(pixels, grid) for grid in layouts]
    torch.cuda._sleep(50_000_000)
    results = [manager.execute(pixels, layouts[call % 3]) for call in range(30)]
    for call, actual in enumerate(results):
        assert_same(actual, expected[call % 3])


def test_calls_on_two_streams_do_not_race(encoder, manager, pixels_for):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    first, second = pixels_for(LARGE, 1).cuda(), pixels_for(LARGE, 2).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(50_000_000)
        a = manager.execute(first, LARGE)
    with torch.cuda.stream(streams[1]):
        b = manager.execute(second, LARGE)
    torch.cuda.synchronize()
    assert_same(a, encoder.eager_forward(first, LARGE))
    assert_same(b, encoder.eager_forward(second, LARGE))


def test_clear_frees_memory(encoder):
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [64, 1 << 18]})
    manager.capture()
    held = torch.cuda.memory_allocated() - before[0]
    assert held > (1 << 20) * 6 * 4
    manager.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before[0] < held // 100
    assert torch.cuda.memory_reserved() - before[1] < held // 10


def test_a_given_pool_is_used(encoder, pixels_for):
    pool = torch.cuda.graph_pool_handle()
    manager = EncoderCudaGraphManager(encoder, CONFIG)
    manager.capture(graph_pool=pool)
    assert manager.graph_pool == pool
    pixels = pixels_for(MIXED)
    assert_same(manager.execute(pixels, MIXED), encoder.eager_forward(pixels, MIXED))


def test_failed_capture_leaves_the_stream_and_the_device_usable(fake_encoder, pixels_for):
    class Syncing(fake_encoder):
        syncs = True

        def graph_forward(self, inputs, outputs, limits):
            super().graph_forward(inputs, outputs, limits)
            if self.syncs:
                inputs["grid"].sum().item()

    encoder = Syncing("cuda")
    manager = EncoderCudaGraphManager(encoder, CONFIG)
    stream = torch.cuda.current_stream()
    torch.manual_seed(5)
    numbers = torch.randn(3, device="cuda")
    torch.manual_seed(5)
    with pytest.raises(RuntimeError) as caught:
        manager.capture()
    assert "while capturing the rung of 1024 tokens" in caught.value.__notes__
    assert torch.cuda.current_stream() == stream
    # the generator and the allocators are out of the capture as well
    assert torch.equal(torch.randn(3, device="cuda"), numbers)
    assert torch.empty(1 << 20).pin_memory().is_pinned()
    rows = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    held = torch.cuda.mem_get_info()[0]
    del rows
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] - held >= 1 << 28
    encoder.syncs = False
    manager.capture()
    pixels = pixels_for(MIXED)
    assert_same(manager.execute(pixels, MIXED), encoder.eager_forward(pixels, MIXED))
