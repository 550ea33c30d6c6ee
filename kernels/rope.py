"""Rotary position embedding of q and k, in place in the fused qkv buffer, maybe after a norm.

    x  = x / sqrt(mean(x^2) + eps) * weight        of each head, with a weight only
    y1 = x1 * cos - x2 * sin        x1, x2 the lower and upper half of a head, or
    y2 = x2 * cos + x1 * sin        with `neighbours` its even and odd elements

Shapes: qkv [T, 3, H, D] contiguous; cos, sin [P, D/2] fp32, row t takes angles t % P, so that
images of one size can share theirs; weight [2D]: that of q, then that of k. Norm and rotation are
fp32 whatever the dtype of qkv (fp64 for fp64), with one rounding at the end. v and the rows past
the live ones stay as they are. Memory-bound: q and k are read and written once, 4*T*H*D elements.
https://arxiv.org/abs/2104.09864, in the half-split form of Hugging Face's towers or, where rows of
the weights have been reordered for it, in its first one: there rotary_linear.py can rotate in the
epilogue of the product.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import pdl_options, wait_for_previous
from .roofline import Cost
from .rows import ceil_div

WIDE_UNIT = 16  # bytes that are loaded at once at best
UNITS = 256  # of a program of `_rope_units_kernel` and `_rope_neighbours_kernel`


def rope_ref(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neighbours: bool = False
) -> torch.Tensor:
    """Plain PyTorch definition for x [T, heads, D]; returns a new tensor of the same dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    x1, x2 = wide.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else wide.chunk(2, -1)
    y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return (torch.stack(y, -1).flatten(-2) if neighbours else torch.cat(y, -1)).to(x.dtype)


def head_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the heads of x [T, 2, H, D], q and k, with weight [2D]; fp32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.view(2, 1, -1).to(wide.dtype)


def cost(T: int, H: int, D: int, dtype: torch.dtype) -> Cost:
    """q and k read and written once, cos and sin read once."""
    return Cost(flops=6 * T * H * D, bytes=4 * T * H * D * dtype.itemsize + 4 * T * D)


