"""Linear layer by the vendor's library: cuBLAS, with bias, tanh-GELU or residual in its epilogue.

    y = f(x @ weight.T + bias)              or, in place,
    residual += x @ weight.T

All T rows are computed, whatever `live_rows` says; activations other than the tanh-GELU are a
second pass, over live rows only. On compute capability 9.0 a product of fp16 or bf16 takes the
algorithm that library_tuning.py names for its shape, where it names one and this release of
cuBLASLt has it; every other product is PyTorch's, and its algorithm cuBLAS's own choice.
"""

import torch

from . import cublaslt
from .activation import activation_
from .cublaslt import Algorithm
from .gemm import hopper_reason, write_reference
from .library_tuning import library_algorithm
from .tables import tuning


def library_epilogue(
    activation: str | None, has_bias: bool, has_residual: bool, dtype: torch.dtype
) -> cublaslt.Epilogue:
    """What of a layer the library computes after its product."""
    if has_residual:
        return "residual"
    # on CUDA its GELU is the tanh form (on CPU it would be the erf form), by an approximate tanh
    # whose error of 1e-5 shows in fp32
    in_epilogue = activation == "gelu_tanh" and has_bias and dtype.itemsize == 2
    return "gelu_tanh" if in_epilogue else ""


def choose_algorithm(
    x: torch.Tensor, weight: torch.Tensor, epilogue: cublaslt.Epilogue
) -> Algorithm | None:
    """What the tables name for these operands; None for the library's own choice.

    Raises:
        ValueError: the user's table for this GPU is damaged.
    """
    (M, K), N = x.shape, weight.shape[0]
    algorithm = library_algorithm(M, N, K, epilogue, tuning(x.device).library)
    if algorithm is None or hopper_reason(x.device, x.dtype) is not None:
        return None
    return algorithm


def library_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    algorithm: Algorithm | None = None,
) -> torch.Tensor:
    """The layer by `algorithm`, or by the library's own choice if it is None or cannot be used.

    The other arguments are those of `linear.linear`, which checks them. CPU tensors are computed by
    plain PyTorch operations.
    """
    if not x.is_cuda:
        return write_reference(x, weight, bias, activation, residual, out)
    epilogue = library_epilogue(activation, bias is not None, residual is not None, x.dtype)
    y = None
    if algorithm is not None:
        y = _by_algorithm(x, weight, bias, residual, out, epilogue, algorithm)
    if y is None:
        y = _by_own_choice(x, weight, bias, residual, out, epilogue)
    if activation is None or epilogue == "gelu_tanh":
        return y
    return activation_(y, activation, live_rows)


def _by_algorithm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    epilogue: cublaslt.Epilogue,
    algorithm: Algorithm,
) -> torch.Tensor | None:
    y = out if residual is None else residual
    if y is None:
        y = x.new_empty(x.shape[0], weight.shape[0])
    product = cublaslt.product_of(x, weight, bias, y, epilogue)
    if product is None or not cublaslt.multiply(product, algorithm, x, weight, bias, y):
        return None
    return y


def _by_own_choice(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    epilogue: cublaslt.Epilogue,
) -> torch.Tensor:
    if residual is not None:
        return residual.addmm_(x, weight.t())
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    if epilogue == "gelu_tanh":
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
