"""The bench of towers of images: on a CPU, tiny ones, and who gets no time."""

from typing import Any

import pytest
import torch
from vitgraph.bench import images
from vitgraph.bench.__main__ import main
from vitgraph.bench.internvl_contest import InternVLContest
from vitgraph.bench.siglip2_contest import Siglip2Contest
from vitgraph.bench.step_contest import Step3Contest, StepContest
from vitgraph.bench.timing import QUICK, TimeBudget
from vitgraph.encoder.step_spec import step3_vl_spec, step3p7_spec
from vitgraph.kernels.testing import rel_rms

STEP = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 140,
    "mlp_ratio": 1.5,
}  # fmt: skip
STEP3 = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "output_hidden_size": 80, "image_size": 560, "patch_size": 56,  # crops have 9 x 9 patches
}  # fmt: skip
SIGLIP2 = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
}  # fmt: skip
INTERNVL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "image_size": [112, 112], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
INTERNVIT_6B = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "image_size": [112, 112], "patch_size": [14, 14], "norm_type": "rms_norm", "use_qk_norm": True,
}  # fmt: skip
EFFORT = QUICK.__class__(warmup_s=0.0, rounds=1, min_rounds=1, limit_s=1.0)
CPU = torch.device("cpu")
TOWERS = {
    "step": images.ContestedTower(
        lambda *where: StepContest(step3p7_spec(STEP, out_size=48), *where),
        {"two": (0, 0), "crops": (2, 0, 1)},
    ),
    "step3": images.ContestedTower(
        lambda *where: Step3Contest(step3_vl_spec(STEP3, out_size=48), *where),
        {"two": (0, 0), "crops": (2, 0, 1)},
        "plain",
    ),
    "siglip2": images.ContestedTower(
        lambda *where: Siglip2Contest(SIGLIP2, *where),
        {"same": 9 * ((8, 8),), "sizes": 3 * ((3, 5), (16, 16), (4, 9))},
    ),
    "internvl": images.ContestedTower(
        lambda *where: InternVLContest(INTERNVL, 48, *where), {"2tiles": 2}
    ),
    "internvit-6b": images.ContestedTower(
        lambda *where: InternVLContest(INTERNVIT_6B, 48, *where), {"2tiles": 2}
    ),
}
BASELINES = dict.fromkeys(TOWERS, "hf-eager-sdpa") | {"step3": "plain-eager-sdpa"}


@pytest.fixture
def rows():
    """`rows(**options)` of tiny towers on the CPU."""

    def run(towers=TOWERS, workloads=None, dtype=torch.bfloat16, **options):
        return images.run(
            towers, workloads, device=CPU, dtype=dtype, effort=EFFORT,
            time_budget=TimeBudget(None), **options,
        )  # fmt: skip

    return run


def test_rows(rows):
    found = rows()
    assert [(r["tower"], r["workload"], r["provider"]) for r in found] == [
        (tower, workload, provider)
        for tower, entry in TOWERS.items()
        for workload in entry.workloads
        for provider in (BASELINES[tower], "ours-eager", "ours")
    ]
    for row in found:
        assert row["ms"] > 0
        assert row["max_err_ratio"] <= 1.3
    patches = {(r["tower"], r["workload"]): r["patches"] for r in found}
    assert patches == {
        ("step", "two"): 2 * 100,
        ("step", "crops"): 6 * 100,
        ("step3", "two"): 2 * 100,
        ("step3", "crops"): 3 * 100 + 3 * 81,
        ("siglip2", "same"): 9 * 64,
        ("siglip2", "sizes"): 3 * (15 + 256 + 36),
        ("internvl", "2tiles"): 2 * 64,
        ("internvit-6b", "2tiles"): 2 * 64,
    }
    assert "siglip2          same         ours  " in images.summary(found)
    only = rows(workloads=["same"], providers=["ours"])
    assert [(r["tower"], r["workload"]) for r in only] == [("siglip2", "same")]


