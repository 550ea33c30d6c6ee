"""Kimi-K2.5's tower against Hugging Face's: images, and clips whose frames attend together."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.kimi_k25 import modeling_kimi_k25 as home
from vitgraph.bench.towers_config import calm_
from vitgraph.capture import EncoderCudaGraphManager, Pruning
from vitgraph.encoder import VisionEncoder, encoder_for, swap_vision_tower
from vitgraph.encoder.families import FAMILIES
from vitgraph.encoder.fp8 import Fp8Plan
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.encoder.kimi_k25 import rope_order, to_hf_names
from vitgraph.kernels.frame_positions import frame_table
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

VISION: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
    "pos_emb_height": 8, "pos_emb_width": 8,
}  # fmt: skip
FULL_SIZE = {
    "hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 1,
    "intermediate_size": 4304, "pos_emb_height": 64, "pos_emb_width": 64,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
IDS = {"image_token_id": 500, "video_token_id": 501}
# each of one length: Hugging Face's own forward takes no others
LAYOUTS = {
    "image": [(1, 8, 12)],
    "images": [(1, 8, 12), (1, 4, 6), (1, 14, 2), (1, 2, 2)],
    "larger than the table": [(1, 10, 18), (1, 34, 6)],
    "clip": [(4, 6, 8)],
    "clips": [(3, 6, 8), (3, 2, 2), (3, 4, 10)],
}
MIXED = [(1, 8, 12), (4, 4, 6), (2, 2, 6), (1, 2, 2), (3, 10, 4)]


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            # a stack of experts [E, out, in] has the fan-in of one of them
            fan_in = p.shape[-1] if "experts" in name else p[0].numel()
            p.normal_(0, 0.3 if "position_embeddings" in name else fan_in**-0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(2)


def build_tower(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    torch.manual_seed(0)
    cls = home.Kimi_K25VisionModel
    tower = cls._from_config(cls.config_class(**VISION | overrides))
    boost(tower)
    return tower.to(dtype).eval()


@pytest.fixture
def model():
    # generate() and rope warn about these tiny text configs
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.Kimi_K25Config(
        text_config=TEXT, vision_config=VISION, projection_hidden_size=64, **IDS
    )
    model = home.Kimi_K25ForConditionalGeneration(config)
    boost(model)
    yield model.eval()
    transformers.utils.logging.set_verbosity_warning()


def patches(grids: Any, seed: int = 1) -> torch.Tensor:
    """[T, 3, 14, 14], as the processor hands them over."""
    count = sum(math.prod(grid) for grid in grids)
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def both(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden state, and pooled patches side by side as ours has them."""
    return output.last_hidden_state, output.pooler_output.flatten(1)


def run_alone(tower: Any, pixels: torch.Tensor, grids: Any) -> tuple[torch.Tensor, ...]:
    """Hugging Face's outputs, item by item."""
    parts = pixels.split([math.prod(grid) for grid in grids])
    with torch.no_grad():
        outputs = [
            both(tower(part, torch.tensor([grid]))) for part, grid in zip(parts, grids, strict=True)
        ]
    return tuple(torch.cat(part) for part in zip(*outputs, strict=True))


