"""One batch shared out over the ranks of a process group, each with a copy of the encoder."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, overload

import torch
import torch.distributed as dist

from .protocol import BufferSpec, EncoderItemSpec, SupportsEncoderCudaGraph
from .rank_exchange import RankStatus, RowExchange, StatusBoard
from .rows import RowOffsets, row_counts, runs_of
from .sharding import assign, item_cost
from .staging import PIXELS, Grid, check_pixels, gather_pixels, grid_rows

Execute = Callable[[torch.Tensor, list[Grid]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Shard:
    """What one rank computed.

    Attributes:
        indices: its items, ascending; none if there was no item for it.
        outputs: their outputs by name, rows in that order.
    """

    indices: tuple[int, ...]
    outputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Plan:
    """A batch as all ranks see it; the digests are what they compare."""

    grid: list[Grid]
    items: list[EncoderItemSpec]
    shards: list[tuple[int, ...]]
    names: list[str]
    batch: bytes
    setup: bytes


class DataParallelEncoder:
    """Shares the items of a batch out over the ranks of a process group, by cost.

    Every rank makes the same calls with the same grid. Ranks may differ in how they compute (one
    replays graphs, another has captured nothing): capture and `execute` communicate nothing, and
    which collectives a call issues follows from its arguments alone.

    Calls must come in the same order on every rank, from one thread at a time.

    Args:
        execute: computes items: `EncoderCudaGraphManager.execute` or `encoder.eager_forward`.
            Never called without items. Its tensors must be the caller's to keep.
        encoder: names the outputs and sizes the items; the same tower on every rank.
        group: the ranks; None for the default group. It needs a backend for the encoder's device.
        costs: relative time of an item, the same on every rank; None for `item_cost`.

    Raises:
        RuntimeError: there is no process group.
        ValueError: this process is not in `group`, or the group does not serve the device.
    """

    def __init__(
        self,
        execute: Execute,
        encoder: SupportsEncoderCudaGraph,
        *,
        group: dist.ProcessGroup | None = None,
        costs: Callable[[EncoderItemSpec], float] | None = None,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DataParallelEncoder: there is no process group; "
                "call torch.distributed.init_process_group() first"
            )
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"DataParallelEncoder: global rank {dist.get_rank()} is not in the group; "
                "construct it on the ranks of the group only"
            )
        self._execute = execute
        self._encoder = encoder
        self._group = group
        self._costs = item_cost if costs is None else costs
        # Any rung will do: only leading axes depend on it, and those are not read.
        limits = encoder.rung_limits(encoder.budget_range()[1], 1, 1)
        self._pixel_spec = encoder.input_specs(limits)[PIXELS]
        self._specs: dict[str, BufferSpec] = encoder.output_specs(limits)
        self._board = StatusBoard(group, encoder.device)

    def assignment(self, grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The items of each rank, ascending: a rank may load those of `[self.rank]` alone.

        Raises:
            TypeError, ValueError: a grid that is malformed or that the encoder refuses.
        """
        return self._plan(grid_thw).shards

    @overload
    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        gather: Literal[True] | Collection[str] = True,
        shard: bool = False,
        check: bool = True,
    ) -> dict[str, torch.Tensor]: ...

    @overload
    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        gather: Literal[False],
        shard: bool = False,
        check: bool = True,
    ) -> Shard: ...

    @torch.no_grad()
    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        gather: bool | Collection[str] = True,
        shard: bool = False,
        check: bool = True,
    ) -> dict[str, torch.Tensor] | Shard:
        """Encode a batch on all ranks together.

        The check is one exchange of 512 bytes a rank, after this rank has enqueued its work: it
        carries errors and a hash of the batch, and the host waits until all hosts have come to it.
        It does not wait for this call's work on the GPU; over NCCL alone it waits for the previous
        call's gather, while a group made with "cpu:gloo,cuda:nccl" exchanges it between the hosts.
        Without the check nothing waits. A rank that fails then sends NaN rows and raises, the
        others receive them unwarned, and differing arguments may hang.

        Args:
            pixel_values: [T, width] of all items; with `shard`, of this rank's items alone.
            grid_thw: [N, 3] sizes in patches of all items, the same on every rank.
            gather: True: every rank receives the outputs of all items. A collection of output
                names: those outputs alone. False: each rank keeps what it computed.
            shard: whether `pixel_values` holds the items `assignment(grid_thw)[rank]` only; ranks
                may differ in this.
            check: tell all ranks of errors and of differing batches before results are exchanged.

        Returns:
            Outputs by name, rows in the order of the items, owned by the caller; a `Shard` for
            gather=False.

        Raises:
            TypeError, ValueError: this rank's arguments are refused, or ranks were called with
                different grids, costs or outputs (on all ranks).
            RuntimeError: a rank failed or refused its arguments (on all other ranks, and on the
                failing one with its own error as the cause).
        """
        # Whatever goes wrong must not keep this rank from the exchanges that others wait in.
        try:
            plan = self._plan(grid_thw, gather)
        except Exception as error:
            if check:
                self._agree(None, error, refused=True)
            raise
        exchange: RowExchange | None = None
        outputs: dict[str, torch.Tensor] = {}
        failure: Exception | None = None
        refused = False
        try:
            if gather is not False and self.world_size > 1:
                exchange = RowExchange(
                    {name: self._specs[name] for name in plan.names},
                    plan.items,
                    plan.shards,
                    self.rank,
                    self._encoder.device,
                )
            refused = True
            pixels = self._own_pixels(pixel_values, plan, shard)
            refused = False
            outputs = self._compute(pixels, plan)
            if exchange is not None:
                exchange.put(outputs)
        except Exception as error:
            failure = error
        if check:
            self._agree(plan, failure, refused)
        results = outputs
        if exchange is not None:
            if failure is not None:
                exchange.poison()
            results = exchange.gather(self._group)
            self._board.follow_current_stream()
        if failure is not None:
            raise failure
        if gather is False:
            return Shard(plan.shards[self.rank], results)
        return {name: results[name] for name in plan.names}

    def _plan(
        self,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        gather: bool | Collection[str] = False,
    ) -> _Plan:
        wanted = self._specs.keys() if isinstance(gather, bool) else gather
        unknown = sorted(set(wanted) - self._specs.keys())
        if unknown:
            raise ValueError(
                f"execute: gather names {', '.join(unknown)}; the outputs are "
                f"{', '.join(self._specs)}"
            )
        grid = grid_rows(grid_thw)
        items = self._encoder.item_specs(grid)
        shards = assign([self._costs(item) for item in items], self.world_size)
        names = [name for name in self._specs if name in wanted]
        layout = [(name, self._specs[name].shape[1:], self._specs[name].dtype) for name in names]
        return _Plan(
            grid, items, shards, names, _digest(grid), _digest((shards, layout, gather is False))
        )

    def _own_pixels(self, pixel_values: torch.Tensor, plan: _Plan, shard: bool) -> torch.Tensor:
        own = plan.shards[self.rank]
        offsets = RowOffsets.of({"patches"}, plan.items)
        patches = sum([plan.items[index].input_size for index in own])
        check_pixels(pixel_values, self._pixel_spec, patches if shard else offsets.total("patches"))
        if shard or not own:
            return pixel_values
        return gather_pixels(pixel_values, offsets, runs_of(own))

    def _compute(self, pixels: torch.Tensor, plan: _Plan) -> dict[str, torch.Tensor]:
        """All outputs of this rank's items, of the shapes and dtypes that the encoder announced."""
        own = plan.shards[self.rank]
        items = [plan.items[index] for index in own]
        device = self._encoder.device
        outputs = self._execute(pixels, [plan.grid[index] for index in own]) if own else {}
        for name, spec in self._specs.items():
            shape = (sum(row_counts(spec.rows, items)), *spec.shape[1:])
            if not own:
                outputs[name] = torch.empty(shape, dtype=spec.dtype, device=device)
                continue
            actual = outputs.get(name)
            if actual is None or actual.shape != shape or actual.dtype != spec.dtype:
                found = "nothing" if actual is None else f"{actual.dtype} {list(actual.shape)}"
                raise RuntimeError(
                    f"execute: {name} of {len(own)} items is {found}, the encoder announces "
                    f"{spec.dtype} {list(shape)}; pass the `execute` of this same encoder"
                )
        return outputs

    def _agree(self, plan: _Plan | None, error: Exception | None, refused: bool) -> None:
        """Exchange statuses, and raise on every rank unless all are well and agree."""
        text = ""
        if error is not None:
            text = f"{'refused its input' if refused else 'failed'}: "
            text += f"{type(error).__name__}: {error}"
        status = RankStatus(error=text)
        if plan is not None:
            status = RankStatus(plan.batch, plan.setup, text)
        statuses = self._board.exchange(status)
        if error is not None and refused:
            raise error
        failed = [f"rank {rank} {s.error}" for rank, s in enumerate(statuses) if s.error]
        if failed:
            raise RuntimeError(
                f"execute: of {self.world_size} ranks, {'; '.join(failed)}"
            ) from error
        for rank, other in enumerate(statuses):
            if other.batch != statuses[0].batch:
                raise ValueError(
                    f"execute: grid_thw on rank {rank} is not that on rank 0; pass the grid of "
                    "the whole batch, in one order, on every rank"
                )
            if other.setup != statuses[0].setup:
                raise ValueError(
                    f"execute: rank {rank} and rank 0 share the same batch out differently or "
                    "return other outputs; use the same encoder, costs and gather on every rank"
                )


def _digest(value: object) -> bytes:
    """8 bytes that differ, in practice always, between ranks that hold different values."""
    return blake2b(repr(value).encode(), digest_size=8).digest()
