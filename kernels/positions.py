"""Learned positions of a square grid, resampled to the grid of each item.

    x[r] += sum_k weight_k(r) * table[tap_k(r)]                       r live

Shapes: x [T, D], table [G*G, D], position [T, 4] int32 with (row, column, grid height, grid width)
of each row of x. Along an axis, position i of n falls on the place

    bilinear_corners   i * (G - 1) / (n - 1)        its first and last on the table's
    bilinear, bicubic  (i + 1/2) * G / n - 1/2      edges on edges; taps past the border repeat it
    bilinear_antialias the same                     no taps past the border

of the table, and takes 2 taps there, or 4 weighted by the cubic convolution with a = -3/4. With
antialias it takes all taps less than max(1, G / n) away, weighted by how much less, and the weights
are divided by their sum: a grid smaller than the table averages it. Places, weights and sums are
fp32 (fp64 for fp64), with one rounding at the end. Rows of x past the live ones are left as they
are.

Memory-bound: 2*T*D elements moved, the table comes from L2. Source of the resampling: `interpolate`
and `grid_sample` of PyTorch, as transformers' towers call them.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost

Sampling = Literal["bilinear_corners", "bilinear", "bicubic", "bilinear_antialias"]

BLOCK_T, BLOCK_D = 16, 128
CUBIC = -0.75


def axis_taps(
    index: torch.Tensor, size: torch.Tensor, side: int, sampling: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Table places [T, n] along an axis and their weights [T, n], n of 2 or 4."""
    index, size = index.to(dtype), size.to(dtype)
    if sampling == "bilinear_corners":
        at = index * (side - 1) / (size - 1).clamp(min=1)
    else:
        at = (index + 0.5) * side / size - 0.5
    low = at.floor()
    fraction = at - low
    if sampling == "bicubic":
        distances = torch.stack([1 + fraction, fraction, 1 - fraction, 2 - fraction], -1)
        inner = ((CUBIC + 2) * distances - (CUBIC + 3)) * distances * distances + 1
        outer = ((distances - 5) * distances + 8) * distances * CUBIC - 4 * CUBIC
        weights = torch.where(distances <= 1, inner, outer)
        first = -1
    else:
        weights = torch.stack([1 - fraction, fraction], -1)
        first = 0
    steps = torch.arange(first, first + weights.shape[1], device=index.device)
    return (low.long()[:, None] + steps).clamp(0, side - 1), weights


