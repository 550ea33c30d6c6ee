"""How kernels are launched, or only compiled.

The first call of a kernel compiles it, which takes about a second, most of it in ptxas, a process
of its own. Inside `compiling()` nothing is launched: all kernels that would have been are compiled
by a few threads at once, and the first real call finds them ready.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

_only_compiling: ContextVar[bool] = ContextVar("vitgraph_only_compiling", default=False)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, or its compilation inside `compiling()`."""
    if _only_compiling.get():
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


def is_compiling() -> bool:
    """True inside `compiling()`."""
    return _only_compiling.get()


@contextmanager
def compiling(threads: int | None = None) -> Iterator[None]:
    """Compile what this thread launches meanwhile, and wait for all of it at the end.

    Outputs of the kernels are not written: whatever is launched in another way must not take sizes
    or addresses from them.

    A kernel whose compilation fails raises where it is launched, not here.

    Args:
        threads: how many compile at once; None for one a processor, at most 16.
    """
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        token = _only_compiling.set(True)
        try:
            # Triton 3.6 would stay in this mode, with a pool that has ended, if it raised the error
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            _only_compiling.reset(token)
