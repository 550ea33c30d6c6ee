import threading
from inspect import signature

import pytest
import torch
from triton.runtime import _async_compile
from vitgraph.kernels.attention import varlen_attention
from vitgraph.kernels.launch import compiling, is_compiling, launch_kernel
from vitgraph.kernels.norm import norm


class Kernel:
    """Notes how it was called, as a Triton kernel would be."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))

    def warmup(self, *arguments, grid, **constants):
        self.calls.append(("compiled", grid, arguments, constants))


def test_a_launch_or_its_compilation():
    kernel = Kernel()
    launch_kernel(kernel, (3,), 1, 2, BLOCK=4)
    with compiling():
        assert is_compiling()
        launch_kernel(kernel, (3,), 1, 2, BLOCK=4)
    assert not is_compiling()
    launch_kernel(kernel, (3,), 5)
    launched = ((3,), (1, 2), {"BLOCK": 4})
    assert kernel.calls == [launched, ("compiled", *launched), ((3,), (5,), {})]


def test_an_error_ends_it():
    with pytest.raises(ZeroDivisionError), compiling():
        _ = 1 / 0
    assert not is_compiling()


def test_a_kernel_that_does_not_compile_fails_where_it_is_launched():
    class Broken(Kernel):
        def warmup(self, *arguments, grid, **constants):
            mode = _async_compile.active_mode.get()
            assert mode is not None
            # later versions of Triton take a fourth function
            ends = [lambda kernel: None] * (len(signature(mode.submit).parameters) - 2)
            self.compiled = mode.submit("broken", lambda: 1 / 0, *ends)

    kernel = Broken()
    with compiling():
        launch_kernel(kernel, (3,))
    assert _async_compile.active_mode.get() is None
    assert isinstance(kernel.compiled, _async_compile.FutureKernel)
    with compiling():  # is not taken for one within the other
        assert is_compiling()


def test_several_are_compiled_at_once():
    meeting = threading.Barrier(3)
    with compiling(threads=3):
        mode = _async_compile.active_mode.get()
        assert mode is not None
        jobs = [mode.executor.submit(meeting.wait, 10) for _ in range(3)]
    assert sorted(job.result() for job in jobs) == [0, 1, 2]


def test_other_packages_are_not_run_on_offsets_that_nobody_wrote():
    q = torch.ones(4, 1, 8)
    out = torch.full_like(q, 7.0)
    offsets = torch.tensor([0, 2**30], dtype=torch.int32)
    with compiling():
        varlen_attention(q, q, q, offsets, max_seqlen=4, scale=1.0, out=out, backend="reference")
    assert (out == 7).all()


@pytest.mark.gpu
def test_nothing_is_written_while_compiling():
    x, weight = torch.randn(4, 96, device="cuda"), torch.ones(96, device="cuda")
    y = torch.full_like(x, float("nan"))
    with compiling():
        norm(x, weight, None, 1e-6, kind="rms", out=y)
    torch.cuda.synchronize()
    assert y.isnan().all()
    norm(x, weight, None, 1e-6, kind="rms", out=y)
    expected = torch.nn.functional.rms_norm(x, (96,), eps=1e-6)
    torch.testing.assert_close(y, expected)
