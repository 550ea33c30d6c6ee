"""Attention of one query, the same for all, over each of the packed segments: pooling by a probe.

    out[i, h] = sum_j softmax_j(scale * q[h] . k[j, h]) v[j, h]      over the rows j of segment i

q [H, D] fp32 (fp64 for fp64), k and v [T, H, D] views whose rows are contiguous, cu_seqlens int32
[S + 1] whose tail repeats the last offset, out [S, H, D] contiguous in the dtype of k. Empty
segments give zeros. Scores, softmax and sums are fp32. Rows outside the segments are not read.

Memory-bound: k and v are read once. One program a segment and head, which walks over the rows.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost

BLOCK_N = 64


def probe_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of q; reads `cu_seqlens` on the host."""
    offsets = cu_seqlens.tolist()
    out = q.new_zeros(len(offsets) - 1, *q.shape)
    for i, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            scores = torch.einsum("hd,nhd->hn", q, k[begin:end].to(q.dtype)) * scale
            out[i] = torch.einsum("hn,nhd->hd", scores.softmax(1), v[begin:end].to(q.dtype))
    return out.to(k.dtype)


def cost(T: int, H: int, D: int, dtype: torch.dtype) -> Cost:
    """Two products a row and head; k and v read once."""
    return Cost(flops=4 * T * H * D, bytes=2 * T * H * D * dtype.itemsize)


@triton.jit
def _probe_attention_kernel(
    q_ptr,  # [H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    cu_seqlens_ptr,  # [S + 1]
    out_ptr,  # [S, H, D]
    stride_kt,
    stride_vt,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    segment = tl.program_id(1)
    begin = tl.load(cu_seqlens_ptr + segment)
    end = tl.load(cu_seqlens_ptr + segment + 1)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    # base 2: what the hardware computes
    q = tl.load(q_ptr + head * D + d, mask=in_d, other=0.0) * (scale * 1.4426950408889634)
    top = -float("inf")
    weight_sum = 0.0
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n < end)[:, None] & in_d[None, :]
        # int64 before the multiply: T * 2 * H * D passes 2**31 at 1M rows of width 1152
        row = n[:, None].to(tl.int64)
        k = tl.load(k_ptr + row * stride_kt + head * D + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + row * stride_vt + head * D + d[None, :], mask=mask, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
        scores = tl.where(n < end, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - new_top)
        shrink = tl.exp2(top - new_top)
        weight_sum = weight_sum * shrink + tl.sum(weights, 0)
        total = total * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        top = new_top
    out = total / tl.where(end > begin, weight_sum, 1.0)
    at = out_ptr + (segment.to(tl.int64) * tl.num_programs(0) + head) * D + d
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=in_d)


def probe_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """The attention of `q` over each segment of `k` and `v`: a new tensor [S, H, D].

    Args:
        q: [H, D] contiguous, fp32 (fp64 for fp64).
        k, v: [T, H, D] views, rows contiguous.
        cu_seqlens: int32 [S + 1] contiguous; its tail repeats the last offset.
        scale: factor of the scores.

    Raises:
        ValueError: a shape, layout or device that is not as above.
        TypeError: dtypes that are not as above.
    """
    H, D = q.shape
    if k.shape != v.shape or k.ndim != 3 or k.shape[1:] != q.shape:
        raise ValueError(
            f"probe_attention: k and v must be [T, {H}, {D}], as q is {[H, D]}; got "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    if not q.is_contiguous() or not k.stride()[1:] == v.stride()[1:] == (D, 1):
        raise ValueError(
            "probe_attention: q and the rows of k and v must be contiguous; strides are "
            f"{q.stride()}, {k.stride()}, {v.stride()}"
        )
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"probe_attention: cu_seqlens must be contiguous [S + 1], got {list(cu_seqlens.shape)}"
        )
    if not q.device == k.device == v.device == cu_seqlens.device:
        devices = ", ".join(str(x.device) for x in (q, k, v, cu_seqlens))
        raise ValueError(f"probe_attention: operands must be on one device, they are on {devices}")
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    if k.dtype != v.dtype or q.dtype != wide or cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"probe_attention: k and v must share a dtype, with q {wide} and cu_seqlens int32; got "
            f"{k.dtype}, {v.dtype}, {q.dtype}, {cu_seqlens.dtype}"
        )
    if use_reference(k):
        return probe_attention_ref(q, k, v, cu_seqlens, scale=scale)
    S = len(cu_seqlens) - 1
    out = torch.empty(S, H, D, dtype=k.dtype, device=k.device)
    if out.numel() == 0:
        return out
    launch_kernel(
        _probe_attention_kernel, (H, S),
        q, k, v, cu_seqlens, out, k.stride(0), v.stride(0), scale,
        D=D, BLOCK_N=BLOCK_N, BLOCK_D=triton.next_power_of_2(D),
    )  # fmt: skip
    return out


@torch.library.custom_op("vitgraph::probe_attention", mutates_args=())
def probe_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """`probe_attention` as an operator that torch.compile can trace around."""
    return probe_attention(q, k, v, cu_seqlens, scale=scale)


@probe_attention_op.register_fake
def _(q, k, v, cu_seqlens, scale):
    return k.new_empty(cu_seqlens.shape[0] - 1, *q.shape)
