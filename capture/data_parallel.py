"""One batch shared out over the ranks of a process group, each with a copy of the encoder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from .protocol import BufferSpec, EncoderItemSpec, Pruning, SupportsEncoderCudaGraph
from .rank_exchange import RankStatus, RowExchange, StatusBoard
from .shard_plan import Gather, OwnItems, ShardPlan, ShardPlanner
from .sharding import item_cost
from .staging import PIXELS, check_out, check_pixels, gather_pixels, result_rows

# (pixel_values, grid) and, as keywords where it has them, pruning, out and names.
Execute = Callable[..., dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Shard:
    """What one rank computed.

    Attributes:
        indices: its items, ascending; none if there was no item for it.
        outputs: their outputs by name, rows in that order.
    """

    indices: tuple[int, ...]
    outputs: dict[str, torch.Tensor]


class DataParallelEncoder:
    """Shares the items of a batch out over the ranks of a process group, by cost.

    Every rank makes the same calls with the same grid. Ranks may differ in how they compute (one
    replays graphs, another has captured nothing): capture and `execute` communicate nothing, and
    which collectives a call issues follows from its arguments alone.

    Calls must come in the same order on every rank, from one thread at a time.

    Args:
        execute: computes items: `EncoderCudaGraphManager.execute` or `encoder.eager_forward`.
            Never called without items. Its tensors must be the caller's to keep. It is given
            `pruning`, `out` and `names` if it has parameters of these names; only pruned calls
            need the first.
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
        self._accepts = signature(execute).parameters.keys()
        self._encoder = encoder
        self._group = group
        # Any rung will do: only leading axes depend on it, and those are not read.
        limits = encoder.rung_limits(encoder.budget_range()[1], 1, 1)
        self._pixel_spec = encoder.input_specs(limits)[PIXELS]
        self._specs: dict[str, BufferSpec] = encoder.output_specs(limits)
        self._planner = ShardPlanner(
            encoder, self._specs, self.world_size, item_cost if costs is None else costs
        )
        self._board = StatusBoard(group, encoder.device)

    def assignment(self, grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The items of each rank, ascending: a rank may load those of `[self.rank]` alone.

        Raises:
            TypeError, ValueError: a grid that is malformed or that the encoder refuses.
        """
        return self._planner.plan(grid_thw).shards

    @overload
    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        gather: Literal[True] | Collection[str] = True,
        shard: bool = False,
        check: bool = True,
        pruning: Pruning | None = None,
        out: None = None,
        names: Collection[str] | None = None,
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
        pruning: Pruning | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        names: Collection[str] | None = None,
    ) -> Shard: ...

    @torch.no_grad()
    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        gather: Gather = True,
        shard: bool = False,
        check: bool = True,
        pruning: Pruning | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        names: Collection[str] | None = None,
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
            pruning: which tokens to keep of all items; None for all. The same on every rank, but
                that of the mask a rank reads only the tokens of its own items. An encoder that
                announces no rows of kind "kept" (a tower that was not captured with pruning)
                shortens its "tokens", and outputs that it does not announce are not returned.
            out: with gather=False, tensors for the rows of this rank's items, to write instead of
                new ones; only the outputs that it names are returned.
            names: the outputs wanted, the same on every rank; None for all, or those of `gather`
                or `out`.

        Returns:
            Outputs by name, rows in the order of the items, owned by the caller; a `Shard` for
            gather=False.

        Raises:
            TypeError, ValueError: this rank's arguments are refused, or ranks were called with
                different grids, prunings, costs or outputs (on all ranks).
            RuntimeError: a rank failed or refused its arguments (on all other ranks, and on the
                failing one with its own error as the cause).
        """
        # Whatever goes wrong must not keep this rank from the exchanges that others wait in.
        try:
            if pruning is not None and "pruning" not in self._accepts:
                raise ValueError(
                    "execute: pruning is given, and the function that computes the items has no "
                    "such parameter; construct the DataParallelEncoder with a manager's `execute` "
                    "or an encoder's `eager_forward`, or leave pruning out"
                )
            plan = self._planner.plan(grid_thw, gather, pruning, out, names)
        except Exception as error:
            if check:
                self._agree(None, error, refused=True)
            raise
        exchange: RowExchange | None = None
        outputs: dict[str, torch.Tensor] = {}
        failure: Exception | None = None
        refused = False
        device = self._encoder.device
        try:
            if gather is not False and self.world_size > 1:
                exchange = RowExchange(
                    plan.specs, plan.items, plan.shards, self.rank, device, plan.pruning
                )
            refused = True
            own = plan.own(self.rank)
            pixels = self._own_pixels(pixel_values, plan, own, shard)
            if out is not None:
                check_out(out, plan.specs, own.offsets, device)
            refused = False
            outputs = self._compute(pixels, own, plan.specs, out)
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
        return Shard(plan.shards[self.rank], results) if gather is False else results

    def _own_pixels(
        self, pixel_values: torch.Tensor, plan: ShardPlan, own: OwnItems, shard: bool
    ) -> torch.Tensor:
        offsets = own.offsets if shard else plan.offsets
        check_pixels(pixel_values, self._pixel_spec, offsets.total("patches"))
        if shard or not own.runs:
            return pixel_values
        return gather_pixels(pixel_values, plan.offsets, own.runs)

    def _compute(
        self,
        pixels: torch.Tensor,
        own: OwnItems,
        specs: Mapping[str, BufferSpec],
        out: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """Outputs of this rank's items, of the shapes and dtypes that the encoder announced."""
        shapes = result_rows(specs, specs, own.offsets)
        if not own.grid:
            if out is not None:
                return {name: out[name] for name in specs}
            device = self._encoder.device
            return {
                name: torch.empty(shape, dtype=specs[name].dtype, device=device)
                for name, shape in shapes.items()
            }
        outputs = self._execute(pixels, own.grid, **self._options(own, specs, out))
        for name, shape in shapes.items():
            actual, dtype = outputs.get(name), specs[name].dtype
            if actual is None or actual.shape != shape or actual.dtype != dtype:
                found = "nothing" if actual is None else f"{actual.dtype} {list(actual.shape)}"
                raise RuntimeError(
                    f"execute: {name} of {len(own.grid)} items is {found}, the encoder announces "
                    f"{dtype} {list(shape)}; pass the `execute` of this same encoder"
                )
        if out is None:
            return {name: outputs[name] for name in specs}
        return {
            name: out[name] if outputs[name] is out[name] else out[name].copy_(outputs[name])
            for name in specs
        }

    def _options(
        self, own: OwnItems, specs: Mapping[str, BufferSpec], out: Mapping[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        """What `execute` is told besides the items: what differs from its defaults, if it can."""
        options: dict[str, Any] = {}
        if own.pruning is not None:
            options["pruning"] = own.pruning
            if not self._planner.announces_kept:
                return options  # pruned eagerly, which returns all outputs
        if out is not None and "out" in self._accepts:
            options["out"] = out
        elif len(specs) < len(self._specs) and "names" in self._accepts:
            options["names"] = tuple(specs)
        return options

    def _agree(self, plan: ShardPlan | None, error: Exception | None, refused: bool) -> None:
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
                    f"execute: grid_thw on rank {rank} is not that on rank 0, or pruning is not; "
                    "pass those of the whole batch, in one order, on every rank"
                )
            if other.setup != statuses[0].setup:
                raise ValueError(
                    f"execute: rank {rank} and rank 0 share the same batch out differently or "
                    "return other outputs; use the same encoder, costs and gather on every rank"
                )
