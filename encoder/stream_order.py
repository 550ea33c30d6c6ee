"""Reads on one CUDA stream after writes on another, where no caller could order them himself."""

from collections.abc import Iterable

import torch


class Written:
    """What the current stream has been given to write, for readers on other streams.

    Neither the host nor the writing stream waits for anything. On a CPU there is nothing to order.
    """

    def __init__(self, device: torch.device, tensors: Iterable[torch.Tensor] = ()):
        """Take note of the writes so far.

        Args:
            device: Where they happen.
            tensors: Those of them that may be let go of while a reader is still under way.
        """
        self._tensors = tuple(tensors)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._event = self._stream.record_event()

    def order_reads(self) -> None:
        """Let what the current stream is given from now on find everything written.

        The memory of the tensors is not given to others before the stream is through.
        """
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self._stream.device)
        # what is being captured cannot wait for anything outside; a capture begins synchronised
        if stream == self._stream or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(stream)