@triton.jit(do_not_specialize=["num_angles"])  # one compilation for all row counts
def _rope_kernel(
    qkv_ptr,  # [T, 3, H, 2 * HALF]
    cos_ptr,  # [num_angles, HALF]
    sin_ptr,  # [num_angles, HALF]
    live_ptr,  # [1] or None
    num_angles,
    weight_ptr,  # [2, 2 * HALF] or None
    EPS: tl.constexpr,
    HEADS: tl.constexpr,  # 2 * H: q and k lie side by side
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    t = tl.program_id(0)
    live = t + 1
    if live_ptr is not None:
        live = tl.load(live_ptr)
    wait_for_previous(PDL)
    if t >= live:
        return
    h = tl.arange(0, BLOCK_H)
    j = tl.arange(0, BLOCK_HALF)
    in_half = j < HALF
    mask = (h < HEADS)[:, None] & in_half[None, :]
    base = t.to(tl.int64) * (HEADS // 2 * 3 * 2 * HALF)
    at = qkv_ptr + base + h[:, None] * (2 * HALF) + j[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        scale = (1.0 / tl.sqrt(squares / (2 * HALF) + EPS))[:, None]
        weight = weight_ptr + (h >= HEADS // 2).to(tl.int32)[:, None] * (2 * HALF) + j[None, :]
        x1 *= scale * tl.load(weight, mask=mask, other=0.0).to(tl.float32)
        x2 *= scale * tl.load(weight + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = (t % num_angles).to(tl.int64) * HALF + j
    cos = tl.load(cos_ptr + angle, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=in_half, other=0.0)[None, :]
    dtype = qkv_ptr.dtype.element_ty
    tl.store(at, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(at + HALF, (x2 * cos + x1 * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "num_angles"])
def _rope_units_kernel(
    qkv_ptr,  # [T, 3, H, 2 * HALF]
    cos_ptr,  # [num_angles, HALF]
    sin_ptr,  # [num_angles, HALF]
    live_ptr,  # [1] or None
    T,
    num_angles,
    HEADS: tl.constexpr,  # 2 * H: q and k lie side by side
    HALF: tl.constexpr,
    UNIT: tl.constexpr,  # adjacent elements that are loaded at once; divides HALF
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Units of all rows and heads in a line, so that no lane is idle.

    The other kernel's block is the next power of two: half a head of 72 leaves 28 of 64 lanes
    without work, and loads of 8 bytes, since it does not start at a multiple of 16.
    """
    live = T
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    units: tl.constexpr = HALF // UNIT
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = i // (HEADS * units)
    h = i // units % HEADS
    j = i % units * UNIT
    element = tl.arange(0, UNIT)[None, :]
    mask = (t < live)[:, None]
    row = t.to(tl.int64) * (HEADS // 2 * 3 * 2 * HALF)
    at = qkv_ptr + (row + h * (2 * HALF) + j)[:, None] + element
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = ((t % num_angles).to(tl.int64) * HALF + j)[:, None] + element
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    dtype = qkv_ptr.dtype.element_ty
    tl.store(at, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(at + HALF, (x2 * cos + x1 * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T", "num_angles"])
def _rope_neighbours_kernel(
    qkv_ptr,  # [T, 3, H, 2 * HALF]
    cos_ptr,  # [num_angles, HALF]
    sin_ptr,  # [num_angles, HALF]
    live_ptr,  # [1] or None
    T,
    num_angles,
    HEADS: tl.constexpr,  # 2 * H: q and k lie side by side
    HALF: tl.constexpr,
    UNIT: tl.constexpr,  # adjacent pairs that are loaded at once; divides HALF
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `_rope_units_kernel`, where the two elements of a pair lie side by side."""
    live = T
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    units: tl.constexpr = HALF // UNIT
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = i // (HEADS * units)
    mask = (t < live)[:, None]
    row = t.to(tl.int64) * (HEADS // 2 * 3 * 2 * HALF)
    unit = i % (HEADS * units) * (2 * UNIT)
    at = qkv_ptr + (row + unit)[:, None] + tl.arange(0, 2 * UNIT)[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x1, x2 = tl.split(x.reshape(BLOCK, UNIT, 2))
    angle = (t % num_angles).to(tl.int64) * HALF + i % units * UNIT
    angle = angle[:, None] + tl.arange(0, UNIT)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin).reshape(BLOCK, 2 * UNIT)
    tl.store(at, y.to(qkv_ptr.dtype.element_ty), mask=mask)


def rope_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    live_rows: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    neighbours: bool = False,
) -> torch.Tensor:
    """Rotate q and k of `qkv` in place and return it; see the module docstring.

    Args:
        qkv: [T, 3, H, D], contiguous, D even.
        cos, sin: [P, D/2] fp32 (fp64 for fp64), T a multiple of P.
        live_rows: int32 [1]; rows from there on are left as they are.
        weight: [2D] of an RMSNorm of each head before the rotation, q's then k's; None for none.
        eps: of that norm.
        neighbours: how the pairs lie.

    Raises:
        ValueError: shapes disagree, a tensor is not contiguous, or a weight and `neighbours`.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2 or not qkv.is_contiguous():
        raise ValueError(
            f"rope_: qkv must be contiguous [T, 3, H, D] with D even, got {tuple(qkv.shape)} "
            f"with strides {qkv.stride()}"
        )
    T, _, H, D = qkv.shape
    for name, table in (("cos", cos), ("sin", sin)):
        whole = table.ndim == 2 and T % max(len(table), 1) == 0 and len(table) == len(cos)
        if not whole or table.shape[1] != D // 2 or not table.is_contiguous():
            raise ValueError(
                f"rope_: {name} must be contiguous [{T}, {D // 2}], or [P, {D // 2}] where P "
                f"divides {T}, got {tuple(table.shape)}"
            )
    if weight is not None and (weight.shape != (2 * D,) or not weight.is_contiguous()):
        raise ValueError(
            f"rope_: weight must be contiguous [{2 * D}], q's and k's, got {tuple(weight.shape)}"
        )
    if weight is not None and neighbours:
        raise ValueError("rope_: a norm comes before the rotation of halves only; leave one out")
    if use_reference(qkv):
        n = T if live_rows is None else int(live_rows)
        if len(cos) < T:
            cos, sin = cos.repeat(T // len(cos), 1), sin.repeat(T // len(sin), 1)
        qk = qkv[:n, :2]
        if weight is not None:
            qk = head_norm_ref(qk, weight, eps)
        turned = rope_ref(qk.flatten(1, 2), cos[:n], sin[:n], neighbours=neighbours)
        qkv[:n, :2] = turned.view(n, 2, H, D)
        return qkv
    if T == 0:
        return qkv
    half, heads = D // 2, 2 * H
    unit = half & -half  # the largest power of two that divides it
    if neighbours:
        unit = min(unit, WIDE_UNIT // (2 * qkv.itemsize))
    units = T * heads * (half // unit)
    if neighbours and units >= 2**31 - UNITS:
        raise ValueError(
            f"rope_: qkv has {units} units of {unit} pairs, over the limit of {2**31 - UNITS}; "
            "rotate it in parts"
        )
    if neighbours or (weight is None and unit * qkv.itemsize < WIDE_UNIT and units < 2**31 - UNITS):
        launch_kernel(
            _rope_neighbours_kernel if neighbours else _rope_units_kernel,
            (ceil_div(units, UNITS),),
            qkv, cos, sin, live_rows, T, len(cos), HEADS=heads, HALF=half, UNIT=unit, BLOCK=UNITS,
            num_warps=8, **pdl_options(qkv),
        )  # fmt: skip
        return qkv
    launch_kernel(
        _rope_kernel, (T,), qkv, cos, sin, live_rows, len(cos), weight,
        EPS=eps if weight is not None else 0.0, HEADS=heads, HALF=half,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_HALF=triton.next_power_of_2(half),
        **pdl_options(qkv),
    )  # fmt: skip
    return qkv


@torch.library.custom_op("vitgraph::rope_", mutates_args=("qkv",))
def rope_op(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    live_rows: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    neighbours: bool = False,
) -> None:
    """`rope_` as an operator that torch.compile can trace around."""
    rope_(qkv, cos, sin, live_rows, weight, eps, neighbours=neighbours)


@rope_op.register_fake
def _(qkv, cos, sin, live_rows, weight=None, eps=1e-6, neighbours=False):
    return None
