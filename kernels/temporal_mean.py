"""Mean over the frames of each item, in merge-block order: what Kimi's merger hands on.

    out[q] = 1 / t * sum_f x[first + f * h * w + row(q) * w + column(q)]

x [T, D] holds items of t * h * w rows, frame by frame and row by row, and out [Q, D] their h * w
means: block row, block column, then row and column inside a `merge x merge` block, so that
out.view(-1, merge^2 * D) has a token in each row. Items and sizes are read from grid [I, 3] int32
(t, h, w), whose rows past the live items are zero. Sums are fp32 (fp64 for fp64), with one rounding
at the end; a single frame is moved as it is. Rows of `out` past the live ones are left alone.

Memory-bound: x is read once, out written once.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .layout import BLOCK_I, find_item
from .roofline import Cost
from .token_pruning import check_grid

BLOCK_Q, BLOCK_D = 16, 128


def temporal_mean_ref(x: torch.Tensor, grid: torch.Tensor, *, merge: int) -> torch.Tensor:
    """Plain PyTorch definition, item by item; the live rows of `out`, in the dtype of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    means, start = [x[:0]], 0
    for t, h, w in grid.tolist():
        frames = x[start : start + t * h * w].to(wide)
        start += t * h * w
        if t:
            blocks = frames.view(t, h // merge, merge, w // merge, merge, -1).mean(0)
            means.append(blocks.transpose(1, 2).reshape(h * w, -1).to(x.dtype))
    return torch.cat(means)


def cost(T: int, Q: int, D: int, dtype: torch.dtype) -> Cost:
    """x read once, out written once; an addition for each element read."""
    return Cost(flops=T * D, bytes=(T + Q) * D * dtype.itemsize)


@triton.jit(do_not_specialize=["Q", "num_items"])  # one compilation for all sizes
def _temporal_mean_kernel(
    x_ptr,  # [T, D]
    grid_ptr,  # [I, 3]
    out_ptr,  # [Q, D]
    Q,
    D,
    num_items,
    MERGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item, first, first_row, total = find_item(q, grid_ptr, num_items, 4, 0, BLOCK_I)
    live = q < tl.minimum(total, Q)
    t = tl.load(grid_ptr + 3 * item, mask=live, other=1)
    h = tl.load(grid_ptr + 3 * item + 1, mask=live, other=MERGE)
    w = tl.load(grid_ptr + 3 * item + 2, mask=live, other=MERGE)
    block = (q - first) // (MERGE * MERGE)
    within = (q - first) % (MERGE * MERGE)
    row = block // (w // MERGE) * MERGE + within // MERGE
    column = block % (w // MERGE) * MERGE + within % MERGE
    # int64 before the multiply: T * D passes 2**31 at 1.9M rows of width 1152
    at = x_ptr + (first_row + row * w + column)[:, None].to(tl.int64) * D + d[None, :]
    frame = (h * w)[:, None].to(tl.int64) * D
    total_sum = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    in_d = (d < D)[None, :]
    for f in range(0, tl.max(tl.where(live, t, 0), axis=0)):
        mask = (live & (f < t))[:, None] & in_d
        total_sum += tl.load(at + f * frame, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(total_sum, t.to(tl.float32)[:, None])
    to = out_ptr + q[:, None].to(tl.int64) * D + d[None, :]
    tl.store(to, mean.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_d)


def temporal_mean(
    x: torch.Tensor, grid: torch.Tensor, *, merge: int, out: torch.Tensor
) -> torch.Tensor:
    """Write the means of `x` to `out` and return it; see the module docstring.

    Args:
        x: [T, D], contiguous.
        grid: [I, 3] int32 contiguous. Its items must fit T and Q, and its sides be multiples of
            `merge`; the caller checks that on the host, where the grids come from.
        merge: patches along a side of a merge block.
        out: [Q, D], contiguous, in the dtype of `x`.

    Raises:
        ValueError: a shape, layout or dtype that is not as above.
    """
    check_grid("temporal_mean", x, grid, merge)
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(
            f"temporal_mean: x must be contiguous [T, D], got {tuple(x.shape)} with strides "
            f"{x.stride()}"
        )
    D = x.shape[1]
    is_like = out.dtype == x.dtype and out.device == x.device and out.is_contiguous()
    if out.ndim != 2 or out.shape[1] != D or not is_like:
        raise ValueError(
            f"temporal_mean: out must be contiguous [Q, {D}] {x.dtype} on {x.device}, got "
            f"{tuple(out.shape)} {out.dtype} with strides {out.stride()} on {out.device}"
        )
    if use_reference(x):
        means = temporal_mean_ref(x, grid, merge=merge)
        out[: len(means)] = means
        return out
    if out.numel() == 0:
        return out
    launch_kernel(
        _temporal_mean_kernel, (triton.cdiv(D, BLOCK_D), triton.cdiv(len(out), BLOCK_Q)),
        x, grid, out, len(out), D, grid.shape[0],
        MERGE=merge, BLOCK_Q=BLOCK_Q, BLOCK_D=BLOCK_D, BLOCK_I=BLOCK_I,
    )  # fmt: skip
    return out


@torch.library.custom_op("vitgraph::temporal_mean", mutates_args=("out",))
def temporal_mean_op(x: torch.Tensor, grid: torch.Tensor, merge: int, out: torch.Tensor) -> None:
    """`temporal_mean` as an operator that torch.compile can trace around."""
    temporal_mean(x, grid, merge=merge, out=out)


@temporal_mean_op.register_fake
def _(x, grid, merge, out):
    return None
