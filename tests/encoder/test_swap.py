"""Swapping: HF's models give HF's answers, keep HF's weights, and come back as they were."""

import copy
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file
from vitgraph.encoder import EncoderCudaGraphConfig, SwappedTower, VisionEncoder, swap_vision_tower
from vitgraph.kernels.testing import rel_rms

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
# A tower in another order of summation is off by some 1e-6; the language model hardly amplifies it.
LOGITS_BAR = 1e-5
FEATURES_BAR = 5e-6


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(build_model, family):
    return build_model(family)


@pytest.fixture
def inputs(model_inputs, family):
    return model_inputs(family)


@pytest.fixture
def call(pixel_rows):
    """Arguments of a tower's forward."""
    grids = [(1, 8, 12), (2, 4, 6)]

    def arguments(family: str = "qwen3_vl", seed: int = 1):
        return pixel_rows(family, grids, seed), torch.tensor(grids)

    return arguments


@pytest.fixture
def qwen3(build_model):
    return build_model("qwen3_vl")


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_logits_and_generation(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
        blind = model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with swap_vision_tower(model) as handle:
            swapped_logits = model(**inputs).logits
            swapped_text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            stats = handle.stats()
        restored_logits = model(**inputs).logits
        restored_text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert rel_rms(blind, logits) > 1e-2  # or the comparison would not see the tower
    assert rel_rms(swapped_logits, logits) <= LOGITS_BAR
    assert torch.equal(swapped_text, text)
    assert torch.equal(restored_logits, logits)
    assert torch.equal(restored_text, text)
    assert stats.fused_calls == 4  # images and videos, in forward and in generate
    assert stats.hf_calls == {}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_features_have_hf_structure(model, inputs, kind):
    method = getattr(model, f"get_{kind}_features")
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    grid = inputs[f"{kind}_grid_thw"]
    with torch.no_grad():
        expected = method(pixels, grid)
        with swap_vision_tower(model):
            actual = method(pixels, grid)
            as_tuple = method(pixels, grid, return_dict=False)
        expected_tuple = method(pixels, grid, return_dict=False)
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert len(actual.pooler_output) == len(expected.pooler_output) == len(grid)
    pairs = [(actual.last_hidden_state, expected.last_hidden_state)]
    pairs += zip(actual.pooler_output, expected.pooler_output, strict=True)
    if "deepstack_features" in expected:
        assert type(actual.deepstack_features) is type(expected.deepstack_features)
        for a, e in zip(actual.deepstack_features, expected.deepstack_features, strict=True):
            # later versions split them by item
            pairs += zip(a, e, strict=True) if isinstance(e, (tuple, list)) else [(a, e)]
    for a, e in pairs:
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert rel_rms(a, e) <= FEATURES_BAR
    assert [type(x) for x in as_tuple] == [type(x) for x in expected_tuple]


def test_inner_model_is_accepted(qwen3, call):
    with swap_vision_tower(qwen3.model) as handle, torch.no_grad():
        qwen3.model.visual(*call())
        assert handle.stats().fused_calls == 1


def test_saved_files_are_those_of_the_original(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    with swap_vision_tower(model):
        model.save_pretrained(tmp_path / "swapped")
    before = load_file(tmp_path / "before" / "model.safetensors")
    swapped = load_file(tmp_path / "swapped" / "model.safetensors")
    assert any(name.split(".")[0] in ("model", "visual") and "visual" in name for name in before)
    assert same_bytes(swapped, before)
    for name in ("model.safetensors", "config.json"):
        written = (tmp_path / "swapped" / name).read_bytes()
        assert written == (tmp_path / "before" / name).read_bytes()


def test_module_interface_is_hf_own(model):
    tower = model.model.visual
    names = [name for name, _ in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with swap_vision_tower(model):
        assert model.model.visual is tower
        assert isinstance(model.model.visual, type(tower))
        assert [name for name, _ in model.named_modules()] == names
        assert same_bytes(model.state_dict(), state)
        assert model.get_encoder(modality="image") is tower
        assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
        model.train()
        assert tower.training
        assert tower.blocks[0].training
        model.eval().requires_grad_(False)
        assert not any(p.requires_grad for p in tower.parameters())


def test_restore_leaves_nothing_behind(qwen3):
    tower = qwen3.model.visual
    attributes = dict(vars(tower))
    state = {name: value.clone() for name, value in qwen3.state_dict().items()}
    handle = swap_vision_tower(qwen3)
    assert handle.is_active
    assert isinstance(handle, SwappedTower)
    assert isinstance(handle.encoder, VisionEncoder)
    assert "active" in repr(handle)
    handle.restore()
    handle.restore()
    assert not handle.is_active
    assert qwen3.model.visual is tower
    assert vars(tower) == attributes
    assert same_bytes(qwen3.state_dict(), state)


def test_restore_keeps_an_earlier_wrapper_and_refuses_a_later_one(qwen3, call):
    tower = qwen3.model.visual
    calls = []
    own = tower.forward

    def earlier(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    tower.forward = earlier
    handle = swap_vision_tower(qwen3)
    later = tower.forward = lambda *args, **kwargs: handle(*args, **kwargs)
    with pytest.raises(RuntimeError, match="set after swap_vision_tower"):
        handle.restore()
    assert tower.forward is later
    tower.forward = handle
    handle.restore()
    assert tower.forward is earlier
    with torch.no_grad():
        tower(*call())
    assert calls == [1]


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
        assert same_bytes(alias, kept)


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


def test_precomputed_arguments_and_names_of_the_first(qwen3, call):
    from transformers import vision_utils

    tower, (pixels, grid) = qwen3.model.visual, call()
    extra = {
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        "position_ids": vision_utils.get_vision_position_ids(grid, 2),
        "max_seqlen": 96,
    }
    with swap_vision_tower(qwen3, graphs=False) as handle, torch.no_grad():
        plain = tower(pixels, grid)
        outputs = [
            tower(pixels, grid_thw=grid, **extra),
            tower(hidden_states=pixels, grid_thw=grid),
            tower(pixel_values=pixels, grid_thw=grid),
        ]
        assert handle.stats().fused_calls == 4
    for output in outputs:
        assert torch.equal(output.pooler_output, plain.pooler_output)


def test_return_dict_false(model, family, call):
    tower, arguments = model.model.visual, call(family)
    with torch.no_grad():
        expected = tower(*arguments, return_dict=False)
        with swap_vision_tower(model, graphs=False):
            actual = tower(*arguments, return_dict=False)
            tower.config.return_dict = False
            by_config = tower(*arguments)
    assert type(actual) is type(by_config) is tuple
    assert [type(x) for x in actual] == [type(x) for x in expected]
    assert rel_rms(actual[1], expected[1]) <= FEATURES_BAR


def test_results_of_a_call_survive_the_next(model, family, call):
    tower = model.model.visual
    with swap_vision_tower(model), torch.no_grad():
        first = tower(*call(family))
        values = [first.last_hidden_state.clone(), first.pooler_output.clone()]
        second = tower(*call(family, seed=5))
        second.pooler_output = None
        assert torch.equal(first.last_hidden_state, values[0])
        assert torch.equal(first.pooler_output, values[1])


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
    # rope and interpolation weights stay in fp32 in HF's fp64 tower
    floor = torch.finfo(torch.float32).eps
    bar = max(1.3 * rel_rms(expected.pooler_output, oracle.pooler_output), floor)
    assert rel_rms(fused.pooler_output, oracle.pooler_output) <= bar


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_hold_the_plain_tower(qwen3, call, duplicate):
    with swap_vision_tower(qwen3, graphs=False) as handle, torch.no_grad():
        twin = duplicate(qwen3)
        fused = qwen3.model.visual(*call()).pooler_output
        plain = twin.model.visual(*call()).pooler_output
        assert handle.stats().fused_calls == 1
        assert rel_rms(fused, plain) <= FEATURES_BAR
        with swap_vision_tower(twin, graphs=False) as other:
            assert torch.equal(twin.model.visual(*call()).pooler_output, fused)
            assert other.stats().fused_calls == 1


def test_hooks_on_the_tower_fire_once(qwen3, call):
    tower, seen = qwen3.model.visual, []
    tower.register_forward_hook(lambda *_: seen.append(1))
    with swap_vision_tower(qwen3, graphs=False), torch.no_grad():
        tower(*call())
        tower(*call(), output_hidden_states=True)
    assert seen == [1, 1]


def test_inference_mode(qwen3, call):
    with torch.inference_mode():
        handle = swap_vision_tower(qwen3, graphs=False)
        qwen3.model.visual(*call())
        handle.refresh()
    handle.refresh()
    with torch.no_grad():
        qwen3.model.visual(*call())
    assert handle.stats().fused_calls == 2


def test_no_cuda_is_said_once(qwen3, call, caplog):
    with caplog.at_level(logging.INFO, "vitgraph"), torch.no_grad():
        handle = swap_vision_tower(qwen3, graphs={"token_budgets": [64, 128]})
        qwen3.double()
        qwen3.model.visual(*call())
    assert handle.stats().rebuilds == 1
    assert [r.levelno for r in caplog.records] == [logging.INFO]
    assert "no CUDA graphs" in caplog.text


@pytest.mark.parametrize("graphs", [False, {}, EncoderCudaGraphConfig(token_budgets=(64,))])
def test_forms_of_graphs(qwen3, graphs):
    swap_vision_tower(qwen3, graphs=graphs).restore()


@pytest.mark.parametrize(
    ("graphs", "error"), [({"token_budget": [64]}, ValueError), (3, TypeError)]
)
def test_bad_graphs_leave_the_model_alone(qwen3, graphs, error):
    with pytest.raises(error):
        swap_vision_tower(qwen3, graphs=graphs)
    assert "forward" not in vars(qwen3.model.visual)


def test_unknown_models(qwen3):
    with pytest.raises(ValueError, match=r"is a Linear, no vision tower; supported: Qwen2VLFor"):
        swap_vision_tower(torch.nn.Linear(2, 2))
    qwen3.model.visual = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"its vision tower is a Identity.*Qwen3VLVisionModel"):
        swap_vision_tower(qwen3)


def test_swapping_twice(qwen3):
    with swap_vision_tower(qwen3, graphs=False):
        with pytest.raises(ValueError, match=r"already swapped; call restore\(\)"):
            swap_vision_tower(qwen3)
        with pytest.raises(ValueError, match="already swapped"):
            swap_vision_tower(qwen3.model)
    swap_vision_tower(qwen3, graphs=False).restore()


def test_split_tower(qwen3):
    qwen3.model.visual.blocks[2].to("meta")
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\].*device_map"):
        swap_vision_tower(qwen3)


def test_adapted_and_quantised_towers(qwen3):
    tower = qwen3.model.visual
    weight = torch.zeros(64, 96, dtype=torch.int8)
    tower.blocks[0].mlp.linear_fc2.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.linear_fc2\.weight' is torch\.int8"):
        swap_vision_tower(qwen3)


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
