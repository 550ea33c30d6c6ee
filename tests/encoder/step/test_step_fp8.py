"""Step towers with linear layers in fp8: accuracy, weights, padding, and what is refused.

As in tests/encoder/test_fp8.py the bar is the cosine of every projected token against the same
tower in bf16: mean 0.999, worst 0.99; on calm towers, Step-3.7's also with outlier channels.
"""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vitgraph.capture.multi_path import MultiPathManager
from vitgraph.encoder import (
    Embedder,
    Fp8Plan,
    StepEncoder,
    fp8,
    load_encoder,
    swap_vision_tower,
)
from vitgraph.encoder.cli import app
from vitgraph.encoder.image_tower import live_weights, path_configs
from vitgraph.encoder.step_spec import step3_vl_spec
from vitgraph.kernels.bounded_fp8 import bound_norms
from vitgraph.kernels.quantize import quantize_ref

MEAN, WORST = 0.999, 0.99
KINDS = ("step3p7", "step3")
DEPTH = 12
FILE = Path(__file__).parents[2] / "data" / "coffee.jpg"
PLANS = [
    *(Fp8Plan(layers=(layer,)) for layer in fp8.LAYERS),
    Fp8Plan(layers=("qkv", "down")),
    Fp8Plan(layers=("down", "up")),
    Fp8Plan(skip_first=0, skip_last=0),
]
INTO_STREAM = ("self_attn.out_proj", "mlp.fc2")


@torch.no_grad()
def calm(model, outliers=False):
    """Weights that do not amplify a rounding error; see `towers_config.calm_`."""
    g = torch.Generator().manual_seed(5)
    factor = 50 + 50 * torch.rand(4, generator=g)
    channels = torch.randperm(64, generator=g)[:4]
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.weight.mul_(0.5)
        elif name.endswith("qkv_proj"):
            module.weight[: 2 * module.in_features].mul_(0.5)
        if type(model).__name__ == "Step3Tower":
            # of post-norm blocks the norms write to the stream
            if "layer_norm" in name:
                module.weight.mul_((2 * DEPTH) ** -0.5)
                module.bias.mul_((2 * DEPTH) ** -0.5)
        elif "vision_model" in name and name.endswith(INTO_STREAM):
            module.weight.mul_((2 * DEPTH) ** -0.5)
        if outliers and name.endswith((*INTO_STREAM, "pre_layernorm")) and "vision_model" in name:
            for p in module.parameters(recurse=False):
                p[channels] *= factor.view(-1, *[1] * (p.ndim - 1))
    return model


def model_of(kind, build, dtype=torch.bfloat16, outliers=False, seed=0, **sizes):
    sizes = {"num_hidden_layers": DEPTH, **sizes}
    if kind == "step3":
        model = type(build.step3())(build.step3_config | sizes, 48).eval()
        build.boost(model, seed)
    else:
        model = build.hf_model(seed, **sizes)
    model = calm(model, outliers)
    for p in model.parameters():  # the buffer of rotary frequencies stays in fp32
        p.data = p.data.to(dtype)
    return model


def encoder_of(model, build, precision="native"):
    if hasattr(model, "config"):
        return StepEncoder.from_hf(model, local_size=build.crop, precision=precision)
    spec = step3_vl_spec(build.step3_config | {"num_hidden_layers": DEPTH}, 48)
    weights = live_weights(spec, dict(model.named_parameters()))
    return StepEncoder(spec, weights, local_size=build.crop, precision=precision)


def inputs(images, build, counts=(2, 0, 3)):
    return images(len(counts), build.image), images(sum(counts), build.crop, 2), list(counts)


def cosines(got, want):
    every = torch.nn.functional.cosine_similarity(
        torch.cat(got.pooler_output).double(), torch.cat(want.pooler_output).double(), dim=-1
    )
    return every.mean().item(), every.min().item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "outliers"), [("step3p7", False), ("step3p7", True), ("step3", False)]
)
def test_every_token_points_where_it_does_in_bf16(kind, outliers, seed, build, images):
    model = model_of(kind, build, outliers=outliers, seed=seed)
    native, encoder = encoder_of(model, build), encoder_of(model, build, "fp8")
    assert (native.precision, encoder.precision) == ("native", "fp8")
    args = inputs(images, build)
    mean, worst = cosines(encoder(*args), native(*args))
    assert mean >= MEAN
    assert worst >= WORST
    assert mean < 1 - 1e-7, "nothing was computed in fp8"


