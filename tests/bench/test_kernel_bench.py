import json

import pytest
import torch
from vitgraph.bench import kernels
from vitgraph.bench.__main__ import main
from vitgraph.bench.registry import REGISTRY, Case, Draw
from vitgraph.bench.timing import Effort
from vitgraph.kernels.roofline import Cost

FAST = Effort(warmup_s=0.0, rounds=2, min_rounds=2)
SMALL = {
    "T": 6, "D": 16, "H": 2, "F": 24, "N": 16, "K": 24, "activation": "silu",
    "lengths": (5, 3), "h": 4, "w": 6, "P": 24, "G": 5,
}  # fmt: skip


def quiet(line):
    pass


@pytest.mark.parametrize("name", REGISTRY)
def test_definition_cost_and_our_contender_agree(name):
    case = REGISTRY[name]
    draw = Draw(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    arguments = case.make(SMALL, draw)
    oracle = case.reference(*kernels._clone(arguments, torch.float64))
    assert oracle.dtype == torch.float64
    on_cpu = [p for p in case.providers if p not in ("torch", "fa2", "fa3", "fa4", "rope+torch")]
    for provider in (p for p in on_cpu if p in ("eager", "vitgraph", "library")):
        actual = case.providers[provider](*kernels._clone(arguments))
        torch.testing.assert_close(actual.double(), oracle, rtol=1e-4, atol=1e-5)
    for dims in case.shapes.values():
        cost = case.cost(dims, torch.bfloat16)
        assert cost.flops > 0
        assert cost.bytes > 0


def test_mixed_shape_is_that_of_the_workload():
    from vitgraph.bench.floor import segment_lengths
    from vitgraph.bench.workloads import WORKLOADS

    shapes = REGISTRY["attention"].shapes
    assert shapes["qwen3-vl-8b 16mixed"]["lengths"] == segment_lengths(WORKLOADS["16mixed"])
    assert sum(REGISTRY["window_attention"].shapes["qwen2.5-vl-7b img448"]["lengths"]) == 784


@pytest.fixture
def fake_case(monkeypatch):
    def fail(x):
        raise RuntimeError("not here")

    case = Case(
        "double",
        {"small": {"T": 64}, "other": {"T": 8}},
        lambda dims, draw: (draw(dims["T"]),),
        lambda x: 2 * x,
        lambda dims, dtype: Cost(dims["T"], 2 * dims["T"] * dtype.itemsize),
        {
            "right": lambda x: x.mul_(2),
            "wrong": lambda x: 2.1 * x,
            "nan": lambda x: x * float("nan"),
            "failing": fail,
        },
    )
    monkeypatch.setitem(REGISTRY, "double", case)


def test_only_accurate_contenders_get_a_time(fake_case):
    rows = kernels.run(
        ["double"],
        shapes=lambda label: label == "small",
        device="cpu",
        dtype=torch.float32,
        ceilings=kernels.Ceilings(gbps=1000.0, tflops=1.0),
        effort=FAST,
        log=quiet,
    )
    by_name = {r["provider"]: r for r in rows}
    assert len(rows) == 4
    right = by_name["right"]
    assert right["speedup"] == 1.0
    assert right["roofline"] == pytest.approx(512 / 1e9 / (right["us"] * 1e-3))
    assert right["gbps"] == pytest.approx(512 / (right["us"] * 1e3))
    for name, reason in (("wrong", "error is"), ("nan", "nan"), ("failing", "RuntimeError: not")):
        assert by_name[name]["us"] is None
        assert reason in by_name[name]["reason"]
    assert "failing: RuntimeError: not here" in kernels.summary(rows)


def test_command_line(fake_case, tmp_path, capsys):
    path = tmp_path / "k.json"
    options = ["--device", "cpu", "--dtype", "float32", "--quick", "--json", str(path)]
    code = main(["kernels", "double", *options])
    assert code == 0
    assert len(json.loads(path.read_text())["rows"]) == 8
    assert "right" in capsys.readouterr().out
    assert main(["kernels", "nothing", "--device", "cpu"]) == 2


@pytest.mark.gpu
def test_on_a_gpu():
    ceilings = kernels.Ceilings(4000.0, 700.0)
    rows = kernels.run(
        ["layer_norm", "swiglu"],
        shapes=lambda label: "img448" in label,
        ceilings=ceilings,
        effort=FAST,
        log=quiet,
    )
    assert all(r["us"] for r in rows), rows
