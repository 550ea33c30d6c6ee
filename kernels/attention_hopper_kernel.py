"""The kernel of attention_hopper.py, which says what it computes and how its work is laid out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_schedule import barrier, next_tile, posted_tile, return_tickets, walk
from .gluon_pdl import wait_for_previous

# Triton 3.7 renamed it
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _produce(
    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
    q_empty, q_full, empty, k_full, v_full, tickets_ptr, mail, mail_empty, mail_full,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = k0_ring.shape[0]
    BLOCK_N: gl.constexpr = k0_ring.shape[1]
    ROWS_G: gl.constexpr = q0_tiles.shape[1]
    ROWS_Q: gl.constexpr = GROUPS * ROWS_G
    D0: gl.constexpr = k0_ring.shape[3]
    D1: gl.constexpr = k1_ring.shape[3] if SPLIT else 0
    V1: gl.constexpr = v1_ring.shape[3] if SPLIT else 0
    wait_for_previous()
    last = gl.load(cu_ptr + num_segments)
    segment = 0
    first = 0
    begin = gl.load(cu_ptr)
    end = gl.load(cu_ptr + 1)
    tile = gl.program_id(0)
    segment, first, begin, end, count = walk(
        cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
    )
    step = 0
    lap = 0
    while tile < first + count:
        tiles_q = gl.cdiv(end - begin, ROWS_Q)
        head = (tile - first) // tiles_q
        row_q = begin + (tile - first) % tiles_q * ROWS_Q
        steps = gl.cdiv(end - begin, BLOCK_N)
        for i in range(0, steps):
            row = begin + (i - 1) * BLOCK_N
            if i == 0:
                row = end - BLOCK_N
            stage = step % STAGES
            # a fresh barrier counts as having completed the phase before its first
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            arrived = k_full.index(stage)
            mbarrier.expect(arrived, BLOCK_N * (D0 + D1) * 2)
            _load(k0, [row, head, 0], arrived, k0_ring.index(stage))
            if SPLIT:
                _load(k1, [row, head, D0], arrived, k1_ring.index(stage))
            if i == 0:
                mbarrier.wait(q_empty.index(0), (lap & 1) ^ 1)
                arrived = q_full.index(0)
                mbarrier.expect(arrived, ROWS_Q * (D0 + D1) * 2)
                for g in gl.static_range(GROUPS):
                    _load(q0, [row_q + g * ROWS_G, head, 0], arrived, q0_tiles.index(g))
                    if SPLIT:
                        _load(q1, [row_q + g * ROWS_G, head, D0], arrived, q1_tiles.index(g))
            arrived = v_full.index(stage)
            mbarrier.expect(arrived, BLOCK_N * (D0 + V1) * 2)
            _load(v0, [row, head, 0], arrived, v0_ring.index(stage))
            if SPLIT:
                _load(v1, [row, head, D0], arrived, v1_ring.index(stage))
            step += 1
        # drawn as late as the loads allow: whoever ends early takes what others have not begun
        tile = next_tile(tile, lap, tickets_ptr, mail, mail_empty, mail_full)
        lap += 1
        segment, first, begin, end, count = walk(
            cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
        )
    return_tickets(tickets_ptr)


@gluon.jit
def _matrix(ring, stage):
    """One stage of a ring [STAGES, rows, 1, columns] as a matrix."""
    return ring.index(stage).reshape([ring.shape[1], ring.shape[3]])


@gluon.jit
def _start_scores(q0_tiles, q1_tiles, k0_ring, k1_ring, stage, S_LAYOUT: gl.constexpr,
                  GROUP: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    BLOCK_N: gl.constexpr = k0_ring.shape[1]
    ROWS_G: gl.constexpr = q0_tiles.shape[1]
    scores = gl.zeros([ROWS_G, BLOCK_N], gl.float32, S_LAYOUT)
    k = _matrix(k0_ring, stage).permute((1, 0))
    scores = warpgroup_mma(_matrix(q0_tiles, GROUP), k, scores, use_acc=False, is_async=True)
    if SPLIT:
        k = _matrix(k1_ring, stage).permute((1, 0))
        scores = warpgroup_mma(_matrix(q1_tiles, GROUP), k, scores, is_async=True)
    return scores


@gluon.jit
def _partial_sums(p):
    """Sums over the columns that one thread holds, [R, 8]: the threads are left for the end."""
    return gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def _row_max(scores):
    """Maximum of every row, in the layout of its rows, by short chains within a thread."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    parts = scores.reshape([scores.shape[0], 4, scores.shape[1] // 32, 8])
    return gl.convert_layout(gl.max(gl.max(gl.max(parts, 2), 1), 1), LAYOUT, assert_trivial=True)


