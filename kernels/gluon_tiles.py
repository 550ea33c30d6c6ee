"""What the matrix products in Gluon share: asynchronous copies, tiles in columns, epilogues."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .activation import apply_activation, binary_exponent

# Triton 3.7 renamed these
load_async: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async: Any = (
    tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
)
barrier: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier")  # noqa: B009


@gluon.jit
def columns(acc, COUNT: gl.constexpr):
    """Tuple of `COUNT` tiles that lie side by side in `acc`; moves no data between threads."""
    if COUNT == 1:
        return (acc,)
    else:
        halves = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()
        return columns(halves[0], COUNT // 2) + columns(halves[1], COUNT // 2)


# A vector over the columns of a tile (bias, scales) is asked for before the products and put into
# shared memory behind them: loads in the epilogue would make all four warps wait for the L2 cache.


@gluon.jit
def allocate_vector(ptr, unused, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Shared memory for `PARTS` times `WIDTH` elements of `ptr`; `unused` without it."""
    vector = unused  # a function cannot return None to `warp_specialize`
    if ptr is not None:
        LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        vector = gl.allocate_shared_memory(ptr.dtype.element_ty, [PARTS, WIDTH], LAYOUT)
    return vector


@gluon.jit
def fetch_vector(
    ptr, first, end, PARTS: gl.constexpr, WIDTH: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """Elements from `first` to `end` in `PARTS` tensors of `WIDTH`; none without `ptr`."""
    if ptr is None or PARTS == 0:
        return ()
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        at = first + gl.arange(0, WIDTH, layout=LAYOUT)
        parts = (gl.load(ptr + at, mask=at < end, other=0.0),)
        return parts + fetch_vector(ptr, first + WIDTH, end, PARTS - 1, WIDTH, NUM_WARPS)


@gluon.jit
def fetch_columns(
    ptr, start_n, N, IS_GATED: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """What belongs to the columns of a tile, of a gated one to those of the gate first."""
    if IS_GATED:
        HALF: gl.constexpr = PARTS // 2
        gate = fetch_vector(ptr, start_n // 2, N, HALF, WIDTH, NUM_WARPS)
        return gate + fetch_vector(ptr, (N + start_n) // 2, N, HALF, WIDTH, NUM_WARPS)
    else:
        return fetch_vector(ptr, start_n, N, PARTS, WIDTH, NUM_WARPS)


@gluon.jit
def put_vector(vector, parts, FIRST: gl.constexpr):
    """Write what was fetched to the parts of `vector` from `FIRST` on."""
    for i in gl.static_range(len(parts)):
        vector.index(FIRST + i).store(parts[i])


@gluon.jit
def load_part(vector, part: gl.constexpr, LAYOUT: gl.constexpr):
    """A part of a vector in fp32, as a row beside tiles of `LAYOUT`."""
    return vector.index(part).load(gl.SliceLayout(0, LAYOUT)).to(gl.float32)[None, :]


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """`apply_activation` of a tile for results of 16 bits, neighbours in pairs.

    The unit for exponentials and reciprocals is what an epilogue waits for if nothing runs beside
    it, and one reciprocal of a product serves both: 1 / a = b / (a b). So exponents end at 62,
    where x / 2^62 is as good as 0. Under other products (gemm_hopper.py) instructions cost more.
    """
    if ACTIVATION == "" or ACTIVATION == "gelu_erf":
        return apply_activation(x, ACTIVATION)
    else:
        y = 1.0 + gl.exp2(gl.minimum(binary_exponent(x, ACTIVATION), 62.0))
        a, b = y.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
        r = _reciprocal(a * b)
        inverse = gl.join(b * r, a * r).reshape([x.shape[0], x.shape[1]])
        return x * gl.convert_layout(inverse, x.type.layout)


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
