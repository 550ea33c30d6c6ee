"""The kernel of attention_hopper.py, which says what it computes and how its work is laid out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from .attention_hopper_online import attend_online, has_outgrown
from .attention_hopper_steps import (
    clear_rows,
    load_boxes,
    load_queries,
    partial_sums,
    row_max,
    scale_rows,
    start_scores,
    start_values,
    store_rows,
    wait_values,
)
from .attention_schedule import barrier, next_tile, posted_tile, return_tickets, walk
from .gluon_pdl import wait_for_previous


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next place of the ring, and the parity of the phase that fills it."""
    later = stage + 1
    wraps = later == STAGES
    return gl.where(wraps, 0, later), phase ^ wraps.to(gl.int32)


@gluon.jit
def _make_barriers(
    ready, q_empty, q_full, empty, k_full, v_full, turn, part_full, mail_empty, mail_full,
    GROUPS: gl.constexpr, HELD: gl.constexpr, HAS_MAIL: gl.constexpr,
):  # fmt: skip
    """By the one warp that loads, which needs no barrier between what it does to barriers."""
    STAGES: gl.constexpr = k_full.shape[0]
    Q_BUFFERS: gl.constexpr = q_full.shape[0]
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=GROUPS)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    for i in gl.static_range(Q_BUFFERS):
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(q_full.index(i), count=1)
    if GROUPS > 1:
        for i in gl.static_range(GROUPS):
            mbarrier.init(turn.index(i), count=1)
    if HELD:
        for i in gl.static_range(GROUPS):
            mbarrier.init(part_full.index(i), count=1)
    if HAS_MAIL:
        for i in gl.static_range(2):
            mbarrier.init(mail_empty.index(i), count=GROUPS)
            mbarrier.init(mail_full.index(i), count=1)
    fence_async_shared()
    mbarrier.arrive(ready)


