"""The residual stream that waits for partial sums, by stand-ins for the kernel that leaves them.

`partials_ref` does on a CPU what the kernel does; whoever reads the stream must not see a
difference but for rounding.
"""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import RungLimits
from vitgraph.encoder import VisionEncoder, stream
from vitgraph.encoder.fp8 import Fp8Layer, Fp8Plan
from vitgraph.encoder.stream import Stream
from vitgraph.kernels.activation import activation_ref
from vitgraph.kernels.few_rows_tuning import FewRowsConfig
from vitgraph.kernels.gemm_few_rows import partials_ref
from vitgraph.kernels.norm import norm_ref
from vitgraph.kernels.quantize import FP8, dequantize, quantize_ref

GRIDS = [(1, 4, 6), (2, 2, 4)]
LIVE = 40
LIMITS = RungLimits(token_budget=22, max_patches=88, max_items=3, max_frames=4, max_windows=4)
TILE = 12  # rows of a tile of the stand-in


class Parts:
    """Stands in for `choose_partials` and `linear_partials`; counts the calls of the latter."""

    def __init__(self, monkeypatch, splits=None):
        self.calls = 0
        self.splits = splits
        monkeypatch.setattr(stream, "choose_partials", self.choose)
        monkeypatch.setattr(stream, "linear_partials", self.compute)

    def choose(self, M, weight):
        # as many as there are steps of 64 columns, up to three
        splits = self.splits or min(3, -(-weight.shape[1] // 64))
        return FewRowsConfig(64, 64, num_stages=2, splits=splits)

    def compute(self, x, weight, *, config, live_rows, out):
        self.calls += 1
        written = min(len(x), -(-int(live_rows) // TILE) * TILE)
        out[:, :written] = partials_ref(x[:written], weight, config.splits)
        return out


def built(name, **options):
    hf = towers.empty_tower(towers.tower_config(name), device="cpu", dtype=torch.float32)
    return VisionEncoder.from_hf(towers.boost_(hf, seed=0), **options)


@pytest.fixture(params=["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen2-vl"])
def encoder(request):
    return built(request.param)


def pixels(encoder, rows=LIVE):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, encoder.spec.patch_values, generator=g)


def padded_forward(encoder, rows):
    padded = torch.full((LIMITS.max_patches, rows.shape[1]), torch.nan)
    padded[: len(rows)] = rows
    grid = torch.tensor([*GRIDS, (0, 0, 0)], dtype=torch.int32)
    outputs = {
        name: torch.full(spec.shape, torch.nan, dtype=spec.dtype)
        for name, spec in encoder.output_specs(LIMITS).items()
    }
    encoder.graph_forward({"pixel_values": padded, "grid": grid}, outputs, LIMITS)
    return outputs


@pytest.mark.parametrize("splits", [None, 1])
def test_a_tower_is_the_same(encoder, splits, monkeypatch, poison_empty):
    """Deepstack reads joined rows, windows are written in another order, states are asked for."""
    rows, layers = pixels(encoder), list(range(encoder.spec.depth))
    want = encoder(rows, GRIDS, layers=layers)
    parts = Parts(monkeypatch, splits)
    poison_empty()
    got = encoder(rows, GRIDS, layers=layers)
    assert parts.calls == 2 * encoder.spec.depth, "proj and down of every block"
    # fp32: sums of some hundred products in another order, through a few blocks
    close = {"rtol": 1e-4, "atol": 1e-4}
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **close)
    for i in layers:
        torch.testing.assert_close(got.hidden_states[i], want.hidden_states[i], **close)
    for mine, theirs in zip(
        got.deepstack_features or [], want.deepstack_features or [], strict=True
    ):
        torch.testing.assert_close(mine, theirs, **close)


def test_padding_stays_out(encoder, monkeypatch, poison_empty):
    """Sums of rows past the live ones are NaN, in a tile of live ones or not written at all."""
    want = encoder.eager_forward(pixels(encoder), GRIDS)
    Parts(monkeypatch)
    poison_empty()
    outputs = padded_forward(encoder, pixels(encoder))
    for name, value in want.items():
        torch.testing.assert_close(outputs[name][: len(value)], value, rtol=1e-4, atol=1e-4)
    assert outputs["last_hidden_state"].isfinite().all()
    assert not outputs["last_hidden_state"][LIVE:].any()


# one stream


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS, WIDTH, K = 8, 32, 192
NORM = (drawn(WIDTH, seed=1) + 1, drawn(WIDTH, seed=2), drawn(WIDTH, seed=3))


@pytest.fixture
def spec():
    return built("tiny-qwen2-vl").spec


class One:
    """A stream of eight rows, some live, and the product that it lacks."""

    def __init__(self, live=ROWS, in_fp8=False):
        self.x = drawn(ROWS, WIDTH)
        self.rows, self.weight = drawn(ROWS, K, seed=4), drawn(WIDTH, K, seed=5)
        self.product = self.rows @ self.weight.t()
        self.stream = Stream(self.x.clone(), torch.tensor([live], dtype=torch.int32), in_fp8=in_fp8)

    def add(self):
        self.stream.add_linear(self.rows, self.weight)


CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def test_what_is_settled_is_added_once(monkeypatch):
    Parts(monkeypatch)
    one = One()
    one.add()
    torch.testing.assert_close(one.stream.settled(), one.x + one.product, **CLOSE)
    torch.testing.assert_close(one.stream.settled(), one.x + one.product, **CLOSE)


def test_padding_of_what_is_settled_is_zero(monkeypatch):
    Parts(monkeypatch)
    one = One(live=5)
    one.add()
    settled = one.stream.settled()
    torch.testing.assert_close(settled[:5], (one.x + one.product)[:5], **CLOSE)
    assert not settled[5:].any()


@pytest.mark.parametrize("splits", [1, 3])
def test_two_products_without_a_norm_between(splits, monkeypatch):
    """The second is written to the buffer of the first."""
    parts = Parts(monkeypatch, splits)
    one = One()
    one.add()
    one.add()
    assert parts.calls == 2
    assert len(one.stream._buffers) == 1
    torch.testing.assert_close(one.stream.settled(), one.x + 2 * one.product, **CLOSE)


def test_products_with_parts_and_without(monkeypatch):
    parts = Parts(monkeypatch)
    one = One()
    one.add()
    monkeypatch.setattr(stream, "choose_partials", lambda M, weight: None)
    one.add()
    assert parts.calls == 1
    torch.testing.assert_close(one.stream.settled(), one.x + 2 * one.product, **CLOSE)


def test_a_norm_takes_them_and_keeps_the_sum(spec, monkeypatch):
    Parts(monkeypatch)
    one = One()
    one.add()
    summed = one.x + one.product
    weight, bias, offset = NORM
    want = norm_ref(summed, weight, bias, spec.eps, kind=spec.norm, offset=offset)
    out = torch.full_like(one.x, torch.nan)
    assert one.stream.norm(NORM, spec, out=out) is out
    torch.testing.assert_close(out, want, **CLOSE)
    torch.testing.assert_close(one.stream.norm(NORM, spec), want, **CLOSE)
    torch.testing.assert_close(one.stream.settled(), summed, **CLOSE)


def test_a_norm_of_joined_rows_in_another_order(spec, monkeypatch):
    Parts(monkeypatch)
    one = One(live=4)
    one.add()
    weight, bias, offset = (v.repeat(4) for v in NORM)
    want = norm_ref(
        (one.x + one.product).view(2, -1), weight, bias, spec.eps, kind=spec.norm, offset=offset
    )
    swapped = torch.tensor([1, 0], dtype=torch.int32)
    got = one.stream.norm((weight, bias, offset), spec, joined=4, destination=swapped)
    torch.testing.assert_close(got[1], want[0], **CLOSE)
    assert not got[0].any()
    settled = one.stream.settled()
    torch.testing.assert_close(settled[:4], (one.x + one.product)[:4], **CLOSE)
    assert torch.equal(settled[4:], one.x[4:])


def test_a_state_takes_them_and_keeps_the_sum(monkeypatch):
    Parts(monkeypatch)
    one = One(live=5)
    one.add()
    out = torch.full_like(one.x, torch.nan)
    offset = NORM[2]
    one.stream.state(offset, out)
    summed = one.x + one.product
    torch.testing.assert_close(out[:5], summed[:5] + offset, **CLOSE)
    assert not out[5:].any()
    torch.testing.assert_close(one.stream.settled()[:5], summed[:5], **CLOSE)


def test_a_norm_that_leaves_a_state(spec, monkeypatch):
    Parts(monkeypatch)
    one, other = One(live=5), One(live=5)
    one.add()
    other.add()
    states = [torch.full_like(one.x, torch.nan) for _ in range(2)]
    got = one.stream.norm(NORM, spec, state=states[0])
    other.stream.state(NORM[2], states[1])
    assert torch.equal(states[0], states[1])
    assert torch.equal(got, other.stream.norm(NORM, spec))


# beside fp8


def test_a_stream_in_fp8_has_no_parts(monkeypatch):
    parts = Parts(monkeypatch)
    one = One(in_fp8=True)
    one.add()
    assert parts.calls == 0
    layer = Fp8Layer(*quantize_ref(one.weight))
    one.stream.add_linear_fp8(one.rows, layer)
    one.add()
    assert parts.calls == 0
    error = one.stream.settled() - (one.x + 3 * one.product)
    # 3 bits of mantissa in one of three products
    assert error.abs().max() < 0.05 * one.product.abs().max()


def test_products_in_fp8_are_added_once_and_at_once():
    layer = Fp8Layer(*quantize_ref(drawn(WIDTH, K, seed=5)))
    alone, both = One(in_fp8=True), One(in_fp8=True)
    alone.stream.add_linear_fp8(alone.rows, layer)
    settled = alone.stream.settled()
    q, scale = quantize_ref(alone.rows)
    product = dequantize(q, scale) @ dequantize(layer.weight, layer.scale).T
    torch.testing.assert_close(settled, alone.x + product, **CLOSE)
    assert torch.equal(alone.stream.settled(), settled)
    for _ in range(2):
        both.stream.add_linear_fp8(both.rows, layer)
    torch.testing.assert_close(both.stream.settled(), both.x + 2 * product, **CLOSE)


def test_rows_that_are_fp8_are_read_as_they_are():
    one = One(in_fp8=True)
    layer = Fp8Layer(*quantize_ref(drawn(WIDTH, K, seed=5)))
    rows = (8 * one.rows).to(FP8)
    product = rows.float() @ dequantize(layer.weight, layer.scale).T
    for _ in range(2):
        one.stream.add_linear_fp8(rows, layer)
    torch.testing.assert_close(one.stream.settled(), one.x + 2 * product, **CLOSE)


def test_rows_past_the_live_ones_add_nothing():
    one = One(live=5, in_fp8=True)
    one.rows[5:] = torch.nan
    layer = Fp8Layer(*quantize_ref(one.weight))
    one.stream.add_linear_fp8(one.rows, layer)
    settled = one.stream.settled()
    assert torch.equal(settled[5:], one.x[5:])
    assert (settled[:5] != one.x[:5]).any(dim=1).all()


@pytest.mark.parametrize("features", [WIDTH, 48])
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_an_mlp_between_two_products_by_hand(activation, features, spec):
    """Its hidden rows are quantised by scales of the definition in bounded_fp8.py; fp64."""
    up_weight = drawn(features, WIDTH, seed=6)
    bias, down_weight = 20 * drawn(features, seed=7), drawn(WIDTH, features, seed=8)
    q_up, up_scale = quantize_ref(up_weight)
    wide = dequantize(q_up, up_scale).double()
    norms = wide.norm(dim=1).max() / 448, bias.double().abs().max() / 448
    down = Fp8Layer(*quantize_ref(down_weight))
    one = One(live=5, in_fp8=True)
    one.x[5:] = 0
    one.stream = Stream(one.x.clone(), torch.tensor([5], dtype=torch.int32), in_fp8=True)
    up = Fp8Layer(q_up, up_scale, torch.tensor(norms).float())
    one.stream.norm_mlp_fp8(NORM, up, bias, down, spec, activation)

    weight, norm_bias, offset = NORM
    normed = norm_ref(one.x[:5], weight, norm_bias, spec.eps, kind=spec.norm, offset=offset)
    rows = dequantize(*quantize_ref(normed)).double()
    # quantised rows may be longer than those of the norm, by less than this factor
    length = 1.07 * normed.double().norm(dim=1)
    assert (rows.norm(dim=1) <= length).all()
    bound = length * norms[0] + norms[1]
    y = activation_ref(rows @ wide.T + bias.double(), activation)
    scaled = y / bound[:, None]
    assert scaled.abs().max() <= 448
    # values near the middle of two fp8 numbers may become the other one: one step of 1/8
    hidden = scaled.float().to(FP8).double()
    want = one.x[:5] + bound[:, None] * (hidden @ dequantize(down.weight, down.scale).double().T)
    error = one.stream.settled()[:5] - want
    assert error.abs().max() < 0.02 * (want - one.x[:5]).abs().max()
    # and near the product without fp8 between
    plain = one.x[:5] + y @ down_weight.double().T
    error = one.stream.settled()[:5] - plain
    assert error.norm() < 0.06 * (plain - one.x[:5]).norm()
    settled = one.stream.settled()[5:]
    # the hidden rows of zeros are those of the bias
    assert settled.isfinite().all()


@pytest.mark.parametrize("plan", [Fp8Plan(), Fp8Plan(layers=("qkv",)), Fp8Plan(layers=("down",))])
def test_a_tower_in_fp8_has_no_parts(plan, monkeypatch):
    encoder = built("tiny-qwen3-vl", precision=plan)
    want = encoder.eager_forward(pixels(encoder), GRIDS)
    parts = Parts(monkeypatch)
    got = encoder.eager_forward(pixels(encoder), GRIDS)
    assert parts.calls == 0
    assert all(torch.equal(got[name], value) for name, value in want.items())
