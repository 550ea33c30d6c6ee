"""Bidirectional attention over packed segments, FlashAttention forward in Triton.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]      over the rows j of i's own segment

Shapes: q, k, v are [T, H, D] views (of one fused [T, 3, H, D] buffer as a rule) whose last axis is
contiguous; out is [T, H, D], contiguous; cu_seqlens is int32 [S + 1] on the device, rising, its
tail repeating the last offset. Dtypes fp16, bf16 and fp32; scores, softmax and sums are fp32, and
the probabilities are rounded to the dtype of v for the second product.
Compute-bound from a few hundred rows a segment: see `attention.cost`.

Nothing on the host depends on the segments: the grid follows from T and S alone, so a captured
call serves every layout of its buffers. Rows outside the segments are neither read nor written, so
whatever is left in them (NaN included) cannot reach the output.

A head dim that is no power of two is computed as two column blocks, 72 and 80 as 64 + 16, instead
of being padded to 128 (v's second block takes 32 columns, see `value_block`). Method: https://arxiv.org/abs/2307.08691.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention import attention_ref, check_tensors
from .dispatch import use_reference
from .launch import launch_kernel

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program (rows of q, rows of k and v) and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Widths of the two power-of-two column blocks; the second is 0 when one is enough.

    Only a remainder of up to 16 columns becomes a block of its own, which may reach past
    `head_dim`. Wider ones are padded: Triton 3.6 compiles loops over two blocks whose second is 32
    wide to code that gives wrong results on sm_90.
    """
    first = 1 << (head_dim.bit_length() - 1)
    if first == head_dim or first < 16:
        return max(first, 16), 0
    return (first, 16) if head_dim - first <= 16 else (2 * first, 0)


def value_block(width: int) -> int:
    """Width of the second column block of v, where that of q and k is `width`.

    Triton 3.6 compiles a product with 16 columns of v for sm_90 to code that gives wrong results
    (NaN, relative errors of 0.2); with 32 columns it is right.
    """
    return max(32, width) if width else 0


