"""The towers of GLM against Hugging Face's, which are the definition of what we compute."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionModel
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextVisionModel
from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionModel
from vitgraph.bench.towers_config import calm_
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.encoder import Embedder, VisionEncoder, forward, glm_merger, swap_vision_tower
from vitgraph.encoder.fp8 import Fp8Plan
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

BLOCKS = {"depth": 3, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 64}
GLM4V = {**BLOCKS, "intermediate_size": 160, "image_size": 112}
GLM_OCR = {**BLOCKS, "intermediate_size": 96}
# a limit that many gates reach
GLM5 = GLM_OCR | {"projection_intermediate_size": 160, "swiglu_limit": 0.5}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "glm4v": (Glm4vVisionModel, GLM4V),
    "glm4v_moe": (Glm4vMoeVisionModel, GLM4V | {"attention_bias": True}),
    "glm_ocr": (GlmOcrVisionModel, GLM_OCR),
    "glm_ocr without biases": (GlmOcrVisionModel, GLM_OCR | {"attention_bias": False}),
    "glm5_next": (Glm5NextVisionModel, GLM5),
}
# one block of the published widths
FULL_SIZE = {
    "glm4v": {
        "depth": 1, "hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096,
        "intermediate_size": 13696, "image_size": 336,
    },
    "glm_ocr": {
        "depth": 1, "hidden_size": 1024, "num_heads": 16, "out_hidden_size": 1536,
        "intermediate_size": 4096,
    },
}  # fmt: skip
LAYOUTS = {
    "single": [(1, 8, 12)],
    "ragged": [(1, 8, 12), (1, 4, 6), (1, 14, 2), (1, 6, 6)],
    "one-token": [(1, 2, 2)],
    "larger than the table": [(1, 10, 18), (1, 34, 6)],
    "thin": [(1, 2, 60), (1, 60, 2)],
}

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
TEXT_GLM5 = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "deepseek_sparse_attention"], "n_routed_experts": 4,
    "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2,
    "linear_head_dim": 16, "linear_num_heads": 2, "index_kpool": 2, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
IDS = {
    "image_token_id": 500, "video_token_id": 501, "image_start_token_id": 502,
    "image_end_token_id": 503, "video_start_token_id": 504, "video_end_token_id": 505,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "glm4v": (transformers.Glm4vForConditionalGeneration, transformers.Glm4vConfig, TEXT, GLM4V),
    "glm4v_moe": (
        transformers.Glm4vMoeForConditionalGeneration, transformers.Glm4vMoeConfig,
        TEXT | EXPERTS, GLM4V,
    ),
    "glm46v": (transformers.Glm46VForConditionalGeneration, transformers.Glm46VConfig, TEXT, GLM4V),
    "glm_ocr": (
        transformers.GlmOcrForConditionalGeneration, transformers.GlmOcrConfig, TEXT, GLM_OCR,
    ),
    "glm5_next": (
        transformers.Glm5NextForConditionalGeneration, transformers.Glm5NextConfig, TEXT_GLM5, GLM5,
    ),
}  # fmt: skip


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            # a stack of experts [E, out, in] has the fan-in of one of them
            fan_in = p.shape[-1] if p.ndim == 3 else p[0].numel()
            p.normal_(0, 0.3 if "position_embedding" in name else fan_in**-0.5)
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                p.mul_(2)


def build_tower(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    cls, arguments = TOWERS[name]
    torch.manual_seed(0)
    tower = cls._from_config(cls.config_class(**arguments | overrides))
    boost(tower)
    return tower.to(dtype).eval()


def build_model(name: str) -> Any:
    model_class, config_class, text, vision = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(text_config=dict(text), vision_config=dict(vision), **IDS))
    boost(model)
    return model.eval()


def pixel_rows(grids: Any, seed: int = 1) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 1176, generator=torch.Generator().manual_seed(seed))


@contextmanager
def exact_hf(tower: torch.nn.Module) -> Iterator[None]:
    """Lift the places where HF's towers compute in fp32 whatever their dtype."""

    def rope(q, k, cos, sin):
        cos, sin = cos[:, None].double(), sin[:, None].double()
        turned = [
            torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) for x in (q, k)
        ]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    def rms_norm(self, x):
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (x * scale)

    def embeddings(self, x, lengths, shapes, rows, columns):
        table = self.position_embedding.weight
        side = int(len(table) ** 0.5)
        size = shapes.repeat_interleave(shapes.prod(1), 0)[:, 1:].double()
        place = 2 * (torch.stack([rows, columns], 1) + 0.5) / size - 1
        sampled = F.grid_sample(
            table.T.reshape(1, -1, side, side), place.flip(1)[None, :, None], mode="bicubic",
            padding_mode="border", align_corners=False,
        )  # fmt: skip
        return x + sampled[0, :, :, 0].T

    home = sys.modules[type(tower).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "apply_rotary_pos_emb_vision", rope)
        for name in ("Glm4vRMSNorm", "Glm4vMoeRMSNorm", "GlmOcrRMSNorm", "Glm5NextRMSNorm"):
            if hasattr(home, name):
                patch.setattr(getattr(home, name), "forward", rms_norm)
        for module in tower.modules():
            if type(module).__name__.endswith("VisionEmbeddings"):
                patch.setattr(type(module), "forward", embeddings)
        yield


