"""Which rows belong to which item, in every kind of tensor around a replay.

Neighbouring items have neighbouring rows on both sides, so rows move by *runs*: one copy for every
stretch of consecutive items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .protocol import EncoderItemSpec, Pruning, Rows, RungLimits

Run = tuple[int, int]


def row_counts(
    kind: Rows, items: Sequence[EncoderItemSpec], pruning: Pruning | None = None
) -> Sequence[int]:
    """How many rows of `kind` each item has."""
    if kind == "kept" and pruning is not None:
        return pruning.keep
    if kind == "patches":
        return [item.input_size for item in items]
    if kind in ("tokens", "kept"):
        return [item.output_tokens for item in items]
    if kind == "frames":
        return [item.num_frames for item in items]
    if kind == "windows":
        return [item.num_windows for item in items]
    return [1] * len(items)


def limit_of(kind: Rows, limits: RungLimits) -> int:
    """The most rows of `kind` that a rung holds."""
    by_kind: dict[Rows, int] = {
        "patches": limits.max_patches,
        "tokens": limits.token_budget,
        "kept": limits.token_budget,
        "items": limits.max_items,
        "frames": limits.max_frames,
        "windows": limits.max_windows,
    }
    return by_kind[kind]


@dataclass(frozen=True)
class RowOffsets:
    """Where the rows of every item start, for each kind of row: offsets[kind] is [N + 1]."""

    offsets: dict[Rows, list[int]]

    @classmethod
    def of(
        cls, kinds: set[Rows], items: Sequence[EncoderItemSpec], pruning: Pruning | None = None
    ) -> "RowOffsets":
        """Offsets of `items` laid out one after the other."""
        return cls({kind: [0, *accumulate(row_counts(kind, items, pruning))] for kind in kinds})

    def total(self, kind: Rows) -> int:
        """Rows of all items."""
        return self.offsets[kind][-1]

    def span(self, kind: Rows, run: Run) -> tuple[int, int]:
        """(first row, number of rows) of the items of `run`."""
        offsets = self.offsets[kind]
        return offsets[run[0]], offsets[run[1]] - offsets[run[0]]


def runs_of(indices: Sequence[int]) -> list[Run]:
    """Ascending `indices` as half-open stretches of consecutive ones."""
    runs: list[Run] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
