"""Rows of fp8 with a scale each: what an fp8 product reads, and the passes that write it.

    v[t] = f(x[t])                    in fp32
    scale[t] = max(|v[t]|, 1e-12) / 448
    q[t] = e4m3(v[t] / scale[t])      so that v is about scale * q

f is nothing, an activation of activation.py, or "swiglu" (silu(x[t, f]) * x[t, F + f]). x [T, F],
for "swiglu" [T, 2F], elements of a row adjacent; q [T, F] float8_e4m3fn; scale [T] fp32. e4m3 has
3 bits of mantissa and ends at 448: casts round to the nearest, ties to even, and saturate. A row
that holds NaN or infinity stays non-finite in its product, and only that row. Rows at or past the
live ones are never read and are written as zeros with the scale of a zero row, so the product of
stale memory is finite.

Memory-bound: 3 bytes an element from bf16, 5 for "swiglu". A program holds whole rows, in two
column blocks where the width is not a power of two: 4,304 = 4,096 + 208 takes 4,352 lanes so.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl

from .activation import activation_ref, apply_activation
from .dispatch import use_reference
from .launch import launch_kernel
from .rows import ceil_div, check_live_rows
from .swiglu import swiglu_ref

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# of the largest magnitude in a row: 448 / 1e-12 and 1e-12 / 448 are both ordinary fp32 numbers
AMAX_FLOOR = 1e-12
MAX_WIDTH = 16384  # one row must fit in the registers of a program

Transform = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu", "swiglu"]

_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_FP8_MAX = tl.constexpr(FP8_MAX)


def quantize_ref(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of the rows of `v` [T, F], in fp32: the definition."""
    v = v.float()
    if v.shape[1] == 0:
        return v.to(FP8), v.new_full((v.shape[0],), AMAX_FLOOR / FP8_MAX)
    amax = v.abs().amax(1).clamp_min(AMAX_FLOOR)
    # a tensor, since a number over a tensor is computed as its reciprocal, rounded twice
    inverse = torch.full_like(amax, FP8_MAX) / amax
    # no clamp is needed: what rounding puts an ulp above 448 is cast to 448
    return (v * inverse[:, None]).to(FP8), amax * (1 / FP8_MAX)


