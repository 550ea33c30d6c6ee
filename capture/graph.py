"""One recorded rung, and how it is recorded.

`Recorder` is the seam between bookkeeping and CUDA: the manager works with any recorder, and only
`CudaGraphRecorder` touches streams and graphs.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Protocol

import torch

from .packing import fits
from .protocol import RungLimits, SupportsEncoderCudaGraph
from .staging import Grid

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

    def record(self, work: Callable[[], None], pool: GraphPool) -> Recording:
        """Run `work` once to warm it up, then record it."""
        ...


class CudaGraphRecorder:
    """Records CUDA graphs on one side stream of `device`."""

    def __init__(self, device: torch.device):
        # Warm-up and capture share one stream: a pool belongs to the stream it was filled on.
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def new_pool(self) -> GraphPool:
        """A private memory pool for graphs."""
        return torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None], pool: GraphPool) -> torch.cuda.CUDAGraph:
        """Capture `work` as a CUDA graph after one warm-up run that compiles its kernels."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # The outer stream context outlives a capture that fails half-way: torch.cuda.graph leaves
        # its stream current when ending such a capture raises.
        try:
            with torch.cuda.stream(self._stream):
                work()
                # cuBLAS keeps a workspace a stream, outside the pool, and others may free it
                # (Inductor does). Without one, the capture allocates its own in the pool.
                torch._C._cuda_clearCublasWorkspaces()
                # thread_local: allocations by other threads do not break this capture.
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    work()
        finally:
            # the one in the pool is for this graph alone
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph


@dataclass(frozen=True)
class BudgetGraphMetadata:
    """A recorded rung and every buffer that its graph addresses.

    Attributes:
        limits: what the rung holds.
        recording: the graph.
        inputs, outputs: its static buffers, leading slices of the largest rung's.
        addresses: where those buffers were when the graph was recorded.
    """

    limits: RungLimits
    recording: Recording
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    addresses: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "addresses", self._current_addresses())

    def check_addresses(self) -> None:
        """Raise RuntimeError if a static buffer has moved: the graph would use freed memory."""
        if self._current_addresses() != self.addresses:
            raise RuntimeError(
                f"execute: a static buffer of the rung of {self.limits.token_budget} tokens was "
                "rebound after capture, so its graph addresses other memory; call capture() again"
            )

    def _current_addresses(self) -> tuple[int, ...]:
        buffers = (*self.inputs.values(), *self.outputs.values())
        return tuple([buffer.data_ptr() for buffer in buffers])


def full_item(encoder: SupportsEncoderCudaGraph, limits: RungLimits) -> Grid:
    """(t, h, w) of one image that fills the rung as far as the encoder allows, squarest first.

    One segment is the worst case for attention, whose cost grows with the square of its length.

    Raises:
        ValueError: the rung holds no image at all.
    """
    budget = limits.token_budget
    # The side of a token in patches; max_patches may have been rounded up, so smaller ones follow.
    for side in range(isqrt(limits.max_patches // budget), 0, -1):
        for height in range(isqrt(budget), 0, -1):
            for width in (budget // height, height):
                grid = (1, side * height, side * width)
                try:
                    (item,) = encoder.item_specs([grid])
                except ValueError:
                    continue  # no whole number of tokens, or a side that the encoder refuses
                if fits(item, limits):
                    return grid
    raise ValueError(
        f"capture: the rung of {budget} tokens holds no image ({limits}); "
        f"raise or remove the token budget {budget}"
    )


@contextmanager
def paused_gc() -> Iterator[None]:
    """Collect once, then keep the collector off: a collection may free CUDA memory mid-capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
