import math

import pytest
import torch
from vitgraph.bench import contest, fp8_provider, towers
from vitgraph.bench.fp8_provider import CRITERION, Fp8Tower, cosine_failure
from vitgraph.bench.provider import Provider, UnavailableError
from vitgraph.bench.timing import Effort

FAST = Effort(warmup_s=0.0, rounds=2, min_rounds=2)
WORKLOADS = {"one": ((1, 16, 16),)}


def quiet(line):
    pass


def turned(x, angles):
    """Rows of `x` [T, 2] turned by `angles`."""
    c, s = angles.cos(), angles.sin()
    return torch.stack([x[:, 0] * c - x[:, 1] * s, x[:, 0] * s + x[:, 1] * c], dim=1)


@pytest.mark.parametrize(
    ("angles", "passes"),
    [
        ([0.04] * 10, True),  # cosine 0.9992
        ([0.05] * 10, False),  # 0.99875
        ([0.0] * 9 + [0.13], True),  # one of 0.9916, 0.99916 on average
        ([0.0] * 99 + [0.15], False),  # one of 0.9888
        ([0.0] * 9 + [math.nan], False),
    ],
)
def test_criterion(angles, passes):
    native = torch.randn(len(angles), 2, generator=torch.Generator().manual_seed(0)).double()
    ours = 3 * turned(native, torch.tensor(angles, dtype=torch.float64))
    failure = cosine_failure([native, ours], [native, native])
    assert (failure is None) == passes
    assert passes or "feature 1" in str(failure)


def test_criterion_needs_matching_features():
    with pytest.raises(ValueError, match="shapes"):
        cosine_failure([torch.ones(2, 3)], [torch.ones(3, 3)])


def test_it_is_a_provider_on_request():
    assert "ours-fp8" in contest.PROVIDERS
    assert "ours-fp8" not in towers.DEFAULT_PROVIDERS


def test_budgets_reach_its_graphs():
    tower = Fp8Tower("tiny-qwen2-vl", (), device=torch.device("cpu"), dtype=torch.bfloat16)
    tower.use_budgets((64, 128))
    assert tower._budgets == (64, 128)
    assert tower._ours is None


def test_without_a_gpu_it_says_so():
    tower = Fp8Tower("tiny-qwen2-vl", (), device=torch.device("cpu"), dtype=torch.bfloat16)
    with pytest.raises(UnavailableError, match="CUDA device"):
        tower.builders()["ours-fp8"](None)


@pytest.mark.parametrize("failure", [None, "cosine is low"])
def test_its_row_names_the_criterion(failure, monkeypatch):
    def build(self, job):
        return Provider(lambda: None, list, 7, criterion=CRITERION, failure=lambda: failure)

    monkeypatch.setattr(fp8_provider.Fp8Tower, "_build", build)
    rows = towers.run(
        ["tiny-qwen2-vl"], WORKLOADS, ["ours-fp8"], device="cpu", effort=FAST, log=quiet
    )
    (row,) = rows
    assert (row["ms"] is None) == (failure is not None)
    assert row.get("reason") == failure
    assert row.get("criterion") == (CRITERION if failure is None else None)
    assert row["max_err_ratio"] is None
    assert "cosine" in CRITERION
    assert "tiny-qwen2-vl one" in contest.summary(rows)


def test_calm_towers_in_fp8_meet_it_eagerly():
    from vitgraph.bench.hf_providers import hf_builders
    from vitgraph.bench.ours_providers import OursTower
    from vitgraph.bench.provider import make_job
    from vitgraph.bench.towers_config import build_tower, calm_

    cpu = torch.device("cpu")
    hf = calm_(build_tower("tiny-qwen3-vl", device=cpu, dtype=torch.bfloat16))
    ours = OursTower(hf, (), precision="fp8")
    job = make_job(
        ((1, 16, 16),), ours.encoder().spec.patch_values, device=cpu, dtype=torch.bfloat16, seed=0
    )
    native = hf_builders(hf)["hf-eager-sdpa"](job).features()
    assert ours.encoder().precision == "fp8"
    assert cosine_failure(ours.builders()["ours-eager"](job).features(), native) is None


@pytest.mark.gpu
def test_on_a_gpu_it_is_timed():
    rows = towers.run(["tiny-qwen3-vl"], WORKLOADS, ["ours", "ours-fp8"], effort=FAST, log=quiet)
    by_name = {row["provider"]: row for row in rows}
    row = by_name["ours-fp8"]
    assert row["ms"] is not None, row.get("reason")
    assert row["criterion"] == CRITERION
    assert "criterion" not in by_name["ours"]
