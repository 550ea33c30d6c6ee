"""Products of fp8 operands with row scales; on a GPU the library's against the definition."""

import pytest
import torch
from vitgraph.kernels import linear_fp8 as module
from vitgraph.kernels.linear_fp8 import fp8_reason, linear_fp8, linear_fp8_op, linear_fp8_ref
from vitgraph.kernels.quantize import FP8, dequantize, quantize_ref
from vitgraph.kernels.testing import rel_rms


def operands(M, N, K, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g) * torch.logspace(-2, 2, M)[:, None]
    weight = torch.randn(N, K, generator=g) * torch.logspace(-1, 1, N)[:, None] * K**-0.5
    bias = torch.randn(N, generator=g).to(device, torch.bfloat16)
    moved = [t.to(device) for t in (*quantize_ref(x), *quantize_ref(weight))]
    return *moved, bias


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("M", "N", "K"), [(4, 16, 16), (52, 96, 160), (260, 1152, 4304)])
def test_matches_the_product_of_the_values(M, N, K, has_bias, device):
    x, xs, w, ws, bias = operands(M, N, K, device)
    bias = bias if has_bias else None
    exact = dequantize(x, xs).double() @ dequantize(w, ws).double().t()
    exact = exact if bias is None else exact + bias.double()
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    assert linear_fp8(x, xs, w, ws, bias, out=out) is out
    # bf16 keeps 8 bits; fast accumulation in the tensor cores loses more over a long sum
    bound = 4e-3 if device == "cpu" else 2e-2
    for row in range(0, M, max(1, M // 8)):  # rows differ in scale by four decades
        assert rel_rms(out[row], exact[row]) < bound


def test_reference_is_the_product_of_the_values(device):
    x, xs, w, ws, bias = operands(20, 32, 64, device)
    exact = dequantize(x, xs).double() @ dequantize(w, ws).double().t() + bias.double()
    assert rel_rms(linear_fp8_ref(x, xs, w, ws, bias), exact) < 1e-6


def test_zero_rows_give_the_bias(device):
    x, xs, w, ws, bias = operands(8, 32, 64, device)
    q, scale = quantize_ref(torch.zeros(4, 64))
    x[4:], xs[4:] = q.to(device), scale.to(device)
    out = torch.empty(8, 32, dtype=torch.bfloat16, device=device)
    linear_fp8(x, xs, w, ws, bias, out=out)
    assert torch.equal(out[4:], bias.expand(4, 32))


def test_no_rows(device):
    x, xs, w, ws, bias = operands(4, 32, 64, device)
    out = torch.empty(0, 32, dtype=torch.bfloat16, device=device)
    assert linear_fp8(x[:0], xs[:0], w, ws, bias, out=out).shape == (0, 32)


GOOD = {
    "x": torch.zeros(4, 32).to(FP8), "x_scale": torch.ones(4),
    "weight": torch.zeros(16, 32).to(FP8), "w_scale": torch.ones(16),
    "bias": torch.zeros(16), "out": torch.zeros(4, 16),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 32)}, TypeError, "x is torch.float32, expected torch.float8_e4m3fn"),
        ({"weight": torch.zeros(16, 32).half()}, TypeError, "weight is torch.float16"),
        ({"x_scale": torch.ones(4, 1)}, ValueError, r"x_scale must be contiguous \[4\]"),
        ({"w_scale": torch.ones(16).double()}, TypeError, "w_scale is torch.float64"),
        ({"bias": torch.zeros(16).half()}, TypeError, "bias is torch.float16, expected"),
        ({"out": torch.zeros(16, 4).t()}, ValueError, "out must be contiguous"),
        ({"weight": torch.zeros(32, 16).to(FP8).t()}, ValueError, "weight must be contiguous"),
        (
            {
                "x": torch.zeros(4, 24).to(FP8),
                "weight": torch.zeros(16, 24).to(FP8),
            },
            ValueError,
            "K = 24 and N = 16 must be multiples of 16",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        linear_fp8(**GOOD | change)


def test_old_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = fp8_reason(torch.device("cuda"))
    assert reason is not None
    assert "compute capability 8.0" in reason
    assert fp8_reason(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8_reason(torch.device("cuda")) is None
    assert module.MIN_CAPABILITY == (8, 9)


def test_opcheck(device):
    """Without "test_schema", which does arithmetic on the operands: fp8 has none."""
    x, xs, w, ws, bias = operands(4, 16, 32, device)
    args = (x, xs, w, ws, bias, torch.bfloat16)
    torch.library.opcheck(linear_fp8_op, args, test_utils="test_faketensor")