@gluon.jit
def _clear_rows(ring, stage, num_rows, NUM_WARPS: gl.constexpr):
    """Zero the first rows of a stage. Groups may do so at the same time: they write the same."""
    WIDTH: gl.constexpr = ring.shape[3]
    COLUMNS: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // COLUMNS, COLUMNS], [NUM_WARPS, 1], [1, 0]
    )
    part = _matrix(ring, stage)
    rows = gl.arange(0, ring.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    values = part.load(LAYOUT)
    part.store(gl.where((rows >= num_rows)[:, None], values, 0.0))


@gluon.jit
def _store_rows(base, rows, num_rows, x, STRIDE: gl.constexpr, FIRST: gl.constexpr,
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


@gluon.jit
def _consume(
    out_ptr, cu_ptr, num_segments, scale_log2,
    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
    q_empty, q_full, empty, k_full, v_full, turn, tickets_ptr, mail, mail_empty, mail_full,
    D: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, SPLIT: gl.constexpr,
    NUM_WARPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = k0_ring.shape[0]
    BLOCK_N: gl.constexpr = k0_ring.shape[1]
    ROWS_G: gl.constexpr = q0_tiles.shape[1]
    ROWS_Q: gl.constexpr = GROUPS * ROWS_G
    D0: gl.constexpr = k0_ring.shape[3]
    V1: gl.constexpr = v1_ring.shape[3] if SPLIT else 0
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, D0, 16])
    O1_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [NUM_WARPS, 1], [16, V1 if SPLIT else D0, 16]
    )
    M_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    P1_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O1_LAYOUT, 2)
    dtype: gl.constexpr = k0_ring.dtype

    wait_for_previous()
    last = gl.load(cu_ptr + num_segments)
    segment = 0
    first = 0
    begin = gl.load(cu_ptr)
    end = gl.load(cu_ptr + 1)
    tile = gl.program_id(0)
    segment, first, begin, end, count = walk(
        cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
    )
    step = 0
    lap = 0
    turns = 0
    while tile < first + count:
        length = end - begin
        tiles_q = gl.cdiv(length, ROWS_Q)
        head = (tile - first) // tiles_q
        row_q = (tile - first) % tiles_q * ROWS_Q + GROUP * ROWS_G
        steps = gl.cdiv(length, BLOCK_N)

        # the step that ends at the segment's end: rows that belong to the one before are masked
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        mbarrier.wait(q_full.index(0), lap & 1)
        scores = _start_scores(q0_tiles, q1_tiles, k0_ring, k1_ring, stage, S_LAYOUT, GROUP, SPLIT)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        covered = steps * BLOCK_N - length
        scores = gl.where((cols >= covered)[None, :], scores, float("-inf"))
        m = _row_max(scores) * scale_log2
        p = gl.exp2(scores * scale_log2 - m[:, None])
        l = _partial_sums(p)
        L_LAYOUT: gl.constexpr = gl.SliceLayout(1, l.type.layout)  # pyright: ignore[reportAttributeAccessIssue]
        p = p.to(dtype)
        acc = gl.zeros([ROWS_G, D0], gl.float32, O_LAYOUT)
        acc1 = acc
        if SPLIT:
            acc1 = gl.zeros([ROWS_G, V1], gl.float32, O1_LAYOUT)

        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        for _ in range(1, steps):
            later = step + 1
            k_stage = later % STAGES
            mbarrier.wait(k_full.index(k_stage), (later // STAGES) & 1)
            if GROUPS > 1:
                mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 if GROUP == 0 else 0))
            scores = _start_scores(
                q0_tiles, q1_tiles, k0_ring, k1_ring, k_stage, S_LAYOUT, GROUP, SPLIT
            )
            p0 = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
            acc = warpgroup_mma(p0, _matrix(v0_ring, stage), acc, is_async=True)
            if SPLIT:
                p1 = gl.convert_layout(p, P1_LAYOUT, assert_trivial=True)
                acc1 = warpgroup_mma(p1, _matrix(v1_ring, stage), acc1, is_async=True)
            if GROUPS > 1:
                mbarrier.arrive(turn.index((GROUP + 1) % GROUPS))
            scores = warpgroup_mma_wait(2 if SPLIT else 1, deps=(scores,))
            m_new = gl.maximum(m, _row_max(scores) * scale_log2)
            p_new = gl.exp2(scores * scale_log2 - m_new[:, None])
            alpha = gl.exp2(m - m_new)
            l *= gl.convert_layout(alpha, L_LAYOUT, assert_trivial=True)[:, None]
            l += _partial_sums(p_new)
            p_new = p_new.to(dtype)
            m = m_new
            mbarrier.wait(v_full.index(k_stage), (later // STAGES) & 1)
            # waiting for l as well keeps the softmax above from being moved below the wait
            if SPLIT:
                acc, acc1, l, _p0 = warpgroup_mma_wait(0, deps=(acc, acc1, l, p0))
            else:
                acc, l, _p0 = warpgroup_mma_wait(0, deps=(acc, l, p0))
            mbarrier.arrive(empty.index(stage))
            p = p_new
            acc *= gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
            if SPLIT:
                acc1 *= gl.convert_layout(alpha, gl.SliceLayout(1, O1_LAYOUT))[:, None]
            step = later
            stage = k_stage
            turns += 1
        # the last products with q are done
        mbarrier.arrive(q_empty.index(0))

        if length < BLOCK_N:
            # p is 0 for the rows before the segment, but 0 * NaN would not be
            _clear_rows(v0_ring, stage, covered, NUM_WARPS)
            if SPLIT:
                _clear_rows(v1_ring, stage, covered, NUM_WARPS)
            fence_async_shared()
            barrier()
        p0 = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
        acc = warpgroup_mma(p0, _matrix(v0_ring, stage), acc, is_async=True)
        if SPLIT:
            p1 = gl.convert_layout(p, P1_LAYOUT, assert_trivial=True)
            acc1 = warpgroup_mma(p1, _matrix(v1_ring, stage), acc1, is_async=True)
            acc, acc1 = warpgroup_mma_wait(0, deps=(acc, acc1))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage))
        step += 1

        inverse = 1.0 / gl.convert_layout(gl.sum(l, 1), M_LAYOUT, assert_trivial=True)
        # int64 before the multiply: T * H * D may pass 2**31
        base = out_ptr + begin.to(gl.int64) * (HEADS * D) + head * D
        scaled = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
        _store_rows(base, row_q, length, scaled, HEADS * D, 0, D, NUM_WARPS)
        if SPLIT:
            scaled = acc1 * gl.convert_layout(inverse, gl.SliceLayout(1, O1_LAYOUT))[:, None]
            _store_rows(base, row_q, length, scaled, HEADS * D, D0, D, NUM_WARPS)

        tile = posted_tile(tile, lap, tickets_ptr, mail, mail_empty, mail_full, NUM_WARPS)
        lap += 1
        segment, first, begin, end, count = walk(
            cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
        )