def position_taps(
    position: torch.Tensor, side: int, sampling: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Table rows [T, n] and their weights [T, n], n of 4 or 16, for each row of `position`."""
    row, row_weight = axis_taps(position[:, 0], position[:, 2], side, sampling, dtype)
    column, column_weight = axis_taps(position[:, 1], position[:, 3], side, sampling, dtype)
    taps = row[:, :, None] * side + column[:, None, :]
    weights = row_weight[:, :, None] * column_weight[:, None, :]
    return taps.flatten(1), weights.flatten(1)


def antialias_weights(
    index: torch.Tensor, size: torch.Tensor, side: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [T, side] of all table places along an axis, for "bilinear_antialias"."""
    step = side / size.to(dtype)[:, None]
    at = (index.to(dtype)[:, None] + 0.5) * step - 0.5
    distance = (torch.arange(side, device=index.device) - at).abs() / step.clamp(min=1)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def sample_table_ref(table: torch.Tensor, position: torch.Tensor, sampling: str) -> torch.Tensor:
    """The table at each row of `position`, in the dtype of the sums."""
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    side = int(table.shape[0] ** 0.5)
    if sampling == "bilinear_antialias":
        row = antialias_weights(position[:, 0], position[:, 2], side, wide)
        column = antialias_weights(position[:, 1], position[:, 3], side, wide)
        return (row[:, :, None] * column[:, None, :]).flatten(1) @ table.to(wide)
    taps, weights = position_taps(position, side, sampling, wide)
    total = torch.zeros(len(position), table.shape[1], dtype=wide, device=table.device)
    for k in range(taps.shape[1]):  # one tap at a time: all of them would be 16 copies of x
        total += table[taps[:, k]].to(wide) * weights[:, k, None]
    return total


def add_positions_ref(
    x: torch.Tensor,
    table: torch.Tensor,
    position: torch.Tensor,
    sampling: str,
    num_live: int | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition; `num_live` is a Python int here."""
    n = x.shape[0] if num_live is None else num_live
    sampled = sample_table_ref(table, position[:n], sampling)
    return torch.cat([(x[:n] + sampled).to(x.dtype), x[n:]])


def cost(T: int, D: int, dtype: torch.dtype, table_rows: int) -> Cost:
    """x read and written once, the table and the positions read once."""
    return Cost(flops=9 * T * D, bytes=(2 * T + table_rows) * D * dtype.itemsize + 16 * T)


@triton.jit
def _place(index, size, SIDE: tl.constexpr, SAMPLING: tl.constexpr):
    """Lower table place, unclamped, and the fraction past it."""
    # exact quotients: integers must not fall just below themselves
    if SAMPLING == "bilinear_corners":
        at = tl.div_rn(index.to(tl.float32) * (SIDE - 1), tl.maximum(size - 1, 1).to(tl.float32))
    else:
        at = tl.div_rn((index.to(tl.float32) + 0.5) * SIDE, size.to(tl.float32)) - 0.5
    low = tl.floor(at)
    return low.to(tl.int32), at - low


@triton.jit
def _clamped(place, SIDE: tl.constexpr):
    return tl.minimum(tl.maximum(place, 0), SIDE - 1)


@triton.jit
def _cubic(fraction, TAP: tl.constexpr):
    """Weight of tap TAP of 4 by the cubic convolution with a = -3/4."""
    if TAP == 0:
        x = fraction + 1
        return ((x - 5) * x + 8) * x * -0.75 + 3.0
    elif TAP == 1:
        return (1.25 * fraction - 2.25) * fraction * fraction + 1
    elif TAP == 2:
        x = 1 - fraction
        return (1.25 * x - 2.25) * x * x + 1
    else:
        x = 2 - fraction
        return ((x - 5) * x + 8) * x * -0.75 + 3.0


@triton.jit
def _tap(table_ptr, tap, d, D, weight, mask):
    at = table_ptr + tap[:, None] * D + d[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32) * weight[:, None]


@triton.jit
def _triangle(place, index, size, SIDE: tl.constexpr):
    """Weight of `place` around position `index` of `size`, before it is divided by the sum."""
    step = tl.div_rn(SIDE * 1.0, size.to(tl.float32))
    at = (index.to(tl.float32) + 0.5) * step - 0.5
    return tl.maximum(1 - tl.abs(place.to(tl.float32) - at) / tl.maximum(step, 1.0), 0.0)


@triton.jit
def _sample_antialias(
    table_ptr, index_h, index_w, size_h, size_w, d, D, live, SIDE: tl.constexpr
):  # fmt: skip
    """The tile of `sample_table`: for each row of the table a product with its columns."""
    # a product needs a depth of 16
    BLOCK: tl.constexpr = max(16, triton.next_power_of_2(SIDE))
    place = tl.arange(0, BLOCK)
    inside = (place < SIDE)[None, :] & live[:, None]
    row = tl.where(inside, _triangle(place[None, :], index_h[:, None], size_h[:, None], SIDE), 0.0)
    column = _triangle(place[None, :], index_w[:, None], size_w[:, None], SIDE)
    column = tl.where(inside, column, 0.0)
    sums = tl.sum(row, 1) * tl.sum(column, 1)
    column = column / tl.where(live, sums, 1.0)[:, None]
    total = tl.zeros((live.shape[0], d.shape[0]), dtype=tl.float32)
    for i in range(SIDE):
        weight = tl.sum(tl.where((place == i)[None, :], row, 0.0), 1)
        # most rows of the table are far from all rows of a tile
        if tl.max(weight, 0) > 0:
            at = table_ptr + (i * SIDE + place)[:, None] * D + d[None, :]
            mask = (place < SIDE)[:, None] & (d < D)[None, :]
            taps = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            total = tl.dot(column * weight[:, None], taps, total, input_precision="ieee")
    return total


@triton.jit
def sample_table(
    table_ptr,  # [SIDE * SIDE, D]
    position_ptr,  # [T, 4]
    t,
    d,
    D,
    live,
    mask,
    SIDE: tl.constexpr,
    SAMPLING: tl.constexpr,
):
    """fp32 tile of the table at rows t of `position`, columns d."""
    at = position_ptr + 4 * t
    h = tl.load(at, mask=live, other=0)
    w = tl.load(at + 1, mask=live, other=0)
    if SAMPLING == "bilinear_antialias":
        size_h = tl.load(at + 2, mask=live, other=1)
        size_w = tl.load(at + 3, mask=live, other=1)
        return _sample_antialias(table_ptr, h, w, size_h, size_w, d, D, live, SIDE)
    h0, dh = _place(h, tl.load(at + 2, mask=live, other=1), SIDE, SAMPLING)
    w0, dw = _place(w, tl.load(at + 3, mask=live, other=1), SIDE, SAMPLING)
    if SAMPLING == "bicubic":
        total = tl.zeros((t.shape[0], d.shape[0]), dtype=tl.float32)
        for i in tl.static_range(4):
            row = _clamped(h0 + (i - 1), SIDE) * SIDE
            row_weight = _cubic(dh, i)
            for j in tl.static_range(4):
                tap = row + _clamped(w0 + (j - 1), SIDE)
                total += _tap(table_ptr, tap, d, D, row_weight * _cubic(dw, j), mask)
        return total
    else:
        h1 = tl.minimum(h0 + 1, SIDE - 1)
        w1 = tl.minimum(w0 + 1, SIDE - 1)
        if SAMPLING == "bilinear":
            h0 = tl.maximum(h0, 0)
            w0 = tl.maximum(w0, 0)
        total = _tap(table_ptr, h0 * SIDE + w0, d, D, (1 - dh) * (1 - dw), mask)
        total += _tap(table_ptr, h0 * SIDE + w1, d, D, (1 - dh) * dw, mask)
        total += _tap(table_ptr, h1 * SIDE + w0, d, D, dh * (1 - dw), mask)
        total += _tap(table_ptr, h1 * SIDE + w1, d, D, dh * dw, mask)
        return total


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _add_positions_kernel(
    x_ptr,  # [T, D], updated
    table_ptr,  # [SIDE * SIDE, D]
    position_ptr,  # [T, 4]
    live_ptr,  # [1] or None
    T,
    D,
    SIDE: tl.constexpr,
    SAMPLING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    if tl.program_id(1) * BLOCK_T >= num_live:
        return
    live = t < num_live
    mask = live[:, None] & (d < D)[None, :]
    # int64 before the multiply: T * D passes 2**31 at 1.4M rows of width 1536
    at = x_ptr + t[:, None].to(tl.int64) * D + d[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x += sample_table(table_ptr, position_ptr, t, d, D, live, mask, SIDE, SAMPLING)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=mask)


def check_table(
    operation: str, table: torch.Tensor, position: torch.Tensor | None, sampling: str
) -> None:
    """Raise ValueError for a table that is no square, no `position`, or an unknown sampling."""
    if position is None or int(table.shape[0] ** 0.5) ** 2 != table.shape[0]:
        raise ValueError(
            f"{operation}: table {tuple(table.shape)} must hold a square grid, and needs `position`"
        )
    if sampling not in get_args(Sampling):
        raise ValueError(f"{operation}: sampling={sampling!r} is not one of {get_args(Sampling)}")


def add_positions_(
    x: torch.Tensor,
    table: torch.Tensor,
    position: torch.Tensor,
    sampling: str,
    live_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the resampled table to the live rows of `x` in place, and return `x`.

    Args:
        x: [T, D], contiguous.
        table: [G*G, D] learned positions of a square grid, in the dtype of `x`, contiguous.
        position: [T, 4] int32, contiguous; see the module docstring.
        sampling: "bilinear_corners", "bilinear", "bicubic" or "bilinear_antialias".
        live_rows: int32 [1]; rows from there on are left as they are.

    Raises:
        ValueError: a shape, layout or `sampling` that is not as above.
    """
    T, D = x.shape
    check_table("add_positions_", table, position, sampling)
    for name, tensor, shape in (("table", table, (len(table), D)), ("position", position, (T, 4))):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"add_positions_: {name} must be contiguous {list(shape)}, got "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
    if not x.is_contiguous():
        raise ValueError(f"add_positions_: x must be contiguous, its strides are {x.stride()}")
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows)
        return x.copy_(add_positions_ref(x, table, position, sampling, num_live))
    if T == 0:
        return x
    constants = {
        "SIDE": int(table.shape[0] ** 0.5),
        "SAMPLING": sampling,
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": BLOCK_D,
    }
    launch_kernel(
        _add_positions_kernel, (triton.cdiv(D, BLOCK_D), triton.cdiv(T, BLOCK_T)),
        x, table, position, live_rows, T, D, **constants,
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::add_positions_", mutates_args=("x",))
def add_positions_op(
    x: torch.Tensor,
    table: torch.Tensor,
    position: torch.Tensor,
    sampling: str,
    live_rows: torch.Tensor | None,
) -> None:
    """`add_positions_` as an operator that torch.compile can trace around."""
    add_positions_(x, table, position, sampling, live_rows)


@add_positions_op.register_fake
def _(x, table, position, sampling, live_rows):
    return None
