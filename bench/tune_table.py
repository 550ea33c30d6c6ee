"""From measured rows to the launch table of kernels/gemm_tuning.py, and its literal."""

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any, TypeVar

from ..kernels import few_rows_tuning, gemm_tuning, library_tuning
from ..kernels.cublaslt import Algorithm
from ..kernels.few_rows_tuning import FewRowsConfig, shipped_few_rows
from ..kernels.gemm_tuning import GATED, RESIDUAL, ROTATED, HopperConfig, Table, shipped_tiles
from .tune_contest import MOST_FEW_ROWS, tile_name
from .tune_library import LIBRARY, algorithm_literal, algorithm_of, fastest_of_library, is_library
from .tune_shapes import LinearShape

Row = dict[str, Any]
RowClasses = tuple[tuple[int, HopperConfig | None], ...]
AlgorithmClasses = tuple[tuple[int, Algorithm | None], ...]
Key = tuple[int, int, str]
_Choice = TypeVar("_Choice")

_WIDTH = 100
# Live rows fill about so much of a rung: the automatic ladder has steps of 6 to 12 per cent.
# The library computes all rows; our tiles, of up to 256 rows, spare some where that is many.
_MEAN_LIVE, _SPARED_FROM = 0.96, 4096
_TOLERANCE = 1.01  # of a time to the fastest: what measurements tell apart


def runs(times: Mapping[int, Mapping[_Choice, float]]) -> list[tuple[int, int, _Choice]]:
    """First M, last M and choice of as few classes of M as keep every M near its fastest.

    A class ends where no choice would be within `_TOLERANCE` of the fastest at each of its M; of
    several choices that go as far, the one that is fastest there on the whole is taken.

    Args:
        times: Microseconds of each choice for each M; a choice may be missing at some.
    """
    ascending = sorted(times)
    relative = [
        {choice: time / min(times[M].values()) for choice, time in times[M].items()}
        for M in ascending
    ]
    found = []
    start = 0
    while start < len(ascending):
        left, end = set(relative[start]), start

        def near(choices: set[_Choice], at: int) -> set[_Choice]:
            return {c for c in choices if relative[at].get(c, math.inf) <= _TOLERANCE}

        while end < len(ascending) and near(left, end):
            left = near(left, end)
            end += 1
        part = relative[start:end]
        choice = min(left, key=lambda c: (sum(each[c] for each in part), str(c)))
        found.append((ascending[start], ascending[end - 1], choice))
        start = end
    return found


def row_classes(
    times: Mapping[int, Mapping[str, float]], tiles: Mapping[str, HopperConfig]
) -> RowClasses:
    """The tile of each M, or None for the library with the fastest of its algorithms.

    From `_SPARED_FROM` rows on they are compared as if `_MEAN_LIVE` of them were live.

    A class begins at the measured M from which on its tile is named, and ends at the next. A tile
    without a time at one M of these, because it was wrong or failed there, is named at none.

    Args:
        times: Microseconds by candidate for each M; the library is among them.
        tiles: Candidates that are tiles.
    """
    sound = [name for name in tiles if all(name in us for us in times.values())]
    choices: dict[int, dict[HopperConfig | None, float]] = {}
    for M, us in times.items():
        live = _MEAN_LIVE if M >= _SPARED_FROM else 1.0
        choices[M] = {tiles[name]: us[name] * live for name in sound}
        choices[M][None] = fastest_of_library(us)
    classes = tuple((first, tile) for first, _, tile in runs(choices))
    return classes[1:] if classes and classes[0][1] is None else classes


def library_classes(times: Mapping[int, Mapping[str, float]]) -> AlgorithmClasses:
    """The algorithm of each M, or None for the library's own choice; a class ends at its M."""
    choices = {
        M: {algorithm_of(name): time for name, time in us.items() if is_library(name)}
        for M, us in times.items()
    }
    classes = tuple((last, algorithm) for _, last, algorithm in runs(choices))
    return classes[:-1] if classes and classes[-1][1] is None else classes


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


def measured_library(
    rows: Sequence[Row], shapes: Sequence[LinearShape], table: Table
) -> library_tuning.Table:
    """Algorithms of the shapes that `table` has, as far up as it leaves some M to the library.

    An empty entry is a finding too: its own choice everywhere.

    Of two shapes that the library computes alike, with and without a pass after it, the one without
    decides.
    """
    found: dict[tuple[int, int, str], AlgorithmClasses] = {}
    for shape in sorted(shapes, key=lambda s: s.key != s.library_key):
        if shape.key not in table or shape.epilogue in (GATED, ROTATED):
            continue
        times = {r["M"]: r["us"] for r in rows if r["kind"] == "linear" and _key(r) == shape.key}
        first, tile = table[shape.key][-1] if table[shape.key] else (0, None)
        if tile is not None:  # from there on
            times = {M: us for M, us in times.items() if first > M}
        found.setdefault(shape.library_key, library_classes(times))
    return found


def literal(table: Table, labels: Mapping[Key, str], note: str) -> str:
    """`table` as kernels/gemm_tuning.py holds it, under a comment `note`."""
    names = {v: k for k, v in vars(gemm_tuning).items() if isinstance(v, HopperConfig)}
    kind = "dict[tuple[int, int, str], tuple[tuple[int, HopperConfig | None], ...]]"
    return _literal(kind, table, lambda tile: str(names.get(tile, tile)), labels, note)


def library_literal(table: library_tuning.Table, labels: Mapping[Key, str], note: str) -> str:
    """`table` as kernels/library_tuning.py holds it, under a comment `note`."""
    return _literal("Table", table, algorithm_literal, labels, note)


def _literal(
    kind: str,
    table: Mapping[Key, tuple[tuple[int, Any], ...]],
    name_of: Callable[[Any], str],
    labels: Mapping[Key, str],
    note: str,
) -> str:
    lines = [f"# {note}", f"TABLE: {kind} = {{"]
    for (N, K, epilogue), classes in table.items():
        label = labels.get((N, K, epilogue), "")
        lines += [f"    # {part}" for part in wrap(label, _WIDTH - 6, break_on_hyphens=False)]
        name = {RESIDUAL: "RESIDUAL", ROTATED: "ROTATED"}.get(epilogue, f'"{epilogue}"')
        parts = [f"({bound}, {name_of(choice) if choice else None})" for bound, choice in classes]
        comma = "," if len(parts) == 1 else ""
        line = f"    ({N}, {K}, {name}): ({', '.join(parts)}{comma}),"
        if len(line) <= _WIDTH:
            lines.append(line)
        else:
            lines.append(f"    ({N}, {K}, {name}): (")
            # lines are broken between classes alone
            text = ", ".join(part.replace(" ", "\0") for part in parts) + ","
            lines += [f"        {part}" for part in wrap(text, _WIDTH - 8)]
            lines.append("    ),")
    return "\n".join([*lines, "}  # fmt: skip"]).replace("\0", " ")


def _key(row: Row) -> tuple[int, int, str]:
    return row["N"], row["K"], row["epilogue"]
