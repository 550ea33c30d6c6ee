"""New memory whose rows start at lines of the cache, for operands of matrix products.

Products read 128 bytes of a row at a time (TMA, with a swizzle of as many), and twice as many lines
where these lie across two. Rows of 4,304 elements of 16 bits, the MLP of Qwen3-VL 8B, SigLIP 2
so400m and others, do unless they are kept 4,352 apart.
"""

import torch

from .rows import ceil_div
from .zero_padding import ZeroedPadding

LINE = 128  # bytes of a line of the cache


def aligned_rows(
    like: torch.Tensor,
    T: int,
    F: int,
    *,
    dtype: torch.dtype | None = None,
    padding: ZeroedPadding | None = None,
) -> torch.Tensor:
    """New [T, F] on the device of `like`, whose rows lie multiples of `LINE` bytes apart.

    On a GPU, where all memory starts at a line, each row starts at one. Contiguous if rows are
    whole lines. Uninitialised, but for the rows that `padding` zeroes. `dtype` is that of `like` if
    None.
    """
    dtype = dtype or like.dtype
    # with what lies between the rows: all of it is one range of memory
    width = ceil_div(F * dtype.itemsize, LINE) * LINE // dtype.itemsize
    rows = like.new_empty((T, width), dtype=dtype)
    return (rows if padding is None else padding.of(rows))[:, :F]


def with_aligned_rows(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` [T, F] if its rows start at multiples of `LINE` bytes, else a copy whose rows do."""
    address, step = matrix.data_ptr(), matrix.stride(0) * matrix.itemsize
    if matrix.stride(1) == 1 and address % LINE == step % LINE == 0:
        return matrix
    return aligned_rows(matrix, *matrix.shape).copy_(matrix)
