"""Which calls calibration measures, and how often, by a clock of its own."""

import pytest
from vitgraph.capture import calibration


def test_what_calibration_runs(encoder, monkeypatch):
    clock = [0.0]
    runs = []
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])
    seconds = {16: 0.002, 2048: 0.02, 4096: 0.06, None: 0.3}

    def run_on(rung, pixels, grid):
        budget = None if rung is None else rung.token_budget
        patches = sum(t * h * w for t, h, w in grid)
        assert pixels.shape == (patches, 6)
        runs.append((budget, len(grid), patches // 4))
        # the first calls after a while find everything idle
        clock[0] += seconds[budget] * (3 if clock[0] < 0.4 else 1)

    rungs = [encoder.rung_limits(budget, 16, 16) for budget in (16, 2048, 4096)]
    samples = calibration.calibrate(encoder, rungs, run_on)
    for sample in samples:
        assert sample.us == pytest.approx(1e6 * seconds[sample.token_budget])
    # large rungs also in eight images; up to four times the largest
    eager = {run for run in runs if run[0] is None}
    assert {(8, 4048), (16, 2 * 4048), (32, 4 * 4048)} <= {run[1:] for run in eager}
    assert {run[::2] for run in runs if run[1] == 8} == {(4096, 4048), (None, 4048)}
    # one call that is not counted, and then as many as long and short ones need
    assert runs.count((None, 8, 4048)) == 2
    full = max(run for run in runs if run[0] == 4096)
    assert runs.count(full) == 4


def test_short_eager_calls_forget_a_host_that_was_busy(encoder, monkeypatch):
    clock = [0.0]
    calls = {16: 0, 2048: 0, None: 0}
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])

    def run_on(rung, pixels, grid):
        budget = None if rung is None else rung.token_budget
        calls[budget] += 1
        # the host is busy until some eager calls are done: more than one sample takes
        clock[0] += 0.01 * (1.6 if budget is None and calls[None] < 12 else 1)

    rungs = [encoder.rung_limits(budget, 16, 16) for budget in (16, 2048)]
    samples = calibration.calibrate(encoder, rungs, run_on)
    assert calls[None] > 24
    for sample in samples:
        assert sample.us == pytest.approx(10_000)
    loads = [(sample.token_budget, sample.load) for sample in samples]
    assert len(set(loads)) == len(loads)


def test_calls_with_like_shares_of_attention_follow_each_other(encoder):
    rungs = [encoder.rung_limits(budget, 16, 16) for budget in (16, 512, 2048, 4096)]
    samples = calibration.calibrate(encoder, rungs, lambda *_: None)
    frames = [sample.load.pairs / sample.load.patches for sample in samples]
    assert frames == sorted(frames)
    assert frames[-1] > 2 * frames[len(frames) // 2] > 0
