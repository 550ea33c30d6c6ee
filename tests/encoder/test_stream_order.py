"""Which stream waits for which, with streams that only take notes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vitgraph.encoder.stream_order import Written

CUDA = torch.device("cuda", 0)


class Stream:
    """Notes what it is told to wait for."""

    device = CUDA

    def __init__(self):
        self.waits = []

    def record_event(self):
        return "event of", self

    def wait_event(self, event):
        self.waits.append(event)


class Block:
    """Notes the streams that read it."""

    def __init__(self):
        self.readers = []

    def record_stream(self, stream):
        self.readers.append(stream)


@pytest.fixture
def cuda(monkeypatch):
    """The current stream, and whether it is being captured."""
    state = SimpleNamespace(stream=Stream(), captures=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.captures)
    return state


def test_another_stream_waits_and_keeps_the_memory(cuda):
    writer, block = cuda.stream, Block()
    tensors: Any = [block]
    written = Written(CUDA, tensors)
    cuda.stream = reader = Stream()
    written.order_reads()
    assert reader.waits == [("event of", writer)]
    assert block.readers == [reader]
    assert writer.waits == []


def test_the_same_stream_does_not_wait(cuda):
    block = Block()
    tensors: Any = [block]
    Written(CUDA, tensors).order_reads()
    assert cuda.stream.waits == []
    assert block.readers == []


def test_a_captured_stream_does_not_wait(cuda):
    written = Written(CUDA)
    cuda.stream, cuda.captures = Stream(), True
    written.order_reads()
    assert cuda.stream.waits == []


def test_nothing_to_order_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    Written(torch.device("cpu"), [torch.zeros(1)]).order_reads()


@pytest.mark.gpu
def test_reads_on_another_stream():
    source, x = torch.ones(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(writer):
        torch.cuda._sleep(100_000_000)
        x.copy_(source)
        written = Written(x.device, [x])
    with torch.cuda.stream(reader):
        written.order_reads()
        total = x.sum().item()  # waits for this stream alone
    assert total == x.numel()
