"""Elementwise activation, in place, over the live rows.

    x[t] = f(x[t])    for t < live_rows

    gelu_tanh    x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), computed as x sigmoid(2 ...)
    gelu_erf     x/2 (1 + erf(x / sqrt(2)))
    quick_gelu   x sigmoid(1.702 x)
    silu         x sigmoid(x)

x is [T, F], fp32, fp16 or bf16, elements of a row adjacent; f is computed in fp32 and rounded
once. Rows from `live_rows` on are neither read nor written. Memory-bound: 2*T*F elements moved.
`apply_activation` is the same function for the epilogue of another kernel.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import pdl_options, wait_for_previous
from .roofline import Cost
from .rows import ceil_div, check_live_rows, row_programs

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]

BLOCK_T, BLOCK_F = 4, 512  # 16 elements a thread at 4 warps, in 128-bit accesses


def activation_ref(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of `x`; a new tensor."""
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu_erf":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return F.silu(x)
    raise ValueError(f"activation: {activation!r} is not one of {get_args(Activation)}")


def cost(T: int, F: int, dtype: torch.dtype) -> Cost:
    """Least work and traffic of one call on [T, F]."""
    return Cost(flops=8 * T * F, bytes=2 * T * F * dtype.itemsize)


# In an epilogue every instruction counts, since it may outlast the product that it should hide
# under. So for results of 16 bits exp is exp2, which is one, where `tl.exp` minds denormals in
# four; 1 / y is the square of an inverse root, where a division minds its range; and erf is half
# as long as that of libdevice. What is lost is some units in the last place of fp32.


@triton.jit
def _inverse(y):
    """1 / y for y from 1 to 2^126, within 4e-7 of it relatively; less than 2^-126 above."""
    root = tl.rsqrt(y)
    return root * root


@triton.jit
def _gelu_erf(x):
    """x/2 (1 + erf(x / sqrt(2))), within 1e-6 of it.

    For z >= 0, erfc(z) is exp(-z^2) times a polynomial in t = 1 / (1 + 0.3275911 z), within 1.5e-7
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26); |x| = z sqrt(2).
    """
    t = _inverse(1.0 + 0.23164189 * tl.abs(x))
    tail = 0.5307027145 * t - 0.7265760135  # erfc / 2
    tail = tail * t + 0.7107068705
    tail = tail * t - 0.142248368
    tail = (tail * t + 0.127414796) * t * tl.exp2(-0.7213475204444817 * x * x)
    y = tl.minimum(x, 1e30) * tail  # inf * 0 would be NaN
    return tl.where(x < 0, y, x - y)


@triton.jit
def binary_exponent(x, ACTIVATION: tl.constexpr):
    """y of x / (1 + 2^y), which all but `gelu_erf` are: (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    if ACTIVATION == "gelu_tanh":
        return x * (-2.302208198 - 0.1029432397 * x * x)
    elif ACTIVATION == "quick_gelu":
        return -2.455466955 * x
    else:
        return -1.4426950408889634 * x


@triton.jit
def apply_activation(x, ACTIVATION: tl.constexpr, IS_FP32: tl.constexpr = False):
    """`ACTIVATION` of an fp32 tile, to the last place only where the result stays fp32."""
    if IS_FP32:
        if ACTIVATION == "gelu_tanh":
            x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        if ACTIVATION == "gelu_erf":
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        if ACTIVATION == "quick_gelu":
            x = x * tl.sigmoid(1.702 * x)
        if ACTIVATION == "silu":
            x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_erf":
        x = _gelu_erf(x)
    elif ACTIVATION != "":
        x = x * _inverse(1.0 + tl.exp2(binary_exponent(x, ACTIVATION)))
    return x


@triton.jit
def _activation_kernel(
    x_ptr,  # [T, F], updated
    live_ptr,  # [1] int32 or None
    T,
    F,
    stride_xt,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    live = T
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    blocks_f = tl.cdiv(F, BLOCK_F)
    for block in range(tl.program_id(0), tl.cdiv(live, BLOCK_T) * blocks_f, tl.num_programs(0)):
        t = (block // blocks_f) * BLOCK_T + tl.arange(0, BLOCK_T)
        f = (block % blocks_f) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (t < live)[:, None] & (f < F)[None, :]
        ptrs = x_ptr + t.to(tl.int64)[:, None] * stride_xt + f[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        y = apply_activation(x, ACTIVATION, x_ptr.dtype.element_ty == tl.float32)
        tl.store(ptrs, y.to(x_ptr.dtype.element_ty), mask=mask)


def activation_(
    x: torch.Tensor, activation: str, live_rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply `activation` to the live rows of `x` [T, F] in place, and return `x`.

    Raises:
        ValueError: unknown activation, `x` is not 2-D with adjacent elements in a row, or
            `live_rows` is not one int32 on the device of `x`.
    """
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation_: activation={activation!r} is not one of {get_args(Activation)}"
        )
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            "activation_: x must be [T, F] with adjacent elements in a row, got shape "
            f"{tuple(x.shape)} and strides {x.stride()}"
        )
    check_live_rows("activation_", x, live_rows)
    if x.numel() == 0:
        return x
    if use_reference(x):
        live = x if live_rows is None else x[: int(live_rows)]
        live.copy_(activation_ref(live, activation))
        return x
    T, features = x.shape
    blocks = ceil_div(T, BLOCK_T) * ceil_div(features, BLOCK_F)
    launch_kernel(
        _activation_kernel,
        (row_programs(x.device, blocks),),
        x,
        live_rows,
        T,
        features,
        x.stride(0),
        activation,
        BLOCK_T=BLOCK_T,
        BLOCK_F=BLOCK_F,
        **pdl_options(x),
    )
    return x


@torch.library.custom_op("vitgraph::activation_", mutates_args=("x",))
def activation_op(x: torch.Tensor, activation: str, live_rows: torch.Tensor | None = None) -> None:
    """`activation_` as a registered operator (returns nothing: its result is `x`)."""
    activation_(x, activation, live_rows)


@activation_op.register_fake
def _(x, activation, live_rows=None):
    return None
