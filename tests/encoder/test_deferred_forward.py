"""Forwards whose second norm takes no kernel: its place in a block, padding, and new weights."""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import RungLimits
from vitgraph.encoder import VisionEncoder, forward, stream, weights
from vitgraph.kernels.few_rows_tuning import FewRowsConfig
from vitgraph.kernels.testing import rel_rms

GRIDS = [(1, 4, 6), (2, 2, 4)]
LIVE = 40
LIMITS = RungLimits(token_budget=22, max_patches=88, max_items=3, max_frames=4, max_windows=4)
ROWS = 12  # of a stand-in's tile: 48 of 88 patches are written
TILES = FewRowsConfig(64, 64, num_stages=4), FewRowsConfig(64, 128, num_stages=4)
NAMES = [
    name
    for name, config in towers.TOWERS.items()
    # a gate with a limit is a kernel of its own, and so stays the norm before it
    if name.startswith("tiny") and config.family != "glm5_next"
]


def build(name, seed=0):
    hf = towers.empty_tower(towers.tower_config(name), device="cpu", dtype=torch.float64)
    return towers.boost_(hf, seed=seed)


@pytest.fixture
def deferring(monkeypatch):
    """Norms are deferred on the CPU as well; the calls of the second product."""
    calls = []
    second = forward.linear_of_scaled

    def linear_of_scaled(*arguments, **options):
        calls.append(options["config"])
        return second(*arguments, **options)

    monkeypatch.setattr(weights, "can_defer", lambda *_: True)
    monkeypatch.setattr(forward, "choose_deferred", lambda *_: TILES)
    monkeypatch.setattr(forward, "linear_of_scaled", linear_of_scaled)
    return calls


def pixels_of(encoder, rows):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, encoder.spec.patch_values, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_forward(name, deferring):
    encoder = VisionEncoder.from_hf(build(name))
    pixels = pixels_of(encoder, LIVE)
    got = encoder.eager_forward(pixels, GRIDS)
    assert len(deferring) == encoder.spec.depth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "choose_deferred", lambda *_: None)
        want = encoder.eager_forward(pixels, GRIDS)
    assert len(deferring) == encoder.spec.depth
    for key, value in want.items():
        assert rel_rms(got[key], value) <= 1e-12


def by_tiles(product):
    """Either product in whole tiles, of finite rows alone; what is scaled is zero past the live."""

    def computed(rows, *arguments, out, live_rows, **options):
        scaled = isinstance(out, torch.Tensor)
        x = rows.rows if scaled else rows
        read = min(len(x), -(-int(live_rows) // ROWS) * ROWS)
        assert x[:read].isfinite().all()
        product(rows, *arguments, out=out, live_rows=torch.tensor([read]).int(), **options)
        if not scaled:
            assert arguments[1][:read].isfinite().all(), "the stream"
            out.rows[live_rows:read] = 0
            out.moments[live_rows:read] = 0

    return computed


def of_all_rows(product):
    """A product of the library, which multiplies whatever padding holds."""

    def computed(x, *arguments, **options):
        assert x.isfinite().all()
        return product(x, *arguments, **options)

    return computed


@pytest.mark.parametrize("name", NAMES)
def test_padding_stays_finite(name, deferring, poison_empty, monkeypatch):
    monkeypatch.setattr(stream, "add_linear_scaled", by_tiles(stream.add_linear_scaled))
    monkeypatch.setattr(forward, "linear_of_scaled", by_tiles(forward.linear_of_scaled))
    monkeypatch.setattr(stream, "linear", of_all_rows(stream.linear))
    encoder = VisionEncoder.from_hf(build(name))
    pixels = torch.full((88, encoder.spec.patch_values), torch.nan, dtype=torch.float64)
    pixels[:LIVE] = pixels_of(encoder, LIVE)
    want = encoder.eager_forward(pixels[:LIVE], GRIDS)
    poison_empty()
    shapes = forward.output_shapes(encoder.spec, LIMITS.max_patches)
    outputs = {
        name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in shapes.items()
    }
    grid = torch.tensor([*GRIDS, (0, 0, 0)], dtype=torch.int32)
    encoder.graph_forward({"pixel_values": pixels, "grid": grid}, outputs, LIMITS)
    for key, value in want.items():
        assert rel_rms(outputs[key][: len(value)], value) <= 1e-12


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-qwen2.5-vl"])
def test_new_weights_are_followed_in_place(name, deferring):
    hf, other = build(name), build(name, seed=1)
    encoder = VisionEncoder.from_hf(hf)
    held = [block.deferred for block in encoder.weights.blocks]
    pointers = [norm.bias.data_ptr() for norm in held]
    encoder.load_weights(other)
    assert [norm.bias.data_ptr() for norm in held] == pointers
    pixels = pixels_of(encoder, LIVE)
    want = VisionEncoder.from_hf(other).eager_forward(pixels, GRIDS)
    for key, value in encoder.eager_forward(pixels, GRIDS).items():
        assert torch.equal(value, want[key])


def test_a_stream_that_was_just_written_is_refused(deferring):
    """It would be read while it is written."""
    encoder = VisionEncoder.from_hf(build("tiny-qwen3-vl"))
    block, D = encoder.weights.blocks[0], encoder.spec.hidden_size
    x = torch.zeros(4, D, dtype=torch.float64)
    live, scaled = torch.tensor([4], dtype=torch.int32), forward.ScaledRows.over(x.clone())
    target = stream.Stream(x, live, in_fp8=False)

    def add():
        target.add_linear_scaled(x, block.proj_weight, block.deferred, None, TILES[0], scaled)

    with pytest.raises(RuntimeError, match="let a norm read it first"):
        add()
    target.norm(block.norm1, encoder.spec)
    add()
    with pytest.raises(RuntimeError, match="let a norm read it first"):
        add()
    target.norm(block.norm1, encoder.spec)
    target.add_linear(x, block.proj_weight)
    with pytest.raises(RuntimeError, match="let a norm read it first"):
        add()


def test_a_tower_on_a_cpu_defers_nothing():
    encoder = VisionEncoder.from_hf(build("tiny-qwen3-vl"))
    assert all(block.deferred is None for block in encoder.weights.blocks)
