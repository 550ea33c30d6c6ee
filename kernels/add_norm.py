"""A LayerNorm added to the residual stream: the end of a branch in a tower of post-norm blocks.

    x += (y - mean(y)) / sqrt(var(y) + eps) * weight + bias

Shapes: x and y [T, D], rows contiguous; weight, bias [D]. Statistics and sum are fp32 (fp64 for
fp64), rounded once. Rows at or past the live ones are neither read nor written.

Memory-bound: 3*T*D elements moved. https://arxiv.org/abs/1607.06450
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .norm import MAX_D
from .roofline import Cost
from .rows import check_live_rows


def num_warps(D: int) -> int:
    """Warps of a program, which holds a row of x and of y in registers."""
    return 4 if D <= 4096 else 16


def add_norm_ref(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Plain PyTorch definition for live rows; a new tensor."""
    return x + torch.nn.functional.layer_norm(y, y.shape[-1:], weight, bias, eps)


def cost(T: int, D: int, dtype: torch.dtype) -> Cost:
    """Two reads and one write of rows; about 9 FLOP an element."""
    return Cost(flops=9 * T * D, bytes=(3 * T * D + 2 * D) * dtype.itemsize)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _add_norm_kernel(
    x_ptr,  # [T, D], updated
    y_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    live_ptr,  # [1] or None
    T,
    D,
    eps,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    if r >= num_live:
        return
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    # int64 before the multiply: T * D passes 2**31 at 1.2M rows of width 1792
    at = r.to(tl.int64) * D + d
    y = tl.load(y_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    y = tl.where(in_row, y - tl.sum(y, axis=0) / D, 0.0)
    y *= 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / D + eps)
    y *= tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, (x + y).to(x_ptr.dtype.element_ty), mask=in_row)


def add_norm_(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    live_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the LayerNorm of `y` to the live rows of `x` in place, and return `x`.

    Args:
        x, y: [T, D], contiguous, of one dtype.
        weight, bias: [D].
        live_rows: int32 [1]; rows from there on are left as they are.

    Raises:
        ValueError: a shape, layout or dtype that is not as above, or D over `norm.MAX_D`.
    """
    T, D = x.shape
    if D > MAX_D:
        raise ValueError(f"add_norm_: D = {D} is over the limit of {MAX_D}")
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"add_norm_: y is {y.dtype} {tuple(y.shape)}, x {x.dtype} {tuple(x.shape)}; pass two "
            "of one shape and dtype"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (D,):
            raise ValueError(f"add_norm_: {name} {tuple(vector.shape)} must be [{D}]")
    for name, tensor in (("x", x), ("y", y), ("weight", weight), ("bias", bias)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"add_norm_: {name} must be contiguous, its strides are {tensor.stride()}"
            )
    check_live_rows("add_norm_", x, live_rows)
    if use_reference(x):
        n = T if live_rows is None else int(live_rows)
        x[:n] = add_norm_ref(x[:n], y[:n], weight, bias, eps)
        return x
    if T == 0:
        return x
    launch_kernel(
        _add_norm_kernel, (T,), x, y, weight, bias, live_rows, T, D, eps,
        BLOCK_D=triton.next_power_of_2(D), num_warps=num_warps(D),
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::add_norm_", mutates_args=("x",))
def add_norm_op(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    live_rows: torch.Tensor | None,
) -> None:
    """`add_norm_` as an operator that torch.compile can trace around."""
    add_norm_(x, y, weight, bias, eps, live_rows)


@add_norm_op.register_fake
def _(x, y, weight, bias, eps, live_rows):
    return None
