"""The residual stream as a tensor: what it left out added back.

    state = x + offset

x and state [T, D], offset [D] fp32: the sum of the biases deferred so far (see `norm`). The sum is
taken in fp32 (fp64 for fp64) and rounded once. Rows at or past the live ones are written as zeros.
Memory-bound: 2*T*D elements moved.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost

BLOCK_T = 4


def residual_ref(
    x: torch.Tensor, offset: torch.Tensor, num_live: int | None = None
) -> torch.Tensor:
    """Plain PyTorch definition; `num_live` is a Python int here."""
    n = x.shape[0] if num_live is None else num_live
    return torch.cat([(x[:n] + offset).to(x.dtype), torch.zeros_like(x[n:])])


def cost(T: int, D: int, dtype: torch.dtype) -> Cost:
    """One read and one write of the stream."""
    return Cost(flops=T * D, bytes=2 * T * D * dtype.itemsize + 4 * D)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _residual_kernel(
    x_ptr,  # [T, D]
    offset_ptr,  # [D] fp32
    live_ptr,  # [1] or None
    out_ptr,  # [T, D]
    T,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    live = (t < num_live)[:, None]
    in_row = (d < D)[None, :]
    at = t[:, None].to(tl.int64) * D + d[None, :]
    x = tl.load(x_ptr + at, mask=live & in_row, other=0.0).to(tl.float32)
    x += tl.load(offset_ptr + d, mask=d < D, other=0.0)[None, :]
    x = tl.where(live, x, 0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_row)


def residual(
    x: torch.Tensor,
    offset: torch.Tensor,
    *,
    live_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x + offset`, with zeros in the padding rows; see the module docstring.

    Raises:
        ValueError: `offset` is not [D], or `x` is not contiguous.
    """
    T, D = x.shape
    if offset.shape != (D,) or not x.is_contiguous():
        raise ValueError(
            f"residual: offset {tuple(offset.shape)} must be [{D}], and x contiguous "
            f"(strides {x.stride()})"
        )
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(
            f"residual: out must be contiguous {list(x.shape)}, got {list(out.shape)} with strides "
            f"{out.stride()}"
        )
    if use_reference(x):
        state = residual_ref(x, offset, None if live_rows is None else int(live_rows))
        return state if out is None else out.copy_(state)
    state = torch.empty_like(x) if out is None else out
    if T == 0:
        return state
    constants = {"BLOCK_T": BLOCK_T, "BLOCK_D": triton.next_power_of_2(D)}
    launch_kernel(
        _residual_kernel, (triton.cdiv(T, BLOCK_T),), x, offset, live_rows, state, T, D, **constants
    )
    return state


@torch.library.custom_op("vitgraph::residual", mutates_args=())
def residual_op(
    x: torch.Tensor, offset: torch.Tensor, live_rows: torch.Tensor | None
) -> torch.Tensor:
    """`residual` as an operator that torch.compile can trace around."""
    return residual(x, offset, live_rows=live_rows)


@residual_op.register_fake
def _(x, offset, live_rows):
    return torch.empty_like(x)