def named(output: Any) -> dict[str, torch.Tensor]:
    return {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}


def results(
    name: str, grids: Any, dtype: torch.dtype, device: str = "cpu", **overrides: Any
) -> tuple[dict[str, torch.Tensor], ...]:
    """(ours, HF's in the same dtype, HF's exact in fp64); the same weights and pixels in all."""
    tower = build_tower(name, dtype, **overrides)
    pixels, grid = pixel_rows(grids).to(dtype), torch.tensor(grids)
    oracle = build_tower(name, dtype, **overrides).double()
    with torch.no_grad():
        with exact_hf(oracle):
            exact = named(oracle(pixels.double(), grid))
        tower.to(device)
        theirs = named(tower(pixels.to(device), grid.to(device)))
        ours = named(VisionEncoder.from_hf(tower)(pixels.to(device), grid))
    return tuple({k: x.cpu() for k, x in outputs.items()} for outputs in (ours, theirs, exact))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(name, layout):
    ours, theirs, exact = results(name, LAYOUTS[layout], torch.float32)
    for key, oracle in exact.items():
        assert_as_accurate(ours[key], theirs[key], oracle, name=key)


@pytest.mark.parametrize("name", TOWERS)
def test_fp64(name):
    # a wrong formula cannot hide here: angles are the only thing that HF keeps in fp32, and both
    # have the same
    ours, _, exact = results(name, LAYOUTS["ragged"], torch.float64)
    for key, oracle in exact.items():
        assert rel_rms(ours[key], oracle) <= 1e-13, key


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_half_precision(name, dtype, device):
    grids = LAYOUTS["ragged"] + LAYOUTS["larger than the table"]
    ours, theirs, exact = results(name, grids, dtype, device)
    for key, oracle in exact.items():
        assert_as_accurate(ours[key], theirs[key], oracle, factor=1.3, name=key)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_width_block(name):
    ours, theirs, exact = results(name, [(1, 8, 12), (1, 4, 10)], torch.float32, **FULL_SIZE[name])
    for key, oracle in exact.items():
        assert_as_accurate(ours[key], theirs[key], oracle, name=key)


@pytest.mark.parametrize("name", ["glm4v", "glm_ocr"])
def test_a_video_is_as_many_images_as_it_has_frames(name):
    tower = build_tower(name)
    encoder = VisionEncoder.from_hf(tower)
    grids = [(3, 6, 8), (1, 4, 6), (2, 2, 2)]
    frames = [(1, h, w) for t, h, w in grids for _ in range(t)]
    pixels = pixel_rows(grids)
    with torch.no_grad():
        theirs = named(tower(pixels, torch.tensor(frames)))  # as the models that own a tower do
    clips, images = named(encoder(pixels, grids)), named(encoder(pixels, frames))
    for key, expected in theirs.items():
        assert torch.equal(clips[key], images[key])
        assert rel_rms(clips[key], expected) < 3e-5