@gluon.jit(do_not_specialize=["num_segments"])  # one compilation for every number of segments
def attention_hopper_kernel(
    q0,  # [T, H, D] descriptor: boxes of 64 rows, the first columns of one head
    q1,  # the same for the other columns, or None
    k0,  # boxes of BLOCK_N rows
    k1,
    v0,
    v1,
    out_ptr,  # [T, H, D], contiguous
    cu_ptr,  # [S + 1]
    num_segments,
    scale_log2,
    tickets_ptr,  # [2] int32: tiles drawn, programs ended; zero before and after; or None
    D: gl.constexpr,
    HEADS: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Attention of every segment; grid: any number of programs, which share out the tiles."""
    SPLIT: gl.constexpr = q1 is not None
    ROWS_G: gl.constexpr = q0.block_shape[0]
    BLOCK_N: gl.constexpr = k0.block_shape[0]
    D0: gl.constexpr = k0.block_shape[2]
    dtype: gl.constexpr = k0.dtype
    q0_tiles = gl.allocate_shared_memory(dtype, [GROUPS, ROWS_G, 1, D0], q0.layout)
    k0_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D0], k0.layout)
    v0_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D0], v0.layout)
    if SPLIT:
        D1: gl.constexpr = k1.block_shape[2]
        V1: gl.constexpr = v1.block_shape[2]
        q1_tiles = gl.allocate_shared_memory(dtype, [GROUPS, ROWS_G, 1, D1], q1.layout)
        k1_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D1], k1.layout)
        v1_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, V1], v1.layout)
    else:
        q1_tiles = q0_tiles
        k1_ring = k0_ring
        v1_ring = v0_ring
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # one group has no turns: a barrier that nobody uses would share its memory with other data, and
    # the hardware may write the state of a barrier late
    if GROUPS > 1:
        turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    else:
        turn = q_empty
    # the producer posts a tile while the groups work on the one before
    mail = q_empty
    mail_empty = q_empty
    mail_full = q_empty
    if tickets_ptr is not None:
        mail = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(mail_empty.index(i), count=GROUPS)
            mbarrier.init(mail_full.index(i), count=1)
    mbarrier.init(q_empty.index(0), count=GROUPS)
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=GROUPS)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    if GROUPS > 1:
        for i in gl.static_range(GROUPS):
            mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    # written out: a tuple kept in a variable turns its constexprs into tensors
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 0,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 0,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 1,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT,
                )),
            ],
            [num_warps, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 0,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 1,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    D, HEADS, GROUPS, SPLIT, num_warps, 2,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    q_empty, q_full, empty, k_full, v_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT,
                )),
            ],
            [num_warps, num_warps, 1],
            [160, 160, 24],
        )  # fmt: skip
