"""What the ranks of a process group do with one batch, the same on all of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch

from .protocol import BufferSpec, EncoderItemSpec, Pruning, Rows, SupportsEncoderCudaGraph
from .pruning import check_pruning, select_pruning
from .rows import RowOffsets, Run, runs_of
from .sharding import assign
from .staging import CheckedGrid, Grid, grid_rows

Gather = bool | Collection[str]


@dataclass(frozen=True)
class OwnItems:
    """The part of a batch that one rank computes.

    Attributes:
        grid: (t, h, w) of its items; empty if it has none.
        runs: its items as stretches of neighbours.
        offsets: where the rows of its items start, in its pixels and in its outputs.
        pruning: what its items keep; None for all.
    """

    grid: list[Grid]
    runs: list[Run]
    offsets: RowOffsets
    pruning: Pruning | None


@dataclass(frozen=True)
class ShardPlan:
    """A batch as all ranks see it.

    Attributes:
        grid, items: all of it.
        shards: the items of each rank, ascending.
        specs: the outputs wanted, with the kinds that their rows have in this call.
        pruning: what the items keep; None for all.
        offsets: where the patches and tokens of each item start.
        batch, setup: digests of what was asked for and of how it is shared out, to be compared.
    """

    grid: CheckedGrid
    items: list[EncoderItemSpec]
    shards: list[tuple[int, ...]]
    specs: dict[str, BufferSpec]
    pruning: Pruning | None
    offsets: RowOffsets
    batch: bytes
    setup: bytes

    def own(self, rank: int) -> OwnItems:
        """The part of `rank`."""
        shard = self.shards[rank]
        runs = runs_of(shard)
        pruning = select_pruning(self.pruning, self.offsets, runs) if shard else None
        kinds: set[Rows] = {"patches"}
        kinds.update(spec.rows for spec in self.specs.values())
        offsets = RowOffsets.of(kinds, [self.items[index] for index in shard], pruning)
        return OwnItems([self.grid[index] for index in shard], runs, offsets, pruning)


class ShardPlanner:
    """Plans batches of one encoder for `ranks` ranks.

    Args:
        encoder: sizes the items.
        specs: its outputs.
        ranks: how many share the work.
        costs: relative time of an item.
    """

    def __init__(
        self,
        encoder: SupportsEncoderCudaGraph,
        specs: Mapping[str, BufferSpec],
        ranks: int,
        costs: Callable[[EncoderItemSpec], float],
    ):
        self._encoder = encoder
        self._specs = specs
        self._ranks = ranks
        self._costs = costs
        # Otherwise pruning is not in the encoder's graphs, and shortens what it calls tokens.
        self.announces_kept = any(spec.rows == "kept" for spec in specs.values())

    def plan(
        self,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        gather: Gather = False,
        pruning: Pruning | None = None,
        out: Collection[str] | None = None,
        names: Collection[str] | None = None,
    ) -> ShardPlan:
        """See `DataParallelEncoder.execute`; of `out` the names.

        Raises:
            TypeError, ValueError: arguments that are malformed or do not belong together.
        """
        wanted = self._wanted(gather, out, names)
        specs = {name: spec for name, spec in self._specs.items() if name in wanted}
        grid = grid_rows(grid_thw)
        items = self._encoder.item_specs(grid)
        if pruning is not None:
            check_pruning(pruning, items)
            if not self.announces_kept:
                specs = {name: _shortened(spec) for name, spec in specs.items()}
        shards = assign([self._costs(item) for item in items], self._ranks)
        rows = RowOffsets.of({spec.rows for spec in specs.values()}, items, pruning)
        layout = [
            (name, rows.total(spec.rows), spec.shape[1:], spec.dtype)
            for name, spec in specs.items()
        ]
        kept = None if pruning is None else (pruning.keep, pruning.masked)
        return ShardPlan(
            grid,
            items,
            shards,
            specs,
            pruning,
            RowOffsets.of({"patches", "tokens"}, items),
            _digest((grid, kept)),
            _digest((shards, layout, gather is False)),
        )

    def _wanted(
        self, gather: Gather, out: Collection[str] | None, names: Collection[str] | None
    ) -> Collection[str]:
        """The names of the outputs asked for, in whichever way."""
        if out is not None and gather is not False:
            raise ValueError(
                f"execute: out holds this rank's own rows, and gather={gather!r} asks for those of "
                "all ranks; pass gather=False to have them written, or leave out out"
            )
        ways = {"gather": None if isinstance(gather, bool) else gather, "out": out, "names": names}
        asked = {way: wanted for way, wanted in ways.items() if wanted is not None}
        for way, wanted in asked.items():
            unknown = sorted(set(wanted) - self._specs.keys())
            if unknown:
                raise ValueError(
                    f"execute: unknown output {', '.join(unknown)} in {way}; the outputs are "
                    f"{', '.join(self._specs)}"
                )
        if len({frozenset(wanted) for wanted in asked.values()}) > 1:
            given = " and ".join(f"{way}: {', '.join(sorted(asked[way]))}" for way in asked)
            raise ValueError(
                f"execute: {given} are different outputs; name the outputs in one of them"
            )
        return next(iter(asked.values()), self._specs)


def _shortened(spec: BufferSpec) -> BufferSpec:
    return replace(spec, rows="kept") if spec.rows == "tokens" else spec


def _digest(value: object) -> bytes:
    """8 bytes that differ, in practice always, between ranks that hold different values."""
    return blake2b(repr(value).encode(), digest_size=8).digest()
