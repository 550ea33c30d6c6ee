"""Dispatch by cost in a manager, and calibrations that it keeps, on the CPU."""

from functools import partial

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphManager, MeasuredCosts
from vitgraph.capture.calibration import cache_path
from vitgraph.capture.cost import EagerCurve, Terms

BUDGETS = (16, 64, 128)
IMAGE = (1, 8, 8)  # 16 tokens
SMALL = (1, 4, 4)  # 4 tokens
HUGE = (1, 32, 32)  # 256 tokens, more than any budget
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def measured(replay_us, eager_us):
    replays = tuple((budget, Terms(replay_us, 0.0, 0.0)) for budget in BUDGETS)
    return MeasuredCosts(replays, EagerCurve(eager_us, (0, 4096), (eager_us, eager_us), 0.0))


def test_what_is_cheaper_runs_eagerly(encoder, manager, pixels_for):
    grid = [IMAGE, SMALL, (3, 4, 6)]
    pixels = pixels_for(grid)
    manager.use_costs(measured(replay_us=100.0, eager_us=10.0))
    assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))
    assert manager.stats()["eager_reasons"] == {"cheaper": 3}
    manager.use_costs(measured(replay_us=10.0, eager_us=100.0))
    assert_same(manager.execute(pixels, grid), encoder.eager_forward(pixels, grid))
    assert manager.stats()["hits"] == 3
    manager.clear()
    manager.capture()
    assert not isinstance(manager.costs, MeasuredCosts)


def test_calibration_is_kept_in_a_file(encoder, make, tmp_path, monkeypatch):
    monkeypatch.setattr("vitgraph.capture.calibration._SECONDS_PER_SAMPLE", 0.0)
    manager = make()
    costs = manager.calibrate()
    assert manager.costs is costs
    path = cache_path(encoder, manager.rungs)
    assert path.parent == tmp_path / "calibration"
    assert list(path.parent.iterdir()) == [path]
    written = path.stat().st_mtime_ns, path.read_text()

    again = make()
    monkeypatch.setattr(encoder, "eager_forward", None)  # would be called by a measurement
    assert again.calibrate() == costs
    assert (path.stat().st_mtime_ns, path.read_text()) == written
    assert make(calibrate=True).costs == costs
    assert manager.stats()["items"] == 0  # measurements are not counted

    # another ladder has another file
    monkeypatch.undo()
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))
    make(token_budgets=[16, 32]).calibrate()
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"samples": [{"us": 1}]}', '{"samples": []}']
)
def test_a_damaged_calibration_file(encoder, manager, content, monkeypatch):
    monkeypatch.setattr("vitgraph.capture.calibration._SECONDS_PER_SAMPLE", 0.0)
    path = cache_path(encoder, manager.rungs)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is damaged .*use_cache=False"):
        manager.calibrate()
    costs = manager.calibrate(use_cache=False)
    assert manager.calibrate() == costs


def test_calibrate_needs_a_capture(encoder, rerun_recorder):
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": BUDGETS}, recorder=rerun_recorder)
    with pytest.raises(RuntimeError, match="calibrate: nothing is captured"):
        manager.calibrate()