@pytest.mark.parametrize("contest", [StepContest, Step3Contest, Siglip2Contest])
def test_who_is_inexact_gets_no_time(rows, monkeypatch, contest):
    parts = contest.parts
    monkeypatch.setattr(contest, "parts", lambda *a: [1.1 * x for x in parts(*a)])
    tower = next(
        n for n, t in TOWERS.items() if isinstance(t.build(CPU, torch.float32, 0), contest)
    )
    row = next(r for r in rows({tower: TOWERS[tower]}, providers=["ours"]))
    assert row["ms"] is None
    assert row["reason"].endswith(f"times that of {BASELINES[tower]}")
    assert f"{'-':>9}" in images.summary([row])


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_the_recorded_forward_is_that_of_the_tower(tower):
    contest = TOWERS[tower].build(CPU, torch.float32, 0)
    for workload in TOWERS[tower].workloads.values():
        inputs = contest.inputs(workload)
        recorded = contest.recorded_parts(contest.theirs_without_host(inputs)(), inputs)
        for got, expected in zip(recorded, contest.theirs(inputs), strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(contest.theirs(inputs, exact=True), contest.theirs(inputs))
        ours = contest.parts(contest.ours(inputs), inputs)
        for got, expected in zip(ours, contest.theirs(inputs), strict=True):
            assert rel_rms(got, expected) < 1e-5  # both round in fp32


@pytest.mark.parametrize("bad", ["nan", "fails"])
def test_who_fails_gets_no_time_and_spares_the_others(rows, monkeypatch, bad):
    parts = InternVLContest.parts

    def spoiled(*args):
        if bad == "fails":
            raise RuntimeError("out of memory")
        first, second = parts(*args)
        return [first, second * float("nan")]

    monkeypatch.setattr(InternVLContest, "parts", spoiled)
    hf, ours = rows({"internvl": TOWERS["internvl"]}, providers=["hf-eager-sdpa", "ours"])
    assert hf["ms"] > 0
    assert ours["ms"] is None
    assert {"nan": "error nan", "fails": "RuntimeError: out of memory"}[bad] in ours["reason"]
    assert ours["reason"] in images.summary([ours])


def test_a_plain_tower_is_never_called_hugging_faces(rows):
    step3 = {"step3": TOWERS["step3"]}
    with pytest.raises(ValueError, match="step3 has no hf-eager-sdpa, hf-exact-graph; leave"):
        rows(step3, ["two"], providers=["hf-eager-sdpa", "hf-exact-graph"])
    plain, ours = rows(step3, ["two"], providers=["plain-eager-sdpa", "ours"])
    assert (plain["provider"], ours["provider"]) == ("plain-eager-sdpa", "ours")
    other = {"siglip2": TOWERS["siglip2"]}
    with pytest.raises(ValueError, match=r"siglip2 has no plain-.* one of hf-eager-sdpa, hf-exact"):
        rows(other, ["same"], providers=["plain-eager-sdpa", "plain-exact-graph"])


@pytest.fixture
def tf32():
    """Allowed in convolutions and products meanwhile."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_the_oracle_computes_without_tf32(rows, tf32, monkeypatch):
    """By default torch rounds what fp32 convolutions multiply."""
    seen, theirs = [], Step3Contest.theirs

    def spied(self, inputs, *, exact=False):
        seen.append((exact, tf32()))
        return theirs(self, inputs, exact=exact)

    monkeypatch.setattr(Step3Contest, "theirs", spied)
    rows({"step3": TOWERS["step3"]}, ["two"], providers=["plain-eager-sdpa"])
    assert set(seen) == {(True, (False, False)), (False, (True, True))}


def test_published_towers_are_there_with_workloads_that_they_can_run():
    assert [name for name, tower in images.TOWERS.items() if tower.peer == "plain"] == ["step3"]
    names = {name: list(tower.workloads) for name, tower in images.TOWERS.items()}
    assert list(names) == [
        "step-3.7", "step3", "siglip2-base", "siglip2-so400m", "internvl3-8b", "internvl3-38b",
    ]  # fmt: skip
    assert set(names["step-3.7"]) - set(names["step3"]) == {"8whole+24"}
    assert set(names["internvl3-8b"]) - set(names["internvl3-38b"]) == {"52tiles"}


def test_time_that_is_over_is_noted(rows):
    budget = TimeBudget(1e-9)
    found = images.run(TOWERS, device=CPU, effort=EFFORT, time_budget=budget)
    assert found == []
    assert budget.skipped == [
        "step two",
        "step crops",
        "step3 two",
        "step3 crops",
        "siglip2 same",
        "siglip2 sizes",
        "internvl 2tiles",
        "internvit-6b 2tiles",
    ]


def test_unknown_names(rows, capsys):
    with pytest.raises(ValueError, match="provider theirs is not known"):
        rows(providers=["theirs"])
    with pytest.raises(ValueError, match="workload all is not known; use two, crops, same"):
        rows(workloads=["all"])
    with pytest.raises(ValueError, match="use bfloat16 or float16"):
        rows(dtype=torch.float32)
    assert main(["images", "--towers", "all", "--device", "cpu"]) == 2
    assert "tower all is not known; use step-3.7" in capsys.readouterr().err