def quantize_rows_ref(
    x: torch.Tensor, transform: str | None = None, num_live: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of `quantize_rows`; `num_live` is a Python int here."""
    v = x.float()
    if transform == "swiglu":
        v = swiglu_ref(v)
    elif transform is not None:
        v = activation_ref(v, transform)
    if num_live is not None:
        v = torch.cat([v[:num_live], torch.zeros_like(v[num_live:])])
    return quantize_ref(v)


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 values that `q` [T, F] with `scale` [T] stands for."""
    return q.float() * scale[:, None]


def column_blocks(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) of which the sum covers `width` with least waste."""
    whole = triton.next_power_of_2(width)
    half = whole // 2
    if whole == width or half < 128:  # a warp's worth of lanes is not worth a second block
        return whole, 0
    rest = triton.next_power_of_2(width - half)
    return (half, rest) if rest < half else (whole, 0)


def config(width: int) -> tuple[int, int]:
    """(rows a program, warps): 16 to 32 elements a thread keep enough loads in flight."""
    rows = max(1, min(8, 2048 // triton.next_power_of_2(width)))
    return rows, 4 if width <= 2048 else 8 if width <= 8192 else 16


@triton.jit
def row_scales(amax):
    """(what to multiply a row with, what its quantised values are worth) for its largest value."""
    amax = tl.maximum(amax, _AMAX_FLOOR)
    # a division rounded to the nearest, once a row: the reference has the same bits
    return tl.div_rn(tl.full(amax.shape, _FP8_MAX, tl.float32), amax), amax * (1 / _FP8_MAX)


@triton.jit
def _transformed(x_ptr, f, F, in_tile, TRANSFORM: tl.constexpr):
    """A tile of f(x) in fp32; zero outside of `in_tile`, as f(0) is 0."""
    x = tl.load(x_ptr + f[None, :], mask=in_tile, other=0.0).to(tl.float32)
    if TRANSFORM == "swiglu":
        up = tl.load(x_ptr + F + f[None, :], mask=in_tile, other=0.0).to(tl.float32)
        x = apply_activation(x, "silu") * up
    else:
        x = apply_activation(x, TRANSFORM)
    return x


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _quantize_kernel(
    x_ptr,  # [T, F], or [T, 2F]
    live_ptr,  # [1] or None
    q_ptr,  # [T, F]
    scale_ptr,  # [T]
    T,
    F,
    stride_xt,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_live = T
    if live_ptr is not None:
        num_live = tl.minimum(tl.load(live_ptr), T)
    live = (t < num_live)[:, None]
    in_rows = (t < T)[:, None]
    row = t.to(tl.int64)[:, None]
    x_row = x_ptr + row * stride_xt
    q_row = q_ptr + row * F
    f = tl.arange(0, MAIN)
    main = _transformed(x_row, f, F, live & (f < F)[None, :], TRANSFORM)
    amax = tl.max(tl.abs(main), axis=1)
    g, rest = f, main
    if REST > 0:
        g = MAIN + tl.arange(0, REST)
        rest = _transformed(x_row, g, F, live & (g < F)[None, :], TRANSFORM)
        amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=1))
    inverse, scale = row_scales(amax)
    tl.store(scale_ptr + t, scale, mask=t < T)
    q = (main * inverse[:, None]).to(tl.float8e4nv)
    tl.store(q_row + f[None, :], q, mask=in_rows & (f < F)[None, :])
    if REST > 0:
        q = (rest * inverse[:, None]).to(tl.float8e4nv)
        tl.store(q_row + g[None, :], q, mask=in_rows & (g < F)[None, :])


def check_quantized(operation: str, q: torch.Tensor, scale: torch.Tensor, T: int, F: int) -> None:
    """Raise ValueError unless `q` is contiguous fp8 [T, F] and `scale` contiguous fp32 [T]."""
    if q.shape != (T, F) or q.dtype != FP8 or not q.is_contiguous():
        raise ValueError(
            f"{operation}: q must be contiguous {FP8} [{T}, {F}], got {q.dtype} {list(q.shape)} "
            f"with strides {q.stride()}"
        )
    if scale.shape != (T,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"{operation}: scale must be contiguous torch.float32 [{T}], got {scale.dtype} "
            f"{list(scale.shape)} with strides {scale.stride()}"
        )


def quantize_rows(
    x: torch.Tensor,
    transform: str | None = None,
    live_rows: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of f(x); see the module docstring.

    Args:
        x: [T, F], or [T, 2F] for "swiglu"; elements of a row adjacent.
        transform: f; None quantises `x` itself.
        live_rows: int32 [1] on the device; rows from there on become zeros.
        out: (q, scale) to write into; new tensors if None.

    Raises:
        ValueError: an unknown transform, a shape, layout or `live_rows` that is not as above, or
            F over `MAX_WIDTH`.
    """
    if transform is not None and transform not in get_args(Transform):
        raise ValueError(
            f"quantize_rows: transform={transform!r} is not None or one of {get_args(Transform)}"
        )
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            "quantize_rows: x must be [T, F] with adjacent elements in a row, got shape "
            f"{tuple(x.shape)} and strides {x.stride()}"
        )
    T, F = x.shape
    if transform == "swiglu":
        if F % 2:
            raise ValueError(f"quantize_rows: x [{T}, {F}] must be [T, 2F] for 'swiglu'")
        F //= 2
    if F > MAX_WIDTH:
        raise ValueError(f"quantize_rows: F = {F} is over the limit of {MAX_WIDTH}")
    check_live_rows("quantize_rows", x, live_rows)
    if out is not None:
        check_quantized("quantize_rows", *out, T, F)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        q, scale = quantize_rows_ref(x, transform, num_live)
        return (q, scale) if out is None else (out[0].copy_(q), out[1].copy_(scale))
    q, scale = out or (x.new_empty((T, F), dtype=FP8), x.new_empty(T, dtype=torch.float32))
    if T == 0 or F == 0:
        return q, scale.fill_(AMAX_FLOOR / FP8_MAX)
    rows, num_warps = config(F)
    main, rest = column_blocks(F)
    launch_kernel(
        _quantize_kernel, (ceil_div(T, rows),),
        x, live_rows, q, scale, T, F, x.stride(0), transform or "",
        ROWS=rows, MAIN=main, REST=rest, num_warps=num_warps,
    )  # fmt: skip
    return q, scale


@torch.library.custom_op("vitgraph::quantize_rows", mutates_args=())
def quantize_rows_op(
    x: torch.Tensor, transform: str | None = None, live_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` into new tensors as a registered operator."""
    return quantize_rows(x, transform, live_rows)


@quantize_rows_op.register_fake
def _(x, transform=None, live_rows=None):
    T, F = x.shape
    F = F // 2 if transform == "swiglu" else F
    return x.new_empty((T, F), dtype=FP8), x.new_empty(T, dtype=torch.float32)
