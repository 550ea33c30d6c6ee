"""The kernel of window_attention_hopper.py, which says what it computes and how."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_hopper_steps import load_boxes, matrix, scale_rows, store_rows, wait_values
from .attention_schedule import barrier
from .gluon_pdl import wait_for_previous
from .gluon_tiles import load_async


@gluon.jit
def _load_halves(x0, x1, row, head, arrived, tiles0, tiles1, HALF: gl.constexpr,
                 SPLIT: gl.constexpr):  # fmt: skip
    """Start to copy the columns from 0 and those from `HALF`, to places 0 and 1 of the tiles."""
    for i in gl.static_range(2):
        load_async(x0, [row, head, i * HALF], arrived, tiles0.index(i))
        if SPLIT:
            load_async(x1, [row, head, i * HALF + tiles0.shape[3]], arrived, tiles1.index(i))


@gluon.jit
def _load_angles(
    cos_ptr, sin_ptr, begin, length, HALF: gl.constexpr, FIRST: gl.constexpr, ROWS: gl.constexpr,
    WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """cos and sin of `WIDTH` columns from `FIRST` on, 0 past HALF and `length`."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = ((begin + rows) * HALF)[:, None] + cols[None, :]
    mask = (rows < length)[:, None] & (cols < HALF)[None, :]
    cos = gl.load(cos_ptr + at, mask=mask, other=0.0)
    sin = gl.load(sin_ptr + at, mask=mask, other=0.0)
    return cos, sin


@gluon.jit
def _rotate(tiles, angles, LAYOUT: gl.constexpr):
    """Both halves of some columns, rotated in fp32 and rounded."""
    x1 = matrix(tiles, 0).load(LAYOUT).to(gl.float32)
    x2 = matrix(tiles, 1).load(LAYOUT).to(gl.float32)
    cos, sin = angles
    return (x1 * cos - x2 * sin).to(tiles.dtype), (x2 * cos + x1 * sin).to(tiles.dtype)


@gluon.jit
def _rotate_in_place(tiles, angles, LAYOUT: gl.constexpr):
    y1, y2 = _rotate(tiles, angles, LAYOUT)
    matrix(tiles, 0).store(y1)
    matrix(tiles, 1).store(y2)


