"""Steps of attention_hopper_kernel.py: products of one group of warps with one stage of k and v.

What the kernel holds of a head is in one block of columns or two (`SPLIT`), each with a ring of
stages [STAGES, rows, 1, columns] and an accumulator of its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 renamed it
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def matrix(ring, stage):
    """One stage of a ring [STAGES, rows, 1, columns] as a matrix."""
    return ring.index(stage).reshape([ring.shape[1], ring.shape[3]])


@gluon.jit
def last_rows(ring, stage, COUNT: gl.constexpr):
    """The last `COUNT` rows of a stage as a matrix."""
    rows = matrix(ring, stage)
    if ring.shape[1] > COUNT:
        rows = rows.slice(ring.shape[1] - COUNT, COUNT)
    return rows


@gluon.jit
def load_boxes(x0, x1, row, head, arrived, ring0, ring1, place, SPLIT: gl.constexpr):
    """Start to copy one box of rows of a head; `arrived` expects its bytes."""
    _load(x0, [row, head, 0], arrived, ring0.index(place))
    if SPLIT:
        _load(x1, [row, head, ring0.shape[3]], arrived, ring1.index(place))


@gluon.jit
def load_queries(q0_tiles, q1_tiles, q_tile, S_LAYOUT: gl.constexpr, SPLIT: gl.constexpr):
    """A group's rows of q in its registers, from where products read them with less traffic."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    q0 = matrix(q0_tiles, q_tile).load(LAYOUT)
    q1 = q0
    if SPLIT:
        q1 = matrix(q1_tiles, q_tile).load(LAYOUT)
    return q0, q1


@gluon.jit
def start_scores(q0, q1, k0_ring, k1_ring, stage, S_LAYOUT: gl.constexpr, COUNT: gl.constexpr,
                 SPLIT: gl.constexpr):  # fmt: skip
    """Scores of a group's rows of q and the last `COUNT` rows of a stage of k."""
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    scores = gl.zeros([q0.shape[0], COUNT], gl.float32, S_LAYOUT)
    k = last_rows(k0_ring, stage, COUNT).permute((1, 0))
    q0 = gl.convert_layout(q0, Q_LAYOUT, assert_trivial=True)
    scores = warpgroup_mma(q0, k, scores, use_acc=False, is_async=True)
    if SPLIT:
        k = last_rows(k1_ring, stage, COUNT).permute((1, 0))
        q1 = gl.convert_layout(q1, Q_LAYOUT, assert_trivial=True)
        scores = warpgroup_mma(q1, k, scores, is_async=True)
    return scores


@gluon.jit
def start_values(p, v0_ring, v1_ring, stage, acc, acc1, COUNT: gl.constexpr, SPLIT: gl.constexpr):
    """Start to add p times the last `COUNT` rows of a stage of v; p0 is what to keep till then."""
    p0 = gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)
    acc = warpgroup_mma(p0, last_rows(v0_ring, stage, COUNT), acc, is_async=True)
    if SPLIT:
        p1 = gl.convert_layout(p, gl.DotOperandLayout(0, acc1.type.layout, 2), assert_trivial=True)
        acc1 = warpgroup_mma(p1, last_rows(v1_ring, stage, COUNT), acc1, is_async=True)
    return acc, acc1, p0


@gluon.jit
def wait_values(acc, acc1, SPLIT: gl.constexpr):
    """Wait for all products that were started."""
    if SPLIT:
        acc, acc1 = warpgroup_mma_wait(0, deps=(acc, acc1))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, acc1


@gluon.jit
def scale_rows(acc, acc1, factor, SPLIT: gl.constexpr):
    """Multiply the rows of both blocks of columns."""
    acc *= gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    if SPLIT:
        acc1 *= gl.convert_layout(factor, gl.SliceLayout(1, acc1.type.layout))[:, None]
    return acc, acc1


@gluon.jit
def partial_sums(p, LAYOUT: gl.constexpr):
    """Sums over the columns that one thread holds, [R, 8]: the threads are left for the end."""
    sums = gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)
    return gl.convert_layout(sums, LAYOUT, assert_trivial=True)


@gluon.jit
def row_max(scores):
    """Maximum of every row, in the layout of its rows, by short chains within a thread."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    parts = scores.reshape([scores.shape[0], 4, scores.shape[1] // 32, 8])
    return gl.convert_layout(gl.max(gl.max(gl.max(parts, 2), 1), 1), LAYOUT, assert_trivial=True)


@gluon.jit
def clear_rows(ring, stage, num_rows, NUM_WARPS: gl.constexpr):
    """Zero the first rows of a stage. Groups may do so at the same time: they write the same."""
    WIDTH: gl.constexpr = ring.shape[3]
    COLUMNS: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // COLUMNS, COLUMNS], [NUM_WARPS, 1], [1, 0]
    )
    part = matrix(ring, stage)
    rows = gl.arange(0, ring.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    values = part.load(LAYOUT)
    part.store(gl.where((rows >= num_rows)[:, None], values, 0.0))


@gluon.jit
def store_rows(base, rows, num_rows, x, STRIDE: gl.constexpr, FIRST: gl.constexpr,
                END: gl.constexpr, NUM_WARPS: gl.constexpr):  # fmt: skip
    """Write x [R, WIDTH] to columns FIRST.. of rows `rows`.. of `base`, clipped at END."""
    WIDTH: gl.constexpr = x.shape[1]
    COLUMNS: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // COLUMNS, COLUMNS], [NUM_WARPS, 1], [1, 0]
    )
    y = gl.convert_layout(x.to(base.dtype.element_ty), LAYOUT)
    offs_m = rows + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    cols = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (offs_m < num_rows)[:, None]
    if FIRST + WIDTH > END:
        mask = mask & (cols < END)[None, :]
    gl.store(base + offs_m[:, None] * STRIDE + cols[None, :], y, mask=mask)
