"""Checks of the grids and pixel rows that a caller hands in."""

import operator
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NoReturn

import torch

from ..capture.staging import CheckedGrid
from .spec import EncoderSpec

Grid = tuple[int, int, int]
_INDICES = (torch.int64, torch.int32)
_REMEMBERED = 1024  # layouts
PIXEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def parse_grids(grid_thw: torch.Tensor | Sequence[Any], spec: EncoderSpec) -> list[Grid]:
    """(t, h, w) in patches of every item, as Python integers.

    A tensor on a GPU is read with one synchronising copy; hand in a CPU tensor to avoid it.

    Raises:
        TypeError: the grids are not integers.
        ValueError: not [N, 3], a side that is not positive, or not a multiple of the merge size, or
            more frames than the tower has positions for, or than an image has.
    """
    table = grid_thw if isinstance(grid_thw, torch.Tensor) else None
    # of one with three columns, rows show by themselves whether they are integers
    if table is not None and (table.ndim != 2 or table.shape[1] != 3 or not len(table)):
        _check_table(table)
    rows = list(grid_thw) if table is None else table.tolist()
    grids = []
    merge = spec.merge_size
    most = 1 if spec.images_only else spec.frame_positions or sys.maxsize
    for i, row in enumerate(rows):
        if isinstance(row, list | tuple) and len(row) == 3:
            t, h, w = row
            # plain and valid ones, which nearly all are, are through here
            plain = type(t) is type(h) is type(w) is int and t > 0 and h > 0 and w > 0
            if plain and t <= most and not (h % merge or w % merge):
                grids.append((t, h, w))
                continue
        if table is not None:
            _check_table(table)
        try:
            t, h, w = (operator.index(n) for n in row)
        except TypeError as error:
            raise TypeError(f"grid_thw[{i}] = {row!r} must be three integers (t, h, w)") from error
        except ValueError as error:
            raise ValueError(f"grid_thw[{i}] = {row!r} must be three integers (t, h, w)") from error
        if min(t, h, w) < 1:
            raise ValueError(f"grid_thw[{i}] = ({t}, {h}, {w}): every side must be at least 1")
        if h % spec.merge_size or w % spec.merge_size:
            raise ValueError(
                f"grid_thw[{i}] = ({t}, {h}, {w}): height and width must be multiples of the merge "
                f"size {spec.merge_size}; resize the image to multiples of "
                f"{spec.patch_size * spec.merge_size} pixels"
            )
        if t > most and spec.images_only:
            raise ValueError(
                f"grid_thw[{i}] = ({t}, {h}, {w}): {t} frames, but a tower of {spec.family} reads "
                "images, which have t = 1; hand in every frame as an image"
            )
        if t > most:
            raise ValueError(
                f"grid_thw[{i}] = ({t}, {h}, {w}): {t} frames, but a tower of {spec.family} has "
                f"positions for {most}; hand in clips of at most {most} frames"
            )
        grids.append((t, h, w))
    return grids


class GridParser:
    """`parse_grids` for one tower, which knows the tensors that it has accepted by their values.

    A replay waits for this, and what was checked once needs no second look.
    """

    def __init__(self, spec: EncoderSpec):
        self._spec = spec
        self._accepted: dict[object, CheckedGrid] = {}

    def __call__(self, grid_thw: torch.Tensor | Sequence[Any]) -> CheckedGrid:
        """As `parse_grids`.

        Raises:
            TypeError, ValueError: as `parse_grids`.
        """
        # of these types alone: 1.0 and True are equal to 1, and pixels may be gigabytes
        if not isinstance(grid_thw, torch.Tensor) or grid_thw.dtype not in _INDICES:
            return CheckedGrid(parse_grids(grid_thw, self._spec))
        try:
            key = tuple(map(tuple, grid_thw.tolist()))
            # without rows nothing says how many columns there are
            known = self._accepted.get(key) if key else None
        except TypeError:  # not two axes
            return CheckedGrid(parse_grids(grid_thw, self._spec))
        if known is None:
            known = CheckedGrid(parse_grids(grid_thw, self._spec))
            if len(self._accepted) >= _REMEMBERED:
                self._accepted.clear()
            self._accepted[key] = known
        return known