@pytest.mark.parametrize("kind", KINDS)
def test_that_test_is_not_blind(kind, build, images):
    model = model_of(kind, build)
    native, encoder = encoder_of(model, build), encoder_of(model, build, "fp8")
    args = inputs(images, build)
    encoder.weights.fp8.blocks[5].up.scale.mul_(3)
    assert cosines(encoder(*args), native(*args))[0] < MEAN


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "+".join(plan.layers))
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_is_near_bf16_and_uses_its_layers(kind, plan, build, images, products):
    model = model_of(kind, build)
    native, encoder = encoder_of(model, build), encoder_of(model, build, plan)
    args = inputs(images, build, (1, 0))
    got, want = encoder(*args), native(*args)
    layers = encoder.weights.fp8._layers
    assert list(layers) == plan.names(encoder.spec)
    # the whole images and the crops
    assert sorted(products.used) == sorted(
        2 * [layer.weight.data_ptr() for layer in layers.values()]
    )
    # a tower whose first blocks are in fp8 too is not what the bar is for
    assert cosines(got, want)[0] >= (0.998 if plan.skip_first == 0 else MEAN)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_beside_the_tower(kind, build, images, fitted):
    model, other = model_of(kind, build), model_of(kind, build, seed=7)
    encoder = encoder_of(model, build, "fp8")
    for name, value in encoder_of(model, build).state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    block, quantised = encoder.weights.blocks[5], encoder.weights.fp8.blocks[5]
    up = quantised.up
    assert torch.equal(up.norms, bound_norms(up.weight, up.scale, block.up_bias))
    # with layer scale, what is quantised is the scaled weight that the block multiplies by
    want = {
        name: fp8.Fp8Layer(*quantize_ref(getattr(block, f"{name}_weight"))) for name in fp8.LAYERS
    }
    assert quantised.fits == (encoder.spec.block == "pre_norm")
    if quantised.fits:
        by_hand = fitted(
            block.norm1_weight, block.norm1_bias,
            block.qkv_weight, block.qkv_bias, block.proj_weight,
        )  # fmt: skip
        want |= {"qkv": by_hand.qkv, "proj": by_hand.proj}
        biases = quantised.qkv_bias, by_hand.qkv_bias
        assert biases == (None, None) or torch.equal(*biases)
    for name, layer in want.items():
        got = getattr(quantised, name)
        assert torch.equal(got.weight.view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(got.scale, layer.scale)
    place, norms = quantised.down.weight.data_ptr(), up.norms.data_ptr()
    source = encoder_of(other, build).state_dict()
    encoder.weights.load(source)
    for path in encoder.paths.values():
        path.size.read_positions(encoder.weights)
    assert encoder.weights.fp8.blocks[5].down.weight.data_ptr() == place
    assert encoder.weights.fp8.blocks[5].up.norms.data_ptr() == norms
    up_bias = encoder.weights.blocks[5].up_bias
    assert torch.equal(up.norms, bound_norms(up.weight, up.scale, up_bias))
    args = inputs(images, build)
    want = encoder_of(other, build, "fp8")(*args)
    assert torch.equal(torch.cat(encoder(*args).pooler_output), torch.cat(want.pooler_output))


def test_fingerprints_differ_by_plan(build):
    model = model_of("step3p7", build)
    precisions = ("native", "fp8", Fp8Plan(skip_last=0), Fp8Plan(layers=("up",)))
    prints = {encoder_of(model, build, p).paths["global"].fingerprint() for p in precisions}
    assert len(prints) == len(precisions)


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize(
    "plan",
    [*(Fp8Plan(0, 0, layers=(layer,)) for layer in fp8.LAYERS), Fp8Plan(0, 0), Fp8Plan()],
    ids=lambda plan: "+".join(plan.layers),
)
@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_padding_stays_out(kind, plan, tile, build, images, products, poison_empty):
    encoder = encoder_of(model_of(kind, build), build, plan)
    path = encoder.paths["local"]
    pixels = images(5, build.crop).to(encoder.dtype)
    clean = path.eager_forward(path.pixel_rows(pixels[:2]), [path.fixed_grid] * 2)
    pixels[2:] = torch.nan
    limits = path.rung_limits(5 * path.size.tokens, 8, 8)
    grid = torch.zeros(5, 3, dtype=torch.int32)
    grid[:2] = torch.tensor(path.fixed_grid)

    def padded():
        outputs = {
            name: torch.full(spec.shape, torch.nan, dtype=encoder.dtype)
            for name, spec in path.output_specs(limits).items()
        }
        path.graph_forward({"pixel_values": path.pixel_rows(pixels), "grid": grid}, outputs, limits)
        return {name: rows[: len(clean[name])] for name, rows in outputs.items()}

    whole = padded()
    poison_empty()
    products.tile = tile
    products.used.clear()
    for name, got in padded().items():
        assert torch.equal(got, whole[name]), name
        want = clean[name]
        assert torch.nn.functional.cosine_similarity(got.double(), want.double(), -1).min() > 0.999
    assert len(products.used) == len(plan.names(encoder.spec))


def test_captured_calls_see_new_weights(build, images, rerun_recorder):
    model, other = (model_of("step3p7", build, torch.float32, seed=seed) for seed in (0, 3))
    encoder = encoder_of(model, build, "fp8")
    config = {"global": {"token_budgets": [36]}, "local": {"token_budgets": [32]}}
    manager = MultiPathManager(
        encoder.paths, path_configs(encoder.paths, config), recorder=rerun_recorder
    )
    manager.capture()
    encoder.graphs = manager
    encoder.load_weights(other)
    args = inputs(images, build)
    want = encoder_of(other, build, "fp8")(*args)
    got = encoder(*args)
    assert encoder.stats()["total"]["hits"] == 8
    # sums of a rung may take another order, and a value near the middle of two fp8 numbers then
    # becomes the other one
    assert cosines(got, want)[1] > 0.9999


def test_saved_model_embedder_command_line_and_swap(build, images, tmp_path, column_first):
    model = build.hf_model()
    folder, output = tmp_path / "model", tmp_path / "out.npy"
    model.save_pretrained(folder)
    size = {"height": build.image, "width": build.image}
    config = {"size": size, "patch_size": build.crop, "max_image_size": 300}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = load_encoder(folder, precision="fp8", device="cpu")
    args = inputs(images, build)
    want = encoder(*args)
    assert encoder.precision == "fp8"
    native = load_encoder(folder, device="cpu")(*args)
    assert not torch.equal(want.last_hidden_state, native.last_hidden_state)
    tower = model.model.vision_model
    with torch.no_grad(), swap_vision_tower(model, precision="fp8", graphs=False) as swapped:
        got = tower(args[0]).last_hidden_state
        assert torch.equal(got, want.last_hidden_state)
        model.to(torch.bfloat16)
        tower(args[0].bfloat16())
        assert swapped.encoder.precision == "fp8"
    embedder = Embedder.from_pretrained(folder, precision="fp8", device="cpu")
    a, b = embedder.encode(FILE), Embedder.from_pretrained(folder, device="cpu").encode(FILE)
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
        (Fp8Plan(mergers=True), r"step3p7 has no merger; use Fp8Plan\(mergers=False\)"),
        (Fp8Plan(skip_first=6, skip_last=6), "no layer of a tower with 12 blocks is left"),
    ],
)
def test_bad_precision(precision, message, build):
    model = model_of("step3p7", build)
    with pytest.raises(ValueError, match=message):
        encoder_of(model, build, precision)


