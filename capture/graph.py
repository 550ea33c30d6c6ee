"""One recorded rung, and how it is recorded.

`Recorder` is the seam between bookkeeping and CUDA: everything else works with any recorder, and
only `CudaGraphRecorder` touches streams and graphs.
"""

import gc
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .protocol import RungLimits

# torch.cuda.graph_pool_handle() is opaque.
GraphPool = Any


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Enqueue the work on the current stream."""
        ...


class Recorder(Protocol):
    """Turns work into a recording whose replays repeat it on the same memory."""

    def new_pool(self) -> GraphPool:
        """Memory to be shared by recordings that never run at the same time."""
        ...

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` once outside any recording, so that its kernels are compiled and loaded."""
        ...

    def record(self, work: Callable[[], None], pool: GraphPool) -> Recording:
        """Record `work`, which has been warmed up, without running it."""
        ...


class CudaGraphRecorder:
    """Records CUDA graphs on one side stream of `device`.

    Other threads may go on launching and replaying while this one warms up or records: nothing here
    synchronises the device, empties a cache or runs on another stream.
    """

    def __init__(self, device: torch.device):
        # One stream: memory in a pool is only reused on the stream that it was allocated on.
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def new_pool(self) -> GraphPool:
        """A private memory pool for graphs."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` on the side stream, after what the current stream has been given."""
        with self._side_stream():
            work()

    def record(self, work: Callable[[], None], pool: GraphPool) -> torch.cuda.CUDAGraph:
        """Capture `work` as a CUDA graph whose intermediates live in `pool`."""
        graph = torch.cuda.CUDAGraph()
        with self._side_stream():
            # cuBLAS keeps a workspace for each stream, outside the pool, and others may free it
            # (Inductor does). Without one, the capture allocates its own in the pool.
            torch._C._cuda_clearCublasWorkspaces()
            # torch.cuda.graph would synchronise the device and empty the cache for every rung.
            # thread_local: calls of other threads do not break this capture.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, pool)
                raise
            finally:
                # the one in the pool is for this graph alone
                torch._C._cuda_clearCublasWorkspaces()
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: GraphPool) -> None:
        """Take the stream, the allocator and the generator out of a capture that failed.

        Where ending it raises, some releases of PyTorch (2.11 among them) leave the rest undone:
        the allocator, still recording to the pool, never again gives freed memory back to the
        device, and the generator may refuse to draw numbers. Others have ended the recording, and
        refuse to do so twice. What the failed capture took of the pool stays there until
        https://github.com/pytorch/pytorch/pull/190348.
        """
        try:
            graph.capture_end()
        except RuntimeError:  # the work's own error says what went wrong; nothing here may hide it
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
            with suppress(RuntimeError):
                # the same numbers follow, from a state that is in no capture
                generator = torch.cuda.default_generators[self._stream.device_index]
                generator.graphsafe_set_state(generator.clone_state())

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@dataclass(frozen=True)
class BudgetGraphMetadata:
    """A recorded rung and every buffer that its graphs address.

    Attributes:
        limits: what the rung holds.
        recordings: its graphs by variant, one or more.
        inputs, outputs: their static buffers, leading slices of the largest rung's.
        addresses: where those buffers were when the graphs were recorded.
    """

    limits: RungLimits
    recordings: Mapping[str, Recording]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    addresses: tuple[int, ...] = field(init=False)
    _recorded: tuple[torch.Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_recorded", self._buffers())
        object.__setattr__(self, "addresses", self._addresses())

    def check_buffers(self) -> None:
        """Raise RuntimeError if a static buffer was exchanged; the graph would use the old one."""
        buffers, recorded = self._buffers(), self._recorded
        if len(buffers) != len(recorded) or not all(map(operator.is_, buffers, recorded)):
            raise self._rebound()

    def check_addresses(self) -> None:
        """Raise RuntimeError if the memory of a static buffer has moved.

        That takes more than to put another tensor in its place, and reading addresses takes longer
        than a call should wait for: this is checked behind a replay, `check_buffers` before it.
        """
        if self._addresses() != self.addresses:
            raise self._rebound()

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        return (*self.inputs.values(), *self.outputs.values())

    def _addresses(self) -> tuple[int, ...]:
        return tuple([buffer.data_ptr() for buffer in self._buffers()])

    def _rebound(self) -> RuntimeError:
        return RuntimeError(
            f"execute: a static buffer of the rung of {self.limits.token_budget} tokens was "
            "rebound after capture, so its graph addresses other memory; call capture() again"
        )


@contextmanager
def paused_gc(*, collect: bool = True) -> Iterator[None]:
    """Collect once, then keep the collector off: a collection may free CUDA memory mid-capture."""
    enabled = gc.isenabled()
    if collect:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
