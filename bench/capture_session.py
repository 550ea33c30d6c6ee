"""What the sections of the capture benchmark share: a captured tower, its pixels, and clocks."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar

import torch

from ..capture import (
    AssumedCosts,
    CostSample,
    EncoderCudaGraphManager,
    EncoderItemSpec,
    Load,
    MeasuredCosts,
    Recorder,
    Recording,
    RungLimits,
)
from ..capture.captured import ONLY_VARIANT
from ..capture.packing import room_of, total_of, within
from ..encoder.vision_encoder import VisionEncoder
from .timing import Effort
from .workloads import Grid

Result = dict[str, Any]
_T = TypeVar("_T")

_MOST_ITEMS = 24


@dataclass
class Session:
    """A tower and the manager that all sections use.

    Attributes:
        encoder: the tower under test.
        manager: of the automatic ladder.
        effort: rounds of each measurement.
        layouts: how many random layouts dispatch is judged on.
        seed: of pixels and layouts.
        samples: what calibration measured; empty before.
        recorder: of all managers; None for CUDA graphs.
    """

    encoder: VisionEncoder
    manager: EncoderCudaGraphManager
    effort: Effort
    layouts: int
    seed: int
    samples: list[CostSample]
    recorder: Recorder | None = None
    _pixels: torch.Tensor | None = None

    def new_manager(self, config: Mapping[str, Any]) -> EncoderCudaGraphManager:
        """A manager of other rungs on the same tower, not captured."""
        return EncoderCudaGraphManager(self.encoder, config, recorder=self.recorder)

    def captured(self) -> EncoderCudaGraphManager:
        """The manager, captured if it is not."""
        if self.manager.ladder is None:
            self.manager.capture()
        return self.manager

    def calibrated(self) -> EncoderCudaGraphManager:
        """The manager, dispatching by measured costs."""
        manager = self.captured()
        if not isinstance(manager.costs, MeasuredCosts):
            manager.calibrate()
        return manager

    @contextmanager
    def replaying(self) -> Iterator[EncoderCudaGraphManager]:
        """The captured manager, replaying whatever a rung holds; its costs come back afterwards."""
        manager = self.captured()
        costs = manager.costs
        manager.use_costs(AssumedCosts())
        try:
            yield manager
        finally:
            manager.use_costs(costs)

    def recording(self, rung: RungLimits) -> Recording:
        """The graph of `rung`."""
        ladder = self.captured().ladder
        assert ladder is not None
        return ladder.rungs[rung].graphs[0].recordings[ONLY_VARIANT]

    def run_on(self, rung: RungLimits | None, grid: Sequence[Grid]) -> dict[str, torch.Tensor]:
        """`grid` on this rung, or eagerly for None."""
        return self.manager.run_on(rung, self.pixels(grid), list(grid))

    def pixels(self, grid: Sequence[Grid]) -> torch.Tensor:
        """Unit-normal rows for `grid` on the GPU: the leading rows of one tensor."""
        rows = sum(t * h * w for t, h, w in grid)
        if self._pixels is None or len(self._pixels) < rows:
            largest = self.manager.rungs[-1]
            generator = torch.Generator(self.encoder.device).manual_seed(self.seed)
            self._pixels = torch.randn(
                max(rows, largest.max_patches),
                self.encoder.spec.patch_values,
                device=self.encoder.device,
                generator=generator,
            ).to(self.encoder.dtype)
        return self._pixels[:rows]

    def squares(self, count: int, side: int = 448) -> list[Grid]:
        """`count` images of `side` x `side` pixels."""
        patches = side // self.encoder.spec.patch_size
        return [(1, patches, patches)] * count

    def tokens(self, grid: Sequence[Grid]) -> int:
        """Tokens of all items."""
        return sum(item.output_tokens for item in self.encoder.item_specs(grid))


def random_layouts(count: int, seed: int, *, merge: int, largest: int) -> list[list[Grid]]:
    """Calls of 1 to 24 images and videos, log-uniform from 16 tokens to 1.2 times `largest`.

    Args:
        count: how many calls; the last one exceeds `largest`.
        seed: of the draws.
        merge: side of a token in patches.
        largest: tokens of the largest rung.
    """
    rng = random.Random(seed)
    layouts = []
    for number in range(count):
        most = 1.2 * largest
        total = most if number == count - 1 else math.exp(rng.uniform(math.log(16), math.log(most)))
        items = min(round(math.exp(rng.uniform(0, math.log(_MOST_ITEMS)))), max(1, int(total) // 4))
        shares = [rng.uniform(0.2, 1) for _ in range(items)]
        layouts.append([_item(rng, total * share / sum(shares), merge) for share in shares])
    return layouts


def _item(rng: random.Random, tokens: float, merge: int) -> Grid:
    """An image or, one time in four, a video of at most about `tokens` tokens."""
    frames = rng.choice((1, 1, 1, 1, 1, 1, 2, 4)) if tokens >= 16 else 1
    area = max(1, int(tokens / frames))
    height = max(1, min(area, round(isqrt(area) * rng.uniform(0.6, 1.6))))
    return frames, merge * height, merge * max(1, area // height)


def holding(manager: EncoderCudaGraphManager, items: Sequence[EncoderItemSpec]) -> list[RungLimits]:
    """Rungs that hold all `items` at once, ascending."""
    load = total_of([Load.of(item) for item in items])
    return [rung for rung in manager.rungs if within(load, room_of(rung))]


def free_bytes() -> int:
    """Free memory of the device, as its driver counts it, once nothing is cached."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def timed(work: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds of `work` until the device is done, and what it returned."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result
