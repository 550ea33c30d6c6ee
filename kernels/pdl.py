"""Programmatic dependent launch: a kernel starts while the one before it is still running.

On compute capability 9.0 a kernel launched with `launch_pdl=True` may start once every program of
the kernel before has let it, or ended. Up to `wait_for_previous` it may read only constants, and
what was complete when the kernel just before was launched; from there on all kernels before have
ended and all that they wrote is visible. That takes the launch, the set-up of barriers and the
first reads off the critical path. In a captured graph the order becomes a programmatic edge.

Constants are what no kernel of the chain writes (weights, biases, pixels) and, from the third on,
what its first one writes: the layout of the batch: live counts, offsets of segments, places and
angles. The first is an ordinary kernel, which lets the second start at once; the second waits for
it before it reads the layout, and all others start after that.

Rules that keep a chain right, for every kernel that is launched so:

- `wait_for_previous` comes before its first read of anything but that, and before its first write.
- It lets the next kernel start only then. So when a kernel starts, all but the one just before
  have ended. That holds for programs without live rows as well.
- A call from outside cannot promise that its arguments are constants by then: kernels start early
  only inside `kernel_chain`, which a forward opens.

PTX ISA, griddepcontrol.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Past this many rows a kernel takes so long that nothing is gained by starting the next one early,
# and what it would hold in registers until then (weights of a norm) costs more.
FEW_ROWS = 2047

_LATE: dict[str, Any] = {"PDL": False}
_EARLY: dict[str, Any] = {"PDL": True, "launch_pdl": True}
_in_chain: ContextVar[bool] = ContextVar("vitgraph_kernel_chain", default=False)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernels before have ended, and let the next one start."""
    if PDL:  # the interpreter has no such instructions
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start; for the first of a chain, which is launched as any other."""
    if PDL:
        gdc_launch_dependents()


@contextmanager
def kernel_chain() -> Iterator[None]:
    """Let kernels that this thread launches meanwhile start early where they can.

    The first has to be an ordinary kernel, the only one that may write what later ones take for
    constant, and the second must not take that for constant.
    """
    token = _in_chain.set(True)
    try:
        yield
    finally:
        _in_chain.reset(token)


@contextmanager
def ordinary_kernels() -> Iterator[None]:
    """Launch no kernel early inside, though a chain is open."""
    token = _in_chain.set(False)
    try:
        yield
    finally:
        _in_chain.reset(token)


def starts_early(rows: torch.Tensor) -> bool:
    """Whether a kernel that works on `rows` is launched early: few rows, in a chain, sm_90."""
    return _in_chain.get() and len(rows) <= FEW_ROWS and rows.is_cuda and _has_pdl(rows.device)


def first_options(rows: torch.Tensor) -> dict[str, Any]:
    """The PDL constant of the first kernel of a chain whose second one works on so many `rows`."""
    return {"PDL": starts_early(rows)}


def pdl_options(rows: torch.Tensor) -> dict[str, Any]:
    """Constants and launch options of a kernel with a PDL constant that works on `rows`."""
    return _EARLY if starts_early(rows) else _LATE


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
