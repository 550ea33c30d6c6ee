import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from vitgraph.capture.ranges import run_marked


class FakeNvtx:
    def __init__(self):
        self.calls = []

    def range_push(self, name):
        self.calls.append(name)

    def range_pop(self):
        self.calls.append("pop")


@pytest.fixture
def nvtx(monkeypatch):
    fake = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return fake


@pytest.mark.parametrize("with_nvtx", [False, True])
def test_a_profiler_sees_the_range_around_its_work(with_nvtx, nvtx):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        assert run_marked("outer", with_nvtx, lambda: torch.ones(2).sum()) == 2
    (outer,) = [event for event in recorded.events() if event.name == "outer"]
    (inner,) = [event for event in recorded.events() if event.name == "aten::sum"]
    assert outer.time_range.start <= inner.time_range.start
    assert inner.time_range.end <= outer.time_range.end
    assert nvtx.calls == (["outer", "pop"] if with_nvtx else [])


def test_nothing_is_marked_unasked(nvtx, monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", nvtx.range_push)
    assert run_marked("outer", False, lambda: 3) == 3
    assert nvtx.calls == []


def test_nvtx_ranges_nest_and_close_on_errors(nvtx):
    with pytest.raises(ZeroDivisionError):
        run_marked("outer", True, lambda: run_marked("inner", True, lambda: 1 // 0))
    assert nvtx.calls == ["outer", "inner", "pop", "pop"]


def test_no_nvtx_without_a_device(nvtx, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_marked("outer", True, lambda: 3) == 3
    assert nvtx.calls == []


def test_a_range_that_nobody_records_is_cheap():
    def microseconds():
        start = time.perf_counter()
        for _ in range(10_000):
            run_marked("outer", False, int)
        return (time.perf_counter() - start) * 100

    assert min(microseconds() for _ in range(5)) < 1


@pytest.mark.gpu
def test_nvtx_on_a_gpu():
    run_marked("outer", True, lambda: torch.ones(2, device="cuda"))
