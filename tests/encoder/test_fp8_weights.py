"""Quantised weights of towers, by hand, and what new values make of them.

An `up` without a gate whose `down` is in fp8 too has norms, of the bounds of what it writes
(bounded_fp8.py), which change with each of its weight and its bias. Where `qkv` and `proj` both are
in fp8, the scales of v have factors, which change with its weight and bias and those of the norm in
front, and the columns of `proj` their inverses. Nothing else depends on another layer's values.
"""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder import VisionEncoder, fp8
from vitgraph.encoder.fp8 import Fp8Plan
from vitgraph.kernels.quantize import quantize_ref

TINY = ("tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl")
GRIDS = [(1, 8, 8), (2, 4, 4)]
MERGED = Fp8Plan(mergers=True)


def build(name, seed=0, dtype=torch.bfloat16):
    config = towers.tower_config(name)
    hf = towers.empty_tower(config, device="cpu", dtype=torch.float32)
    return towers.calm_(towers.boost_(hf, seed)).to(dtype)


def pixels(encoder):
    rows = sum(t * h * w for t, h, w in GRIDS)
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, encoder.spec.patch_values, generator=g).to(encoder.dtype)


def same(layer, other):
    """Whether weights and scales are, bit for bit."""
    pairs = ((layer.weight, other.weight), (layer.scale, other.scale))
    return all(torch.equal(a.float(), b.float()) for a, b in pairs)


def norms_by_hand(layer, bias):
    """From the definition, channel by channel in Python."""
    norms, biases = [], []
    for n, channel in enumerate(layer.weight.double() * layer.scale.double()[:, None]):
        norms.append(sum(v * v for v in channel.tolist()) ** 0.5)
        biases.append(1e-30 if bias is None else max(1e-30, abs(bias[n].item())))
    return torch.tensor([max(norms), max(biases)], dtype=torch.float64) / 448


def pairs_of(encoder):
    """(writer, its bias, reader, the reader's weight) of all bounded pairs."""
    quantised, tensors = encoder.weights.fp8._layers, encoder.weights.tensors
    for name, layer in quantised.items():
        owner, _, kind = name.rpartition(".")
        reader = {"up": f"{owner}.down", "fc1": f"{owner}.fc2"}.get(kind)
        if reader in quantised and not (kind == "up" and encoder.spec.mlp == "gated"):
            bias = tensors.get(f"{name}.bias")
            yield layer, bias, quantised[reader], tensors[f"{reader}.weight"]


def check_fitted(encoder, fitted):
    """Every block with both layers; returns how many there are."""
    count = 0
    for block, got in zip(encoder.weights.blocks, encoder.weights.fp8.blocks, strict=True):
        assert got.fits == (got.qkv is not None and got.proj is not None)
        if got.fits:
            want = fitted(*block.norm1[:2], block.qkv_weight, block.qkv_bias, block.proj_weight)
            assert same(got.qkv, want.qkv)
            assert same(got.proj, want.proj)
            assert torch.equal(got.qkv_bias, want.qkv_bias)
            count += 1
        else:
            assert got.qkv_bias is None
    return count


def check_pairs(encoder):
    """Norms, and what reads the rows between as it is quantised alone."""
    pairs = list(pairs_of(encoder))
    for up, bias, down, weight in pairs:
        assert up.norms is not None
        assert up.norms.dtype == torch.float32
        want = norms_by_hand(up, bias)
        torch.testing.assert_close(up.norms.double(), want, rtol=1e-5, atol=0)
        assert down.norms is None
        assert same(down, fp8.Fp8Layer(*quantize_ref(weight)))
    return len(pairs)


@pytest.mark.parametrize("plan", [Fp8Plan(), MERGED], ids=["blocks", "mergers"])
@pytest.mark.parametrize("name", TINY)
def test_norms_and_factors_by_hand(name, plan, fitted):
    encoder = VisionEncoder.from_hf(build(name), precision=plan)
    mergers = 1 + len(encoder.spec.deepstack_layers) if plan.mergers else 0
    blocks = sum(bool(plan.of_block(i, encoder.spec.depth)) for i in range(encoder.spec.depth))
    is_gated = encoder.spec.mlp == "gated"
    assert check_pairs(encoder) == (0 if is_gated else blocks) + mergers
    assert encoder.weights.fp8.blocks[0] == fp8.Fp8Block()
    assert check_fitted(encoder, fitted) == blocks
    for layer in ("qkv", "proj", "up", "down"):
        weight = getattr(encoder.weights.blocks[1], f"{layer}_weight")
        quantised = getattr(encoder.weights.fp8.blocks[1], layer)
        if layer in ("up", "down"):
            assert same(quantised, fp8.Fp8Layer(*quantize_ref(weight)))
        assert (quantised.norms is not None) == (layer == "up" and not is_gated)


