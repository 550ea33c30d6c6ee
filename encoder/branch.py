"""Work beside the main line of a forward, in captured graphs.

With few rows a layer leaves most of the GPU idle, so a deepstack merger, whose result no later
block reads, can run under the blocks that follow. In a graph that is an edge less; eager calls,
which the host's launches bound, run it in line. Either way the kernels and their results are the
same.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..kernels.pdl import ordinary_kernels

# With more rows the kernels fill the GPU by themselves, and a branch gains nothing.
MOST_ROWS = 1024


@functools.cache
def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    # one for all graphs recorded on `main`: memory of a pool is only reused on the stream it was
    # allocated on. Not one for all streams: a stream cannot be in two captures at once, and two
    # towers may be captured by two threads.
    while True:
        # PyTorch hands out a few streams in turn, also to those who record graphs: the next one may
        # be `main` itself, and the branch would be in line
        side = torch.cuda.Stream(main.device)
        if side.cuda_stream != main.cuda_stream:
            return side


class Branch:
    """A second line of one forward over `rows` rows; in line unless that is being captured.

    Attributes:
        has_room: Whether so many rows have one, if captured.
    """

    def __init__(self, device: torch.device, rows: int):
        is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._stream: torch.cuda.Stream | None = None
        self.has_room = rows <= MOST_ROWS
        if is_captured and self.has_room:
            self._stream = _side_stream(torch.cuda.current_stream(device))
        self._used: list[torch.Tensor] = []

    @property
    def is_beside(self) -> bool:
        """Whether its kernels run beside those of the main line."""
        return self._stream is not None

    @contextmanager
    def after_main(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Launch on the branch, after what the main line has been given so far.

        `tensors` were allocated on the main line and are used inside; they are kept until `join`.
        What the main line overwrites later must not be read inside. No kernel starts early there:
        it would hold multiprocessors while it waits. In line neither, so that a warm-up compiles
        what a capture launches.
        """
        if self._stream is None:
            with ordinary_kernels():
                yield
            return
        self._used += tensors
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream), ordinary_kernels():
            yield

    def join(self) -> None:
        """Let the main line wait for the branch."""
        if self._used and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._used.clear()
