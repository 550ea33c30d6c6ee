"""Step towers against Hugging Face's and against a plain definition, in fp32 and in bf16."""

import math

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7VisionModel
from vitgraph.bench.step_config import STEP_TOWERS
from vitgraph.bench.tune_shapes import layers
from vitgraph.capture.sample_layouts import equal_images, full_item
from vitgraph.encoder import image_forward, stream
from vitgraph.encoder.image_forward import ImageSize
from vitgraph.encoder.image_weights import weight_map
from vitgraph.encoder.tower_path import TowerPath
from vitgraph.kernels.testing import rel_rms

SIZES = [(140, 140), (84, 84), (56, 112)]
# 3 blocks of fp32 products that are summed in another order: some 1e-6; one pair of angles that is
# wrong, one position or one layer scale shows above 1e-2 (see the tests of axes below)
FP32 = 5e-6


def run(weights, images, attention=None):
    """Outputs [N, tokens, width] of our forward."""
    path = TowerPath(weights, ImageSize(weights, *images.shape[2:]), attention)
    outputs = path.eager_forward(path.pixel_rows(images), [path.fixed_grid] * len(images))
    return {name: rows.view(len(images), path.size.tokens, -1) for name, rows in outputs.items()}


def random_images(count, size, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_rows_first(size, build, row_first):
    tower = build.hf_tower()
    images = random_images(3, size)
    want = tower(images).last_hidden_state
    got = run(build.weights(tower, axes="hw"), images)["last_hidden_state"]
    assert rel_rms(got, want) < FP32
    other = run(build.weights(tower, axes="wh"), images)["last_hidden_state"]
    assert rel_rms(other, want) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_columns_first(size, build, column_first):
    tower = build.hf_tower()
    images = random_images(3, size)
    want = tower(images).last_hidden_state
    got = run(build.weights(tower, axes="wh"), images)["last_hidden_state"]
    assert rel_rms(got, want) < FP32
    other = run(build.weights(tower, axes="hw"), images)["last_hidden_state"]
    assert rel_rms(other, want) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_step3(size, build):
    tower = build.step3()
    images = random_images(3, size)
    state, projected = tower(images)
    got = run(build.weights(tower), images)
    assert rel_rms(got["last_hidden_state"], state) < FP32
    assert rel_rms(got["pooler_output"], projected) < FP32


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_fp64_is_exact(kind, build, row_first):
    tower = (build.hf_tower() if kind == "step3p7" else build.step3()).double()
    images = random_images(2, (84, 84)).double()
    want = tower(images)[0]
    got = run(build.weights(tower, torch.float64), images)["last_hidden_state"]
    # the angles are fp32 in both, Hugging Face's rotation too
    assert rel_rms(got, want) < (1e-6 if kind == "step3p7" else 1e-13)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_bf16_is_as_accurate_as_eager(kind, build, row_first):
    """The bound for whole towers: at most 1.3 times the error of eager PyTorch in bf16."""
    tower = build.hf_tower() if kind == "step3p7" else build.step3()
    tower = tower.bfloat16()  # the same rounded weights in all three
    images = random_images(2, (140, 140)).bfloat16()
    eager = tower(images)[0]
    got = run(build.weights(tower, torch.bfloat16), images)["last_hidden_state"]
    oracle = tower.float()(images.float())[0]
    assert rel_rms(got, oracle) <= 1.3 * rel_rms(eager, oracle)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_padding_does_not_reach_live_images(kind, build, poison_empty, monkeypatch):
    tower = build.hf_tower() if kind == "step3p7" else build.step3()
    weights = build.weights(tower)
    images = random_images(5, (84, 84))
    path = TowerPath(weights, ImageSize(weights, 84, 84), None)
    clean = path.eager_forward(path.pixel_rows(images[:2]), [path.fixed_grid] * 2)
    limits = path.rung_limits(5 * path.size.tokens, 8, 8)
    images[2:] = float("nan")
    grid = torch.zeros(5, 3, dtype=torch.int32)
    grid[:2] = torch.tensor(path.fixed_grid)
    outputs = {
        name: torch.full(spec.shape, float("nan"))
        for name, spec in path.output_specs(limits).items()
    }
    attention = image_forward.varlen_attention

    def finite_attention(q, k, v, *arguments, **options):
        # some backends multiply rows past the last segment by 0
        assert all(bool(x.isfinite().all()) for x in (q, k, v))
        attention(q, k, v, *arguments, **options)

    product = image_forward.linear

    def finite_linear(x, *arguments, **options):
        # so that the stream stays finite, whatever computes the rows past the live ones
        assert bool(x.isfinite().all())
        return product(x, *arguments, **options)

    monkeypatch.setattr(image_forward, "varlen_attention", finite_attention)
    for module in (image_forward, stream):
        monkeypatch.setattr(module, "linear", finite_linear)
    poison_empty()
    path.graph_forward({"pixel_values": path.pixel_rows(images), "grid": grid}, outputs, limits)
    for name, rows in outputs.items():
        live = rows[: 2 * path.size.tokens]
        # one product for 2 and for 5 images may sum in another order
        assert rel_rms(live, clean[name]) < 1e-6


@torch.no_grad()
def test_padding_is_not_attended(build, monkeypatch):
    """Offsets end at the live images, so that attention does no work for the others."""
    weights = build.weights(build.step3())
    path = TowerPath(weights, ImageSize(weights, 84, 84), None)
    limits = path.rung_limits(4 * path.size.tokens, 4, 4)
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in path.input_specs(limits).items()
    }
    inputs["grid"][:3] = torch.tensor(path.fixed_grid)
    outputs = {name: torch.zeros(spec.shape) for name, spec in path.output_specs(limits).items()}
    seen = []
    attention = image_forward.varlen_attention

    def listen(q, k, v, cu_seqlens, **options):
        seen.append((cu_seqlens.tolist(), cu_seqlens.dtype, options["max_seqlen"]))
        attention(q, k, v, cu_seqlens, **options)

    monkeypatch.setattr(image_forward, "varlen_attention", listen)
    path.graph_forward(inputs, outputs, limits)
    assert seen == [([0, 40, 80, 120, 120], torch.int32, 40)] * 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_images_do_not_see_each_other(kind, build):
    tower = build.hf_tower() if kind == "step3p7" else build.step3()
    weights = build.weights(tower)
    images = random_images(3, (84, 84))
    together = run(weights, images)["last_hidden_state"]
    for i in range(3):
        alone = run(weights, images[i : i + 1])["last_hidden_state"]
        assert rel_rms(together[i : i + 1], alone) < 1e-6
    images[1] *= -1
    changed = run(weights, images)["last_hidden_state"]
    assert torch.equal(changed[0], together[0])
    assert torch.equal(changed[2], together[2])
    assert rel_rms(changed[1], together[1]) > 1e-2


