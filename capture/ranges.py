"""Named ranges on the timelines of torch.profiler and Nsight, free where nobody looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import profiler

_NOTHING = nullcontext()


def span(name: str, nvtx: bool) -> AbstractContextManager[object]:
    """A context manager that marks its block as `name`.

    Args:
        name: as it will be shown.
        nvtx: mark an NVTX range too, where there is a CUDA device.

    Returns:
        A `record_function` while a profiler is active, else one that does nothing.
    """
    # Not record_function alone: it costs microseconds even if nobody records.
    recorded = profiler._is_profiler_enabled
    if nvtx and torch.cuda.is_available():
        return _nvtx_range(name, recorded)
    return profiler.record_function(name) if recorded else _NOTHING


@contextmanager
def _nvtx_range(name: str, recorded: bool) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        with profiler.record_function(name) if recorded else _NOTHING:
            yield
    finally:
        torch.cuda.nvtx.range_pop()
