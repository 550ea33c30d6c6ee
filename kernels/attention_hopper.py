"""The attention of attention_triton.py for compute capability 9.0, one role a group of warps.

One warp starts the TMA copies: the rows of q of a tile, then k and v in steps of `block_n` rows
into a ring of stages. One to three groups of four warps compute 64 rows of q each. Within a group
the scores of a step are multiplied while the values of the step before still are, and the softmax
runs under the latter; the groups take turns in starting their products, so that the softmax of one
runs under the products of another.

Programs stay for the whole call: program p computes the tiles p, p + programs, .. of the list of
all (segment, head, 64 * groups rows of q), found by walking `cu_seqlens`. An empty segment costs a
step of that walk, and those at the end nothing. Tiles that share k and v are neighbours in the
list. Method: https://arxiv.org/abs/2407.08608. Tiles of long segments take longer, so with
`tickets` a program draws each tile after its first from a counter, as late as its loads allow:
whoever is early takes what nobody has begun. Which program computes a tile changes no bit of it.

A head dim is one power-of-two block of columns or two: 72 and 80 are 64 + 16. What TMA reads past
the head dim or past the first or last row is zero.

In bf16 no step after the first looks for the maximum of its scores; a group whose rows outgrow that
of their first keys begins again (attention_hopper_online.py).

The last step of a segment, which comes first, ends at the segment's last row and masks the rows
that other steps cover, so that no row past a segment is read as k or v. If half a step holds the
rows that are left, two groups compute that half alone, where they have the registers, and a group
of the last tile whose rows of q are all past the segment computes nothing. Where a segment is
shorter than a step, that step begins in rows before the segment: they are masked, and cleared in v.
What other rows hold (NaN included) therefore cannot reach the output.

Written in Gluon (`triton.experimental.gluon`), which has no interpreter: it runs on the GPU or not
at all.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .attention import check_tensors, check_tickets
from .dispatch import is_interpreting
from .launch import launch_kernel
from .pdl import starts_early
from .rows import ceil_div, num_sms

ROWS = 64  # rows of q that a group of four warps computes
LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16)
SHARED_BYTES = 227 << 10  # of a multiprocessor
# by number of groups: the registers of a multiprocessor over the warps of a program
MAX_REGISTERS = {1: 128, 2: 168, 3: 128}


@dataclass(frozen=True)
class LaunchConfig:
    """How a program is built.

    A tile of q has 64 rows a group, for 1 to 3 groups; k and v come in steps of `block_n` rows
    (64 or 128), of which `num_stages` (2 or more) are held. `programs_per_sm` run at once.
    """

    groups: int
    block_n: int
    num_stages: int
    programs_per_sm: int = 1

    def __str__(self) -> str:
        """As "128/64x5 by 1": rows of q, rows of a step, stages, programs."""
        steps = f"{self.block_n}x{self.num_stages}"
        return f"{self.groups * ROWS}/{steps} by {self.programs_per_sm}"


# what `launch_config` picks from, and its neighbours
CANDIDATES = (
    *(LaunchConfig(1, 64, stages, programs) for programs in (1, 2) for stages in (3, 4, 5)),
    LaunchConfig(1, 64, 8),
    LaunchConfig(1, 128, 3),
    *(LaunchConfig(2, 64, stages) for stages in (3, 4, 5, 6)),
    *(LaunchConfig(2, 128, stages) for stages in (2, 3, 4)),
    *(LaunchConfig(3, 64, stages) for stages in (3, 4)),
)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Widths of the two power-of-two column blocks; the second is 0 when one is enough."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16, 1 << (rest - 1).bit_length())
    return (first, second) if second < first else (2 * first, 0)


def launch_config(head_dim: int, num_rows: int, num_heads: int, num_sms: int) -> LaunchConfig:
    """Pick a configuration; a pure function of what a captured graph fixes.

    By measurement on an H200 with 16 heads of 64, 72 and 80 and 12 of 128, one and many segments of
    196 to 16,384 rows. Of two programs a multiprocessor, one works through its softmax while the
    other multiplies, which is fastest where all tiles run at once, and with heads of 64 and 80
    beyond that. Then groups that share k and v are: two, or three, where their larger tiles leave
    few multiprocessors idle at the end. Short steps waste little on segments that fill few of them.
    Up to as many tiles as multiprocessors are spread with heads of 64 and 72, by a ring beside
    which no second program fits: those that start early would share what is idle already, and the
    tower would take 1 per cent more. Where one long segment and many short ones differ, the loss of
    either is kept small.
    """
    width = sum(split_head_dim(head_dim))

    def tiles(groups: int) -> int:
        return ceil_div(num_rows, groups * ROWS) * num_heads

    if width > 80:
        if tiles(1) <= num_sms:
            return LaunchConfig(groups=1, block_n=64, num_stages=4)
        return LaunchConfig(groups=2, block_n=64, num_stages=5 if width <= 96 else 4)
    three = LaunchConfig(groups=3, block_n=64, num_stages=4)
    # Two small tiles load k and v twice, and memory is read by 32 bytes: a part of that where heads
    # start anywhere else.
    shares = width <= 64 or head_dim % 16 == 0
    in_one_round = tiles(1) <= 2 * num_sms if shares else tiles(2) <= num_sms
    if not in_one_round and tiles(3) <= num_sms:
        return three
    if tiles(1) <= num_sms and (width <= 64 or not shares):
        return LaunchConfig(groups=1, block_n=64, num_stages=8 if width <= 64 else 5)
    if width <= 64:
        if num_rows * num_heads < 8192 * 16:
            return LaunchConfig(groups=1, block_n=64, num_stages=5, programs_per_sm=2)
        return LaunchConfig(groups=2, block_n=128, num_stages=4)
    if tiles(3) >= 4 * num_sms:
        return three
    if shares:
        return LaunchConfig(groups=1, block_n=64, num_stages=4, programs_per_sm=2)
    # a tile of three takes 1.4 times as long as one of two
    if 1.4 * ceil_div(tiles(3), num_sms) < ceil_div(tiles(2), num_sms):
        return three
    return LaunchConfig(groups=2, block_n=64, num_stages=5)


def _has_room(config: LaunchConfig, head_dim: int, tiles_q: int, parts: int) -> bool:
    """Whether shared memory holds the ring, `tiles_q` tiles of q, and `parts` steps of k or v."""
    first, second = split_head_dim(head_dim)
    rows_q = config.groups * ROWS
    rows = (2 * config.num_stages + parts) * config.block_n + tiles_q * rows_q
    # results go through a tile of the first columns; 1 KiB is for barriers and alignment
    used = 2 * (rows * (first + second) + rows_q * first) + 1024
    return used * config.programs_per_sm <= SHARED_BYTES


def usable_configs(
    head_dim: int, candidates: Iterable[LaunchConfig] = CANDIDATES
) -> list[LaunchConfig]:
    """Those of `candidates` that shared memory holds."""
    return [config for config in candidates if _has_room(config, head_dim, 1, 0)]


def holds_maximum(config: LaunchConfig, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a row's maximum stays that of its first steps (attention_hopper_online.py).

    Not in fp16, where what outgrows it by 2**16 would overflow, and not without shared memory for
    groups that have to begin again.
    """
    return dtype == torch.bfloat16 and _has_room(config, head_dim, 1, config.groups)


