"""Rows of fp8 with a scale each: what an fp8 product reads, and the passes that write it.

    scale[t] = max(|x[t]|, 1e-12) / 448
    q[t] = e4m3(x[t] / scale[t])                    so that x is about scale * q
    bound[t] of what a product makes of the row     if asked for; see bounded_fp8.py

x [T, F], elements of a row adjacent; q [T, F] float8_e4m3fn; scale and bound [T] fp32. e4m3 has
3 bits of mantissa and ends at 448: casts round to the nearest, ties to even, and saturate. A row
that holds NaN or infinity stays non-finite in its product, and only that row. Rows at or past the
live ones are never read and are written as zeros with the scale of a zero row, so the product of
stale memory is finite.

Memory-bound: 3 bytes an element from bf16. A program holds whole rows, in two
column blocks where the width is not a power of two: 4,304 = 4,096 + 208 takes 4,352 lanes so.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .rows import ceil_div, check_live_rows

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# of the largest magnitude in a row: 448 / 1e-12 and 1e-12 / 448 are both ordinary fp32 numbers
AMAX_FLOOR = 1e-12
MAX_WIDTH = 16384  # one row must fit in the registers of a program

# |scale * q| is at most this times |x|: casts add up to 1/16 of a value, and what they add to
# values under the last bit of the mantissa is less than 0.0003 |x| for rows up to MAX_WIDTH
BOUND_SLOPE = 1.07

_BOUND_SLOPE = tl.constexpr(BOUND_SLOPE)
_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_FP8_MAX = tl.constexpr(FP8_MAX)


@dataclass(frozen=True)
class Bounds:
    """Bounds of what a product makes of quantised rows (bounded_fp8.py), to be written with them.

    Attributes:
        out: [T] fp32, written.
        norms: [2] fp32, of the product (`bound_norms`).
    """

    out: torch.Tensor
    norms: torch.Tensor


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
    x: torch.Tensor, num_live: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of `quantize_rows`; `num_live` is a Python int here."""
    v = x.float()
    if num_live is not None:
        v = torch.cat([v[:num_live], torch.zeros_like(v[num_live:])])
    return quantize_ref(v)


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 values that `q` [T, F] with `scale` [T] stands for."""
    return q.float() * scale[:, None]


def bound_ref(v: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """The bounds of rows [T, F] that are quantised; a new tensor."""
    return BOUND_SLOPE * v.float().norm(dim=1) * bounds.norms[0] + bounds.norms[1]


def column_blocks(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) of which the sum covers `width` with least waste."""
    whole = triton.next_power_of_2(width)
    half = whole // 2
    if whole == width or half < 128:  # a warp's worth of lanes is not worth a second block
        return whole, 0
    rest = triton.next_power_of_2(width - half)
    return (half, rest) if rest < half else (whole, 0)


