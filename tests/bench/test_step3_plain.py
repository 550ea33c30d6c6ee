"""The plain tower of Step3: against its description in fp64, its names, and its weights."""

import pytest
import torch
import torch.nn.functional as F
from vitgraph.bench.step3_plain import Step3Plain, boost_step3_, plain_tower
from vitgraph.bench.step_config import STEP_TOWERS
from vitgraph.encoder.image_weights import weight_map
from vitgraph.encoder.step_spec import step3_vl_spec
from vitgraph.kernels.testing import rel_rms

CPU = torch.device("cpu")


def spec(depth=3, projector_bias=False):
    vision = {
        "hidden_size": 64, "num_hidden_layers": depth, "num_attention_heads": 2,
        "intermediate_size": 96, "output_hidden_size": 80, "image_size": 140,
    }  # fmt: skip
    return step3_vl_spec(vision, out_size=48, projector_bias=projector_bias)


def tower(dtype=torch.float32, **options):
    return boost_step3_(plain_tower(spec(**options), CPU, dtype), 0)


def images(height, width, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, height, width, generator=generator)


def described(state, images, heads=2, side=10, eps=1e-5):
    """The tower as it is described, image by image and head by head in fp64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def conv(name, x, **how):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def layer_norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return x * scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    stem, features = "vision_model.embeddings", []
    table = w[f"{stem}.position_embedding.weight"]
    for image in images.double():
        x = conv(f"{stem}.patch_embedding", image[None], stride=14)
        grid = x.shape[2:]
        places = table[1:].T.reshape(1, -1, side, side)
        # a no-op at the table's own size
        places = F.interpolate(places, grid, mode="bicubic", align_corners=False, antialias=True)
        row = w[f"{stem}.class_embedding"] + table[:1]
        x = torch.cat([row, row, row, row, (x + places)[0].flatten(1).T])
        for i in range(sum(name.endswith("fc1.weight") for name in w)):
            layer = f"vision_model.transformer.layers.{i}"
            q, k, v = linear(f"{layer}.self_attn.qkv_proj", x).chunk(3, -1)
            split = [part.chunk(heads, -1) for part in (q, k, v)]
            attended = [
                ((a @ b.T) / a.shape[1] ** 0.5).softmax(-1) @ c
                for a, b, c in zip(*split, strict=True)
            ]
            branch = linear(f"{layer}.self_attn.out_proj", torch.cat(attended, -1))
            x = x + layer_norm(f"{layer}.layer_norm1", branch)
            up = linear(f"{layer}.mlp.fc1", x)
            branch = linear(f"{layer}.mlp.fc2", up / (1 + (-1.702 * up).exp()))
            x = x + layer_norm(f"{layer}.layer_norm2", branch)
        x = x[4:].T.reshape(1, -1, *grid)
        x = conv("vit_downsampler2", conv("vit_downsampler", x, stride=2), stride=2, padding=1)
        features.append(linear("vit_large_projector", x[0].flatten(1).T))
    return torch.stack(features)


@torch.no_grad()
@pytest.mark.parametrize("size", [(140, 140), (84, 84), (112, 168)])
@pytest.mark.parametrize("projector_bias", [False, True])
def test_it_is_the_tower_of_the_description(size, projector_bias):
    module, pixels = tower(projector_bias=projector_bias), images(*size)
    expected = described(module.state_dict(), pixels)
    # fp32 rounds each of some twenty steps by at most 6e-8 of its values
    assert rel_rms(module(pixels), expected) < 3e-6


def test_it_has_the_names_and_shapes_of_the_published_checkpoint():
    with torch.device("meta"):
        module = Step3Plain(STEP_TOWERS["step3"])
    found = {name: tensor.shape for name, tensor in module.state_dict().items()}
    rules = weight_map(STEP_TOWERS["step3"])
    assert set(found) == {source for rule in rules for source in rule.sources}
    for rule in rules:
        rule.pack(module.state_dict())  # refuses other shapes
    assert round(sum(shape.numel() for shape in found.values()) / 1e6) == 4675


@torch.no_grad()
def test_rounding_is_small_beside_mistakes_in_deep_towers():
    """By `boost_` alone bf16 changes such an output by half."""
    half = tower(torch.bfloat16, depth=48)
    exact = plain_tower(spec(depth=48), CPU, torch.float32)
    exact.load_state_dict(half.state_dict())
    pixels = images(140, 140).bfloat16()
    expected, rounded = exact(pixels.float()), half(pixels)
    assert rounded.isfinite().all()
    rounding = rel_rms(rounded.float(), expected)
    assert rounding < 0.05
    blocks = exact.vision_model.transformer.layers
    kept = [block.self_attn.forward for block in blocks]
    for block in blocks:
        block.self_attn.forward = lambda x, f=block.self_attn.forward: f(x).roll(1, 1)
    assert rel_rms(exact(pixels.float()), expected) > 10 * rounding
    for block, forward in zip(blocks, kept, strict=True):
        block.self_attn.forward = forward
    stem = exact.vision_model.embeddings
    stem.class_embedding.zero_()
    assert rel_rms(exact(pixels.float()), expected) > 1.3 * rounding
    stem.position_embedding.weight.zero_()
    assert rel_rms(exact(pixels.float()), expected) > 5 * rounding


def test_weights_are_seeded():
    first, same = tower().state_dict(), tower().state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert all(tensor.isfinite().all() for tensor in first.values())
    other = boost_step3_(plain_tower(spec(), CPU, torch.float32), 1).state_dict()
    assert not torch.equal(first["vit_downsampler.weight"], other["vit_downsampler.weight"])
