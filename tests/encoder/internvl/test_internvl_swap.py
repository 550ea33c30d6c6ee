"""The swap of tower and projector inside whole InternVL and Qianfan-OCR models."""

import copy
import inspect
import logging
import pickle

import pytest
import torch
from vitgraph.encoder import swap_vision_tower
from vitgraph.kernels.testing import rel_rms

FP32 = 5e-6  # see test_internvl_towers


def model_inputs(build, tiles, counts=(2, 1)):
    """Tokens of text around each image of so many tiles, which have 16 tokens each."""
    ids = [3]
    for count in counts:
        ids += [500] * (16 * count) + [7]
    return {"input_ids": torch.tensor([ids]), "pixel_values": tiles(sum(counts), build.side)}


def assert_close(got, want):
    """For a field of an output; states are a tuple, with None for those not asked for."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert_close(mine, theirs)
    elif want is None:
        assert got is None
    else:
        assert got.shape == want.shape
        assert rel_rms(got, want) < FP32


@pytest.fixture(params=["full", "inner"])
def whole(request):
    """A full model, or the model inside it."""
    return lambda model: model if request.param == "full" else model.model


@torch.no_grad()
def test_the_model_goes_on(kind, whole, build, tiles):
    model = build.model(kind)
    inputs = model_inputs(build, tiles)
    want = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    features = model.get_image_features(inputs["pixel_values"])
    with swap_vision_tower(whole(model)) as handle:
        got = model(**inputs)
        assert rel_rms(got.logits, want) < FP32
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
        mine = model.get_image_features(inputs["pixel_values"])
        assert type(mine) is type(features)
        names = set(features)
        if kind == "pooled":  # the state before the last norm, which transformers 5.23 adds
            names.discard("hidden_states")
        assert set(mine) == names
        for name in names:
            assert_close(mine[name], features[name])
        assert handle.stats().fused_calls == 3
        assert handle.stats().hf_calls == {}
    assert torch.equal(model(**inputs).logits, want)
    assert "forward" not in model.model.vision_tower.__dict__
    assert "get_image_features" not in model.model.__dict__


@torch.no_grad()
def test_the_projector_is_ours(build, tiles, monkeypatch):
    """The model's own does not run, nor does its pixel shuffle."""
    model = build.model()
    with swap_vision_tower(model):
        monkeypatch.setattr(type(model.model), "pixel_shuffle", None)
        monkeypatch.setattr(type(model.model.multi_modal_projector), "forward", None)
        assert model.get_image_features(tiles(2, build.side)).pooler_output.shape == (2, 16, 48)


@torch.no_grad()
def test_a_tower_alone(kind, build, tiles):
    tower, images = build.model(kind).model.vision_tower, tiles(2, build.side)
    want = tower(images)
    with swap_vision_tower(tower) as handle:
        got = tower(images)
        assert type(got) is type(want)
        assert got.keys() == want.keys()
        assert rel_rms(got.last_hidden_state, want.last_hidden_state) < FP32
        assert handle.stats().fused_calls == 1
    assert torch.equal(tower(images).last_hidden_state, want.last_hidden_state)


@torch.no_grad()
def test_forms_of_the_calls(build, tiles):
    model, images = build.model(), tiles(2, build.side)
    tower = model.model.vision_tower
    calls = [
        lambda: model.model.get_image_features(
            images, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ),
        lambda: model.get_image_features(images, return_dict=False),
        lambda: model.get_image_features(images, return_dict=True),
        lambda: tower(pixel_values=images),
        lambda: tower(images, None),
        lambda: tower(images, return_dict=False),
    ]
    want = [call() for call in calls]
    signature = inspect.signature(model.model.get_image_features)
    with swap_vision_tower(model) as handle:
        assert inspect.signature(model.model.get_image_features) == signature
        for call, expected in zip(calls, want, strict=True):
            got = call()
            assert type(got) is type(expected)
            assert len(got) == len(expected)
            for i in range(len(expected)):
                assert_close(got[i], expected[i])
        assert handle.stats().fused_calls == len(calls)
        model.model.config.return_dict = False
        assert isinstance(model.model.get_image_features(images), tuple)


