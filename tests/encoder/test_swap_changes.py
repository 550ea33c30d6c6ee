"""A swapped tower over time: what goes to Hugging Face's forward, and changes that are followed."""

import logging

import pytest
import torch
from vitgraph.encoder import swap_vision_tower
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

# HF's fp32 towers are up to 7.2e-6 away from fp64 with these weights; test_parity.py holds ours to
# twice that, so that the two are at most three times that apart.
FEATURES_BAR = 2.2e-5


def test_training_step_goes_to_hf_and_is_seen_afterwards(model, inputs):
    tower = model.model.visual
    handle = swap_vision_tower(model, graphs=False)
    images = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        before = tower(*images).pooler_output
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.eval()
    assert handle.stats().hf_calls == {"training": 2}
    assert all(p.grad is not None for p in tower.parameters())
    assert tower.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    optimizer.step()
    with torch.no_grad():
        fused = tower(*images).pooler_output
        assert handle.stats().fused_calls == 2
        handle.restore()
        expected = tower(*images).pooler_output
    assert rel_rms(before, expected) > 1e-3
    assert rel_rms(fused, expected) <= FEATURES_BAR


def test_grad_in_eval_mode_goes_to_hf(qwen3, call):
    tower, (pixels, grid) = qwen3.model.visual, call()
    with swap_vision_tower(qwen3, graphs=False) as handle:
        assert tower(pixels, grid).pooler_output.requires_grad
        tower.requires_grad_(False)
        tower.merger.linear_fc2.bias.requires_grad_(True)  # the last parameter alone is enough
        assert tower(pixels, grid).pooler_output.requires_grad
        tower.requires_grad_(False)
        assert tower(pixels.clone().requires_grad_(), grid).pooler_output.requires_grad
        assert handle.stats().hf_calls == {"grad": 3}
        assert not tower(pixels, grid).pooler_output.requires_grad
        assert handle.stats().fused_calls == 1


@pytest.mark.parametrize(
    "how", ["in place", "load_state_dict", "assign", "data", "data after grad"]
)
def test_changed_weights_are_seen(qwen3, call, how):
    tower, (pixels, grid) = qwen3.model.visual, call()
    handle = swap_vision_tower(qwen3, graphs=False)
    with torch.no_grad():
        first = tower(pixels, grid).pooler_output
    kept = {name: value.clone() for name, value in tower.state_dict().items()}
    alias = tower.state_dict()
    if how == "in place":
        with torch.no_grad():
            tower.blocks[1].attn.proj.bias.mul_(30)  # a weight that only derived tensors hold
    elif how in ("load_state_dict", "assign"):
        changed = {name: value * 1.1 for name, value in kept.items()}
        tower.load_state_dict(changed, assign=how == "assign")
    else:
        if how == "data after grad":
            tower(pixels, grid)
        tower.blocks[1].attn.proj.bias.data.mul_(30)
        if how == "data":
            handle.refresh()
    with torch.no_grad():
        fused = tower(pixels, grid).pooler_output
        stats = handle.stats()
        handle.restore()
        expected = tower(pixels, grid).pooler_output
    assert rel_rms(first, expected) > 1e-3
    assert rel_rms(fused, expected) <= FEATURES_BAR
    assert (stats.refreshes, stats.rebuilds) == ((0, 1) if how == "assign" else (1, 0))
    if how == "assign":  # tensors that the model has let go of are not written to
        assert all(torch.equal(alias[name], kept[name]) for name in kept)


def test_refresh_keeps_addresses(qwen3):
    handle = swap_vision_tower(qwen3, graphs=False)
    before = {name: t.data_ptr() for name, t in handle.encoder.weights.tensors.items()}
    encoder = handle.encoder
    handle.refresh()
    assert handle.encoder is encoder
    assert {name: t.data_ptr() for name, t in encoder.weights.tensors.items()} == before


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("place", ["argument", "config"])
def test_recorded_outputs_come_from_hf(build_model, call, wanted, place):
    model = build_model("qwen3_vl")
    tower, (pixels, grid) = model.model.visual, call()
    model.set_attn_implementation("eager")
    with swap_vision_tower(model, graphs=False) as handle, torch.no_grad():
        if place == "config":
            setattr(tower.config, wanted, True)
            output = tower(pixels, grid)
        else:
            output = tower(pixels, grid, **{wanted: True})
        assert len(output[wanted.removeprefix("output_")]) >= tower.config.depth
        assert handle.stats().hf_calls == {wanted: 1}
        assert tower(pixels, grid, **{wanted: False}).pooler_output is not None
        assert handle.stats().fused_calls == 1


