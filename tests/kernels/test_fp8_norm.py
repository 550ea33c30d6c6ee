"""Residual add, norm and quantisation in one kernel, against the definition of each."""

import pytest
import torch
from vitgraph.kernels.norm import norm_ref
from vitgraph.kernels.norm_fp8 import norm_fp8, norm_fp8_op, norm_fp8_ref
from vitgraph.kernels.quantize import FP8, dequantize, quantize_ref

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
    y = torch.randn(T, D, generator=g)
    weight, offset = torch.randn(D, generator=g) + 1, torch.randn(D, generator=g)
    bias = torch.randn(D, generator=g) if kind == "layer" else None
    x, y, weight, bias = (None if v is None else v.to(device, dtype) for v in (x, y, weight, bias))
    return x, y, weight, bias, offset.to(device)


def bits(q):
    return q.view(torch.uint8)


def assert_quantized_alike(got, want):
    """Other sums of the norm turn some roundings, each by one step."""
    (q, scale), (q_ref, scale_ref) = got, want
    torch.testing.assert_close(scale, scale_ref, rtol=1e-5, atol=0)
    step = (bits(q).int() & 127) - (bits(q_ref).int() & 127)
    assert step.abs().max() <= 1
    assert (step != 0).double().mean() < 0.02


@pytest.mark.parametrize("has_y", [True, False], ids=["y", "no-y"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_matches_its_definition(T, D, dtype, kind, has_y, device):
    x, y, weight, bias, offset = arguments(T, D, dtype, device, kind)
    y = y if has_y else None
    # by the parts: the sum rounded to the stream, the norm in fp64, the cast
    stream = x if y is None else (x.float() + y.float()).to(dtype)
    wide = norm_ref(
        stream.double(), weight.double(), None if bias is None else bias.double(), 1e-6,
        kind=kind, offset=offset.double(),
    )  # fmt: skip
    before = x.clone()
    got = norm_fp8(x, y, weight, bias, 1e-6, kind=kind, offset=offset)
    assert torch.equal(x, stream)
    assert_quantized_alike(got, quantize_ref(wide.float()))
    ref_x, *ref = norm_fp8_ref(before, y, weight, bias, 1e-6, kind=kind, offset=offset)
    assert torch.equal(ref_x, stream)
    assert_quantized_alike(got, ref)


@pytest.mark.parametrize("live", [0, 1, 4, 7, 50])
def test_padding_is_never_touched(live, device):
    x, y, weight, bias, offset = arguments(7, 96, torch.bfloat16, device)
    n = min(live, 7)
    clean = x[:n].clone()
    want = norm_fp8(clean, y[:n], weight, bias, 1e-6, kind="layer", offset=offset)
    x[n:], y[n:] = float("nan"), float("inf")
    out = torch.empty(7, 96, device=device, dtype=FP8), torch.empty(7, device=device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    got = norm_fp8(
        x, y, weight, bias, 1e-6, kind="layer", offset=offset, live_rows=live_rows, out=out
    )
    assert got == out
    assert torch.equal(x[:n], clean)
    assert x[n:].isnan().all()
    assert torch.equal(bits(out[0][:n]), bits(want[0]))
    assert torch.equal(out[1][:n], want[1])
    assert not bits(out[0][n:]).any()
    assert (dequantize(*out)[n:] == 0).all()
    assert ((out[1][n:] > 0) & (out[1][n:] < 1e-12)).all()


def test_rows_do_not_depend_on_their_neighbours(device):
    x, y, weight, bias, _ = arguments(6, 1152, torch.bfloat16, device)
    alone = [
        norm_fp8(x[t : t + 1].clone(), y[t : t + 1], weight, bias, 1e-6, kind="layer")
        for t in range(6)
    ]
    q, scale = norm_fp8(x, y, weight, bias, 1e-6, kind="layer")
    for t in range(6):
        assert torch.equal(bits(alone[t][0][0]), bits(q[t]))
        assert alone[t][1][0] == scale[t]


def test_outliers_leave_the_other_channels_their_bits(device):
    """One channel at 100 times the others: 448 / 2**-6 is room enough for four decades."""
    x, _, weight, bias, _ = arguments(8, 512, torch.float32, device)
    x[:, 5] *= 100
    wide = norm_ref(x.double(), weight.double(), bias.double(), 1e-6, kind="layer")
    got = dequantize(*norm_fp8(x, None, weight, bias, 1e-6, kind="layer")).double()
    assert ((got - wide).square().mean() / wide.square().mean()).sqrt() < 0.05
    quiet = [c for c in range(512) if c not in (0, 1, 5)]
    error, value = (got - wide)[:, quiet], wide[:, quiet]
    assert (error.square().mean() / value.square().mean()).sqrt() < 0.05


def test_empty(device):
    x, y, weight, bias, _ = arguments(3, 64, torch.float32, device)
    q, scale = norm_fp8(x[:0], y[:0], weight, bias, 1e-6, kind="layer")
    assert (q.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batch"}, "'layer' or 'rms'"),
        ({"weight": torch.ones(7)}, r"weight \(7,\) must be \[8\]"),
        ({"offset": torch.ones(9)}, "offset"),
        ({"x": torch.zeros(8, 4).T}, "x must be contiguous"),
        ({"y": torch.zeros(4, 8).half()}, "y must be contiguous torch.float32"),
        ({"y": torch.zeros(3, 8)}, r"got torch.float32 \[3, 8\]"),
        ({"live_rows": torch.zeros(2)}, "live_rows must be one int32"),
        ({"out": (torch.zeros(4, 8), torch.zeros(4))}, "q must be contiguous"),
        ({"x": torch.zeros(1, 20000), "weight": torch.ones(20000)}, "over the limit"),
    ],
)
def test_bad_arguments(change, message):
    given = {"x": torch.zeros(4, 8), "y": None, "weight": torch.ones(8), "bias": None} | change
    options = {k: given.pop(k) for k in ("offset", "live_rows", "out") if k in given}
    kind = given.pop("kind", "rms")
    with pytest.raises(ValueError, match=message):
        norm_fp8(*given.values(), 1e-6, kind=kind, **options)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x, y, weight, bias, offset = arguments(2, 16, torch.float32, device)
    args = (x, y, weight, bias, 1e-6, "layer", offset, None)
    torch.library.opcheck(norm_fp8_op, args, test_utils=check)
