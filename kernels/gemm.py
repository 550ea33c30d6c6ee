"""Matrix product whose row count is read on the device, with its epilogue.

    y[t] = f(x[t] @ weight.T + bias) + residual[t]    for t < live_rows

x [T, K], weight [N, K] (the layout of `nn.Linear`), bias [N], y [T, N]; fp32, fp16 or bf16, all of
one dtype, elements of a row adjacent. Products are summed in fp32 (fp32 operands are multiplied as
IEEE fp32, not TF32) and the epilogue is fp32: one rounding. Compute-bound from some 300 rows up.

The kernel is persistent: about one program a multiprocessor walks over the tiles of the live rows
only, so that a graph captured for T rows costs what its live rows cost. **Rows written**: live
rows rounded up to the config's `block_m`, and at most T. The rows between are computed from
whatever x holds there (and added to whatever the residual holds); rows after them are untouched.

With 16-byte aligned rows on compute capability 9.0 and newer, tiles go through TMA descriptors
made on the host; otherwise through masked pointers. A `HopperConfig` asks for the kernel of
gemm_hopper.py, which computes the same for 16-bit operands on 9.0. Order of tiles as in
https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html
"""

import functools
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import Activation, activation_ref, apply_activation
from .dispatch import is_interpreting, use_reference
from .gemm_tuning import HopperConfig
from .launch import launch_kernel
from .roofline import Cost
from .rows import ceil_div, check_live_rows, num_sms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gemm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of its inputs; always a new tensor."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = activation_ref(y, activation)
    return y if residual is None else residual + y


def cost(T: int, N: int, K: int, dtype: torch.dtype, *, has_residual: bool = False) -> Cost:
    """Least work and traffic of one call on T live rows."""
    elements = T * K + N * K + (2 if has_residual else 1) * T * N
    return Cost(flops=2 * T * N * K, bytes=elements * dtype.itemsize)


@dataclass(frozen=True)
class GemmConfig:
    """Tile [block_m, block_n], its step along K, and how it is launched.

    `group_m` tiles of rows share a column of weight tiles before the next column is started.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    group_m: int = 8


# Estimates, not measurements: how fast a multiprocessor works through a tile of this size. A
# larger tile reads fewer bytes from shared memory for each product. 128 x 256 would be next, but
# its epilogues take every register, and which of them spill depends on the release of Triton.
TILE_RATES = {
    GemmConfig(128, 128, 64, num_warps=8, num_stages=4): 0.85,
    GemmConfig(64, 128, 64, num_warps=4, num_stages=4, programs_per_sm=2): 0.65,
    GemmConfig(64, 64, 64, num_warps=4, num_stages=4, programs_per_sm=3): 0.45,
}
FP32_CONFIG = GemmConfig(32, 32, 32, num_warps=4, num_stages=2, programs_per_sm=4)


def gemm_config(M: int, N: int, K: int, dtype: torch.dtype, num_sms: int) -> GemmConfig:
    """The tile with the least time for its waves over `num_sms`; a pure function."""
    if dtype == torch.float32:
        return FP32_CONFIG

    def time(config: GemmConfig) -> float:
        tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
        area = config.block_m * config.block_n
        # the epilogue and the filling of the pipeline cost a tile as much as some 256 of its K
        return ceil_div(tiles, num_sms) * area * (K + 256) / TILE_RATES[config]

    return min(TILE_RATES, key=time)


@triton.jit
def _gemm_kernel(
    x,  # [M, K], descriptor or pointer
    weight,  # [N, K], descriptor or pointer
    bias_ptr,  # [N] or None
    out,  # [M, N], descriptor or pointer; holds the residual if there is one
    live_ptr,  # [1] int32 or None
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    ACTIVATION: tl.constexpr,  # a name of activation.py, or ""
    HAS_RESIDUAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live = M
    if live_ptr is not None:
        live = tl.minimum(tl.load(live_ptr), M)
    tiles_m = tl.cdiv(live, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = (tile // group) * GROUP_M
        rows = tl.minimum(tiles_m - first_m, GROUP_M)
        start_m = (first_m + (tile % group) % rows) * BLOCK_M
        start_n = ((tile % group) // rows) * BLOCK_N
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start_k in range(0, K, BLOCK_K):
            if USE_TMA:
                a = x.load([start_m, start_k])
                b = weight.load([start_n, start_k])
            else:
                k = start_k + offs_k
                # int64 before the multiply: M * K passes 2**31 at 500k rows of width 4304
                a_ptrs = x + offs_m.to(tl.int64)[:, None] * stride_xm + k[None, :]
                b_ptrs = weight + offs_n.to(tl.int64)[:, None] * stride_wn + k[None, :]
                a = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & (k < K)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(offs_n < N)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        element: tl.constexpr = out.dtype if USE_TMA else out.dtype.element_ty
        acc = apply_activation(acc, ACTIVATION, element == tl.float32)
        if USE_TMA:
            if HAS_RESIDUAL:
                acc += out.load([start_m, start_n]).to(tl.float32)
            out.store([start_m, start_n], acc.to(out.dtype))
        else:
            ptrs = out + offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            if HAS_RESIDUAL:
                acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(ptrs, acc.to(out.dtype.element_ty), mask=mask)


def check_arguments(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    live_rows: torch.Tensor | None,
) -> None:
    """Raise what `gemm` documents, with `operation` in the message."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{operation}: x [T, K] and weight [N, K] must share K, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    T, N = x.shape[0], weight.shape[0]
    if out is not None and residual is not None:
        raise ValueError(f"{operation}: residual is updated in place, so out must not be given")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(
            f"{operation}: activation={activation!r} is not one of {get_args(Activation)}"
        )
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual, "out": out}
    shapes = {"bias": (N,), "residual": (T, N), "out": (T, N)}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} "
                f"on {x.device}; all operands must agree"
            )
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(
                f"{operation}: {name} must be {list(shapes[name])}, got {list(tensor.shape)}"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{operation}: elements of a row of {name} must be adjacent, got strides "
                f"{tensor.stride()}; pass {name}.contiguous()"
            )
    check_live_rows(operation, x, live_rows)


