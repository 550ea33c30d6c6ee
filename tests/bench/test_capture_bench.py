"""The capture benchmark: its figures and tables, and every section on stand-ins for CUDA."""

import json
from types import SimpleNamespace

import pytest
import torch
from vitgraph.bench import capture, capture_calls, capture_ladder, capture_refit
from vitgraph.bench.__main__ import main
from vitgraph.bench.capture_session import Session, holding, random_layouts
from vitgraph.bench.timing import Effort
from vitgraph.bench.towers_config import build_tower
from vitgraph.capture import EncoderCudaGraphManager, fit_budgets, generate_budgets
from vitgraph.encoder.vision_encoder import VisionEncoder

FAST = Effort(warmup_s=0.0, rounds=2, min_rounds=2)
BUDGETS = [16, 24, 32, 48, 64, 80, 96, 128, 160, 192]


class Event:
    def __init__(self, **_):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 1.5


@pytest.fixture
def session(monkeypatch, tmp_path, rerun_recorder):
    """A tiny tower on the CPU; what the sections ask of torch.cuda does nothing."""
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    free = iter(range(1 << 30, 0, -(1 << 20)))
    stream = SimpleNamespace(synchronize=lambda: None)
    for name, stand_in in {
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (next(free), 1 << 31),
        "current_stream": lambda *_: stream,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr("vitgraph.capture.calibration._SECONDS_PER_SAMPLE", 0.0)
    monkeypatch.setattr("vitgraph.capture.calibration._MEASURED_RUNGS", 4)
    monkeypatch.setattr(Session, "squares", lambda self, count: [(1, 4, 8)] * count)
    monkeypatch.setattr(capture_calls, "_OVERLAPPED_CALLS", 2)
    monkeypatch.setattr(capture_calls, "_SETTLE_S", 0.0)
    monkeypatch.setattr(capture_calls, "_COUNT_S", 0.0)
    monkeypatch.setattr(capture_ladder, "_REPLAYED_TOKENS", 1)
    tower = build_tower("tiny-qwen3-vl", device="cpu", dtype=torch.float32)
    encoder = VisionEncoder.from_hf(tower)
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": BUDGETS}, recorder=rerun_recorder)
    return Session(encoder, manager, FAST, 4, 0, [], recorder=rerun_recorder)


@pytest.mark.parametrize("name", capture.SECTIONS)
def test_a_section_runs_alone_and_prints(session, name):
    if name == "ladder":
        # what has no CUDA device weighs nothing
        session.manager.profile_memory = lambda: SimpleNamespace(total_bytes=3 << 20)
    printed = []
    (row,) = capture.run_sections(session, {name: capture.SECTIONS[name]}, printed.append)
    assert "error" not in row, row["error"]
    assert row["section"] == name
    assert row["section_s"] > 0
    assert len(printed) == 1
    json.dumps(row)
    if name == "refit":
        assert row["same_on_kept_rungs"]
        assert row["same_as_run_on"]
        assert row["new_rungs"] > 0
        assert row["kept_rungs_checked"] >= 2
    if name == "calibration":
        assert row["samples"] == len(session.samples) > 0
        assert row["same_from_cache"]
    if name == "dispatch":
        assert len(row["layouts"]) == 4
        assert row["layouts"][-1]["tokens"] > BUDGETS[-1]
        assert sum(row["ways"].values()) == 4


def test_a_call_is_timed_among_calls_of_its_own_kind(monkeypatch):
    events, clock, since = [], [0.0], [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(capture_calls.time, "perf_counter", lambda: clock[0])

    def call(name, ms):
        if events[-1:] != [name]:
            since[0] = clock[0]
        events.append(name)
        # what ran before shows for 90 ms
        clock[0] += ms * 1e-3 * (1.5 if clock[0] - since[0] < 0.09 else 1)

    calls = {name: lambda n=name, ms=ms: call(n, ms) for name, ms in (("a", 1), ("b", 40))}
    (times,) = capture_calls.settled_ms([calls], 20, 0)
    assert times == {"a": pytest.approx(1), "b": pytest.approx(40)}
    # in random order, and a short call more often than a long one
    assert events.count("a") > 5 * events.count("b") > 5 * 20 * 3
    starts = "".join(name for name, before in zip(events, ["", *events], strict=False)
                     if name != before)  # fmt: skip
    assert 20 < len(starts) < 40


def test_a_host_that_was_busy_for_most_turns_does_not_show(monkeypatch):
    clock, total = [0.0], 1.8
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(capture_calls.time, "perf_counter", lambda: clock[0])

    def call():
        # a third of the time is quiet, and what comes last is not
        quiet = 0.35 * total < clock[0] < 0.7 * total
        clock[0] += 1e-3 * (1 if quiet else 1.1)

    # 2 x 2 x 3 turns of 0.15 s: the quiet ones are the second of each contest
    contests = [{"a": call, "b": call}] * 2
    times = capture_calls.settled_ms(contests, 3, 0)
    assert clock[0] == pytest.approx(total, rel=0.02)
    assert times == [{"a": pytest.approx(1), "b": pytest.approx(1)}] * 2


def test_a_failing_section_spares_the_others(session):
    def broken(_):
        error = RuntimeError("out of memory")
        error.add_note("while capturing the rung of 16384 tokens")
        raise error

    printed = []
    sections = {"ladder": (broken, str), "refit": (lambda _: {"fine": 1}, str)}
    failed, fine = capture.run_sections(session, sections, printed.append)
    assert failed["error"] == (
        "RuntimeError: out of memory; while capturing the rung of 16384 tokens"
    )
    assert fine["fine"] == 1
    assert "ladder failed: RuntimeError: out of memory" in capture.summary(
        [failed, fine | NO_REFIT]
    )


NO_REFIT = {"section": "other"}
MET = [
    {
        "section": "ladder", "warm_s": 9.0, "bytes": 1000, "ratio_to_largest": 1.2,
        "profile_error": -0.05, "bytes_left_by_clear": 0,
    },
    {
        "section": "live_length",
        "rungs": [
            {"token_budget": 64, "asked_share": 0.6, "time_share": 0.99},
            {"token_budget": 16384, "asked_share": 0.3, "time_share": 0.99},
            {"token_budget": 16384, "asked_share": 0.6, "time_share": 0.7},
        ],
    },
    {"section": "dispatch", "worst_ratio": 1.02},
    {"section": "overlap", "speedup": 1.2},
    {"section": "refit", "same_on_kept_rungs": True, "same_as_run_on": True},
]  # fmt: skip
CHANGES = [
    (0, {"warm_s": 15.5}), (0, {"ratio_to_largest": 1.3}), (0, {"profile_error": -0.11}),
    (0, {"bytes_left_by_clear": 100}), (2, {"worst_ratio": 1.04}), (3, {"speedup": 0.9}),
    (4, {"same_on_kept_rungs": False}), (4, {"same_as_run_on": False}),
]  # fmt: skip


def test_targets_met():
    found = capture.verdicts(MET)
    assert len(found) == 8
    assert all(met for *_, met in found)
    assert "rung 16384, 60 % live / full" in capture.summary(MET)
    assert "MISSED" not in capture.summary(MET)


@pytest.mark.parametrize(("place", "change"), CHANGES)
def test_targets_missed(place, change):
    rows = [dict(row) for row in MET]
    rows[place].update(change)
    assert sum(not met for *_, met in capture.verdicts(rows)) == 1
    assert capture.summary(rows).count("MISSED") == 1


def test_random_layouts_are_seeded_and_span_the_sizes():
    layouts = random_layouts(60, 3, merge=2, largest=16384)
    assert layouts == random_layouts(60, 3, merge=2, largest=16384)
    assert layouts != random_layouts(60, 4, merge=2, largest=16384)
    tokens = [sum(t * h * w // 4 for t, h, w in grid) for grid in layouts]
    assert min(tokens) < 64
    assert tokens[-1] > 16384
    assert max(tokens) < 1.5 * 16384
    items = {len(grid) for grid in layouts}
    assert min(items) == 1
    assert 12 < max(items) <= 24
    assert {t > 1 for grid in layouts for t, _, _ in grid} == {True, False}
    assert all(h % 2 == w % 2 == 0 for grid in layouts for _, h, w in grid)


def test_the_refit_histogram_makes_each_of_its_sizes_a_rung():
    budgets = generate_budgets(16, 16384)
    histogram = capture_refit.refit_histogram(budgets)
    assert 16384 in histogram
    kept = set(histogram) & set(budgets)
    assert len(kept) >= 15
    assert len(set(histogram) - kept) >= 6
    fitted = fit_budgets(histogram, max_budget=16384, max_rungs=len(histogram))
    assert set(fitted) == set(histogram)


def test_live_images_divide_a_rung(session):
    for rung in session.manager.rungs:
        images = capture_ladder.live_images(session, rung)
        assert 0.9 <= session.tokens(images) / rung.token_budget <= 1
        assert len(images) >= min(8, rung.max_items)


def test_holding(session):
    items = session.encoder.item_specs([(1, 8, 8)] * 3)  # 48 tokens
    assert [rung.token_budget for rung in holding(session.manager, items)] == BUDGETS[3:]
    assert holding(session.manager, session.encoder.item_specs([(1, 2, 2)] * 30)) == []


def test_regret_and_latency():
    rows = [{"ratio": 1.0, "way": "replay"}, {"ratio": 1.05, "way": "eager"}]
    assert capture_calls.regret(rows) == {
        "worst_ratio": 1.05, "mean_ratio": 1.025, "median_ratio": 1.025, "over_limit": 1,
        "ways": {"replay": 1, "eager": 1},
    }  # fmt: skip
    found = capture_refit.latency(list(range(1, 102)))
    assert (found["calls"], found["p50_ms"], found["p99_ms"], found["max_ms"]) == (
        101,
        51,
        100,
        101,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_without_cuda_one_clear_error(tmp_path, capsys):
    path = tmp_path / "capture.json"
    assert main(["capture", "--quick", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitgraph bench: capture needs a CUDA device")
    assert error.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tower", "qwen9"], "tower 'qwen9' is not known"),
        (["--sections", "ladder", "speed"], "section 'speed' is not known"),
        (["--layouts", "0"], "--layouts 0 must be at least 1"),
        (["--sections", "ladder", "--samples", "s.json"], "calibration"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    assert main(["capture", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [({}, 0), ({"error": "RuntimeError: no luck"}, 1)])
def test_command_line_writes_both_files(tmp_path, capsys, monkeypatch, error, code):
    samples = [{"token_budget": None, "load": {}, "us": 1.0}]
    rows = [{"section": "calibration", **error}]
    asked = {}

    def run(tower, sections, **options):
        asked.update(options, tower=tower, sections=sections)
        return rows, samples

    monkeypatch.setattr(capture, "run", run)
    paths = tmp_path / "capture.json", tmp_path / "calibration.json"
    arguments = ["--json", str(paths[0]), "--samples", str(paths[1]), "--quick", "--seed", "7"]
    assert main(["capture", "--tower", "qwen2-vl-7b", *arguments]) == code
    assert (asked["tower"], asked["seed"], asked["quick"]) == ("qwen2-vl-7b", 7, True)
    written, kept = (json.loads(path.read_text()) for path in paths)
    assert written["rows"] == rows
    assert written["meta"]["command"].startswith("vitgraph bench capture --tower qwen2-vl-7b")
    assert kept["samples"] == samples
    assert kept["tower"] == "qwen2-vl-7b"
    assert {"gpu", "commit", "dirty", "torch"} <= kept.keys()
    assert ("no luck" in capsys.readouterr().out) == bool(error)


def test_packing_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitgraph.bench.packing.waste_rows", lambda: [])
    path = tmp_path / "packing.json"
    assert main(["packing", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["rows"] == []
    assert "waste %" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    rows, samples = capture.run("tiny-qwen3-vl", quick=True, layouts=4, log=lambda line: None)
    assert [row.get("error") for row in rows] == [None] * len(capture.SECTIONS)
    assert samples
