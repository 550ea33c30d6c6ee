"""Capture of a ladder of rungs, and everything a caller does with it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .calibration import calibrate, load_costs, store_costs
from .captured import CapturedLadder, capture_ladder, variants_of
from .config import EncoderCudaGraphConfig
from .cost import Costs, MeasuredCosts
from .executor import Executor
from .graph import CudaGraphRecorder, GraphPool, Recorder, paused_gc
from .memory import MemoryProfile, cap_rungs, profile_capture
from .protocol import Pruning, RungLimits, SupportsEncoderCudaGraph
from .refit import Refitter
from .slots import Lease
from .staging import CheckedGrid, Grid


class EncoderCudaGraphManager:
    """Captures an encoder's forward once per rung and replays it for any mix of items.

    Calls from several threads take turns. All of them enqueue their work on the caller's current
    stream and do not wait for the device.

    Args:
        encoder: what to capture.
        config: which rungs; a dataclass, mapping, JSON string or None for the automatic ladder.
        recorder: how a rung is recorded; None for CUDA graphs on the encoder's device.

    Attributes:
        config: the configuration.
    """

    def __init__(
        self,
        encoder: SupportsEncoderCudaGraph,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        recorder: Recorder | None = None,
    ):
        self.config = EncoderCudaGraphConfig.from_any(config)
        self._encoder = encoder
        self._configured = self.config.resolve(encoder)
        self._recorder = recorder
        self._executor = Executor(encoder, self._configured[-1], nvtx=self.config.nvtx)
        self._refitter = Refitter(encoder, self.config, self._configured[-1], self._executor)

    @property
    def rungs(self) -> tuple[RungLimits, ...]:
        """Limits of the captured rungs, ascending; before capture, of those configured."""
        return self._configured if self.ladder is None else self.ladder.limits

    @property
    def ladder(self) -> CapturedLadder | None:
        """The captured graphs; None before capture."""
        return self._executor.ladder

    @property
    def graph_pool(self) -> GraphPool | None:
        """The memory pool of the graphs; None when nothing is captured."""
        return None if self.ladder is None else self.ladder.pool

    @property
    def costs(self) -> Costs:
        """What dispatch goes by: measured if calibrated, else assumed."""
        return self._executor.costs

    def get_num_graphs_to_capture(self) -> int:
        """Graphs that `capture` records: one for each variant of each rung, and slot."""
        variants = (variants_of(self._encoder, rung) for rung in self._configured)
        return sum(map(len, variants)) * self.config.num_slots

    def profile_memory(self) -> MemoryProfile:
        """Device memory that `capture` will take, found by capturing a few rungs and dropping them.

        Raises:
            RuntimeError: no CUDA device, or graphs are captured already.
        """
        recorder = self._new_recorder("profile_memory")
        if self.ladder is not None:
            raise RuntimeError(
                "profile_memory: graphs are captured already, their bytes are in stats(); call "
                "clear() first to profile another capture"
            )
        with self._capturing():
            return profile_capture(
                self._encoder, self._configured, recorder=recorder, num_slots=self.config.num_slots
            )

    def capture(self, graph_pool: GraphPool | None = None, show_progress: bool = False) -> None:
        """Allocate the static buffers and record every rung, the largest first.

        Graphs captured earlier are dropped first. If a rung fails, nothing is captured and its
        error is raised with a note that names the rung. With `max_bytes` in the configuration the
        largest rungs are left out until the others fit; with `calibrate` costs are measured too.

        Args:
            graph_pool: pool from `torch.cuda.graph_pool_handle()`, to share with graphs that never
                run at the same time as these; None for a new one.
            show_progress: draw a progress bar on stderr.

        Raises:
            RuntimeError: the encoder is not on a CUDA device (and no recorder was given).
            ValueError: no rung fits into `max_bytes`.
        """
        recorder = self._new_recorder("capture")
        self.clear()
        rungs, num_slots = self._configured, self.config.num_slots
        with self._capturing():
            if self.config.max_bytes is not None:
                profile = profile_capture(
                    self._encoder, rungs, recorder=recorder, num_slots=num_slots
                )
                rungs = cap_rungs(rungs, profile, self.config.max_bytes)
            ladder = capture_ladder(
                self._encoder,
                rungs,
                recorder=recorder,
                pool=recorder.new_pool() if graph_pool is None else graph_pool,
                num_slots=num_slots,
                show_progress=show_progress,
            )
            self._executor.publish(ladder)
        if self.config.calibrate:
            self.calibrate(show_progress=show_progress)

    def clear(self) -> None:
        """Drop all graphs, static buffers, leases and counters, after the device is done with them.

        Memory goes back to the device, except what the caller's pool or tensors still hold.
        """
        self._refitter.wait()
        with self._executor.lock:
            if self._executor.ladder is None:
                return
            if self._encoder.device.type == "cuda":
                torch.cuda.synchronize(self._encoder.device)
            self._executor.reset()
            self._refitter.completed = 0
            if self._encoder.device.type == "cuda":
                torch.cuda.empty_cache()

    def calibrate(self, *, use_cache: bool = True, show_progress: bool = False) -> MeasuredCosts:
        """Measure rungs and eager calls, so that each call takes the way that costs least.

        The curve is kept in a file for this GPU, these versions, this encoder and ladder, and read
        back the next time. Calls of other threads wait meanwhile.

        Args:
            use_cache: read the file if there is one; False measures again and overwrites it.
            show_progress: draw a progress bar on stderr.

        Raises:
            RuntimeError: nothing is captured.
            ValueError: the file is damaged.
        """
        if self.ladder is None:
            raise RuntimeError("calibrate: nothing is captured; call capture() first")
        self._refitter.wait()
        costs = load_costs(self._encoder, self.rungs) if use_cache else None
        if costs is None:
            with self._executor.lock:
                samples = calibrate(
                    self._encoder, self.rungs, self._executor.run_on, show_progress=show_progress
                )
            costs = store_costs(self._encoder, self.rungs, samples)
        self._executor.use_costs(costs)
        return costs

    def use_costs(self, costs: Costs) -> None:
        """Dispatch by `costs` from now on: of an earlier calibration, or `AssumedCosts()`."""
        self._executor.use_costs(costs)

    def refit(
        self,
        histogram: Mapping[int, float] | None = None,
        *,
        max_bytes: int | None = None,
        max_rungs: int | None = None,
        background: bool = True,
    ) -> "Future[tuple[int, ...]]":
        """Fit the ladder to traffic and replace it while calls go on.

        New rungs are captured by another thread on a stream of its own; the new ladder is published
        at once, and rungs that it lacks are freed when the device is done with them. Until the
        future is done no thread may synchronise the whole device or draw random numbers on it
        (CUDA refuses both beside a capture); synchronising streams is fine.

        Args:
            histogram: tokens of a call -> how often; None for the calls seen since capture.
            max_bytes: cap on the memory of the graphs; None for that of the configuration.
            max_rungs: cap on the number of rungs; None for as many as there are now.
            background: False does it before this returns.

        Returns:
            A future of the new token budgets, or of the error of a capture that failed, in which
            case the old ladder stays.

        Raises:
            RuntimeError: nothing is captured, or a refit is running.
            ValueError: an empty histogram, or a cap that no rung meets.
        """
        return self._refitter.refit(histogram, max_bytes, max_rungs, background)

    def evict(self, token_budget: int | None = None) -> int:
        """Drop one rung and free its graphs; the budget that was dropped.

        Args:
            token_budget: which; None for the one that the calls seen so far miss least.

        Raises:
            RuntimeError: nothing is captured, only one rung is left, or a refit is running.
            ValueError: there is no such rung, or no call to judge by.
        """
        return self._refitter.evict(token_budget)

    def execute(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        pruning: Pruning | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        names: Collection[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode items, by replays or eagerly, whichever is expected to take least time.

        Everything is enqueued on the current stream, without waiting for the device. Pinned
        `pixel_values` are read by the device: do not overwrite them before it is done.

        Args:
            pixel_values: [T, width], on the encoder's device or the CPU, any floating-point dtype.
            grid_thw: [N, 3] sizes in patches; a tensor on the GPU costs a synchronisation.
            pruning: which tokens to keep; None for all.
            out: tensors to write instead of new ones; only the outputs that it names are copied.
            names: the outputs wanted; None for all, or those of `out`.

        Returns:
            The encoder's outputs by name, rows in the order of the items, owned by the caller.

        Raises:
            RuntimeError: nothing is captured, or a static buffer has moved since.
            TypeError: integer pixels, a grid that is not of integers, or `out` of another dtype.
            ValueError: shapes that do not belong together, a grid that the encoder refuses, or an
                output that does not exist.
        """
        return self._executor.execute(pixel_values, grid_thw, pruning, out, names)

    def replay_known(
        self, pixel_values: torch.Tensor, grid: CheckedGrid
    ) -> dict[str, torch.Tensor] | None:
        """`execute`, where next to nothing has to be found out before a replay, else None.

        Serves a grid that was planned before, as one replay, with pixels that fit it, on the stream
        of the call before. The device waits for what stands in front of a replay.

        Raises:
            RuntimeError: a static buffer has moved since the capture.
        """
        return self._executor.replay_known(pixel_values, grid)

    def lease(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        pruning: Pruning | None = None,
    ) -> Lease:
        """`execute` without copying the results out: they lie in a slot until that is taken again.

        With `num_slots` = n a lease outlives the next n - 1 calls, and while one is held, the next
        batch from CPU memory is staged during the present replay.

        Raises:
            As `execute`; reading a lease whose slot was taken again raises RuntimeError.
        """
        return self._executor.lease(pixel_values, grid_thw, pruning)

    def run_on(
        self, rung: RungLimits | None, pixel_values: torch.Tensor, grid: Sequence[Grid]
    ) -> dict[str, torch.Tensor]:
        """Items on one of `rungs`, or eagerly for None, whatever the costs; not counted.

        For measurements and tests: does what `execute` would, of items that the rung holds.
        """
        return self._executor.run_on(rung, pixel_values, grid)

    def stats(self) -> dict[str, Any]:
        """Counters since the capture, and what the graphs took.

        `items`, `hits` (replayed), `misses` (eager), `eager_reasons` (reason: items), `replays`;
        rows of the replays, `live_tokens`, `padded_tokens`, `live_patches`, `padded_patches`;
        `histogram` (tokens of a call: calls); `capture_seconds`, `bytes`, `ladder_generation`,
        `refits`; and by rung `rungs`: `token_budget`, `replays`, `items`, `live_tokens`, `bytes`,
        `capture_seconds`.
        """
        with self._executor.lock:
            counters = self._executor.stats
            report = counters.report()
            captured = {} if self.ladder is None else self.ladder.rungs
            report["capture_seconds"] = sum(rung.capture_seconds for rung in captured.values())
            report["bytes"] = sum(rung.bytes for rung in captured.values())
            report["ladder_generation"] = 0 if self.ladder is None else self.ladder.generation
            report["refits"] = self._refitter.completed
            report["rungs"] = [
                {
                    "token_budget": limits.token_budget,
                    **counters.of_rung(limits.token_budget),
                    "bytes": rung.bytes,
                    "capture_seconds": rung.capture_seconds,
                }
                for limits, rung in captured.items()
            ]
            return report

    def _new_recorder(self, operation: str) -> Recorder:
        if self._recorder is not None:
            return self._recorder
        device = self._encoder.device
        if device.type != "cuda":
            raise RuntimeError(
                f"{operation}: the encoder is on {device}, and CUDA graphs need a CUDA device; "
                "move the encoder there, or call it without capture"
            )
        return CudaGraphRecorder(device)

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Alone, on the encoder's device, with garbage collection and gradients off."""
        device = self._encoder.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._executor.lock, on_device, torch.inference_mode(), paused_gc():
            yield