@pytest.mark.parametrize("layer", ["up", "down", "qkv", "proj"])
def test_one_of_the_two_alone_has_no_norms_and_no_factors(layer, fitted):
    encoder = VisionEncoder.from_hf(build("tiny-qwen2-vl"), precision=Fp8Plan(layers=(layer,)))
    weight = encoder.weights.tensors[f"blocks.1.{layer}.weight"]
    quantised = getattr(encoder.weights.fp8.blocks[1], layer)
    assert same(quantised, fp8.Fp8Layer(*quantize_ref(weight)))
    assert quantised.norms is None
    assert check_fitted(encoder, fitted) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_channel_of_v_that_is_always_zero(dtype):
    """Its factor is the largest there is, more than fp16 holds."""
    hf = build("tiny-qwen2-vl", dtype=dtype)
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision="fp8")
    for tower in (native, encoder):
        for key, tensor in tower.weights.tensors.items():
            if ".qkv." in key:
                tensor[-3] = 0
        tower.weights.load(tower.state_dict())
    assert encoder.weights.fp8.blocks[1].qkv_bias.isfinite().all()
    got, want = (t.eager_forward(pixels(t), GRIDS)["pooler_output"] for t in (encoder, native))
    cosine = torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1)
    assert cosine.mean() >= 0.999


def test_proj_before_qkv(fitted):
    """The order of the plan's layers is not that in which they are made."""
    encoder = VisionEncoder.from_hf(
        build("tiny-qwen2-vl"), precision=Fp8Plan(layers=("proj", "qkv"))
    )
    assert check_fitted(encoder, fitted) == 1


@pytest.mark.parametrize("name", TINY)
def test_state_dict_is_hugging_faces_bit_for_bit(name):
    hf = build(name)
    state = VisionEncoder.from_hf(hf, precision="fp8").state_dict()
    assert state.keys() == hf.state_dict().keys()
    for key, value in hf.state_dict().items():
        assert torch.equal(state[key], value), key


def places(encoder):
    return {
        name: [t.data_ptr() for t in (v.weight, v.scale, v.norms) if t is not None]
        for name, v in encoder.weights.fp8._layers.items()
    }


@pytest.mark.parametrize("plan", [Fp8Plan(), MERGED], ids=["blocks", "mergers"])
@pytest.mark.parametrize("name", TINY)
def test_reloaded_weights_are_quantised_into_the_same_memory(name, plan, fitted):
    first, second = build(name), build(name, seed=7)
    encoder = VisionEncoder.from_hf(first, precision=plan)
    layers, before = encoder.weights.fp8._layers, places(encoder)
    encoder.load_weights(second)
    assert encoder.weights.fp8._layers is layers
    assert places(encoder) == before
    check_pairs(encoder)
    assert check_fitted(encoder, fitted)
    fresh = VisionEncoder.from_hf(second, precision=plan)
    rows = pixels(encoder)
    for key, value in fresh.eager_forward(rows, GRIDS).items():
        assert torch.equal(encoder.eager_forward(rows, GRIDS)[key], value), key


CHANGES = {
    "blocks.1.up.bias": ("blocks.1.up",),
    "blocks.1.up.weight": ("blocks.1.up",),
    "blocks.1.down.weight": ("blocks.1.down",),
    "blocks.1.qkv.weight": ("blocks.1.qkv",),  # of q: the factors are those of v
    "blocks.1.proj.weight": ("blocks.1.proj",),
    "blocks.1.norm1.weight": ("blocks.1.qkv", "blocks.1.proj"),
    "merger.fc1.bias": ("merger.fc1",),
    "merger.fc1.weight": ("merger.fc1",),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("name", TINY)
def test_one_new_value_reaches_what_depends_on_it_alone(name, changed):
    encoder, old = (VisionEncoder.from_hf(build(name), precision=MERGED) for _ in range(2))
    before = places(encoder)
    # one row of a weight, or one value of a bias, far over the others
    encoder.weights.tensors[changed][3] += 40
    encoder.weights.load(encoder.state_dict())
    assert places(encoder) == before
    assert check_pairs(encoder)
    layers, others = encoder.weights.fp8._layers, old.weights.fp8._layers
    for key, layer in layers.items():
        norms = [v.norms for v in (layer, others[key]) if v.norms is not None]
        is_same = same(layer, others[key]) and (not norms or torch.equal(*norms))
        # a bias is not quantised: what depends on it are the norms, where there are some
        has_changed = key in CHANGES[changed] and bool(norms or "weight" in changed)
        assert is_same == (not has_changed), key
    hf = build(name)
    hf.load_state_dict(encoder.state_dict())
    fresh = VisionEncoder.from_hf(hf, precision=MERGED).eager_forward(pixels(encoder), GRIDS)
    got = encoder.eager_forward(pixels(encoder), GRIDS)
    assert all(torch.equal(got[key], value) for key, value in fresh.items())


@pytest.mark.parametrize("name", TINY)
def test_large_biases_do_not_saturate(name, products):
    """The largest values of v and between up and down are biases alone, far over all products.

    Those of gates are scaled by their largest value, and not by a bound.
    """
    hf = build(name, dtype=torch.float32)
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision="fp8")
    for tower in (native, encoder):
        for key, tensor in tower.weights.tensors.items():
            if key.endswith(".up.bias"):
                tensor[3] = 30.0
            if key.endswith(".qkv.bias"):
                tensor[-3] = 60.0  # of v
        tower.weights.load(tower.state_dict())
    got, want = (t.eager_forward(pixels(t), GRIDS)["pooler_output"] for t in (encoder, native))
    cosine = torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1)
    assert bool(products.hidden) == (encoder.spec.mlp != "gated")
    assert all(0 < largest < 448 for largest in products.hidden)
    assert all(200 < largest <= 448 for largest in products.attended)
    assert cosine.mean() >= 0.999
