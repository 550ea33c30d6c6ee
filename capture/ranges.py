"""Named ranges on the timelines of torch.profiler and Nsight, free where nobody looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch.autograd import profiler

_NOTHING = nullcontext()

Result = TypeVar("Result")


def is_watched(nvtx: bool) -> bool:
    """Whether `run_marked` would mark anything."""
    return nvtx or profiler._is_profiler_enabled


def run_marked(name: str, nvtx: bool, work: Callable[[], Result]) -> Result:
    """What `work` returns, run in a range `name` if anybody looks.

    Args:
        name: as it will be shown.
        nvtx: mark an NVTX range too, where there is a CUDA device.
        work: run once.
    """
    # Not record_function alone: it costs microseconds even if nobody records.
    recorded = profiler._is_profiler_enabled
    if not recorded and not nvtx:
        return work()
    shown = _nvtx_range(name) if nvtx and torch.cuda.is_available() else _NOTHING
    with shown, profiler.record_function(name) if recorded else _NOTHING:
        return work()


@contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