def test_widths_that_fp8_cannot_take_are_refused(build):
    model = model_of("step3p7", build, mlp_ratio=104 / 64)  # 8 * 13
    with pytest.raises(ValueError, match=r"blocks.3.up is \[104, 64\].*multiples of 16.*'up'"):
        encoder_of(model, build, "fp8")


def test_precision_is_refused_before_a_checkpoint_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "step3p7"}')
    with pytest.raises(ValueError, match="precision = 'fp4'"):
        StepEncoder.from_pretrained(tmp_path, precision="fp4", device="cpu")


@pytest.mark.gpu
def test_cosines_and_replays_on_a_gpu(build, images, column_first):
    model = model_of("step3p7", build, hidden_size=768, num_attention_heads=8).cuda()
    native, encoder = encoder_of(model, build), encoder_of(model, build, "fp8")
    args = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs(images, build))
    want, eager = native(*args), encoder(*args)
    encoder.capture({"global": {"token_budgets": [36]}, "local": {"token_budgets": [32]}})
    try:
        replayed = encoder(*args)
        assert encoder.stats()["total"]["hits"] == 8
        for got in (eager, replayed):
            mean, worst = cosines(got, want)
            assert mean >= MEAN
            assert worst >= WORST
    finally:
        encoder.release_graphs()
