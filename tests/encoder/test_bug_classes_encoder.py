"""Thirty ways in which captured encoders have gone wrong elsewhere, by number: those of a tower.

Without a GPU a replay runs the recorded work again, in fp64. The classes that bookkeeping alone can
show are in tests/capture/test_bug_classes.py.
"""

import gc
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import vitgraph.bench.towers_config as towers
import vitgraph.encoder.forward as tower_code
from safetensors.torch import save_file
from vitgraph.capture import CudaGraphRecorder, EncoderCudaGraphManager
from vitgraph.capture.sample_layouts import full_item
from vitgraph.encoder import VisionEncoder, swap_vision_tower
from vitgraph.kernels.attention import BACKENDS, check_backend
from vitgraph.kernels.layout import layout, num_windows
from vitgraph.kernels.testing import rel_rms

NAMES = ["tiny-qwen3-vl", "tiny-qwen2.5-vl"]
BUDGETS = [16, 64, 128]
ONE, SMALL, IMAGE, VIDEO, LARGE = (1, 2, 2), (1, 4, 4), (1, 8, 12), (2, 4, 6), (1, 16, 32)
MIXES = [[SMALL], [LARGE], [SMALL], [IMAGE, VIDEO, ONE], [VIDEO], [SMALL]]
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def build(name, device="cpu", attention=None):
    """A tower in fp64 on the CPU, in bf16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tower = towers.build_tower(name, device=device, dtype=dtype)
    return VisionEncoder.from_hf(tower.double() if device == "cpu" else tower, attention=attention)


@pytest.fixture
def capture(rerun_recorder):
    """`capture(encoder)`: captures on any device; calls of the encoder then replay."""

    def capture(encoder, config=None, recorder=None):
        if encoder.device.type == "cpu":
            recorder = rerun_recorder
        slots = {"max_vision_items_per_batch": 8, "max_frames_per_batch": 8}
        config = config or {"token_budgets": BUDGETS, **slots}
        manager = EncoderCudaGraphManager(encoder, config, recorder=recorder)
        manager.capture()
        encoder.graphs = manager
        return manager

    return capture


def pixels_of(encoder, grids, seed=0):
    rows = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, encoder.spec.patch_values, generator=generator)
    return pixels.to(encoder.device, encoder.dtype)


def results_of(output):
    named = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    return named | {f"deepstack_{i}": x for i, x in enumerate(output.deepstack_features or [])}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bar = 1e-12 if value.dtype == torch.float64 else 4e-2
        assert actual[name].shape == value.shape, name
        assert not len(value) or rel_rms(actual[name], value) < bar, name


def poison(manager, value):
    """Overwrite everything that a graph addresses, as a neighbour in its memory might."""
    for rung in manager.ladder.rungs.values():
        for graph in rung.graphs:
            graph.inputs["pixel_values"].fill_(value)
            for buffer in graph.outputs.values():
                buffer.fill_(value)


@pytest.fixture(params=NAMES)
def encoder(request):
    return build(request.param)


@pytest.fixture(params=NAMES)
def gpu_encoder(request):
    encoder = build(request.param, "cuda")
    yield encoder
    encoder.release_graphs()
    gc.collect()
    torch.cuda.empty_cache()


def check_poisoned_padding(capture, encoder):
    """Replays between other sizes and poisoned buffers give what they gave on clean ones."""
    manager = capture(encoder)
    want = [results_of(encoder(pixels_of(encoder, grids), grids)) for grids in MIXES]
    for value in (float("nan"), float("inf"), -1e30):
        for grids, clean in zip(MIXES, want, strict=True):
            if encoder.device.type == "cuda":  # freed memory of any size holds the poison too
                for exponent in (12, 16, 20, 24):
                    torch.full((1 << exponent,), value, device="cuda")
            poison(manager, value)
            assert_same(results_of(encoder(pixels_of(encoder, grids), grids)), clean)
    assert_close(want[-1], encoder.eager_forward(pixels_of(encoder, MIXES[-1]), MIXES[-1]))
    assert manager.stats()["misses"] == 0


def test_bug_03_nan_from_padding_rows(encoder, capture):
    """vLLM #57136: attention left padding rows unwritten, and their NaN went into later blocks."""
    check_poisoned_padding(capture, encoder)


@pytest.mark.gpu
def test_bug_03_nan_from_padding_rows_in_a_shared_pool(gpu_encoder, capture):
    """vLLM #56922: the NaN lay in a memory pool that graphs of several budgets shared."""
    check_poisoned_padding(capture, gpu_encoder)


