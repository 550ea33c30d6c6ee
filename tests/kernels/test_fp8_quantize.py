"""Quantisation of rows to fp8, by the plain definition and by the kernel."""

import pytest
import torch
from vitgraph.kernels import quantize as module
from vitgraph.kernels.aligned_rows import aligned_rows
from vitgraph.kernels.quantize import (
    AMAX_FLOOR,
    FP8,
    FP8_MAX,
    Bounds,
    bound_ref,
    column_blocks,
    dequantize,
    quantize_ref,
    quantize_rows,
    quantize_rows_op,
    quantize_rows_ref,
)

NAN = float("nan")
SHAPES = [
    pytest.param(1, 16, id="one"),
    pytest.param(7, 131, id="odd"),
    pytest.param(5, 1152, id="qwen3-vl-8b"),
    pytest.param(3, 4304, id="two-blocks"),
    pytest.param(2, 3456, id="one-block"),
]


def make(device, T, F, dtype):
    g = torch.Generator().manual_seed(T * F)
    x = torch.randn(T, F, generator=g) * 2
    x *= torch.logspace(-4, 3, T)[:, None]  # every row a scale of its own
    return x.to(device, dtype)


NORMS = [0.5, 2.0]


def bounds_of(T, device):
    return Bounds(torch.empty(T, device=device), torch.tensor(NORMS, device=device))


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


