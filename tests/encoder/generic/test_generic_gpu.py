"""Generic towers captured on a GPU: replays against eager runs, and against Hugging Face.

Accuracy is held to 1.3 times the error that Hugging Face's own bf16 forward makes against its fp32
forward.
"""

import copy

import pytest
import torch
import transformers
from vitgraph.encoder import swap_vision_tower
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.encoder.hf_probe import read_outputs
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

# a window tower with fewer k and v heads, one with offsets of whole clips, one that reads its grid,
# one whose patches lie in a batch of one, one with deepstack
TINY = ["exaone4_5", "kimi_k25", "glm4v", "paddleocr_vl", "qwen3_omni_moe"]
MEDIUM = {
    "ernie4_5_vl_moe": {
        "depth": 12,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 5120,
    }
}
BUDGETS = [16, 64, 256, 1024]
BATCHES = {
    "one": [(1, 6, 4)],
    "images": [(1, 8, 12), (1, 4, 6), (1, 10, 18)],
    "full": [(1, 32, 32)],
    "many": [(1, 4, 4)] * 16,
    "split": [(1, 44, 44), (1, 40, 42), (1, 36, 50)],
    "videos": [(3, 8, 12), (3, 4, 6)],
    "mixed": [(1, 10, 18), (3, 8, 12), (1, 2, 2), (2, 4, 6)],
}


class Captured:
    """A tower in bf16, captured, and its fp32 twin."""

    def __init__(self, tower):
        self.tower = tower.to("cuda")
        self.twin = copy.deepcopy(self.tower).float()
        self.encoder = GenericEncoder(self.tower)
        self.manager = self.encoder.capture({"token_budgets": BUDGETS})

    def takes(self, grids):
        frames = {t for t, _, _ in grids}
        if self.encoder.facts.pools_frames:
            return len(frames) == 1
        return self.encoder.facts.max_frames_per_item is None or frames == {1}

    def pixels(self, grids, seed=1):
        rows = sum(t * h * w for t, h, w in grids)
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (rows, *self.encoder.facts.pixel_shape)
        pixels = torch.randn(shape, generator=generator, device="cuda")
        return pixels.to(self.encoder.dtype)

    def own(self, tower, pixels, grids):
        pixels = pixels.to(next(tower.parameters()).dtype)
        with torch.no_grad():
            output = tower(
                pixels[None] if self.encoder.facts.batched else pixels,
                grid_thw=torch.tensor(grids, device="cuda"),
            )
        return read_outputs(output, self.encoder.facts.outputs)

    def check(self, got, pixels, grids):
        oracle = self.own(self.twin, pixels, grids)
        half = self.own(self.tower, pixels, grids)
        assert got.keys() == oracle.keys()
        for name, value in got.items():
            assert value.isfinite().all(), name
            assert rel_rms(value, oracle[name]) <= 1.3 * rel_rms(half[name], oracle[name]), name


@pytest.fixture(scope="module", params=[*TINY, *MEDIUM])
def captured(request, build):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    made = Captured(build(request.param, torch.bfloat16, **MEDIUM.get(request.param, {})))
    yield made
    made.encoder.release_graphs()
    del made
    torch.cuda.empty_cache()


@pytest.mark.parametrize("batch", BATCHES)
def test_replay(captured, batch):
    grids = BATCHES[batch]
    if not captured.takes(grids):
        pytest.skip("its own forward refuses these items")
    pixels = captured.pixels(grids)
    before = captured.manager.stats()
    got = captured.manager.execute(pixels, grids)
    captured.check(got, pixels, grids)
    captured.check(captured.encoder.eager_forward(pixels, grids), pixels, grids)
    after = captured.manager.stats()
    pooled_video = captured.encoder.facts.pools_frames and max(t for t, _, _ in grids) > 1
    if not pooled_video:
        assert after["misses"] == before["misses"]
        assert after["replays"] > before["replays"]
    assert all(torch.equal(a, b) for a, b in zip(
        got.values(), captured.manager.execute(pixels, grids).values(), strict=True
    ))  # fmt: skip