def test_bug_04_offsets_never_go_down(encoder, monkeypatch, capture):
    """vLLM #42796: offsets past the last segment were zeros, or left from an earlier call."""
    plans = []

    def noting(*args, **kwargs):
        plans.append(layout(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(tower_code, "layout", noting)
    capture(encoder)
    for grids in ([(8, 2, 4)], [SMALL], [VIDEO, IMAGE], [IMAGE], [ONE] * 8, [LARGE]):
        encoder(pixels_of(encoder, grids), grids)
        patches = sum(t * h * w for t, h, w in grids)
        frames = torch.tensor([h * w for t, h, w in grids for _ in range(t)])
        plan = plans[-1]
        assert plan.cu_seqlens.tolist() == [
            0, *frames.cumsum(0).tolist(), *[patches] * (8 - len(frames))
        ]  # fmt: skip
        if encoder.spec.window_size:
            assert plan.cu_window_seqlens.diff().min() >= 0
            assert plan.cu_window_seqlens[-1] == patches


def check_segments(capture, encoder, count):
    slots = {"max_vision_items_per_batch": 63, "max_frames_per_batch": 63}
    manager = capture(encoder, {"token_budgets": [128], **slots})
    pixels, results = pixels_of(encoder, [ONE] * count), []
    for grids in ([ONE] * count, [(count, 2, 2)] if count else []):
        results.append(results_of(encoder(pixels, grids)))
        assert_close(results[-1], encoder.eager_forward(pixels, grids))
    assert_close(*results)  # the frames of a video are segments like images
    assert manager.stats()["misses"] == 0


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 62, 63])
def test_bug_05_empty_segments(encoder, count, capture):
    """sglang-omni #1624: attention refused, or misread, offsets with empty segments at the end."""
    check_segments(capture, encoder, count)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [name for name in BACKENDS if name != "reference"])
def test_bug_05_empty_segments_in_every_backend(attention, capture):
    """sglang-omni #1624: a library stopped the capture of offsets with empty segments."""
    try:
        check_backend(attention, torch.bfloat16, "cuda", 32)
    except ValueError as reason:
        pytest.skip(str(reason))
    for count in (1, 31, 32, 33, 62, 63):
        encoder = build("tiny-qwen3-vl", "cuda", attention)
        check_segments(capture, encoder, count)
        encoder.release_graphs()


@pytest.mark.parametrize("grid", [(1, 16, 32), (1, 2, 130), (1, 30, 2), (4, 8, 16)])
def test_bug_06_longest_segment(encoder, grid, monkeypatch, capture):
    """vLLM #40600: the longest segment was recorded in merged units, or as that of the dummy."""
    seen = []

    def noting(kernel, offsets_at, bound):
        def call(*args, **kwargs):
            seen.append((int(args[offsets_at].diff().max()), kwargs[bound]))
            kernel(*args, **kwargs)

        return call

    for name, *rest in (
        ("varlen_attention", 3, "max_seqlen"),
        ("window_attention", 5, "max_window"),
    ):
        monkeypatch.setattr(tower_code, name, noting(getattr(tower_code, name), *rest))
    manager = capture(encoder)
    pixels = pixels_of(encoder, [grid])
    seen.clear()
    replayed = results_of(encoder(pixels, [grid]))
    assert manager.stats()["misses"] == 0
    assert_close(replayed, encoder.eager_forward(pixels, [grid]))
    assert max(longest for longest, _ in seen) == grid[1] * grid[2]
    assert all(longest <= bound for longest, bound in seen)


