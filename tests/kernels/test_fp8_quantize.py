"""Quantisation of rows to fp8, by the plain definition and by the kernel."""

import pytest
import torch
from vitgraph.kernels.activation import activation_ref
from vitgraph.kernels.quantize import (
    AMAX_FLOOR,
    FP8,
    FP8_MAX,
    column_blocks,
    dequantize,
    quantize_ref,
    quantize_rows,
    quantize_rows_op,
    quantize_rows_ref,
)
from vitgraph.kernels.swiglu import swiglu_ref

TRANSFORMS = [None, "gelu_tanh", "gelu_erf", "quick_gelu", "silu", "swiglu"]
SHAPES = [
    pytest.param(1, 16, id="one"),
    pytest.param(7, 131, id="odd"),
    pytest.param(5, 1152, id="qwen3-vl-8b"),
    pytest.param(3, 4304, id="two-blocks"),
    pytest.param(2, 3456, id="one-block"),
]


def make(device, T, F, dtype, transform=None):
    g = torch.Generator().manual_seed(T * F)
    x = torch.randn(T, F * (2 if transform == "swiglu" else 1), generator=g) * 2
    x *= torch.logspace(-4, 3, T)[:, None]  # every row a scale of its own
    return x.to(device, dtype)


def bits(q):
    return q.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_plain_rows_are_the_reference_bit_for_bit(T, F, dtype, device):
    x = make(device, T, F, dtype)
    q, scale = quantize_rows(x)
    q_ref, scale_ref = quantize_rows_ref(x)
    assert torch.equal(scale, scale_ref)
    assert torch.equal(bits(q), bits(q_ref))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_transforms(T, F, transform, device):
    """Their arithmetic differs in the last bits, which may turn a rounding, hence one step."""
    x = make(device, T, F, torch.bfloat16, transform)
    q, scale = quantize_rows(x, transform)
    q_ref, scale_ref = quantize_rows_ref(x, transform)
    torch.testing.assert_close(scale, scale_ref, rtol=1e-5, atol=1e-20)
    step = (bits(q).int() & 127) - (bits(q_ref).int() & 127)
    assert step.abs().max() <= 1
    assert (step != 0).double().mean() < 0.02


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_error_is_that_of_three_bits(transform, device):
    x = make(device, 6, 512, torch.float32, transform)
    exact = x.double()
    if transform == "swiglu":
        exact = swiglu_ref(exact)
    elif transform is not None:
        exact = activation_ref(exact, transform)
    got = dequantize(*quantize_rows(x, transform)).double()
    # half a step is 2**-4 of a value, and below 2**-6 of 448 it is 2**-10 at scale 1
    bound = (exact.abs() * 2**-4).clamp_min(exact.abs().amax(1, keepdim=True) / 448 * 2**-10)
    assert ((got - exact).abs() <= bound * 1.001).all()


def test_rounding_is_half_ulp_and_ties_go_to_even(device):
    # a largest value of 448 makes the scale 1: what is written is the cast of x itself
    x = torch.tensor([[448.0, 17.0, 19.0, 16.5, 1.0625, -1.1875, 2**-9, 2**-10, 1.5 * 2**-9, 0.0]])
    want = [448.0, 16.0, 20.0, 16.0, 1.0, -1.25, 2**-9, 0.0, 2**-8, 0.0]
    q, scale = quantize_rows(x.to(device))
    assert scale.tolist() == [1.0]
    assert q.float()[0].tolist() == want
    # a carry out of the mantissa goes into the exponent
    q, _ = quantize_rows(torch.tensor([[448.0, 15.6, 31.5, 1.99]], device=device))
    assert q.float()[0].tolist() == [448.0, 16.0, 32.0, 2.0]