@gluon.jit
def _produce(
    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
    ready, q_empty, q_full, empty, k_full, v_full, turn, part_full,
    tickets_ptr, mail, mail_empty, mail_full,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, SPLIT: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = k0_ring.shape[0]
    BLOCK_N: gl.constexpr = k0_ring.shape[1]
    ROWS_G: gl.constexpr = q0_tiles.shape[1]
    ROWS_Q: gl.constexpr = GROUPS * ROWS_G
    D0: gl.constexpr = k0_ring.shape[3]
    D1: gl.constexpr = k1_ring.shape[3] if SPLIT else 0
    V1: gl.constexpr = v1_ring.shape[3] if SPLIT else 0
    Q_BUFFERS: gl.constexpr = q0_tiles.shape[0] // GROUPS
    last = gl.load(cu_ptr + num_segments)
    segment = 0
    first = 0
    begin = gl.load(cu_ptr)
    end = gl.load(cu_ptr + 1)
    tile = gl.program_id(0)
    _make_barriers(
        ready, q_empty, q_full, empty, k_full, v_full, turn, part_full, mail_empty, mail_full,
        GROUPS, HELD, tickets_ptr is not None,
    )  # fmt: skip
    segment, first, begin, end, count = walk(
        cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
    )
    stage = 0
    phase = 0
    lap = 0
    while tile < first + count:
        tiles_q = gl.cdiv(end - begin, ROWS_Q)
        head = (tile - first) // tiles_q
        row_q = begin + (tile - first) % tiles_q * ROWS_Q
        steps = gl.cdiv(end - begin, BLOCK_N)
        wait_for_previous()  # before the first tile; before later ones there is nothing to wait for
        for i in range(0, steps):
            row = begin + (i - 1) * BLOCK_N
            if i == 0:
                row = end - BLOCK_N
            # a fresh barrier counts as having completed the phase before its first
            mbarrier.wait(empty.index(stage), phase ^ 1)
            arrived = k_full.index(stage)
            mbarrier.expect(arrived, BLOCK_N * (D0 + D1) * 2)
            load_boxes(k0, k1, row, head, arrived, k0_ring, k1_ring, stage, SPLIT)
            if i == 0:
                place = lap & (Q_BUFFERS - 1)
                mbarrier.wait(q_empty.index(place), ((lap >> (Q_BUFFERS - 1)) & 1) ^ 1)
                arrived = q_full.index(place)
                mbarrier.expect(arrived, ROWS_Q * (D0 + D1) * 2)
                for g in gl.static_range(GROUPS):
                    tile_q = place * GROUPS + g
                    rows = row_q + g * ROWS_G
                    load_boxes(q0, q1, rows, head, arrived, q0_tiles, q1_tiles, tile_q, SPLIT)
            arrived = v_full.index(stage)
            mbarrier.expect(arrived, BLOCK_N * (D0 + V1) * 2)
            load_boxes(v0, v1, row, head, arrived, v0_ring, v1_ring, stage, SPLIT)
            stage, phase = next_stage(stage, phase, STAGES)
        # drawn as late as the loads allow: whoever ends early takes what others have not begun
        tile = next_tile(tile, lap, tickets_ptr, mail, mail_empty, mail_full)
        lap += 1
        segment, first, begin, end, count = walk(
            cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
        )
    wait_for_previous()  # without a tile as well
    return_tickets(tickets_ptr)


@gluon.jit
def _consume(
    out_ptr, cu_ptr, num_segments, scale_log2,
    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
    ready, q_empty, q_full, empty, k_full, v_full, turn, tickets_ptr, mail, mail_empty, mail_full,
    k0, k1, v0, v1, part0, part1, part_full,
    D: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, SPLIT: gl.constexpr,
    TAIL: gl.constexpr, HELD: gl.constexpr, NUM_WARPS: gl.constexpr, GROUP: gl.constexpr,
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
    Q_BUFFERS: gl.constexpr = q0_tiles.shape[0] // GROUPS
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [NUM_WARPS, 1], [16, TAIL if TAIL else BLOCK_N, 16]
    )
    M_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 8, 16])
    L_LAYOUT: gl.constexpr = gl.SliceLayout(1, SUM_LAYOUT)
    dtype: gl.constexpr = k0_ring.dtype

    last = gl.load(cu_ptr + num_segments)
    segment = 0
    first = 0
    begin = gl.load(cu_ptr)
    end = gl.load(cu_ptr + 1)
    tile = gl.program_id(0)
    segment, first, begin, end, count = walk(
        cu_ptr, tile, segment, first, begin, end, last, HEADS, ROWS_Q
    )
    wait_for_previous()
    mbarrier.wait(ready, 0)
    stage = 0
    phase = 0
    lap = 0
    turns = 0
    while tile < first + count:
        length = end - begin
        tiles_q = gl.cdiv(length, ROWS_Q)
        head = (tile - first) // tiles_q
        row_q = (tile - first) % tiles_q * ROWS_Q + GROUP * ROWS_G
        steps = gl.cdiv(length, BLOCK_N)
        q_place = lap & (Q_BUFFERS - 1)
        q_tile = q_place * GROUPS + GROUP

        # rows of k and v in the last step, which ends at the segment's last row and comes first
        rest = length - (steps - 1) * BLOCK_N
        is_short = (rest <= TAIL) & (steps > 1)
        whole_steps = steps - is_short.to(gl.int32)
        if (row_q >= length) & (GROUPS > 1):
            # none of its rows are left: it only keeps in step with the other groups
            mbarrier.wait(q_full.index(q_place), (lap >> (Q_BUFFERS - 1)) & 1)
            for i in range(0, steps):
                mbarrier.wait(k_full.index(stage), phase)
                if GROUPS > 1:  # noqa: SIM102 (one `if` would be taken at run time)
                    if i > steps - whole_steps:
                        mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 if GROUP == 0 else 0))
                        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS))
                        turns += 1
                mbarrier.arrive(empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.arrive(q_empty.index(q_place))
        else:
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(q_full.index(q_place), (lap >> (Q_BUFFERS - 1)) & 1)
            q0, q1 = load_queries(q0_tiles, q1_tiles, q_tile, S_LAYOUT, SPLIT)
            acc = gl.zeros([ROWS_G, D0], gl.float32, O_LAYOUT)
            acc1 = acc
            if SPLIT:
                acc1 = gl.zeros([ROWS_G, V1], gl.float32, O1_LAYOUT)
            m = gl.zeros([ROWS_G], gl.float32, M_LAYOUT)
            l = gl.zeros([ROWS_G, 8], gl.float32, SUM_LAYOUT)
            covered = BLOCK_N - rest
            if TAIL > 0:  # noqa: SIM102 (as above)
                if is_short:
                    scores = start_scores(q0, q1, k0_ring, k1_ring, stage, T_LAYOUT, TAIL, SPLIT)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    cols = gl.arange(0, TAIL, layout=gl.SliceLayout(0, T_LAYOUT))
                    # of all its rows, as below: a short step lies in the segment
                    short_m = row_max(scores) * scale_log2
                    scores = gl.where((cols >= TAIL - rest)[None, :], scores, float("-inf"))
                    p = gl.exp2(scores * scale_log2 - short_m[:, None])
                    l = partial_sums(p, SUM_LAYOUT)
                    m = gl.convert_layout(short_m, M_LAYOUT, assert_trivial=True)
                    mbarrier.wait(v_full.index(stage), phase)
                    acc, acc1, _p0 = start_values(
                        p.to(dtype), v0_ring, v1_ring, stage, acc, acc1, TAIL, SPLIT
                    )
                    acc, acc1 = wait_values(acc, acc1, SPLIT)
                    mbarrier.arrive(empty.index(stage))
                    stage, phase = next_stage(stage, phase, STAGES)
                    covered = 0
                    mbarrier.wait(k_full.index(stage), phase)

            scores = start_scores(q0, q1, k0_ring, k1_ring, stage, S_LAYOUT, BLOCK_N, SPLIT)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            # The products have had q from registers, so its loads have ended. A barrier alone does
            # not wait for loads, and TMA may overtake them (seen with two programs at once).
            barrier()
            mbarrier.arrive(q_empty.index(q_place))
            # The maximum is that of all rows of this step that lie in the segment, though other
            # steps add some of them up: the more it is of, the rarer scores outgrow it.
            cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            scores = gl.where((cols >= BLOCK_N - length)[None, :], scores, float("-inf"))
            m_new = row_max(scores) * scale_log2
            scores = gl.where((cols >= covered)[None, :], scores, float("-inf"))
            if TAIL > 0:  # noqa: SIM102 (as above)
                if is_short:
                    m_new = gl.maximum(m, m_new)
                    alpha = gl.exp2(m - m_new)
                    l *= gl.convert_layout(alpha, L_LAYOUT, assert_trivial=True)[:, None]
                    acc, acc1 = scale_rows(acc, acc1, alpha, SPLIT)
            m = m_new
            p = gl.exp2(scores * scale_log2 - m[:, None])
            l += partial_sums(p, SUM_LAYOUT)
            p = p.to(dtype)

            mbarrier.wait(v_full.index(stage), phase)
            for _ in range(1, whole_steps):
                k_stage, k_phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(k_full.index(k_stage), k_phase)
                if GROUPS > 1:
                    mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 if GROUP == 0 else 0))
                scores = start_scores(q0, q1, k0_ring, k1_ring, k_stage, S_LAYOUT, BLOCK_N, SPLIT)
                acc, acc1, p0 = start_values(p, v0_ring, v1_ring, stage, acc, acc1, BLOCK_N, SPLIT)
                if GROUPS > 1:
                    mbarrier.arrive(turn.index((GROUP + 1) % GROUPS))
                scores = warpgroup_mma_wait(2 if SPLIT else 1, deps=(scores,))
                alpha = m
                if not HELD:
                    m_new = gl.maximum(m, row_max(scores) * scale_log2)
                    alpha = gl.exp2(m - m_new)
                    l *= gl.convert_layout(alpha, L_LAYOUT, assert_trivial=True)[:, None]
                    m = m_new
                p_new = gl.exp2(scores * scale_log2 - m[:, None])
                l += partial_sums(p_new, SUM_LAYOUT)
                p_new = p_new.to(dtype)
                mbarrier.wait(v_full.index(k_stage), k_phase)
                # waiting for l as well keeps the softmax above from being moved below the wait
                if SPLIT:
                    acc, acc1, l, _p0 = warpgroup_mma_wait(0, deps=(acc, acc1, l, p0))
                else:
                    acc, l, _p0 = warpgroup_mma_wait(0, deps=(acc, l, p0))
                mbarrier.arrive(empty.index(stage))
                p = p_new
                if not HELD:
                    acc, acc1 = scale_rows(acc, acc1, alpha, SPLIT)
                stage = k_stage
                phase = k_phase
                turns += 1
            if length < BLOCK_N:
                # p is 0 for the rows before the segment, but 0 * NaN would not be
                clear_rows(v0_ring, stage, covered, NUM_WARPS)
                if SPLIT:
                    clear_rows(v1_ring, stage, covered, NUM_WARPS)
                fence_async_shared()
                barrier()
            acc, acc1, _p0 = start_values(p, v0_ring, v1_ring, stage, acc, acc1, BLOCK_N, SPLIT)
            acc, acc1 = wait_values(acc, acc1, SPLIT)
            mbarrier.arrive(empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)

            sums = gl.sum(l, 1)
            if HELD:  # noqa: SIM102 (as above)
                if (steps > 1) & has_outgrown(sums, length - row_q):
                    acc, acc1, sums = attend_online(
                        q0, q1, k0, k1, v0, v1, begin, end, head, scale_log2, acc, acc1, sums,
                        part0, part1, part_full, S_LAYOUT, GROUP, SPLIT,
                    )  # fmt: skip
            inverse = 1.0 / gl.convert_layout(sums, M_LAYOUT, assert_trivial=True)
            acc, acc1 = scale_rows(acc, acc1, inverse, SPLIT)
            # int64 before the multiply: T * H * D may pass 2**31
            base = out_ptr + begin.to(gl.int64) * (HEADS * D) + head * D
            store_rows(base, row_q, length, acc, HEADS * D, 0, D, NUM_WARPS)
            if SPLIT:
                store_rows(base, row_q, length, acc1, HEADS * D, D0, D, NUM_WARPS)

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
    Q_BUFFERS: gl.constexpr,
    TAIL: gl.constexpr,  # rows that a short last step computes; 0 for none
    HELD: gl.constexpr,  # whether a row's maximum stays that of its first steps
    num_warps: gl.constexpr,
):
    """Attention of every segment; grid: any number of programs, which share out the tiles."""
    SPLIT: gl.constexpr = q1 is not None
    ROWS_G: gl.constexpr = q0.block_shape[0]
    BLOCK_N: gl.constexpr = k0.block_shape[0]
    D0: gl.constexpr = k0.block_shape[2]
    dtype: gl.constexpr = k0.dtype
    q0_tiles = gl.allocate_shared_memory(dtype, [Q_BUFFERS * GROUPS, ROWS_G, 1, D0], q0.layout)
    k0_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D0], k0.layout)
    v0_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D0], v0.layout)
    if SPLIT:
        D1: gl.constexpr = k1.block_shape[2]
        V1: gl.constexpr = v1.block_shape[2]
        q1_tiles = gl.allocate_shared_memory(dtype, [Q_BUFFERS * GROUPS, ROWS_G, 1, D1], q1.layout)
        k1_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, D1], k1.layout)
        v1_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, V1], v1.layout)
    else:
        q1_tiles = q0_tiles
        k1_ring = k0_ring
        v1_ring = v0_ring
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # one group has no turns: a barrier that nobody uses would share its memory with other data, and
    # the hardware may write the state of a barrier late
    if GROUPS > 1:
        turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    else:
        turn = q_empty
    # what a group loads by itself if it has to begin again
    part0 = k0_ring
    part1 = k1_ring
    part_full = q_full
    if HELD:
        part0 = gl.allocate_shared_memory(dtype, [GROUPS, BLOCK_N, 1, D0], k0.layout)
        part_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        part1 = part0
        if SPLIT:
            part1 = gl.allocate_shared_memory(
                dtype, [GROUPS, BLOCK_N, 1, k1_ring.shape[3]], k1.layout
            )
    # the producer posts a tile while the groups work on the one before
    mail = q_empty
    mail_empty = q_empty
    mail_full = q_empty
    if tickets_ptr is not None:
        mail = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    # written out: a tuple kept in a variable turns its constexprs into tensors
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 0,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn, part_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT, HELD,
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
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 0,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 1,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn, part_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT, HELD,
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
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 0,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 1,
                )),
                (_consume, (
                    out_ptr, cu_ptr, num_segments, scale_log2,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn,
                    tickets_ptr, mail, mail_empty, mail_full,
                    k0, k1, v0, v1, part0, part1, part_full,
                    D, HEADS, GROUPS, SPLIT, TAIL, HELD, num_warps, 2,
                )),
                (_produce, (
                    q0, q1, k0, k1, v0, v1, cu_ptr, num_segments,
                    q0_tiles, q1_tiles, k0_ring, k1_ring, v0_ring, v1_ring,
                    ready, q_empty, q_full, empty, k_full, v_full, turn, part_full,
                    tickets_ptr, mail, mail_empty, mail_full,
                    HEADS, GROUPS, SPLIT, HELD,
                )),
            ],
            [num_warps, num_warps, 1],
            [160, 160, 24],
        )  # fmt: skip
