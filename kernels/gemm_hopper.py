"""The matrix product of gemm.py for compute capability 9.0, one role a group of warps.

One warp starts the TMA copies of x and weight into a ring of stages; two groups of four warps
multiply. Each has tiles of its own and they take turns at the tensor cores: while one works
through its epilogue (activation, residual, rounding, store) the other multiplies.

A tile is `block_n` = 2^a or 2^a + 2^b columns wide, in one or two accumulators: 192 columns divide
widths such as 1152 that no power of two above 128 does. A gated tile (see gated_linear.py) is half
as wide in the output: its left half are products with rows of the gate, the right half with the
same rows of the up projection.

In fp8 (linear_fp8.py) both operands are float8_e4m3fn with a scale for each row of x and each row
of weight, which the epilogue multiplies by; sums are those of the tensor cores, with fewer bits
kept between their steps than fp32 has. The output may be fp8 as well, its scales known before.

Written in Gluon (`triton.experimental.gluon`), which has no interpreter: it runs on the GPU or not
at all. What it computes, and which rows it writes, is said in gemm.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .activation import apply_activation
from .gemm_tuning import HopperConfig
from .gluon_pdl import wait_for_previous
from .gluon_rope import load_place, rotate, turn_of
from .gluon_tiles import (
    activate_for_fp8,
    allocate_vector,
    columns,
    fetch_columns,
    fetch_vector,
    load_async,
    load_part,
    put_vector,
    store_async,
)
from .launch import launch_kernel
from .pdl import starts_early

STORE_N = 64  # columns of the output that are stored at a time, of 16 or 8 bits
BLOCK_K_BYTES = 128  # of a row that a step takes
BUFFERS = 2  # parts of the output that are staged for every group
GROUP_M = 8  # tiles of rows that share a column of weight tiles before the next is started
# with the warp of the loads, three times four warps share 65536 of them
MAX_REGISTERS = 168


@gluon.jit
def _live_tiles(live_ptr, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    live = M
    if live_ptr is not None:
        live = gl.minimum(gl.load(live_ptr), M)
    return gl.cdiv(live, BLOCK_M), gl.cdiv(N, BLOCK_N)


@gluon.jit
def _tile_start(
    tile, tiles_m, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr
):
    group = GROUP_M * tiles_n
    first_m = (tile // group) * GROUP_M
    rows = gl.minimum(tiles_m - first_m, GROUP_M)
    return (first_m + (tile % group) % rows) * BLOCK_M, ((tile % group) // rows) * BLOCK_N


@gluon.jit
def _produce(
    x,
    weight,
    weight_tail,
    live_ptr,
    M,
    N,
    K,
    x_ring,  # [STAGES, BLOCK_M, STEP_K]
    weight_ring,  # [STAGES, HEAD, STEP_K]
    tail_ring,  # [STAGES, BLOCK_N - HEAD, STEP_K], or weight_ring
    empty,  # barrier of every stage: consumed
    full,  # barrier of every stage: arrived
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    IS_GATED: gl.constexpr,
):
    STAGES: gl.constexpr = x_ring.shape[0]
    STEP_K: gl.constexpr = x_ring.shape[2]
    HEAD: gl.constexpr = weight_ring.shape[1]
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * STEP_K * x_ring.dtype.primitive_bitwidth // 8
    tiles_m, tiles_n = _live_tiles(live_ptr, M, N, BLOCK_M, BLOCK_N)
    wait_for_previous()
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        start_m, start_n = _tile_start(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        for start_k in range(0, K, STEP_K):
            stage = step % STAGES
            # a fresh barrier counts as having completed the phase before its first
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, BYTES)
            load_async(x, [start_m, start_k], arrived, x_ring.index(stage))
            block = weight_ring.index(stage)
            if IS_GATED:
                gate, up = start_n // 2, (N + start_n) // 2
                load_async(weight, [gate, start_k], arrived, block.slice(0, BLOCK_N // 2))
                load_async(weight, [up, start_k], arrived, block.slice(BLOCK_N // 2, BLOCK_N // 2))
            else:
                load_async(weight, [start_n, start_k], arrived, block)
            if HEAD < BLOCK_N:
                load_async(weight_tail, [start_n + HEAD, start_k], arrived, tail_ring.index(stage))
            step += 1


@gluon.jit
def _load_residual(
    part, out, start_m, start_n, buffers, arrived, GROUP: gl.constexpr, PARTS: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = buffers.shape[2]
    barrier = arrived.index(GROUP * PARTS + part)
    mbarrier.expect(barrier, out.block_type.nbytes)
    buffer = buffers.index(GROUP * BUFFERS + part % BUFFERS)
    load_async(out, [start_m, start_n + part * WIDTH], barrier, buffer)


@gluon.jit
def _load_rows(ptr, start_m, M, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Values of a tile's rows, or None."""
    values = None
    if ptr is not None:
        rows = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
        values = gl.load(ptr + rows, mask=rows < M, other=1.0)
    return values


