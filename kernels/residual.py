"""The residual stream as a tensor: what it left out added back.

    state = x + offset

x and state [T, D], offset [D] fp32 or None: the sum of the biases deferred so far (see `norm`). The
sum is taken in fp32 (fp64 for fp64) and rounded once. Rows at or past the live ones are written as
zeros. With `partials` [S, T, D] fp32, x += sum(partials) in live rows, rounded and written back,
comes first (gemm_few_rows.py). Memory-bound: 2*T*D elements moved.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .partials import add_partials_ref, check_partials, load_stream, num_partials
from .pdl import pdl_options, wait_for_previous
from .roofline import Cost

BLOCK_T = 4


def residual_ref(
    x: torch.Tensor,
    offset: torch.Tensor | None,
    num_live: int | None = None,
    partials: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition; `num_live` is a Python int here, and x stays as it is."""
    if partials is not None:
        x = add_partials_ref(x, partials, num_live)
    n = x.shape[0] if num_live is None else num_live
    live = x[:n] if offset is None else (x[:n] + offset).to(x.dtype)
    return torch.cat([live, torch.zeros_like(x[n:])])


def cost(T: int, D: int, dtype: torch.dtype) -> Cost:
    """One read and one write of the stream."""
    return Cost(flops=T * D, bytes=2 * T * D * dtype.itemsize + 4 * D)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _residual_kernel(
    x_ptr,  # [T, D]
    partials_ptr,  # [SPLITS, T, D] fp32 or None
    offset_ptr,  # [D] fp32 or None
    live_ptr,  # [1] or None
    out_ptr,  # [T, D]
    T,
    D,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    wait_for_previous(PDL)
    live = (t < num_live)[:, None]
    in_row = (d < D)[None, :]
    at = t[:, None].to(tl.int64) * D + d[None, :]
    x = load_stream(x_ptr, partials_ptr, at, live & in_row, T.to(tl.int64) * D, SPLITS)
    if offset_ptr is not None:
        x += tl.load(offset_ptr + d, mask=d < D, other=0.0)[None, :]
    x = tl.where(live, x, 0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_row)


def residual(
    x: torch.Tensor,
    offset: torch.Tensor | None,
    *,
    live_rows: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x + offset`, with zeros in the padding rows; see the module docstring.

    Raises:
        ValueError: `offset` is not [D], `partials` not [S, T, D] fp32, or `x` not contiguous.
    """
    T, D = x.shape
    if offset is not None and offset.shape != (D,):
        raise ValueError(f"residual: offset {tuple(offset.shape)} must be [{D}], the width of x")
    if not x.is_contiguous():
        raise ValueError(f"residual: x must be contiguous, its strides are {x.stride()}")
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(
            f"residual: out must be contiguous {list(x.shape)}, got {list(out.shape)} with strides "
            f"{out.stride()}"
        )
    check_partials("residual", x, partials)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        if partials is not None:
            x.copy_(add_partials_ref(x, partials, num_live))
        state = residual_ref(x, offset, num_live)
        return state if out is None else out.copy_(state)
    state = torch.empty_like(x) if out is None else out
    if T == 0:
        return state
    launch_kernel(
        _residual_kernel, (triton.cdiv(T, BLOCK_T),),
        x, partials, offset, live_rows, state, T, D,
        SPLITS=num_partials(partials),
        BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(D), **pdl_options(x),
    )  # fmt: skip
    return state


@torch.library.custom_op("vitgraph::residual", mutates_args=())
def residual_op(
    x: torch.Tensor, offset: torch.Tensor | None, live_rows: torch.Tensor | None
) -> torch.Tensor:
    """`residual` as an operator that torch.compile can trace around."""
    return residual(x, offset, live_rows=live_rows)


@residual_op.register_fake
def _(x, offset, live_rows):
    return torch.empty_like(x)
