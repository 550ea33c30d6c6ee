"""What the matrix products in Gluon share: asynchronous copies, tiles cut in columns, biases."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.7 renamed both
load_async: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async: Any = (
    tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
)


@gluon.jit
def columns(acc, COUNT: gl.constexpr):
    """Tuple of `COUNT` tiles that lie side by side in `acc`; moves no data between threads."""
    if COUNT == 1:
        return (acc,)
    else:
        halves = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()
        return columns(halves[0], COUNT // 2) + columns(halves[1], COUNT // 2)


@gluon.jit
def add_bias(y, bias_ptr, first, end, LAYOUT: gl.constexpr):
    """Add the bias of columns `first`.. to `y`."""
    if bias_ptr is not None:
        cols = first + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        bias = gl.load(bias_ptr + cols, mask=cols < end, other=0.0)
        y += bias.to(gl.float32)[None, :]
    return y
