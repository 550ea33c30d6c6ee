"""From measured rows to the launch table of kernels/gemm_tuning.py, and its literal."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from ..kernels import few_rows_tuning, gemm_tuning
from ..kernels.few_rows_tuning import FewRowsConfig, shipped_few_rows
from ..kernels.gemm_tuning import RESIDUAL, ROTATED, HopperConfig, Table, shipped_tiles
from .tune_contest import LIBRARY, MOST_FEW_ROWS, tile_name
from .tune_shapes import LinearShape

Row = dict[str, Any]
RowClasses = tuple[tuple[int, HopperConfig | None], ...]

_WIDTH = 100


def row_classes(
    times: Mapping[int, Mapping[str, float]], tiles: Mapping[str, HopperConfig]
) -> RowClasses:
    """What each M takes: its fastest tile where that is no slower than the library.

    A class begins at the measured M from which on its tile is named, and ends at the next. A tile
    without a time at one M of these, because it was wrong or failed there, is named at none.

    Args:
        times: Microseconds by candidate for each M; the library is among them.
        tiles: Candidates that are tiles; of equals the first is named.
    """
    sound = [name for name in tiles if all(name in us for us in times.values())]
    classes: list[tuple[int, HopperConfig | None]] = []
    current: HopperConfig | None = None
    for M in sorted(times):
        us = times[M]
        best = min(sound, key=us.__getitem__, default=None)
        chosen = None if best is None or us[best] > us[LIBRARY] else tiles[best]
        if chosen != current:
            classes.append((M, chosen))
            current = chosen
    return tuple(classes)


def measured_table(
    rows: Sequence[Row], shapes: Sequence[LinearShape], patches: Sequence[int]
) -> Table:
    """Entries of the shapes that have a time of the library at every M; the others have none.

    An empty entry is a finding too: the library everywhere.
    """
    table: dict[tuple[int, int, str], RowClasses] = {}
    for shape in shapes:
        times = {r["M"]: r["us"] for r in rows if r["kind"] == "linear" and _key(r) == shape.key}
        wanted = shape.rows(patches)
        if all(LIBRARY in times.get(M, ()) for M in wanted):
            tiles = {tile_name(tile): tile for tile in shipped_tiles(shape.epilogue)}
            table[shape.key] = row_classes({M: times[M] for M in wanted}, tiles)
    return table


def few_rows_classes(
    times: Mapping[int, Mapping[str, float]], tiles: Mapping[str, FewRowsConfig]
) -> tuple[tuple[int, FewRowsConfig | None], ...]:
    """The fastest tile of few rows at each M up to which it is faster than all other candidates.

    A class ends at the last measured M at which its tile is named, and begins after the one before.
    """
    classes: list[tuple[int, FewRowsConfig | None]] = []
    for M in sorted(m for m in times if m <= MOST_FEW_ROWS):
        fastest = min(times[M], key=times[M].__getitem__)
        chosen = tiles.get(fastest)
        if classes and classes[-1][1] == chosen:
            classes.pop()
        classes.append((M, chosen))
    return tuple(classes if classes and classes[-1][1] else classes[:-1])


def measured_few_rows(rows: Sequence[Row], table: Table) -> few_rows_tuning.Table:
    """Entries of few rows of the shapes that `table` has."""
    found = {}
    for key in table:
        times = {r["M"]: r["us"] for r in rows if r["kind"] == "linear" and _key(r) == key}
        _, K, epilogue = key
        tiles = {tile_name(tile): tile for tile in shipped_few_rows(epilogue, K)}
        found[key] = few_rows_classes(times, tiles)
    return found


def literal(table: Table, labels: Mapping[tuple[int, int, str], str], note: str) -> str:
    """`table` as kernels/gemm_tuning.py holds it, under a comment `note`."""
    names = {v: k for k, v in vars(gemm_tuning).items() if isinstance(v, HopperConfig)}
    lines = [
        f"# {note}",
        "TABLE: dict[tuple[int, int, str], tuple[tuple[int, HopperConfig | None], ...]] = {",
    ]
    for (N, K, epilogue), classes in table.items():
        label = labels.get((N, K, epilogue), "")
        lines += [f"    # {part}" for part in wrap(label, _WIDTH - 6, break_on_hyphens=False)]
        name = {RESIDUAL: "RESIDUAL", ROTATED: "ROTATED"}.get(epilogue, f'"{epilogue}"')
        parts = [f"({first}, {names.get(tile, tile) if tile else None})" for first, tile in classes]
        comma = "," if len(parts) == 1 else ""
        line = f"    ({N}, {K}, {name}): ({', '.join(parts)}{comma}),"
        if len(line) <= _WIDTH:
            lines.append(line)
        else:
            lines.append(f"    ({N}, {K}, {name}): (")
            lines += [f"        {part}," for part in parts]
            lines.append("    ),")
    return "\n".join([*lines, "}  # fmt: skip"])


def _key(row: Row) -> tuple[int, int, str]:
    return row["N"], row["K"], row["epilogue"]
