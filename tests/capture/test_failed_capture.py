"""What the recorder does about a capture that fails, on a device made up for it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from vitgraph.capture.graph import CudaGraphRecorder

POOL = (0, 7)


class Generator:
    def __init__(self, state="capturing"):
        self.state = state

    def clone_state(self):
        return "numbers of " + self.state

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.fixture
def device(monkeypatch):
    """How often captures end, what raises, and what was done to allocator and generator."""
    made_up = SimpleNamespace(ends=0, end_raises=False, end_again_raises=False, released=[])
    made_up.generators = [Generator(), Generator()]

    class Stream:
        device_index = 1

        def __init__(self, device=None):
            pass

        def wait_stream(self, stream):
            pass

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert (pool, capture_error_mode) == (POOL, "thread_local")

        def capture_end(self):
            made_up.ends += 1
            if made_up.end_raises:
                raise RuntimeError("capture was invalidated")

    def end_allocate(index, pool):
        if made_up.end_again_raises:
            raise RuntimeError("not recording to the pool")
        made_up.released.append((index, pool))

    @contextmanager
    def on(stream):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "default_generators", made_up.generators)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    made_up.recorder = CudaGraphRecorder(torch.device("cuda"))
    return made_up


def fails():
    raise FloatingPointError("of the work")


def test_a_capture_that_ends_needs_nothing(device):
    device.recorder.record(lambda: None, POOL)
    assert device.ends == 1
    with pytest.raises(FloatingPointError, match="of the work"):
        device.recorder.record(fails, POOL)
    assert device.ends == 2
    assert not device.released
    assert [g.state for g in device.generators] == ["capturing"] * 2


@pytest.mark.parametrize("end_again_raises", [False, True])
@pytest.mark.parametrize("work", [fails, lambda: None], ids=["work", "end"])
def test_a_capture_that_does_not_end_leaves_allocator_and_generator(device, work, end_again_raises):
    device.end_raises, device.end_again_raises = True, end_again_raises
    error = FloatingPointError if work is fails else RuntimeError
    with pytest.raises(error, match="of the work" if work is fails else "invalidated"):
        device.recorder.record(work, POOL)
    assert device.released == ([] if end_again_raises else [(1, POOL)])
    assert [g.state for g in device.generators] == ["capturing", "numbers of capturing"]
