"""SigLIP 2 with linear layers in fp8: accuracy, weights, padding, and what is refused.

As in tests/encoder/test_fp8.py the bar is the cosine against the same tower in bf16, of every patch
and of every pooled image: mean 0.999, worst 0.99; on calm towers, also with outlier channels.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from typer.testing import CliRunner
from vitgraph.capture import EncoderCudaGraphManager, RungLimits
from vitgraph.encoder import (
    Embedder,
    Fp8Plan,
    Siglip2Encoder,
    fp8,
    load_encoder,
    swap_vision_tower,
)
from vitgraph.encoder.cli import app
from vitgraph.kernels.bounded_fp8 import bound_norms
from vitgraph.kernels.quantize import quantize_ref
from vitgraph.kernels.testing import rel_rms

MEAN, WORST = 0.999, 0.99
SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": 12,
}  # fmt: skip
MIDDLE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SHAPES = [[3, 5], [12, 10], [8, 8], [2, 9]]
FILE = Path(__file__).parents[2] / "data" / "coffee.jpg"
INTO_STREAM = ("self_attn.out_proj", "mlp.fc2")


@torch.no_grad()
def calm(tower, outliers=False):
    """Weights that do not amplify a rounding error; see `towers_config.calm_`."""
    layers = tower.encoder.layers
    g = torch.Generator().manual_seed(5)
    channels = torch.randperm(tower.config.hidden_size, generator=g)[:4]
    factor = 50 + 50 * torch.rand(4, generator=g)
    for name, module in tower.named_modules():
        if name.startswith("encoder") and name.endswith(INTO_STREAM):
            module.weight.mul_((2 * len(layers)) ** -0.5)
        elif name.endswith(("q_proj", "k_proj")):
            module.weight.mul_(0.5)
        elif name == "head.attention":
            module.in_proj_weight[: 2 * module.embed_dim].mul_(0.5)
        if outliers and name.endswith((*INTO_STREAM, "patch_embedding")) and "head" not in name:
            module.weight[channels] *= factor[:, None]
            module.bias[channels] *= factor
        elif outliers and name.endswith("position_embedding"):
            module.weight[:, channels] *= factor
    return tower


def tower_of(build, dtype=torch.bfloat16, outliers=False, seed=0, **sizes):
    tower = build.tower(seed, **SIZES | sizes)
    return calm(tower, outliers).to(dtype)


def both(tower, precision="fp8"):
    return Siglip2Encoder.from_hf(tower), Siglip2Encoder.from_hf(tower, precision=precision)


def cosines(got, want):
    """Mean and worst cosine of patches and of pooled images."""
    pairs = [(got.last_hidden_state, want.last_hidden_state)]
    if want.pooler_output is not None:
        pairs.append((got.pooler_output, want.pooler_output))
    every = [
        torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs
    ]
    return min(c.mean().item() for c in every), min(c.min().item() for c in every)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("outliers", [False, True])
def test_every_row_points_where_it_does_in_bf16(outliers, seed, build, batch):
    native, encoder = both(tower_of(build, outliers=outliers, seed=seed, **MIDDLE))
    assert (native.precision, encoder.precision) == ("native", "fp8")
    args = batch(SHAPES)
    mean, worst = cosines(encoder(**args), native(**args))
    assert mean >= MEAN
    assert worst >= WORST
    assert mean < 1 - 1e-7, "nothing was computed in fp8"


def test_that_test_is_not_blind(build, batch):
    native, encoder = both(tower_of(build))
    args = batch(SHAPES)
    encoder.weights.fp8.blocks[5].up.scale.mul_(2)
    assert cosines(encoder(**args), native(**args))[0] < MEAN


@pytest.mark.parametrize(
    "plan",
    [
        *(Fp8Plan(layers=(layer,)) for layer in fp8.LAYERS),
        Fp8Plan(layers=("qkv", "down")),
        Fp8Plan(layers=("down", "up")),
        Fp8Plan(skip_first=0, skip_last=0),
    ],
    ids=lambda plan: "+".join(plan.layers),
)
def test_every_plan_is_near_bf16_and_uses_its_layers(plan, build, batch, products):
    native, encoder = both(tower_of(build), plan)
    args = batch(SHAPES)
    layers = range(encoder.spec.depth)
    got, want = encoder(**args, layers=layers), native(**args, layers=layers)
    quantised = encoder.weights.fp8._layers
    assert list(quantised) == plan.names(encoder.spec)
    assert sorted(products.used) == sorted(layer.weight.data_ptr() for layer in quantised.values())
    assert cosines(got, want)[0] >= MEAN
    for i, state in want.hidden_states.items():
        cosine = torch.nn.functional.cosine_similarity(
            got.hidden_states[i].double(), state.double(), dim=-1
        )
        assert cosine.mean() >= MEAN, i


def test_weights_are_quantised_beside_the_tower(build, batch, fitted):
    tower, other = tower_of(build), tower_of(build, seed=7)
    encoder = Siglip2Encoder.from_hf(tower, precision="fp8")
    for name, value in tower.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    quantised, block = encoder.weights.fp8.blocks[5], encoder.weights.blocks[5]
    layer = quantised.qkv
    want = fitted(*block.norm1[:2], block.qkv_weight, block.qkv_bias, block.proj_weight)
    for got, by_hand in ((layer, want.qkv), (quantised.proj, want.proj)):
        assert torch.equal(got.weight.view(torch.uint8), by_hand.weight.view(torch.uint8))
        assert torch.equal(got.scale, by_hand.scale)
    assert torch.equal(quantised.qkv_bias, want.qkv_bias)
    up, down = quantised.up, quantised.down
    place, norms = layer.weight.data_ptr(), up.norms.data_ptr()
    encoder.load_weights(other)
    assert quantised.up.norms.data_ptr() == norms
    block = encoder.weights.blocks[5]
    assert torch.equal(up.norms, bound_norms(up.weight, up.scale, block.up_bias))
    q, scale = quantize_ref(block.down_weight)
    assert torch.equal(down.weight.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(down.scale, scale)
    assert encoder.weights.fp8.blocks[5].qkv.weight.data_ptr() == place
    args = batch(SHAPES)
    want = Siglip2Encoder.from_hf(other, precision="fp8")(**args)
    assert torch.equal(encoder(**args).pooler_output, want.pooler_output)


def test_fingerprints_differ_by_plan(build):
    tower = tower_of(build)
    precisions = ("native", "fp8", Fp8Plan(skip_last=0), Fp8Plan(layers=("up",)))
    prints = {Siglip2Encoder.from_hf(tower, precision=p).fingerprint() for p in precisions}
    assert len(prints) == len(precisions)


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize(
    "plan", [Fp8Plan(0, 0), Fp8Plan(layers=("down",)), Fp8Plan(layers=("up",)), Fp8Plan()]
)
def test_poisoned_padding_stays_out(plan, tile, build, products, poison_empty):
    encoder = Siglip2Encoder.from_hf(tower_of(build), precision=plan)
    grids, live = [(1, 3, 5), (1, 4, 6)], 39
    g = torch.Generator().manual_seed(1)
    rows = torch.full((64, 48), torch.nan, dtype=encoder.dtype)
    rows[:live] = torch.randn(live, 48, generator=g).to(encoder.dtype)
    want = encoder.eager_forward(rows[:live], grids)
    limits = RungLimits(64, 64, 4, 4, 0)
    grid = torch.tensor([*grids, (0, 0, 0), (0, 0, 0)], dtype=torch.int32)

    def padded():
        outputs = {
            name: torch.zeros(spec.shape, dtype=encoder.dtype)
            for name, spec in encoder.output_specs(limits).items()
        }
        encoder.graph_forward({"pixel_values": rows, "grid": grid}, outputs, limits)
        return outputs

    whole = padded()
    poison_empty()
    products.tile = tile
    outputs = padded()
    for name, value in want.items():
        got = outputs[name][: len(value)]
        assert torch.equal(got, whole[name][: len(value)]), name
        torch.testing.assert_close(got, value, rtol=0.02, atol=0.02)
        assert outputs[name].isfinite().all(), name


def test_captured_calls_see_new_weights(build, batch, rerun_recorder):
    tower, other = tower_of(build, torch.float32), tower_of(build, torch.float32, seed=3)
    encoder = Siglip2Encoder.from_hf(tower, precision="fp8")
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": [300]}, recorder=rerun_recorder)
    manager.capture()
    encoder.graphs = manager
    encoder.load_weights(other)
    args = batch(SHAPES)
    want = Siglip2Encoder.from_hf(other, precision="fp8")(**args)
    assert manager.stats()["hits"] == 0
    got = encoder(**args)
    assert manager.stats()["hits"] == len(SHAPES)
    # sums of a rung of 300 rows may take another order, and a value near the middle of two fp8
    # numbers then becomes the other one
    assert cosines(got, want)[1] > 0.9999


def test_saved_model_embedder_command_line_and_swap(build, batch, tmp_path):
    model = build.model()
    folder, output = tmp_path / "model", tmp_path / "out.npy"
    model.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=61).save_pretrained(folder)
    encoder = load_encoder(folder, precision="fp8", device="cpu")
    args = batch(SHAPES)
    want = encoder(**args).pooler_output
    native = Siglip2Encoder.from_hf(model)(**args).pooler_output
    assert encoder.precision == "fp8"
    assert not torch.equal(want, native)
    with torch.no_grad(), swap_vision_tower(model, precision="fp8", graphs=False) as swapped:
        # not bit for bit: sums on a CPU depend on where their operands lie
        got = model.vision_model(**args).pooler_output
        assert rel_rms(got, want) < 0.1 * rel_rms(native, want)
        model.to(torch.bfloat16)
        half = {**args, "pixel_values": args["pixel_values"].bfloat16()}
        model.vision_model(**half)
        assert swapped.encoder.precision == "fp8"
    embedder = Embedder.from_pretrained(folder, precision="fp8", device="cpu")
    plain = Embedder.from_pretrained(folder, device="cpu")
    a, b = embedder.encode(FILE), plain.encode(FILE)
    assert (a != b).any()
    arguments = ["embed", folder, FILE, "-o", output, "--precision", "fp8", "--device", "cpu", "-q"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    sidecar = json.loads((tmp_path / "out.npy.json").read_text())
    assert sidecar["metadata"]["precision"] == "fp8"


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int4", "precision = 'int4' is not known"),
        (Fp8Plan(mergers=True), r"siglip2 has no merger; use Fp8Plan\(mergers=False\)"),
        (Fp8Plan(skip_first=6, skip_last=6), "no layer of a tower with 12 blocks is left"),
    ],
)
def test_bad_precision(precision, message, build):
    with pytest.raises(ValueError, match=message):
        Siglip2Encoder.from_hf(tower_of(build), precision=precision)


def test_widths_that_fp8_cannot_take_are_refused(build):
    tower = tower_of(build, intermediate_size=104)  # 8 * 13
    with pytest.raises(ValueError, match=r"blocks.3.up is \[104, 128\].*multiples of 16.*'up'"):
        Siglip2Encoder.from_hf(tower, precision="fp8")


def test_precision_is_refused_before_a_checkpoint_is_read(build, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match="precision = 'fp4'"):
        Siglip2Encoder.from_pretrained(tmp_path, precision="fp4", device="cpu")


@pytest.mark.gpu
def test_cosines_and_replays_at_published_width(build, batch):
    sizes = {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304}
    tower = calm(build.tower(**sizes, num_hidden_layers=12, num_patches=256, patch_size=16))
    native, encoder = both(tower.cuda().bfloat16())
    shapes = [[16, 16], [12, 21], [8, 32], [19, 13], [4, 64]]
    args = {name: value.cuda() for name, value in batch(shapes, values=768).items()}
    want = native(**args)
    encoder.capture({"token_budgets": [256, 2048]})
    try:
        replayed = encoder(**args)
        assert encoder.stats()["hits"] == len(shapes)
        encoder.release_graphs()
        for got in (replayed, encoder(**args)):
            mean, worst = cosines(got, want)
            assert mean >= MEAN
            assert worst >= WORST
    finally:
        encoder.release_graphs()
