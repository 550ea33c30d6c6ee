"""The two halves of a deferred norm in the epilogues of products in Gluon; see deferred_norm.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_tiles import load_async, load_part, store_async


@gluon.jit
def load_stream_tile(stream, start_m, start_n, arrived, tiles):
    """Ask for a tile of the stream in parts of columns, as `tiles` [PARTS, rows, width] has them.

    The kernel before may still be running, so it must not be the one that writes the stream.
    """
    PARTS: gl.constexpr = tiles.shape[0]
    WIDTH: gl.constexpr = tiles.shape[2]
    mbarrier.expect(arrived, PARTS * tiles.shape[1] * WIDTH * 2)
    for i in gl.static_range(PARTS):
        load_async(stream, [start_m, start_n + i * WIDTH], arrived, tiles.index(i))


@gluon.jit
def add_to_stream(
    parts, gain, offset, stream, stream_tiles, scaled, buffers, moments_ptr, M, N, live,
    start_m, start_n, MOST_GROUPS: gl.constexpr, LAYOUT: gl.constexpr, HAS_OFFSET: gl.constexpr,
):  # fmt: skip
    """Add `parts` of columns to the stream; write what the norm reads, and what it scales.

    Of rows past the live ones, what is scaled and its moments are zeros.
    """
    BUFFERS: gl.constexpr = buffers.shape[0]
    WIDTH: gl.constexpr = buffers.shape[2]
    rows = start_m + gl.arange(0, buffers.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    is_live = (rows < live)[:, None]
    for i in gl.static_range(len(parts)):
        first = start_n + i * WIDTH
        tile = stream_tiles.index(i)
        x = gl.convert_layout(parts[i], LAYOUT) + tile.load(LAYOUT).to(gl.float32)
        rounded = x.to(stream.dtype)
        tile.store(rounded)
        s = rounded.to(gl.float32)
        if HAS_OFFSET:
            s += load_part(offset, i, LAYOUT)
        s = gl.where(is_live, s, 0.0)
        if i >= BUFFERS:
            tma.store_wait(2 * (BUFFERS - 1))  # each part stores two tiles
        buffer = buffers.index(i % BUFFERS)
        buffer.store((s * load_part(gain, i, LAYOUT)).to(scaled.dtype))
        fence_async_shared()
        store_async(stream, [start_m, first], tile)
        store_async(scaled, [start_m, first], buffer)
        total = gl.sum(s, 1)
        centred = s - (total / WIDTH)[:, None]
        at = moments_ptr + rows * (2 * MOST_GROUPS) + first // WIDTH
        is_kept = (rows < M) & (first < N)
        gl.store(at, total, mask=is_kept)
        gl.store(at + MOST_GROUPS, gl.sum(centred * centred, 1), mask=is_kept)
    tma.store_wait(0)


@gluon.jit
def load_moments(
    moments_ptr, start_m, live, MOST_GROUPS: gl.constexpr, BLOCK_M: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Sums and squares of the groups of a tile's rows; nothing without moments."""
    if moments_ptr is None:
        return ()
    else:
        # the four threads that have a row of the product take eight groups each
        WARPS: gl.constexpr = [[16, 0], [32, 0]] if NUM_WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
        LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], WARPS, [],
            [BLOCK_M, MOST_GROUPS],
        )  # fmt: skip
        rows = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
        group = gl.arange(0, MOST_GROUPS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        # rows past the live ones repeat the last: without a mask four groups are one load
        at = moments_ptr + gl.minimum(rows, live - 1)[:, None] * (2 * MOST_GROUPS) + group
        return gl.load(at), gl.load(at + MOST_GROUPS)


@gluon.jit
def scales_of(moments, D, eps, IS_RMS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """What the rows of a product are multiplied by and, unless `IS_RMS`, their mean times that.

    Slices of `LAYOUT`; nothing for no moments.
    """
    if len(moments) == 0:
        return ()
    else:
        WIDE: gl.constexpr = moments[0].type.layout
        group = gl.arange(0, moments[0].shape[1], layout=gl.SliceLayout(0, WIDE))[None, :]
        is_group = group * WIDTH < D  # others hold anything
        totals = gl.where(is_group, moments[0], 0.0)
        squares = gl.where(is_group, moments[1], 0.0)
        means = totals / WIDTH
        if IS_RMS:
            scale = _inverse_deviation(squares + WIDTH * means * means, D, eps)
            return (gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT)),)
        else:
            mean = gl.sum(totals, 1) / D
            means = gl.where(is_group, means - mean[:, None], 0.0)
            scale = _inverse_deviation(squares + WIDTH * means * means, D, eps)
            shift = gl.convert_layout(mean * scale, gl.SliceLayout(1, LAYOUT))
            return gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT)), shift


@gluon.jit
def _inverse_deviation(squares, D, eps):
    return 1.0 / gl.sqrt(gl.sum(squares, 1) / D + eps)


@gluon.jit
def linear_of_scaled(
    y, scales, sums, bias, part: gl.constexpr, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr
):
    """A part of a product of scaled rows as if they had been normalised before it, and the bias."""
    y = gl.convert_layout(y, LAYOUT)
    offset = gl.zeros([1, y.shape[1]], gl.float32, LAYOUT)
    if HAS_BIAS:
        offset = load_part(bias, part, LAYOUT)
    if len(scales) > 1:
        offset = offset - scales[1][:, None] * load_part(sums, part, LAYOUT)
    if len(scales) > 0:
        y *= scales[0][:, None]
    if HAS_BIAS or len(scales) > 1:
        y += offset
    return y
