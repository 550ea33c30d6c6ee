"""Whole towers at published size on a GPU: accuracy, and replays against eager runs, bit for bit.

Accuracy is measured against Hugging Face's tower in fp32; the bar is 1.3 times the error that the
same tower makes in bf16.
"""

import gc
import random

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.bench.workloads import WORKLOADS
from vitgraph.encoder import VisionEncoder
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

NAMES = ["qwen3-vl-8b", "qwen3-vl-2b", "qwen2.5-vl-7b", "qwen2-vl-7b"]
MIX = random.Random(7)
LAYOUTS = {name: list(grids) for name, grids in WORKLOADS.items()} | {
    "smallest": [(1, 2, 2)],
    "thin": [(1, 2, 128), (1, 128, 2), (1, 2, 2)],
    "ragged": [(1, 2 * MIX.randint(1, 30), 2 * MIX.randint(1, 30)) for _ in range(12)],
    "image-and-video": [(1, 28, 28), (4, 16, 20), (1, 10, 46), (3, 34, 6)],
    "tiles": [(1, 8, 8)] * 16,
    "maximal": [(1, 96, 192)],  # all of the largest rung
}
BUDGETS = (16, 49, 90, 196, 512, 1088, 1568, 4608)


class Case:
    """One tower: Hugging Face's in fp32 and bf16, and ours, captured."""

    def __init__(self, name):
        self.half = towers.build_tower(name, device="cuda", dtype=torch.bfloat16)
        self.exact = towers.fp32_copy(name, self.half)
        self.encoder = VisionEncoder.from_hf(self.half)

    def pixels(self, grids, seed=0):
        rows = sum(t * h * w for t, h, w in grids)
        g = torch.Generator("cuda").manual_seed(seed + rows)
        shape = rows, self.encoder.spec.patch_values
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    def hf(self, tower, pixels, grids):
        with torch.no_grad():
            dtype = next(tower.parameters()).dtype
            out = tower(pixels.to(dtype), grid_thw=torch.tensor(grids, device="cuda"))
        return named(
            out.last_hidden_state, out.pooler_output, getattr(out, "deepstack_features", ())
        )


def named(last, pooled, deepstack):
    features = {"last_hidden_state": last, "pooler_output": pooled}
    return features | {f"deepstack_{j}": f for j, f in enumerate(deepstack or ())}


def ours(encoder, pixels, grids):
    out = encoder(pixels, grids)
    return named(out.last_hidden_state, out.pooler_output, out.deepstack_features)


def max_ratio(got, eager, oracle):
    return max(rel_rms(got[k], oracle[k]) / rel_rms(eager[k], oracle[k]) for k in oracle)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case(request.param)
    yield case
    case.encoder.release_graphs()
    del case
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def captured(case):
    case.encoder.capture({"token_budgets": BUDGETS})
    return case.encoder.graphs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_eager(case, layout):
    grids = LAYOUTS[layout]
    pixels = case.pixels(grids)
    oracle, eager = case.hf(case.exact, pixels, grids), case.hf(case.half, pixels, grids)
    got = case.encoder.eager_forward(pixels, grids)
    assert got.keys() == oracle.keys()
    for key, value in got.items():
        assert value.shape == oracle[key].shape
        assert value.isfinite().all(), key
    assert max_ratio(got, eager, oracle) <= 1.3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_accuracy_of_every_backend(case, backend):
    grids = LAYOUTS["ragged"]
    pixels = case.pixels(grids)
    oracle, eager = case.hf(case.exact, pixels, grids), case.hf(case.half, pixels, grids)
    encoder = VisionEncoder.from_hf(case.half, attention=backend)
    assert max_ratio(encoder.eager_forward(pixels, grids), eager, oracle) <= 1.3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_replayed(case, captured, layout):
    grids = LAYOUTS[layout]
    pixels = case.pixels(grids)
    hits = captured.stats()["hits"]
    got = ours(case.encoder, pixels, grids)
    assert captured.stats()["hits"] == hits + len(grids), "a rung should have held this batch"
    oracle, eager = case.hf(case.exact, pixels, grids), case.hf(case.half, pixels, grids)
    assert max_ratio(got, eager, oracle) <= 1.3


def holds(rung, items):
    return (
        sum(item.output_tokens for item in items) <= rung.token_budget
        and len(items) <= rung.max_items
        and sum(item.num_frames for item in items) <= rung.max_frames
        and sum(item.num_windows for item in items) <= rung.max_windows
    )


