"""The whole execute path on the CPU; `rerun_recorder` runs recorded work again on every replay."""

import gc
from functools import partial

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphManager

CONFIG = {
    "token_budgets": [16, 64, 128],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 32,
}
IMAGE = (1, 8, 8)  # 16 tokens
SMALL = (1, 4, 4)  # 4 tokens
LONG_VIDEO = (40, 2, 2)  # 40 tokens, but more frames than any rung has slots
HUGE = (1, 32, 32)  # 256 tokens, more than any budget

LAYOUTS = {
    "one": [IMAGE],
    "fills the largest rung": [(1, 16, 32)],
    "several": [IMAGE, SMALL, (3, 4, 6), (1, 2, 12)],
    "two replays": [IMAGE] * 9,
    "interleaved": [(1, 16, 20), SMALL, (1, 16, 20), SMALL, (1, 16, 22), (2, 4, 4)],
    "eager only": [HUGE],
    "eager between": [SMALL, HUGE, IMAGE, LONG_VIDEO, SMALL],
}
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def manager(encoder, rerun_recorder):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    manager.capture()
    return manager


@pytest.mark.parametrize("grid", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_eager(encoder, manager, pixels_for, grid, dtype):
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid)
    assert_same(manager.execute(pixels.to(dtype), torch.tensor(grid)), expected)
    stats = manager.stats()
    assert stats["hits"] + stats["misses"] == len(grid)


def test_small_after_large_and_back(encoder, manager, pixels_for):
    pixels = {}
    for seed, name in enumerate(["one", "several", "fills the largest rung", "one", "two replays"]):
        grid = LAYOUTS[name]
        pixels[name] = pixels_for(grid, seed)
        actual = manager.execute(pixels[name], grid)
        assert_same(actual, encoder.eager_forward(pixels[name], grid))


def test_stale_pixels_do_not_reach_results(encoder, manager, pixels_for):
    manager.execute(torch.full((512, 6), torch.nan), [(1, 16, 32)])
    for grid in ([SMALL], [IMAGE, SMALL]):
        pixels = pixels_for(grid)
        assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))


def test_other_layout_with_equal_totals(encoder, manager, pixels_for):
    first, second = [(1, 2, 8), (1, 4, 6), (1, 2, 10)], [(1, 2, 10), (1, 2, 10), (1, 2, 10)]
    pixels = pixels_for(first)
    for grid in (first, second, first):
        assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))


@pytest.mark.parametrize("name", ["one", "two replays", "eager only"])
def test_results_belong_to_the_caller(manager, pixels_for, name):
    grid = LAYOUTS[name]
    first = manager.execute(pixels_for(grid, 1), grid)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    manager.execute(pixels_for(grid, 2), grid)
    assert_same(first, kept)
    assert not any(tensor.is_inference() for tensor in first.values())


@pytest.mark.parametrize("pixels", [torch.empty(0, 6), torch.empty(0)])
def test_no_items(manager, pixels):
    results = manager.execute(pixels, torch.empty(0, 3, dtype=torch.int64))
    assert results["last_hidden_state"].shape == (0, 6)
    assert results["pooler_output"].shape == (0, 6)
    assert manager.stats()["replays"] == 0


def test_in_inference_mode(encoder, rerun_recorder, pixels_for):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    pixels = pixels_for([IMAGE])
    with torch.inference_mode():
        manager.capture()
        inside = manager.execute(pixels, [IMAGE])
    assert_same(manager.execute(pixels, [IMAGE]), inside)


def buffers_of(manager):
    (slot,) = manager.ladder.ring.slots
    return [*slot.inputs.values(), *slot.outputs.values()]


@pytest.mark.parametrize("name", ["one", "several", "two replays", "eager only", "eager between"])
def test_no_gradients(encoder, manager, pixels_for, name):
    grid = LAYOUTS[name]
    pixels = pixels_for(grid)
    expected = encoder.eager_forward(pixels, grid)
    given = pixels.clone().requires_grad_()
    got = manager.execute(given, grid)
    assert_same(got, expected)
    with manager.lease(given, grid) as lease:
        leased = list(lease.outputs.values())
    for out in ({n: torch.empty_like(t).requires_grad_() for n, t in got.items()}, None):
        kept = manager.execute(pixels, grid, out=out)
        assert all(tensor.is_leaf for tensor in kept.values())
    assert not any(t.requires_grad for t in (*got.values(), *leased, *buffers_of(manager)))
    assert torch.is_grad_enabled()