def check(grids: Any, dtype: torch.dtype, factor: float = 2.0, **overrides: Any) -> None:
    """Ours of one call against HF's own and HF's in fp64.

    HF keeps rope and the weights of positions in fp32 in any dtype, an error far below that of
    fp32 throughout.
    """
    tower, pixels = build_tower(dtype, **overrides), patches(grids).to(dtype)
    oracle = run_alone(copy.deepcopy(tower).double(), pixels.double(), grids)
    theirs = run_alone(tower, pixels, grids)
    ours = both(VisionEncoder.from_hf(tower)(pixels, grids))
    for name, *values in zip(("last", "pooled"), ours, theirs, oracle, strict=True):
        assert_as_accurate(*values, factor=factor, name=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(layout):
    check(LAYOUTS[layout], torch.float32)


def test_images_and_clips_of_any_length_in_one_call():
    check(MIXED, torch.float32)
    with pytest.raises(RuntimeError), torch.no_grad():  # theirs takes one length at a time
        build_tower()(patches(MIXED), torch.tensor(MIXED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check([*MIXED, (1, 34, 6)], dtype, factor=1.3)


def test_full_width_block():
    check([(1, 8, 12), (2, 4, 6)], torch.float32, **FULL_SIZE)


def test_other_sizes():
    check([(1, 9, 6), (2, 3, 12)], torch.float32, merge_kernel_size=(3, 3))
    check([(6, 4, 4), (1, 2, 6)], torch.float32, pos_emb_time=6)
    # a width that prepared weights fill up with zeros
    check([(1, 4, 6)], torch.float32, intermediate_size=90)


def without_rope(tower: Any) -> None:
    tower.rotary_emb.inv_freq.zero_()


def with_rows_for_columns(tower: Any) -> None:
    own = tower.rotary_emb.forward
    tower.rotary_emb.forward = lambda x, position_ids: own(x, position_ids.flip(-1))


def without_positions(tower: Any) -> None:
    tower.patch_embed.pos_emb.position_embeddings.zero_()


def with_bilinear_positions(tower: Any) -> None:
    tower.patch_embed.pos_emb.interpolation_mode = "bilinear"


def without_frame_positions(tower: Any) -> None:
    tower.patch_embed.pos_emb.time_position_embeddings.zero_()


def with_the_frame_before(tower: Any) -> None:
    table = tower.patch_embed.pos_emb.time_position_embeddings
    table.copy_(table.roll(1, 0))


def without_the_last_norm(tower: Any) -> None:
    tower.final_layernorm.weight.fill_(0.5)


@pytest.mark.parametrize(
    "cripple",
    [
        without_rope, with_rows_for_columns, without_positions, with_bilinear_positions,
        without_frame_positions, with_the_frame_before, without_the_last_norm,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_the_weights_are_not_blind(cripple):
    tower, grids = build_tower(), LAYOUTS["clips"]
    pixels, grid = patches(grids), torch.tensor(grids)
    ours = VisionEncoder.from_hf(build_tower())(pixels, grid).pooler_output
    with torch.no_grad():
        assert rel_rms(ours, both(tower(pixels, grid))[1]) < 1e-4
        cripple(tower)
        assert rel_rms(ours, both(tower(pixels, grid))[1]) > 1e-2


def test_frames_of_a_clip_see_each_other():
    """Or parity would hold with frames as segments."""
    encoder = VisionEncoder.from_hf(build_tower())
    pixels = patches([(3, 4, 6)])
    together = encoder(pixels, [(3, 4, 6)]).last_hidden_state
    pixels[48:] = 0
    assert rel_rms(encoder(pixels, [(3, 4, 6)]).last_hidden_state[:48], together[:48]) > 1e-2


def test_the_table_of_frames_is_transformers_own():
    own = build_tower(pos_emb_time=4).patch_embed.pos_emb.time_position_embeddings
    assert torch.equal(frame_table(4, 64), own[1:])


def test_weights_both_ways():
    tower = build_tower()
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


def test_rows_of_a_head_follow_our_angles():
    # pairs (i, i + 4): column 0, row 0, column 1, row 1 in theirs, rows 0, 1, columns 0, 1 in ours
    assert rope_order(8) == (1, 3, 0, 2, 5, 7, 4, 6)


def test_rows_and_tokens():
    encoder = VisionEncoder.from_hf(build_tower())
    pixels = patches(MIXED)
    rows = encoder(pixels.flatten(1), MIXED)
    assert torch.equal(encoder(pixels, MIXED).pooler_output, rows.pooler_output)
    assert rows.tokens_per_item == (24, 6, 3, 1, 10)
    assert rows.pooler_output.shape == (44, 4 * 64)
    assert rows.last_hidden_state.shape == (len(pixels), 64)
    assert encoder.row_order(MIXED) is None
    assert encoder(pixels[:0], []).pooler_output.shape == (0, 256)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((5, 2, 2), r"grid_thw\[1\] = \(5, 2, 2\): 5 frames, but a tower of kimi_k25 has positions "
         "for 4; hand in clips of at most 4 frames"),
        ((1, 3, 4), r"grid_thw\[1\] = \(1, 3, 4\): height and width must be multiples"),
    ],
)  # fmt: skip
def test_grids_that_are_refused(grid, message):
    encoder, grids = VisionEncoder.from_hf(build_tower()), [(1, 2, 2), grid]
    for given in (grids, torch.tensor(grids), [list(grid) for grid in grids]):
        with pytest.raises(ValueError, match=message):
            encoder(patches(grids), given)


def test_hidden_states_of_layers():
    tower, grids = build_tower(), LAYOUTS["clips"]
    pixels, grid = patches(grids), torch.tensor(grids)
    with torch.no_grad():
        theirs = tower(pixels, grid, output_hidden_states=True).hidden_states
    output = VisionEncoder.from_hf(tower)(pixels, grids, layers=(0, -2))
    for layer, state in output.hidden_states.items():
        assert rel_rms(state, theirs[layer + 1]) < 3e-5


def test_tokens_are_not_pruned():
    encoder, grids = VisionEncoder.from_hf(build_tower()), [(2, 4, 6)]
    with pytest.raises(ValueError, match="kimi_k25 averages the frames of a clip"):
        encoder(patches(grids), grids, pruning_rate=0.5)
    with pytest.raises(ValueError, match="kimi_k25 averages the frames of a clip"):
        encoder.eager_forward(patches(grids).flatten(1), grids, Pruning((6,), (False,)))


def test_fp8():
    # boosted queries and keys would amplify what fp8 loses
    tower, grids = calm_(build_tower(num_hidden_layers=6)), LAYOUTS["images"]
    exact = VisionEncoder.from_hf(tower)(patches(grids), grids).last_hidden_state
    encoder = VisionEncoder.from_hf(tower, precision="fp8")
    error = rel_rms(encoder(patches(grids), grids).last_hidden_state, exact)
    # 3 bits of mantissa, in four of six blocks
    assert 1e-3 < error < 0.1
    with pytest.raises(ValueError, match=r"kimi_k25 has no merger; use Fp8Plan\(mergers=Fal"):
        VisionEncoder.from_hf(tower, precision=Fp8Plan(mergers=True))


def test_replays_of_padded_graphs(rerun_recorder):
    encoder = VisionEncoder.from_hf(build_tower(torch.float64))
    assert encoder.budget_range() == (16, 16384)
    batches = {0: [(1, 8, 12), (4, 2, 6), (1, 4, 2)], 1: [(2, 4, 6), (3, 2, 4)], 2: [(1, 2, 4)]}
    eager = {s: encoder(patches(g, s), g) for s, g in batches.items()}
    config = {
        "token_budgets": [12, 40], "max_vision_items_per_batch": 4, "max_frames_per_batch": 4,
    }  # fmt: skip
    encoder.graphs = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    encoder.graphs.capture()
    for seed in (0, 1, 2, 0, 2):  # each finds the rows of the one before in its buffers
        replayed = encoder(patches(batches[seed], seed), batches[seed])
        for ours, exact in zip(both(replayed), both(eager[seed]), strict=True):
            assert ours.shape == exact.shape
            assert rel_rms(ours, exact) < 1e-12
    stats = encoder.graphs.stats()
    assert (stats["hits"], stats["misses"]) == (10, 0)


def test_a_clip_needs_room_for_its_patches(rerun_recorder):
    """The tokens of a clip fit a rung that its patches do not."""
    encoder = VisionEncoder.from_hf(build_tower())
    encoder.graphs = EncoderCudaGraphManager(
        encoder, {"token_budgets": [8]}, recorder=rerun_recorder
    )
    encoder.graphs.capture()
    grids = [(4, 4, 8), (1, 4, 8)]
    items = encoder.item_specs(grids)
    assert [(i.output_tokens, i.num_frames) for i in items] == [(8, 1), (8, 1)]
    assert [i.attention_pairs for i in items] == [128**2, 32**2]
    output = encoder(patches(grids), grids)
    oracle = run_alone(build_tower(), patches(grids), grids)
    for ours, theirs in zip(both(output), oracle, strict=True):
        assert rel_rms(ours, theirs) < 3e-5
    assert encoder.graphs.stats()["misses"] == 1


def prompt() -> dict[str, torch.Tensor]:
    grids = [(1, 8, 12), (1, 4, 6)]
    ids = torch.tensor([[502, *[500] * 24, 503, 502, *[500] * 6, 503, 11, 12]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches(grids),
        "image_grid_thw": torch.tensor(grids),
    }


def test_a_swapped_model_answers_as_before(model):
    inputs = prompt()
    features = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        before = model(**inputs).logits
        blind = model(**inputs | {"pixel_values": torch.zeros_like(features[0])}).logits
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected = model.get_image_features(*features)
        with swap_vision_tower(model) as handle:
            assert isinstance(handle.encoder, VisionEncoder)
            assert handle.encoder.spec.family == "kimi_k25"
            swapped = model(**inputs).logits
            swapped_text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            actual = model.get_image_features(*features)
        after = model(**inputs).logits
    assert rel_rms(blind, before) > 1e-2  # or the comparison would not see the tower
    assert rel_rms(swapped, before) < 1e-4
    assert torch.equal(swapped_text, text)
    assert torch.equal(after, before)
    assert handle.stats().fused_calls == 3
    assert handle.stats().hf_calls == {}
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert rel_rms(actual.last_hidden_state, expected.last_hidden_state) < 3e-5
    for ours, theirs in zip(actual.pooler_output, expected.pooler_output, strict=True):
        assert ours.shape == theirs.shape
        assert rel_rms(ours, theirs) < 3e-5


def test_features_of_videos(model):
    """Through the model itself, whose own split fails where a clip has several frames."""
    grids = LAYOUTS["clips"]
    call = patches(grids), torch.tensor(grids)
    with torch.no_grad(), swap_vision_tower(model, graphs=False) as handle:
        features = handle.tower(*call).pooler_output
        assert model.model.mm_projector(features).shape == (12 + 1 + 10, 1, 64)
        with pytest.raises(RuntimeError, match="split"):
            model.get_video_features(*call)
    with torch.no_grad(), pytest.raises(RuntimeError, match="split"):
        model.get_video_features(*call)


@pytest.mark.parametrize("level", ["model", "inner"])
@pytest.mark.parametrize("grids", [LAYOUTS["images"], LAYOUTS["clips"]], ids=["images", "clips"])
def test_a_swapped_tower_returns_what_it_did(grids, level, model):
    tower = model.model.vision_tower
    call = {"pixel_values": patches(grids), "grid_thw": torch.tensor(grids)}
    holder = model if level == "model" else model.model
    with torch.no_grad():
        expected, pair = tower(**call), tower(**call, return_dict=False)
        with swap_vision_tower(holder, graphs=False) as handle:
            assert handle.tower is tower
            actual, ours = tower(**call), tower(**call, return_dict=False)
            assert handle.stats().fused_calls == 2
    assert type(actual) is type(expected)
    assert list(actual) == list(expected) == ["last_hidden_state", "pooler_output"]
    assert type(ours) is type(pair) is tuple
    for got, want in zip((*actual.values(), *ours), (*expected.values(), *pair), strict=True):
        assert got.shape == want.shape
        assert rel_rms(got, want) < 3e-5


def test_the_generic_tier_is_there_when_asked_for(model):
    tower = model.model.vision_tower
    assert isinstance(encoder_for(tower), VisionEncoder)
    assert isinstance(encoder_for(tower, tier="generic"), GenericEncoder)
    with swap_vision_tower(model, graphs=False, tier="generic") as handle, torch.no_grad():
        assert isinstance(handle.encoder, GenericEncoder)
        model(**prompt())
        assert handle.stats().fused_calls == 1


def as_hugging_face(tower: Any) -> dict[str, torch.Tensor]:
    """Names of the live tower."""
    return {f"model.vision_tower.{name}": x for name, x in tower.state_dict().items()}


def as_published(tower: Any) -> dict[str, torch.Tensor]:
    """Names and layout of the first implementation, written from transformers' reading of it."""
    renamed, state = {}, tower.state_dict()
    for name, value in state.items():
        if "_proj." in name:
            continue
        name = name.replace("pos_emb.position_embeddings", "pos_emb.weight")
        for hf, own in (
            (".norm1.", ".norm0."), (".norm2.", ".norm1."), (".attn.proj.", ".wo."),
            (".fc1.", ".fc0."), (".fc2.", ".fc1."),
        ):  # fmt: skip
            if hf in name:
                name = name.replace(hf, own)
                break
        name = name.replace("layers.", "encoder.blocks.")
        renamed[name.replace("final_layernorm", "encoder.final_layernorm")] = value
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [state[f"layers.{i}.attn.{part}_proj.{kind}"] for part in "qkv"]
            for j in (0, 1):  # halves of a head back to neighbours, 2 heads of 2 x 16
                rows = [parts[j][32 * h + 16 * (r % 2) + r // 2] for h in (0, 1) for r in range(32)]
                parts[j] = torch.stack(rows)
            renamed[f"encoder.blocks.{i}.wqkv.{kind}"] = torch.cat(parts)
    return {f"vision_tower.{name}": value for name, value in renamed.items()}


@pytest.mark.parametrize("style", [None, as_hugging_face, as_published])
def test_from_pretrained(style, model, tmp_path):
    model.save_pretrained(tmp_path)
    tower = model.model.vision_tower
    if style is not None:
        stored = load_file(tmp_path / "model.safetensors")
        tensors = {k: v for k, v in stored.items() if "vision_tower" not in k} | style(tower)
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = VisionEncoder.from_pretrained(tmp_path, device="cpu")
    assert encoder.spec == VisionEncoder.from_hf(tower).spec
    assert encoder.state_dict().keys() == tower.state_dict().keys()
    for name, value in tower.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


def test_fused_rows_of_another_tower_are_refused():
    spec = VisionEncoder.from_hf(build_tower()).spec
    with pytest.raises(
        ValueError, match=r"'encoder\.blocks\.0\.wqkv\.bias' has shape \[96\].* 192"
    ):
        to_hf_names({"encoder.blocks.0.wqkv.bias": torch.zeros(96)}, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "kimi_k25_vision: hidden_act = 'gelu' is not"),
        ({"pos_emb_width": 9}, "pos_emb_height, pos_emb_width = 8, 9 is not supported"),
        ({"merge_kernel_size": (2, 1)}, "merge_kernel_size = 2, 1 is not supported"),
    ],
)
def test_configs_that_are_refused(change, message):
    config = home.Kimi_K25VisionModel.config_class(**VISION | change)
    with pytest.raises(ValueError, match=message):
        FAMILIES["kimi_k25"].spec(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_size": 64}, "out_size = 64 with merger = 'mean': a token is 4 patches .* use 256"),
        ({"merger": "none"}, "merge_size = 2 and out_size = 256 with merger = 'none'"),
        ({"deepstack_layers": (0,)}, r"deepstack_layers = \(0,\) need merger = 'mlp'"),
        ({"window_size": 8}, "together with merger = 'mean' is not supported"),
        (
            {"window_size": 8, "merger": "mlp"},
            "window_size = 8 together with segments = 'clips' is not supported",
        ),
    ],
)
def test_specs_that_no_kernel_can_run(change, message):
    spec = VisionEncoder.from_hf(build_tower()).spec
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)


def test_clips_of_a_video():
    spec = VisionEncoder.from_hf(build_tower()).spec
    assert spec.clips(9, 4, 6) == [(4, 4, 6), (4, 4, 6), (1, 4, 6)]
    assert spec.clips(4, 4, 6) == [(4, 4, 6)]
    assert replace(spec, frame_positions=0).clips(9, 4, 6) == [(9, 4, 6)]