def write_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`gemm_ref` into `residual` or `out` where given."""
    y = gemm_ref(x, weight, bias, activation=activation, residual=residual)
    target = out if residual is None else residual
    return y if target is None else target.copy_(y)


def _can_use_tma(*matrices: torch.Tensor) -> bool:
    first = matrices[0]
    if first.is_cuda and torch.cuda.get_device_capability(first.device) < (9, 0):
        return False
    return is_aligned(*matrices)


@functools.cache
def _gluon_reason() -> str | None:
    if is_interpreting():
        return "Gluon has no interpreter; unset TRITON_INTERPRET"
    try:
        from . import gemm_hopper  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} lacks what its kernel is written in ({error})"
    return None


def hopper_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel of gemm_hopper.py cannot run there in `dtype`; None if it can."""
    if device.type != "cuda":
        return f"it needs compute capability 9.0, and the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, and {device} has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies fp16 and bf16, not {dtype}"
    return _gluon_reason()


def is_aligned(*matrices: torch.Tensor) -> bool:
    """True if rows of all `matrices` start at multiples of 16 bytes, as TMA needs."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.itemsize % 16 == 0 and m.stride(1) == 1
        for m in matrices
    )


def _check_hopper(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    if reason := hopper_reason(x.device, x.dtype):
        raise ValueError(
            f"gemm: a HopperConfig cannot run here: {reason}; pass a GemmConfig or config=None"
        )
    if not is_aligned(x, weight, y):
        raise ValueError(
            "gemm: a HopperConfig needs rows that start at multiples of 16 bytes, got strides "
            f"{x.stride()}, {weight.stride()} and {y.stride()} of {x.itemsize}-byte elements; pass "
            "a GemmConfig or config=None"
        )


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    config: GemmConfig | HopperConfig | None = None,
    programs: int | None = None,
) -> torch.Tensor:
    """`activation(x @ weight.T + bias)`, into `out`, or added to `residual` in place.

    Args:
        x: [T, K]; weight: [N, K]; bias: [N] or None.
        activation: "gelu_tanh", "gelu_erf", "quick_gelu", "silu" or None.
        residual: [T, N], updated in place and returned.
        out: [T, N] to write; a new tensor if None. Rows of a new tensor that are not written
            (see the module docstring) are uninitialised.
        live_rows: int32 [1] on the device, or None for all T rows.
        config: `gemm_config` of the shapes if None.
        programs: launch at most so many, which leaves multiprocessors to kernels beside this one;
            None for what the device holds. Results do not depend on it.

    Raises:
        ValueError: shapes disagree, elements of a row are not adjacent, both `out` and `residual`
            are given, an activation is unknown, a `HopperConfig` does not suit the operands or
            the device, or `programs` is below 1.
        TypeError: dtypes or devices disagree, or the dtype is none of fp32, fp16, bf16.
    """
    check_arguments("gemm", x, weight, bias, activation, residual, out, live_rows)
    if programs is not None and programs < 1:
        raise ValueError(f"gemm: programs = {programs} must be at least 1, or None")
    if use_reference(x):
        return write_reference(x, weight, bias, activation, residual, out)
    if x.dtype not in DTYPES:
        raise TypeError(f"gemm: {x.dtype} is not supported; use one of {DTYPES}")
    (M, K), N = x.shape, weight.shape[0]
    if K == 0:
        raise ValueError(f"gemm: x {tuple(x.shape)} has no columns to sum over")
    y = residual if residual is not None else out
    if y is None:
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    sms = num_sms(x.device)
    config = config or gemm_config(M, N, K, x.dtype, sms)
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
    most = tiles if programs is None else min(tiles, programs)
    if isinstance(config, HopperConfig):
        _check_hopper(x, weight, y)
        from .gemm_hopper import launch

        launch(
            x, weight, bias, y, live_rows,
            activation=activation, has_residual=residual is not None, config=config,
            programs=min(sms, most),
        )  # fmt: skip
        return y
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    use_tma = _can_use_tma(x, weight, y)
    operands: tuple[Any, Any, Any] = (x, weight, y)
    if use_tma:
        blocks = ([bm, bk], [bn, bk], [bm, bn])
        operands = tuple(
            TensorDescriptor.from_tensor(m, block)
            for m, block in zip(operands, blocks, strict=True)
        )
    launch_kernel(
        _gemm_kernel, (min(sms * config.programs_per_sm, most),),
        operands[0], operands[1], bias, operands[2], live_rows,
        M, N, K, x.stride(0), weight.stride(0), y.stride(0),
        ACTIVATION=activation or "", HAS_RESIDUAL=residual is not None, USE_TMA=use_tma,
        BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