@torch.no_grad()
def test_no_live_image(build):
    weights = build.weights(build.step3())
    path = TowerPath(weights, ImageSize(weights, 84, 84), None)
    limits = path.rung_limits(path.size.tokens, 1, 1)
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in path.input_specs(limits).items()
    }
    outputs = {name: torch.zeros(spec.shape) for name, spec in path.output_specs(limits).items()}
    path.graph_forward(inputs, outputs, limits)
    empty = path.eager_forward(torch.zeros(0, 588), [])
    assert {name: rows.shape for name, rows in empty.items()} == {
        "last_hidden_state": (0, 160), "pooler_output": (0, 48),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_weights_return_as_they_came(kind, build):
    tower = (build.hf_tower() if kind == "step3p7" else build.step3()).bfloat16()
    weights = build.weights(tower, torch.bfloat16)
    state = weights.state_dict()
    prefix = "vision_model." if kind == "step3p7" else ""
    want = {f"{prefix}{name}": p for name, p in tower.named_parameters()}
    assert state.keys() == want.keys()
    for name, p in want.items():
        assert torch.equal(state[name], p), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_new_weights_reach_the_same_memory(kind, build, row_first):
    make = build.hf_tower if kind == "step3p7" else build.step3
    tower, other = make(0), make(7)
    weights = build.weights(tower)
    size = ImageSize(weights, 84, 84)
    path = TowerPath(weights, size, None)
    images = random_images(2, (84, 84))
    blocks = list(weights.blocks)
    prefix = "vision_model." if kind == "step3p7" else ""
    weights.load({f"{prefix}{name}": p for name, p in other.named_parameters()})
    size.read_positions(weights)
    rows = path.eager_forward(path.pixel_rows(images), [path.fixed_grid] * 2)["last_hidden_state"]
    assert rel_rms(rows.view(2, size.tokens, -1), other(images)[0]) < FP32
    assert all(a is b for a, b in zip(blocks, weights.blocks, strict=True))


def test_layer_scale_is_folded_and_rounded_once(build):
    tower = build.hf_tower().bfloat16()
    weights = build.weights(tower, torch.bfloat16)
    layer = tower.layers[1]
    want = (layer.lambda_2.float()[:, None] * layer.mlp.fc2.weight.float()).bfloat16()
    assert torch.equal(weights.blocks[1].down_weight, want)
    assert weights.tensors["blocks.1.down.weight"].data_ptr() == layer.mlp.fc2.weight.data_ptr()


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(140, 150, "140 x 150 pixels: both sides must be multiples of 14"), (14, 14, "large enough")],
)
def test_sizes_that_no_path_can_have(height, width, message, build):
    weights = build.weights(build.step3())
    with pytest.raises(ValueError, match=message):
        ImageSize(weights, height, width)