@gluon.jit
def _sums(
    part, x_scale, w_scale, bias, i: gl.constexpr, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr
):
    """A part of the product, scaled and with its bias by part `i` of the vectors."""
    y = gl.convert_layout(part, LAYOUT)
    if x_scale is not None:
        of_row = gl.convert_layout(x_scale, gl.SliceLayout(1, LAYOUT))[:, None]
        y *= of_row * load_part(w_scale, i, LAYOUT)
    if HAS_BIAS:
        y += load_part(bias, i, LAYOUT)
    return y


@gluon.jit
def _finish(
    parts,
    x_scale,  # [BLOCK_M] or None
    out_scale,  # [BLOCK_M] of an output in fp8, or None
    row,  # [BLOCK_M] of the patches' places, or None
    column,
    w_scale,  # the vectors of `_consume`
    bias,
    row_turns,
    column_turns,
    out,
    N,
    start_m,
    start_n,
    buffers,
    arrived,
    phase,
    LAYOUT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    PARTS: gl.constexpr = len(parts) // 2 if IS_GATED else len(parts)
    WIDTH: gl.constexpr = buffers.shape[2]
    OWN: gl.constexpr = GROUP * len(parts)  # this group's part of a vector
    if IS_GATED:
        start_n = start_n // 2
    if out_scale is not None:
        out_scale = 1.0 / gl.convert_layout(out_scale, gl.SliceLayout(1, LAYOUT))[:, None]
    for i in gl.static_range(PARTS):
        if HAS_RESIDUAL and i > 0 and i - 1 + BUFFERS < PARTS:
            # the buffer that the part before was stored from serves a later part
            tma.store_wait(0)
            _load_residual(
                i - 1 + BUFFERS, out, start_m, start_n, buffers, arrived, GROUP, PARTS, BUFFERS
            )
        first = start_n + i * WIDTH
        y = _sums(parts[i], x_scale, w_scale, bias, OWN + i, HAS_BIAS, LAYOUT)
        if row is not None:
            of_row, of_column = row_turns.index(OWN + i), column_turns.index(OWN + i)
            turn = turn_of(row, column, of_row, of_column, first, N, LAYOUT)
            y = rotate(y, turn, first, N, LAYOUT)
        if out_scale is None:
            y = apply_activation(y, ACTIVATION)
        else:
            y = activate_for_fp8(y, out_scale, ACTIVATION)
        if IS_GATED:
            up = parts[PARTS + i]
            y *= _sums(up, x_scale, w_scale, bias, OWN + PARTS + i, HAS_BIAS, LAYOUT)
        buffer = buffers.index(GROUP * BUFFERS + i % BUFFERS)
        if HAS_RESIDUAL:
            mbarrier.wait(arrived.index(GROUP * PARTS + i), phase)
            y += buffer.load(LAYOUT).to(gl.float32)
        else:
            # the order of the buffers starts anew with every tile
            tma.store_wait(BUFFERS - 1 if i > 0 else 0)
        buffer.store(y.to(out.dtype))
        fence_async_shared()
        store_async(out, [start_m, first], buffer)


@gluon.jit
def _consume(
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_scale_ptr,
    position_ptr,
    turns_ptr,
    out,
    live_ptr,
    M,
    N,
    K,
    x_ring,
    weight_ring,
    tail_ring,
    empty,
    full,
    w_scale,  # [2 * PARTS, STORE_N] of the groups' tiles; without its pointer unused
    bias,
    row_turns,  # [2 * PARTS, STORE_N / 2]
    column_turns,
    buffers,  # [2 * BUFFERS, BLOCK_M, STORE_N]: parts of the output, first of the residual
    arrived,  # barrier of every part of every group: residual arrived
    turn,  # barrier of every group: the other has started its last products
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    GROUP: gl.constexpr,
):
    STAGES: gl.constexpr = x_ring.shape[0]
    STEP_K: gl.constexpr = x_ring.shape[2]
    HEAD: gl.constexpr = weight_ring.shape[1]
    TAIL: gl.constexpr = BLOCK_N - HEAD
    TAIL_RING: gl.constexpr = tail_ring.shape[1]
    WIDTH: gl.constexpr = buffers.shape[2]
    BUFFERS: gl.constexpr = buffers.shape[0] // 2
    PARTS: gl.constexpr = BLOCK_N // WIDTH
    DEPTH: gl.constexpr = 256 // x_ring.dtype.primitive_bitwidth  # K of one instruction
    HEAD_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HEAD, DEPTH])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [NUM_WARPS, 1], [16, TAIL_RING, DEPTH]
    )
    PART_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [NUM_WARPS, 1], [16, WIDTH, DEPTH]
    )
    tiles_m, tiles_n = _live_tiles(live_ptr, M, N, BLOCK_M, BLOCK_N)
    wait_for_previous()
    steps = gl.cdiv(K, STEP_K)
    programs = gl.num_programs(0)
    step = GROUP * steps
    phase = 0
    for tile in range(gl.program_id(0) + GROUP * programs, tiles_m * tiles_n, 2 * programs):
        start_m, start_n = _tile_start(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        if HAS_RESIDUAL:
            tma.store_wait(0)
            for i in gl.static_range(min(BUFFERS, PARTS)):
                _load_residual(i, out, start_m, start_n, buffers, arrived, GROUP, PARTS, BUFFERS)
        # on their way while the products run
        x_scale = _load_rows(x_scale_ptr, start_m, M, BLOCK_M, HEAD_LAYOUT)
        out_scale = _load_rows(out_scale_ptr, start_m, M, BLOCK_M, HEAD_LAYOUT)
        row = load_place(position_ptr, start_m, M, 0, BLOCK_M, HEAD_LAYOUT)
        column = load_place(position_ptr, start_m, M, 1, BLOCK_M, HEAD_LAYOUT)
        scales = fetch_columns(w_scale_ptr, start_n, N, IS_GATED, PARTS, WIDTH, NUM_WARPS)
        biases = fetch_columns(bias_ptr, start_n, N, IS_GATED, PARTS, WIDTH, NUM_WARPS)
        pair, pairs = start_n // 2, N // 2
        of_row = fetch_vector(turns_ptr, pair, pairs, PARTS, WIDTH // 2, NUM_WARPS)
        of_column = fetch_vector(turns_ptr, pairs + pair, 2 * pairs, PARTS, WIDTH // 2, NUM_WARPS)
        # a barrier tells apart only neighbouring laps of the ring: the steps of the other group's
        # tile have to have arrived before those of this one can be waited for
        mbarrier.wait(turn.index(GROUP), phase ^ (1 - GROUP))
        acc = gl.zeros([BLOCK_M, HEAD], gl.float32, HEAD_LAYOUT)
        tail = acc
        if TAIL:
            tail = gl.zeros([BLOCK_M, TAIL], gl.float32, TAIL_LAYOUT)
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = x_ring.index(stage)
            acc = warpgroup_mma(a, weight_ring.index(stage).permute((1, 0)), acc, is_async=True)
            # products of this step are left to run; those of the step before are done
            if TAIL:
                b = tail_ring.index(stage).permute((1, 0))
                tail = warpgroup_mma(a, b, tail, is_async=True)
                acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=i > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - GROUP))
        if TAIL:
            acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
            parts = columns(acc, HEAD // WIDTH) + columns(tail, TAIL // WIDTH)
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            parts = columns(acc, HEAD // WIDTH)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += steps  # those of the other group's tile
        put_vector(w_scale, scales, GROUP * PARTS)
        put_vector(bias, biases, GROUP * PARTS)
        put_vector(row_turns, of_row, GROUP * PARTS)
        put_vector(column_turns, of_column, GROUP * PARTS)
        _finish(
            parts, x_scale, out_scale, row, column, w_scale, bias, row_turns, column_turns, out, N,
            start_m, start_n, buffers, arrived, phase, PART_LAYOUT,
            ACTIVATION, HAS_RESIDUAL, IS_GATED, bias_ptr is not None, GROUP, BUFFERS,
        )  # fmt: skip
        phase ^= 1
    tma.store_wait(0)


@gluon.jit
def _gemm_hopper_kernel(
    x,  # [M, K] descriptor
    weight,  # [N, K] descriptor, blocks of HEAD rows
    weight_tail,  # the same by blocks of BLOCK_N - HEAD rows, or None
    x_scale_ptr,  # [M] fp32 with fp8 operands, else None
    w_scale_ptr,  # [N] fp32 with fp8 operands, else None
    bias_ptr,  # [N] or None
    out_scale_ptr,  # [M] fp32 with fp8 output: what its rows are divided by; else None
    position_ptr,  # [M, 4] int32, first row and column of the patches, or None
    turns_ptr,  # [2, N / 2] fp32 with `position_ptr`
    out,  # [M, N] descriptor; holds the residual if there is one
    live_ptr,  # [1] int32 or None
    M,
    N,
    K,
    ACTIVATION: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    IS_GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    STEP_K: gl.constexpr = x.block_shape[1]
    HEAD: gl.constexpr = weight.block_shape[0] * (2 if IS_GATED else 1)
    TAIL: gl.constexpr = BLOCK_N - HEAD
    WIDTH: gl.constexpr = out.block_shape[1]
    PARTS: gl.constexpr = BLOCK_N // WIDTH
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, STEP_K], x.layout)
    weight_ring = gl.allocate_shared_memory(x.dtype, [STAGES, HEAD, STEP_K], weight.layout)
    if TAIL:
        tail_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TAIL, STEP_K], weight_tail.layout)
    else:
        tail_ring = weight_ring
    buffers = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS, BLOCK_M, WIDTH], out.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_scale = allocate_vector(w_scale_ptr, empty, 2 * PARTS, WIDTH)
    bias = allocate_vector(bias_ptr, empty, 2 * PARTS, WIDTH)
    row_turns = allocate_vector(turns_ptr, empty, 2 * PARTS, WIDTH // 2)
    column_turns = allocate_vector(turns_ptr, empty, 2 * PARTS, WIDTH // 2)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2 * PARTS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    if HAS_RESIDUAL:
        for i in gl.static_range(2 * PARTS):
            mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    # written out: a tuple kept in a variable turns its constexprs into tensors
    gl.warp_specialize(
        [
            (_consume, (
                x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, position_ptr, turns_ptr, out,
                live_ptr,
                M, N, K, x_ring, weight_ring, tail_ring, empty, full,
                w_scale, bias, row_turns, column_turns, buffers, arrived, turn,
                BLOCK_M, BLOCK_N, GROUP_M, ACTIVATION, HAS_RESIDUAL, IS_GATED, num_warps, 0,
            )),
            (_consume, (
                x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, position_ptr, turns_ptr, out,
                live_ptr,
                M, N, K, x_ring, weight_ring, tail_ring, empty, full,
                w_scale, bias, row_turns, column_turns, buffers, arrived, turn,
                BLOCK_M, BLOCK_N, GROUP_M, ACTIVATION, HAS_RESIDUAL, IS_GATED, num_warps, 1,
            )),
            (_produce, (
                x, weight, weight_tail, live_ptr, M, N, K, x_ring, weight_ring, tail_ring,
                empty, full, BLOCK_M, BLOCK_N, GROUP_M, IS_GATED,
            )),
        ],
        [num_warps, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    live_rows: torch.Tensor | None,
    *,
    activation: str | None,
    has_residual: bool = False,
    is_gated: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_scale: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: HopperConfig,
    programs: int,
) -> None:
    """Launch on checked operands: 16-byte aligned rows, on compute capability 9.0.

    With `is_gated`, weight is [2 F, K] and out [M, F]; the activation is that of the gate. x and
    weight are of 16 bits, or fp8 with `scales` of their rows [M] and [N]; out is of 16 bits, or fp8
    with the `out_scale` [M] of its rows. With `rotation`, position and turns of rotary_linear.py,
    pairs of columns are turned.
    """
    block_m, block_n = config.block_m, config.block_n
    block_k = BLOCK_K_BYTES // x.element_size()
    head = 1 << (block_n.bit_length() - 1)

    def blocks(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        size = matrix.element_size()
        layout = gl.NVMMASharedLayout(
            swizzle_byte_width=columns * size, element_bitwidth=8 * size, rank=2
        )
        return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)

    launch_kernel(
        _gemm_hopper_kernel, (programs,),
        blocks(x, block_m, block_k),
        blocks(weight, head // 2 if is_gated else head, block_k),
        blocks(weight, block_n - head, block_k) if block_n > head else None,
        *(scales or (None, None)), bias, out_scale, *(rotation or (None, None)),
        blocks(out, block_m, STORE_N), live_rows,
        out.shape[0], weight.shape[0], x.shape[1],
        ACTIVATION=activation or "", HAS_RESIDUAL=has_residual, IS_GATED=is_gated,
        BLOCK_M=block_m, BLOCK_N=block_n, GROUP_M=GROUP_M,
        STAGES=config.num_stages, BUFFERS=BUFFERS,
        num_warps=4, maxnreg=MAX_REGISTERS, launch_pdl=starts_early(x),
    )  # fmt: skip
