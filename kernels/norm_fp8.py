"""Norm and quantisation in one pass: what the next fp8 product reads.

    v = norm(x + offset)           layer or rms, as in norm.py
    q, scale, bound = fp8 of v     as in quantize.py

x [T, D], contiguous; weight, bias [D]; offset [D] fp32 or None; q [T, D] float8_e4m3fn; scale and
bound [T] fp32. All arithmetic is fp32. Rows at or past the live ones: x is not read, and what is
written is that of a zero row.

Memory-bound: in bf16 3*T*D bytes.
"""

import torch
import triton
import triton.language as tl

from .centred import centred, load_rows, load_vector
from .dispatch import use_reference
from .launch import launch_kernel
from .norm import MAX_D, blocks, config, norm_ref
from .pdl import pdl_options, wait_for_previous
from .quantize import (
    FP8,
    Bounds,
    bound_ref,
    check_bounds,
    check_quantized,
    quantize_ref,
    row_scales,
    store_bounds,
)
from .rows import ceil_div, check_live_rows


def norm_fp8_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    num_live: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition: (q, scale); `num_live` is a Python int here."""
    return quantize_ref(_normed(x, weight, bias, eps, kind, offset, num_live))


def _normed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    offset: torch.Tensor | None,
    num_live: int | None,
) -> torch.Tensor:
    """v in fp32, zero past the live rows."""
    n = x.shape[0] if num_live is None else min(num_live, x.shape[0])
    v = norm_ref(
        x[:n].float(), weight.float(), None if bias is None else bias.float(), eps,
        kind=kind, offset=None if offset is None else offset.float(),
    )  # fmt: skip
    return torch.cat([v, v.new_zeros(x.shape[0] - n, x.shape[1])])


@triton.jit
def _norm_fp8_rows(
    x_ptr, weight_ptr, bias_ptr, offset_ptr, q_ptr, scale_ptr, norms_ptr, bound_ptr,
    offset, weight, bias,  # columns of the first block; the latter two only with PDL
    r, live, in_rows, T, stride_qt, eps,
    D: tl.constexpr, IS_RMS: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
    ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalise and quantise rows r [ROWS]; of masks that are constants, nothing is left."""
    # int64 before the multiply: T * D passes 2**31 at 1.9M rows of width 1152
    row = r[:, None].to(tl.int64)
    start = row * D
    q_row = q_ptr + row * stride_qt
    d = tl.arange(0, BLOCK_D)
    x, rest = load_rows(x_ptr, None, offset, offset_ptr, start, live, 0, D, 0, BLOCK_D, REST)
    x, rest, squares = centred(x, rest, D, IS_RMS, BLOCK_D, REST)
    if not PDL:  # many rows: registers hold more of them meanwhile
        weight = load_vector(weight_ptr, d, D)
        bias = load_vector(bias_ptr, d, D)
    root = (1.0 / tl.sqrt(squares / D + eps))[:, None]
    v = tl.where(live, x * root * weight + bias, 0.0)
    amax = tl.max(tl.abs(v), axis=1)
    rest_d = BLOCK_D + tl.arange(0, REST if REST > 0 else BLOCK_D)
    if REST > 0:
        rest = rest * root * load_vector(weight_ptr, rest_d, D)
        rest = tl.where(live, rest + load_vector(bias_ptr, rest_d, D), 0.0)
        amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=1))
    inverse, scale = row_scales(amax)
    tl.store(scale_ptr + r, scale, mask=r < T)
    q = (v * inverse[:, None]).to(tl.float8e4nv)
    at = q_row + d[None, :]
    if ALIGNED:
        at = tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 8))
    tl.store(at, q, mask=in_rows & (d < D)[None, :])
    squares = tl.sum(v * v, axis=1)
    if REST > 0:
        q = (rest * inverse[:, None]).to(tl.float8e4nv)
        at = q_row + rest_d[None, :]
        if ALIGNED:
            at = tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 8))
        tl.store(at, q, mask=in_rows & (rest_d < D)[None, :])
        squares += tl.sum(rest * rest, axis=1)
    store_bounds(bound_ptr, norms_ptr, r, T, squares)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _norm_fp8_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    offset_ptr,  # [D] fp32 or None
    live_ptr,  # [1] or None
    q_ptr,  # [T, D]
    scale_ptr,  # [T]
    norms_ptr,  # [2] or None
    bound_ptr,  # [T] or None
    T,
    stride_qt,
    eps,
    D: tl.constexpr,
    IS_RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,  # width of the second block of a row, or 0
    # rows of q start at multiples of 8: a thread then writes the columns that it has read of x, and
    # none are exchanged between threads for stores of 16
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    offset = load_vector(offset_ptr, d, D)
    weight = offset  # read below, or behind the sums
    bias = offset
    if PDL:
        weight = load_vector(weight_ptr, d, D)
        bias = load_vector(bias_ptr, d, D)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_live = T
    if live_ptr is not None:
        num_live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    # as in norm.py: nearly all programs have live rows alone
    if (tl.program_id(0) + 1) * ROWS <= num_live:
        whole = tl.full([ROWS, 1], 1, tl.int1)
        _norm_fp8_rows(
            x_ptr, weight_ptr, bias_ptr, offset_ptr, q_ptr, scale_ptr, norms_ptr, bound_ptr,
            offset, weight, bias, r, whole, whole, T, stride_qt, eps,
            D, IS_RMS, BLOCK_D, REST, ALIGNED, PDL,
        )  # fmt: skip
    else:
        _norm_fp8_rows(
            x_ptr, weight_ptr, bias_ptr, offset_ptr, q_ptr, scale_ptr, norms_ptr, bound_ptr,
            offset, weight, bias, r, (r < num_live)[:, None], (r < T)[:, None], T, stride_qt, eps,
            D, IS_RMS, BLOCK_D, REST, ALIGNED, PDL,
        )  # fmt: skip


def norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    bounds: Bounds | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of the normalised rows of `x`.

    Args:
        x: [T, D], contiguous.
        weight, bias: [D]; `bias` is None for RMSNorm.
        kind: "layer" or "rms".
        offset: [D] fp32 (fp64 for fp64), added to every row first.
        live_rows: int32 [1] on the device.
        bounds: What to write the bounds of the rows into.
        out: (q, scale) to write into, rows of q with adjacent elements; new tensors if None.

    Raises:
        ValueError: a shape, layout or `kind` that is not as above, or D over `norm.MAX_D`.
    """
    T, D = x.shape
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm_fp8: kind = {kind!r}; use 'layer' or 'rms'")
    for name, vector in (("weight", weight), ("bias", bias), ("offset", offset)):
        if vector is not None and (vector.shape != (D,) or not vector.is_contiguous()):
            raise ValueError(
                f"norm_fp8: {name} {tuple(vector.shape)} must be [{D}], the width of x, contiguous"
            )
    if D > MAX_D:
        raise ValueError(f"norm_fp8: D = {D} is over the limit of {MAX_D}")
    if not x.is_contiguous():
        raise ValueError(f"norm_fp8: x must be contiguous, its strides are {x.stride()}")
    check_live_rows("norm_fp8", x, live_rows)
    check_bounds("norm_fp8", bounds, T)
    if out is not None:
        check_quantized("norm_fp8", *out, T, D)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        v = _normed(x, weight, bias, eps, kind, offset, num_live)
        if bounds is not None:
            bounds.out.copy_(bound_ref(v, bounds))
        q, scale = quantize_ref(v)
        return (q, scale) if out is None else (out[0].copy_(q), out[1].copy_(scale))
    q, scale = out or (x.new_empty((T, D), dtype=FP8), x.new_empty(T, dtype=torch.float32))
    if T == 0:
        return q, scale
    launch = config(T, D)
    block_d, rest = blocks(D, launch)
    launch_kernel(
        _norm_fp8_kernel, (ceil_div(T, launch.rows),),
        x, weight, bias, offset, live_rows, q, scale, bounds and bounds.norms,
        bounds and bounds.out, T, q.stride(0), eps, D=D,
        IS_RMS=kind == "rms", ROWS=launch.rows, BLOCK_D=block_d, REST=rest,
        ALIGNED=q.data_ptr() % 8 == 0 and q.stride(0) % 8 == 0,
        num_warps=launch.num_warps, **pdl_options(x),
    )  # fmt: skip
    return q, scale


@torch.library.custom_op("vitgraph::norm_fp8", mutates_args=())
def norm_fp8_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    offset: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_fp8` into new tensors as a registered operator."""
    return norm_fp8(x, weight, bias, eps, kind=kind, offset=offset, live_rows=live_rows)


@norm_fp8_op.register_fake
def _(x, weight, bias, eps, kind, offset=None, live_rows=None):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
