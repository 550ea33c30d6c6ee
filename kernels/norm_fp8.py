"""Residual add, norm and quantisation in one pass: what the next fp8 product reads.

    x = x + y                  y: the product that the stream still lacks, or None
    v = norm(x + offset)       layer or rms, as in norm.py
    q, scale = fp8 of v        as in quantize.py

x and y [T, D], contiguous, x updated in place and rounded to its dtype before the norm; weight,
bias [D]; offset [D] fp32 or None; q [T, D] float8_e4m3fn; scale [T] fp32. All arithmetic is fp32.
Rows at or past the live ones: x and y are neither read nor written, q is zero and scale that of a
zero row.

Memory-bound: in bf16 7*T*D bytes with y, 3*T*D without.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .norm import MAX_D, NormConfig, norm_ref
from .quantize import FP8, check_quantized, quantize_ref, row_scales
from .rows import ceil_div, check_live_rows


def config(D: int) -> NormConfig:
    """One row a program: a second stream to read gives each thread enough loads in flight."""
    return NormConfig(rows=1, num_warps=4 if D <= 2048 else 8 if D <= 8192 else 16)


def norm_fp8_ref(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    num_live: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition: (new x, q, scale); `num_live` is a Python int here."""
    n = x.shape[0] if num_live is None else num_live
    if y is not None:
        live = (x[:n].float() + y[:n].float()).to(x.dtype)
        x = torch.cat([live, x[n:]])
    v = norm_ref(
        x[:n].float(), weight.float(), None if bias is None else bias.float(), eps,
        kind=kind, offset=None if offset is None else offset.float(),
    )  # fmt: skip
    padded = torch.cat([v, v.new_zeros(x.shape[0] - n, x.shape[1])])
    return x, *quantize_ref(padded)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _norm_fp8_kernel(
    x_ptr,  # [T, D], updated if y is given
    y_ptr,  # [T, D] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    offset_ptr,  # [D] fp32 or None
    live_ptr,  # [1] or None
    q_ptr,  # [T, D]
    scale_ptr,  # [T]
    T,
    D,
    eps,
    IS_RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    # rows past T are neither live nor written
    live = (r < tl.minimum(num_live, T))[:, None]
    mask = live & in_row[None, :]
    # int64 before the multiply: T * D passes 2**31 at 1.9M rows of width 1152
    at = r[:, None].to(tl.int64) * D + d[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        x += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        stream = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, stream, mask=mask)
        x = stream.to(tl.float32)
    if offset_ptr is not None:
        x += tl.load(offset_ptr + d, mask=in_row, other=0.0)[None, :]
    if IS_RMS:
        centred = x
    else:
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    root = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    v = centred * root[:, None]
    v *= tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + d, mask=in_row, other=0.0).to(tl.float32)[None, :]
    v = tl.where(live, v, 0.0)
    inverse, scale = row_scales(tl.max(tl.abs(v), axis=1))
    tl.store(scale_ptr + r, scale, mask=r < T)
    q = (v * inverse[:, None]).to(tl.float8e4nv)
    tl.store(q_ptr + at, q, mask=(r < T)[:, None] & in_row[None, :])


def norm_fp8(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of the normalised rows of `x`, to which `y` is added in place first.

    Args:
        x: [T, D], contiguous; changed if `y` is given.
        y: [T, D], contiguous, in the dtype of `x`, or None.
        weight, bias: [D]; `bias` is None for RMSNorm.
        kind: "layer" or "rms".
        offset: [D] fp32 (fp64 for fp64), added to every row for the norm only.
        live_rows: int32 [1] on the device.
        out: (q, scale) to write into; new tensors if None.

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
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype or not y.is_contiguous()):
        raise ValueError(
            f"norm_fp8: y must be contiguous {x.dtype} {list(x.shape)}, got {y.dtype} "
            f"{list(y.shape)} with strides {y.stride()}"
        )
    check_live_rows("norm_fp8", x, live_rows)
    if out is not None:
        check_quantized("norm_fp8", *out, T, D)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        stream, q, scale = norm_fp8_ref(
            x, y, weight, bias, eps, kind=kind, offset=offset, num_live=num_live
        )
        if y is not None:
            x.copy_(stream)
        return (q, scale) if out is None else (out[0].copy_(q), out[1].copy_(scale))
    q, scale = out or (x.new_empty((T, D), dtype=FP8), x.new_empty(T, dtype=torch.float32))
    if T == 0:
        return q, scale
    launch = config(D)
    launch_kernel(
        _norm_fp8_kernel, (ceil_div(T, launch.rows),),
        x, y, weight, bias, offset, live_rows, q, scale, T, D, eps,
        IS_RMS=kind == "rms", ROWS=launch.rows, BLOCK_D=triton.next_power_of_2(D),
        num_warps=launch.num_warps,
    )  # fmt: skip
    return q, scale


@torch.library.custom_op("vitgraph::norm_fp8_", mutates_args=("x",))
def norm_fp8_op(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    offset: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_fp8` into new tensors as a registered operator."""
    return norm_fp8(x, y, weight, bias, eps, kind=kind, offset=offset, live_rows=live_rows)


@norm_fp8_op.register_fake
def _(x, y, weight, bias, eps, kind, offset=None, live_rows=None):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
