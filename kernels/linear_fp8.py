"""Linear layer on fp8 operands, each row and each output channel with a scale of its own.

    s[t, n] = x_scale[t] * w_scale[n] * sum_k x[t, k] * weight[n, k] + bias[n]
    y = f(s)      f: nothing, an activation, or "swiglu": silu(s[t, n]) * s[t, N / 2 + n]

and then one of three: y in bf16 to `out`, with a `rotation` as rotary_linear.py says; residual +=
y in bf16, without f and bias; or, with `bound`, y in fp8 to `out` as bounded_fp8.py says, for the
next product.

x [T, K] and weight [N, K] float8_e4m3fn; x_scale [T] and w_scale [N] fp32; bias [N] or None.
Elements of a row are adjacent, and rows of x, weight, out and residual start at multiples of 16
bytes (fp8 best at multiples of 128: `aligned_rows.py`).

`backend="hopper"` is the kernel of gemm_hopper.py on compute capability 9.0: all in one kernel, f
of fp32 sums, for a result in fp8 by a tanh that is off by up to 2**-11. Like its products of 16
bits it computes live rows rounded up to tiles of 128, and leaves later ones alone.
`backend="library"` is `torch._scaled_mm` with row-wise scales, from 8.9 on. It rounds s to bf16 and
takes all T rows; f, rotation, sum and quantisation are passes of their own.
`backend="auto"` is "hopper" where it can run, else "library". Both sum in the tensor cores, which
keep fewer bits between their steps than fp32 has. K and N must be multiples of 16.

CPU tensors are computed in fp32 from the same fp8 values, into any dtype: what is lost by
quantising is lost there too, bit for bit; only the order of the sums differs.
"""

from typing import Literal, get_args

import torch

from .activation import activation_, activation_ref
from .bounded_fp8 import quantize_bounded, quantize_bounded_ref
from .gemm import hopper_reason, is_aligned
from .gemm_tuning import SQUARE
from .quantize import FP8, dequantize, has_adjacent_columns
from .rope import rope_
from .rotary_linear import Rotation, check_rotation
from .rows import ceil_div, check_live_rows, num_sms
from .swiglu import swiglu, swiglu_ref

Transform = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu", "swiglu"]

BACKENDS = ("auto", "library", "hopper")
MIN_CAPABILITY = (8, 9)
MULTIPLE = 16  # of K and N
# By measurement on an H200 from 784 to 17,904 rows: a wider tile is slower in fp8, but for 1 per
# cent at one shape. Steps along K take half as long there, an epilogue as long as ever.
TILE = SQUARE


def linear_fp8_ref(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    transform: str | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of y, in fp32; on CPU and GPU alike."""
    s = dequantize(x.float() @ weight.float().t(), x_scale) * w_scale
    s = s if bias is None else s + bias.float()
    if transform is None:
        return s
    return swiglu_ref(s) if transform == "swiglu" else activation_ref(s, transform)


def fp8_reason(device: torch.device) -> str | None:
    """Why fp8 products cannot run on `device`; None if they can."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    return (
        f"compute capability {capability[0]}.{capability[1]} has no fp8 products, which begin at "
        f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    )


def linear_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: str | None = None,
    rotation: Rotation | None = None,
    bound: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The product of the module docstring, in `out` or `residual`, which is returned.

    Args:
        x, x_scale, weight, w_scale, bias: as there; bias in bf16 on a GPU.
        transform: f.
        rotation: of y, which are q, k and v; with `out` in bf16 alone.
        bound: of every row of y, [T] fp32; not of "swiglu".
        residual: [T, N], updated in place; no bias, `transform` or `bound` with it.
        out: [T, N], for "swiglu" [T, N / 2]; fp8 with `bound`, else bf16 on a GPU.
        live_rows: int32 [1] on the device; rows from there on are of no interest.
        backend: "auto", "library" or "hopper".

    Raises:
        ValueError: shapes disagree, elements of a row are not adjacent or rows not aligned, K or N
            is no multiple of 16, arguments that exclude each other, an unknown transform or
            backend, or one that cannot run there.
        TypeError: an operand is not fp8, a scale not fp32, `bias` of another dtype than what is
            written, or that on a GPU neither bf16 nor fp8.
    """
    if backend not in BACKENDS:
        raise ValueError(f"linear_fp8: backend={backend!r} is not one of {BACKENDS}")
    if transform is not None and transform not in get_args(Transform):
        raise ValueError(
            f"linear_fp8: transform={transform!r} is not None or one of {get_args(Transform)}"
        )
    _check(x, x_scale, weight, w_scale, bias, transform, bound, residual, out)
    qkv = None if rotation is None else _qkv_of(rotation, transform, bound, residual, out)
    check_live_rows("linear_fp8", x, live_rows)
    y = residual if out is None else out
    assert y is not None  # `_check` has refused neither
    if not x.is_cuda:
        if backend == "hopper":
            raise ValueError(f"linear_fp8: {hopper_reason(x.device, torch.bfloat16)}; use 'auto'")
        value = linear_fp8_ref(x, x_scale, weight, w_scale, bias, transform)
        if bound is not None:
            value = quantize_bounded_ref(value, bound)
        elif residual is not None:
            value += residual.float()
        y.copy_(value)
        if rotation is not None and qkv is not None:
            rope_(qkv, rotation.cos, rotation.sin, live_rows, neighbours=True)
        return y
    if reason := fp8_reason(x.device):
        raise ValueError(f"linear_fp8: {reason}; use the bf16 layer")
    if backend != "library":
        reason = hopper_reason(x.device, torch.bfloat16)
        if reason is not None and backend == "hopper":
            raise ValueError(f"linear_fp8: backend='hopper' cannot run here: {reason}; use 'auto'")
        backend = "library" if reason is not None else "hopper"
    if y.numel() == 0:
        return y
    if backend == "library":
        _by_library(x, x_scale, weight, w_scale, bias, transform, bound, residual, y, live_rows)
        if rotation is not None and qkv is not None:
            rope_(qkv, rotation.cos, rotation.sin, live_rows, neighbours=True)
        return y
    from .gemm_hopper import launch

    M, N, is_gated = len(x), len(weight), transform == "swiglu"
    launch(
        x, weight, bias, y, live_rows,
        activation="silu" if is_gated else transform, has_residual=residual is not None,
        is_gated=is_gated, scales=(x_scale, w_scale), out_scale=bound,
        rotation=None if rotation is None else (rotation.position, rotation.turns), config=TILE,
        programs=min(num_sms(x.device), ceil_div(M, TILE.block_m) * ceil_div(N, TILE.block_n)),
    )  # fmt: skip
    return y


def _qkv_of(
    rotation: Rotation,
    transform: str | None,
    bound: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`out` as [T, 3, H, D], once `rotation` is known to be its own."""
    extras = {"transform": transform, "bound": bound, "residual": residual}
    if given := [name for name, value in extras.items() if value is not None]:
        raise ValueError(f"linear_fp8: q, k and v are rotated in out alone, not with {given}")
    assert out is not None  # `_check` has refused neither
    D = 2 * rotation.cos.shape[-1]
    if out.shape[1] % (3 * D) or not out.is_contiguous():
        raise ValueError(
            f"linear_fp8: out must be contiguous [T, 3 H * {D}] with this rotation, got "
            f"{list(out.shape)} with strides {out.stride()}"
        )
    qkv = out.view(len(out), 3, -1, D)
    check_rotation("linear_fp8", rotation, qkv)
    return qkv


