"""Which algorithms of the library are worth a careful measurement; with made-up times."""

from types import SimpleNamespace

import pytest
import torch
from vitgraph.bench import tune_contest, tune_library
from vitgraph.bench.tune_contest import LinearOperands
from vitgraph.bench.tune_shapes import LinearShape
from vitgraph.kernels import cublaslt
from vitgraph.kernels.cublaslt import Algorithm
from vitgraph.kernels.gemm_tuning import RESIDUAL

CPU = torch.device("cpu")
ONE, OTHER, THIRD = Algorithm(183, 2, 7), Algorithm(24, 5, 3), Algorithm(9, 9, 9)


@pytest.mark.parametrize(
    ("epilogue", "in_library"),
    [("", ""), ("silu", ""), ("gelu_tanh", "gelu_tanh"), (RESIDUAL, "residual")],
)
def test_algorithms_are_those_of_what_the_library_does(epilogue, in_library, monkeypatch):
    asked = []

    def product_of(x, weight, bias, out, epilogue):
        asked.append((tuple(x.shape), tuple(weight.shape), tuple(out.shape), epilogue))
        assert (bias is None) == (epilogue == "residual")
        return product

    def fastest(algorithms, calls_of):
        assert algorithms == [ONE]
        assert [call() for call in calls_of(ONE)[:2]] == [True, True]
        return [ONE]

    product = "product"
    monkeypatch.setattr(tune_contest, "product_of", product_of)
    monkeypatch.setattr(tune_contest, "proposed", lambda product: [ONE])
    monkeypatch.setattr(tune_contest, "fastest", fastest)
    monkeypatch.setattr(tune_contest, "multiply", lambda product, algorithm, *operands: True)
    operands = LinearOperands(LinearShape("tiny", 16, 24, epilogue), 6, CPU, torch.bfloat16)
    assert operands.algorithms() == []  # on a CPU there is no choice
    monkeypatch.setattr(tune_contest, "hopper_reason", lambda device, dtype: None)
    assert operands.algorithms() == [ONE]
    assert asked == [((6, 24), (16, 24), (6, 16), in_library)]
    product = None
    assert operands.algorithms() == []


def test_proposals_for_more_and_fewer_rows_are_tried(monkeypatch):
    of = {100: [ONE, OTHER], 50: [OTHER], 75: [], 150: [THIRD], 200: [ONE]}
    monkeypatch.setattr(cublaslt, "proposals", lambda product: of[product.M])
    product = cublaslt.Product(100, 8, 8, (8, 8, 8), torch.bfloat16, "", True, 0)
    assert tune_library.proposed(product) == [ONE, OTHER, THIRD]


def test_the_quickest_go_on(monkeypatch):
    def calls_of(algorithm):
        def call():
            if algorithm.tile == 12:
                raise RuntimeError("status 14")
            return algorithm.tile != 13  # which cannot

        return [call, *[algorithm] * 9]

    def time_graphs(graphs, effort):
        return {name: SimpleNamespace(ms=calls[0].custom) for name, calls in graphs.items()}

    monkeypatch.setattr(tune_library, "record_each", list)
    monkeypatch.setattr(tune_library, "time_graphs", time_graphs)
    several = [Algorithm(tile, 20 - tile, 1) for tile in range(10, 20)]
    assert tune_library.fastest(several, calls_of) == several[:-5:-1]
    assert tune_library.MOST_ALGORITHMS == 4
    assert tune_library.fastest(several[:4], calls_of) == several[1::-1]
    assert tune_library.fastest(several[2:4], calls_of) == []