def test_bug_08_slots_for_windows(capture):
    """vLLM #42796: far too many slots for windows, whose empty programs slowed every replay."""
    encoder = build("tiny-qwen2.5-vl")
    for h, w in ((32, 32), (16, 64), (64, 64), (30, 26), (8, 16)):
        real = num_windows(h, w, encoder.spec.window_size)
        slots = encoder.rung_limits(h * w // 4, 1, 1).max_windows
        assert real <= slots <= 2 * real + 1, (h, w)
    manager = capture(encoder)
    thin = [(1, 2, 256)]  # 32 windows, of which each holds a quarter of what it could
    pixels = pixels_of(encoder, thin)
    assert_close(results_of(encoder(pixels, thin)), encoder.eager_forward(pixels, thin))
    assert manager.stats()["eager_reasons"] == {"windows": 1}


@pytest.mark.gpu
def test_bug_12_and_14_memory_that_changes_hands(gpu_encoder, capture):
    """SGLang #37043, TensorRT-LLM #15534: graphs wrote to workspaces that had a new owner."""
    manager = capture(gpu_encoder)
    pixels = [pixels_of(gpu_encoder, grids) for grids in MIXES]
    want = [results_of(gpu_encoder(p, grids)) for p, grids in zip(pixels, MIXES, strict=True)]
    for turn in range(20):
        index = turn % len(MIXES)
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        sizes = (1 << 10, 1 << 16, 1 << 20, 1 << 23, 1 << 25)
        canaries = [torch.full((size,), 7.0, device="cuda") for size in sizes]
        got = results_of(gpu_encoder(pixels[index], MIXES[index]))
        assert all(bool((canary == 7).all()) for canary in canaries)
        assert_same(got, want[index])
    assert manager.stats()["misses"] == 0


@pytest.mark.gpu
def test_bug_16_capture_with_cold_caches(tmp_path):
    """SGLang #17871: the first use of a kernel, and so its compilation, was inside a capture."""
    code = """
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder import VisionEncoder
for name in ("tiny-qwen3-vl", "tiny-qwen2.5-vl"):
    tower = towers.build_tower(name, device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(tower, attention="triton")
    encoder.capture({"token_budgets": [16, 64]})
    pixels = torch.randn(48, encoder.spec.patch_values, device="cuda").bfloat16()
    got = encoder(pixels, [(1, 6, 8)]).pooler_output
    want = encoder.eager_forward(pixels, [(1, 6, 8)])["pooler_output"]
    assert encoder.graphs.stats()["hits"] == 1
    assert (got - want).float().norm() < 2e-2 * want.float().norm()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr


def test_bug_17_attention_that_reads_on_the_host(encoder):
    """vLLM #40830: offsets were read on the host while a graph was being recorded."""
    assert encoder.attention == "reference"
    encoder.device = torch.device("cuda")  # asked before anything is done there
    with pytest.raises(ValueError, match=r"'reference' reads offsets on the host"):
        encoder.capture({"token_budgets": [16]})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_bug_17_capture_never_waits_for_the_device(gpu_encoder, capture):
    """transformers #45816: `.item()` and `.tolist()` in a forward wait for the device."""

    class Strict(CudaGraphRecorder):
        def warm_up(self, work):
            super().warm_up(work)  # compiles
            with_errors(super().warm_up, work)

        def record(self, work, pool):
            return with_errors(super().record, work, pool)

    def with_errors(function, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    manager = capture(gpu_encoder, recorder=Strict(gpu_encoder.device))
    pixels = pixels_of(gpu_encoder, [IMAGE])
    results = with_errors(gpu_encoder, pixels, [IMAGE])
    assert_close(results_of(results), gpu_encoder.eager_forward(pixels, [IMAGE]))
    assert manager.stats()["misses"] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bug_20_fp8_whose_scales_are_on_the_host(dtype):
    """vLLM: dynamic FP8 scales live on the host, and a graph replays those of its capture."""
    tower = towers.build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=f"dtype = {dtype} is not supported.*use 'bfloat16'"):
        VisionEncoder.from_hf(tower.to(dtype))
    tower = tower.float()
    linear = tower.blocks[0].mlp.linear_fc1
    linear.weight = torch.nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="quantised towers are not supported"):
        VisionEncoder.from_hf(tower)


@pytest.mark.parametrize("graphs", [False, True])
def test_bug_22_calls_without_pixels(build_model, model_inputs, graphs):
    """vLLM #41714: calls with text or ready embeddings alone went to the graphs as well."""
    model = build_model("qwen3_vl")
    ids = model_inputs("qwen3_vl")["input_ids"]
    with torch.no_grad():
        rows = model.get_input_embeddings()(ids)
        calls = [{"input_ids": ids[:, -2:]}, {"inputs_embeds": rows}]
        want = [model(**arguments).logits for arguments in calls]
        with swap_vision_tower(model, graphs=graphs) as handle:
            got = [model(**arguments).logits for arguments in calls]
            assert handle.stats().fused_calls == 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("grid", [None, (1, 2, 32768), (1, 32768, 2), (1, 256, 256)])
