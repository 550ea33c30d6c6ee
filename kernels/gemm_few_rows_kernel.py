"""The kernel of gemm_few_rows.py, which says what it computes and how its work is laid out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .activation import apply_activation
from .gluon_norm import add_to_stream, load_moments, load_stream_tile, normalise, scales_of
from .gluon_pdl import wait_for_previous
from .gluon_rope import load_place, rotate
from .gluon_tiles import (
    allocate_vector,
    barrier,
    columns,
    fetch_columns,
    fetch_vector,
    load_async,
    load_part,
    put_vector,
    store_async,
)


@gluon.jit
def _num_live(live_ptr, M):
    live = M
    if live_ptr is not None:
        live = gl.minimum(gl.load(live_ptr), M)
    return live


@gluon.jit
def _load_weight(
    weight, weight_tail, start_n, start_k, N, arrived, block, tail, pred, IS_GATED: gl.constexpr,
):  # fmt: skip
    HEAD: gl.constexpr = block.shape[0]
    if IS_GATED:
        gate, up = start_n // 2, (N + start_n) // 2
        load_async(weight, [gate, start_k], arrived, block.slice(0, HEAD // 2), pred=pred)
        load_async(weight, [up, start_k], arrived, block.slice(HEAD // 2, HEAD // 2), pred=pred)
    else:
        load_async(weight, [start_n, start_k], arrived, block, pred=pred)
    if weight_tail is not None:
        load_async(weight_tail, [start_n + HEAD, start_k], arrived, tail, pred=pred)


@gluon.jit
def _multiply(a, head, tail, acc, acc_tail, USE_ACC: gl.constexpr, HAS_TAIL: gl.constexpr):
    """A step along K, which is left to run; those before it are done."""
    acc = warpgroup_mma(a, head.permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)
    if HAS_TAIL:
        tail = tail.permute((1, 0))
        acc_tail = warpgroup_mma(a, tail, acc_tail, use_acc=USE_ACC, is_async=True)
        acc, acc_tail = warpgroup_mma_wait(2, deps=(acc, acc_tail))
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    return acc, acc_tail


@gluon.jit
def _store_rounded(
    parts, bias, scales, sums, row, column, row_turns, column_turns, out, N, start_m, start_n,
    buffers, LAYOUT: gl.constexpr, ACTIVATION: gl.constexpr, IS_GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = len(parts) // 2 if IS_GATED else len(parts)
    BUFFERS: gl.constexpr = buffers.shape[0]
    WIDTH: gl.constexpr = buffers.shape[2]
    if IS_GATED:
        start_n = start_n // 2
    for i in gl.static_range(PARTS):
        first = start_n + i * WIDTH
        y = normalise(gl.convert_layout(parts[i], LAYOUT), scales, sums, i, LAYOUT)
        if HAS_BIAS:
            y += load_part(bias, i, LAYOUT)
        if row is not None:
            turns = row_turns.index(i), column_turns.index(i)
            y = rotate(y, row, column, turns[0], turns[1], first, N, LAYOUT)
        y = apply_activation(y, ACTIVATION)
        if IS_GATED:
            up = gl.convert_layout(parts[PARTS + i], LAYOUT)
            up = normalise(up, scales, sums, PARTS + i, LAYOUT)
            if HAS_BIAS:
                up += load_part(bias, PARTS + i, LAYOUT)
            y *= up
        if i >= BUFFERS:
            tma.store_wait(BUFFERS - 1)
        buffers.index(i % BUFFERS).store(y.to(out.dtype))
        fence_async_shared()
        store_async(out, [start_m, first], buffers.index(i % BUFFERS))
    tma.store_wait(0)


@gluon.jit
def _store_partial(acc, out_ptr, M, N, start_m, start_n):
    """fp32 as they are: four threads of a row fill a sector of 32 bytes."""
    LAYOUT: gl.constexpr = acc.type.layout
    rows = start_m + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    cols = start_n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    gl.store(out_ptr + rows[:, None] * N + cols[None, :], acc, mask=mask)


@gluon.jit(do_not_specialize=["M", "part_steps", "longer_parts"])  # one compilation for all
def gemm_few_rows_kernel(
    x,  # [M, K] descriptor
    weight,  # [N, K] descriptor, blocks of HEAD rows (half of it when gated)
    weight_tail,  # the same by blocks of TAIL rows, or None
    bias_ptr,  # [N] or None
    position_ptr,  # [M, 4] int32, first row and column of the patches, or None
    turns_ptr,  # [2, N / 2] fp32 with `position_ptr`
    stream,  # [M, N] descriptor, to which the product is added, or None
    gain_ptr,  # [N], what scales the stream for `out`, with `stream`
    offset_ptr,  # [N] fp32 or None, what the stream lacks
    moments_ptr,  # [M, 2, MOST_GROUPS] fp32 or None: of the stream, or of what x was scaled from
    sums_ptr,  # [N] fp32 or None, what of the product the mean of a row contributes
    out,  # [M, N] descriptor (half as wide when gated), or None
    partial_ptr,  # [parts, M, N] fp32, or None
    live_ptr,  # [1] int32 or None
    M,
    N,
    K,
    part_steps,  # of each part of K; the first `longer_parts` have one more
    longer_parts,
    eps,
    ACTIVATION: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_RMS: gl.constexpr,
    MOST_GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One tile of one part of K; grid: tiles of rows, the fastest, of columns, parts."""
    BLOCK_M: gl.constexpr = x.block_shape[0]
    STEP_K: gl.constexpr = x.block_shape[1]
    HEAD: gl.constexpr = weight.block_shape[0] * (2 if IS_GATED else 1)
    HAS_TAIL: gl.constexpr = weight_tail is not None
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, STEP_K], x.layout)
    weight_ring = gl.allocate_shared_memory(x.dtype, [STAGES, HEAD, STEP_K], weight.layout)
    if HAS_TAIL:
        TAIL: gl.constexpr = weight_tail.block_shape[0]
        tail_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TAIL, STEP_K], weight_tail.layout)
    else:
        TAIL: gl.constexpr = 0
        tail_ring = weight_ring
    BLOCK_N: gl.constexpr = HEAD + TAIL
    WIDTH: gl.constexpr = STEP_K  # results leave through the ring of x
    PARTS: gl.constexpr = BLOCK_N // WIDTH
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bias = allocate_vector(bias_ptr, full, PARTS, WIDTH)
    row_turns = allocate_vector(turns_ptr, full, PARTS, WIDTH // 2)
    column_turns = allocate_vector(turns_ptr, full, PARTS, WIDTH // 2)
    gain = allocate_vector(gain_ptr, full, PARTS, WIDTH)
    offset = allocate_vector(offset_ptr, full, PARTS, WIDTH)
    sums = allocate_vector(sums_ptr, full, PARTS, WIDTH)
    start_m = gl.program_id(0) * BLOCK_M
    start_n = gl.program_id(1) * BLOCK_N
    first_step, steps = 0, gl.cdiv(K, STEP_K)
    if partial_ptr is not None:
        part = gl.program_id(2)
        partial_ptr += part * M * N
        first_step = part * part_steps + gl.minimum(part, longer_parts)
        steps = gl.where(part < longer_parts, part_steps + 1, part_steps)
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * STEP_K * 2
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    # weights do not depend on the kernel before: as many as fit are on their way when it ends
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES, pred=i < steps)
        _load_weight(
            weight, weight_tail, start_n, (first_step + i) * STEP_K, N, full.index(i),
            weight_ring.index(i), tail_ring.index(i), i < steps, IS_GATED,
        )  # fmt: skip
    stream_tiles, stream_full = x_ring, full
    if stream is not None:
        stream_tiles = gl.allocate_shared_memory(x.dtype, [PARTS, BLOCK_M, WIDTH], stream.layout)
        stream_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(stream_full, count=1)
        fence_async_shared()
        load_stream_tile(stream, start_m, start_n, stream_full, stream_tiles)
    HEAD_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TAIL, 16])
    PART_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    biases = fetch_columns(bias_ptr, start_n, N, IS_GATED, PARTS, WIDTH, num_warps)
    pair, pairs = start_n // 2, N // 2
    of_row = fetch_vector(turns_ptr, pair, pairs, PARTS, WIDTH // 2, num_warps)
    of_column = fetch_vector(turns_ptr, pairs + pair, 2 * pairs, PARTS, WIDTH // 2, num_warps)
    gains = fetch_columns(gain_ptr, start_n, N, False, PARTS, WIDTH, num_warps)
    offsets = fetch_columns(offset_ptr, start_n, N, False, PARTS, WIDTH, num_warps)
    column_sums = fetch_columns(sums_ptr, start_n, N, IS_GATED, PARTS, WIDTH, num_warps)
    row = load_place(position_ptr, start_m, M, 0, BLOCK_M, HEAD_LAYOUT)
    column = load_place(position_ptr, start_m, M, 1, BLOCK_M, HEAD_LAYOUT)
    live = _num_live(live_ptr, M)
    wait_for_previous()
    early = gl.minimum(steps, STAGES)
    for i in range(early):
        load_async(x, [start_m, (first_step + i) * STEP_K], full.index(i), x_ring.index(i))
    if start_m < live:
        moments = load_moments(
            moments_ptr if stream is None else None, start_m, live, MOST_GROUPS, BLOCK_M, num_warps
        )
        acc = gl.zeros([BLOCK_M, HEAD], gl.float32, HEAD_LAYOUT)
        tail = acc
        if HAS_TAIL:
            tail = gl.zeros([BLOCK_M, TAIL], gl.float32, TAIL_LAYOUT)
        mbarrier.wait(full.index(0), 0)
        acc, tail = _multiply(
            x_ring.index(0), weight_ring.index(0), tail_ring.index(0), acc, tail, False, HAS_TAIL
        )
        # what the epilogue needs, while the tensor cores are at work
        put_vector(bias, biases, 0)
        put_vector(row_turns, of_row, 0)
        put_vector(column_turns, of_column, 0)
        put_vector(gain, gains, 0)
        put_vector(offset, offsets, 0)
        put_vector(sums, column_sums, 0)
        scales = scales_of(moments, K, eps, IS_RMS, WIDTH, PART_LAYOUT)
        for i in range(1, steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            acc, tail = _multiply(
                x_ring.index(stage), weight_ring.index(stage), tail_ring.index(stage), acc, tail,
                True, HAS_TAIL,
            )  # fmt: skip
            if i + STAGES <= steps:
                # the step before has been read, so its place takes the one a ring further on
                stage = (i - 1) % STAGES
                start_k = (first_step + i - 1 + STAGES) * STEP_K
                barrier()  # by all warps
                mbarrier.expect(full.index(stage), BYTES)
                _load_weight(
                    weight, weight_tail, start_n, start_k, N, full.index(stage),
                    weight_ring.index(stage), tail_ring.index(stage), True, IS_GATED,
                )  # fmt: skip
                load_async(x, [start_m, start_k], full.index(stage), x_ring.index(stage))
        if HAS_TAIL:
            acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if partial_ptr is not None:
            _store_partial(acc, partial_ptr, M, N, start_m, start_n)
            if HAS_TAIL:
                _store_partial(tail, partial_ptr, M, N, start_m, start_n + HEAD)
        else:
            if HAS_TAIL:
                parts = columns(acc, HEAD // WIDTH) + columns(tail, TAIL // WIDTH)
            else:
                parts = columns(acc, HEAD // WIDTH)
            if stream is not None:
                mbarrier.wait(stream_full, 0)
                add_to_stream(
                    parts, gain, offset, stream, stream_tiles, out, x_ring, moments_ptr, M, N,
                    live, start_m, start_n, MOST_GROUPS, PART_LAYOUT, offset_ptr is not None,
                )  # fmt: skip
            else:
                _store_rounded(
                    parts, bias, scales, sums, row, column, row_turns, column_turns, out, N,
                    start_m, start_n, x_ring, PART_LAYOUT, ACTIVATION, IS_GATED,
                    bias_ptr is not None,
                )  # fmt: skip
    else:
        # the memory of a program that has ended belongs to others
        for i in range(early):
            mbarrier.wait(full.index(i), 0)
        if stream is not None:
            mbarrier.wait(stream_full, 0)
