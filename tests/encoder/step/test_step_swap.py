"""The swap of the tower inside a whole Step-3.7 model."""

import copy
import logging

import pytest
import torch
from vitgraph.encoder import swap_vision_tower
from vitgraph.encoder.step_swap import rope_axes_of
from vitgraph.kernels.testing import rel_rms

FP32 = 5e-6  # see test_step_towers


def prompt(counts):
    """Tokens of text around each image, whose crops have 4 tokens and whole view 9."""
    ids = [3]
    for count in counts:
        ids += [500] * (4 * count + 9) + [7]
    return torch.tensor([ids])


def model_inputs(build, images, counts=(2, 0)):
    return {
        "input_ids": prompt(counts),
        "pixel_values": images(len(counts), build.image, 1),
        "pixel_values_local": images(sum(counts), build.crop, 2),
        "num_local_patches": list(counts),
    }


@torch.no_grad()
def test_the_model_goes_on_with_columns_first(build, images, column_first, caplog):
    model = build.hf_model()
    inputs = model_inputs(build, images)
    want = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    features = model.get_image_features(*list(inputs.values())[1:])
    with caplog.at_level(logging.WARNING, "vitgraph"), swap_vision_tower(model) as handle:
        assert not caplog.records
        assert rel_rms(model(**inputs).logits, want) < FP32
        again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(again, tokens)
        mine = model.get_image_features(*list(inputs.values())[1:])
        assert type(mine) is type(features)
        assert rel_rms(mine.last_hidden_state, features.last_hidden_state) < FP32
        assert handle.stats().fused_calls == 6
        assert handle.stats().hf_calls == {}
    assert torch.equal(model(**inputs).logits, want)
    assert "forward" not in model.model.vision_model.__dict__


@torch.no_grad()
def test_positions_past_the_pixels_are_refused(build, images, column_first):
    model = build.hf_model()
    with swap_vision_tower(model), pytest.raises(TypeError, match=r"by position, got 1 more"):
        model.model.vision_model(images(1, build.image), True)


@torch.no_grad()
def test_rows_first_by_name(build, images, row_first, caplog):
    model = build.hf_model()
    tower, pixels = model.model.vision_model, images(2, build.image)
    want = tower(pixels).last_hidden_state
    with swap_vision_tower(model, rope_axes="hw"):
        assert rel_rms(tower(pixels).last_hidden_state, want) < FP32
    assert not caplog.records
    # by default the released weights decide, and the difference is said
    with swap_vision_tower(model):
        assert rel_rms(tower(pixels).last_hidden_state, want) > 1e-2
    assert "rotates with axes 'hw', the swapped calls with 'wh'" in caplog.text


def test_axes_are_found_by_trying(build, row_first):
    assert rope_axes_of(build.hf_tower()) == "hw"


def test_other_axes_are_found_by_trying(build, column_first):
    assert rope_axes_of(build.hf_tower()) == "wh"


@torch.no_grad()
def test_reasons_for_the_own_forward(build, images, column_first):
    model = build.hf_model().requires_grad_(False)
    tower, pixels = model.model.vision_model, images(1, build.crop)
    handle = swap_vision_tower(model)
    states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert isinstance(tower(pixels, return_dict=False), tuple)
    # what a convolution would drop at the edge is not ours to guess
    odd = images(1, 90)
    want = tower(torch.cat([odd[..., :84, :84]])).last_hidden_state
    assert rel_rms(tower(odd).last_hidden_state, want) < FP32
    mask = torch.zeros(1, 1, 36, 36)
    mask[..., 5:] = float("-inf")
    assert rel_rms(tower(pixels, attention_mask=mask).last_hidden_state, want) > 1e-2
    tower.train()
    tower(pixels)
    tower.eval()
    with torch.enable_grad():
        tower(pixels.clone().requires_grad_())
    reasons = ("output_hidden_states", "image size", "attention_mask", "training", "grad")
    assert handle.stats().hf_calls == dict.fromkeys(reasons, 1)
    assert handle.stats().fused_calls == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("side", ["crop", "image"])