@pytest.mark.parametrize("name", ["glm4v", "glm_ocr"])
def test_hidden_states_of_layers(name):
    tower, grids = build_tower(name, torch.float64), LAYOUTS["ragged"]
    pixels = pixel_rows(grids)
    encoder = VisionEncoder.from_hf(tower)
    with torch.no_grad(), exact_hf(tower):
        expected = tower(pixels, torch.tensor(grids), output_hidden_states=True).hidden_states
    output = encoder(pixels, grids, layers=(1, 0, -1))
    assert set(output.hidden_states) == {0, 1, 2}
    for layer, state in output.hidden_states.items():
        # Hugging Face's list begins with the input of block 0; its last is what the merger joined
        if layer < 2:
            assert rel_rms(state, expected[layer + 1]) <= 1e-12
    assert output.hidden_states[2].shape == (len(pixels), 64)


def without_rope(tower: Any) -> None:
    tower.rotary_pos_emb.inv_freq.zero_()


def without_positions(tower: Any) -> None:
    tower.embeddings.position_embedding.weight.zero_()


def without_embed_norm(tower: Any) -> None:
    tower.post_conv_layernorm.weight.fill_(0.5)


def without_head_norm(tower: Any) -> None:
    for block in tower.blocks:
        block.attn.q_norm.weight.fill_(2.0)


def with_joined_rows_turned(tower: Any) -> None:
    tower.downsample.weight.copy_(tower.downsample.weight.transpose(2, 3).clone())


def without_limit_in_blocks(tower: Any) -> None:
    for block in tower.blocks:
        block.mlp.swiglu_limit = 100.0


def without_limit_in_merger(tower: Any) -> None:
    tower.merger.swiglu_limit = 100.0