def test_bug_23_positions_past_any_table(encoder, grid):
    """vLLM, Kimi-VL: the layout made up for capture was larger than the table of angles."""
    limits = encoder.rung_limits(16384, 1, 1)
    grid = grid or full_item(encoder, limits)
    inv_freq = encoder.weights.inv_freq
    plan = layout(
        torch.tensor([grid], dtype=torch.int32), inv_freq, num_rows=limits.max_patches,
        num_frames=1, num_windows=0, merge=2,
    )  # fmt: skip
    half = encoder.spec.head_dim // 2
    table = torch.outer(
        torch.arange(max(grid), dtype=torch.float),
        1 / 1e4 ** (torch.arange(0, half, 2, dtype=torch.float) / half),
    )
    angles = table[plan.position[:, :2].long()].flatten(1)
    rows = grid[1] * grid[2]
    assert plan.position[:rows, :2].amax(0).tolist() == [grid[1] - 1, grid[2] - 1]
    torch.testing.assert_close(plan.cos, angles.cos().to(plan.cos.dtype), rtol=0, atol=5e-3)
    torch.testing.assert_close(plan.sin, angles.sin().to(plan.sin.dtype), rtol=0, atol=5e-3)


def check_tolerance_and_bits(capture, encoder):
    manager = capture(encoder)
    for seed, grids in enumerate(MIXES):
        pixels = pixels_of(encoder, grids, seed)
        before = {rung["token_budget"]: rung["replays"] for rung in manager.stats()["rungs"]}
        replayed = results_of(encoder(pixels, grids))
        assert_close(replayed, encoder.eager_forward(pixels, grids))
        (limits,) = [
            limits
            for limits, rung in zip(manager.rungs, manager.stats()["rungs"], strict=True)
            if rung["replays"] != before[rung["token_budget"]]
        ]
        graph = manager.ladder.rungs[limits].graphs[0]
        fresh = {k: torch.full_like(v, float("nan")) for k, v in graph.outputs.items()}
        with torch.no_grad():
            encoder.graph_forward(graph.inputs, fresh, limits)
        assert_same(replayed, {k: v[: len(replayed[k])] for k, v in fresh.items()})


def test_bug_25_what_a_replay_may_differ_in(encoder, capture):
    """vLLM #52229: replays were held to raw eager calls bit for bit, whose matrices differ."""
    check_tolerance_and_bits(capture, encoder)


@pytest.mark.gpu
def test_bug_25_what_a_replay_may_differ_in_bf16(gpu_encoder, capture):
    """vLLM #52229: padding changes how a bf16 product is summed, so raw eager differs a little."""
    check_tolerance_and_bits(capture, gpu_encoder)


def test_bug_27_an_encoder_without_its_language_model(build_model, pixel_rows, tmp_path):
    """Dynamo #11913: an encoder alone still ran its language model, which had no weights."""
    model = build_model("qwen3_vl")
    tower = model.model.visual
    model.config.save_pretrained(tmp_path)
    tensors = {f"model.visual.{k}": v.contiguous() for k, v in tower.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = VisionEncoder.from_pretrained(tmp_path, device="cpu")
    assert all(torch.equal(encoder.state_dict()[k], v) for k, v in tower.state_dict().items())
    grids = [IMAGE, VIDEO]
    pixels = pixel_rows("qwen3_vl", grids)
    with torch.no_grad():
        want = tower(pixels, grid_thw=torch.tensor(grids)).pooler_output
    assert rel_rms(encoder(pixels, grids).pooler_output, want) < 1e-4


def test_bug_28_padding_at_a_real_position(encoder, capture):
    """tpu-inference #3450: padding had position (0, 0) as a real patch has, and was attended to."""
    manager = capture(encoder)
    grids = [SMALL, ONE]
    pixels = pixels_of(encoder, grids)
    want = encoder.eager_forward(pixels, grids)
    for budget in BUDGETS:  # always on the smallest one left, so padding grows
        for value in (0.0, 50.0, -3.0):
            poison(manager, value)
            assert_close(results_of(encoder(pixels, grids)), want)
        assert manager.rungs[0].token_budget == budget
        if budget != BUDGETS[-1]:
            manager.evict(budget)
    assert manager.stats()["misses"] == 0


def test_bug_29_optional_imports_on_the_way_to_graphs():
    """vLLM #38982: enabling graphs where an optional package was missing failed on its import."""
    code = """
import sys
optional = ["flash_attn", "flash_attn_interface", "prometheus_client", "matplotlib", "pyarrow"]
sys.modules.update(dict.fromkeys([*optional, "accelerate", "pytest"]))
from vitgraph.capture import EncoderCudaGraphConfig, EncoderCudaGraphManager, prometheus_text
EncoderCudaGraphConfig.from_any('{"token_budgets": [64], "calibrate": true, "nvtx": true}')
assert "transformers" not in sys.modules
from vitgraph.encoder.graph_options import graph_choice
try:
    graph_choice(True, device="cpu")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA graphs need a CUDA device" in done.stdout
