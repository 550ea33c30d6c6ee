"""Zeros in the rows past the live ones, in place.

    x[t] = 0    for t >= live_rows

x [T, ...] contiguous, of any dtype. For new buffers that no writer fills past the live rows and
that a product or the attention multiplies there: NaN times zero is NaN. Live rows are not touched.

Zero is zero bytes in every dtype and padding is one range of memory, so the kernel knows nothing
but bytes and is compiled once. Memory-bound: only padding is written; where there is none, the
programs read `live_rows` and end.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import pdl_options, wait_for_previous
from .rows import ceil_div, check_live_rows, row_programs

BLOCK = 8192  # bytes: four stores of 16 by each thread of four warps


def zero_padding_ref(x: torch.Tensor, num_live: int) -> torch.Tensor:
    """Plain PyTorch definition; `num_live` is a Python int here, and x stays as it is."""
    y = x.clone()
    y[num_live:] = 0
    return y


def programs(nbytes: int, device: torch.device) -> int:
    """Programs for a buffer of `nbytes`: by its size, since the host does not know the padding."""
    return row_programs(device, ceil_div(nbytes, BLOCK))


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _zero_padding_kernel(
    x_ptr,  # [T, row_bytes] uint8
    live_ptr,  # [1] int32
    T,
    row_bytes,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    # buffers of 131,072 rows are larger than an int32 can count
    start = live.to(tl.int64) * row_bytes
    end = T.to(tl.int64) * row_bytes
    zeros = tl.zeros([BLOCK], tl.uint8)
    for block in range(tl.program_id(0), tl.cdiv(end - start, BLOCK), tl.num_programs(0)):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + at, zeros, mask=at < end)


def zero_padding_(x: torch.Tensor, live_rows: torch.Tensor | None) -> torch.Tensor:
    """Zero the rows of `x` past the live ones; returns x.

    Args:
        x: [T, ...], contiguous, written.
        live_rows: int32 [1] on the device, T or more if there is no padding; None for all rows.

    Raises:
        ValueError: `x` has no rows or is not contiguous, or `live_rows` is not as above.
    """
    if x.dim() == 0 or not x.is_contiguous():
        raise ValueError(
            f"zero_padding_: x must be contiguous [T, ...], got shape {tuple(x.shape)} and strides "
            f"{x.stride()}; pass the whole memory that rows apart lie in"
        )
    check_live_rows("zero_padding_", x, live_rows)
    if live_rows is None or x.numel() == 0:
        return x
    if use_reference(x):
        return x.copy_(zero_padding_ref(x, int(live_rows)))
    T = len(x)
    launch_kernel(
        _zero_padding_kernel, (programs(x.nbytes, x.device),),
        x.view(torch.uint8), live_rows, T, x.nbytes // T, BLOCK=BLOCK, **pdl_options(x),
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::zero_padding_", mutates_args=("x",))
def zero_padding_op(x: torch.Tensor, live_rows: torch.Tensor | None) -> None:
    """`zero_padding_` as an operator that torch.compile can trace around."""
    zero_padding_(x, live_rows)


@zero_padding_op.register_fake
def _(x, live_rows):
    return None
