"""Towers with linear layers in fp8: accuracy, plans, and what is refused.

The bar is the cosine of every token against the same tower in bf16: mean 0.999, worst 0.99. Towers
are `calm_`, since on boosted ones bf16 itself misses that bar against fp32. They have outlier
channels: every source of some channels of the residual stream is 50 to 100 times as large.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vitgraph.bench.towers_config as towers
from typer.testing import CliRunner
from vitgraph.encoder import VisionEncoder, forward, fp8, swap_vision_tower
from vitgraph.encoder.cli import app
from vitgraph.encoder.embedder import Embedder
from vitgraph.encoder.fp8 import LAYERS, Fp8Plan
from vitgraph.kernels import linear_fp8 as products

TINY = ("tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl")
GRIDS = [(1, 16, 16), (2, 8, 8)]
MEAN, WORST = 0.999, 0.99


def middle(name):
    """A published tower, smaller: 12 blocks of width 384."""
    config = towers.tower_config(name)
    sizes = {"depth": 12, "hidden_size": 384, "num_heads": 6, "out_hidden_size": 512}
    if config.family == "qwen3_vl":
        sizes |= {"intermediate_size": 1536, "deepstack_visual_indexes": [3, 6, 9]}
    else:
        sizes |= {"intermediate_size": 1024, "fullatt_block_indexes": [3, 7, 11]}
    return replace(config, arguments=config.arguments | sizes)


CONFIGS = {name: towers.tower_config(name) for name in TINY} | {
    "middle-qwen3-vl": middle("qwen3-vl-8b"),
    "middle-qwen2.5-vl": middle("qwen2.5-vl-7b"),
}


@torch.no_grad()
def add_outliers_(tower, seed=0):
    """Scale all that writes to one channel of 64, or to four of them, by 50 to 100."""
    g = torch.Generator().manual_seed(seed + 5)
    width = next(tower.blocks[0].parameters()).shape[0]
    channels = torch.randperm(width, generator=g)[: max(4, width // 64)]
    factor = 50 + 50 * torch.rand(len(channels), generator=g)
    writers = (*towers._INTO_STREAM, "patch_embed.proj")
    for path, module in tower.named_modules():
        if path.endswith(writers) and "merger" not in path:
            for p in module.parameters(recurse=False):
                p[channels] *= factor.view(-1, *[1] * (p.ndim - 1)).to(p)
        elif isinstance(module, torch.nn.Embedding):
            module.weight[:, channels] *= factor.to(module.weight)
    return tower


def build(name, dtype=torch.bfloat16, seed=0, outliers=True):
    config = CONFIGS[name]
    hf = towers.empty_tower(config, device="cpu", dtype=torch.float32)
    hf = towers.calm_(towers.boost_(hf, seed))
    return (add_outliers_(hf, seed) if outliers else hf).to(dtype)


def pixels(encoder, grids=GRIDS, seed=1):
    rows = sum(t * h * w for t, h, w in grids)
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, encoder.spec.patch_values, generator=g)
    return drawn.to(encoder.device, encoder.dtype)


def cosines(got, want):
    """Worst mean and worst single cosine over all features that are made of tokens."""
    every = [
        torch.nn.functional.cosine_similarity(got[k].double(), want[k].double(), dim=-1)
        for k in want
        if k != "last_hidden_state"
    ]
    return min(c.mean().item() for c in every), min(c.min().item() for c in every)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_points_where_it_does_in_bf16(name, seed):
    hf = build(name, seed=seed)
    native = VisionEncoder.from_hf(hf)
    encoder = VisionEncoder.from_hf(hf, precision="fp8")
    rows = pixels(native)
    got, want = encoder.eager_forward(rows, GRIDS), native.eager_forward(rows, GRIDS)
    assert got.keys() == want.keys()
    mean, worst = cosines(got, want)
    assert mean >= MEAN
    assert worst >= WORST
    assert mean < 1 - 1e-7, "nothing was computed in fp8"


def test_the_towers_of_that_test_are_not_blind():
    """The bar is seen to fail when the rotary embedding is lost, or one scale."""
    hf = build("middle-qwen3-vl", outliers=False)
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision="fp8")
    rows = pixels(native)
    want = native.eager_forward(rows, GRIDS)
    assert cosines(encoder.eager_forward(rows, GRIDS), want)[0] >= MEAN
    encoder.weights.inv_freq.zero_()  # what a CPU rotates by; kernels read `turns`
    assert cosines(encoder.eager_forward(rows, GRIDS), want)[0] < MEAN
    encoder = VisionEncoder.from_hf(hf, precision="fp8")
    encoder.weights.fp8.blocks[5].up.scale.mul_(2)
    assert cosines(encoder.eager_forward(rows, GRIDS), want)[0] < MEAN


@pytest.mark.parametrize(
    "plan",
    [
        Fp8Plan(layers=("qkv",)),
        Fp8Plan(layers=("proj",)),
        Fp8Plan(layers=("up",)),
        Fp8Plan(layers=("down",)),
        Fp8Plan(layers=("qkv", "down")),
        Fp8Plan(layers=("up", "down")),
        Fp8Plan(skip_first=0, skip_last=0, mergers=True),
        Fp8Plan(layers=(), mergers=True),
    ],
    ids=lambda plan: "+".join(plan.layers) + ("+mergers" if plan.mergers else ""),
)
@pytest.mark.parametrize("name", TINY)
def test_every_plan_is_near_bf16_and_uses_its_layers(name, plan, products):
    hf = build(name, outliers=False)
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision=plan)
    rows = pixels(native)
    got = encoder(rows, GRIDS, layers=range(encoder.spec.depth))
    want = native(rows, GRIDS, layers=range(encoder.spec.depth))
    layers = encoder.weights.fp8._layers
    assert list(layers) == plan.names(encoder.spec)
    assert sorted(products.used) == sorted(layer.weight.data_ptr() for layer in layers.values())
    # states between the blocks hold what the blocks before them added
    for i, state in want.hidden_states.items():
        cosine = torch.nn.functional.cosine_similarity(
            got.hidden_states[i].double(), state.double(), dim=-1
        )
        assert cosine.mean() >= MEAN, i
    cosine = torch.nn.functional.cosine_similarity(
        got.pooler_output.double(), want.pooler_output.double(), dim=-1
    )
    assert cosine.mean() >= 0.998  # the mergers' own layers, too


@pytest.mark.parametrize("name", TINY)
def test_the_order_of_the_layers_does_not_matter(name):
    hf = build(name)
    one, other = (
        VisionEncoder.from_hf(hf, precision=Fp8Plan(layers=layers))
        for layers in (("qkv", "up", "down"), ("down", "up", "qkv"))
    )
    rows = pixels(one)
    want = one.eager_forward(rows, GRIDS)
    assert all(torch.equal(v, want[k]) for k, v in other.eager_forward(rows, GRIDS).items())


@pytest.mark.parametrize("name", TINY)
def test_attention_writes_what_proj_reads(name, products, monkeypatch):
    """In fp8 without scales, by itself or, where its kernel cannot, by a cast of what it wrote."""
    encoder = VisionEncoder.from_hf(build(name), precision="fp8")
    blocks = encoder.weights.fp8.blocks
    rows = pixels(encoder)
    want = encoder.eager_forward(rows, GRIDS)
    assert len(products.attended) == sum(block.fits for block in blocks) > 0
    # averages of what is at most 448 whatever the input, of which a usual v is a 36th
    assert all(4 < largest <= 448 for largest in products.attended)
    monkeypatch.setattr(forward, "FP8_BACKENDS", ())
    got = encoder.eager_forward(rows, GRIDS)
    assert all(torch.equal(got[key], value) for key, value in want.items())
    only = Fp8Plan(layers=("proj", "up"))
    products.attended.clear()
    VisionEncoder.from_hf(build(name), precision=only).eager_forward(rows, GRIDS)
    assert not products.attended


def test_hidden_rows_as_wide_as_the_stream():
    """Both are quantised, and one product reads the ones and writes the others."""
    config = towers.tower_config("tiny-qwen3-vl")
    arguments = config.arguments | {"intermediate_size": 64}
    hf = towers.empty_tower(replace(config, arguments=arguments), device="cpu", dtype=torch.float32)
    hf = towers.calm_(towers.boost_(hf, 0))
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision="fp8")
    assert encoder.spec.mlp_size == encoder.spec.hidden_size
    rows = pixels(native)
    want = native.eager_forward(rows, GRIDS)
    assert cosines(encoder.eager_forward(rows, GRIDS), want)[0] >= MEAN


def test_default_plan():
    blocks = lambda depth: [i for i in range(depth) if Fp8Plan().of_block(i, depth)]  # noqa: E731
    assert blocks(27) == list(range(3, 26))
    assert blocks(4) == [1, 2]
    assert blocks(3) == [1]
    assert Fp8Plan().layers == LAYERS
    assert Fp8Plan(skip_first=0).of_block(0, 4) == LAYERS
    assert not Fp8Plan().mergers


def test_fingerprints_differ_by_plan():
    hf = build("tiny-qwen3-vl")
    precisions = ("native", "fp8", Fp8Plan(skip_last=0), Fp8Plan(layers=("up",)))
    encoders = [VisionEncoder.from_hf(hf, precision=p) for p in precisions]
    assert len({e.fingerprint() for e in encoders}) == len(encoders)
    assert [e.precision for e in encoders] == ["native", "fp8", "fp8", "fp8"]
    assert encoders[0].weights.fp8.plan is None


def odd_tower():
    config = towers.tower_config("tiny-qwen3-vl")
    arguments = config.arguments | {"intermediate_size": 104}  # 8 * 13
    hf = towers.empty_tower(replace(config, arguments=arguments), device="cpu", dtype=torch.float32)
    return towers.boost_(hf, 0)


def test_widths_that_fp8_cannot_take_are_refused_or_left_out():
    hf = odd_tower()
    with pytest.raises(ValueError, match=r"blocks.1.up is \[104, 64\].*multiples of 16.*'up'"):
        VisionEncoder.from_hf(hf, precision="fp8")
    encoder = VisionEncoder.from_hf(hf, precision=Fp8Plan(layers=("qkv", "proj")))
    assert encoder.weights.fp8.blocks[1].up is None


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int4", "precision = 'int4' is not known: use 'native', 'fp8', or an Fp8Plan"),
        (Fp8Plan(skip_first=2, skip_last=2), "no layer of a tower with 4 blocks is left"),
    ],
)
def test_bad_precision(precision, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_hf(build("tiny-qwen3-vl"), precision=precision)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"layers": ("up", "gate")}, r"\['gate'\]"), ({"skip_last": -1}, "must be 0 or more")],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fp8Plan(**arguments)


def test_old_gpus_and_other_dtypes_are_refused(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(products.torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8.0 has no fp8.*'native'"):
        fp8.check_place(cuda, torch.bfloat16)
    monkeypatch.setattr(products.torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"torch.float16.*dtype='bfloat16'"):
        fp8.check_place(cuda, torch.float16)
    fp8.check_place(cuda, torch.bfloat16)
    fp8.check_place(torch.device("cpu"), torch.float32)


def test_precision_is_refused_before_a_checkpoint_is_read(tmp_path):
    class Unread:
        def family_and_config(self):
            raise AssertionError("read")

    with pytest.raises(ValueError, match="precision = 'fp4'"):
        VisionEncoder.from_checkpoint(Unread(), precision="fp4")


def test_saved_model_embedder_and_swap(build_model, pixel_rows, tmp_path):
    model = build_model("qwen3_vl")
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(
        tmp_path, precision="fp8", device="cpu", local_files_only=True
    )
    rows, grid = pixel_rows("qwen3_vl", GRIDS), torch.tensor(GRIDS)
    want = encoder(rows, grid).pooler_output
    assert encoder.precision == "fp8"
    with torch.no_grad(), swap_vision_tower(model, precision="fp8", graphs=False) as swapped:
        assert torch.equal(model.model.visual(rows, grid_thw=grid).pooler_output, want)
        # values changed in place are quantised again before the next call
        model.model.visual.blocks[1].mlp.linear_fc1.weight.mul_(1.5)
        changed = model.model.visual(rows, grid_thw=grid).pooler_output
        fresh = VisionEncoder.from_hf(model.model.visual, precision="fp8")
        assert torch.equal(changed, fresh(rows, grid).pooler_output)
        assert not torch.equal(changed, want)
        # and a tower that was cast gets a new encoder of the same precision
        model.to(torch.bfloat16)
        model.model.visual(rows, grid_thw=grid)
        assert swapped.encoder.precision == "fp8"
    embedder = Embedder.from_pretrained("demo", precision="fp8", device="cpu")
    assert embedder.encoder.precision == "fp8"
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8).numpy().transpose(1, 2, 0)
    native = Embedder.from_pretrained("demo", device="cpu")
    a, b = embedder.encode(image), native.encode(image)
    assert (a != b).any()
    assert (a * b).sum() / (a @ a * (b @ b)) ** 0.5 > 0.9


@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_command_line(precision, tmp_path):
    out = tmp_path / "out.npy"
    image = Path(__file__).parents[1] / "data" / "coffee.jpg"
    result = CliRunner().invoke(
        app, ["embed", "demo", str(image), "-o", str(out), "--precision", precision, "-q",
              "--device", "cpu"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    sidecar = json.loads((tmp_path / "out.npy.json").read_text())
    assert sidecar["metadata"]["precision"] == precision
    result = CliRunner().invoke(
        app, ["embed", "demo", str(image), "-o", str(out), "--precision", "int4"]
    )
    assert result.exit_code == 2
    assert "precision = 'int4' is not known" in result.output


# On a GPU.

NAME = "qwen3-vl-8b"
LAYOUTS = {
    "one": [(1, 28, 28)],
    "ragged": [(1, 18, 24), (1, 44, 12), (2, 10, 16), (1, 2, 2)],
    "tiles": [(1, 8, 8)] * 16,
}
BUDGETS = (196, 512, 1088)


@pytest.fixture(scope="module")
def published():
    hf = towers.calm_(towers.build_tower(NAME, device="cuda", dtype=torch.bfloat16))
    native, encoder = VisionEncoder.from_hf(hf), VisionEncoder.from_hf(hf, precision="fp8")
    encoder.capture({"token_budgets": BUDGETS})
    yield native, encoder
    encoder.release_graphs()
    del native, encoder
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cosine_at_published_size(published, layout):
    native, encoder = published
    grids = LAYOUTS[layout]
    rows = pixels(native, grids)
    want = native.eager_forward(rows, grids)
    mean, worst = cosines(encoder.eager_forward(rows, grids), want)
    assert mean >= MEAN
    assert worst >= WORST
    hits = encoder.graphs.stats()["hits"]
    out = encoder(rows, grids)
    assert encoder.graphs.stats()["hits"] == hits + len(grids)
    features = {f"deepstack_{j}": f for j, f in enumerate(out.deepstack_features)}
    mean, worst = cosines(features | {"pooler_output": out.pooler_output}, want)
    assert mean >= MEAN
    assert worst >= WORST


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_equals_eager_on_the_same_buffers(published, layout):
    _, encoder = published
    grids = LAYOUTS[layout]
    tokens = sum(t * h * w for t, h, w in grids) // 4
    rung = next(r for r in encoder.graphs.rungs if r.token_budget >= tokens)
    got = encoder.graphs.run_on(rung, pixels(encoder, grids), grids)
    (graph,) = encoder.graphs.ladder.rungs[rung].graphs
    fresh = {k: torch.full_like(v, float("nan")) for k, v in graph.outputs.items()}
    with torch.no_grad():
        encoder.graph_forward(graph.inputs, fresh, rung)
    for key, value in got.items():
        assert torch.equal(fresh[key][: len(value)], value), key
        assert value.isfinite().all(), key


@pytest.mark.gpu
def test_poisoned_buffers_do_not_reach_the_next_replay(published):
    _, encoder = published
    small, large = LAYOUTS["ragged"], LAYOUTS["one"] * 4
    first = encoder(pixels(encoder, small), small).pooler_output
    encoder(pixels(encoder, large), large)
    for (graph,) in (rung.graphs for rung in encoder.graphs.ladder.rungs.values()):
        graph.inputs["pixel_values"].fill_(float("nan"))
        for buffer in graph.outputs.values():
            buffer.fill_(float("nan"))
    # NaN pixels leave NaN in every intermediate, fp8 and scales included
    bad = pixels(encoder, large)
    bad[:] = float("nan")
    encoder(bad, large, check_finite=False)
    assert torch.equal(encoder(pixels(encoder, small), small).pooler_output, first)


@pytest.mark.gpu
def test_captured_graphs_see_reloaded_weights(published):
    _, encoder = published
    grids = LAYOUTS["one"]
    rows = pixels(encoder, grids)
    before = encoder(rows, grids).pooler_output
    old = {k: v.clone() for k, v in encoder.state_dict().items()}
    other = towers.calm_(towers.build_tower(NAME, device="cuda", dtype=torch.bfloat16, seed=3))
    encoder.load_weights(other)
    after = encoder(rows, grids).pooler_output
    fresh = VisionEncoder.from_hf(other, precision="fp8").eager_forward(rows, grids)
    cosine = torch.nn.functional.cosine_similarity(
        after.double(), fresh["pooler_output"].double(), dim=-1
    )
    assert cosine.mean() >= MEAN
    encoder.weights.load(old)
    assert torch.equal(encoder(rows, grids).pooler_output, before)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch", "triton"])
def test_attention_of_others_at_published_size(attention):
    """One that cannot write fp8, and one that can."""
    hf = towers.calm_(towers.build_tower(NAME, device="cuda", dtype=torch.bfloat16))
    native = VisionEncoder.from_hf(hf)
    encoder = VisionEncoder.from_hf(hf, precision="fp8", attention=attention)
    grids = LAYOUTS["ragged"]
    rows = pixels(native, grids)
    mean, worst = cosines(encoder.eager_forward(rows, grids), native.eager_forward(rows, grids))
    assert mean >= MEAN
    assert worst >= WORST


@pytest.mark.gpu
def test_fp16_is_refused_on_a_gpu():
    hf = towers.build_tower("tiny-qwen3-vl", device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch.float16.*dtype='bfloat16'"):
        VisionEncoder.from_hf(hf, precision="fp8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "qkv"}, "must be a tuple of names"),
        ({"layers": ("qkv", "norm")}, r"layers holds \['norm'\]"),
        ({"skip_last": -1}, "must be 0 or more"),
    ],
)
def test_plans_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fp8Plan(**arguments)
