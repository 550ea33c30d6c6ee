"""SwiGLU gate over the live rows.

    out[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f]    for t < live_rows

With a limit, gates are at most that, and ups between it and its negative, before.

gate_up is [T, 2F] (all gates, then all ups) and out [T, F], fp32, fp16 or bf16, elements of a row
adjacent; computed in fp32 and rounded once. Rows of `out` from `live_rows` on are left alone.
Memory-bound: 3*T*F elements moved. https://arxiv.org/abs/2002.05202
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .activation import apply_activation
from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost
from .rows import ceil_div, check_live_rows, row_programs

BLOCK_T, BLOCK_F = 4, 512


def swiglu_ref(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of `gate_up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def cost(T: int, F: int, dtype: torch.dtype) -> Cost:
    """Least work and traffic for an output of [T, F]."""
    return Cost(flops=6 * T * F, bytes=3 * T * F * dtype.itemsize)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # [T, 2F]
    out_ptr,  # [T, F]
    live_ptr,  # [1] int32 or None
    T,
    F,
    stride_gt,
    stride_ot,
    LIMIT: tl.constexpr,  # None for none
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    live = T
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), T)
    blocks_f = tl.cdiv(F, BLOCK_F)
    for block in range(tl.program_id(0), tl.cdiv(live, BLOCK_T) * blocks_f, tl.num_programs(0)):
        t = (block // blocks_f) * BLOCK_T + tl.arange(0, BLOCK_T)
        f = (block % blocks_f) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (t < live)[:, None] & (f < F)[None, :]
        t = t.to(tl.int64)[:, None]
        gates = gate_up_ptr + t * stride_gt + f[None, :]
        gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gates + F, mask=mask, other=0.0).to(tl.float32)
        if LIMIT is not None:
            # what is NaN stays so
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = apply_activation(gate, "silu", out_ptr.dtype.element_ty == tl.float32) * up
        out = out_ptr + t * stride_ot + f[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(
    gate_up: torch.Tensor,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """Gate the live rows of `gate_up` [T, 2F] into `out` [T, F] (a new tensor if None).

    `limit` bounds both halves first; see the module docstring. Rows of a new tensor from
    `live_rows` on are uninitialised.

    Raises:
        ValueError: an odd width, an `out` of another shape or dtype, elements of a row that are
            not adjacent, `live_rows` that is not one int32 on the device, or a `limit` that is not
            positive.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            "swiglu: gate_up must be [T, 2F] with adjacent elements in a row, got shape "
            f"{tuple(gate_up.shape)} and strides {gate_up.stride()}"
        )
    T, features = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((T, features), dtype=gate_up.dtype, device=gate_up.device)
    if (
        out.shape != (T, features)
        or out.dtype != gate_up.dtype
        or (features > 1 and out.stride(1) != 1)
    ):
        raise ValueError(
            f"swiglu: out must be [{T}, {features}] {gate_up.dtype} with adjacent elements in a "
            f"row, got {tuple(out.shape)} {out.dtype} with strides {out.stride()}"
        )
    if limit is not None and not limit > 0:
        raise ValueError(f"swiglu: limit = {limit} must be positive; None is no limit")
    check_live_rows("swiglu", gate_up, live_rows)
    if out.numel() == 0:
        return out
    if use_reference(gate_up):
        live = T if live_rows is None else min(int(live_rows), T)
        out[:live].copy_(swiglu_ref(gate_up[:live], limit))
        return out
    blocks = ceil_div(T, BLOCK_T) * ceil_div(features, BLOCK_F)
    launch_kernel(
        _swiglu_kernel, (row_programs(gate_up.device, blocks),),
        gate_up, out, live_rows, T, features, gate_up.stride(0), out.stride(0),
        LIMIT=limit, BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F,
    )  # fmt: skip
    return out


@torch.library.custom_op("vitgraph::swiglu", mutates_args=())
def swiglu_op(
    gate_up: torch.Tensor, live_rows: torch.Tensor | None = None, limit: float | None = None
) -> torch.Tensor:
    """`swiglu` into a new tensor as a registered operator."""
    return swiglu(gate_up, None, live_rows, limit)


@swiglu_op.register_fake
def _(gate_up, live_rows=None, limit=None):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
