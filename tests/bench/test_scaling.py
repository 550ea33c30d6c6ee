import json
from types import SimpleNamespace

import pytest
import torch
from vitgraph.bench import contest, scaling
from vitgraph.bench.__main__ import main
from vitgraph.bench.contest import OURS
from vitgraph.bench.scaling import Limits, image_points, occupancy_points, token_points
from vitgraph.bench.timing import Effort, TimeBudget
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.capture.config import automatic_slots
from vitgraph.encoder.vision_encoder import VisionEncoder

FAST = Effort(warmup_s=0.0, rounds=2, min_rounds=2)
SMALL = Limits(tokens=256, images=2, rung=128, factor=4, occupancies=(30, 100))


@pytest.fixture
def replays(monkeypatch, rerun_recorder):
    """Graphs of ours on the CPU; the automatic ladder ends at 128 tokens."""

    def capture(encoder, config):
        manager = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
        manager.capture()
        encoder.graphs = manager

    stream = SimpleNamespace(synchronize=lambda: None)
    for name, stand_in in {
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (1 << 30, 1 << 31),
        "current_stream": lambda *_: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(VisionEncoder, "capture", capture)
    monkeypatch.setattr("vitgraph.encoder.recordable.MAX_PATCHES", 512)
    monkeypatch.setattr("vitgraph.bench.ours_providers.require_cuda", lambda *_: None)


def run(axes=scaling.AXES, providers=("hf-eager-sdpa", *OURS), limits=SMALL, **kwargs):
    return scaling.run(
        ["tiny-qwen2-vl"],
        axes,
        providers,
        limits=limits,
        device="cpu",
        effort=FAST,
        log=lambda line: None,
        **kwargs,
    )


def test_tokens_double_from_64_to_65536():
    points = token_points(Limits())
    assert [p.tokens for p in points] == [2**k for k in range(6, 17)]
    for (_, h, w), *rest in (p.grids for p in points):
        assert rest == []
        assert w in (h, 2 * h)
    assert [p.tokens for p in token_points(scaling.QUICK_LIMITS)] == [64, 256, 1024, 4096, 16384]


@pytest.mark.parametrize(("patch", "side"), [(16, 28), (14, 32)])
def test_images_have_448_pixels_a_side(patch, side):
    points = image_points(Limits(), patch)
    assert [len(p.grids) for p in points] == [1, 2, 4, 8, 16, 32, 64]
    assert {grid for p in points for grid in p.grids} == {(1, side, side)}
    assert side * patch == 448


@pytest.mark.parametrize("rung", [64, 70, 100, 256, 1000, 16384])
def test_occupancy_fills_the_rung_within_its_slots(rung):
    points = occupancy_points(Limits(rung=rung))
    assert [p.label for p in points] == [f"live-{n}%" for n in range(10, 101, 10)]
    for percent, point in zip(range(10, 101, 10), points, strict=True):
        assert 0.85 * rung * percent / 100 - 1 <= point.tokens <= rung * percent / 100
        assert len(point.grids) <= automatic_slots(rung)[0]
    if rung == 16384:
        assert points[-1].tokens == rung
        assert points[-1].grids == ((1, 64, 64),) * 16


@pytest.mark.parametrize("wrong", [{"tokens": 63}, {"images": 0}, {"rung": 32}])
def test_limits_refuse(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        Limits(**wrong)


def test_rows_say_where_on_which_axis(replays):
    rows = run()
    assert [(r["axis"], r["workload"], r["provider"]) for r in rows] == [
        *(("tokens", f"tokens-{n}", p) for n in (64, 256) for p in ("hf-eager-sdpa", *OURS)),
        *(("images", f"images-{n}", p) for n in (1,) for p in ("hf-eager-sdpa", *OURS)),
        *(("occupancy", f"live-{n}%", p) for n in (30, 100) for p in OURS),
    ]
    by_name = {(r["workload"], r["provider"]): r for r in rows}
    assert by_name["tokens-64", "ours"]["tokens"] == 64
    assert by_name["images-1", "ours"]["images"] == 1
    live = by_name["live-30%", "ours-graph"]
    assert (live["rung_tokens"], live["live_share"]) == (128, live["tokens"] / 128)
    assert by_name["images-1", "ours"]["rung_tokens"] is None
    assert {r["floor_ms"] for r in rows} == {None}


def test_a_replay_costs_its_rung_and_past_the_largest_one_calls_are_eager(replays):
    by_name = {(r["workload"], r["provider"]): r for r in run(["tokens", "occupancy"])}
    small, large = by_name["tokens-64", "ours"], by_name["tokens-256", "ours"]
    assert (small["replays"], large["replays"]) == (1, 0)
    assert small["ms"] > 0
    assert large["ms"] > 0
    assert "runs it eagerly" in by_name["tokens-256", "ours-graph"]["reason"]
    for label in ("live-30%", "live-100%"):
        for provider in ("ours", "ours-graph"):
            row = by_name[label, provider]
            assert (row["padded_patches"], row["replays"]) == (4 * 128, 1)
            assert row["ms"] > 0
            assert row["max_err_ratio"] <= contest.MAX_ERR_RATIO
    assert by_name["live-30%", "ours-eager"]["padded_patches"] == 4 * (25 + 12)
    assert by_name["tokens-64", "hf-eager-sdpa"]["replays"] is None


def test_a_wrong_contender_gets_no_time(monkeypatch):
    right = VisionEncoder.eager_forward
    monkeypatch.setattr(
        VisionEncoder,
        "eager_forward",
        lambda self, x, g: {k: 1.5 * v for k, v in right(self, x, g).items()},
    )
    rows = run(["tokens"], ["hf-eager-sdpa", "ours-eager"])
    assert [r["ms"] is None for r in rows] == [False, True] * 2
    assert rows[1]["reason"].startswith("error is")


def test_an_oracle_that_does_not_fit_leaves_reasons(monkeypatch):
    def full(oracle, eager, job, merge):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(contest, "reference_of", full)
    rows = run(["tokens"], ["hf-eager-sdpa", "ours-eager"])
    assert len(rows) == 4
    for row in rows:
        assert row["ms"] is None
        assert row["reason"] == ("no oracle to check against: OutOfMemoryError: CUDA out of memory")


def test_a_call_out_of_memory_while_timed_spares_the_others(monkeypatch):
    right, calls = VisionEncoder.eager_forward, []

    def full_after_the_check(self, pixel_values, grid_thw):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, pixel_values, grid_thw)

    monkeypatch.setattr(VisionEncoder, "eager_forward", full_after_the_check)
    limits = Limits(tokens=64)
    ours, theirs = run(["tokens"], ["ours-eager", "hf-eager-sdpa"], limits)
    assert ours["ms"] is None
    assert ours["reason"] == "OutOfMemoryError: CUDA out of memory"
    assert theirs["ms"] > 0


class SomeAllowed(TimeBudget):
    """Time is over at some labels."""

    def allows(self, label):
        if label.endswith(("tokens-64", "images-1")):
            return True
        self.skipped.append(label)
        return False


def test_when_time_is_over_nothing_new_starts():
    budget = SomeAllowed()
    rows = run(providers=["hf-eager-sdpa", "ours-eager"], time_budget=budget)
    assert [r["workload"] for r in rows] == ["tokens-64"] * 2 + ["images-1"] * 2
    assert budget.skipped == [f"tiny-qwen2-vl {x}" for x in ("tokens-256", "live-30%", "live-100%")]


def test_no_tower_is_built_when_time_is_over(monkeypatch):
    monkeypatch.setattr(scaling, "Contest", lambda *_, **__: pytest.fail("it was built"))
    budget = TimeBudget(1e-9)
    assert run(time_budget=budget) == []
    assert len(budget.skipped) == 5


def test_command_line(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    options = ["--towers", "tiny-qwen3-vl", "--device", "cpu", "--quick", "--max-tokens", "64"]
    axes = ["--axes", "tokens", "--providers", "hf-eager-sdpa", "ours-eager"]
    assert main(["scaling", *options, *axes, "--budget-s", "500", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [r["workload"] for r in written["rows"]] == ["tokens-64"] * 2
    assert all(r["ms"] > 0 for r in written["rows"])
    meta = written["meta"]
    assert (meta["budget_s"], meta["not_run"], meta["plain"]) == (500.0, [], False)
    assert "tiny-qwen3-vl tokens-64" in capsys.readouterr().out
    assert main(["scaling", *options, *axes, "--budget-s", "1e-9", "--json", str(path)]) == 0
    meta = json.loads(path.read_text())["meta"]
    assert meta["not_run"] == ["tiny-qwen3-vl tokens-64"]
    assert "not run: tiny-qwen3-vl tokens-64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--axes", "size"], ["--towers", "x"], ["--max-tokens", "8"], ["--budget-s", "0"]],
)
def test_command_line_refuses(arguments, capsys):
    assert main(["scaling", "--device", "cpu", *arguments]) == 2
    assert "vitgraph bench: " in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_every_point_has_a_floor():
    limits = Limits(tokens=256, images=2, rung=256, factor=4, occupancies=(30, 100))
    rows = scaling.run(["tiny-qwen3-vl"], limits=limits, effort=FAST, log=lambda line: None)
    for row in rows:
        assert row["ms"] > 0, row
        assert row["floor_ms"] > 0
    assert {r["replays"] for r in rows if r["provider"] == "ours"} == {1}
