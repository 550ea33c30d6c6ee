import pytest
import torch
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.few_rows_tuning import FewRowsConfig
from vitgraph.kernels.gemm_tuning import HopperConfig
from vitgraph.kernels.linear import (
    BACKENDS,
    empty_output,
    linear,
    linear_op,
    linear_ref,
    linear_residual_op,
)
from vitgraph.kernels.testing import assert_as_accurate
from vitgraph.kernels.zero_padding import ZeroedPadding

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


@pytest.mark.parametrize(
    ("writes", "reads", "is_left"),
    [
        (FewRowsConfig(64, 64, 6), FewRowsConfig(64, 128, 8), True),
        (FewRowsConfig(128, 64, 6), FewRowsConfig(64, 128, 8), True),
        (FewRowsConfig(64, 64, 6), FewRowsConfig(128, 128, 6), False),
        (FewRowsConfig(64, 64, 6), None, False),
        (FewRowsConfig(64, 64, 6), HopperConfig(64, 64, 4), False),
        (HopperConfig(64, 64, 4), FewRowsConfig(64, 64, 6), False),
    ],
    ids=["as-many", "half", "twice", "library", "others", "of-others"],
)
def test_padding_that_its_only_reader_leaves_alone(writes, reads, is_left, monkeypatch):
    x, weight, reader = torch.zeros(3, 8), torch.zeros(16, 8), torch.zeros(24, 16)

    def choose(M, N, K, *_, **__):
        return "kernel", writes if weight.shape == (N, K) else reads

    monkeypatch.setattr(linear_module, "choose_backend", choose)
    for apart in (reader, torch.zeros(24, 17)[:, 1:]):  # whose rows the kernels do not take
        with ZeroedPadding(torch.tensor([2], dtype=torch.int32)) as padding:
            out = empty_output(x, weight, padding=padding, reader=apart)
        assert out[2].isnan().all() == (is_left and apart is reader)
        assert out[:2].isnan().all()  # not written: what new memory holds in these tests