def _check_table(grid_thw: torch.Tensor) -> None:
    """Refuse a tensor whose rows are not three integers; those that are plain show it themselves.

    Raises:
        TypeError, ValueError: as `parse_grids`.
    """
    if grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        raise TypeError(f"grid_thw: dtype {grid_thw.dtype} must be an integer type")
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(
            f"grid_thw: shape {list(grid_thw.shape)} must be [items, 3]: (t, h, w) in patches"
        )


def pixel_rows(pixel_values: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Patches [T, C, side, side] or [1, T, C, side, side] as rows [T, P]; all others as they are.

    Only of towers whose patches are of one frame, where processors hand them over so.
    """
    if spec.temporal_patch_size > 1 or not isinstance(pixel_values, torch.Tensor):
        return pixel_values
    shape = tuple(pixel_values.shape)
    if len(shape) == 5 and shape[0] == 1:
        shape = shape[1:]
    patch = spec.in_channels, spec.patch_size, spec.patch_size
    if len(shape) == 4 and shape[1:] == patch:
        return pixel_values.reshape(shape[0], spec.patch_values)
    return pixel_values


def check_pixels(
    pixel_values: torch.Tensor,
    grids: Sequence[Grid],
    spec: EncoderSpec,
    check_finite: bool | None = None,
) -> None:
    """Refuse pixel rows that do not belong to `grids`.

    Args:
        pixel_values, grids, spec: The rows, what they should be, and for which tower.
        check_finite: Whether to look at the values. None looks at them on the CPU only: on a GPU
            that waits for the device.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: the shape does not fit the grids, or a value that was looked at is not finite.
    """
    width = spec.patch_values
    expected = sum([t * h * w for t, h, w in grids])
    # one comparison for nearly all: a replay waits for this
    fits = isinstance(pixel_values, torch.Tensor) and pixel_values.shape == (expected, width)
    if not fits or pixel_values.dtype not in PIXEL_DTYPES:
        _refuse_pixels(pixel_values, len(grids), expected, spec)
    if check_finite is None:
        check_finite = pixel_values.is_cpu
    if check_finite and not bool(torch.isfinite(pixel_values).all()):
        row = int((~torch.isfinite(pixel_values).all(1)).nonzero()[0])
        item = bisect_right(list(accumulate(t * h * w for t, h, w in grids)), row)
        raise ValueError(
            f"pixel_values: NaN or infinity in row {row} (item {item}, grid {grids[item]}); check "
            "the image and its normalisation"
        )


def _refuse_pixels(
    pixel_values: torch.Tensor, num_items: int, expected: int, spec: EncoderSpec
) -> NoReturn:
    """Say what is wrong with pixels that are not `expected` rows of floats.

    Raises:
        TypeError, ValueError: as `check_pixels`.
    """
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dtype not in PIXEL_DTYPES:
        kind = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values)
        raise TypeError(
            f"pixel_values: {kind} must be a floating-point tensor of normalised pixels "
            "(the image processor's output, not raw uint8)"
        )
    if pixel_values.ndim != 2 or pixel_values.shape[1] != spec.patch_values:
        raise ValueError(
            f"pixel_values: shape {list(pixel_values.shape)} must be [patches, "
            f"{spec.patch_values}]: {spec.in_channels} channels x {spec.temporal_patch_size} "
            f"frames x {spec.patch_size} x {spec.patch_size} pixels"
        )
    raise ValueError(
        f"pixel_values: {pixel_values.shape[0]} rows, but grid_thw describes {expected} "
        f"patches in {num_items} items"
    )
