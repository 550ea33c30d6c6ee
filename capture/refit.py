"""Changing the ladder while it serves calls: fitting it to traffic, and evicting rungs."""

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext

import torch

from .captured import CapturedLadder, capture_ladder, extend_ladder, fits_buffers
from .config import EncoderCudaGraphConfig
from .cost import Load
from .executor import Executor
from .graph import CudaGraphRecorder, paused_gc
from .ladder import MemoryModel, fit_budgets, least_useful
from .protocol import RungLimits, SupportsEncoderCudaGraph

logger = logging.getLogger("vitgraph")


class Refitter:
    """Builds ladders aside and has the executor publish them.

    Attributes:
        completed: ladders published by `refit`.
    """

    def __init__(
        self,
        encoder: SupportsEncoderCudaGraph,
        config: EncoderCudaGraphConfig,
        largest: RungLimits,
        executor: Executor,
    ):
        self.completed = 0
        self._encoder = encoder
        self._config = config
        self._largest = largest
        self._executor = executor
        self._running: Future[tuple[int, ...]] | None = None

    def refit(
        self,
        histogram: Mapping[int, float] | None,
        max_bytes: int | None,
        max_rungs: int | None,
        background: bool,
    ) -> "Future[tuple[int, ...]]":
        """See `EncoderCudaGraphManager.refit`."""
        ladder = self._idle_ladder("refit")
        if max_bytes is None:
            max_bytes = self._config.max_bytes
        budgets = fit_budgets(
            self._traffic("refit", histogram),
            max_budget=self._largest.token_budget,
            max_rungs=len(ladder.limits) if max_rungs is None else max_rungs,
            max_bytes=max_bytes,
            memory=memory_model(ladder),
            cost=self._replay_cost,
            eager_cost=self._eager_cost,
        )
        rungs = self._config.rungs_for(self._encoder, budgets)
        future: Future[tuple[int, ...]] = Future()
        with self._executor.lock:  # another thread may have begun meanwhile
            if self._idle_ladder("refit") is not ladder:
                raise RuntimeError("refit: the ladder was replaced meanwhile; call refit again")
            self._running = future

        def work() -> None:
            try:
                self._replace(ladder, rungs)
            except BaseException as error:
                logger.warning("refit failed, the old ladder stays", exc_info=error)
                # its frames hold the buffers of the ladder that failed
                future.set_exception(error.with_traceback(None))
            else:
                self.completed += 1
                future.set_result(budgets)

        if background:
            threading.Thread(target=work, name="vitgraph-refit", daemon=True).start()
        else:
            work()
        return future

    def evict(self, token_budget: int | None) -> int:
        """See `EncoderCudaGraphManager.evict`."""
        with self._executor.lock:
            ladder = self._idle_ladder("evict")
            budgets = [limits.token_budget for limits in ladder.limits]
            if len(budgets) == 1:
                raise RuntimeError(
                    f"evict: the rung of {budgets[0]} tokens is the only one; call clear() to drop "
                    "everything"
                )
            if token_budget is None:
                token_budget = least_useful(
                    self._traffic("evict", None), budgets, self._replay_cost, self._eager_cost
                )
            elif token_budget not in budgets:
                raise ValueError(
                    f"evict: there is no rung of {token_budget} tokens; the rungs are {budgets}"
                )
            left = [limits for limits in ladder.limits if limits.token_budget != token_budget]
            self._publish(extend_ladder(self._encoder, ladder, left))
        return token_budget

    def wait(self) -> None:
        """Until no refit is running."""
        if self._running is not None:
            self._running.exception()
            self._running = None

    def _replace(self, ladder: CapturedLadder, rungs: tuple[RungLimits, ...]) -> None:
        device = self._encoder.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        # A collection takes time that calls would wait for; keeping it off is enough.
        with on_device, torch.inference_mode(), paused_gc(collect=False):
            if fits_buffers(self._encoder, ladder, rungs[-1]):
                fresh = extend_ladder(self._encoder, ladder, rungs)
            else:
                recorder = ladder.recorder
                if isinstance(recorder, CudaGraphRecorder):
                    recorder = CudaGraphRecorder(device)
                fresh = capture_ladder(
                    self._encoder,
                    rungs,
                    recorder=recorder,
                    pool=recorder.new_pool(),
                    num_slots=len(ladder.ring.slots),
                    generation=ladder.generation + 1,
                )
            self._publish(fresh)

    def _publish(self, ladder: CapturedLadder) -> None:
        """Publish, and return when no replay of what it replaces can be running."""
        previous = self._executor.publish(ladder)
        if previous is not None and self._encoder.device.type == "cuda":
            self._executor.wait_for_replays()

    def _idle_ladder(self, operation: str) -> CapturedLadder:
        if self._executor.ladder is None:
            raise RuntimeError(f"{operation}: nothing is captured; call capture() first")
        if self._running is not None and not self._running.done():
            raise RuntimeError(
                f"{operation}: a refit is running; wait for the future that refit() returned"
            )
        return self._executor.ladder

    def _traffic(
        self, operation: str, histogram: Mapping[int, float] | None
    ) -> Mapping[int, float]:
        if histogram is not None:
            return histogram
        with self._executor.lock:
            seen = {tokens: n for tokens, n in self._executor.stats.histogram.items() if tokens}
        if not seen:
            raise ValueError(
                f"{operation}: no call was served since capture, so there is no traffic to go by; "
                "pass a histogram, or call again later"
            )
        return seen

    def _replay_cost(self, tokens: int) -> float:
        (rung,) = self._config.rungs_for(self._encoder, (tokens,))
        return self._executor.costs.replay(rung, _load(tokens, rung))

    def _eager_cost(self, tokens: int) -> float:
        (rung,) = self._config.rungs_for(self._encoder, (tokens,))
        return self._executor.costs.eager(_load(tokens, rung))


def memory_model(ladder: CapturedLadder) -> MemoryModel:
    """What rungs take, judged by those of `ladder`."""
    *others, largest = (rung.bytes for rung in ladder.rungs.values())
    graph = sum(others) / len(others) if others else 0.0
    budget = ladder.limits[-1].token_budget
    return MemoryModel(max(0.0, largest - graph) / budget, graph)


def _load(tokens: int, rung: RungLimits) -> Load:
    """A call of `tokens` tokens without regard to attention, which no rung changes."""
    return Load(tokens, rung.max_patches, 1, 1, 0, 0)
