"""Static buffers, and what goes in and out of them around a replay."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .protocol import BufferSpec
from .rows import RowOffsets, Run

PIXELS = "pixel_values"
GRID = "grid"

Grid = tuple[int, int, int]
_MANY_BYTES = 32 << 20


class CheckedGrid(tuple[Grid, ...]):
    """A grid whose rows are plain (t, h, w) triples, each at least 1, as `grid_rows` makes it."""

    __slots__ = ()


def allocate(specs: Mapping[str, BufferSpec], device: torch.device) -> dict[str, torch.Tensor]:
    """One zero-filled tensor per spec.

    Zeros, because padding rows are computed on too and have to be finite. Never inference tensors,
    which could not be written outside `torch.inference_mode()`.
    """
    with torch.inference_mode(False):
        return {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in specs.items()
        }


def leading_slices(
    buffers: Mapping[str, torch.Tensor], specs: Mapping[str, BufferSpec]
) -> dict[str, torch.Tensor]:
    """The leading rows of `buffers` that `specs` ask for, sharing their memory.

    Raises:
        ValueError: a spec has other names, dtypes or trailing sizes than the buffers, or more rows.
    """
    if specs.keys() != buffers.keys():
        raise ValueError(
            f"leading_slices: specs name {sorted(specs)}, the largest rung {sorted(buffers)}; "
            "every rung must name the same buffers"
        )
    slices = {}
    for name, spec in specs.items():
        buffer = buffers[name]
        same_row = spec.shape[1:] == buffer.shape[1:] and spec.dtype == buffer.dtype
        if not same_row or spec.shape[0] > len(buffer):
            raise ValueError(
                f"leading_slices: {name} is {spec.dtype} {list(spec.shape)}, not the leading rows "
                f"of the largest rung's {buffer.dtype} {list(buffer.shape)}; only the leading axis "
                "may depend on the limits, and it must grow with them"
            )
        with torch.inference_mode(False):
            slices[name] = buffer[: spec.shape[0]]
    return slices


def grid_rows(grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> CheckedGrid:
    """`grid_thw` as plain (t, h, w) triples. A tensor on the GPU costs a synchronisation.

    Raises:
        TypeError: sizes that are not whole numbers.
        ValueError: a shape other than [N, 3], or a size below 1.
    """
    if type(grid_thw) is CheckedGrid:
        return grid_thw
    if isinstance(grid_thw, torch.Tensor):
        if grid_thw.numel() and (grid_thw.ndim != 2 or grid_thw.shape[1] != 3):
            raise ValueError(
                f"execute: grid_thw is {list(grid_thw.shape)}; pass [N, 3] sizes in patches"
            )
        table: Sequence[Sequence[int]] = grid_thw.tolist() if grid_thw.numel() else []
    else:
        table = grid_thw
    rows = []
    for item, row in enumerate(table):
        if hasattr(row, "__len__") and len(row) == 3:
            t, h, w = row
            if type(t) is type(h) is type(w) is int and t > 0 and h > 0 and w > 0:
                rows.append((t, h, w))
                continue
        else:
            raise ValueError(
                f"execute: grid_thw[{item}]={row!r} is not (t, h, w); pass [N, 3] sizes in patches"
            )
        try:
            t, h, w = map(operator.index, row)
        except TypeError as error:
            raise TypeError(
                f"execute: grid_thw[{item}]={row!r} is not of whole numbers; pass integer sizes"
            ) from error
        if t < 1 or h < 1 or w < 1:
            raise ValueError(
                f"execute: grid_thw[{item}]={(t, h, w)} must be at least 1 everywhere; drop the "
                "empty item"
            )
        rows.append((t, h, w))
    return CheckedGrid(rows)


def check_pixels(pixel_values: torch.Tensor, spec: BufferSpec, patches: int) -> None:
    """Refuse pixel rows that do not belong to a grid of `patches` patches or to this encoder.

    Raises:
        TypeError: integer pixels for a floating-point buffer, or the reverse.
        ValueError: a shape other than [patches, width].
    """
    if patches == 0 and pixel_values.numel() == 0:
        return
    expected = (patches, *spec.shape[1:])
    if pixel_values.shape != expected:
        raise ValueError(
            f"execute: pixel_values is {list(pixel_values.shape)}, but grid_thw and the encoder "
            f"ask for {list(expected)}; pass the pixel_values and grid_thw of the same items"
        )
    own = pixel_values.dtype
    if own is not spec.dtype and own.is_floating_point != spec.dtype.is_floating_point:
        raise TypeError(
            f"execute: pixel_values is {own}, the encoder reads {spec.dtype}; "
            "preprocess (rescale and normalise) the pixels first"
        )


def table_for(destination: torch.Tensor, rows: Sequence[Any] | torch.Tensor) -> torch.Tensor:
    """A whole table of integers for `destination` [max_rows, ...]: `rows`, then zeros.

    It lies in pinned memory of its own, so that copying it does not wait. The caching host
    allocator does not hand that memory out again before the copies are done.
    """
    table = torch.zeros(destination.shape, dtype=destination.dtype, pin_memory=destination.is_cuda)
    if isinstance(rows, torch.Tensor):
        table[: len(rows)] = rows
    elif rows:
        table.numpy()[: len(rows)] = rows
    return table


def stage_table(destination: torch.Tensor, rows: Sequence[Any] | torch.Tensor) -> None:
    """Write `table_for(destination, rows)`."""
    destination.copy_(table_for(destination, rows), non_blocking=True)


# leading rows of a static buffer, and which rows of the pixels of a call they take; None for all
PixelCopies = tuple[tuple[torch.Tensor, slice | None], ...]


def pixel_copies(
    destination: torch.Tensor, offsets: RowOffsets, runs: Sequence[Run]
) -> PixelCopies:
    """Where the pixel rows of `runs` go, packed, in the leading rows of `destination`."""
    copies: list[tuple[torch.Tensor, slice | None]] = []
    row = 0
    for run in runs:
        first, count = offsets.span("patches", run)
        whole = count == offsets.total("patches")
        rows = None if whole else slice(first, first + count)
        copies.append((destination[row : row + count], rows))
        row += count
    return tuple(copies)


def stage_pixels(copies: PixelCopies, pixel_values: torch.Tensor) -> None:
    """Copy the pixel rows of a call to where they go; later rows stay as they are.

    A non-blocking copy casts on the destination's device. It is safe from pageable memory as well,
    which CUDA reads before the call returns.
    """
    for destination, rows in copies:
        source = pixel_values if rows is None else pixel_values[rows]
        destination.copy_(source, non_blocking=True)


def gather_pixels(
    pixel_values: torch.Tensor, offsets: RowOffsets, runs: Sequence[Run]
) -> torch.Tensor:
    """The pixel rows of `runs`, packed; a view when they are one run."""
    spans = [offsets.span("patches", run) for run in runs]
    pieces = [pixel_values[first : first + count] for first, count in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def result_rows(
    specs: Mapping[str, BufferSpec], names: Iterable[str], offsets: RowOffsets
) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs `names` for the live rows of all items."""
    return {name: (offsets.total(specs[name].rows), *specs[name].shape[1:]) for name in names}