def _check(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    transform: str | None,
    bound: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Raise what `linear_fp8` documents of its operands."""
    if (out is None) == (residual is None):
        raise ValueError("linear_fp8: give one of out and residual")
    extras = {"bias": bias, "transform": transform, "bound": bound}
    if residual is not None and (given := [k for k, v in extras.items() if v is not None]):
        raise ValueError(f"linear_fp8: nothing but the product is added to residual, not {given}")
    if bound is not None and transform == "swiglu":
        raise ValueError(
            "linear_fp8: bounds of what a gate multiplies are too wide for fp8; write it to out "
            "without bound, and quantise that by quantize_rows"
        )
    (T, K), N = x.shape, weight.shape[0]
    F = N // 2 if transform == "swiglu" else N
    wide = torch.bfloat16 if x.is_cuda else None  # any on a CPU
    out_dtype = wide if bound is None else FP8
    for name, tensor, shape, dtype in (
        ("x", x, (T, K), FP8),
        ("x_scale", x_scale, (T,), torch.float32),
        ("weight", weight, (N, K), FP8),
        ("w_scale", w_scale, (N,), torch.float32),
        ("bias", bias, (N,), wide if out is None or bound is not None else out.dtype),
        ("bound", bound, (T,), torch.float32),
        ("residual", residual, (T, N), wide),
        ("out", out, (T, F), out_dtype),
    ):
        if tensor is None:
            continue
        is_dense = tensor.is_contiguous() if tensor.dim() == 1 else has_adjacent_columns(tensor)
        if tensor.shape != shape or not is_dense:
            raise ValueError(
                f"linear_fp8: {name} must be {list(shape)} with adjacent elements in a row, got "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"linear_fp8: {name} is {tensor.dtype}, expected {dtype}")
    if K % MULTIPLE or N % MULTIPLE:
        raise ValueError(
            f"linear_fp8: K = {K} and N = {N} must be multiples of {MULTIPLE}; pad the weight, or "
            "keep this layer in bf16"
        )
    y = residual if out is None else out
    assert y is not None
    if not is_aligned(x, weight, y):
        raise ValueError(
            "linear_fp8: rows of x, weight and what is written must start at multiples of 16 "
            f"bytes, got strides {x.stride()}, {weight.stride()} and {y.stride()}; allocate them "
            "as aligned_rows.aligned_rows does"
        )


def _by_library(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    transform: str | None,
    bound: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    live_rows: torch.Tensor | None,
) -> None:
    writes_out = residual is None and bound is None and transform != "swiglu"
    # the transpose of a row-major weight is the column-major operand that the library asks for
    s = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale[:, None], scale_b=w_scale[None, :], bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True, out=y if writes_out else None,
    )  # fmt: skip
    if residual is not None:
        residual.add_(s)
    elif bound is not None:
        quantize_bounded(s, bound, transform, live_rows, out=y)
    elif transform == "swiglu":
        swiglu(s, y, live_rows)
    elif transform is not None:
        activation_(y, transform, live_rows)


@torch.library.custom_op("vitgraph::linear_fp8", mutates_args=())
def linear_fp8_op(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`linear_fp8` into a new tensor of `dtype` as a registered operator."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    return linear_fp8(x, x_scale, weight, w_scale, bias, out=out)


@linear_fp8_op.register_fake
def _(x, x_scale, weight, w_scale, bias, dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