def test_pixels_that_are_no_floats(dtype, side, build, images, column_first):
    """As Hugging Face's forward, which makes floats of them."""
    model = build.hf_model()
    tower = model.model.vision_model
    pixels = (3 * images(2, getattr(build, side)).abs()).to(dtype)
    want = tower(pixels).last_hidden_state
    with swap_vision_tower(model) as handle:
        assert torch.equal(tower(pixels).last_hidden_state, want)
        assert handle.stats().hf_calls == {"pixel_values dtype": 1}
        assert handle.stats().fused_calls == 0
        assert rel_rms(tower(pixels.float()).last_hidden_state, want) < FP32
        assert rel_rms(tower(pixels.double()).last_hidden_state, want) < FP32
        assert handle.stats().fused_calls == 2


@torch.no_grad()
def test_other_sizes_run_too(build, images, column_first):
    model = build.hf_model()
    tower = model.model.vision_model
    batches = [torch.randn(2, 3, 14 * (2 + i), 14 * (5 - i % 3)) for i in range(11)]
    want = [tower(b).last_hidden_state for b in batches]
    handle = swap_vision_tower(model)
    for _ in range(2):
        for batch, expected in zip(batches, want, strict=True):
            assert rel_rms(tower(batch).last_hidden_state, expected) < FP32
    assert handle.stats().fused_calls == 22
    kept = handle.encoder._others
    assert len(kept) == 8
    size, path = next(iter(kept.items()))
    tower(torch.randn(1, 3, *size))
    assert kept[size] is path  # constants of a size are made once


@torch.no_grad()
def test_changes_are_followed(build, images, column_first):
    model = build.hf_model()
    tower, pixels = model.model.vision_model, images(2, 56)
    handle = swap_vision_tower(model)
    tower(pixels)
    for name in ("embeddings.position_embedding.weight", "layers.1.lambda_2"):
        parameter = tower.get_parameter(name)
        parameter.mul_(-1)
        want = handle._hf_forward(pixels).last_hidden_state
        assert rel_rms(tower(pixels).last_hidden_state, want) < FP32
    assert handle.stats().refreshes == 2
    model.double()
    want = handle._hf_forward(pixels.double()).last_hidden_state
    assert rel_rms(tower(pixels.double()).last_hidden_state, want) < 1e-6
    assert handle.stats().rebuilds == 1
    plain = copy.deepcopy(model)
    assert "forward" not in plain.model.vision_model.__dict__ or not isinstance(
        plain.model.vision_model.__dict__["forward"], type(handle)
    )


def test_refusals(build):
    model = build.hf_model()
    with pytest.raises(ValueError, match="fused kernels; leave tier = 'generic' out"):
        swap_vision_tower(model, tier="generic")
    with pytest.raises(ValueError, match="precision = 'int4' is not known"):
        swap_vision_tower(model, precision="int4")
    with pytest.raises(ValueError, match="rope_axes = 'ab' must be 'wh'"):
        swap_vision_tower(model, rope_axes="ab")
    for graphs, error in (
        ({"globl": {}}, ValueError),
        ({"num_slots": 0}, ValueError),
        (3, TypeError),
    ):
        with pytest.raises(error, match=r"num_slots|globl|int"):
            swap_vision_tower(model, graphs=graphs)
    assert "forward" not in model.model.vision_model.__dict__
    handle = swap_vision_tower(model, graphs={"local": {"num_slots": 2}})
    with pytest.raises(ValueError, match="already swapped"):
        swap_vision_tower(model)
    handle.restore()
    model.model.vision_model.layers[0].mlp.fc1 = type("Adapter", (torch.nn.Linear,), {})(64, 96)
    with pytest.raises(ValueError, match="fused forward would not run; merge adapters"):
        swap_vision_tower(model)


def test_a_rope_that_cannot_be_tried_leaves_the_tower_alone(build, monkeypatch):
    model = build.hf_model()

    def refuse(*_):
        raise RuntimeError("another rope")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.vision_model.rotary_emb), "forward", refuse)
        with pytest.raises(RuntimeError, match="another rope"):
            swap_vision_tower(model)
    assert "forward" not in model.model.vision_model.__dict__
    swap_vision_tower(model).restore()


def test_a_tower_without_data_is_refused_as_such(build):
    model = build.hf_model().to("meta")
    with pytest.raises(ValueError, match="meta"):
        swap_vision_tower(model)
    assert "forward" not in model.model.vision_model.__dict__


def test_axes_are_for_step_towers(qwen3):
    with pytest.raises(ValueError, match="rope_axes = 'wh' is for a Step3p7VisionModel"):
        swap_vision_tower(qwen3, rope_axes="wh")
