"""How the benchmarks take time.

Whole calls are timed from synchronise to synchronise on the host clock, as a caller sees them.
Kernels are timed by replaying a CUDA graph of many calls between two events: a launch from Python
costs more than most kernels do. Contenders take turns, so that a change of clocks meets them all,
in orders in which each follows each other about equally often: what ran before shows.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from ..capture.graph import Recording


@dataclass(frozen=True)
class Timing:
    """Median and spread of repeated measurements, in ms."""

    ms: float
    p20: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        warmup_s: Seconds each contender runs before anything is counted.
        rounds: Measurements wanted of each contender.
        min_rounds: Measurements taken of each even if time is up.
        limit_s: Seconds after which no further round starts.
    """

    warmup_s: float = 0.3
    rounds: int = 20
    min_rounds: int = 5
    limit_s: float = 20.0


# fourteen rounds are the whole design of seven contenders
QUICK = Effort(warmup_s=0.05, rounds=14, min_rounds=3, limit_s=16.0)


class TimeBudget:
    """Seconds after which nothing new is started; what was left out is known.

    Attributes:
        seconds: From construction on; None for no limit.
        skipped: Labels that were refused, in order.
    """

    def __init__(self, seconds: float | None = None):
        """Start the clock.

        Raises:
            ValueError: `seconds` is not positive.
        """
        if seconds is not None and not seconds > 0:
            raise ValueError(f"bench: --budget-s {seconds:g} must be more than 0 seconds")
        self.seconds = seconds
        self.skipped: list[str] = []
        self._start = time.perf_counter()

    def allows(self, label: str) -> bool:
        """Whether `label` may start now; a refused one is noted."""
        if self.seconds is None or time.perf_counter() - self._start < self.seconds:
            return True
        self.skipped.append(label)
        return False

    def to_json(self) -> dict[str, Any]:
        """What the conditions of a result say of it."""
        return {"budget_s": self.seconds, "not_run": self.skipped}

    def note(self) -> str:
        """One line on what was left out; empty if nothing was."""
        if not self.skipped:
            return ""
        return f"time was over after {self.seconds:g} s; not run: {', '.join(self.skipped)}"


def summarise(samples: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile of `samples` (ms).

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("summarise: there is no sample to summarise")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    fifths = quantiles(samples, n=5, method="inclusive")
    return Timing(median(samples), fifths[0], fifths[3], len(samples))


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], None],
    effort: Effort = Effort(),
) -> dict[str, Timing]:
    """Time whole calls, taking turns; each measurement starts and ends with `synchronize`."""

    def once(call: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return (time.perf_counter() - start) * 1e3

    return _take_turns({name: lambda c=call: once(c) for name, call in calls.items()}, effort)


def time_graphs(
    graphs: Mapping[str, tuple[Recording, int]],
    effort: Effort = Effort(),
) -> dict[str, Timing]:
    """Time one call inside each graph; a graph comes with the number of calls it holds."""

    def once(graph: Recording, num_calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / num_calls

    return _take_turns({name: lambda g=g: once(*g) for name, g in graphs.items()}, effort)


def _take_turns(measure: Mapping[str, Callable[[], float]], effort: Effort) -> dict[str, Timing]:
    for once in measure.values():
        end = time.perf_counter() + effort.warmup_s
        once()
        while time.perf_counter() < end:
            once()
    samples: dict[str, list[float]] = {name: [] for name in measure}
    end = time.perf_counter() + effort.limit_s
    for turn, order in enumerate(_orders(list(measure), effort.rounds)):
        if turn >= effort.min_rounds and time.perf_counter() > end:
            break
        for name in order:
            samples[name].append(measure[name]())
    return {name: summarise(taken) for name, taken in samples.items()}


def _orders(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round; the same every time.

    What ran before shows: in caches for a short call, in clocks for one at the power limit. In
    len(names) rounds, twice as many if that is odd, each name follows each other one equally often
    within a round (https://doi.org/10.1071/CH9490149).
    """
    count = len(names)
    if not count:
        return []
    # 0, 1, -1, 2, -2, ..: neighbours differ by each number once
    steps = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    square = [[(step + shift) % count for step in steps] for shift in range(count)]
    if count % 2:
        square += [row[::-1] for row in square]
    random.Random(0).shuffle(square)
    return [[names[i] for i in square[turn % len(square)]] for turn in range(rounds)]


def record(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture `work` in a CUDA graph after two runs that compile and allocate; with its result.

    The result lives in the graph's memory: each replay overwrites it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps a workspace for each stream. The graph has to own the one that it addresses: one
    # that an earlier graph left is freed with that graph, or when another capture clears them.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        result = work()
    torch._C._cuda_clearCublasWorkspaces()
    return graph, result


def record_each(works: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """One graph of all `works` in a row, in the form that `time_graphs` takes."""

    def all_of_them() -> None:
        for work in works:
            work()

    return record(all_of_them)[0], len(works)
