"""Linear layer on fp8 operands, each row and each output channel with a scale of its own.

    y[t, n] = x_scale[t] * w_scale[n] * sum_k x[t, k] * weight[n, k] + bias[n]

x [T, K] and weight [N, K] float8_e4m3fn, contiguous; x_scale [T] and w_scale [N] fp32; bias [N] or
None, and y [T, N], in bf16 on a GPU. The product is `torch._scaled_mm` with row-wise scales, which
takes the bias in its epilogue, accumulates fast (in fp32 with fewer bits kept between the steps of
the tensor cores), and computes all T rows, live or not; it cannot add to a residual. It needs
compute capability 8.9, and K and N that are multiples of 16.

CPU tensors are computed in fp32 from the same fp8 values, into any dtype: what is lost by
quantising is lost there too, bit for bit; only the order of the sums differs.
"""

import torch

from .quantize import FP8, dequantize

MIN_CAPABILITY = (8, 9)
MULTIPLE = 16  # of K and N


def linear_fp8_ref(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch definition, rounded once to `dtype`; on CPU and GPU alike."""
    y = dequantize(x.float() @ weight.float().t(), x_scale) * w_scale
    return (y if bias is None else y + bias.float()).to(dtype)


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
    out: torch.Tensor,
) -> torch.Tensor:
    """The product of the module docstring, written to `out` [T, N], which is returned.

    Raises:
        ValueError: shapes disagree, an operand is not contiguous, K or N is no multiple of 16, or
            the device has no fp8 products.
        TypeError: an operand is not fp8, a scale not fp32, `bias` of another dtype than `out`, or
            `out` on a GPU not bf16.
    """
    T, K = x.shape
    N = weight.shape[0]
    for name, tensor, shape, dtype in (
        ("x", x, (T, K), FP8),
        ("x_scale", x_scale, (T,), torch.float32),
        ("weight", weight, (N, K), FP8),
        ("w_scale", w_scale, (N,), torch.float32),
        ("bias", bias, (N,), out.dtype),
        ("out", out, (T, N), torch.bfloat16 if x.is_cuda else out.dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"linear_fp8: {name} must be contiguous {list(shape)}, got {list(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"linear_fp8: {name} is {tensor.dtype}, expected {dtype}")
    if K % MULTIPLE or N % MULTIPLE:
        raise ValueError(
            f"linear_fp8: K = {K} and N = {N} must be multiples of {MULTIPLE}; pad the weight, or "
            "keep this layer in bf16"
        )
    if not x.is_cuda:
        return out.copy_(linear_fp8_ref(x, x_scale, weight, w_scale, bias, out.dtype))
    if reason := fp8_reason(x.device):
        raise ValueError(f"linear_fp8: {reason}; use the bf16 layer")
    # the transpose of a row-major weight is the column-major operand that the library asks for
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale[:, None], scale_b=w_scale[None, :], bias=bias,
        out_dtype=out.dtype, use_fast_accum=True, out=out,
    )  # fmt: skip


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
