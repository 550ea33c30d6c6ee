"""Norm and quantisation in one kernel, against the definition of each."""

import pytest
import torch
from vitgraph.kernels import norm_fp8 as module
from vitgraph.kernels.norm import NormConfig, norm_ref
from vitgraph.kernels.norm_fp8 import norm_fp8, norm_fp8_op, norm_fp8_ref
from vitgraph.kernels.quantize import FP8, Bounds, dequantize, quantize_ref

NAN = float("nan")

SHAPES = [
    pytest.param(1, 1152, id="one"),
    pytest.param(3, 127, id="odd"),
    pytest.param(5, 1280, id="qwen2.5-vl"),
    pytest.param(2, 2560, id="wide"),
]


def arguments(T, D, dtype, device, kind="layer"):
    g = torch.Generator().manual_seed(T * D)
    x = torch.randn(T, D, generator=g) + 3
    x[:, :2] *= 75  # outlier channels of the stream
    weight, offset = torch.randn(D, generator=g) + 1, torch.randn(D, generator=g)
    bias = torch.randn(D, generator=g).to(device, dtype) if kind == "layer" else None
    return x.to(device, dtype), weight.to(device, dtype), bias, offset.to(device)


def bits(q):
    return q.view(torch.uint8)


def assert_quantized_alike(got, want):
    """Other sums of the norm turn some roundings, each by one step."""
    (q, scale), (q_ref, scale_ref) = got, want
    torch.testing.assert_close(scale, scale_ref, rtol=1e-5, atol=0)
    step = (bits(q).int() & 127) - (bits(q_ref).int() & 127)
    assert step.abs().max() <= 1
    assert (step != 0).double().mean() < 0.02


@pytest.fixture(params=["by-rule", "split", "two-rows"])
def launch(request, monkeypatch):
    """How rows lie in a program; few of them, in a program that many would be given."""
    configs = {
        "split": NormConfig(rows=2, num_warps=1, split=True),
        "two-rows": NormConfig(rows=2, num_warps=4),
    }
    if request.param in configs:
        monkeypatch.setattr(module, "config", lambda T, D: configs[request.param])
    return request.param


NORMS = [0.5, 2.0]


def bounds_of(T, device):
    return Bounds(torch.empty(T, device=device), torch.tensor(NORMS, device=device))


def in_wide_rows(T, D, device):
    """(q, scale) to write, q within wider rows of a pattern."""
    wide = torch.full((T, D + 48), 13.0, device=device).to(FP8)
    return wide, (wide[:, 16 : 16 + D], torch.empty(T, device=device))


