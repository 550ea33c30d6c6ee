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
    # calls that are not counted for a tenth of a second, one at least; then as many as needed
    assert runs.count((None, 8, 4048)) == 2
    full = max(run for run in runs if run[0] == 4096)
    assert runs.count(full) == 5


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


@pytest.mark.parametrize("busy_times", [1, 2, 3])
def test_eager_calls_are_measured_until_two_times_agree(encoder, monkeypatch, busy_times):
    clock, times = [0.0], {}
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])

    def run_on(rung, pixels, grid):
        key = len(grid), len(pixels)
        if rung is None and times.setdefault(key, [None, 0])[0] != last[0]:
            times[key] = [last[0], times[key][1] + 1]
        busy = rung is None and key[0] == 1 and times[key][1] <= busy_times
        # no two busy times are alike
        clock[0] += 0.01 * (1.2 + times[key][1] * 0.1 if busy else 1)

    last = [0]
    time = calibration._time

    def counted(device, work):
        last[0] += 1
        return time(device, work)

    monkeypatch.setattr(calibration, "_time", counted)
    rungs = [encoder.rung_limits(budget, 16, 16) for budget in (16, 2048)]
    samples = calibration.calibrate(encoder, rungs, run_on)
    assert [sample.us for sample in samples] == pytest.approx([10_000] * len(samples))
    taken = {key: count for key, (_, count) in times.items()}
    assert {count for (items, _), count in taken.items() if items > 1} == {2}
    assert {count for (items, _), count in taken.items() if items == 1} == {busy_times + 2}


def test_long_calls_forget_what_ran_before(encoder, monkeypatch):
    """A GPU at its limit of power: for 90 ms a call is slower by what it ran before."""
    clock, last, since = [0.0], [None], [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])

    def run_on(rung, pixels, grid):
        if last[0] != (rung, len(grid)):
            last[0], since[0] = (rung, len(grid)), clock[0]
        clock[0] += 0.03 * (1.1 if clock[0] - since[0] < 0.09 else 1)

    rungs = [encoder.rung_limits(budget, 16, 16) for budget in (2048, 4096)]
    samples = calibration.calibrate(encoder, rungs, run_on)
    assert [sample.us for sample in samples] == pytest.approx([30_000] * len(samples))
