"""Products by a named algorithm of cuBLASLt, and the table that names them."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from vitgraph.kernels import cublaslt, library_linear, library_tuning, tables
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.cublaslt import Algorithm, product_of, proposals
from vitgraph.kernels.gemm import hopper_reason
from vitgraph.kernels.gemm_tuning import RESIDUAL, table_to_json
from vitgraph.kernels.library_linear import library_epilogue
from vitgraph.kernels.library_tuning import TABLE, library_algorithm, library_from_json
from vitgraph.kernels.linear import linear, linear_ref
from vitgraph.kernels.testing import error_ratio

BF16, FP16 = torch.bfloat16, torch.float16
ONE, OTHER = Algorithm(183, 2, 7), Algorithm(24, 5, 3, splits=2)
UNKNOWN = Algorithm(65000, 7, 500)


# what a layer asks for


@pytest.mark.parametrize(
    ("activation", "has_bias", "has_residual", "dtype", "epilogue"),
    [
        (None, True, False, BF16, ""),
        (None, False, False, BF16, ""),
        ("gelu_erf", True, False, BF16, ""),
        ("gelu_tanh", True, False, BF16, "gelu_tanh"),
        ("gelu_tanh", True, False, FP16, "gelu_tanh"),
        ("gelu_tanh", False, False, BF16, ""),
        ("gelu_tanh", True, False, torch.float32, ""),
        (None, False, True, BF16, "residual"),
    ],
)
def test_what_the_library_does_after_its_product(
    activation, has_bias, has_residual, dtype, epilogue
):
    assert library_epilogue(activation, has_bias, has_residual, dtype) == epilogue


def test_an_entry_holds_up_to_its_last_row():
    table = {(8, 16, ""): ((10, ONE), (20, None), (30, OTHER))}
    found = [library_algorithm(M, 8, 16, "", table) for M in (1, 10, 11, 20, 21, 30, 31)]
    assert found == [ONE, ONE, None, None, OTHER, OTHER, None]
    assert library_algorithm(1, 8, 16, "residual", table) is None
    assert library_algorithm(1, 16, 8, "", table) is None


def test_shipped_entries_ascend_and_are_of_what_the_library_does():
    for (N, K, epilogue), classes in TABLE.items():
        assert epilogue in library_tuning.EPILOGUES
        assert N % 8 == K % 8 == 0
        bounds = [last for last, _ in classes]
        assert bounds == sorted(set(bounds))
        assert classes[-1][1] is not None
    assert library_from_json(json.loads(json.dumps(table_to_json(TABLE)))) == TABLE


def entry(algorithm, epilogue=""):
    return {"N": 8, "K": 8, "epilogue": epilogue, "tiles": [[10, algorithm]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "entries are a NoneType"),
        ([entry(asdict(ONE), "quick_gelu")], "epilogue 'quick_gelu' is not one of"),
        ([entry({"tile": 1})], "entry 0: algorithm {'tile': 1} does not have tile, custom"),
        ([entry([1])], "does not have tile, custom"),
        ([entry({**asdict(ONE), "cluster": -1})], "cluster = -1 of an algorithm"),
        ([entry({**asdict(ONE), "custom": True})], "custom = True of an algorithm"),
        ([entry(asdict(ONE)), entry(None)], "entry 1 repeats"),
    ],
)
def test_a_damaged_table_is_refused(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        library_from_json(content)


def test_a_table_survives_the_file():
    table = {(8, 16, "residual"): ((10, ONE), (20, None), (30, OTHER)), (8, 8, ""): ()}
    assert library_from_json(json.loads(json.dumps(table_to_json(table)))) == table
    assert library_tuning.table_digest(table) != library_tuning.table_digest({})


def test_a_layer_takes_the_algorithm_of_its_epilogue(monkeypatch):
    """Also where an activation follows in a pass of its own."""
    taken = []

    def product(x, weight, bias=None, *, algorithm, **options):
        taken.append(algorithm)
        return library_linear.library_linear(x, weight, bias, **options)

    table = {(8, 16, ""): ((4, ONE),), (16, 16, "residual"): ((4, OTHER),)}
    mine = tables.Tuning({}, {}, table)
    monkeypatch.setattr(library_linear, "hopper_reason", lambda device, dtype: None)
    monkeypatch.setattr(library_linear, "tuning", lambda device: mine)
    monkeypatch.setattr(linear_module, "library_linear", product)
    x, weight, bias = torch.ones(4, 16), torch.ones(8, 16), torch.ones(8)
    for backend in ("auto", "library"):
        linear(x, weight, bias, backend=backend)
        linear(x, weight, bias, activation="silu", backend=backend)
        linear(torch.ones(5, 16), weight, bias, backend=backend)
        linear(x, torch.ones(16, 16), residual=torch.ones(4, 16), backend=backend)
    assert taken == [ONE, ONE, None, OTHER] * 2


def test_without_the_library_everything_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(cublaslt, "_library", lambda: None)
    product = cublaslt.Product(8, 8, 8, (8, 8, 8), BF16, "", True, 0)
    assert cublaslt.version() is None
    assert proposals(product) == []
    cublaslt._plan.cache_clear()
    assert not cublaslt.multiply(product, ONE, *[None] * 4)
    cublaslt._plan.cache_clear()


def test_operands_on_a_cpu_are_no_product():
    x = torch.ones(8, 8, dtype=BF16)
    assert product_of(x, x, None, x, "") is None


# on a GPU


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
