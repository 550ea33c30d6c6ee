"""One call, planned: its items, where their rows are, and the batches that compute them."""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .captured import ONLY_VARIANT, CapturedLadder
from .cost import Costs, Load
from .dispatch import Dispatcher
from .graph import BudgetGraphMetadata, Recording
from .packing import CHEAPER, LIMITS, Batch, exceeded, room_of, total_of
from .protocol import (
    BufferSpec,
    EncoderItemSpec,
    Pruning,
    RecordsVariants,
    Rows,
    RungLimits,
    SupportsEncoderCudaGraph,
)
from .rows import RowOffsets, Run, runs_of
from .staging import (
    GRID,
    PIXELS,
    CheckedGrid,
    Grid,
    PixelCopies,
    live_views,
    pixel_copies,
    table_for,
)

_REMEMBERED = 1024  # plans


@dataclass(frozen=True)
class PreparedReplay:
    """A batch on one rung and slot: what its replays need, found once.

    The device waits for all that comes before a replay, and the fewer steps there are the better:
    after other work of the host each costs several times what it does in a loop.

    Attributes:
        graph: the rung's graphs and buffers in this slot.
        recording: the one of them for these items.
        name: of its range in a profile.
        table: the grid table that `graph` reads; None if the encoder stages its inputs itself.
        pixels: where rows of the call's pixels go.
    """

    graph: BudgetGraphMetadata
    recording: Recording
    name: str
    table: torch.Tensor | None
    pixels: PixelCopies


@dataclass(frozen=True)
class PlannedBatch:
    """Items computed together: where they are, and on what."""

    items: tuple[EncoderItemSpec, ...]
    runs: tuple[Run, ...]
    rung: RungLimits | None
    reasons: Counter[str]
    load: Load
    # by token budget and slot
    _prepared: dict[tuple[int, int], PreparedReplay] = field(
        default_factory=dict, repr=False, compare=False
    )
    # by token budget
    _variants: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, batch: Batch, items: Sequence[EncoderItemSpec], largest: RungLimits
    ) -> "PlannedBatch":
        """`batch` with what a replay, or the count of an eager batch, needs to know of its items.

        The reason of an item is its own: the limit of the largest rung that it exceeds alone, else
        that of the batch, which it joined because that costs less than a replay.
        """
        own = tuple(items[index] for index in batch.indices)
        reasons: Counter[str] = Counter()
        if batch.rung is None:
            room = room_of(largest)
            shared = batch.reason if batch.reason not in LIMITS else CHEAPER
            reasons.update(exceeded(Load.of(item), room) or shared or CHEAPER for item in own)
        load = total_of([Load.of(item) for item in own])
        return cls(own, tuple(runs_of(batch.indices)), batch.rung, reasons, load)

    def rows(self, grid: Sequence[Grid]) -> list[Grid]:
        """The rows of the grid table that belong to this batch."""
        return [row for run in self.runs for row in grid[slice(*run)]]

    def prepared(
        self,
        ladder: CapturedLadder,
        rung: RungLimits,
        slot: int,
        grid: Sequence[Grid],
        offsets: RowOffsets,
        varied: RecordsVariants | None,
        *,
        has_table: bool,
    ) -> PreparedReplay:
        """What a replay on `rung` in slot number `slot` needs; the same object every time.

        `has_table` is false where the encoder fills its inputs itself, whatever it calls them.

        Raises:
            ValueError: `varied`, the encoder if it records variants, names one that it has not.
        """
        key = rung.token_budget, slot
        prepared = self._prepared.get(key)
        if prepared is None:
            graph = ladder.rungs[rung].graphs[slot]
            variant = ONLY_VARIANT if varied is None else self._variant(varied, rung)
            table = None
            if has_table:
                table = table_for(graph.inputs[GRID], self.rows(grid))
            prepared = self._prepared[key] = PreparedReplay(
                graph,
                graph.recordings[variant],
                f"vitgraph.replay[{rung.token_budget}]",
                table,
                pixel_copies(graph.inputs[PIXELS], offsets, self.runs),
            )
        return prepared

    def _variant(self, encoder: RecordsVariants, rung: RungLimits) -> str:
        """Which graph of `rung` serves these items; asked once for each rung."""
        variant = self._variants.get(rung.token_budget)
        if variant is None:
            variant, known = encoder.variant_of(rung, self.items), encoder.variants(rung)
            if variant not in known:
                raise ValueError(
                    f"execute: {type(encoder).__name__}.variant_of is {variant!r} for the rung of "
                    f"{rung.token_budget} tokens, recorded as {', '.join(known)}; name one of these"
                )
            self._variants[rung.token_budget] = variant
        return variant


@dataclass(frozen=True)
class PlannedCall:
    """What has to be done for one layout."""

    items: tuple[EncoderItemSpec, ...]
    offsets: RowOffsets
    batches: tuple[PlannedBatch, ...]
    num_patches: int = field(init=False)
    is_replay: bool = field(init=False)  # one of all items
    # the live rows of static outputs, by slot: made once, as the sources of copies only
    _sources: dict[int, dict[str, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self):
        object.__setattr__(self, "num_patches", self.offsets.total("patches"))
        is_replay = len(self.batches) == 1 and self.batches[0].rung is not None
        object.__setattr__(self, "is_replay", is_replay)

    def sources(
        self, slot: int, packed: Mapping[str, torch.Tensor], specs: Mapping[str, BufferSpec]
    ) -> dict[str, torch.Tensor]:
        """The live rows of all outputs `packed` of `slot`, for a call that is one replay."""
        sources = self._sources.get(slot)
        if sources is None:
            sources = self._sources[slot] = live_views(packed, specs, specs, self.offsets)
        return sources


class Planner:
    """Plans calls on one ladder, and remembers the plans of layouts that it has seen."""

    def __init__(
        self,
        encoder: SupportsEncoderCudaGraph,
        rungs: Sequence[RungLimits],
        costs: Costs,
        kinds: set[Rows],
    ):
        self._encoder = encoder
        self._largest = rungs[-1]
        self._dispatcher = Dispatcher(rungs, costs)
        self._kinds = kinds
        self._plans: OrderedDict[object, PlannedCall] = OrderedDict()

    def plan(
        self, grid: CheckedGrid, pruning: Pruning | None = None, eager_reason: str | None = None
    ) -> PlannedCall:
        """The plan for `grid`; `eager_reason` sends all of it to the eager forward.

        Raises:
            ValueError: a grid that the encoder refuses.
        """
        key: object = grid
        if pruning is not None or eager_reason is not None:
            key = grid, pruning and pruning.keep, eager_reason
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plan(grid, pruning, eager_reason)
            while len(self._plans) >= _REMEMBERED:
                self._plans.popitem(last=False)
            self._plans[key] = planned
        return planned

    def known(self, grid: CheckedGrid) -> PlannedCall | None:
        """The plan for `grid` without pruning, if there is one already."""
        return self._plans.get(grid)

    def _plan(
        self, grid: Sequence[Grid], pruning: Pruning | None, eager_reason: str | None
    ) -> PlannedCall:
        items = tuple(self._encoder.item_specs(grid))
        if eager_reason is None or not items:
            batches = self._dispatcher.plan(items)
        else:
            batches = [Batch(tuple(range(len(items))), None, eager_reason)]
        return PlannedCall(
            items,
            RowOffsets.of(self._kinds, items, pruning),
            tuple(PlannedBatch.of(batch, items, self._largest) for batch in batches),
        )