def launch_config(head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Pick a tile; `LaunchConfig`s can be compared through `launch`.

    With two column blocks a step takes 32 rows of k: with 64 the loop that Triton 3.6 compiles for
    sm_90 gives wrong results, whatever the number of stages and warps.
    """
    if dtype == torch.float32:  # no tensor cores at full fp32 precision: small tiles
        return LaunchConfig(block_m=32, block_n=32, num_warps=8, num_stages=1)
    if split_head_dim(head_dim)[1]:
        return LaunchConfig(block_m=64, block_n=32, num_warps=4, num_stages=3)
    if head_dim > 64:
        return LaunchConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)
    return LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)


def num_slots(num_rows: int, num_segments: int, block_m: int) -> int:
    """Programs per head that cover any split of `num_rows` rows into `num_segments` segments."""
    return -(-num_rows // block_m) + num_segments


@triton.jit
def find_segment(cu_seqlens_ptr, num_segments, slot, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Segment that owns `slot`, and the slot's index within it; the segment is -1 if there is none.

    Segment s owns the slots from a(s) = floor(cu[s] / BLOCK_M) + s up to a(s + 1). With L rows,
    a(s + 1) - a(s) = floor((cu[s] + L) / BLOCK_M) - floor(cu[s] / BLOCK_M) + 1
                   >= floor(L / BLOCK_M) + 1 >= ceil(L / BLOCK_M),
    so the slots always cover the rows, an empty segment included (one slot, which has no rows).
    a rises by at least 1 a segment, so the owner is the last s with a(s) <= slot, found by
    counting. The end a(S) is at most floor(T / BLOCK_M) + S, the size of the grid.
    """
    counts = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, num_segments, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        offset = tl.load(cu_seqlens_ptr + s, mask=s < num_segments, other=0)
        owns = (offset // BLOCK_M + s <= slot) & (s < num_segments)
        counts += owns.to(tl.int32)
    segment = tl.sum(counts, axis=0) - 1
    first = tl.load(cu_seqlens_ptr + tl.maximum(segment, 0)) // BLOCK_M + segment
    return segment, slot - first


@triton.jit
def load_rows(
    base,  # pointer to column 0 of row 0
    rows,  # [R] row numbers
    num_rows,  # rows from here on read as 0
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    END: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Columns FIRST..FIRST + WIDTH of some rows, [R, WIDTH]; columns from END on read as 0."""
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = base + rows[:, None] * STRIDE + cols[None, :]
    if FIRST + WIDTH > END:
        if MASK_ROWS:
            mask = (rows < num_rows)[:, None] & (cols < END)[None, :]
        else:
            mask = (cols < END)[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif MASK_ROWS:
        x = tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def store_rows(
    base, rows, num_rows, x, STRIDE: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr
):
    """Write x [R, WIDTH] to columns FIRST.. of the rows below `num_rows`, clipped at END."""
    cols = FIRST + tl.arange(0, x.shape[1])
    ptrs = base + rows[:, None] * STRIDE + cols[None, :]
    mask = (rows < num_rows)[:, None] & (cols < END)[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q0,
    q1,
    m,
    l,
    acc0,
    acc1,
    k_base,
    v_base,
    num_rows,
    scale_log2,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Fold one block of k and v into the running maximum, sum and output."""
    rows = tl.arange(0, BLOCK_N)
    k0 = load_rows(k_base, rows, num_rows, STRIDE_K, 0, D0, D, IS_TAIL)
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        k1 = load_rows(k_base, rows, num_rows, STRIDE_K, D0, D1, D, IS_TAIL)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if IS_TAIL:
        scores = tl.where((rows < num_rows)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, axis=1)
    # rows past the segment read as 0: their p is 0, but 0 * NaN would not be
    v0 = load_rows(v_base, rows, num_rows, STRIDE_V, 0, D0, D, IS_TAIL)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = load_rows(v_base, rows, num_rows, STRIDE_V, D0, V1, D, IS_TAIL)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
    return m_new, l, acc0, acc1


@triton.jit(do_not_specialize=["num_segments"])  # one compilation for every number of segments
def _varlen_attention_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D], contiguous
    cu_seqlens_ptr,  # [S + 1]
    num_segments,
    scale_log2,
    # strides are constants: a head stride of 72 has to be known as a multiple of 8 for wide loads
    STRIDE_QT: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    STRIDE_OT: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    slot = tl.program_id(0)
    head = tl.program_id(1)
    segment, tile = find_segment(cu_seqlens_ptr, num_segments, slot, BLOCK_M, BLOCK_S)
    if segment < 0:
        return
    begin = tl.load(cu_seqlens_ptr + segment)
    length = tl.load(cu_seqlens_ptr + segment + 1) - begin
    if tile * BLOCK_M >= length:
        return
    # int64 before the multiply: T * stride passes 2**31 at 620,000 rows of 3 * 16 * 72
    row = begin.to(tl.int64)
    row_q = row + tile * BLOCK_M
    q_base = q_ptr + row_q * STRIDE_QT + head * STRIDE_QH
    k_base = k_ptr + row * STRIDE_KT + head * STRIDE_KH
    v_base = v_ptr + row * STRIDE_VT + head * STRIDE_VH
    out_base = out_ptr + row_q * STRIDE_OT + head * D
    rows = tl.arange(0, BLOCK_M)
    rows_left = length - tile * BLOCK_M

    q0 = load_rows(q_base, rows, rows_left, STRIDE_QT, 0, D0, D, True)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = load_rows(q_base, rows, rows_left, STRIDE_QT, D0, D1, D, True)
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    else:
        q1 = q0
        acc1 = l  # stands in for a block that does not exist, and is never read

    # the last block, of 1 to BLOCK_N rows, is peeled: it alone pays for masks
    num_full = (length - 1) // BLOCK_N
    for _ in range(0, num_full):
        m, l, acc0, acc1 = _attend(
            q0, q1, m, l, acc0, acc1, k_base, v_base, BLOCK_N, scale_log2,
            STRIDE_KT, STRIDE_VT, D, D0, D1, V1, BLOCK_N, False,
        )  # fmt: skip
        k_base += BLOCK_N * STRIDE_KT
        v_base += BLOCK_N * STRIDE_VT
    m, l, acc0, acc1 = _attend(
        q0, q1, m, l, acc0, acc1, k_base, v_base, length - num_full * BLOCK_N, scale_log2,
        STRIDE_KT, STRIDE_VT, D, D0, D1, V1, BLOCK_N, True,
    )  # fmt: skip

    inv = 1.0 / l
    store_rows(out_base, rows, rows_left, acc0 * inv[:, None], STRIDE_OT, 0, D)
    if D1 > 0:
        store_rows(out_base, rows, rows_left, acc1 * inv[:, None], STRIDE_OT, D0, D)


def kernel_constants(q, k, v, out, config: LaunchConfig) -> dict[str, int]:
    """Compile-time arguments of the kernel for these operands."""
    D0, D1 = split_head_dim(q.shape[-1])
    return {
        "STRIDE_QT": q.stride(0),
        "STRIDE_QH": q.stride(1),
        "STRIDE_KT": k.stride(0),
        "STRIDE_KH": k.stride(1),
        "STRIDE_VT": v.stride(0),
        "STRIDE_VH": v.stride(1),
        "STRIDE_OT": out.stride(0),
        "D": q.shape[-1],
        "D0": D0,
        "D1": D1,
        "V1": value_block(D1),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_S": 256,
    }


def launch(q, k, v, cu_seqlens, scale: float, out, config: LaunchConfig) -> None:
    """Run the kernel with a given tile, unchecked; the benchmark tunes through it."""
    num_segments = cu_seqlens.shape[0] - 1
    grid = (num_slots(q.shape[0], num_segments, config.block_m), q.shape[1])
    launch_kernel(
        _varlen_attention_kernel,
        grid,
        q,
        k,
        v,
        out,
        cu_seqlens,
        num_segments,
        scale * LOG2E,
        **kernel_constants(q, k, v, out, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write the attention of each segment to `out`; see the module docstring.

    On a CPU without Triton's interpreter this is `attention_ref`.

    Args:
        q, k, v: [T, H, D] views, last axis contiguous; D a multiple of 8 up to 128.
        cu_seqlens: int32 [S + 1] on the same device.
        scale: factor of the scores, positive.
        out: [T, H, D], contiguous, in the dtype of q or float8_e4m3fn. Rows from `cu_seqlens[-1]`
            on are left as they are.

    Raises:
        ValueError: shapes, strides or the head dim are not as above.
        TypeError: a dtype is not supported.
    """
    check_tensors("varlen_attention_triton", q, k, v, cu_seqlens, scale, out)
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"varlen_attention_triton: head dim {q.shape[-1]} is over the limit of {MAX_HEAD_DIM}; "
            'use backend="torch" or "reference"'
        )
    if use_reference(q):
        attention_ref(q, k, v, cu_seqlens, scale=scale, out=out)
        return
    if q.dtype not in DTYPES:
        raise TypeError(
            f"varlen_attention_triton: dtype {q.dtype} is not supported, only "
            f'{", ".join(map(str, DTYPES))}; use backend="reference"'
        )
    if q.numel() == 0 or cu_seqlens.shape[0] == 1:
        return
    launch(q, k, v, cu_seqlens, scale, out, launch_config(q.shape[-1], q.dtype))


@torch.library.custom_op("vitgraph::varlen_attention_triton", mutates_args=("out",))
def varlen_attention_triton_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """`varlen_attention_triton` as an operator that torch.compile can trace."""
    varlen_attention_triton(q, k, v, cu_seqlens, scale=scale, out=out)


@varlen_attention_triton_op.register_fake
def _(q, k, v, cu_seqlens, out, scale) -> None:
    return None