@torch.no_grad()
def test_sizes(build, tiles):
    """Squares are projected; other images leave that to the model, and odd ones everything."""
    model = build.model()
    tower = model.model.vision_tower
    squares = [tiles(2, side) for side in (28, 84, 140)]
    want = [model.get_image_features(x) for x in squares]
    wide = tiles(2, 56, 224)  # 64 patches: that transformers takes for a square
    want_wide = model.get_image_features(wide)
    # 81 patches of 5 x 5 and more: the projector cannot join them, the tower can
    odd, edge = tiles(1, 70), tiles(1, 120)
    want_odd = [tower(x).last_hidden_state for x in (odd, edge)]
    handle = swap_vision_tower(model)
    for x, expected in zip(squares, want, strict=True):
        assert rel_rms(model.get_image_features(x).pooler_output, expected.pooler_output) < FP32
    assert handle.stats().hf_calls == {}
    got = model.get_image_features(wide)
    assert rel_rms(got.pooler_output, want_wide.pooler_output) < FP32
    assert handle.stats().hf_calls == {"projector image size": 1}
    assert handle.stats().fused_calls == 4
    for x, expected in zip((odd, edge), want_odd, strict=True):
        assert torch.equal(tower(x).last_hidden_state, expected)
    assert handle.stats().hf_calls["image size"] == 2
    with pytest.raises(RuntimeError):
        model.get_image_features(odd)  # as the model itself
    assert handle.stats().hf_calls["image size"] == 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", ["tile", "other"])  # the path of graphs, and the eager one
def test_pixels_that_are_no_floats(dtype, size, build, tiles):
    """As Hugging Face's forward, which makes floats of them."""
    model = build.model()
    tower = model.model.vision_tower
    images = (3 * tiles(2, build.side if size == "tile" else 84).abs()).to(dtype)
    want, features = tower(images).last_hidden_state, model.get_image_features(images)
    with swap_vision_tower(model) as handle:
        assert torch.equal(tower(images).last_hidden_state, want)
        assert handle.stats().hf_calls == {"pixel_values dtype": 1}
        assert handle.stats().fused_calls == 0
        # the model casts them, so that its tower sees floats
        got = model.get_image_features(images)
        assert rel_rms(got.pooler_output, features.pooler_output) < FP32
        assert handle.stats().hf_calls == {
            "pixel_values dtype": 1, "projector pixel_values dtype": 1,
        }  # fmt: skip
        for kind in (torch.float32, torch.float64):
            got = tower(images.to(kind)).last_hidden_state
            assert rel_rms(got, want) < FP32
        assert handle.stats().fused_calls == 3


@torch.no_grad()
def test_reasons_for_the_own_forward(build, tiles):
    model = build.model().requires_grad_(False)
    tower, images = model.model.vision_tower, tiles(2, build.side)
    want = model.get_image_features(images).pooler_output
    deep = model.get_image_features(images, vision_feature_layer=1).pooler_output
    handle = swap_vision_tower(model)
    assert len(tower(images, output_hidden_states=True).hidden_states) == 4
    got = model.get_image_features(images, vision_feature_layer=1).pooler_output
    assert torch.equal(got, deep)
    tower(images, bool_masked_pos=None)
    with pytest.raises(AttributeError):  # this tower has no token for masks
        tower(images, torch.zeros(2, 64, dtype=torch.bool))
    with pytest.raises(RuntimeError):  # the class row makes no square
        model.get_image_features(images, vision_feature_select_strategy="full")
    model.train()
    model.get_image_features(images)
    model.eval()
    with torch.enable_grad():
        model.get_image_features(images.clone().requires_grad_())
        # nothing needs grad
        assert rel_rms(model.get_image_features(images).pooler_output, want) < FP32
    assert handle.stats().hf_calls == {
        "output_hidden_states": 2, "bool_masked_pos": 1, "vision_feature_select_strategy": 1,
        "training": 1, "grad": 1,
    }  # fmt: skip


def test_a_projector_that_trains(build, tiles):
    """A frozen tower stays fused, gradients reach the projector, and its steps are followed."""
    model = build.model()
    model.model.vision_tower.requires_grad_(False)
    projector, images = model.model.multi_modal_projector, tiles(2, build.side)
    # columns side by side: the encoder has a copy of its own
    weight = projector.linear_2.weight.detach().T.contiguous().T
    projector.linear_2.weight = torch.nn.Parameter(weight)
    handle = swap_vision_tower(model)
    model.model.get_image_features(images).pooler_output.sum().backward()
    assert all(p.grad is not None for p in projector.parameters())
    assert handle.stats().hf_calls == {"projector grad": 1}
    assert handle.stats().fused_calls == 1
    versions = [p._version for p in projector.parameters()]
    with torch.no_grad():
        for p in projector.parameters():
            p.data.sub_(0.1 * p.grad)  # a step that versions do not show
        assert [p._version for p in projector.parameters()] == versions
        got = model.get_image_features(images).pooler_output
        projector.train()
        model.get_image_features(images)
        projector.eval()
        handle.restore()
        assert rel_rms(got, model.get_image_features(images).pooler_output) < FP32
    assert handle.stats().hf_calls == {"projector grad": 1, "projector training": 1}


