"""Calls on a captured ladder: staging, replays, eager batches, and who owns the results."""

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from .calls import PlannedBatch, PlannedCall, Planner, PreparedReplay
from .captured import CapturedLadder
from .cost import AssumedCosts, Costs
from .protocol import (
    Pruning,
    RecordsVariants,
    Rows,
    RungLimits,
    StagesInputs,
    SupportsEncoderCudaGraph,
)
from .pruning import KEEP, KEEP_MASK, check_pruning, select_pruning, stage_pruning
from .ranges import is_watched, run_marked
from .rows import limit_of
from .slots import Lease, Slot
from .staging import (
    GRID,
    PIXELS,
    CheckedGrid,
    Grid,
    check_out,
    check_pixels,
    copy_views,
    gather_pixels,
    grid_rows,
    live_views,
    result_rows,
    scatter_rows,
    stage_pixels,
)
from .stats import CallStats

_NOTHING = nullcontext()
_PIXELS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INPUTS = ({PIXELS, GRID}, {PIXELS, GRID, KEEP, KEEP_MASK})


class Executor:
    """Serves calls from the ladder published last. Static buffers serve one call at a time.

    Attributes:
        ladder: the captured graphs; None before the first is published.
        costs: what dispatch goes by.
        stats: counters of what was served.
        lock: held during a call, and to be held while the ladder is changed.
    """

    def __init__(self, encoder: SupportsEncoderCudaGraph, largest: RungLimits, *, nvtx: bool):
        self.ladder: CapturedLadder | None = None
        self.costs: Costs = AssumedCosts()
        self.stats = CallStats()
        self.lock = threading.RLock()
        self._encoder = encoder
        self._device_index = encoder.device.index
        self._on_cuda = encoder.device.type == "cuda"
        self._nvtx = nvtx
        self._input_specs = encoder.input_specs(largest)
        self._output_specs = encoder.output_specs(largest)
        self._stage = encoder.stage if isinstance(encoder, StagesInputs) else None
        self._varied = encoder if isinstance(encoder, RecordsVariants) else None
        known = PIXELS in self._input_specs if self._stage else self._input_specs.keys() in _INPUTS
        if not known:
            wanted = f"exactly {GRID} and {PIXELS}, or these with {KEEP} and {KEEP_MASK}"
            raise ValueError(
                f"EncoderCudaGraphManager: {type(encoder).__name__}.input_specs names "
                f"{sorted(self._input_specs)}; it must name "
                f"{PIXELS + ' beside what it stages' if self._stage else wanted}"
            )
        for name, spec in (*self._input_specs.items(), *self._output_specs.items()):
            if spec.shape[0] < limit_of(spec.rows, largest):
                raise ValueError(
                    f"EncoderCudaGraphManager: {type(encoder).__name__} gives {name} "
                    f"{list(spec.shape)} for up to {limit_of(spec.rows, largest)} {spec.rows}; "
                    "its leading axis must have a row for each of them"
                )
        self._names = tuple(self._output_specs)
        pixels = self._input_specs[PIXELS]
        self._pixel_row = pixels.shape[1:]
        # of calls that skip the checks; none where the encoder stages its inputs itself
        is_plain = self._stage is None and pixels.dtype.is_floating_point
        self._known_dtypes = _PIXELS if is_plain else ()
        self._kinds: set[Rows] = {"patches", "tokens"}
        self._kinds.update(spec.rows for spec in self._output_specs.values())
        self._planner: Planner | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self._last_handle: int | None = None
        self._copy_stream: torch.cuda.Stream | None = None

    def publish(self, ladder: CapturedLadder) -> CapturedLadder | None:
        """Serve calls from `ladder` from now on; the one that it replaces."""
        with self.lock:
            previous, self.ladder = self.ladder, ladder
            self._planner = Planner(self._encoder, ladder.limits, self.costs, self._kinds)
            if self._on_cuda:
                if self._last_stream is None:
                    self._last_stream = torch.cuda.current_stream(self._encoder.device)
                if self._copy_stream is None and len(ladder.ring.slots) > 1:
                    self._copy_stream = torch.cuda.Stream(self._encoder.device)
            return previous

    def use_costs(self, costs: Costs) -> None:
        """Dispatch by `costs` from now on."""
        with self.lock:
            self.costs = costs
            if self.ladder is not None:
                self._planner = Planner(self._encoder, self.ladder.limits, costs, self._kinds)

    def reset(self) -> None:
        """Forget the ladder, its leases and all counters."""
        with self.lock:
            if self.ladder is not None:
                self.ladder.ring.revoke_leases()
            self.ladder = self._planner = self._copy_stream = None
            self._last_stream = self._last_handle = None
            self.costs = AssumedCosts()
            self.stats = CallStats()

    def wait_for_replays(self) -> None:
        """Until the device has done what was enqueued before this call."""
        with self.lock:
            stream = self._last_stream
            event = None if stream is None else stream.record_event()
        if event is not None:
            event.synchronize()

    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        pruning: Pruning | None,
        out: Mapping[str, torch.Tensor] | None,
        names: Collection[str] | None,
    ) -> dict[str, torch.Tensor]:
        """See `EncoderCudaGraphManager.execute`."""
        with self.lock, self._context(pixel_values, out):
            self._begin("execute")
            grid, call = self._plan(pixel_values, grid_thw, pruning)
            results = self._results(call, pixel_values, grid, pruning, out, names)
            self.stats.count_call(call.offsets.total("tokens"))
            return results

    def lease(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        pruning: Pruning | None,
    ) -> Lease:
        """See `EncoderCudaGraphManager.lease`."""
        with self.lock, self._context(pixel_values):
            ladder = self._begin("lease")
            grid, call = self._plan(pixel_values, grid_thw, pruning)
            lease = self._leased(ladder, call, pixel_values, grid, pruning)
            self.stats.count_call(call.offsets.total("tokens"))
            return lease

    def run_on(
        self, rung: RungLimits | None, pixel_values: torch.Tensor, grid: Sequence[Grid]
    ) -> dict[str, torch.Tensor]:
        """Items on the rung given, or eagerly for None, whatever the costs, and not counted.

        For measurements: does what `execute` would.
        """
        with self.lock, self._context(pixel_values):
            self._begin("run_on")
            assert self._planner is not None
            grid = grid_rows(grid)
            call = self._planner.plan(grid, None, "measured")
            self._check(pixel_values, call)
            wanted = self._wanted(None, None)
            if rung is None:
                packed = self._eagerly(pixel_values, grid)
                return live_views(packed, self._output_specs, wanted, call.offsets)
            packed, slot = self._replay(rung, call.batches[0], call, pixel_values, grid, None)
            return copy_views(call.sources(slot, packed, self._output_specs))

    def _plan(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        pruning: Pruning | None,
    ) -> tuple[CheckedGrid, PlannedCall]:
        assert self._planner is not None
        grid = grid_rows(grid_thw)
        unpruned = pruning is not None and KEEP not in self._input_specs
        call = self._planner.plan(grid, pruning, "pruning" if unpruned else None)
        if pruning is not None:
            check_pruning(pruning, call.items)
        self._check(pixel_values, call)
        return grid, call

    def replay_known(
        self, pixel_values: torch.Tensor, grid: CheckedGrid
    ) -> dict[str, torch.Tensor] | None:
        """See `EncoderCudaGraphManager.replay_known`."""
        with self.lock:
            planner = self._planner
            call = None if planner is None else planner.known(grid)
            if (
                call is None
                or not call.is_replay
                or pixel_values.shape != (call.num_patches, *self._pixel_row)
                or pixel_values.dtype not in self._known_dtypes
                or not self._is_ordinary(pixel_values)
            ):
                return None
            packed, slot = self._run(call.batches[0], call, pixel_values, grid, None)
            assert slot is not None
            self.stats.count_call(call.offsets.total("tokens"))
            return copy_views(call.sources(slot, packed, self._output_specs))

    def _is_ordinary(self, pixel_values: torch.Tensor) -> bool:
        """Whether the call before was on this stream, and no context is needed."""
        if self._on_cuda:
            device = torch._C._cuda_getDevice()
            if device != self._device_index:
                return False
            if torch._C._cuda_getCurrentRawStream(device) != self._last_handle:
                return False
        return not (pixel_values.requires_grad and torch.is_grad_enabled())

    def _results(
        self,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: CheckedGrid,
        pruning: Pruning | None,
        out: Mapping[str, torch.Tensor] | None,
        names: Collection[str] | None,
    ) -> dict[str, torch.Tensor]:
        """Outputs of `call` that are the caller's own."""
        if pruning is not None and KEEP not in self._input_specs:
            return self._pruned_eagerly(call, pixel_values, grid, pruning, out, names)
        wanted = self._wanted(names, out)
        if out is not None:
            check_out(out, self._output_specs, call.offsets, self._encoder.device)
        if len(call.batches) == 1:
            packed, slot = self._run(call.batches[0], call, pixel_values, grid, pruning)
            if slot is not None:
                views = call.sources(slot, packed, self._output_specs)
                if wanted is not self._names:
                    views = {name: views[name] for name in wanted}
                return copy_views(views, out)
            views = live_views(packed, self._output_specs, wanted, call.offsets)
            # eager results belong to nobody else
            return views if out is None else copy_views(views, out)
        results = self._empty(wanted, call) if out is None else {n: out[n] for n in wanted}
        return self._scatter(results, call, pixel_values, grid, pruning)

    def _leased(
        self,
        ladder: CapturedLadder,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: CheckedGrid,
        pruning: Pruning | None,
    ) -> Lease:
        """Outputs of `call` where its replay has left them, if it is one."""
        if pruning is not None and KEEP not in self._input_specs:
            views = self._pruned_eagerly(call, pixel_values, grid, pruning, None, None)
            return Lease(None, views)
        if len(call.batches) == 1:
            packed, slot = self._run(call.batches[0], call, pixel_values, grid, pruning)
            # torch refuses writes to these that would hang gradients on all later calls
            with torch.no_grad():
                views = live_views(packed, self._output_specs, self._names, call.offsets)
            return Lease(None, views) if slot is None else ladder.ring.lease(slot, views)
        results = self._empty(self._names, call)
        return Lease(None, self._scatter(results, call, pixel_values, grid, pruning))

    def _check(self, pixel_values: torch.Tensor, call: PlannedCall) -> None:
        check_pixels(pixel_values, self._input_specs[PIXELS], call.offsets.total("patches"))

    def _run(
        self,
        batch: PlannedBatch,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        pruning: Pruning | None,
    ) -> tuple[Mapping[str, torch.Tensor], int | None]:
        """Outputs of `batch`, packed, and the slot that they lie in: None for eager results.

        Counters follow the launch of a replay, which does not wait for them.
        """
        if batch.rung is not None:
            outputs, index = self._replay(batch.rung, batch, call, pixel_values, grid, pruning)
            self.stats.count_replay(batch.rung, batch.load)
            return outputs, index
        outputs = run_marked(
            f"vitgraph.eager[{','.join(batch.reasons)}]",
            self._nvtx,
            lambda: self._eagerly(
                gather_pixels(pixel_values, call.offsets, batch.runs),
                batch.rows(grid),
                select_pruning(pruning, call.offsets, batch.runs),
            ),
        )
        self.stats.count_eager(batch.reasons)
        return outputs, None

    def _eagerly(
        self, pixel_values: torch.Tensor, grid: Sequence[Grid], pruning: Pruning | None = None
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return self._encoder.eager_forward(pixel_values, grid, pruning)

    def _replay(
        self,
        rung: RungLimits,
        batch: PlannedBatch,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        pruning: Pruning | None,
    ) -> tuple[Mapping[str, torch.Tensor], int]:
        """Stage `batch` and replay; the static outputs and the index of their slot."""
        ladder = self.ladder
        assert ladder is not None
        index = ladder.ring.next()
        slot = ladder.ring.slots[index]
        prepared = batch.prepared(
            ladder, rung, index, grid, call.offsets, self._varied, has_table=self._stage is None
        )
        prepared.graph.check_buffers()

        if self._copy_stream is None and not is_watched(self._nvtx):
            self._fill(slot, prepared, batch, call, pixel_values, grid, pruning)
            prepared.recording.replay()
        else:

            def stage() -> None:
                # pixels from the CPU are copied beside the replays
                stream = None if pixel_values.is_cuda else self._copy_stream
                with _NOTHING if stream is None else slot.staging_on(stream):
                    self._fill(slot, prepared, batch, call, pixel_values, grid, pruning)

            run_marked("vitgraph.stage", self._nvtx, stage)
            run_marked(prepared.name, self._nvtx, prepared.recording.replay)
        # from here on the device has something to do
        if self._copy_stream is not None:
            slot.mark_replayed()
        prepared.graph.check_addresses()
        return prepared.graph.outputs, index

    def _fill(
        self,
        slot: Slot,
        prepared: PreparedReplay,
        batch: PlannedBatch,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        pruning: Pruning | None,
    ) -> None:
        """Write the static inputs of `slot` for `batch`."""
        inputs, table = prepared.graph.inputs, prepared.table
        if self._stage is not None:
            for name, value in self._stage(batch.rows(grid), prepared.graph.limits).items():
                inputs[name].copy_(value, non_blocking=True)
        elif slot.table is not table:  # else it is there from the last call of this layout
            assert table is not None
            slot.table = None
            inputs[GRID].copy_(table, non_blocking=True)
            slot.table = table
        if KEEP in inputs:
            stage_pruning(inputs, pruning, call.offsets, batch.runs)
        stage_pixels(prepared.pixels, pixel_values)

    def _wanted(
        self, names: Collection[str] | None, out: Mapping[str, torch.Tensor] | None
    ) -> tuple[str, ...]:
        if names is None:
            if out is None:
                return self._names
            names = out
        unknown = sorted(set(names) - self._output_specs.keys())
        if unknown:
            raise ValueError(
                f"execute: no output is named {', '.join(unknown)}; the outputs are "
                f"{', '.join(self._output_specs)}"
            )
        if out is not None and set(names) != set(out):
            raise ValueError(
                f"execute: names={sorted(names)} but out has {sorted(out)}; pass one of them"
            )
        return tuple(name for name in self._output_specs if name in names)

    def _empty(self, names: Sequence[str], call: PlannedCall) -> dict[str, torch.Tensor]:
        shapes = result_rows(self._output_specs, names, call.offsets)
        return {
            name: torch.empty(
                shape, dtype=self._output_specs[name].dtype, device=self._encoder.device
            )
            for name, shape in shapes.items()
        }

    def _pruned_eagerly(
        self,
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        pruning: Pruning,
        out: Mapping[str, torch.Tensor] | None,
        names: Collection[str] | None,
    ) -> dict[str, torch.Tensor]:
        """A call with pruning on graphs that were recorded without it; outputs as if they had."""
        if out is not None or names is not None:
            raise ValueError(
                "execute: out and names serve pruned calls only if pruning is in the graphs; "
                "capture with pruning, or leave them out"
            )
        outputs: dict[str, torch.Tensor] = {}
        for batch in call.batches:
            packed, _ = self._run(batch, call, pixel_values, grid, pruning)
            outputs.update(packed)
        return outputs or self._eagerly(pixel_values, [], pruning)

    def _scatter(
        self,
        results: dict[str, torch.Tensor],
        call: PlannedCall,
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        pruning: Pruning | None,
    ) -> dict[str, torch.Tensor]:
        """Run all batches and put their rows into `results`."""
        for batch in call.batches:
            packed, _ = self._run(batch, call, pixel_values, grid, pruning)
            scatter_rows(results, packed, self._output_specs, call.offsets, batch.runs)
        return results

    def _begin(self, operation: str) -> CapturedLadder:
        """The ladder that serves a call, which is ordered after the previous call's stream."""
        if self.ladder is None:
            raise RuntimeError(f"{operation}: nothing is captured; call capture() first")
        if self._on_cuda:
            # asked for in every call: the handle costs less than the object
            handle = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
            if handle != self._last_handle:
                stream = torch.cuda.current_stream()
                if self._last_stream is not None and stream != self._last_stream:
                    stream.wait_stream(self._last_stream)
                self._last_stream, self._last_handle = stream, handle
        return self.ladder

    def _context(
        self, pixel_values: torch.Tensor, out: Mapping[str, torch.Tensor] | None = None
    ) -> AbstractContextManager[object]:
        """The encoder's device as the current one, without gradients where there could be any.

        Mostly nothing to do: what replays read and write has none, and the device waits meanwhile.
        """
        elsewhere = self._on_cuda and torch._C._cuda_getDevice() != self._device_index
        if not elsewhere and not (
            torch.is_grad_enabled()
            and (self._stage is not None or out is not None or pixel_values.requires_grad)
        ):
            return _NOTHING
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        if elsewhere:
            stack.enter_context(torch.cuda.device(self._encoder.device))
        return stack