def assert_replay_is_eager(case, captured, grids, seed=0):
    """Bit for bit: same kernels, same padded shape, same static inputs; padding finite."""
    items = case.encoder.item_specs(grids)
    rung = next(r for r in captured.rungs if holds(r, items))
    got = captured.run_on(rung, case.pixels(grids, seed), grids)
    (graph,) = captured.ladder.rungs[rung].graphs
    fresh = {k: torch.full_like(v, float("nan")) for k, v in graph.outputs.items()}
    with torch.no_grad():
        case.encoder.graph_forward(graph.inputs, fresh, rung)
    for key, value in got.items():
        assert torch.equal(fresh[key][: len(value)], value), (key, grids)
        assert value.isfinite().all(), (key, grids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_equals_eager_on_the_same_buffers(case, captured, layout):
    assert_replay_is_eager(case, captured, LAYOUTS[layout])


def test_replay_equals_eager_on_random_layouts(case, captured):
    """130 layouts a tower; between them freed memory is poisoned and static inputs are stale."""
    mix = random.Random(11)
    for seed in range(130):
        grids, room = [], mix.choice(BUDGETS[:-1])
        while room > 0 and len(grids) < 8:
            t, h, w = mix.choice([1, 1, 1, 2, 5]), mix.randint(1, 24), mix.randint(1, 24)
            if t * h * w <= room:
                grids.append((t, 2 * h, 2 * w))
            room -= t * h * w
        if not grids:
            grids = [(1, 2, 2)]
        if seed % 10 == 0:
            torch.full((1 << 24,), float("nan"), device="cuda")
            gc.collect()
        assert_replay_is_eager(case, captured, grids, seed)


def test_small_large_small_with_poisoned_padding(case, captured):
    small, large = LAYOUTS["ragged"][:2], LAYOUTS["16mixed"]
    first = ours(case.encoder, case.pixels(small), small)
    big = ours(case.encoder, case.pixels(large), large)
    for (graph,) in (rung.graphs for rung in captured.ladder.rungs.values()):
        # stale values of any kind: in rows that the next batch does not fill, and in the results
        graph.inputs["pixel_values"].fill_(float("nan"))
        for buffer in graph.outputs.values():
            buffer.fill_(float("nan"))
    for want, grids in ((first, small), (big, large), (first, small)):
        got = ours(case.encoder, case.pixels(grids), grids)
        for key, value in want.items():
            assert torch.equal(got[key], value), key


def test_a_bad_item_does_not_reach_the_next_call(case, captured):
    """NaN pixels leave NaN in every buffer that a graph addresses."""
    grids = LAYOUTS["ragged"]
    pixels = case.pixels(grids)
    want = ours(case.encoder, pixels, grids)["pooler_output"]
    bad = pixels.clone()
    rows = [t * h * w for t, h, w in grids]
    start = sum(rows[:3])
    bad[start : start + rows[3]] = float("nan")
    ours(case.encoder, bad, grids)
    assert torch.equal(ours(case.encoder, pixels, grids)["pooler_output"], want)


def test_packing_does_not_change_an_item(case):
    """An item alone and packed: other GEMM shapes, so equal within the error of bf16 itself."""
    grids = LAYOUTS["image-and-video"]
    pixels = case.pixels(grids)
    oracle, eager = case.hf(case.exact, pixels, grids), case.hf(case.half, pixels, grids)
    start, alone = 0, []
    for t, h, w in grids:
        rows = pixels[start : start + t * h * w]
        alone.append(case.encoder.eager_forward(rows, [(t, h, w)])["pooler_output"])
        start += t * h * w
    error = rel_rms(torch.cat(alone), oracle["pooler_output"])
    assert error <= 1.3 * rel_rms(eager["pooler_output"], oracle["pooler_output"])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_replay_never_waits_for_the_device(case, captured):
    grids = LAYOUTS["8ximg448"]
    pixels = case.pixels(grids)
    want = ours(case.encoder, pixels, grids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ours(case.encoder, pixels, grids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got["pooler_output"], want["pooler_output"])


def test_results_outlive_the_next_call(case, captured):
    a, b = LAYOUTS["tiles"], LAYOUTS["img448"]
    first = ours(case.encoder, case.pixels(a), a)
    kept = {k: v.clone() for k, v in first.items()}
    ours(case.encoder, case.pixels(b), b)
    assert all(torch.equal(first[k], kept[k]) for k in kept)


def test_what_no_rung_holds_runs_eagerly_beside_replays(case, captured):
    grids = [(1, 28, 28), (1, 128, 160), (1, 8, 8)]
    pixels = case.pixels(grids)
    before = captured.stats()
    got = ours(case.encoder, pixels, grids)["pooler_output"]
    after = captured.stats()
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (2, 1)
    oracle = case.hf(case.exact, pixels, grids)["pooler_output"]
    eager = case.hf(case.half, pixels, grids)["pooler_output"]
    assert rel_rms(got, oracle) <= 1.3 * rel_rms(eager, oracle)
