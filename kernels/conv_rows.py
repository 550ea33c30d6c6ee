"""The rows that a convolution over a grid multiplies, gathered: what makes it a linear layer.

    out[i*O + oy*OW + ox, (ky*k + kx)*D + d] = x[i*R + C + y*W + x', d] + offset[d]
        with y = oy*stride + ky - padding, x' = ox*stride + kx - padding, if they lie in the grid
    0 where they do not, and in rows past the live ones

Shapes: x [I*R, D], rows contiguous: for each of I items C rows that the convolution skips and a
grid of H x W rows, R = C + H*W; offset [D] fp32 (fp64 for fp64) or None: the sum of the biases that
the residual stream has left out so far; out [I*O, k*k*D], O = OH*OW, OH = (H + 2*padding - k) //
stride + 1. A weight [N, D, k, k] multiplies it as [N, k, k, D] flattened. Padding rows of x are not
read. Memory-bound: k*k*I*O*D elements are written, x comes from L2 after the first tap.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost
from .rows import check_live_rows

BLOCK_R, BLOCK_D = 16, 512  # a tile of 16 KiB in half precision


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Places of a convolution along an axis of `size` rows."""
    return (size + 2 * padding - kernel) // stride + 1


def conv_rows_ref(
    x: torch.Tensor,
    grid: tuple[int, int],
    *,
    skip: int,
    kernel: int,
    stride: int,
    padding: int,
    offset: torch.Tensor | None = None,
    num_live: int | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `conv_rows`; `num_live` is a Python int here."""
    (h, w), D = grid, x.shape[1]
    oh, ow = (out_size(n, kernel, stride, padding) for n in grid)
    items = x.shape[0] // (skip + h * w)
    n = items * oh * ow if num_live is None else num_live
    used = -(-n // (oh * ow)) if n else 0
    rows = x.view(items, skip + h * w, D)[:used, skip:]
    if offset is not None:
        rows = (rows + offset).to(x.dtype)
    image = rows.mT.reshape(used, D, h, w)
    columns = torch.nn.functional.unfold(image, kernel, stride=stride, padding=padding)
    columns = columns.view(used, D, kernel * kernel, oh * ow).permute(0, 3, 2, 1)
    gathered = columns.reshape(used * oh * ow, kernel * kernel * D)[:n]
    return torch.cat([gathered, x.new_zeros(items * oh * ow - n, gathered.shape[1])])


def cost(rows: int, D: int, kernel: int, stride: int, dtype: torch.dtype) -> Cost:
    """`rows` of the result are written, and the rows of x that they cover are read once."""
    elements = rows * D * (kernel * kernel + stride * stride)
    return Cost(flops=rows * kernel * kernel * D, bytes=elements * dtype.itemsize)


@triton.jit(do_not_specialize=["T"])  # one compilation for all numbers of items
def _conv_rows_kernel(
    x_ptr,  # [I * R, D]
    offset_ptr,  # [D] fp32 or None
    live_ptr,  # [1] or None
    out_ptr,  # [T, KERNEL^2 * D]
    T,
    D,
    R: tl.constexpr,
    SKIP: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OUT: tl.constexpr,
    OUT_W: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # the taps of the same rows run side by side, so that x is read from memory once
    tap = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    place = t % OUT
    y = (place // OUT_W) * STRIDE + tap // KERNEL - PADDING
    x = (place % OUT_W) * STRIDE + tap % KERNEL - PADDING
    inside = (t < num_live) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    # int64 before the multiplies: 150 images of 52 x 52 rows of 9 * 3072 values pass 2**31
    row = (t // OUT).to(tl.int64) * R + SKIP + y * W + x
    to = out_ptr + (t.to(tl.int64) * (KERNEL * KERNEL) + tap)[:, None] * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        value = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + d, mask=d < D, other=0.0)[None, :]
            value = tl.where(mask, value.to(tl.float32) + offset, 0.0).to(value.dtype)
        tl.store(to + d[None, :], value, mask=(t < T)[:, None] & (d < D)[None, :])


def conv_rows(
    x: torch.Tensor,
    grid: tuple[int, int],
    *,
    skip: int = 0,
    kernel: int,
    stride: int,
    padding: int,
    offset: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather the rows of a convolution; see the module docstring.

    Args:
        x: [I * (skip + h*w), D], contiguous.
        grid: (h, w), rows and columns of the grid of an item.
        skip: rows in front of each item's grid.
        kernel, stride, padding: of a square convolution.
        offset: [D] fp32 (fp64 for fp64), added to every row of x that is read.
        live_rows: int32 [1], of rows of the result; rows from there on are zeros.

    Raises:
        ValueError: a shape or layout that is not as above, or a kernel that the grid cannot hold.
    """
    h, w = grid
    R = skip + h * w
    if x.ndim != 2 or not x.is_contiguous() or x.shape[0] % R:
        raise ValueError(
            f"conv_rows: x must be contiguous, whole items of {R} rows, got {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    oh, ow = (out_size(n, kernel, stride, padding) for n in grid)
    if min(oh, ow) < 1 or padding >= kernel:
        raise ValueError(
            f"conv_rows: kernel = {kernel} with stride = {stride} and padding = {padding} does not "
            f"fit a grid of {h} x {w} rows"
        )
    D = x.shape[1]
    if offset is not None and (offset.shape != (D,) or not offset.is_contiguous()):
        raise ValueError(f"conv_rows: offset {tuple(offset.shape)} must be contiguous [{D}]")
    check_live_rows("conv_rows", x, live_rows)
    if use_reference(x):
        return conv_rows_ref(
            x, grid, skip=skip, kernel=kernel, stride=stride, padding=padding, offset=offset,
            num_live=None if live_rows is None else int(live_rows),
        )  # fmt: skip
    T = x.shape[0] // R * oh * ow
    out = torch.empty(T, kernel * kernel * D, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    launch_kernel(
        _conv_rows_kernel, (kernel * kernel, triton.cdiv(T, BLOCK_R)),
        x, offset, live_rows, out, T, D, R=R, SKIP=skip, H=h, W=w, OUT=oh * ow, OUT_W=ow,
        KERNEL=kernel, STRIDE=stride, PADDING=padding, BLOCK_R=BLOCK_R,
        BLOCK_D=min(BLOCK_D, triton.next_power_of_2(D)),
    )  # fmt: skip
    return out


@torch.library.custom_op("vitgraph::conv_rows", mutates_args=())
def conv_rows_op(
    x: torch.Tensor,
    h: int,
    w: int,
    skip: int,
    kernel: int,
    stride: int,
    padding: int,
    offset: torch.Tensor | None,
    live_rows: torch.Tensor | None,
) -> torch.Tensor:
    """`conv_rows` as an operator that torch.compile can trace around."""
    return conv_rows(
        x, (h, w), skip=skip, kernel=kernel, stride=stride, padding=padding, offset=offset,
        live_rows=live_rows,
    )  # fmt: skip


@conv_rows_op.register_fake
def _(x, h, w, skip, kernel, stride, padding, offset, live_rows):
    oh, ow = (out_size(n, kernel, stride, padding) for n in (h, w))
    rows = x.shape[0] // (skip + h * w) * oh * ow
    return x.new_empty(rows, kernel * kernel * x.shape[1])