@torch.no_grad()
def test_hooks_fire(build, tiles):
    model, images = build.model(), tiles(2, build.side)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    want = model.get_image_features(images).pooler_output
    seen = []
    swap_vision_tower(model)
    removable = tower.register_forward_hook(lambda *_: seen.append("tower"))
    model.get_image_features(images)
    assert seen == ["tower"]
    removable.remove()
    projector.register_forward_hook(lambda *_: seen.append("projector"))
    assert rel_rms(model.get_image_features(images).pooler_output, want) < FP32
    assert seen == ["tower", "projector"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["layer_norm", "linear_1", "act", "linear_2"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_what_wraps_a_part_of_the_projector_runs(how, name, build, tiles):
    model, images = build.model(), tiles(2, build.side)
    part = getattr(model.model.multi_modal_projector, name)
    handle = swap_vision_tower(model)
    model.get_image_features(images)
    assert handle.stats().hf_calls == {}
    own = part.forward
    if how == "hook":
        part.register_forward_hook(lambda _, __, y: 2 * y + 1)
    elif how == "pre-hook":
        part.register_forward_pre_hook(lambda _, x: (2 * x[0] + 1,))
    else:
        part.forward = lambda x: 2 * own(x) + 1
    got = model.get_image_features(images).pooler_output
    assert handle.stats().hf_calls == {"projector hooks": 1}
    assert handle.stats().fused_calls == 2
    handle.restore()
    assert rel_rms(got, model.get_image_features(images).pooler_output) < FP32


@torch.no_grad()
def test_changes_are_followed(build, tiles):
    model, images = build.model(), tiles(2, build.side)
    handle = swap_vision_tower(model)
    names = (
        "vision_tower.embeddings.position_embeddings", "vision_tower.encoder.layer.1.lambda_2",
        "vision_tower.embeddings.cls_token", "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.layer_norm.bias",
    )  # fmt: skip

    def check(bound=FP32):
        plain = copy.deepcopy(model).get_image_features(images).pooler_output
        assert rel_rms(model.get_image_features(images).pooler_output, plain) < bound

    for name in names:
        model.model.get_parameter(name).mul_(-1)
        check()
    assert handle.stats().refreshes == len(names)
    model.double()
    images = images.double()
    check(1e-12)
    assert handle.stats().rebuilds == 1
    assert handle.stats().hf_calls == {}


@torch.no_grad()
def test_one_thread_reads_the_projector_and_the_other_waits(build, tiles, meet):
    model, images = build.model(), tiles(2, build.side)
    handle = swap_vision_tower(model)
    before = model.get_image_features(images).pooler_output
    model.model.multi_modal_projector.linear_2.weight.mul_(-1)

    @torch.no_grad()
    def work():
        return model.get_image_features(images).pooler_output

    entries, results = meet(handle, (handle.encoder, "load_weights"), work, work)
    assert entries == ["first"]
    assert handle.stats().refreshes == 1
    assert handle.stats().fused_calls == 3
    handle.restore()
    want = work()
    assert rel_rms(before, want) > 1e-2
    for result in results:
        assert rel_rms(result, want) < FP32


@torch.no_grad()
def test_parts_that_move_apart_and_together_again(build, tiles, caplog):
    model, images = build.model(), tiles(2, build.side)
    want = model.get_image_features(images).pooler_output
    handle = swap_vision_tower(model)
    model.model.multi_modal_projector.double()
    with caplog.at_level(logging.INFO, "vitgraph"), pytest.raises(RuntimeError):
        model.get_image_features(images)  # as the model itself: dtypes that no layer takes
    assert "the projector stays the model's own: tower and projector are" in caplog.text
    with pytest.raises(RuntimeError):
        model.get_image_features(images)
    assert handle.stats().hf_calls == {"projector": 2}
    model.model.multi_modal_projector.float()
    assert rel_rms(model.get_image_features(images).pooler_output, want) < FP32
    assert handle.stats().hf_calls == {"projector": 2}
    # new values of the tower do not hide where the projector has gone meanwhile
    model.model.multi_modal_projector.double()
    model.model.vision_tower.embeddings.cls_token.mul_(-1)
    model.model.vision_tower(images)
    with pytest.raises(RuntimeError):
        model.get_image_features(images)
    assert handle.stats().hf_calls == {"projector": 3}


@torch.no_grad()
def test_a_replaced_projector(build, tiles):
    model, images = build.model(), tiles(2, build.side)
    other = build.model(seed=7).model.multi_modal_projector
    handle = swap_vision_tower(model)
    model.model.multi_modal_projector = other
    plain = copy.deepcopy(model).get_image_features(images).pooler_output
    assert rel_rms(model.get_image_features(images).pooler_output, plain) < FP32
    assert handle.stats().hf_calls == {"projector replaced": 1}
    handle.refresh()
    assert rel_rms(model.get_image_features(images).pooler_output, plain) < FP32
    assert handle.stats().hf_calls == {"projector replaced": 1}
    assert handle.stats().rebuilds == 1

    class Adapter(torch.nn.Linear):
        """Of another library."""

    other.linear_1 = Adapter(256, 48)
    plain = copy.deepcopy(model).get_image_features(images).pooler_output
    for _ in range(2):
        assert rel_rms(model.get_image_features(images).pooler_output, plain) < FP32
        handle.refresh()
    assert handle.stats().hf_calls == {"projector replaced": 2, "projector": 1}
    # the tower goes on by itself, its changes are followed, too
    model.model.vision_tower.encoder.layer[0].lambda_1.mul_(-1)
    plain = copy.deepcopy(model).get_image_features(images).pooler_output
    assert handle.encoder.spec.out_size == 0
    assert rel_rms(model.get_image_features(images).pooler_output, plain) < FP32
    assert handle.stats().hf_calls == {"projector replaced": 2, "projector": 2}
    assert handle.stats().fused_calls == 5


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_plain(how, build, tiles):
    model, images = build.model(), tiles(1, build.side)
    handle = swap_vision_tower(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    got = twin.get_image_features(images).pooler_output
    assert handle.stats().fused_calls == 0
    handle.restore()
    assert torch.equal(got, model.get_image_features(images).pooler_output)


@torch.no_grad()
def test_what_wraps_the_features_stays(build, tiles):
    model, images = build.model(), tiles(1, build.side)
    inner = model.model
    handle = swap_vision_tower(model)
    swapped, calls = inner.get_image_features, []

    def wrapper(*args, **kwargs):
        calls.append(args)
        return swapped(*args, **kwargs)

    inner.get_image_features = wrapper
    handle.restore()
    handle.restore()
    model.get_image_features(images)
    assert len(calls) == 1
    assert inner.get_image_features is wrapper
    assert handle.stats().fused_calls == 0
    assert handle.stats().hf_calls == {}


@pytest.mark.parametrize("broken", ["get_image_features", "contents"])
def test_a_model_that_cannot_be_noted_is_left_alone(broken, build, monkeypatch):
    model = build.model()

    def refuse(*_):
        raise RuntimeError("not this one")

    with monkeypatch.context() as patch:
        if broken == "contents":
            patch.setattr(type(model.model.multi_modal_projector), "modules", refuse)
        else:
            patch.setattr(type(model.model), "get_image_features", property(refuse))
        with pytest.raises(RuntimeError, match="not this one"):
            swap_vision_tower(model)
    assert "forward" not in model.model.vision_tower.__dict__
    swap_vision_tower(model).restore()


def test_refusals(build):
    model = build.model()
    tower = model.model.vision_tower
    with pytest.raises(ValueError, match="runs with fused kernels; leave tier = 'generic' out"):
        swap_vision_tower(model, tier="generic")
    with pytest.raises(ValueError, match="precision = 'fp4' is not known"):
        swap_vision_tower(model, precision="fp4")
    with pytest.raises(ValueError, match="rope_axes = 'wh' is for a Step3p7VisionModel"):
        swap_vision_tower(model, rope_axes="wh")
    for graphs, error in (
        ({"globl": {}}, ValueError),
        ({"num_slots": 0}, ValueError),
        (3, TypeError),
    ):
        with pytest.raises(error, match=r"num_slots|globl|int"):
            swap_vision_tower(model, graphs=graphs)
    assert "forward" not in tower.__dict__
    assert "get_image_features" not in model.model.__dict__
    handle = swap_vision_tower(model, graphs={"tiles": {"num_slots": 2}})
    for again in (model, model.model, tower):
        with pytest.raises(ValueError, match="already swapped"):
            swap_vision_tower(again)
    handle.restore()
    masked = build.model(use_mask_token=True)
    with pytest.raises(ValueError, match="use_mask_token = True is not supported"):
        swap_vision_tower(masked)
    tower.encoder.layer[0].mlp.fc1 = type("Adapter", (torch.nn.Linear,), {})(64, 96)
    with pytest.raises(ValueError, match="merge adapters"):
        swap_vision_tower(model)