def test_without_grid_the_call_goes_to_hf(qwen3, call):
    tower, (pixels, grid) = qwen3.model.visual, call()
    with swap_vision_tower(qwen3, graphs=False) as handle, torch.no_grad():
        with pytest.raises((TypeError, AttributeError)):  # HF's own answer to incomplete arguments
            tower(pixels, None)
        assert handle.stats().hf_calls == {"no grid_thw": 1}
        tower(pixels, grid)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cast_tower_gets_a_new_encoder(qwen3, call, dtype):
    tower, (pixels, grid) = qwen3.model.visual, call()
    handle = swap_vision_tower(qwen3, graphs=False)
    with torch.no_grad():
        tower(pixels, grid)
        qwen3.to(dtype)
        fused = tower(pixels, grid)
        tower(pixels, grid)
        assert handle.encoder.dtype == fused.pooler_output.dtype == dtype
        assert handle.stats().rebuilds == 1
        qwen3.float()
        tower(pixels, grid)
        assert handle.stats().rebuilds == 2
        qwen3.to(dtype)
        handle.restore()
        expected = tower(pixels, grid)
        oracle = qwen3.double().model.visual(pixels, grid)
    if dtype == torch.float64:  # HF's fp64 tower keeps rope in fp32: see test_parity.py
        assert rel_rms(fused.pooler_output, oracle.pooler_output) < 2e-6
    else:
        outputs = (x.pooler_output for x in (fused, expected, oracle))
        assert_as_accurate(*outputs, factor=1.3)


def test_autocast_to_another_dtype_goes_to_hf(qwen3, call):
    with swap_vision_tower(qwen3, graphs=False) as handle, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            qwen3.model.visual(*call())
        assert handle.stats().hf_calls == {"autocast": 1}


def test_replaced_module_goes_to_hf(qwen3, call, caplog):
    tower, (pixels, grid) = qwen3.model.visual, call()
    with swap_vision_tower(qwen3, graphs=False) as handle, torch.no_grad():
        before = tower(pixels, grid).pooler_output

        class Adapter(torch.nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return 2 * self.base(x)

        linear = tower.blocks[0].mlp.linear_fc2
        tower.blocks[0].mlp.linear_fc2 = Adapter(linear)
        with caplog.at_level(logging.WARNING, "vitgraph"):
            adapted = tower(pixels, grid).pooler_output
            tower(pixels, grid)
        assert rel_rms(adapted, before) > 1e-3
        assert handle.stats().hf_calls == {"module replaced": 2}
        assert len(caplog.records) == 1
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.linear_fc2.*Adapter"):
            handle.refresh()
        tower.blocks[0].mlp.linear_fc2 = linear
        assert torch.equal(tower(pixels, grid).pooler_output, before)
        assert handle.stats().hf_calls == {"module replaced": 2}


def test_inference_mode(qwen3, call):
    with torch.inference_mode():
        handle = swap_vision_tower(qwen3, graphs=False)
        qwen3.model.visual(*call())
        handle.refresh()
    handle.refresh()
    with torch.no_grad():
        qwen3.model.visual(*call())
    assert handle.stats().fused_calls == 2


@pytest.mark.gpu
def test_graphs_follow_weights_and_device(model, family, call):
    model.cuda()
    tower, (pixels, grid) = model.model.visual, call(family)
    pixels, on_gpu = pixels.cuda(), grid.cuda()
    handle = swap_vision_tower(model.bfloat16(), graphs={"token_budgets": [64, 256]})
    with torch.no_grad():
        first = tower(pixels, on_gpu)
        kept = first.pooler_output.clone()
        eager = handle.encoder.eager_forward(pixels, [tuple(g) for g in grid.tolist()])
        assert rel_rms(first.pooler_output, eager["pooler_output"]) < 2e-2
        tower.blocks[0].attn.proj.weight.mul_(3)
        changed = tower(pixels, on_gpu).pooler_output
        assert torch.equal(first.pooler_output, kept)
        assert rel_rms(changed, kept) > 1e-3
        model.half()
        assert tower(pixels, on_gpu).pooler_output.dtype == torch.float16
        assert handle.encoder.graphs is not None
        handle.restore()
        expected = tower(pixels, on_gpu).pooler_output
    assert rel_rms(changed, expected) < 1e-1
