from itertools import product
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl
from vitgraph.kernels.activation import (
    Activation,
    activation_,
    activation_op,
    activation_ref,
    apply_activation,
)
from vitgraph.kernels.testing import assert_as_accurate

SHAPES = [
    pytest.param(1, 1152, id="one"),
    pytest.param(7, 131, id="odd"),
    pytest.param(5, 4304, id="qwen3-vl"),
]


def make(device, T, F, dtype):
    g = torch.Generator(device).manual_seed(0)
    return (torch.randn(T, F, device=device, generator=g) * 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "F"), SHAPES)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_matches_oracle(activation, T, F, dtype, device):
    x = make(device, T, F, dtype)
    eager, oracle = activation_ref(x, activation), activation_ref(x.double(), activation)
    y = x.clone()
    assert activation_(y, activation) is y
    assert_as_accurate(y, eager, oracle)


@pytest.mark.parametrize("live", [0, 1, 5, 9, 100])
def test_rows_past_the_live_ones_are_untouched(live, device):
    x = make(device, 9, 33, torch.bfloat16)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    y = activation_(x.clone(), "silu", live_rows)
    num_live = min(live, 9)
    assert torch.equal(y[num_live:], x[num_live:])
    assert torch.equal(y[:num_live], activation_(x[:num_live].clone(), "silu"))


def test_large_inputs_saturate(device):
    x = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, torch.inf]], device=device)
    for activation, dtype in product(get_args(Activation), (torch.float32, torch.bfloat16)):
        y = activation_(x.to(dtype), activation)
        assert torch.equal(y, x.to(dtype).clamp_min(0)), activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_matches_oracle_whatever_the_size(activation, scale, dtype, device):
    x = (make(device, 64, 512, torch.float32) * (scale / 4)).to(dtype)
    eager, oracle = activation_ref(x, activation), activation_ref(x.double(), activation)
    assert_as_accurate(activation_(x.clone(), activation), eager, oracle)


@triton.jit
def _unrounded_kernel(x_ptr, y_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N)
    tl.store(y_ptr + i, apply_activation(x, ACTIVATION), mask=i < N)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_what_is_rounded_to_16_bits(activation, device):
    """The shorter forms, before the rounding that hides them."""
    x = torch.linspace(-12, 12, 24001, device=device)
    y = torch.empty_like(x)
    _unrounded_kernel[(24,)](x, y, len(x), ACTIVATION=activation, BLOCK=1024)
    error = (y - activation_ref(x.double(), activation)).abs()
    # the roots and powers of a GPU are 1.3e-7 and 2.4e-7 off
    assert (error / x.abs().clamp_min(1)).max() < 1e-6


def test_strided_rows(device):
    wide = make(device, 6, 64, torch.float32)
    y = wide.clone()
    activation_(y[:, 8:40], "gelu_tanh")
    torch.testing.assert_close(y[:, 8:40], activation_ref(wide[:, 8:40], "gelu_tanh"))
    assert torch.equal(y[:, 40:], wide[:, 40:])
    assert torch.equal(y[:, :8], wide[:, :8])


def test_empty(device):
    assert activation_(torch.zeros(0, 8, device=device), "silu").shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), "relu"), "activation='relu' is not one of"),
        ((torch.zeros(4), "silu"), r"must be \[T, F\]"),
        ((torch.zeros(4, 2).T, "silu"), "adjacent elements"),
        ((torch.zeros(2, 4), "silu", torch.zeros(1)), "live_rows must be one int32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        activation_(*arguments)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x = make(device, 3, 8, torch.float32)
    live_rows = torch.tensor([2], dtype=torch.int32, device=device)
    torch.library.opcheck(activation_op, (x, "silu", live_rows), test_utils=check)