@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_bounds(T, F, device):
    """Over the norms of rows as they were written, by one to eight per cent."""
    x = make(device, T, F, torch.bfloat16)
    bounds = bounds_of(T, device)
    q, scale = quantize_rows(x, bounds=bounds)
    length = 1.07 * x.double().norm(dim=1)
    want = length * NORMS[0] + NORMS[1]
    torch.testing.assert_close(bounds.out.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(bounds.out, bound_ref(x, bounds), rtol=1e-5, atol=0)
    written = (q.double() * scale.double()[:, None]).norm(dim=1)
    assert (written <= length).all()
    assert (written >= length / 1.14).all()
    plain = quantize_rows(x)
    assert torch.equal(bits(q), bits(plain[0]))
    assert torch.equal(scale, plain[1])


def test_error_is_that_of_three_bits(device):
    x = make(device, 6, 512, torch.float32)
    exact = x.double()
    got = dequantize(*quantize_rows(x)).double()
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


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("live", [0, 1, 5, 9, 100])
def test_padding_is_zero_and_never_read(live, kernel, device, monkeypatch):
    if not kernel:
        monkeypatch.setattr(module, "use_reference", lambda tensor: True)
    x = make(device, 9, 48, torch.bfloat16)
    n = min(live, 9)
    clean = bounds_of(n, device)
    want = quantize_rows(x[:n], bounds=clean)
    x[n:] = NAN
    wide = torch.full((9, 96), 13.0, device=device).to(FP8)
    out = wide[:, 16:64], torch.empty(9, device=device)
    bounds = bounds_of(9, device)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    q, scale = quantize_rows(x, live_rows, bounds=bounds, out=out)
    assert q.data_ptr() == out[0].data_ptr()
    assert scale is out[1]
    assert torch.equal(bits(q[:n]), bits(want[0]))
    assert torch.equal(scale[:n], want[1])
    assert torch.equal(bounds.out[:n], clean.out)
    assert not bits(q[n:]).any()
    assert (scale[n:] == torch.tensor(AMAX_FLOOR) * (1 / FP8_MAX)).all()
    assert (bounds.out[n:] == NORMS[1]).all()
    assert (wide[:, :16].float() == 13).all()
    assert (wide[:, 64:].float() == 13).all()


def test_zero_rows_are_zero(device):
    q, scale = quantize_rows(torch.zeros(3, 32, device=device))
    assert not bits(q).any()
    assert (scale > 0).all()
    assert (dequantize(q, scale) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad, device):
    x = make(device, 4, 40, torch.float32)
    clean_bounds, bounds = bounds_of(4, device), bounds_of(4, device)
    clean = quantize_rows(x, bounds=clean_bounds)
    x[2, 7] = bad
    q, scale = quantize_rows(x, bounds=bounds)
    values = dequantize(q, scale)
    assert not values[2].sum().isfinite()
    assert not bounds.out[2].isfinite()
    for t in (0, 1, 3):
        assert bounds.out[t] == clean_bounds.out[t]
        assert torch.equal(bits(q[t]), bits(clean[0][t]))
        assert scale[t] == clean[1][t]


def test_strided_rows(device):
    wide = make(device, 6, 96, torch.float32)
    q, scale = quantize_rows(wide[:, 16:64])
    want = quantize_ref(wide[:, 16:64].cpu())
    assert torch.equal(bits(q).cpu(), bits(want[0]))
    assert torch.equal(scale.cpu(), want[1])


@pytest.mark.parametrize("F", [131, 4304])
def test_into_aligned_rows(F, device):
    """Within the second column block as well, where a row has one."""
    x = make(device, 3, F, torch.bfloat16)
    out = aligned_rows(x, 3, F, dtype=FP8)
    q, scale = quantize_rows(x, out=(out, torch.empty(3, device=device)))
    want = quantize_rows(x)
    assert torch.equal(bits(q), bits(want[0]))
    assert torch.equal(scale, want[1])


@pytest.mark.parametrize(("T", "F"), [(0, 32), (3, 0)])
def test_empty(T, F, device):
    bounds = bounds_of(T, device)
    q, scale = quantize_rows(torch.zeros(T, F, device=device), bounds=bounds)
    assert (q.shape, scale.shape) == ((T, F), (T,))
    assert (bounds.out == NORMS[1]).all()
    assert (scale == torch.tensor(AMAX_FLOOR) * (1 / FP8_MAX)).all()


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


N2 = torch.ones(2)
Q, SCALE = torch.zeros(2, 4).to(FP8), torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"must be \[T, F\]"),
        ({"x": torch.zeros(4, 2).T}, "adjacent elements"),
        ({"x": torch.zeros(1, 20000)}, "F = 20000 is over the limit of 16384"),
        ({"live_rows": torch.zeros(1)}, "live_rows must be one int32"),
        ({"out": (torch.zeros(2, 4), SCALE)}, r"q must be torch.float8_e4m3fn \[2, 4\]"),
        ({"out": (torch.zeros(4, 2).to(FP8).t(), SCALE)}, r"adjacent .* strides \(1, 2\)"),
        ({"out": (Q[:1].expand(2, 4), SCALE)}, r"adjacent .* strides \(0, 1\)"),
        ({"out": (Q, torch.zeros(2, 1))}, r"scale must be .* \[2\], got .* \[2, 1\]"),
        ({"out": (Q, torch.zeros(4)[::2])}, r"scale must be contiguous .* strides \(2,\)"),
        ({"out": (Q, SCALE.double())}, "scale must be .* got torch.float64"),
        (
            {"bounds": Bounds(torch.ones(2, 1), N2)},
            r"out of bounds must be .* \[2\], got .* \[2, 1\]",
        ),
        ({"bounds": Bounds(torch.ones(4)[::2], N2)}, r"must be contiguous .* strides \(2,\)"),
        ({"bounds": Bounds(torch.ones(2).double(), N2)}, "out of bounds .* got torch.float64"),
        ({"bounds": Bounds(torch.ones(2), N2.double())}, "norms of bounds .* got torch.float64"),
        (
            {"bounds": Bounds(torch.ones(2), torch.ones(3))},
            r"norms of bounds .* \[2\], got .* \[3\]",
        ),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(**{"x": torch.zeros(2, 4)} | change)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x = make(device, 3, 16, torch.float32)
    live_rows = torch.tensor([2], dtype=torch.int32, device=device)
    torch.library.opcheck(quantize_rows_op, (x, live_rows), test_utils=check)