def test_budgets_are_whole_images(build):
    weights = build.weights(build.step3())
    path = TowerPath(weights, ImageSize(weights, 140, 140), None)
    assert path.rung_limits(27, 8, 8).max_items == 3
    assert path.rung_limits(27, 2, 8).max_items == 2
    assert path.rung_limits(27, 8, 8).max_patches == 300
    with pytest.raises(ValueError, match=r"token budget 26: .* has 9 tokens; use multiples"):
        path.rung_limits(26, 8, 8)
    with pytest.raises(ValueError, match=r"grid \(1, 6, 6\): every image of this path"):
        path.item_specs([(1, 6, 6)])
    with pytest.raises(ValueError, match="lose no tokens"):
        path.eager_forward(torch.zeros(0, 588), [], pruning=object())


def test_counts_of_an_automatic_ladder(build):
    weights = build.weights(build.step3())
    path = TowerPath(weights, ImageSize(weights, 140, 140), None)
    counts = path.image_counts(40)
    assert counts == [*range(1, 17), 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]
    assert path.image_counts()[-1] * 100 <= 65536 < (path.image_counts()[-1] + 1) * 100
    assert path.budget_range() == (9, 9 * path.image_counts()[-1])


@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_shapes_to_tune_are_those_of_the_weights(kind, build):
    encoder = build.encoder(build.hf_model() if kind == "step3p7" else build.step3())
    block, tensors = encoder.weights.blocks[0], encoder.weights.tensors
    matrices = {
        "qkv": block.qkv_weight, "proj": block.proj_weight, "up": block.up_weight,
        "down": block.down_weight, "convolution 1": tensors["down.0.weight"],
        "convolution 2": tensors["down.1.weight"], "projector": tensors["projector.weight"],
    }  # fmt: skip
    found = layers(encoder.spec)
    assert {n: (s.N, s.K) for n, s in found.items()} == {
        n: tuple(w.shape) for n, w in matrices.items()
    }


def test_published_towers():
    """169 and 81 tokens, head dims 96 and 112, and as many weights as transformers has."""
    for name, head_dim in (("step-3.7", 96), ("step3", 112)):
        spec = STEP_TOWERS[name]
        assert spec.head_dim == head_dim
        for side, tokens in ((728, 169), (504, 81)):
            h, w = spec.stages(*spec.grid(side, side))[-1]
            assert h * w == tokens
    rules = weight_map(STEP_TOWERS["step-3.7"])
    size = sum(math.prod(rule.shape) * len(rule.sources) for rule in rules)
    # the tower of Step-3.7 without its projector, as transformers builds it
    config = Step3p7VisionModel.config_class()
    with torch.device("meta"):
        tower = Step3p7VisionModel._from_config(config)
    assert size - 4096 * 6144 == sum(p.numel() for p in tower.parameters())


def test_layouts_made_up_for_a_path(build):
    """What capture and calibration run has the grid that the path takes."""
    weights = build.weights(build.step3())
    path = TowerPath(weights, ImageSize(weights, 140, 140), None)
    limits = path.rung_limits(36, 8, 8)
    assert full_item(path, limits) == path.fixed_grid == (1, 10, 10)
    assert equal_images(path, limits, 36, 3) == [path.fixed_grid] * 3
    assert equal_images(path, limits, 36, 8) == []
    assert equal_images(path, path.rung_limits(36, 2, 8), 36, 4) == [path.fixed_grid] * 2
