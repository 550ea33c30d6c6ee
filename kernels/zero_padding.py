"""Zeros in the rows past the live ones, in place.

    x[t] = 0    for t >= live_rows

x [T, ...] contiguous, of any dtype. For new buffers that no writer fills past the live rows and
that a product or the attention multiplies there: NaN times zero is NaN. Live rows are not touched.
A forward has several; of few rows each launch would take longer than its zeros, so `ZeroedPadding`
gathers them.

Zero is zero bytes in every dtype and padding is one range of memory, so the kernel knows nothing
but bytes, and is compiled once for each number of buffers. Memory-bound: only padding is written;
where there is none, the programs read `live_rows` and end.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import pdl_options, wait_for_previous
from .rows import ceil_div, check_live_rows, row_programs

MOST_BUFFERS = 4  # of a launch
BLOCK = 8192  # bytes: four stores of 16 by each thread of four warps


def zero_padding_ref(x: torch.Tensor, num_live: int) -> torch.Tensor:
    """Plain PyTorch definition; `num_live` is a Python int here, and x stays as it is."""
    y = x.clone()
    y[num_live:] = 0
    return y


def programs(nbytes: int, device: torch.device) -> int:
    """Programs for a buffer of `nbytes`: by its size, since the host does not know the padding."""
    return row_programs(device, ceil_div(nbytes, BLOCK))


@triton.jit
def _zero_bytes(x_ptr, row_bytes, live, T, BLOCK: tl.constexpr):
    # buffers of 131,072 rows are larger than an int32 can count
    start = live.to(tl.int64) * row_bytes
    end = T.to(tl.int64) * row_bytes
    zeros = tl.zeros([BLOCK], tl.uint8)
    for block in range(tl.program_id(0), tl.cdiv(end - start, BLOCK), tl.num_programs(0)):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + at, zeros, mask=at < end)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _zero_padding_kernel(
    x0_ptr,  # [T, row_bytes0] uint8
    x1_ptr,  # [T, row_bytes1] or None, as the others
    x2_ptr,
    x3_ptr,
    live_ptr,  # [1] int32
    T,
    row_bytes0, row_bytes1, row_bytes2, row_bytes3,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    live = tl.minimum(tl.load(live_ptr), T)
    wait_for_previous(PDL)
    _zero_bytes(x0_ptr, row_bytes0, live, T, BLOCK)
    if x1_ptr is not None:
        _zero_bytes(x1_ptr, row_bytes1, live, T, BLOCK)
    if x2_ptr is not None:
        _zero_bytes(x2_ptr, row_bytes2, live, T, BLOCK)
    if x3_ptr is not None:
        _zero_bytes(x3_ptr, row_bytes3, live, T, BLOCK)


class ZeroedPadding:
    """A context in which buffers are gathered; at its end their padding is zeroed, in one launch.

    with ZeroedPadding(live_rows) as padding:
        x = padding.of(torch.empty(...))
    """

    def __init__(self, live_rows: torch.Tensor | None):
        """`live_rows` as in `zero_padding_`, for all buffers."""
        self._live = live_rows
        self._buffers: list[torch.Tensor] = []

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Gather `x` [T, ...], contiguous; returns x.

        Raises:
            ValueError: as `zero_padding_`, or x has not as many rows as the buffers before it.
        """
        _check(x, self._live)
        if self._live is not None and x.numel():
            if self._buffers and len(x) != len(self._buffers[0]):
                raise ValueError(
                    f"ZeroedPadding: x has {len(x)} rows, the buffers before it have "
                    f"{len(self._buffers[0])}; use another context"
                )
            self._buffers.append(x)
        return x

    def __enter__(self) -> "ZeroedPadding":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._live is not None:
            for i in range(0, len(self._buffers), MOST_BUFFERS):
                _zero(self._buffers[i : i + MOST_BUFFERS], self._live)


def zero_padding_(x: torch.Tensor, live_rows: torch.Tensor | None) -> torch.Tensor:
    """Zero the rows of `x` past the live ones; returns x.

    Args:
        x: [T, ...], contiguous, written.
        live_rows: int32 [1] on the device, T or more if there is no padding; None for all rows.

    Raises:
        ValueError: `x` has no rows or is not contiguous, or `live_rows` is not as above.
    """
    with ZeroedPadding(live_rows) as padding:
        return padding.of(x)


def _check(x: torch.Tensor, live_rows: torch.Tensor | None) -> None:
    if x.dim() == 0 or not x.is_contiguous():
        raise ValueError(
            f"zero_padding_: x must be contiguous [T, ...], got shape {tuple(x.shape)} and strides "
            f"{x.stride()}; pass the whole memory that rows apart lie in"
        )
    check_live_rows("zero_padding_", x, live_rows)


def _zero(buffers: Sequence[torch.Tensor], live_rows: torch.Tensor) -> None:
    """Zero the padding of up to `MOST_BUFFERS` buffers of one number of rows."""
    first, T = buffers[0], len(buffers[0])
    if use_reference(first):
        for x in buffers:
            x.copy_(zero_padding_ref(x, int(live_rows)))
        return
    absent = [None] * (MOST_BUFFERS - len(buffers))
    launch_kernel(
        _zero_padding_kernel, (programs(max(x.nbytes for x in buffers), first.device),),
        *(x.view(torch.uint8) for x in buffers), *absent,
        live_rows, T, *(x.nbytes // T for x in buffers), *absent,
        BLOCK=BLOCK, **pdl_options(first),
    )  # fmt: skip


@torch.library.custom_op("vitgraph::zero_padding_", mutates_args=("x",))
def zero_padding_op(x: torch.Tensor, live_rows: torch.Tensor | None) -> None:
    """`zero_padding_` as an operator that torch.compile can trace around."""
    zero_padding_(x, live_rows)


@zero_padding_op.register_fake
def _(x, live_rows):
    return None
