"""What the matrix products in Gluon share: asynchronous copies, tiles in columns, epilogues."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .activation import apply_activation

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


@gluon.jit
def _tanh(x):
    """Within 2^-11 of it, in one instruction."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activate_for_fp8(x, factor, ACTIVATION: gl.constexpr):
    """`ACTIVATION` of `x` times `factor`, for a result that keeps three bits.

    x sigmoid(2 u) is x/2 (1 + tanh(u)): off by less than |x| / 4096 (of x, not of the result, which
    may be smaller), in half the instructions of `apply_activation`, which outlast the products that
    they should hide under. What passes the factor by rounding is left to the cast, which saturates.
    """
    if ACTIVATION == "" or ACTIVATION == "gelu_erf":
        return apply_activation(x, ACTIVATION) * factor
    else:
        if ACTIVATION == "gelu_tanh":
            u = x * (0.7978845608 + 0.0356774081 * x * x)
        else:
            u = (0.851 if ACTIVATION == "quick_gelu" else 0.5) * x
        half = x * (0.5 * factor)
        return half + half * _tanh(u)