def config(width: int) -> tuple[int, int]:
    """(rows a program, warps), by measurement on an H200: a warp to a row keeps its sums inside."""
    rows = max(1, min(8, 2048 // triton.next_power_of_2(width)))
    return rows, 1 if width <= 2048 else 4 if width <= 8192 else 16


@triton.jit
def row_scales(amax):
    """(what to multiply a row with, what its quantised values are worth) for its largest value."""
    amax = tl.maximum(amax, _AMAX_FLOOR)
    # a division rounded to the nearest, once a row: the reference has the same bits
    return tl.div_rn(tl.full(amax.shape, _FP8_MAX, tl.float32), amax), amax * (1 / _FP8_MAX)


@triton.jit
def store_bounds(bound_ptr, norms_ptr, t, T, squares):
    """Write the bounds of rows t, if they are asked for, from the sums of their squares."""
    if bound_ptr is not None:
        bound = _BOUND_SLOPE * tl.sqrt(squares) * tl.load(norms_ptr) + tl.load(norms_ptr + 1)
        tl.store(bound_ptr + t, bound, mask=t < T)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _quantize_kernel(
    x_ptr,  # [T, F]
    live_ptr,  # [1] or None
    q_ptr,  # [T, F]
    scale_ptr,  # [T]
    norms_ptr,  # [2] or None
    bound_ptr,  # [T] or None
    T,
    F,
    stride_xt,
    stride_qt,
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
    q_row = q_ptr + row * stride_qt
    f = tl.arange(0, MAIN)
    main = tl.load(x_row + f[None, :], mask=live & (f < F)[None, :], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(main), axis=1)
    g, rest = f, main
    if REST > 0:
        g = MAIN + tl.arange(0, REST)
        rest = tl.load(x_row + g[None, :], mask=live & (g < F)[None, :], other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=1))
    inverse, scale = row_scales(amax)
    tl.store(scale_ptr + t, scale, mask=t < T)
    q = (main * inverse[:, None]).to(tl.float8e4nv)
    tl.store(q_row + f[None, :], q, mask=in_rows & (f < F)[None, :])
    squares = tl.sum(main * main, axis=1)
    if REST > 0:
        q = (rest * inverse[:, None]).to(tl.float8e4nv)
        tl.store(q_row + g[None, :], q, mask=in_rows & (g < F)[None, :])
        squares += tl.sum(rest * rest, axis=1)
    store_bounds(bound_ptr, norms_ptr, t, T, squares)


def has_adjacent_columns(matrix: torch.Tensor) -> bool:
    """True if elements of a row are adjacent and rows do not overlap."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def check_quantized(operation: str, q: torch.Tensor, scale: torch.Tensor, T: int, F: int) -> None:
    """Raise ValueError unless `q` is fp8 [T, F], adjacent in rows, and `scale` fp32 [T]."""
    if q.shape != (T, F) or q.dtype != FP8 or not has_adjacent_columns(q):
        raise ValueError(
            f"{operation}: q must be {FP8} [{T}, {F}] with adjacent elements in a row, got "
            f"{q.dtype} {list(q.shape)} with strides {q.stride()}"
        )
    if scale.shape != (T,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"{operation}: scale must be contiguous torch.float32 [{T}], got {scale.dtype} "
            f"{list(scale.shape)} with strides {scale.stride()}"
        )


def check_bounds(operation: str, bounds: Bounds | None, T: int) -> None:
    """Raise ValueError unless `bounds` is None or as its class says."""
    if bounds is None:
        return
    for name, tensor, shape in (("norms", bounds.norms, (2,)), ("out", bounds.out, (T,))):
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} of bounds must be contiguous torch.float32 {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )


def quantize_rows(
    x: torch.Tensor,
    live_rows: torch.Tensor | None = None,
    *,
    bounds: Bounds | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of the rows of x; see the module docstring.

    Args:
        x: [T, F], elements of a row adjacent.
        live_rows: int32 [1] on the device; rows from there on become zeros.
        bounds: What to write the bounds of the rows into, of those past the live ones as well.
        out: (q, scale) to write into, rows of q with adjacent elements; new tensors if None.

    Raises:
        ValueError: a shape, layout or `live_rows` that is not as above, or F over `MAX_WIDTH`.
    """
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            "quantize_rows: x must be [T, F] with adjacent elements in a row, got shape "
            f"{tuple(x.shape)} and strides {x.stride()}"
        )
    T, F = x.shape
    if F > MAX_WIDTH:
        raise ValueError(f"quantize_rows: F = {F} is over the limit of {MAX_WIDTH}")
    check_live_rows("quantize_rows", x, live_rows)
    check_bounds("quantize_rows", bounds, T)
    if out is not None:
        check_quantized("quantize_rows", *out, T, F)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        q, scale = quantize_rows_ref(x, num_live)
        if bounds is not None:
            n = T if num_live is None else min(num_live, T)
            bounds.out.copy_(bound_ref(torch.cat([x[:n], torch.zeros_like(x[n:])]), bounds))
        return (q, scale) if out is None else (out[0].copy_(q), out[1].copy_(scale))
    q, scale = out or (x.new_empty((T, F), dtype=FP8), x.new_empty(T, dtype=torch.float32))
    if T == 0 or F == 0:
        if bounds is not None:
            bounds.out.copy_(bound_ref(x, bounds))
        return q, scale.fill_(AMAX_FLOOR / FP8_MAX)
    rows, num_warps = config(F)
    main, rest = column_blocks(F)
    launch_kernel(
        _quantize_kernel, (ceil_div(T, rows),),
        x, live_rows, q, scale, bounds and bounds.norms, bounds and bounds.out,
        T, F, x.stride(0), q.stride(0), ROWS=rows, MAIN=main, REST=rest, num_warps=num_warps,
    )  # fmt: skip
    return q, scale


@torch.library.custom_op("vitgraph::quantize_rows", mutates_args=())
def quantize_rows_op(
    x: torch.Tensor, live_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` into new tensors as a registered operator."""
    return quantize_rows(x, live_rows)


@quantize_rows_op.register_fake
def _(x, live_rows=None):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
