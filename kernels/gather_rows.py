"""Rows of a packed tensor, compacted: the tokens that a selection keeps.

    out[j] = x[source[j]]    for j < live_rows

x [M, C] and out [K, C] in one floating or integer dtype, rows at any stride, elements of a row
adjacent; source [K] int32, live_rows [1] int32. Elements are moved as they are. Rows of `out` from
`live_rows` on are left alone and their source is not read. Memory-bound: 2*K*C elements moved.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost
from .rows import ceil_div, check_live_rows, row_programs


@dataclass(frozen=True)
class GatherRowsConfig:
    """Launch parameters: rows and columns of a tile."""

    BLOCK_R: int
    BLOCK_C: int


def config(C: int, itemsize: int) -> GatherRowsConfig:
    """Tiles of 16 KiB, eight 16-byte loads a thread; 512 columns divide the usual widths."""
    BLOCK_C = min(512, triton.next_power_of_2(C))
    return GatherRowsConfig(BLOCK_R=min(16384 // (BLOCK_C * itemsize), 64), BLOCK_C=BLOCK_C)


def gather_rows_ref(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch definition for live rows."""
    return x[source.long()]


def cost(K: int, C: int, dtype: torch.dtype) -> Cost:
    """Least traffic for K rows: one read, one write, one index."""
    return Cost(flops=0, bytes=2 * K * C * dtype.itemsize + 4 * K)


@triton.jit(do_not_specialize=["K"])  # one compilation for all row counts
def _gather_rows_kernel(
    x_ptr,  # [M, C]
    source_ptr,  # [K]
    live_ptr,  # [1] or None
    out_ptr,  # [K, C]
    K,
    C,
    stride_xm,
    stride_ok,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    live = K
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), K)
    blocks_c = tl.cdiv(C, BLOCK_C)
    for block in range(tl.program_id(0), tl.cdiv(live, BLOCK_R) * blocks_c, tl.num_programs(0)):
        j = (block // blocks_c) * BLOCK_R + tl.arange(0, BLOCK_R)
        c = ((block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        mask = (j < live)[:, None] & (c < C)
        row = tl.load(source_ptr + j, mask=j < live, other=0)
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * stride_xm + c, mask=mask, other=0)
        tl.store(out_ptr + j[:, None].to(tl.int64) * stride_ok + c, x, mask=mask)


def gather_rows(
    x: torch.Tensor,
    source: torch.Tensor,
    live_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather rows of `x` into `out` [K, C] (a new tensor if None); see the module docstring.

    Args:
        x: [M, C], elements of a row adjacent.
        source: [K] int32 contiguous; entries before `live_rows` lie in [0, M).
        live_rows: int32 [1]; None for K. Rows of a new tensor from there on are uninitialised.
        out: [K, C] in the dtype of `x`, and not `x` itself.

    Raises:
        ValueError: a shape, layout, dtype or device that is not as above.
    """
    if x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            "gather_rows: x must be [M, C] with adjacent elements in a row, got shape "
            f"{tuple(x.shape)} and strides {x.stride()}"
        )
    if (
        source.ndim != 1
        or source.dtype != torch.int32
        or not source.is_contiguous()
        or source.device != x.device
    ):
        raise ValueError(
            f"gather_rows: source must be contiguous int32 [K] on {x.device}, got {source.dtype} "
            f"{tuple(source.shape)} with strides {source.stride()} on {source.device}"
        )
    check_live_rows("gather_rows", x, live_rows)
    K, C = source.shape[0], x.shape[1]
    if out is None:
        out = torch.empty((K, C), dtype=x.dtype, device=x.device)
    if (
        out.shape != (K, C)
        or out.dtype != x.dtype
        or out.device != x.device
        or (C > 1 and out.stride(1) != 1)
    ):
        raise ValueError(
            f"gather_rows: out must be [{K}, {C}] {x.dtype} on {x.device} with adjacent elements "
            f"in a row, got {tuple(out.shape)} {out.dtype} with strides {out.stride()} on "
            f"{out.device}"
        )
    if out.numel() == 0:
        return out
    if out.data_ptr() == x.data_ptr():
        raise ValueError("gather_rows: out is x itself, whose rows are read while out is written")
    if use_reference(x):
        live = K if live_rows is None else min(int(live_rows), K)
        out[:live].copy_(gather_rows_ref(x, source[:live]))
        return out
    launch = config(C, x.dtype.itemsize)
    blocks = ceil_div(K, launch.BLOCK_R) * ceil_div(C, launch.BLOCK_C)
    launch_kernel(
        _gather_rows_kernel, (row_programs(x.device, blocks),),
        x, source, live_rows, out, K, C, x.stride(0), out.stride(0),
        BLOCK_R=launch.BLOCK_R, BLOCK_C=launch.BLOCK_C,
    )  # fmt: skip
    return out


@torch.library.custom_op("vitgraph::gather_rows", mutates_args=("out",))
def gather_rows_op(
    x: torch.Tensor, source: torch.Tensor, live_rows: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`gather_rows` into `out` as an operator that torch.compile can trace around."""
    gather_rows(x, source, live_rows, out)


@gather_rows_op.register_fake
def _(x, source, live_rows, out):
    return None
