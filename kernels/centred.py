"""Rows of the residual stream as norms read them: around their mean, with their sum of squares.

For the kernels that begin with one: norm.py and norm_fp8.py.
"""

import triton
import triton.language as tl

from .partials import load_stream


@triton.jit
def load_vector(ptr, d, D: tl.constexpr):
    """Columns d of a vector [1, D] in fp32; 0.0 where there is none."""
    values = 0.0
    if ptr is not None:
        values = tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def load_rows(
    x_ptr,  # [T, D]
    partials_ptr,  # [SPLITS, T, D] fp32 or None
    offset,  # its columns in the first block, loaded before what the kernel waits for
    offset_ptr,  # [D] fp32 or None
    start,  # [ROWS, 1] int64, first elements of the rows
    live,  # [ROWS, 1]: others are not read, and zero but for the offset
    plane,  # T * D
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,  # width of the second block of a row, or 0
):
    """The two blocks of rows with their offset, in fp32.

    Without a second block its place is taken by the first.
    """
    d = tl.arange(0, BLOCK_D)
    is_read = live & (d < D)[None, :]
    x = load_stream(x_ptr, partials_ptr, start + d[None, :], is_read, plane, SPLITS) + offset
    rest = x
    if REST > 0:
        rest_d = BLOCK_D + tl.arange(0, REST)
        is_read = live & (rest_d < D)[None, :]
        at = start + rest_d[None, :]
        rest = load_stream(x_ptr, partials_ptr, at, is_read, plane, SPLITS)
        rest += load_vector(offset_ptr, rest_d, D)
    return x, rest


@triton.jit
def centred(
    x, rest, D: tl.constexpr, IS_RMS: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr
):
    """Both blocks minus the mean of their row, or as they are with `IS_RMS`; sums of squares.

    Columns past D are zero, in and out.
    """
    d = tl.arange(0, BLOCK_D)
    if not IS_RMS:
        total = tl.sum(x, axis=1)
        if REST > 0:
            total += tl.sum(rest, axis=1)
        mean = total[:, None] / D
        x = tl.where((d < D)[None, :], x - mean, 0.0)
        if REST > 0:
            rest_d = BLOCK_D + tl.arange(0, REST)
            rest = tl.where((rest_d < D)[None, :], rest - mean, 0.0)
    squares = tl.sum(x * x, axis=1)
    if REST > 0:
        squares += tl.sum(rest * rest, axis=1)
    return x, rest, squares