def test_replay_equals_the_same_work_launched(captured):
    """Bit for bit on the buffers of the replay."""
    grids = BATCHES["images"]
    if captured.encoder.facts.merge == 1:
        grids = [(1, 4, 6), (1, 2, 3)]
    pixels = captured.pixels(grids)
    rung = captured.manager.rungs[1]
    tokens = [item.output_tokens for item in captured.encoder.item_specs(grids)]
    rung = next(r for r in captured.manager.rungs if r.token_budget >= sum(tokens))
    got = captured.manager.run_on(rung, pixels, grids)
    encoder = captured.encoder
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device="cuda")
        for name, spec in encoder.input_specs(rung).items()
    }
    outputs = {
        name: torch.full(spec.shape, torch.nan, dtype=spec.dtype, device="cuda")
        for name, spec in encoder.output_specs(rung).items()
    }
    for name, table in encoder.stage(grids, rung).items():
        assert table.is_pinned()
        inputs[name].copy_(table)
    inputs["pixel_values"].fill_(torch.nan)
    inputs["pixel_values"][: len(pixels)] = pixels
    with torch.no_grad():
        encoder.graph_forward(inputs, outputs, rung)
    for name, value in got.items():
        assert torch.equal(outputs[name][: len(value)], value), name


def test_stale_rows_cannot_be_seen(captured):
    small, large = BATCHES["one"], BATCHES["images"]
    pixels = captured.pixels(small)
    rung = captured.manager.rungs[2]
    first = captured.manager.run_on(rung, pixels, small)
    captured.manager.run_on(rung, torch.full_like(captured.pixels(large), torch.nan), large)
    second = captured.manager.run_on(rung, pixels, small)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in second.values())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_replays_do_not_wait_for_the_device(captured):
    grids = BATCHES["images"]
    pixels = captured.pixels(grids)
    pinned = pixels.cpu().pin_memory()
    captured.manager.execute(pixels, grids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.manager.execute(pixels, grids)
        captured.manager.execute(pinned, grids)
        captured.manager.execute(pixels, grids[::-1])  # a layout not seen before
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_see_changed_weights(build):
    made = Captured(build("glm_ocr", torch.bfloat16))
    grids = BATCHES["images"]
    pixels = made.pixels(grids)
    before = made.manager.execute(pixels, grids)["pooler_output"]
    with torch.no_grad():
        for tower in (made.tower, made.twin):
            tower.blocks[1].attn.proj.weight.mul_(2)
    got = made.manager.execute(pixels, grids)
    assert not torch.equal(got["pooler_output"], before)
    made.check(got, pixels, grids)
    made.encoder.release_graphs()


def test_swapped_model(boosted):
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(
        "ernie4_5_vl_moe",
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 32],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2],
            },
        },
        vision_config={
            "depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96,
        },
    )  # fmt: skip
    model = boosted(transformers.AutoModelForImageTextToText.from_config(config))
    model = model.to("cuda", torch.bfloat16)
    grids = torch.tensor([(1, 8, 12), (1, 4, 6)], device="cuda")
    pixels = torch.randn(120, 588, device="cuda", dtype=torch.bfloat16)
    oracle = copy.deepcopy(model).float().get_image_features(pixels.float(), grids)
    with torch.no_grad():
        own = model.get_image_features(pixels, grids)
        graphs = {"token_budgets": [16, 64]}
        with swap_vision_tower(model, tier="generic", graphs=graphs) as handle:
            got = model.get_image_features(pixels, grids)
            stats = handle.encoder.graphs.stats()
            kept = got.last_hidden_state.clone()
            model.get_image_features(-pixels, grids)
    assert stats["hits"] == 2
    assert torch.equal(got.last_hidden_state, kept)  # of its own, not of the graph
    error = rel_rms(got.last_hidden_state, oracle.last_hidden_state)
    assert error <= 1.3 * rel_rms(own.last_hidden_state, oracle.last_hidden_state)
