"""Calls of layouts that were planned before, which skip what need not be found out again."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.capture.staging import grid_rows

IMAGE, SMALL = (1, 8, 8), (1, 4, 4)
KNOWN = grid_rows([IMAGE, SMALL])


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_slots", [1, 2])
def test_it_is_execute(make, encoder, pixels_for, num_slots, dtype):
    manager = make(num_slots=num_slots)
    pixels = [pixels_for(KNOWN, seed).to(dtype) for seed in range(4)]
    assert manager.replay_known(pixels[0], KNOWN) is None
    first = manager.execute(pixels[0], KNOWN)
    once = manager.stats()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for i in (1, 2, 3, 1):
        results = manager.replay_known(pixels[i], KNOWN)
        assert_same(results, encoder.eager_forward(pixels[i].float(), KNOWN))
        assert list(results) == list(first)
    assert_same(first, kept)
    stats = manager.stats()
    for counter in ("items", "hits", "misses", "replays", "live_tokens", "padded_tokens"):
        assert stats[counter] == 5 * once[counter]
    assert stats["histogram"] == {20: 5}


def test_other_layouts_between(make, encoder, pixels_for):
    """The grid table of the call before is in the static buffer."""
    manager = make()
    grids = [grid_rows([IMAGE, SMALL]), grid_rows([SMALL, IMAGE]), grid_rows([(2, 4, 4)])]
    for grid in grids:
        manager.execute(pixels_for(grid), grid)
    for seed, grid in enumerate([*grids, *reversed(grids), grids[0]]):
        pixels = pixels_for(grid, seed)
        assert_same(manager.replay_known(pixels, grid), encoder.eager_forward(pixels, grid))


def test_what_it_leaves_to_execute(make, pixels_for):
    manager = make()
    pixels = pixels_for(KNOWN)
    manager.execute(pixels, KNOWN)
    before = manager.stats()
    assert manager.replay_known(pixels[1:], KNOWN) is None
    assert manager.replay_known(pixels[:, 1:], KNOWN) is None
    assert manager.replay_known(pixels.flatten(), KNOWN) is None
    assert manager.replay_known(pixels.int(), KNOWN) is None
    assert manager.replay_known(pixels.to(torch.float8_e4m3fn), KNOWN) is None
    assert manager.replay_known(pixels.clone().requires_grad_(), KNOWN) is None
    assert manager.replay_known(pixels_for([SMALL]), grid_rows([SMALL])) is None
    assert manager.stats() == before
    for grid in (grid_rows([IMAGE] * 9), grid_rows([(1, 32, 32)]), grid_rows([])):
        manager.execute(pixels_for(grid), grid)
        before = manager.stats()
        assert manager.replay_known(pixels_for(grid), grid) is None
        assert manager.stats() == before
    with torch.no_grad():
        assert manager.replay_known(pixels.clone().requires_grad_(), KNOWN) is not None


def test_another_ladder(make, encoder, pixels_for):
    manager = make()
    pixels = pixels_for(KNOWN)
    manager.execute(pixels, KNOWN)
    manager.refit({20: 10}, background=False).result()
    assert manager.replay_known(pixels, KNOWN) is None
    assert_same(manager.execute(pixels, KNOWN), encoder.eager_forward(pixels, KNOWN))
    assert_same(manager.replay_known(pixels, KNOWN), encoder.eager_forward(pixels, KNOWN))
    manager.clear()
    assert manager.replay_known(pixels, KNOWN) is None


def test_a_ladder_published_meanwhile(make, pixels_for):
    """While a call waits for the lock another thread puts a ladder in place."""
    manager = make()
    pixels = pixels_for(KNOWN)
    manager.execute(pixels, KNOWN)
    executor = manager._executor

    class Refitting:
        def __enter__(self):
            executor.lock = lock
            executor.publish(executor.ladder)

        def __exit__(self, *_):
            return None

    executor.lock, lock = Refitting(), executor.lock
    assert manager.replay_known(pixels, KNOWN) is None


def test_a_lease_is_overtaken(make, pixels_for):
    manager = make()
    lease = manager.lease(pixels_for(KNOWN), KNOWN)
    assert lease.valid
    assert manager.replay_known(pixels_for(KNOWN, 1), KNOWN) is not None
    assert not lease.valid


def test_an_exchanged_buffer_is_noticed_before_the_replay(make, pixels_for, monkeypatch):
    manager = make()
    manager.execute(pixels_for(KNOWN), KNOWN)
    for rung in manager.ladder.rungs.values():
        rung.graphs[0].outputs["pooler_output"] = torch.zeros(1)
        for recording in rung.graphs[0].recordings.values():
            monkeypatch.setattr(recording, "replay", lambda: pytest.fail("was replayed"))
    with pytest.raises(RuntimeError, match="was rebound after capture"):
        manager.replay_known(pixels_for(KNOWN), KNOWN)


def test_it_is_seen_in_a_profile(make, pixels_for):
    manager = make()
    manager.execute(pixels_for(KNOWN), KNOWN)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        manager.replay_known(pixels_for(KNOWN), KNOWN)
    names = {event.name for event in recorded.events()}
    assert {"vitgraph.stage", "vitgraph.replay[64]"} <= names


def test_encoders_that_stage_their_inputs_are_left_to_execute(encoder, rerun_recorder, pixels_for):
    class Staging(type(encoder)):
        def stage(self, grid, limits):
            table = torch.zeros(limits.max_items, 3, dtype=torch.int32)
            table[: len(grid)] = torch.tensor(grid)
            return {"grid": table}

    manager = EncoderCudaGraphManager(Staging(), {"token_budgets": [64]}, recorder=rerun_recorder)
    manager.capture()
    manager.execute(pixels_for(KNOWN), KNOWN)
    assert manager.replay_known(pixels_for(KNOWN), KNOWN) is None


def test_floats_are_not_read_as_integers(encoder, rerun_recorder, pixels_for):
    class Bytes(type(encoder)):
        def input_specs(self, limits):
            specs = super().input_specs(limits)
            return specs | {"pixel_values": replace(specs["pixel_values"], dtype=torch.uint8)}

        def graph_forward(self, inputs, outputs, limits):
            pixels = inputs["pixel_values"].float()
            super().graph_forward({**inputs, "pixel_values": pixels}, outputs, limits)

    manager = EncoderCudaGraphManager(Bytes(), {"token_budgets": [64]}, recorder=rerun_recorder)
    manager.capture()
    pixels = pixels_for(KNOWN)
    manager.execute(pixels.to(torch.uint8), KNOWN)
    assert manager.replay_known(pixels, KNOWN) is None
    with pytest.raises(TypeError, match=r"torch\.float32, the encoder reads torch\.uint8"):
        manager.execute(pixels, KNOWN)


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_a_buffer_that_is_gone_is_noticed_before_the_replay(make, pixels_for, monkeypatch, place):
    manager = make()
    manager.execute(pixels_for(KNOWN), KNOWN)
    for rung in manager.ladder.rungs.values():
        getattr(rung.graphs[0], place).popitem()
        for recording in rung.graphs[0].recordings.values():
            monkeypatch.setattr(recording, "replay", lambda: pytest.fail("was replayed"))
    with pytest.raises(RuntimeError, match="was rebound after capture"):
        manager.replay_known(pixels_for(KNOWN), KNOWN)


@pytest.mark.gpu
def test_another_stream_is_left_to_execute():
    """Which lets it wait for the call before, after which the new stream is the usual one."""
    import vitgraph.bench.towers_config as towers
    from vitgraph.encoder import VisionEncoder

    tower = towers.build_tower("tiny-qwen3-vl", device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(tower)
    encoder.capture({"token_budgets": [64]})
    pixels = torch.randn(80, 1536, device="cuda").bfloat16()
    manager = encoder.graphs
    want = manager.execute(pixels, KNOWN)
    assert_same(manager.replay_known(pixels, KNOWN), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert manager.replay_known(pixels, KNOWN) is None
        assert_same(manager.execute(pixels, KNOWN), want)
        assert_same(manager.replay_known(pixels, KNOWN), want)
    torch.cuda.synchronize()
    got = encoder(pixels, torch.tensor(KNOWN))
    assert torch.equal(got.pooler_output, want["pooler_output"])
    assert torch.equal(encoder(pixels, torch.tensor(KNOWN)).pooler_output, want["pooler_output"])