@pytest.mark.parametrize("has_offset", [True, False], ids=["offset", "no-offset"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_matches_its_definition(T, D, dtype, kind, has_offset, launch, device):
    x, weight, bias, offset = arguments(T, D, dtype, device, kind)
    offset = offset if has_offset else None
    before = x.clone()
    # by the parts: the norm in fp64, the cast
    wide = norm_ref(
        x.double(), weight.double(), None if bias is None else bias.double(), 1e-6,
        kind=kind, offset=None if offset is None else offset.double(),
    )  # fmt: skip
    bounds = bounds_of(T, device)
    got = norm_fp8(x, weight, bias, 1e-6, kind=kind, offset=offset, bounds=bounds)
    assert torch.equal(x, before)
    assert_quantized_alike(got, quantize_ref(wide.float()))
    assert_quantized_alike(got, norm_fp8_ref(x, weight, bias, 1e-6, kind=kind, offset=offset))
    want = 1.07 * wide.norm(dim=1) * NORMS[0] + NORMS[1]
    torch.testing.assert_close(bounds.out.double(), want, rtol=1e-4, atol=0)


def test_the_largest_value_may_be_the_last(launch, device):
    x, weight, _, _ = arguments(3, 96, torch.float32, device, "rms")
    weight[-1] = 50 * weight.abs().max()
    got = norm_fp8(x, weight, None, 1e-6, kind="rms")
    assert_quantized_alike(got, norm_fp8_ref(x, weight, None, 1e-6, kind="rms"))


def test_many_rows_are_split():
    """What the tests above take for few rows is what many are launched with."""
    launch = module.config(4096, 1152)
    assert launch == NormConfig(rows=2, num_warps=1, split=True)
    assert module.blocks(1152, launch) == (1024, 256)


def test_bounds_are_over_the_norm_of_what_is_written(launch, device):
    x, weight, bias, _ = arguments(5, 96, torch.bfloat16, device)
    assert bias is not None
    bounds = bounds_of(5, device)
    q, scale = norm_fp8(x, weight, bias, 1e-6, kind="layer", bounds=bounds)
    written = (q.double() * scale.double()[:, None]).norm(dim=1)
    assert (bounds.out >= written * NORMS[0] + NORMS[1]).all()
    assert (bounds.out <= 1.14 * written * NORMS[0] + NORMS[1]).all()


def test_bound_changes_nothing_else(launch, device):
    x, weight, bias, offset = arguments(5, 127, torch.bfloat16, device)
    plain = norm_fp8(x, weight, bias, 1e-6, kind="layer", offset=offset)
    bounds = bounds_of(5, device)
    with_bound = norm_fp8(x, weight, bias, 1e-6, kind="layer", offset=offset, bounds=bounds)
    assert torch.equal(bits(plain[0]), bits(with_bound[0]))
    assert torch.equal(plain[1], with_bound[1])


@pytest.mark.parametrize(("first", "width"), [(4, 128), (8, 132), (16, 136), (3, 101)])
def test_rows_of_q_may_start_anywhere(first, width, launch, device):
    """Eight columns are written at a time where all rows start at multiples of eight."""
    x, weight, bias, _ = arguments(5, 96, torch.bfloat16, device)
    want = norm_fp8(x, weight, bias, 1e-6, kind="layer")
    wide = torch.full((5, width), 13.0, device=device).to(FP8)
    out = wide[:, first : first + 96], torch.empty(5, device=device)
    q, scale = norm_fp8(x, weight, bias, 1e-6, kind="layer", out=out)
    assert torch.equal(q.float(), want[0].float())
    assert torch.equal(scale, want[1])
    assert (wide[:, :first].float() == 13).all()
    assert (wide[:, first + 96 :].float() == 13).all()


@pytest.mark.parametrize("live", [0, 1, 4, 7, 50])
def test_padding_is_never_read(live, launch, device):
    x, weight, bias, offset = arguments(7, 96, torch.bfloat16, device)
    n = min(live, 7)
    clean = bounds_of(n, device)
    want = norm_fp8(x[:n].clone(), weight, bias, 1e-6, kind="layer", offset=offset, bounds=clean)
    x[n:] = NAN
    before = x.clone()
    wide, out = in_wide_rows(7, 96, device)
    bounds = bounds_of(7, device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    got = norm_fp8(
        x, weight, bias, 1e-6, kind="layer", offset=offset, live_rows=live_rows,
        bounds=bounds, out=out,
    )  # fmt: skip
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))
    assert torch.equal(bits(out[0][:n]), bits(want[0]))
    assert torch.equal(out[1][:n], want[1])
    assert torch.equal(bounds.out[:n], clean.out)
    assert not bits(out[0][n:]).any()
    assert (dequantize(*out)[n:] == 0).all()
    assert ((out[1][n:] > 0) & (out[1][n:] < 1e-12)).all()
    assert (bounds.out[n:] == NORMS[1]).all()
    assert (wide[:, :16].float() == 13).all()
    assert (wide[:, 16 + 96 :].float() == 13).all()


@pytest.mark.parametrize("live", [0, 3, 5, 50])
def test_reference_treats_padding_alike(live, device, monkeypatch):
    x, weight, bias, offset = arguments(5, 48, torch.bfloat16, device)
    x[live:] = NAN
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    results = []
    for is_reference in (False, True):
        monkeypatch.setattr(module, "use_reference", lambda tensor, value=is_reference: value)
        _, out = in_wide_rows(5, 48, device)
        bounds = bounds_of(5, device)
        norm_fp8(
            x, weight, bias, 1e-6, kind="layer", offset=offset, live_rows=live_rows, bounds=bounds,
            out=out,
        )  # fmt: skip
        results.append((out, bounds.out))
    (got, bound), (want, want_bound) = results
    assert_quantized_alike(got, want)
    torch.testing.assert_close(bound, want_bound, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's
@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad, kind, launch, device):
    x, weight, bias, _ = arguments(5, 96, torch.float32, device, kind)
    clean_bounds, bounds = bounds_of(5, device), bounds_of(5, device)
    clean = norm_fp8(x, weight, bias, 1e-6, kind=kind, bounds=clean_bounds)
    x[2, 70] = bad  # in the second block, where there is one
    q, scale = norm_fp8(x, weight, bias, 1e-6, kind=kind, bounds=bounds)
    assert dequantize(q, scale)[2].sum().isnan()
    assert bounds.out[2].isnan()
    for t in (0, 1, 3, 4):
        assert torch.equal(bits(q[t]), bits(clean[0][t]))
        assert scale[t] == clean[1][t]
        assert bounds.out[t] == clean_bounds.out[t]


def test_rows_do_not_depend_on_their_neighbours(launch, device):
    x, weight, bias, _ = arguments(6, 1152, torch.bfloat16, device)
    alone = [norm_fp8(x[t : t + 1], weight, bias, 1e-6, kind="layer") for t in range(6)]
    q, scale = norm_fp8(x, weight, bias, 1e-6, kind="layer")
    for t in range(6):
        assert torch.equal(bits(alone[t][0][0]), bits(q[t]))
        assert alone[t][1][0] == scale[t]


def test_outliers_leave_the_other_channels_their_bits(device):
    """One channel at 100 times the others: 448 / 2**-6 is room enough for four decades."""
    x, weight, bias, _ = arguments(8, 512, torch.float32, device)
    assert bias is not None
    x[:, 5] *= 100
    wide = norm_ref(x.double(), weight.double(), bias.double(), 1e-6, kind="layer")
    got = dequantize(*norm_fp8(x, weight, bias, 1e-6, kind="layer")).double()
    assert ((got - wide).square().mean() / wide.square().mean()).sqrt() < 0.05
    quiet = [c for c in range(512) if c not in (0, 1, 5)]
    error, value = (got - wide)[:, quiet], wide[:, quiet]
    assert (error.square().mean() / value.square().mean()).sqrt() < 0.05


def test_empty(device):
    x, weight, bias, _ = arguments(3, 64, torch.float32, device)
    bounds = bounds_of(0, device)
    q, scale = norm_fp8(x[:0], weight, bias, 1e-6, kind="layer", bounds=bounds)
    assert (q.shape, scale.shape) == ((0, 64), (0,))


BAD_Q = torch.zeros(8, 4).to(FP8).t()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batch"}, "'layer' or 'rms'"),
        ({"weight": torch.ones(7)}, r"weight \(7,\) must be \[8\]"),
        ({"bias": torch.ones(8, 2)[:, 0]}, r"bias \(8,\) must be \[8\], .* contiguous"),
        ({"offset": torch.ones(9)}, r"offset \(9,\) must be \[8\]"),
        ({"x": torch.zeros(8, 4).T}, "x must be contiguous"),
        ({"live_rows": torch.zeros(2)}, "live_rows must be one int32"),
        ({"out": (torch.zeros(4, 8), torch.zeros(4))}, r"q must be torch.float8_e4m3fn \[4, 8\]"),
        ({"out": (BAD_Q, torch.zeros(4))}, r"adjacent elements .* strides \(1, 4\)"),
        ({"out": (BAD_Q.contiguous(), torch.zeros(3))}, r"scale must be .* \[4\], got .* \[3\]"),
        ({"bounds": Bounds(torch.ones(3), torch.ones(2))}, r"out of bounds .* \[4\], got .* \[3\]"),
        (
            {"bounds": Bounds(torch.ones(4), torch.ones(3))},
            r"norms of bounds .* \[2\], got .* \[3\]",
        ),
        ({"x": torch.zeros(1, 20000), "weight": torch.ones(20000)}, "over the limit"),
    ],
)
def test_bad_arguments(change, message):
    given = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "bias": None} | change
    x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
    with pytest.raises(ValueError, match=message):
        norm_fp8(x, weight, bias, 1e-6, **{"kind": "rms"} | given)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x, weight, bias, offset = arguments(2, 16, torch.float32, device)
    args = (x, weight, bias, 1e-6, "layer", offset, None)
    torch.library.opcheck(norm_fp8_op, args, test_utils=check)
