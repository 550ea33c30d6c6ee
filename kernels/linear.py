"""Linear layer with activation or residual, by the vendor's library or by our Triton GEMM.

    y = f(x @ weight.T + bias)              or, in place,
    residual += x @ weight.T

x [T, K], weight [N, K], bias [N], y and residual [T, N], all of one dtype.

`backend="library"` is cuBLAS: fastest for a known number of rows, with bias and tanh-GELU in its
epilogue. It computes all T rows whatever `live_rows` says; other activations are a second pass,
over live rows only. Through PyTorch it cannot add a bias and a residual in one call: leave the bias
out and add the sum of the biases left out to what reads the residual, or use the other backend.
`backend="triton"` is `gemm.gemm`: every epilogue, and only live rows are computed.

CPU tensors are computed by plain PyTorch operations, except `backend="triton"` under the
interpreter.
"""

import torch

from .activation import activation_
from .gemm import check_arguments, cost, gemm, gemm_ref, write_reference

__all__ = ["BACKENDS", "cost", "linear", "linear_op", "linear_ref", "linear_residual_op"]

BACKENDS = ("library", "triton")

linear_ref = gemm_ref


def _check_library_epilogue(
    bias: torch.Tensor | None, activation: str | None, residual: torch.Tensor | None
) -> None:
    if residual is None:
        return
    if bias is not None:
        raise ValueError(
            "linear: backend='library' cannot add a bias to a residual in place; pass bias=None "
            "and add the bias where the residual is read, or use backend='triton'"
        )
    if activation is not None:
        raise ValueError(
            f"linear: backend='library' cannot add activation={activation!r} of a product to a "
            "residual in place; use backend='triton'"
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "library",
) -> torch.Tensor:
    """`activation(x @ weight.T + bias)`, into `out`, or added to `residual` in place.

    Args:
        x: [T, K]; weight: [N, K]; bias: [N] or None.
        activation: "gelu_tanh", "gelu_erf", "quick_gelu", "silu" or None.
        residual: [T, N], updated in place and returned.
        out: [T, N] to write; a new tensor if None.
        live_rows: int32 [1] on the device; rows from there on are of no interest. What they hold
            afterwards depends on the backend (module docstring).
        backend: "library" or "triton".

    Raises:
        ValueError: shapes disagree, elements of a row are not adjacent, an unknown activation or
            backend, both `out` and `residual`, or an epilogue that the library does not have.
        TypeError: dtypes or devices disagree.
    """
    if backend not in BACKENDS:
        raise ValueError(f"linear: backend={backend!r} is not one of {BACKENDS}")
    if backend == "triton":
        return gemm(
            x, weight, bias, activation=activation, residual=residual, out=out, live_rows=live_rows
        )
    check_arguments("linear", x, weight, bias, activation, residual, out, live_rows)
    _check_library_epilogue(bias, activation, residual)
    if not x.is_cuda:
        return write_reference(x, weight, bias, activation, residual, out)
    if residual is not None:
        return residual.addmm_(x, weight.t())
    if activation == "gelu_tanh" and bias is not None and x.dtype.itemsize == 2:
        # on CUDA its GELU is the tanh form (on CPU it would be the erf form), by an approximate
        # tanh whose error of 1e-5 shows in fp32
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    if bias is None:
        y = torch.mm(x, weight.t(), out=out)
    else:
        y = torch.addmm(bias, x, weight.t(), out=out)
    return y if activation is None else activation_(y, activation, live_rows)


@torch.library.custom_op("vitgraph::linear", mutates_args=())
def linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "library",
) -> torch.Tensor:
    """`linear` into a new tensor as a registered operator."""
    return linear(x, weight, bias, activation=activation, live_rows=live_rows, backend=backend)


@linear_op.register_fake
def _(x, weight, bias=None, activation=None, live_rows=None, backend="library"):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("vitgraph::linear_residual_", mutates_args=("residual",))
def linear_residual_op(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "library",
) -> None:
    """`linear` added to `residual` in place as a registered operator."""
    linear(
        x, weight, bias,
        activation=activation, residual=residual, live_rows=live_rows, backend=backend,
    )  # fmt: skip


@linear_residual_op.register_fake
def _(residual, x, weight, bias=None, activation=None, live_rows=None, backend="library"):
    return None