@gluon.jit
def _add_scores(halves, tiles, scores, S_LAYOUT: gl.constexpr):
    """Start to add the products of both halves of q and k."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    for i in gl.static_range(2):
        q = gl.convert_layout(halves[i], LAYOUT, assert_trivial=True)
        scores = warpgroup_mma(q, matrix(tiles, i).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _clear_from(tiles, num_rows, NUM_WARPS: gl.constexpr):
    """Zero the rows from `num_rows` on."""
    COLUMNS: gl.constexpr = tiles.shape[3] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // COLUMNS, COLUMNS], [NUM_WARPS, 1], [1, 0]
    )
    part = matrix(tiles, 0)
    rows = gl.arange(0, tiles.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    values = part.load(LAYOUT)
    part.store(gl.where((rows < num_rows)[:, None], values, 0.0))


@gluon.jit
def window_attention_hopper_kernel(
    q0,  # [T, H, D] descriptor: boxes of ROWS rows, first columns of half a head
    q1,  # the same for the other columns of a half, or None
    k0,
    k1,
    v0,  # boxes of ROWS rows, first columns of a head
    v1,
    cos_ptr,  # [T, D / 2]
    sin_ptr,  # [T, D / 2]
    out_ptr,  # [T, H, D], contiguous
    cu_ptr,  # [W + 1]
    scale_log2,
    D: gl.constexpr,
    HEADS: gl.constexpr,
    ROOM: gl.constexpr,  # KiB of shared memory that it takes and does not use
    num_warps: gl.constexpr,
):
    """One head of one window; grid: windows x heads, heads the fastest."""
    dtype: gl.constexpr = q0.dtype
    ROWS: gl.constexpr = q0.block_shape[0]
    HALF: gl.constexpr = D // 2
    H0: gl.constexpr = q0.block_shape[2]
    SPLIT_HALF: gl.constexpr = q1 is not None
    H1: gl.constexpr = q1.block_shape[2] if SPLIT_HALF else 0
    D0: gl.constexpr = v0.block_shape[2]
    SPLIT: gl.constexpr = v1 is not None
    D1: gl.constexpr = v1.block_shape[2] if SPLIT else 0
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    H0_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, H0, 16])
    H1_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, H1 if SPLIT_HALF else H0, 16]
    )
    O0_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D0, 16])
    O1_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, D1 if SPLIT else D0, 16]
    )

    q0_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, 1, H0], q0.layout)
    k0_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, 1, H0], k0.layout)
    v0_tile = gl.allocate_shared_memory(dtype, [1, ROWS, 1, D0], v0.layout)
    q1_tiles = q0_tiles
    k1_tiles = k0_tiles
    v1_tile = v0_tile
    if SPLIT_HALF:
        q1_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, 1, H1], q1.layout)
        k1_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, 1, H1], k1.layout)
    if SPLIT:
        v1_tile = gl.allocate_shared_memory(dtype, [1, ROWS, 1, D1], v1.layout)
    room = q0_tiles
    if ROOM > 0:
        ROOM_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        room = gl.allocate_shared_memory(gl.int32, [ROOM, 256], ROOM_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    head = gl.program_id(0) % HEADS
    window = gl.program_id(0) // HEADS
    begin = gl.load(cu_ptr + window)
    length = gl.minimum(gl.load(cu_ptr + window + 1) - begin, ROWS)
    # the layout wrote the angles: they come while the kernel before still runs
    angles0 = _load_angles(cos_ptr, sin_ptr, begin, length, HALF, 0, ROWS, H0, H0_LAYOUT)
    angles1 = angles0
    if SPLIT_HALF:
        angles1 = _load_angles(cos_ptr, sin_ptr, begin, length, HALF, H0, ROWS, H1, H1_LAYOUT)
    wait_for_previous()
    if length > 0:
        mbarrier.expect(full.index(0), 2 * 2 * ROWS * (H0 + H1) * 2)
        _load_halves(k0, k1, begin, head, full.index(0), k0_tiles, k1_tiles, HALF, SPLIT_HALF)
        _load_halves(q0, q1, begin, head, full.index(0), q0_tiles, q1_tiles, HALF, SPLIT_HALF)
        mbarrier.expect(full.index(1), ROWS * (D0 + D1) * 2)
        load_boxes(v0, v1, begin, head, full.index(1), v0_tile, v1_tile, 0, SPLIT)

        mbarrier.wait(full.index(0), 0)
        _rotate_in_place(k0_tiles, angles0, H0_LAYOUT)
        q = _rotate(q0_tiles, angles0, H0_LAYOUT)
        q_rest = q
        if SPLIT_HALF:
            _rotate_in_place(k1_tiles, angles1, H1_LAYOUT)
            q_rest = _rotate(q1_tiles, angles1, H1_LAYOUT)
        fence_async_shared()
        barrier()
        scores = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
        scores = _add_scores(q, k0_tiles, scores, S_LAYOUT)
        if SPLIT_HALF:
            scores = _add_scores(q_rest, k1_tiles, scores, S_LAYOUT)
        scores = warpgroup_mma_wait(0, deps=(scores,))

        cols = gl.arange(0, ROWS, layout=gl.SliceLayout(0, S_LAYOUT))
        scores = gl.where((cols < length)[None, :], scores * scale_log2, float("-inf"))
        p = gl.exp2(scores - gl.max(scores, 1)[:, None])
        inverse = 1.0 / gl.sum(p, 1)
        p = p.to(dtype)

        mbarrier.wait(full.index(1), 0)
        if length < ROWS:
            # p is 0 for rows past the window, but 0 * NaN would not be
            _clear_from(v0_tile, length, num_warps)
            if SPLIT:
                _clear_from(v1_tile, length, num_warps)
            fence_async_shared()
            barrier()
        acc = gl.zeros([ROWS, D0], gl.float32, O0_LAYOUT)
        p0 = gl.convert_layout(p, gl.DotOperandLayout(0, O0_LAYOUT, 2), assert_trivial=True)
        acc = warpgroup_mma(p0, matrix(v0_tile, 0), acc, is_async=True)
        acc1 = acc
        if SPLIT:
            acc1 = gl.zeros([ROWS, D1], gl.float32, O1_LAYOUT)
            p1 = gl.convert_layout(p, gl.DotOperandLayout(0, O1_LAYOUT, 2), assert_trivial=True)
            acc1 = warpgroup_mma(p1, matrix(v1_tile, 0), acc1, is_async=True)
        acc, acc1 = wait_values(acc, acc1, SPLIT)
        acc, acc1 = scale_rows(acc, acc1, inverse, SPLIT)
        # int64 before the multiply: T * H * D may pass 2**31
        base = out_ptr + begin.to(gl.int64) * (HEADS * D) + head * D
        store_rows(base, 0, length, acc, HEADS * D, 0, D, num_warps)
        if SPLIT:
            store_rows(base, 0, length, acc1, HEADS * D, D0, D, num_warps)
    if ROOM > 0:  # noqa: SIM102 (one `if` would be taken at run time)
        if length < 0:  # never, which the compiler does not know: it would drop what nobody uses
            ZERO_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
            room.index(0).store(gl.zeros([256], gl.int32, ZERO_LAYOUT))