def q_buffers(config: LaunchConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Tiles of q that a program holds: 2 where there is room, so that loads run ahead of a tile.

    A single group loads few rows of q, and most share their multiprocessor with another program.
    """
    parts = config.groups if holds_maximum(config, head_dim, dtype) else 0
    return 2 if config.groups > 1 and _has_room(config, head_dim, 2, parts) else 1


def short_step(config: LaunchConfig, head_dim: int) -> int:
    """Rows of k and v that the last step of a segment computes if they hold what is left, or 0.

    Two groups have registers for more than one kind of step; with three it gained nothing.
    """
    is_narrow = config.block_n < 128 or sum(split_head_dim(head_dim)) <= 80
    return config.block_n // 2 if config.groups == 2 and is_narrow else 0


@functools.cache
def _gluon_reason() -> str | None:
    if is_interpreting():
        return "is written in Gluon, which has no interpreter; unset TRITON_INTERPRET"
    try:
        from . import attention_hopper_kernel  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} lacks what it is written in ({error})"
    return None


def unusable_reason(
    device: torch.device, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """One line on why this kernel cannot run there, None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
    if dtype is not None and dtype not in DTYPES:
        return f"needs {' or '.join(map(str, DTYPES))}, not {dtype}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM):
        return f"needs a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    return _gluon_reason()


@functools.cache
def box(rows: int, columns: int) -> tuple[list[int], Any]:
    """Shape and layout in shared memory of `columns` of one head in `rows` rows."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=3
    )
    return [rows, 1, columns], layout


def launch(
    q,
    k,
    v,
    cu_seqlens,
    scale: float,
    out,
    config: LaunchConfig,
    tickets: torch.Tensor | None = None,
) -> None:
    """Run the kernel with a given configuration, unchecked; the benchmark tunes through it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .attention_hopper_kernel import attention_hopper_kernel

    num_rows, num_heads, head_dim = q.shape
    num_segments = cu_seqlens.shape[0] - 1
    first, second = split_head_dim(head_dim)

    def boxes(x: torch.Tensor, rows: int, columns: int) -> Any:
        return TensorDescriptor.from_tensor(x, *box(rows, columns)) if columns else None

    n = config.block_n
    # with the most tiles that any split of the rows into the segments makes
    tiles = num_heads * (num_rows // (ROWS * config.groups) + num_segments)
    programs = min(tiles, num_sms(q.device) * config.programs_per_sm)
    launch_kernel(
        attention_hopper_kernel, (programs,),
        boxes(q, ROWS, first), boxes(q, ROWS, second),
        boxes(k, n, first), boxes(k, n, second),
        boxes(v, n, first), boxes(v, n, second),
        out, cu_seqlens, num_segments, scale * LOG2E,
        tickets if tiles > programs else None,
        D=head_dim, HEADS=num_heads, GROUPS=config.groups, STAGES=config.num_stages,
        Q_BUFFERS=q_buffers(config, head_dim, q.dtype), TAIL=short_step(config, head_dim),
        HELD=holds_maximum(config, head_dim, q.dtype),
        num_warps=4, maxnreg=MAX_REGISTERS[config.groups], launch_pdl=starts_early(q),
    )  # fmt: skip


def varlen_attention_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    tickets: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Write the attention of each segment to `out`; see the module docstring.

    Args:
        q, k, v: fp16 or bf16 [T, H, D] views, last axis contiguous, rows and heads at multiples of
            16 bytes; D a multiple of 8 up to 128.
        cu_seqlens: int32 [S + 1] on the same device.
        scale: factor of the scores, positive.
        out: [T, H, D], contiguous, in the dtype of q or float8_e4m3fn. Rows outside the segments
            are left as they are.
        tickets: int32 [2], zeros, and zeros again afterwards; no other call may use them
            meanwhile. None shares the tiles out beforehand.
        config: overrides `launch_config`, for the benchmark.

    Raises:
        ValueError: the kernel cannot run here, or shapes or strides are not as above.
    """
    name = "varlen_attention_hopper"
    check_tensors(name, q, k, v, cu_seqlens, scale, out)
    if reason := unusable_reason(q.device, q.shape[-1], q.dtype):
        raise ValueError(f'{name}: {reason}; use backend="triton"')
    for label, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8:
            raise ValueError(
                f"{name}: rows and heads of {label} must start at multiples of 16 bytes; its "
                f"address is {x.data_ptr():#x} and strides are {x.stride()}; use "
                'backend="triton"'
            )
    check_tickets(name, q, tickets)
    if q.numel() == 0 or cu_seqlens.shape[0] == 1:
        return
    if config is None:
        config = launch_config(q.shape[2], q.shape[0], q.shape[1], num_sms(q.device))
    launch(q, k, v, cu_seqlens, scale, out, config, tickets)