def test_a_lease_takes_no_gradients(encoder, manager, pixels_for):
    """Written in place, they would hang on the buffers of all later calls."""
    pixels, weight = pixels_for([IMAGE]), torch.ones(1, requires_grad=True)
    with manager.lease(pixels, [IMAGE]) as lease:
        kept = lease.outputs["pooler_output"]
        with pytest.raises(RuntimeError, match="no_grad mode"):
            kept.mul_(weight)
        kept.mul_(2)  # anything else is the reader's business
    got = manager.execute(pixels, [IMAGE])
    assert_same(got, encoder.eager_forward(pixels, [IMAGE]))
    assert not any(tensor.requires_grad for tensor in (*got.values(), *buffers_of(manager)))


def test_no_gradients_of_eager_weights(encoder, manager, pixels_for, monkeypatch):
    weight, forward = torch.ones(1, requires_grad=True), encoder.eager_forward
    monkeypatch.setattr(
        encoder, "eager_forward", lambda pixels, *args: forward(pixels * weight, *args)
    )
    for name in ("eager only", "eager between"):
        got = manager.execute(pixels_for(LAYOUTS[name]), LAYOUTS[name])
        assert not any(tensor.requires_grad for tensor in got.values())


def test_stats(manager, pixels_for):
    grid = LAYOUTS["eager between"]
    manager.execute(pixels_for(grid), grid)
    stats = manager.stats()
    expected = {
        "items": 5,
        "hits": 3,
        "misses": 2,
        "eager_reasons": {"tokens": 1, "frames": 1},
        "replays": 1,
        "live_tokens": 24,
        "padded_tokens": 64,
        "live_patches": 96,
        "padded_patches": 256,
        "histogram": {320: 1},
        "ladder_generation": 1,
        "refits": 0,
        "bytes": 0,
    }
    assert {key: stats[key] for key in expected} == expected
    assert [rung["replays"] for rung in stats["rungs"]] == [0, 1, 0]
    assert stats["rungs"][1]["items"] == 3
    assert stats["capture_seconds"] == sum(rung["capture_seconds"] for rung in stats["rungs"]) > 0


def test_before_capture_and_after_clear(encoder, rerun_recorder, pixels_for):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    with pytest.raises(RuntimeError, match=r"nothing is captured; call capture\(\) first"):
        manager.execute(pixels_for([IMAGE]), [IMAGE])
    for _ in range(2):
        manager.capture()
        assert manager.graph_pool == "pool"
        manager.execute(pixels_for([IMAGE]), [IMAGE])
        manager.clear()
        assert manager.graph_pool is None
        assert manager.stats()["hits"] == 0
        with pytest.raises(RuntimeError, match="nothing is captured"):
            manager.execute(pixels_for([IMAGE]), [IMAGE])


def test_capture_needs_cuda(encoder):
    manager = EncoderCudaGraphManager(encoder, CONFIG)
    with pytest.raises(RuntimeError, match=r"on cpu, and CUDA graphs need a CUDA device"):
        manager.capture()


def test_capture_goes_from_large_to_small_with_empty_tables(fake_encoder, rerun_recorder):
    warmed = []

    class Noting(fake_encoder):
        def graph_forward(self, inputs, outputs, limits):
            assert not inputs["grid"].any()
            warmed.append(limits.token_budget)
            super().graph_forward(inputs, outputs, limits)

    manager = EncoderCudaGraphManager(Noting(), CONFIG, recorder=rerun_recorder)
    manager.capture()
    assert manager.get_num_graphs_to_capture() == 3
    # All are warmed up before the first is recorded; a recording is then launched once.
    assert warmed == [128, 64, 16, 128, 64, 16]


def test_kernels_are_compiled_where_they_are_warmed_up(fake_encoder, rerun_recorder):
    noted = []

    class Noting(fake_encoder):
        def graph_forward(self, inputs, outputs, limits):
            noted.append(limits.token_budget)
            super().graph_forward(inputs, outputs, limits)

        def compile_kernels(self, inputs, outputs, rungs):
            noted.append("compile")

    class Recorder(type(rerun_recorder)):
        def warm_up(self, work):
            noted.append("on the stream")
            work()

    EncoderCudaGraphManager(Noting(), CONFIG, recorder=Recorder()).capture()
    assert noted[:4] == ["on the stream", "compile", "on the stream", 128]