def test_the_largest_value_never_overflows(device):
    g = torch.Generator().manual_seed(3)
    x = torch.rand(4096, 2, generator=g) * torch.logspace(-30, 30, 4096)[:, None]
    q, scale = quantize_rows(x.to(device))
    assert q.float().isfinite().all()
    assert scale.isfinite().all()
    over = x.abs().amax(1) > AMAX_FLOOR
    assert (q.float().abs().amax(1).cpu()[over] == FP8_MAX).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("live", [0, 1, 5, 9, 100])
def test_padding_is_zero_and_never_read(live, transform, device):
    x = make(device, 9, 48, torch.bfloat16, transform)
    n = min(live, 9)
    want = quantize_rows(x[:n], transform)
    x[n:] = float("nan")
    out = torch.empty(9, 48, device=device, dtype=FP8), torch.empty(9, device=device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    q, scale = quantize_rows(x, transform, live_rows, out=out)
    assert q is out[0]
    assert scale is out[1]
    assert torch.equal(bits(q[:n]), bits(want[0]))
    assert torch.equal(scale[:n], want[1])
    assert not bits(q[n:]).any()
    assert (scale[n:] == torch.tensor(AMAX_FLOOR) * (1 / FP8_MAX)).all()


def test_zero_rows_are_zero(device):
    q, scale = quantize_rows(torch.zeros(3, 32, device=device))
    assert not bits(q).any()
    assert (scale > 0).all()
    assert (dequantize(q, scale) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad, device):
    x = make(device, 4, 40, torch.float32)
    clean = quantize_rows(x)
    x[2, 7] = bad
    q, scale = quantize_rows(x)
    values = dequantize(q, scale)
    assert not values[2].sum().isfinite()
    for t in (0, 1, 3):
        assert torch.equal(bits(q[t]), bits(clean[0][t]))
        assert scale[t] == clean[1][t]


def test_strided_rows(device):
    wide = make(device, 6, 96, torch.float32)
    q, scale = quantize_rows(wide[:, 16:64])
    want = quantize_ref(wide[:, 16:64].cpu())
    assert torch.equal(bits(q).cpu(), bits(want[0]))
    assert torch.equal(scale.cpu(), want[1])


def test_empty(device):
    q, scale = quantize_rows(torch.zeros(0, 32, device=device))
    assert (q.shape, scale.shape) == ((0, 32), (0,))


@pytest.mark.parametrize(
    ("width", "blocks"),
    [
        (16, (16, 0)), (17, (32, 0)), (1152, (1024, 128)), (1280, (1024, 256)), (3456, (4096, 0)),
        (4304, (4096, 256)), (5120, (4096, 1024)), (4096, (4096, 0)), (1, (1, 0)),
    ],
)  # fmt: skip
def test_column_blocks_cover_the_width(width, blocks):
    assert column_blocks(width) == blocks
    assert sum(blocks) >= width


@pytest.mark.parametrize(
    ("arguments", "out", "message"),
    [
        ((torch.zeros(2, 4), "relu"), None, "transform='relu' is not None or one of"),
        ((torch.zeros(4),), None, r"must be \[T, F\]"),
        ((torch.zeros(4, 2).T,), None, "adjacent elements"),
        ((torch.zeros(2, 5), "swiglu"), None, r"must be \[T, 2F\]"),
        ((torch.zeros(1, 20000),), None, "over the limit"),
        ((torch.zeros(2, 4), None, torch.zeros(1)), None, "live_rows must be one int32"),
        ((torch.zeros(2, 4),), (torch.zeros(2, 4), torch.zeros(2)), "q must be contiguous"),
        ((torch.zeros(2, 4),), (torch.zeros(2, 4).to(FP8), torch.zeros(2, 1)), "scale must be"),
    ],
)
def test_bad_arguments(arguments, out, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(*arguments, out=out)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x = make(device, 3, 16, torch.float32, "swiglu")
    live_rows = torch.tensor([2], dtype=torch.int32, device=device)
    torch.library.opcheck(quantize_rows_op, (x, "swiglu", live_rows), test_utils=check)
