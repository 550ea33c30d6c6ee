"""Rotation of q and k in the epilogue of a matrix product in Gluon, where pairs are neighbours.

Angles come from where a patch is and need no table of cos and sin: such a table takes as long to
read as the pass over q and k that this replaces. They are kept in turns, whose whole part is
dropped before the instructions for sine and cosine, which are within 2^-20 on half a turn.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_place(
    position_ptr, start_m, M, AXIS: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr
):
    """Row (`AXIS` 0) or column (1) of the patches of a tile, [BLOCK_M] int32, or None."""
    place = None
    if position_ptr is not None:
        rows = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
        place = gl.load(position_ptr + rows * 4 + AXIS, mask=rows < M, other=0)
    return place


@gluon.jit
def _fraction(x):
    """`x` minus the nearest whole number, for |x| up to 2^22."""
    return x - ((x + 12582912.0) - 12582912.0)  # 1.5 * 2^23: no bits are left for a fraction


@gluon.jit
def _cos(x):
    return gl.inline_asm_elementwise(
        "cos.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _sin(x):
    return gl.inline_asm_elementwise(
        "sin.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def turn_of(row, column, row_turns, column_turns, first, N, LAYOUT: gl.constexpr):
    """cos and sin for columns `first`.. of N, as the pairs of a tile of `LAYOUT` lie.

    The columns are those of q, k and v, and v stays. `row_turns` and `column_turns` are vectors in
    shared memory over the pairs, zero there.
    """
    ROWS: gl.constexpr = row.shape[0]
    COUNT: gl.constexpr = row_turns.shape[0]
    sin = gl.zeros([ROWS, 2 * COUNT], gl.float32, LAYOUT).reshape([ROWS, COUNT, 2]).split()[0]
    cos = sin + 1.0
    if first < N // 3 * 2:  # what lies in v alone is spared the arithmetic
        PAIRS: gl.constexpr = sin.type.layout
        by_row = row_turns.load(gl.SliceLayout(0, PAIRS))[None, :]
        by_column = column_turns.load(gl.SliceLayout(0, PAIRS))[None, :]
        at_row = gl.convert_layout(row, gl.SliceLayout(1, PAIRS)).to(gl.float32)[:, None]
        at_column = gl.convert_layout(column, gl.SliceLayout(1, PAIRS)).to(gl.float32)[:, None]
        angle = 6.283185307179586 * _fraction(at_row * by_row + at_column * by_column)
        cos, sin = _cos(angle), _sin(angle)
    return cos, sin


@gluon.jit
def turns_of(
    row, column, row_turns, column_turns, first, N, PART: gl.constexpr, END: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """`turn_of` for the columns of the vectors' parts from `PART` to `END`; none without places."""
    if row is None or PART == END:
        return ()
    else:
        of_row, of_column = row_turns.index(PART), column_turns.index(PART)
        at = first + PART * 2 * row_turns.shape[1]
        turn = turn_of(row, column, of_row, of_column, at, N, LAYOUT)
        others = turns_of(row, column, row_turns, column_turns, first, N, PART + 1, END, LAYOUT)
        return (turn,) + others  # noqa: RUF005 (Gluon cannot unpack)


@gluon.jit
def rotate(y, turn, first, N, LAYOUT: gl.constexpr):
    """Columns `first`.. of N: each pair of neighbours of q and k turned."""
    if first < N // 3 * 2:
        cos, sin = turn
        x1, x2 = y.reshape([y.shape[0], y.shape[1] // 2, 2]).split()
        turned = gl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        y = gl.convert_layout(turned.reshape([y.shape[0], y.shape[1]]), LAYOUT)
    return y
