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

from .gluon_norm import (
    add_to_stream,
    linear_of_scaled,
    load_moments,
    load_stream_tile,
    scales_of,
)
from .gluon_pdl import wait_for_previous
from .gluon_rope import load_place, rotate, turn_of, turns_of
from .gluon_tiles import (
    activate,
    allocate_vector,
    barrier,
    columns,
    fetch_columns,
    fetch_vector,
    load_async,
    put_vector,
    store_async,
)

# Parts of a result, and of the cos and sin for it that are computed before the products, that
# registers hold together
MOST_HELD = gl.constexpr(6)


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
        _load_halves(weight, start_n // 2, start_k, N, arrived, block, pred)
        if weight_tail is not None:
            _load_halves(weight_tail, (start_n + HEAD) // 2, start_k, N, arrived, tail, pred)
    else:
        load_async(weight, [start_n, start_k], arrived, block, pred=pred)
        if weight_tail is not None:
            load_async(weight_tail, [start_n + HEAD, start_k], arrived, tail, pred=pred)


@gluon.jit
def _load_halves(weight, gate, start_k, N, arrived, block, pred):
    """Rows of the gate from `gate` on, and the same of the up projection."""
    HALF: gl.constexpr = block.shape[0] // 2
    load_async(weight, [gate, start_k], arrived, block.slice(0, HALF), pred=pred)
    load_async(weight, [N // 2 + gate, start_k], arrived, block.slice(HALF, HALF), pred=pred)


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
def _gate_first(acc, tail, WIDTH: gl.constexpr):
    """Parts of two tiles, each of which is half gate and half up: all of the gate first."""
    acc, tail = columns(acc, 2), columns(tail, 2)
    HEAD: gl.constexpr = acc[0].shape[1] // WIDTH
    TAIL: gl.constexpr = tail[0].shape[1] // WIDTH
    gate = columns(acc[0], HEAD) + columns(tail[0], TAIL)
    return gate + columns(acc[1], HEAD) + columns(tail[1], TAIL)


@gluon.jit
def _store_rounded(
    parts, bias, scales, sums, turns, row, column, row_turns, column_turns, out, N, start_m,
    start_n, buffers, LAYOUT: gl.constexpr, ACTIVATION: gl.constexpr, IS_GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = len(parts) // 2 if IS_GATED else len(parts)
    BUFFERS: gl.constexpr = buffers.shape[0]
    WIDTH: gl.constexpr = buffers.shape[2]
    if IS_GATED:
        start_n = start_n // 2
    for i in gl.static_range(PARTS):
        first = start_n + i * WIDTH
        y = linear_of_scaled(parts[i], scales, sums, bias, i, HAS_BIAS, LAYOUT)
        if row is not None:
            if i < len(turns):
                turn = turns[i]
            else:
                of_row, of_column = row_turns.index(i), column_turns.index(i)
                turn = turn_of(row, column, of_row, of_column, first, N, LAYOUT)
            y = rotate(y, turn, first, N, LAYOUT)
        y = activate(y, ACTIVATION)
        if IS_GATED:
            y *= linear_of_scaled(
                parts[PARTS + i], scales, sums, bias, PARTS + i, HAS_BIAS, LAYOUT
            )  # fmt: skip
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


@gluon.jit
def _load_first(
    weight, weight_tail, stream, start_m, start_n, first_step, steps, N, BYTES: gl.constexpr,
    weight_ring, tail_ring, stream_tiles, full, stream_full, IS_GATED: gl.constexpr,
):  # fmt: skip
    """What does not depend on the kernel before: a ring of weights, and a tile of the stream."""
    STAGES: gl.constexpr = weight_ring.shape[0]
    STEP_K: gl.constexpr = weight_ring.shape[2]
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES, pred=i < steps)
        _load_weight(
            weight, weight_tail, start_n, (first_step + i) * STEP_K, N, full.index(i),
            weight_ring.index(i), tail_ring.index(i), i < steps, IS_GATED,
        )  # fmt: skip
    if stream is not None:
        load_stream_tile(stream, start_m, start_n, stream_full, stream_tiles)


@gluon.jit
def _load_first_x(x, start_m, first_step, steps, x_ring, full):
    STAGES: gl.constexpr = x_ring.shape[0]
    STEP_K: gl.constexpr = x_ring.shape[2]
    for i in range(gl.minimum(steps, STAGES)):
        start_k = (first_step + i) * STEP_K
        load_async(x, [start_m, start_k], full.index(i), x_ring.index(i))


@gluon.jit
def _load_step(
    x, weight, weight_tail, start_m, start_n, step, N, BYTES: gl.constexpr, arrived, x_block,
    weight_block, tail_block, IS_GATED: gl.constexpr,
):  # fmt: skip
    STEP_K: gl.constexpr = x_block.shape[1]
    start_k = step * STEP_K
    mbarrier.expect(arrived, BYTES)
    _load_weight(
        weight, weight_tail, start_n, start_k, N, arrived, weight_block, tail_block, True, IS_GATED
    )  # fmt: skip
    load_async(x, [start_m, start_k], arrived, x_block)


@gluon.jit
def _drain(steps, full, stream, stream_full):
    """Wait for what was asked for: the memory of a program that has ended belongs to others."""
    STAGES: gl.constexpr = full.shape[0]
    for i in range(gl.minimum(steps, STAGES)):
        mbarrier.wait(full.index(i), 0)
    if stream is not None:
        mbarrier.wait(stream_full, 0)


@gluon.jit
def _produce(
    x, weight, weight_tail, stream, live_ptr, M, N, start_m, start_n, first_step, steps,
    x_ring, weight_ring, tail_ring, stream_tiles, ready, empty, full, stream_full,
    BYTES: gl.constexpr, IS_GATED: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = x_ring.shape[0]
    # one warp needs no barrier between what it does to barriers, so it makes them
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    if stream is not None:
        mbarrier.init(stream_full, count=1)
    fence_async_shared()
    _load_first(
        weight, weight_tail, stream, start_m, start_n, first_step, steps, N, BYTES, weight_ring,
        tail_ring, stream_tiles, full, stream_full, IS_GATED,
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
    mbarrier.arrive(ready)
    live = _num_live(live_ptr, M)
    wait_for_previous()
    _load_first_x(x, start_m, first_step, steps, x_ring, full)
    if start_m < live:
        for step in range(STAGES, steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_step(
                x, weight, weight_tail, start_m, start_n, first_step + step, N, BYTES,
                full.index(stage), x_ring.index(stage), weight_ring.index(stage),
                tail_ring.index(stage), IS_GATED,
            )  # fmt: skip
    else:
        _drain(steps, full, stream, stream_full)


@gluon.jit
def _consume(
    x, weight, weight_tail, bias_ptr, position_ptr, turns_ptr, gain_ptr, offset_ptr, sums_ptr,
    moments_ptr, stream, out, partial_ptr, live_ptr, M, N, K, eps, start_m, start_n, first_step,
    steps, x_ring, weight_ring, tail_ring, stream_tiles, bias, row_turns, column_turns, gain,
    offset, sums, ready, empty, full, stream_full,
    BYTES: gl.constexpr, ACTIVATION: gl.constexpr, IS_GATED: gl.constexpr, IS_RMS: gl.constexpr,
    MOST_GROUPS: gl.constexpr, HAS_PRODUCER: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    WIDTH: gl.constexpr = x_ring.shape[2]  # results leave through the ring of x
    HEAD: gl.constexpr = weight_ring.shape[1]
    TAIL: gl.constexpr = tail_ring.shape[1]
    HAS_TAIL: gl.constexpr = weight_tail is not None
    PARTS: gl.constexpr = (HEAD + (TAIL if HAS_TAIL else 0)) // WIDTH
    HEAD_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HEAD, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, TAIL, 16])
    PART_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, WIDTH, 16])
    row = load_place(position_ptr, start_m, M, 0, BLOCK_M, HEAD_LAYOUT)
    column = load_place(position_ptr, start_m, M, 1, BLOCK_M, HEAD_LAYOUT)
    pair, pairs = start_n // 2, N // 2
    of_row = fetch_vector(turns_ptr, pair, pairs, PARTS, WIDTH // 2, NUM_WARPS)
    of_column = fetch_vector(turns_ptr, pairs + pair, 2 * pairs, PARTS, WIDTH // 2, NUM_WARPS)
    biases = fetch_columns(bias_ptr, start_n, N, IS_GATED, PARTS, WIDTH, NUM_WARPS)
    gains = fetch_columns(gain_ptr, start_n, N, False, PARTS, WIDTH, NUM_WARPS)
    offsets = fetch_columns(offset_ptr, start_n, N, False, PARTS, WIDTH, NUM_WARPS)
    column_sums = fetch_columns(sums_ptr, start_n, N, IS_GATED, PARTS, WIDTH, NUM_WARPS)
    live = _num_live(live_ptr, M)
    wait_for_previous()
    if not HAS_PRODUCER:
        _load_first_x(x, start_m, first_step, steps, x_ring, full)
    if start_m < live:
        moments = load_moments(
            moments_ptr if stream is None else None, start_m, live, MOST_GROUPS, BLOCK_M, NUM_WARPS
        )
        # what the epilogue needs besides the products, before x is there
        put_vector(row_turns, of_row, 0)
        put_vector(column_turns, of_column, 0)
        put_vector(bias, biases, 0)
        put_vector(gain, gains, 0)
        put_vector(offset, offsets, 0)
        put_vector(sums, column_sums, 0)
        turns = turns_of(
            row, column, row_turns, column_turns, start_n, N, 0, min(PARTS, MOST_HELD - PARTS),
            PART_LAYOUT,
        )  # fmt: skip
        scales = scales_of(moments, K, eps, IS_RMS, WIDTH, PART_LAYOUT)
        if HAS_PRODUCER:
            mbarrier.wait(ready, 0)
        acc = gl.zeros([BLOCK_M, HEAD], gl.float32, HEAD_LAYOUT)
        tail = acc
        if HAS_TAIL:
            tail = gl.zeros([BLOCK_M, TAIL], gl.float32, TAIL_LAYOUT)
        mbarrier.wait(full.index(0), 0)
        # apart, so that the sums need no zeros: in a loop that begins with them ptxas of CUDA 13
        # may have each product wait for the one before
        acc, tail = _multiply(
            x_ring.index(0), weight_ring.index(0), tail_ring.index(0), acc, tail, False, HAS_TAIL
        )
        for i in range(1, steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            acc, tail = _multiply(
                x_ring.index(stage), weight_ring.index(stage), tail_ring.index(stage), acc, tail,
                True, HAS_TAIL,
            )  # fmt: skip
            before = (i - 1) % STAGES
            if HAS_PRODUCER:
                mbarrier.arrive(empty.index(before))
            else:
                if i - 1 + STAGES < steps:
                    barrier()  # all warps have read it
                    _load_step(
                        x, weight, weight_tail, start_m, start_n, first_step + i - 1 + STAGES, N,
                        BYTES, full.index(before), x_ring.index(before), weight_ring.index(before),
                        tail_ring.index(before), IS_GATED,
                    )  # fmt: skip
        if HAS_TAIL:
            acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if partial_ptr is not None:
            _store_partial(acc, partial_ptr, M, N, start_m, start_n)
            if HAS_TAIL:
                _store_partial(tail, partial_ptr, M, N, start_m, start_n + HEAD)
        else:
            if IS_GATED and HAS_TAIL:
                parts = _gate_first(acc, tail, WIDTH)
            elif HAS_TAIL:
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
                    parts, bias, scales, sums, turns, row, column, row_turns, column_turns, out, N,
                    start_m, start_n, x_ring, PART_LAYOUT, ACTIVATION, IS_GATED,
                    bias_ptr is not None,
                )  # fmt: skip
    else:
        if not HAS_PRODUCER:
            _drain(steps, full, stream, stream_full)


@gluon.jit(do_not_specialize=["M", "part_steps", "longer_parts"])  # one compilation for all
def gemm_few_rows_kernel(
    x,  # [M, K] descriptor
    weight,  # [N, K] descriptor, blocks of HEAD rows (half of it when gated)
    weight_tail,  # the same by blocks of TAIL rows (half of it when gated), or None
    bias_ptr,  # [N] or None
    position_ptr,  # [M, 4] int32, first row and column of the patches, or None
    turns_ptr,  # [2, N / 2] fp32 with `position_ptr`
    stream,  # [M, N] descriptor, to which the product is added, or None
    gain_ptr,  # [N], what scales the stream for `out`, with `stream`
    offset_ptr,  # [N] fp32 or None, what the stream lacks
    moments_ptr,  # [M, 2, MOST_GROUPS] fp32 or None: of the stream, or of what x was scaled from
    sums_ptr,  # [N] fp32 or None, what of the product the mean of a row contributes
    out,  # [M, N] descriptor (half as wide when gated), or None
    partial_ptr,  # [splits, M, N] fp32, or None
    live_ptr,  # [1] int32 or None
    M,
    N,
    K,
    part_steps,  # of a part of K, the first `longer_parts` of them have one more
    longer_parts,
    eps,
    ACTIVATION: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_RMS: gl.constexpr,
    MOST_GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_PRODUCER: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One tile of one part; grid: tiles of rows, tiles of columns, parts."""
    BLOCK_M: gl.constexpr = x.block_shape[0]
    STEP_K: gl.constexpr = x.block_shape[1]
    HEAD: gl.constexpr = weight.block_shape[0] * (2 if IS_GATED else 1)
    HAS_TAIL: gl.constexpr = weight_tail is not None
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, STEP_K], x.layout)
    weight_ring = gl.allocate_shared_memory(x.dtype, [STAGES, HEAD, STEP_K], weight.layout)
    if HAS_TAIL:
        TAIL: gl.constexpr = weight_tail.block_shape[0] * (2 if IS_GATED else 1)
        tail_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TAIL, STEP_K], weight_tail.layout)
        BLOCK_N: gl.constexpr = HEAD + TAIL
    else:
        tail_ring = weight_ring
        BLOCK_N: gl.constexpr = HEAD
    PARTS: gl.constexpr = BLOCK_N // STEP_K
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * STEP_K * 2
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready, empty = full, full
    if HAS_PRODUCER:
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bias = allocate_vector(bias_ptr, full, PARTS, STEP_K)
    row_turns = allocate_vector(turns_ptr, full, PARTS, STEP_K // 2)
    column_turns = allocate_vector(turns_ptr, full, PARTS, STEP_K // 2)
    gain = allocate_vector(gain_ptr, full, PARTS, STEP_K)
    offset = allocate_vector(offset_ptr, full, PARTS, STEP_K)
    sums = allocate_vector(sums_ptr, full, PARTS, STEP_K)
    stream_tiles, stream_full = x_ring, full
    if stream is not None:
        stream_tiles = gl.allocate_shared_memory(x.dtype, [PARTS, BLOCK_M, STEP_K], stream.layout)
        stream_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    start_m = gl.program_id(0) * BLOCK_M
    start_n = gl.program_id(1) * BLOCK_N
    first_step, steps = 0, gl.cdiv(K, STEP_K)
    if partial_ptr is not None:
        part = gl.program_id(2)
        partial_ptr += part * M * N
        first_step = part * part_steps + gl.minimum(part, longer_parts)
        steps = gl.where(part < longer_parts, part_steps + 1, part_steps)
    if HAS_PRODUCER:
        mbarrier.init(ready, count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (
                    x, weight, weight_tail, bias_ptr, position_ptr, turns_ptr, gain_ptr, offset_ptr,
                    sums_ptr, moments_ptr, stream, out, partial_ptr, live_ptr, M, N, K, eps,
                    start_m, start_n, first_step, steps, x_ring, weight_ring, tail_ring,
                    stream_tiles, bias, row_turns, column_turns, gain, offset, sums, ready, empty,
                    full, stream_full,
                    BYTES, ACTIVATION, IS_GATED, IS_RMS, MOST_GROUPS, True, num_warps,
                )),
                (_produce, (
                    x, weight, weight_tail, stream, live_ptr, M, N, start_m, start_n, first_step,
                    steps, x_ring, weight_ring, tail_ring, stream_tiles, ready, empty, full,
                    stream_full, BYTES, IS_GATED,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
        if stream is not None:
            mbarrier.init(stream_full, count=1)
        fence_async_shared()
        _load_first(
            weight, weight_tail, stream, start_m, start_n, first_step, steps, N, BYTES, weight_ring,
            tail_ring, stream_tiles, full, stream_full, IS_GATED,
        )  # fmt: skip
        _consume(
            x, weight, weight_tail, bias_ptr, position_ptr, turns_ptr, gain_ptr, offset_ptr,
            sums_ptr, moments_ptr, stream, out, partial_ptr, live_ptr, M, N, K, eps, start_m,
            start_n, first_step, steps, x_ring, weight_ring, tail_ring, stream_tiles, bias,
            row_turns, column_turns, gain, offset, sums, ready, empty, full, stream_full,
            BYTES, ACTIVATION, IS_GATED, IS_RMS, MOST_GROUPS, False, num_warps,
        )  # fmt: skip
