import pytest
import torch
from vitgraph.kernels.linear import (
    BACKENDS,
    linear,
    linear_op,
    linear_ref,
    linear_residual_op,
)
from vitgraph.kernels.testing import assert_as_accurate

# those written in Gluon have no interpreter: test_gemm_hopper.py, test_gemm_few_rows.py
PORTABLE = [backend for backend in BACKENDS if backend not in ("hopper", "few_rows")]
ACTIVATIONS = [None, "gelu_tanh", "gelu_erf", "quick_gelu", "silu"]


def operands(device, dtype, T=19, N=24, K=40):
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *s: torch.randn(*s, device=device, generator=g).to(dtype) + 0.25  # noqa: E731
    return draw(T, K), draw(N, K) / K**0.5, draw(N), draw(T, N)


def check(actual, x, weight, bias, activation=None, residual=None):
    tensors = [x, weight, bias]
    eager = linear_ref(*tensors, activation=activation, residual=residual)
    wide = [None if t is None else t.double() for t in (*tensors, residual)]
    oracle = linear_ref(*wide[:3], activation=activation, residual=wide[3])
    assert_as_accurate(actual, eager, oracle, name="y")


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_oracle(activation, has_bias, dtype, backend, device):
    x, weight, bias, _ = operands(device, dtype)
    bias = bias if has_bias else None
    check(
        linear(x, weight, bias, activation=activation, backend=backend), x, weight, bias, activation
    )
    out = torch.empty(19, 24, dtype=dtype, device=device)
    assert linear(x, weight, bias, activation=activation, backend=backend, out=out) is out
    check(out, x, weight, bias, activation)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_in_place(dtype, backend, device):
    x, weight, _, residual = operands(device, dtype)
    summed = residual.clone()
    assert linear(x, weight, residual=summed, backend=backend) is summed
    check(summed, x, weight, None, residual=residual)


@pytest.mark.parametrize("backend", PORTABLE)
def test_live_rows_are_right(backend, device):
    x, weight, bias, _ = operands(device, torch.bfloat16)
    x[7:] = float("nan")
    live_rows = torch.tensor([7], dtype=torch.int32, device=device)
    y = linear(x, weight, bias, activation="quick_gelu", live_rows=live_rows, backend=backend)
    check(y[:7], x[:7], weight, bias, "quick_gelu")


@pytest.mark.parametrize("backend", PORTABLE)
def test_empty(backend, device):
    x, weight = torch.zeros(0, 16, device=device), torch.zeros(8, 16, device=device)
    y = linear(x, weight, torch.zeros(8, device=device), activation="gelu_tanh", backend=backend)
    assert y.shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cublas"}, "backend='cublas' is not one of"),
        ({"bias": True, "residual": True}, "add the bias where the residual is read, or use"),
        ({"activation": "silu", "residual": True}, "use backend='triton'"),
        ({"activation": "relu"}, "linear: activation='relu'"),
    ],
)
def test_bad_arguments(arguments, message, device):
    x, weight, bias, residual = operands(device, torch.float32)
    given = {"bias": bias, "residual": residual}
    arguments = {k: given.get(k, v) for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear(x, weight, **arguments)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, backend, device):
    x, weight, bias, residual = operands(device, torch.float32)
    torch.library.opcheck(linear_op, (x, weight, bias, "silu", None, backend), test_utils=check)
    torch.library.opcheck(
        linear_residual_op, (residual, x, weight, None, None, None, backend), test_utils=check
    )
