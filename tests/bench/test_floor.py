import pytest
import torch
import vitgraph.bench.floor as floor_module
from vitgraph.bench.floor import (
    TowerShape,
    gemms,
    num_kernels,
    num_untimed_kernels,
    segment_lengths,
)
from vitgraph.bench.towers_config import TOWERS
from vitgraph.kernels.cublaslt import Algorithm

SHAPES = {name: TowerShape.of(config.vision_config()) for name, config in TOWERS.items()}
PEAK = 790e12  # FLOP/s at which the figures below were taken


def test_shape_of_each_family():
    assert SHAPES["qwen3-vl-8b"] == TowerShape(
        1152, 16, 27, 4304, False, 1536, 4096, 4, num_mergers=4, full_layers=27
    )
    assert SHAPES["qwen2.5-vl-7b"] == TowerShape(
        1280, 16, 32, 3420, True, 1176, 3584, 4, num_mergers=1, full_layers=4
    )
    assert SHAPES["qwen2-vl-7b"] == TowerShape(
        1280, 16, 32, 5120, False, 1176, 3584, 4, num_mergers=1, full_layers=32
    )
    assert SHAPES["glm-4.1v-9b"] == TowerShape(
        1536, 12, 24, 4096, True, 1176, 4096, 4, num_mergers=1, full_layers=24, merger_mlp=13696
    )
    assert SHAPES["glm-ocr"] == TowerShape(
        1024, 16, 24, 4096, True, 1176, 1536, 4, num_mergers=1, full_layers=24, merger_mlp=4608
    )
    assert SHAPES["glm-5.3-flash"].merger_mlp == 10240
    assert SHAPES["paddleocr-vl"] == TowerShape(
        1152, 16, 27, 4304, False, 588, 1152, 1, num_mergers=0, full_layers=27
    )
    assert SHAPES["kimi-k2.5"] == TowerShape(
        1152, 16, 27, 4304, False, 588, 4608, 4, num_mergers=0, full_layers=27
    )


@pytest.mark.parametrize(
    ("name", "patches", "ms"),
    [
        ("qwen3-vl-8b", 4096, 4.70),
        ("qwen3-vl-8b", 16384, 18.79),
        ("qwen2.5-vl-7b", 4096, 6.67),
        ("qwen2.5-vl-7b", 16384, 26.67),
        ("qwen2-vl-7b", 4096, 6.66),
        ("qwen2-vl-7b", 16384, 26.62),
    ],
)
def test_gemm_work(name, patches, ms):
    flops = sum(g.flops for g in gemms(SHAPES[name], patches))
    assert flops / PEAK * 1e3 == pytest.approx(ms, abs=0.006)


def test_every_weight_is_in_exactly_one_gemm():
    """Matrices of the tower, position table left out, are the GEMMs' weights (no padding here)."""
    names = ("qwen3-vl-8b", "qwen2.5-vl-32b", "qwen2-vl-7b", "glm-4.1v-9b", "glm-5.3-flash")
    for name in (*names, "paddleocr-vl", "kimi-k2.5"):
        from vitgraph.bench.towers_config import empty_tower, tower_config

        tower = empty_tower(tower_config(name), device="meta", dtype=torch.bfloat16)
        matrices = sum(
            p.numel()
            for key, p in tower.named_parameters()
            if p.ndim >= 2
            and not key.startswith(("pos_embed", "embeddings."))
            and "position_embedding" not in key
        )
        assert sum(g.weight_bytes for g in gemms(SHAPES[name], 784)) == 2 * matrices, name


def test_odd_mlp_width_is_padded():
    down = {a: gemms(SHAPES["qwen2.5-vl-7b"], 784, a)[4] for a in (16, 128)}
    assert (down[16].name, down[16].K, down[128].K) == ("down", 3424, 3456)
    assert gemms(SHAPES["qwen2.5-vl-7b"], 784)[3].N == 2 * 3424


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("qwen3-vl-8b", 207),
        ("qwen2.5-vl-7b", 230),
        ("qwen2-vl-7b", 230),
        ("glm-4.1v-9b", 176),
        ("paddleocr-vl", 192),
        ("kimi-k2.5", 192),
    ],
)
def test_kernel_counts(name, kernels):
    shape = SHAPES[name]
    assert num_kernels(shape) == kernels
    timed = sum(g.count for g in gemms(shape, 784)) + shape.depth  # GEMMs and attention
    timed += 2 * shape.depth + max(1, shape.num_mergers)  # norms
    assert num_kernels(shape) - num_untimed_kernels(shape) == timed


def test_segments():
    assert segment_lengths([(2, 4, 6), (1, 2, 2)]) == (24, 24, 4)


@pytest.mark.parametrize("product", ["product", None])
def test_a_gemm_counts_with_its_fastest_algorithm(product, monkeypatch):
    slow, quick = Algorithm(1, 1, 1), Algorithm(2, 2, 2)
    computed = []

    def timed(works):
        before = len(computed)
        for work in works:
            work()
        return {slow: 3.0, quick: 1.0, None: 2.0}[computed[before] if computed[before:] else None]

    monkeypatch.setattr(floor_module, "product_of", lambda *operands: product)
    monkeypatch.setattr(floor_module, "proposed", lambda product: [slow, quick])
    monkeypatch.setattr(floor_module, "fastest", lambda algorithms, calls_of: algorithms)
    monkeypatch.setattr(
        floor_module, "multiply", lambda product, algorithm, *operands: computed.append(algorithm)
    )
    monkeypatch.setattr(floor_module, "_time", timed)
    meter = floor_module.FloorMeter(torch.device("cpu"))
    assert meter._gemm(8, 16, 24) == (2.0 if product is None else 1.0)
    assert set(computed) == (set() if product is None else {slow, quick})
    assert meter._gemm(8, 16, 24) == meter._gemm(8, 16, 24)
