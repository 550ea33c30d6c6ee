"""Products by a named algorithm of cuBLASLt on a GPU, and whether the table names what is there."""

from dataclasses import replace

import pytest
import torch
from vitgraph.kernels import cublaslt, library_linear, library_tuning, tables
from vitgraph.kernels.cublaslt import Algorithm, product_of, proposals
from vitgraph.kernels.gemm import hopper_reason
from vitgraph.kernels.gemm_tuning import RESIDUAL
from vitgraph.kernels.library_tuning import TABLE
from vitgraph.kernels.linear import linear, linear_ref
from vitgraph.kernels.testing import error_ratio

BF16, FP16 = torch.bfloat16, torch.float16
ONE = Algorithm(183, 2, 7)
UNKNOWN = Algorithm(65000, 7, 500)


@pytest.fixture
def device():
    found = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(found, BF16):
        pytest.skip(reason)
    return found


def operands(device, M, N, K, epilogue, dtype=BF16):
    generator = torch.Generator(device).manual_seed(M + N + K)

    def draw(*size, scale=1.0):
        values = torch.randn(*size, device=device, generator=generator)
        return (values * scale).to(dtype)

    bias = None if epilogue == RESIDUAL else draw(N)
    return draw(M, K), draw(N, K, scale=K**-0.5), bias, draw(M, N)


def expected(x, weight, bias, before, epilogue, dtype):
    x, weight, before = (m.to(dtype) for m in (x, weight, before))
    return linear_ref(
        x, weight, None if bias is None else bias.to(dtype),
        activation="gelu_tanh" if epilogue == "gelu_tanh" else None,
        residual=before if epilogue == RESIDUAL else None,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("epilogue", library_tuning.EPILOGUES)
@pytest.mark.parametrize(("M", "N", "K"), [(832, 1152, 4304), (224, 3456, 1152), (6272, 4304, 200)])
def test_every_proposal_computes_the_product(M, N, K, epilogue, dtype, device):
    x, weight, bias, before = operands(device, M, N, K, epilogue, dtype)
    oracle, eager = (
        expected(x, weight, bias, before, epilogue, kind) for kind in (torch.float64, dtype)
    )
    product = product_of(x, weight, bias, before, epilogue)
    found = proposals(product)
    assert len(found) > 1
    for algorithm in found:
        y = before.clone() if epilogue == RESIDUAL else torch.full_like(before, float("nan"))
        assert cublaslt.multiply(product, algorithm, x, weight, bias, y)
        assert error_ratio(y, eager, oracle) <= 1.1, algorithm


@pytest.mark.gpu
def test_the_table_is_of_this_release(device):
    """Every entry names an algorithm that runs for all rows of its class."""
    if cublaslt.version() != library_tuning.VERSION:
        pytest.skip(f"measured with cuBLASLt {library_tuning.VERSION}, not {cublaslt.version()}")
    for (N, K, epilogue), classes in TABLE.items():
        first = 1
        for last, algorithm in classes:
            if algorithm is not None:
                for M in {first, (first + last) // 2, last}:
                    has_bias = epilogue != RESIDUAL
                    product = cublaslt.Product(
                        M, N, K, (K, K, N), BF16, epilogue, has_bias, device.index
                    )
                    assert cublaslt._plan(product, algorithm) is not None, (N, K, M, algorithm)
            first = last + 1


@pytest.mark.gpu
def test_an_algorithm_that_is_not_there_leaves_the_choice_to_the_library(device):
    x, weight, bias, y = operands(device, 300, 1152, 1152, "")
    product = product_of(x, weight, bias, y, "")
    assert not cublaslt.multiply(product, UNKNOWN, x, weight, bias, y)
    by_default = library_linear.library_linear(x, weight, bias)
    for algorithm in (UNKNOWN, proposals(product)[-1]):
        got = library_linear.library_linear(x, weight, bias, algorithm=algorithm)
        torch.testing.assert_close(got, by_default, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_operands_that_start_anywhere_are_left_to_pytorch(device):
    x, weight, bias, y = operands(device, 300, 1152, 1152, "")
    shifted = torch.empty(300 * 1152 + 8, device=device, dtype=BF16)[8:].view(300, 1152)
    assert product_of(x, weight, bias, y, "") is not None
    assert product_of(shifted.copy_(x), weight, bias, y, "") is None
    assert product_of(x, weight, bias, shifted, "") is None
    assert product_of(x[:, ::2], weight[:, :576], bias, y, "") is None
    assert product_of(x.float(), weight, bias, y, "") is None
    assert product_of(x[:0], weight, bias, y[:0], "") is None
    got = library_linear.library_linear(shifted, weight, bias, algorithm=ONE)
    torch.testing.assert_close(got, torch.addmm(bias, x, weight.t()))


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", library_tuning.EPILOGUES)
def test_a_graph_repeats_the_call(epilogue, device, monkeypatch):
    """Also rows of wider matrices, and after eager calls on another stream."""
    x, weight, bias, before = operands(device, 832, 1152, 4304, epilogue)
    wide = torch.empty(832, 2304, device=device, dtype=BF16)
    y = wide[:, :1152]
    algorithm = proposals(product_of(x, weight, bias, y, epilogue))[-1]
    mine = replace(tables.tuning(device), library={(1152, 4304, epilogue): ((832, algorithm),)})
    monkeypatch.setattr(library_linear, "tuning", lambda device: mine)
    options = {"activation": "gelu_tanh"} if epilogue == "gelu_tanh" else {}
    target = {"residual": y} if epilogue == RESIDUAL else {"out": y}
    used = []
    multiply = cublaslt.multiply

    def noted(product, algorithm, *operands):
        used.append(algorithm)
        return multiply(product, algorithm, *operands)

    monkeypatch.setattr(cublaslt, "multiply", noted)

    def call():
        y.copy_(before)
        linear(x, weight, bias, backend="library", **target, **options)

    with torch.cuda.stream(torch.cuda.Stream(device)):
        call()
        eager = y.clone()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, eager)
    assert used == [algorithm] * 2
    oracle, plain = (
        expected(x, weight, bias, before, epilogue, kind) for kind in (torch.float64, BF16)
    )
    assert error_ratio(y, plain, oracle) <= 1.1