def test_budget_too_small_for_any_image(fake_encoder, rerun_recorder):
    class Tiles(fake_encoder):
        def item_specs(self, grid_thw):
            if any(h < 32 for _, h, _ in grid_thw):
                raise ValueError("item_specs: tiles have 32 rows")
            return super().item_specs(grid_thw)

    manager = EncoderCudaGraphManager(Tiles(), {"token_budgets": [16]}, recorder=rerun_recorder)
    with pytest.raises(ValueError, match=r"rung of 16 tokens holds no image.*remove"):
        manager.capture()


def test_failed_capture_names_the_rung_and_leaves_nothing(encoder, rerun_recorder, pixels_for):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    encoder.fail_at = 64
    with pytest.raises(FloatingPointError) as caught:
        manager.capture()
    assert caught.value.__notes__ == ["while capturing the rung of 64 tokens"]
    assert gc.isenabled()
    assert manager.graph_pool is None
    with pytest.raises(RuntimeError, match="nothing is captured"):
        manager.execute(pixels_for([IMAGE]), [IMAGE])
    encoder.fail_at = None
    manager.capture()
    manager.execute(pixels_for([IMAGE]), [IMAGE])


def test_encoder_may_pop_its_inputs(fake_encoder, rerun_recorder, pixels_for):
    class Popping(fake_encoder):
        def graph_forward(self, inputs, outputs, limits):
            super().graph_forward(
                {name: inputs.pop(name) for name in list(inputs)}, outputs, limits
            )

    encoder = Popping()
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    manager.capture()
    pixels = pixels_for([IMAGE])
    for _ in range(2):
        assert_same(manager.execute(pixels, [IMAGE]), encoder.eager_forward(pixels, [IMAGE]))


def test_rebound_buffer_is_noticed(manager, pixels_for):
    (graph,) = manager.ladder.rungs[manager.rungs[0]].graphs
    graph.outputs["pooler_output"] = graph.outputs["pooler_output"].clone()
    before = manager.stats()
    with pytest.raises(RuntimeError, match="rung of 16 tokens was rebound after capture"):
        manager.execute(pixels_for([IMAGE]), [IMAGE])
    assert manager.stats() == before


def test_moved_memory_is_noticed(manager, pixels_for):
    (graph,) = manager.ladder.rungs[manager.rungs[0]].graphs
    buffer = graph.outputs["pooler_output"]
    buffer.set_(buffer.clone())
    with pytest.raises(RuntimeError, match="rung of 16 tokens was rebound after capture"):
        manager.execute(pixels_for([IMAGE]), [IMAGE])


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(63, 6), ValueError, r"pixel_values is \[63, 6\].*ask for \[64, 6\]"),
        (torch.zeros(64, 5), ValueError, r"pixel_values is \[64, 5\].*ask for \[64, 6\]"),
        (torch.zeros(64, 6, dtype=torch.uint8), TypeError, r"uint8, the encoder reads .*float32"),
    ],
)
def test_refuses_pixels(manager, pixels, error, message):
    with pytest.raises(error, match=message):
        manager.execute(pixels, [IMAGE])


def test_refused_grid_is_the_encoders_error(manager, pixels_for):
    with pytest.raises(ValueError, match="is odd"):
        manager.execute(pixels_for([(1, 3, 4)]), [(1, 3, 4)])


def test_refuses_encoder_with_other_inputs(fake_encoder):
    class Other(fake_encoder):
        def input_specs(self, limits):
            return {"images": super().input_specs(limits)["pixel_values"]}

    with pytest.raises(ValueError, match=r"Other.input_specs names \['images'\]"):
        EncoderCudaGraphManager(Other(), CONFIG)


def test_progress_goes_to_stderr(encoder, rerun_recorder, capsys):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    manager.capture(show_progress=True)
    shown = capsys.readouterr()
    assert "16 tokens" in shown.err
    assert not shown.out
    manager.capture()
    assert not capsys.readouterr().err
