"""The bench of the Step tower: on a CPU, a tiny one, and who gets no time."""

import pytest
import torch
from vitgraph.bench import step
from vitgraph.bench.__main__ import main
from vitgraph.bench.timing import QUICK, TimeBudget
from vitgraph.encoder.step_spec import step3p7_spec

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 140}
EFFORT = QUICK.__class__(warmup_s=0.0, rounds=1, min_rounds=1, limit_s=1.0)
WORKLOADS = {"two": (0, 0), "crops": (2, 0, 1)}


@pytest.fixture
def rows():
    """`rows(**options)` of a tiny tower on the CPU."""

    def run(**options):
        spec = step3p7_spec(TINY | {"mlp_ratio": 1.5}, out_size=48)
        return step.run(
            WORKLOADS, spec=spec, device=torch.device("cpu"), dtype=torch.bfloat16, effort=EFFORT,
            time_budget=TimeBudget(None), **options,
        )  # fmt: skip

    return run


def test_rows(rows):
    found = rows()
    assert [(r["workload"], r["provider"]) for r in found] == [
        (w, p) for w in WORKLOADS for p in ("hf-eager-sdpa", "ours-eager", "ours")
    ]
    for row in found:
        assert row["ms"] > 0
        assert row["error"] <= 1.3
        assert row["crops"] == sum(WORKLOADS[row["workload"]])
    assert "crops        ours" in step.summary(found)


def test_who_is_inexact_gets_no_time(rows, monkeypatch):
    ours = step._Contest.ours
    monkeypatch.setattr(step._Contest, "ours", lambda *a: [1.1 * x for x in ours(*a)])
    row = next(r for r in rows(providers=["ours"]) if r["workload"] == "crops")
    assert "ms" not in row
    assert "times that of hf-eager-sdpa" in row["reason"]
    assert f"{'-':>9}" in step.summary([row])


@torch.no_grad()
def test_the_recorded_forward_is_that_of_the_tower():
    spec = step3p7_spec(TINY | {"mlp_ratio": 1.5}, out_size=48)
    contest = step._Contest(spec, torch.device("cpu"), torch.float32, seed=0)
    wholes, crops = contest.images([2, 0])
    want = contest.hf((contest.tower, contest.projector), wholes, crops)
    for got, expected in zip(contest.hf_without_host(wholes, crops)(), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_unknown_names(rows, capsys):
    with pytest.raises(ValueError, match="provider theirs is not known"):
        rows(providers=["theirs"])
    assert main(["step", "--workloads", "all", "--device", "cpu"]) == 2
    assert "workload all is not known; use 1whole" in capsys.readouterr().err
