"""Activations in the epilogues of products of few rows, where two neighbours share a reciprocal."""

from typing import get_args

import pytest
import torch
from vitgraph.kernels.activation import Activation, activation_ref
from vitgraph.kernels.gemm import hopper_reason
from vitgraph.kernels.linear import linear

BF16 = torch.bfloat16
NAN, INF = float("nan"), float("inf")

# beside each, in turn, an ordinary number: neither may reach the other
EXTREMES = [-1e30, -1e4, -200.0, -40.0, -9.0, -0.5, 0.0, 9.0, 40.0, 200.0, 1e4, 1e30, INF, NAN]


@pytest.fixture(scope="module")
def needs_hopper():
    if reason := hopper_reason(torch.device("cuda"), BF16):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", get_args(Activation))
def test_neighbours_of_extremes(activation, needs_hopper):
    values = [v for extreme in EXTREMES for v in (extreme, -1.5, 0.75, extreme)]
    bias = torch.tensor(values, device="cuda", dtype=BF16)
    x = torch.zeros(16, 64, device="cuda", dtype=BF16)
    weight = torch.zeros(len(bias), 64, device="cuda", dtype=BF16)
    y = linear(x, weight, bias, activation=activation, backend="few_rows").double()
    want = activation_ref(bias.double(), activation).expand_as(y)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    usual = want.isfinite()
    error, want = (y - want)[usual].abs(), want[usual].abs()
    # one rounding to bf16; far below zero what is left is x / 2^62
    assert (error <= 2.0**-7.9 * want + 2.0**-61 * bias.double().abs().expand_as(y)[usual]).all()
