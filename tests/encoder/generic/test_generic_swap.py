"""Full Hugging Face models whose tower runs in the generic tier, and come back as they were."""

import copy
import threading

import pytest
import torch
import transformers
from vitgraph.encoder import SwappedTower, swap_vision_tower
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
BLOCKS = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 64,
}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
IDS = {"image_token_id": 500, "video_token_id": 501}
EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 32]}
LATENT = {
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
# model type: text config, vision config, shape of a patch, where the tower is
MODELS = {
    "ernie4_5_vl_moe": (
        TEXT | EXPERTS | {"rope_parameters": MROPE},
        {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
        (588,),
        "vision_tower",
    ),
    "paddleocr_vl": (
        TEXT | {"rope_parameters": MROPE, "head_dim": 16},
        LAYERS | {"image_size": 112},
        (3, 14, 14),
        "visual",
    ),
    "exaone4_5": (
        TEXT | {"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 2},
        BLOCKS | {"num_heads": 4, "num_key_value_heads": 2, "fullatt_block_indexes": [1]},
        (1176,),
        "visual",
    ),
    "kimi_k25": (
        TEXT | LATENT,
        LAYERS | {"pos_emb_height": 8, "pos_emb_width": 8},
        (3, 14, 14),
        "vision_tower",
    ),
    "glm4v": (TEXT | {"rope_parameters": MROPE}, BLOCKS | {"image_size": 112}, (1176,), "visual"),
}
GRIDS = [(1, 8, 12), (1, 4, 6)]


class Full:
    """A full model, its tower and its inputs."""

    def __init__(self, name, boosted):
        text, vision, patch, attribute = MODELS[name]
        extra = {"projection_hidden_size": 64} if name == "kimi_k25" else {}
        config = transformers.AutoConfig.for_model(
            name, text_config=text, vision_config=vision, **IDS, **extra
        )
        self.attribute = attribute
        self.model = boosted(transformers.AutoModelForImageTextToText.from_config(config))
        ids = torch.tensor([[502] + [500] * 24 + [503, 502] + [500] * 6 + [503, 11, 12]])
        generator = torch.Generator().manual_seed(1)
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 500).long(),
            "pixel_values": torch.randn(120, *patch, generator=generator),
            "image_grid_thw": torch.tensor(GRIDS),
        }

    @property
    def tower(self):
        return getattr(self.model.model, self.attribute)

    @property
    def features_inputs(self):
        return self.inputs["pixel_values"], self.inputs["image_grid_thw"]


@pytest.fixture(params=list(MODELS))
def full(request, boosted):
    # generate() and rope warn about these tiny text configs
    transformers.utils.logging.set_verbosity_error()
    yield Full(request.param, boosted)
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture
def ernie(boosted):
    return Full("ernie4_5_vl_moe", boosted)


def test_logits(full):
    model, inputs = full.model, full.inputs
    with torch.no_grad():
        logits = model(**inputs).logits
        blind = model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
        with swap_vision_tower(model, tier="generic") as handle:
            assert isinstance(handle.encoder, GenericEncoder)
            swapped = model(**inputs).logits
            stats = handle.stats()
        restored = model(**inputs).logits
    assert rel_rms(blind, logits) > 1e-2  # or the comparison would not see the tower
    # the same modules in the same order; fp32 rounding through tower and text model
    assert rel_rms(swapped, logits) <= 1e-5
    assert torch.equal(restored, logits)
    assert (stats.fused_calls, stats.hf_calls) == (1, {})


def test_features_have_hf_structure(full):
    model = full.model
    with torch.no_grad():
        expected = model.get_image_features(*full.features_inputs)
        twin = copy.deepcopy(model).double()
        pixels, grid = full.features_inputs
        oracle = twin.get_image_features(pixels.double(), grid)
        with swap_vision_tower(model, tier="generic"):
            actual = model.get_image_features(*full.features_inputs)
            second = model.get_image_features(*full.features_inputs)
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert actual.last_hidden_state.shape == expected.last_hidden_state.shape
    for a, e, o in zip(
        actual.pooler_output, expected.pooler_output, oracle.pooler_output, strict=True
    ):
        assert_as_accurate(a, e, o)
    assert actual.last_hidden_state.data_ptr() != second.last_hidden_state.data_ptr()


def test_calls_that_belong_to_hugging_face(ernie):
    model, tower = ernie.model, ernie.tower
    pixels, grid = ernie.features_inputs
    with swap_vision_tower(model, tier="generic") as handle:
        with torch.no_grad():
            model.train()
            tower(pixels, grid)
            model.eval()
            states = tower(pixels, grid, output_hidden_states=True)
            tower(pixel_values=pixels, grid_thw=grid)
        tower(pixels, grid).last_hidden_state.sum().backward()
        stats = handle.stats()
    assert len(states.hidden_states) > 1
    assert stats.hf_calls == {"training": 1, "output_hidden_states": 1, "grad": 1}
    assert stats.fused_calls == 1
    assert tower.blocks[0].attn.qkv.weight.grad is not None


def test_own_forward_keeps_its_attention(ernie):
    """No other thread gives the tower ours meanwhile: it would lose the gradients."""
    tower = ernie.tower
    taken = []
    with swap_vision_tower(ernie.model, tier="generic") as handle:
        (lock,) = handle.encoder.switch.locks

        def look(*_):
            thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
            thread.start()
            thread.join()

        tower.blocks[0].register_forward_hook(look)
        tower(*ernie.features_inputs)
        assert handle.stats().hf_calls == {"grad": 1}
    assert taken == [False]


def test_argument_that_only_hf_heeds(boosted):
    full = Full("paddleocr_vl", boosted)
    inner = full.tower.vision_model  # its forward names an attention_mask
    pixels, grid = full.features_inputs
    pixels = pixels[None]
    full.model.model.visual = inner
    with swap_vision_tower(full.model, tier="generic") as handle, torch.no_grad():
        own = inner(pixels, attention_mask=None, grid_thw=grid)
        masked = inner(pixels, grid_thw=grid, attention_mask=torch.ones(1, 120))
        stats = handle.stats()
    assert (stats.fused_calls, stats.hf_calls) == (1, {"attention_mask": 1})
    assert torch.allclose(own.last_hidden_state, masked.last_hidden_state, atol=1e-4)


def test_changed_weights_are_seen(ernie):
    model, tower = ernie.model, ernie.tower
    pixels, grid = ernie.features_inputs
    with swap_vision_tower(model, tier="generic") as handle, torch.no_grad():
        before = tower(pixels, grid).last_hidden_state
        tower.blocks[1].attn.proj.weight.mul_(1.5)
        after = tower(pixels, grid).last_hidden_state
        first = handle.encoder
        tower.double()
        doubled = tower(pixels, grid).last_hidden_state
        assert handle.encoder is not first
        assert handle.stats().rebuilds == 1
        tower.blocks[0] = copy.deepcopy(tower.blocks[0])
        tower(pixels.double(), grid)
        assert handle.stats().hf_calls == {"module replaced": 1}
    assert not torch.allclose(before, after)
    assert doubled.dtype == torch.float64
    assert rel_rms(after, doubled) < 1e-5


def test_undoing(ernie):
    model, tower = ernie.model, ernie.tower
    attributes = set(vars(tower))
    handle = swap_vision_tower(model, tier="generic")
    assert isinstance(handle, SwappedTower)
    with pytest.raises(ValueError, match="already swapped"):
        swap_vision_tower(model, tier="generic")
    plain = copy.deepcopy(model)
    assert not isinstance(getattr(plain.model, ernie.attribute).forward, SwappedTower)
    handle.restore()
    assert set(vars(tower)) == attributes
    with pytest.raises(ValueError, match="leave precision"):
        swap_vision_tower(model, tier="generic", precision="fp8")
    assert set(vars(tower)) == attributes


def test_tower_that_is_refused(boosted):
    config = transformers.AutoConfig.for_model(
        "minimax_m3_vl", vision_config=LAYERS, text_config={}
    ).vision_config
    holder = torch.nn.Module()
    holder.vision_tower = boosted(transformers.MiniMaxM3VLVisionModel._from_config(config))
    reasons = "computes no cu_seqlens|1 rows are neither"  # before transformers 5.23, and from then
    with pytest.raises(ValueError, match=rf"MiniMaxM3VLVisionModel .*({reasons})"):
        swap_vision_tower(holder)
    with pytest.raises(ValueError, match=r"tower is a MiniMaxM3VLVisionModel; supported"):
        swap_vision_tower(holder, tier="fused")
    holder.vision_tower = torch.nn.Conv2d(3, 8, 14)
    with pytest.raises(ValueError, match=r"tower is a Conv2d; .* takes packed patches"):
        swap_vision_tower(holder)


def test_modules_of_other_libraries(ernie):
    class Adapter(torch.nn.Linear):
        pass

    ernie.tower.blocks[0].attn.proj = Adapter(64, 64)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.proj.*Adapter, and graphs of the generic tier would"
    ) as refused:
        swap_vision_tower(ernie.model, tier="generic")
    assert "fused" not in str(refused.value)
