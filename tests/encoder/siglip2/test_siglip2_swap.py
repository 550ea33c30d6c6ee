"""The swap of the tower inside whole SigLIP 2 models."""

import copy

import pytest
import torch
import transformers
from vitgraph.encoder import Siglip2Encoder, swap_vision_tower
from vitgraph.kernels.testing import rel_rms

FP32 = 5e-6  # see test_siglip2_encoder
SHAPES = [[3, 5], [7, 6], [1, 20]]


@torch.no_grad()
def test_the_model_goes_on(build, batch):
    model = build.model()
    args = batch(SHAPES, length=50)
    text = {"input_ids": torch.arange(32).view(2, 16)}
    want = model(**args, **text)
    features = model.get_image_features(**args)
    with swap_vision_tower(model) as handle:
        mine = model.get_image_features(**args)
        assert type(mine) is type(features)
        assert mine.last_hidden_state.shape == features.last_hidden_state.shape
        mask = args["pixel_attention_mask"].bool()
        assert rel_rms(mine.last_hidden_state[mask], features.last_hidden_state[mask]) < FP32
        assert (mine.last_hidden_state[~mask] == 0).all()
        assert rel_rms(mine.pooler_output, features.pooler_output) < FP32
        assert rel_rms(model(**args, **text).logits_per_image, want.logits_per_image) < 1e-5
        assert handle.stats().fused_calls == 2
        assert handle.stats().hf_calls == {}
    assert torch.equal(model(**args, **text).logits_per_image, want.logits_per_image)
    assert "forward" not in model.vision_model.__dict__


@torch.no_grad()
def test_images_of_one_size_need_no_mask(build, batch):
    model = build.model()
    args = batch([[4, 6], [8, 3]]) | {"pixel_attention_mask": None}
    want = model.get_image_features(**args)
    handle = swap_vision_tower(model)
    got = model.get_image_features(**args)
    assert rel_rms(got.last_hidden_state, want.last_hidden_state) < FP32
    assert isinstance(model.vision_model(**args, return_dict=False), tuple)
    assert handle.stats().fused_calls == 2


@torch.no_grad()
def test_classifier(build, batch):
    config = transformers.Siglip2Config(vision_config=build.vision, text_config=build.text)
    model = transformers.Siglip2ForImageClassification(config).eval()
    args = batch(SHAPES)
    want = model(**args).logits
    with swap_vision_tower(model) as handle:
        assert rel_rms(model(**args).logits, want) < 1e-5
        assert handle.stats().fused_calls == 1


@torch.no_grad()
def test_lfm2_vl(build, batch, tmp_path):
    """A tower without a head, whose patches the model reads."""
    model = build.lfm2()
    args = batch([[4, 6], [2, 8]], length=30)
    want = model.model.get_image_features(**args).pooler_output
    tower = model.model.vision_tower(**args).last_hidden_state
    live = tower[args["pixel_attention_mask"].bool()]
    with swap_vision_tower(model) as handle:
        got = model.model.get_image_features(**args).pooler_output
        assert handle.stats().fused_calls == 1
    for features, expected in zip(got, want, strict=True):
        assert rel_rms(features, expected) < 1e-5
    model.save_pretrained(tmp_path)
    stored = Siglip2Encoder.from_pretrained(tmp_path, device="cpu")
    for encoder in Siglip2Encoder.from_hf(model), stored:
        output = encoder(**args)
        assert output.pooler_output is None
        assert rel_rms(output.last_hidden_state, live) < FP32


@torch.no_grad()
def test_reasons_for_the_own_forward(build, batch):
    model = build.model().requires_grad_(False)
    tower, args = model.vision_model, batch(SHAPES, length=50)
    other = args | {"pixel_attention_mask": args["pixel_attention_mask"].roll(1, 1)}
    unmasked = args | {"pixel_attention_mask": None}
    large = args | {"spatial_shapes": torch.tensor([[3, 5], [7, 8], [1, 20]])}
    calls = {
        "pixel_attention_mask": [other, unmasked],
        "output_hidden_states": [args | {"output_hidden_states": True}],
    }
    want = [tower(**a).pooler_output for group in calls.values() for a in group]
    handle = swap_vision_tower(model)
    got = [tower(**a).pooler_output for group in calls.values() for a in group]
    assert all(map(torch.equal, got, want))
    with pytest.raises((RuntimeError, ValueError)):
        tower(**large)
    tower.train()
    tower(**args)
    tower.eval()
    with torch.enable_grad():
        tower(**args | {"pixel_values": args["pixel_values"].clone().requires_grad_()})
    reasons = {"spatial_shapes": 1, "training": 1, "grad": 1}
    counts = {name: len(group) for name, group in calls.items()}
    assert handle.stats().hf_calls == counts | reasons
    assert handle.stats().fused_calls == 0


@torch.no_grad()
def test_arguments_that_only_the_own_forward_knows(build, batch):
    model, args = build.model(), batch(SHAPES)
    with swap_vision_tower(model) as handle:
        # None or of no meaning for the result
        said = {"output_attentions": False, "output_hidden_states": False, "use_cache": False}
        model.vision_model(**args, **said, adapter=None)
        assert handle.stats().fused_calls == 1
        model.vision_model(**args, adapter="what it is for, only that forward says")
        assert handle.stats().hf_calls == {"adapter": 1}


@torch.no_grad()
def test_changes_are_followed(build, batch):
    model, args = build.model(), batch(SHAPES)
    plain = copy.deepcopy(model)
    handle = swap_vision_tower(model)
    for change in (
        lambda m: m.vision_model.head.probe.mul_(-1),
        lambda m: m.vision_model.encoder.layers[1].self_attn.k_proj.weight.mul_(2),
        lambda m: m.double(),
    ):
        change(model)
        change(plain)
        dtype = next(model.parameters()).dtype
        given = args | {"pixel_values": args["pixel_values"].to(dtype)}
        want = plain.get_image_features(**given).pooler_output
        got = model.get_image_features(**given).pooler_output
        assert got.dtype == want.dtype
        assert rel_rms(got, want) < FP32
    assert handle.stats().refreshes == 2
    assert handle.stats().rebuilds == 1
    assert handle.stats().fused_calls == 3


def test_refusals(build):
    model = build.model()
    with pytest.raises(ValueError, match="leave tier = 'generic' out"):
        swap_vision_tower(model, tier="generic")
    with pytest.raises(ValueError, match="precision = 'int4' is not known"):
        swap_vision_tower(model, precision="int4")
    with pytest.raises(ValueError, match="rope_axes = 'hw' is for a Step3p7VisionModel"):
        swap_vision_tower(model, rope_axes="hw")
    with pytest.raises(ValueError, match="unknown key"):
        swap_vision_tower(model, graphs={"budgets": [1]})
