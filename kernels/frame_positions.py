"""Fixed positions of the frames of a video, added to its patches.

    x[r] += table[f]        r in frame f of an item of several frames
    table[f] = (sin(f * w_0), sin(f * w_1), .., cos(f * w_0), ..)       w_j = 10000^(-2j / D)

x [T, D] holds items of t * h * w rows, frame by frame; the single frame of an image gets nothing.
Items and sizes are read from grid [I, 3] int32 (t, h, w), whose rows past the live items are zero.
table [F, D] is fp32 (fp64 for fp64), and so is the sum, with one rounding at the end. Rows past the
live ones are left as they are.

Memory-bound: the rows of videos are read and written once, and those of images not at all.
https://arxiv.org/abs/1706.03762
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .layout import BLOCK_I, find_item
from .roofline import Cost
from .token_pruning import check_grid

BLOCK_T, BLOCK_D = 16, 256


def frame_table(num_frames: int, width: int) -> torch.Tensor:
    """The table [num_frames, width] in fp32 on the CPU, by transformers' own roundings."""
    exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    angle = torch.outer(torch.arange(num_frames, dtype=torch.float32), 1.0 / 10000**exponent)
    return torch.cat([angle.sin(), angle.cos()], 1)


def add_frame_positions_ref(
    x: torch.Tensor, table: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    """Plain PyTorch definition, item by item; returns a new tensor."""
    y, start = x.clone(), 0
    for t, h, w in grid.tolist():
        rows = slice(start, start + t * h * w)
        if t > 1:
            frames = x[rows].to(table.dtype).view(t, h * w, -1) + table[:t, None]
            y[rows] = frames.flatten(0, 1).to(x.dtype)
        start = rows.stop
    return y


def cost(T: int, D: int, dtype: torch.dtype) -> Cost:
    """T rows of videos, read and written once."""
    return Cost(flops=T * D, bytes=2 * T * D * dtype.itemsize)


@triton.jit(do_not_specialize=["T", "num_items"])  # one compilation for all sizes
def _add_frame_positions_kernel(
    x_ptr,  # [T, D], updated
    table_ptr,  # [F, D] fp32
    grid_ptr,  # [I, 3]
    T,
    D,
    num_items,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    r = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    item, first, _, total = find_item(r, grid_ptr, num_items, 0, 0, BLOCK_I)
    live = r < tl.minimum(total, T)
    t = tl.load(grid_ptr + 3 * item, mask=live, other=1)
    h = tl.load(grid_ptr + 3 * item + 1, mask=live, other=1)
    w = tl.load(grid_ptr + 3 * item + 2, mask=live, other=1)
    mask = (live & (t > 1))[:, None] & (d < D)[None, :]
    frame = (r - first) // (h * w)
    at = x_ptr + r[:, None].to(tl.int64) * D + d[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(table_ptr + frame[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=mask)


def add_frame_positions_(x: torch.Tensor, table: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Add the positions of frames to the rows of videos in place, and return `x`.

    Args:
        x: [T, D], contiguous.
        table: [F, D] fp32 (fp64 for fp64), contiguous.
        grid: [I, 3] int32 contiguous. Its items must fit T, and have at most F frames; the caller
            checks that on the host, where the grids come from.

    Raises:
        ValueError: a shape, layout or dtype that is not as above.
    """
    check_grid("add_frame_positions_", x, grid, 1)
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(
            f"add_frame_positions_: x must be contiguous [T, D], got {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    T, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    is_table = table.ndim == 2 and table.shape[1] == D and table.is_contiguous()
    if not is_table or table.dtype != wide or table.device != x.device:
        raise ValueError(
            f"add_frame_positions_: table must be contiguous [F, {D}] {wide} on {x.device}, got "
            f"{tuple(table.shape)} {table.dtype} on {table.device}"
        )
    if use_reference(x):
        return x.copy_(add_frame_positions_ref(x, table, grid))
    if T == 0:
        return x
    launch_kernel(
        _add_frame_positions_kernel, (triton.cdiv(D, BLOCK_D), triton.cdiv(T, BLOCK_T)),
        x, table, grid, T, D, grid.shape[0], BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, BLOCK_I=BLOCK_I,
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::add_frame_positions_", mutates_args=("x",))
def add_frame_positions_op(x: torch.Tensor, table: torch.Tensor, grid: torch.Tensor) -> None:
    """`add_frame_positions_` as an operator that torch.compile can trace around."""
    add_frame_positions_(x, table, grid)


@add_frame_positions_op.register_fake
def _(x, table, grid):
    return None