def check_out(
    out: Mapping[str, torch.Tensor],
    specs: Mapping[str, BufferSpec],
    offsets: RowOffsets,
    device: torch.device,
) -> None:
    """Refuse tensors to write that the outputs do not fit exactly.

    Raises:
        ValueError: an unknown name, or another shape or device.
        TypeError: another dtype.
    """
    unknown = sorted(out.keys() - specs.keys())
    if unknown:
        raise ValueError(
            f"execute: out names {', '.join(unknown)}; the outputs are {', '.join(specs)}"
        )
    for name, shape in result_rows(specs, out, offsets).items():
        tensor = out[name]
        elsewhere = tensor.device.type != device.type or device.index not in (
            None,
            tensor.device.index,
        )
        if tensor.shape != shape or elsewhere:
            raise ValueError(
                f"execute: out[{name!r}] is {list(tensor.shape)} on {tensor.device}; pass "
                f"{list(shape)} on {device}"
            )
        if tensor.dtype != specs[name].dtype:
            raise TypeError(f"execute: out[{name!r}] is {tensor.dtype}; pass {specs[name].dtype}")


def scatter_rows(
    results: Mapping[str, torch.Tensor],
    packed: Mapping[str, torch.Tensor],
    specs: Mapping[str, BufferSpec],
    offsets: RowOffsets,
    runs: Sequence[Run],
) -> None:
    """Copy the leading rows of `packed`, which are those of `runs`, to their place in `results`."""
    for name, result in results.items():
        kind, row = specs[name].rows, 0
        for run in runs:
            first, count = offsets.span(kind, run)
            result[first : first + count].copy_(packed[name][row : row + count])
            row += count


def live_views(
    packed: Mapping[str, torch.Tensor],
    specs: Mapping[str, BufferSpec],
    names: Iterable[str],
    offsets: RowOffsets,
) -> dict[str, torch.Tensor]:
    """The live rows of `packed`, for a batch that holds all items in order; shares its memory."""
    return {name: packed[name][: offsets.total(specs[name].rows)] for name in names}


def copy_views(
    views: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Copies of `views` in `out`, or in new tensors.

    Few bytes in one launch if all have one dtype; of many, one copy each is a sixth faster on an
    H200 (45 us instead of 53 for 66 MB), and what its launches take passes during the replay.
    """
    sources = list(views.values())
    copies = list(map(torch.empty_like, sources)) if out is None else [out[name] for name in views]
    if sum([source.nbytes for source in sources]) >= _MANY_BYTES:
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)
    elif copies:
        torch._foreach_copy_(copies, sources)
    return dict(zip(views, copies, strict=True))
