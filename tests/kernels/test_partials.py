"""Partial sums of a product, added by the kernel that reads the stream next."""

import pytest
import torch
from vitgraph.kernels import norm as norm_module
from vitgraph.kernels.norm import NormConfig, norm, norm_ref
from vitgraph.kernels.partials import add_partials_ref
from vitgraph.kernels.residual import residual, residual_ref
from vitgraph.kernels.testing import assert_as_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def drawn(T, D, splits, dtype, device, poison_from=None):
    """A stream and its partial sums, which are NaN from a row on."""
    g = torch.Generator().manual_seed(T * D + splits)
    x = (torch.randn(T, D, generator=g) + 3).to(device, dtype)
    partials = torch.randn(splits, T, D, generator=g).to(device)
    if poison_from is not None:
        partials[:, poison_from:] = float("nan")
    return x, partials


def vectors(D, device, dtype):
    g = torch.Generator().manual_seed(D)
    weight, bias, offset = (torch.randn(D, generator=g).to(device) for _ in range(3))
    return (weight + 1).to(dtype), bias.to(dtype), offset


def rows(count, device):
    return torch.tensor([count], dtype=torch.int32, device=device)


def same(a, b):
    """Bit for bit, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_definition_rounds_once_and_in_order():
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    # each part alone is less than half of a unit in the last place of 1, 1 / 128
    partials = torch.full((3, 1, 1), 1 / 512)
    assert add_partials_ref(x, partials).item() == 1 + 1 / 128
    # in fp32 the small one is lost if it comes first, and not if it comes last
    order = torch.tensor([1.0, 2.0**25, -(2.0**25)]).view(3, 1, 1)
    zero = torch.zeros(1, 1)
    assert add_partials_ref(zero, order).item() == 0.0
    assert add_partials_ref(zero, order.flip(0)).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("T", "D", "splits"), [(1, 127, 1), (3, 1152, 3), (2, 4608, 2)])
def test_norm_adds_them_first(T, D, splits, kind, dtype, device):
    x, partials = drawn(T, D, splits, dtype, device)
    weight, bias, offset = vectors(D, device, dtype)
    bias = bias if kind == "layer" else None
    summed = add_partials_ref(x, partials)
    assert not torch.equal(summed, x)
    wide = [None if v is None else v.double() for v in (weight, bias)]
    eager = norm_ref(summed, weight, bias, EPS, kind=kind, offset=offset)
    oracle = norm_ref(summed.double(), *wide, EPS, kind=kind, offset=offset.double())
    y = norm(x, weight, bias, EPS, kind=kind, offset=offset, partials=partials)
    assert_as_accurate(y, eager, oracle)
    assert same(x, summed), "the stream is written back, rounded once"
    assert torch.equal(y, norm(x, weight, bias, EPS, kind=kind, offset=offset)), "statistics of it"


def test_norm_adds_them_to_rows_of_two_blocks(monkeypatch, device):
    monkeypatch.setattr(norm_module, "config", lambda T, D: NormConfig(2, 1, split=True))
    x, partials = drawn(3, 150, 2, torch.bfloat16, device)
    weight, bias, offset = vectors(150, device, torch.bfloat16)
    summed = add_partials_ref(x, partials)
    y = norm(x, weight, bias, EPS, kind="layer", offset=offset, partials=partials)
    assert same(x, summed)
    assert torch.equal(y, norm(x, weight, bias, EPS, kind="layer", offset=offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("has_offset", [True, False])
def test_residual_adds_them_first(has_offset, splits, dtype, device):
    x, partials = drawn(7, 127, splits, dtype, device)
    offset = torch.randn(127).to(device) if has_offset else None
    summed = add_partials_ref(x, partials)
    state = residual(x, offset, partials=partials)
    assert same(x, summed)
    assert torch.equal(state, residual_ref(summed, offset))


@pytest.mark.parametrize("live", [0, 3, 6])
@pytest.mark.parametrize("operator", ["norm", "residual", "in place"])
def test_padding_is_left_alone(operator, live, device):
    T, D = 6, 40
    x, partials = drawn(T, D, 2, torch.bfloat16, device, poison_from=live)
    weight, bias, offset = vectors(D, device, torch.bfloat16)
    before, live_rows = x.clone(), rows(live, device)
    summed = add_partials_ref(x, partials, live)
    assert same(summed[live:], before[live:])
    if operator == "norm":
        out = norm(
            x, weight, bias, EPS,
            kind="layer", offset=offset, live_rows=live_rows, partials=partials,
        )  # fmt: skip
        assert torch.equal(
            out[:live], norm(x[:live], weight, bias, EPS, kind="layer", offset=offset)
        )
    else:
        target = x if operator == "in place" else torch.full_like(x, float("nan"))
        offset = None if operator == "in place" else offset
        out = residual(x, offset, live_rows=live_rows, partials=partials, out=target)
        assert out is target
        assert torch.equal(out[:live], residual_ref(summed[:live], offset))
    assert not out[live:].any()
    if operator != "in place":
        assert same(x, summed)


@pytest.mark.parametrize("live", [0, 8, 12])
def test_norm_of_joined_rows(live, device):
    """Rows of four patches: sums lie as those of patches do, and live rows count patches."""
    T, D, joined = 16, 24, 4
    x, partials = drawn(T, D, 3, torch.bfloat16, device, poison_from=live)
    weight, bias, offset = vectors(joined * D, device, torch.bfloat16)
    summed = add_partials_ref(x, partials, live)
    y = norm(
        x.view(-1, joined * D), weight, bias, EPS, kind="layer", offset=offset,
        live_rows=rows(live, device), live_group=joined,
        partials=partials.view(3, -1, joined * D),
    )  # fmt: skip
    assert same(x, summed)
    n = live // joined
    want = norm(summed.view(-1, joined * D)[:n], weight, bias, EPS, kind="layer", offset=offset)
    assert torch.equal(y[:n], want)
    assert not y[n:].any()


def test_norm_into_another_order(device):
    """The stream keeps its order, whatever that of the result."""
    T, D, live = 9, 40, 7
    x, partials = drawn(T, D, 2, torch.bfloat16, device, poison_from=live)
    weight, bias, _ = vectors(D, device, torch.bfloat16)
    summed = add_partials_ref(x, partials, live)
    destination = torch.randperm(T, generator=torch.Generator().manual_seed(1)).to(device)
    y = norm(
        x, weight, bias, EPS, kind="layer", destination=destination.int(),
        live_rows=rows(live, device), partials=partials,
    )  # fmt: skip
    assert same(x, summed)
    straight = norm(summed, weight, bias, EPS, kind="layer", live_rows=rows(live, device))
    assert torch.equal(y[destination], straight)


def test_fp64_stays_fp64():
    """The oracle's sums."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    partials = torch.full((2, 2, 3), 1e-12, dtype=torch.float64)
    assert residual_ref(x, None, partials=partials).equal(torch.full_like(x, 2e-12))
    y = norm_ref(x + 1, x[0] + 1, None, 0.0, kind="rms", partials=partials)
    assert y.dtype == torch.float64
    assert x.eq(0).all(), "references leave it as it is"


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 8),
        torch.zeros(2, 4, 7),
        torch.zeros(4, 8),
        torch.zeros(0, 4, 8),
        torch.zeros(2, 4, 8, dtype=torch.bfloat16),
        torch.zeros(2, 8, 4).transpose(1, 2),
    ],
    ids=["rows", "columns", "one plane", "no plane", "dtype", "layout"],
)
def test_wrong_sums_are_refused(wrong, device):
    x = torch.zeros(4, 8, device=device)
    message = r"partials must be contiguous \[S, 4, 8\] torch.float32"
    with pytest.raises(ValueError, match=f"norm: {message}"):
        norm(x, x[0], x[0], EPS, kind="layer", partials=wrong.to(device))
    with pytest.raises(ValueError, match=f"residual: {message}"):
        residual(x, None, partials=wrong.to(device))


def test_sums_elsewhere_are_refused():
    x, elsewhere = torch.zeros(4, 8), torch.zeros(2, 4, 8, device="meta")
    with pytest.raises(ValueError, match="residual: partials are on meta, x is on cpu"):
        residual(x, None, partials=elsewhere)
