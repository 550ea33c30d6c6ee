"""Partial sums of a product that the residual stream still lacks (gemm_few_rows.py).

    x += p[0] + p[1] + ...      in this order, in fp32, rounded once to x's dtype

x [T, D], p [S, T, D] fp32. The kernels that read the stream next, `norm` and `residual`, add them
on the way. Rows past the live ones are left alone.
"""

import torch
import triton
import triton.language as tl


def add_partials_ref(
    x: torch.Tensor, partials: torch.Tensor, num_live: int | None = None
) -> torch.Tensor:
    """Plain PyTorch definition, a new tensor; `num_live` is a Python int here."""
    n = len(x) if num_live is None else num_live
    total = partials[0, :n]
    for part in partials[1:]:
        total = total + part[:n]
    return torch.cat([(x[:n].to(total.dtype) + total).to(x.dtype), x[n:]])


def check_partials(operation: str, x: torch.Tensor, partials: torch.Tensor | None) -> None:
    """Raise ValueError unless `partials` is None or [S, *x.shape] fp32, contiguous, beside x."""
    if partials is None:
        return
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    is_right = partials.ndim == 3 and len(partials) and partials.shape[1:] == x.shape
    if not is_right or partials.dtype != kind or not partials.is_contiguous():
        raise ValueError(
            f"{operation}: partials must be contiguous [S, {', '.join(map(str, x.shape))}] {kind}, "
            f"got {list(partials.shape)} {partials.dtype} with strides {partials.stride()}"
        )
    if partials.device != x.device:
        raise ValueError(
            f"{operation}: partials are on {partials.device}, x is on {x.device}; keep them on one"
        )


def num_partials(partials: torch.Tensor | None) -> int:
    """S, 0 for None."""
    return 0 if partials is None else len(partials)


@triton.jit
def load_stream(x_ptr, partials_ptr, at, mask, plane, SPLITS: tl.constexpr):
    """Elements `at` of x in fp32, after their partial sums were added to it; 0 where masked.

    `plane` is T * D. Without SPLITS this is a load.
    """
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SPLITS > 0:
        total = tl.load(partials_ptr + at, mask=mask, other=0.0)
        for s in tl.static_range(1, SPLITS):
            total += tl.load(partials_ptr + s * plane + at, mask=mask, other=0.0)
        rounded = (x + total).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    return x