@pytest.mark.parametrize(
    ("name", "cripple"),
    [
        ("glm5_next", without_limit_in_blocks),
        ("glm5_next", without_limit_in_merger),
        ("glm4v", without_rope),
        ("glm4v", without_positions),
        ("glm4v", without_embed_norm),
        ("glm4v", with_joined_rows_turned),
        ("glm_ocr", without_rope),
        ("glm_ocr", without_head_norm),
        ("glm_ocr", with_joined_rows_turned),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_the_weights_are_not_blind(name, cripple):
    tower, grids = build_tower(name), LAYOUTS["ragged"]
    pixels, grid = pixel_rows(grids), torch.tensor(grids)
    ours = VisionEncoder.from_hf(build_tower(name))(pixels, grid).pooler_output
    with torch.no_grad():
        assert rel_rms(ours, tower(pixels, grid).pooler_output) < 1e-4
        cripple(tower)
        assert rel_rms(ours, tower(pixels, grid).pooler_output) > 1e-2


@pytest.mark.parametrize("name", TOWERS)
def test_weights_both_ways(name):
    tower = build_tower(name)
    encoder = VisionEncoder.from_hf(tower)
    for value in (1.0, 1.5):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.mul_(value)
        encoder.load_weights(tower)
        state = encoder.state_dict()
        assert state.keys() == tower.state_dict().keys()
        for key, expected in tower.state_dict().items():
            assert torch.equal(state[key], expected), key
            assert state[key].is_contiguous(), key


def test_absent_biases_cost_nothing():
    encoder = VisionEncoder.from_hf(build_tower("glm4v"))
    assert not any(key.endswith(".bias") for key in encoder.weights.tensors if "blocks" in key)
    assert encoder.weights.offsets is None
    for block in encoder.weights.blocks:
        assert block.norm1[2] is block.norm2[2] is None
        assert block.qkv_bias is block.up_bias is None


def test_bounded_gates_keep_away_from_the_kernel_without_bounds(monkeypatch):
    def unbounded(*_, **__):
        raise AssertionError("gated_linear has no bounds")

    for module in (forward, glm_merger):
        monkeypatch.setattr(module, "gated_linear", unbounded)
    encoder = VisionEncoder.from_hf(build_tower("glm5_next"))
    encoder(pixel_rows(LAYOUTS["single"]), LAYOUTS["single"])


def prompt(kind: str, grids: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """A prompt with the items of `grids`, a run of tokens for each frame of a video."""
    ids, types = [11], [0]
    for t, h, w in grids:
        for _ in range(t):
            # videos, too, have the tokens of images
            begin, end = (502, 503) if kind == "image" else (504, 505)
            ids += [begin, *[500] * (h * w // 4), end]
            types += [0, *[1 if kind == "image" else 2] * (h * w // 4), 0]
    pixels, grid = (
        ("pixel_values", "image_grid_thw")
        if kind == "image"
        else ("pixel_values_videos", "video_grid_thw")
    )
    ids = torch.tensor([[*ids, 12]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.tensor([[*types, 0]]),
        pixels: pixel_rows(grids),
        grid: torch.tensor(grids),
    }


PROMPTS = {"image": [(1, 8, 12), (1, 4, 6)], "video": [(2, 4, 8)]}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_answers_as_before(name, kind):
    model = build_model(name)
    inputs = prompt(kind, PROMPTS[kind])
    pixels = next(key for key in inputs if key.startswith("pixel"))
    method: Callable[..., Any] = getattr(model, f"get_{kind}_features")
    with torch.no_grad():
        before = model(**inputs).logits
        blind = model(**inputs | {pixels: torch.zeros_like(inputs[pixels])}).logits
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected = method(inputs[pixels], inputs[f"{kind}_grid_thw"])
        with swap_vision_tower(model) as handle:
            swapped = model(**inputs).logits
            swapped_text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            actual = method(inputs[pixels], inputs[f"{kind}_grid_thw"])
        after = model(**inputs).logits
    assert rel_rms(blind, before) > 1e-2  # or the comparison would not see the tower
    assert rel_rms(swapped, before) < 1e-4
    assert torch.equal(swapped_text, text)
    assert torch.equal(after, before)
    assert handle.stats().fused_calls == 3
    assert handle.stats().hf_calls == {}
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert actual.last_hidden_state.shape == expected.last_hidden_state.shape
    for ours, theirs in zip(actual.pooler_output, expected.pooler_output, strict=True):
        assert rel_rms(ours, theirs) < 3e-5


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained(name, tmp_path):
    model = build_model(name)
    model.save_pretrained(tmp_path)
    tower, grids = model.model.visual, LAYOUTS["ragged"]
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    encoder = embedder.encoder
    assert encoder.spec == VisionEncoder.from_hf(tower).spec
    assert encoder.spec.family == (name if name in ("glm_ocr", "glm5_next") else "glm4v")
    with torch.no_grad():
        expected = tower(pixel_rows(grids), torch.tensor(grids)).pooler_output
    assert rel_rms(encoder(pixel_rows(grids), grids).pooler_output, expected) < 3e-5
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    assert embedder.encode(image).shape == (64,)
    video = {"frames": torch.zeros(5, 3, 60, 90, dtype=torch.uint8), "fps": 2.0}
    assert embedder.encode(video).shape == (64,)


@pytest.mark.parametrize("name", TOWERS)
def test_fp8(name):
    # boosted queries and keys would amplify what fp8 loses
    tower, grids = calm_(build_tower(name, depth=6)), LAYOUTS["ragged"]
    exact = VisionEncoder.from_hf(tower)(pixel_rows(grids), grids)
    encoder = VisionEncoder.from_hf(tower, precision="fp8")
    names = encoder.weights.fp8.plan.names(encoder.spec)
    assert {n.rpartition(".")[2] for n in names} == {"qkv", "proj", "up", "down"}
    output = encoder(pixel_rows(grids), grids)
    # 3 bits of mantissa, in four of six blocks
    assert 1e-3 < rel_rms(output.pooler_output, exact.pooler_output) < 0.1
    part = VisionEncoder.from_hf(tower, precision=Fp8Plan(layers=("qkv", "up")))
    assert rel_rms(part(pixel_rows(grids), grids).pooler_output, exact.pooler_output) < 0.1
    with pytest.raises(ValueError, match=r"the merger of glm.* use Fp8Plan\(mergers=False\)"):
        VisionEncoder.from_hf(tower, precision=Fp8Plan(mergers=True))


@pytest.mark.parametrize("layers", [("up",), ("down",), ("up", "down")], ids="+".join)
def test_fp8_with_bounded_gates(layers, products):
    tower, grids = calm_(build_tower("glm5_next", depth=6)), LAYOUTS["ragged"]
    exact = VisionEncoder.from_hf(tower)(pixel_rows(grids), grids).pooler_output
    encoder = VisionEncoder.from_hf(tower, precision=Fp8Plan(layers=layers))
    assert 1e-3 < rel_rms(encoder(pixel_rows(grids), grids).pooler_output, exact) < 0.1
    assert len(set(products.used)) == len(products.used) == len(encoder.weights.fp8._layers)
    assert not products.hidden, "the limit stands between the two products"
    assert all(layer.norms is None for layer in encoder.weights.fp8._layers.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 8}, "together with qk_norm is not supported"),
        ({"window_size": 8, "qk_norm": False}, "together with merger = 'glm' is not supported"),
        ({"deepstack_layers": (0,)}, r"deepstack_layers = \(0,\) need merger = 'mlp'"),
        ({"merger_size": 0}, "merger_size = 0 with merger = 'glm'"),
        ({"merger": "mlp"}, "merger_size = 192 with merger = 'mlp'"),
        ({"gate_limit": 0.0}, "gate_limit = 0.0 must be positive"),
        ({"gate_limit": 1.0, "mlp": "plain"}, "needs mlp = 'gated', not 'plain'"),
    ],
)
def test_specs_that_no_kernel_can_run(change, message):
    spec = VisionEncoder.from_hf(build_tower("glm_ocr")).spec
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="glm_ocr_vision: hidden_act = 'gelu' is not supported"):
        VisionEncoder.from_hf(build_tower("glm_ocr", hidden_act="gelu"))


@pytest.mark.parametrize("name", ["glm4v", "glm_ocr", "glm5_next"])
def test_replays_of_padded_graphs(name, rerun_recorder):
    encoder = VisionEncoder.from_hf(build_tower(name, torch.float64))
    batches = {seed: [(1, 8, 12), (2, 4, 6)][seed:] for seed in (0, 1)}
    eager = {s: encoder(pixel_rows(g, s), g, layers=()) for s, g in batches.items()}
    config = {
        "token_budgets": [16, 48], "max_vision_items_per_batch": 4, "max_frames_per_batch": 4,
    }  # fmt: skip
    encoder.graphs = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    encoder.graphs.capture()
    for seed in (0, 1, 0):  # the second finds the rows of the first in its buffers
        replayed = encoder(pixel_rows(batches[seed], seed), batches[seed])
        for key, expected in named(eager[seed]).items():
            got = getattr(replayed, key)
            assert got.shape == expected.shape, key
            assert rel_rms(got, expected) < 1e-12, key
    # two items, one, and two
    stats = encoder.graphs.stats()
    assert (stats["hits"], stats["misses"]) == (5, 0)


@pytest.mark.parametrize("name", ["glm4v", "glm_ocr"])
def test_pruning_keeps_what_the_merger_joined(name):
    encoder = VisionEncoder.from_hf(build_tower(name))
    grids = [(4, 4, 6), (1, 4, 4)]
    whole = encoder(pixel_rows(grids), grids)
    pruned = encoder(pixel_rows(grids), grids, pruning_rate=0.5)
    assert pruned.tokens_per_item == (12, 4)
    assert torch.equal(pruned.last_hidden_state, whole.last_hidden_state)
    first = pruned.kept_index[:12].long()
    assert torch.equal(pruned.pooler_output[:12], whole.pooler_output[first])
