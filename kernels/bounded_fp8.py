"""Rows of fp8 whose scales are known before their values: what lies between two fp8 products.

A product with an activation could be quantised as it is written, were the largest value of each row
known by then. It is bounded: for a row x, as quantised, and a row w of the weight, as quantised,

    |x . w + b| <= |x| |w| + |b|      (Cauchy and Schwarz)

and no activation f is larger than its argument. So with the largest |w| and |b| of any output
channel, computed where weights are quantised, and

    bound[t] = (1.07 |x[t]| |w| + |b|) / 448

computed where x is quantised (quantize.py, norm_fp8.py), of x as it was before, for which the 1.07,

    q[t] = e4m3(f(y[t]) / bound[t])

needs no look at the row, and the next product reads q with bound as its row scales. Nothing is over
448 but by the rounding of sums, which the cast saturates.

The bound is wide: where x has no direction, some 12 times the largest value of a row at a width of
1280, and more where rows of the weight differ in norm, or one channel holds most of x. A
floating-point format can spare that: e4m3 keeps its 3 bits down to 1/28672 of the largest value,
and loses them one by one below. What a gate multiplies has no such bound here: the product of two
is some 260 times too wide at best, and thousands of times where the largest |w| of gate and up are
those of different channels.

What attention makes of v needs no scale of a row at all. A norm leaves rows no longer than sqrt(K)
before its weight and bias (g, c), so by the same inequality channel n of their product is at most

    limit[n] = 1.07 (sqrt(K) |w[n] g| + sum_k |w[n, k] c[k]|) + |b[n]|

whatever the input, and averages of v stay below it. `value_factors` are the powers of two that
take v just under 448. With them in the scales and the bias that make v, and their inverses in the
columns of the weight that reads what attention writes, attention casts its result as it is. The
limit is some 36 times a usual v, and averages are smaller still, which e4m3 can spare as above.
"""

from typing import get_args

import torch
import triton
import triton.language as tl

from .activation import Activation, activation_ref, apply_activation
from .dispatch import use_reference
from .launch import launch_kernel
from .quantize import BOUND_SLOPE, FP8, FP8_MAX, dequantize, has_adjacent_columns
from .rows import ceil_div, check_live_rows, row_programs

BLOCK_T, BLOCK_F = 4, 512  # 16 elements a thread at 4 warps
BIAS_FLOOR = 1e-30  # of |b|: the bound of a zero row has an inverse that is an fp32 number
EXPONENTS = 64  # of factors: products of them and weights are ordinary fp32 and bf16 numbers


def bound_norms(
    weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Largest |w| and |b| of a product with fp8 `weight`, over 448: fp32 [2].

    Plain PyTorch, once for a weight [N, K] with scales [N] and bias [N] or None.
    """
    norm = dequantize(weight, w_scale).norm(dim=1).max()
    largest = torch.zeros_like(norm) if bias is None else bias.float().abs().max()
    return torch.stack([norm, largest.clamp_min(BIAS_FLOOR)]) / FP8_MAX


def value_factors(
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Powers of two, fp32 [N]: `limit` times them is at most 448, and over half of that.

    Channels of a limit past the range of exponents have the last of it.

    Plain PyTorch, once for the channels of v in an fp8 `weight` [N, K] with scales [N] and bias [N]
    or None, behind a norm with weight and bias [K]; its bias may be None.
    """
    w = dequantize(weight, w_scale)
    limit = w.shape[1] ** 0.5 * (w * norm_weight.float()).norm(dim=1)
    if norm_bias is not None:
        limit += (w * norm_bias.float()).abs().sum(1)
    limit *= BOUND_SLOPE
    if bias is not None:
        limit += bias.float().abs()
    exponent = (FP8_MAX / limit).log2().floor().clamp(-EXPONENTS, EXPONENTS)
    return exponent.exp2()


def quantize_bounded_ref(
    y: torch.Tensor, bound: torch.Tensor, activation: str | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of `quantize_bounded` on live rows."""
    y = y.float() if activation is None else activation_ref(y.float(), activation)
    q = y * (1 / bound)[:, None]
    # sums in another order may pass the bound by their rounding
    return q.clamp(-FP8_MAX, FP8_MAX).to(FP8)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _quantize_bounded_kernel(
    y_ptr,  # [T, F]
    bound_ptr,  # [T]
    live_ptr,  # [1] or None
    q_ptr,  # [T, F]
    T,
    F,
    stride_yt,
    stride_qt,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    num_live = T
    if live_ptr is not None:
        num_live = tl.minimum(tl.load(live_ptr), T)
    blocks_f = tl.cdiv(F, BLOCK_F)
    for block in range(tl.program_id(0), tl.cdiv(T, BLOCK_T) * blocks_f, tl.num_programs(0)):
        t = (block // blocks_f) * BLOCK_T + tl.arange(0, BLOCK_T)
        f = (block % blocks_f) * BLOCK_F + tl.arange(0, BLOCK_F)
        in_columns = (f < F)[None, :]
        live = (t < num_live)[:, None] & in_columns
        row = t.to(tl.int64)[:, None]
        columns = y_ptr + row * stride_yt + f[None, :]
        y = tl.load(columns, mask=live, other=0.0).to(tl.float32)
        y = apply_activation(y, ACTIVATION)
        y *= 1.0 / tl.load(bound_ptr + t, mask=t < num_live, other=1.0)[:, None]
        q = y.to(tl.float8e4nv)
        tl.store(q_ptr + row * stride_qt + f[None, :], q, mask=(t < T)[:, None] & in_columns)


def quantize_bounded(
    y: torch.Tensor,
    bound: torch.Tensor,
    activation: str | None = None,
    live_rows: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """f(y) / bound in fp8, written to `out`.

    Args:
        y: [T, F], elements of a row adjacent.
        bound: [T] fp32.
        activation: f, of activation.py.
        live_rows: int32 [1] on the device.
        out: [T, F] fp8, elements of a row adjacent; rows past the live ones become zeros.

    Raises:
        ValueError: an unknown activation, or a shape, dtype or layout that is not as above.
    """
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(
            f"quantize_bounded: activation={activation!r} is not None or one of "
            f"{get_args(Activation)}"
        )
    T, F = out.shape
    for name, tensor, shape, dtype in (
        ("y", y, (T, F), y.dtype),
        ("bound", bound, (T,), torch.float32),
        ("out", out, (T, F), FP8),
    ):
        is_row = tensor.dim() == 1 and tensor.is_contiguous()
        if (
            tensor.shape != shape
            or tensor.dtype != dtype
            or not (is_row or (tensor.dim() == 2 and has_adjacent_columns(tensor)))
        ):
            raise ValueError(
                f"quantize_bounded: {name} must be {dtype} {list(shape)} with adjacent elements in "
                f"a row, got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    check_live_rows("quantize_bounded", y, live_rows)
    if out.numel() == 0:
        return out
    if use_reference(y):
        n = T if live_rows is None else min(int(live_rows), T)
        out[:n] = quantize_bounded_ref(y[:n], bound[:n], activation)
        out[n:] = 0
        return out
    blocks = ceil_div(T, BLOCK_T) * ceil_div(F, BLOCK_F)
    launch_kernel(
        _quantize_bounded_kernel, (row_programs(y.device, blocks),),
        y, bound, live_rows, out, T, F, y.stride(0), out.stride(0),
        ACTIVATION=activation or "", BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F, num_warps=4,
    )  # fmt: skip
    return out
