"""Memory of a ladder: foretold, and kept under a cap. CUDA's own numbers are GPU tests."""

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphManager, captured, memory
from vitgraph.capture.ladder import MemoryModel
from vitgraph.capture.memory import MemoryProfile, cap_rungs, profile_capture
from vitgraph.capture.protocol import RungLimits

CONFIG = {
    "token_budgets": [16, 64, 128],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 32,
}


@pytest.fixture
def thousand_bytes_each(monkeypatch):
    """A look at the memory finds 1000 bytes for the buffers and for each rung."""

    class Meter:
        def __init__(self, device):
            pass

        def settle(self):
            pass

        def take(self):
            return 1000

    monkeypatch.setattr(captured, "_Meter", Meter)


def test_profile_memory(thousand_bytes_each, encoder, rerun_recorder):
    manager = EncoderCudaGraphManager(encoder, CONFIG, recorder=rerun_recorder)
    profile = manager.profile_memory()
    assert profile.bytes_per_budget == {16: 1000, 64: 1000, 128: 2000}
    assert profile.total_bytes == 4000
    assert manager.ladder is None
    manager.capture()
    assert manager.stats()["bytes"] == 4000
    assert [rung["bytes"] for rung in manager.stats()["rungs"]] == [1000, 1000, 2000]
    with pytest.raises(RuntimeError, match="graphs are captured already"):
        manager.profile_memory()


def test_profile_memory_needs_cuda(encoder):
    with pytest.raises(RuntimeError, match="profile_memory: the encoder is on cpu"):
        EncoderCudaGraphManager(encoder, CONFIG).profile_memory()


@pytest.mark.parametrize(("max_bytes", "kept"), [(4000, [16, 64, 128]), (3999, [16, 64])])
def test_max_bytes_leaves_out_the_largest_rungs(
    thousand_bytes_each, encoder, rerun_recorder, pixels_for, max_bytes, kept
):
    config = {**CONFIG, "max_bytes": max_bytes}
    manager = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    manager.capture()
    assert [rung.token_budget for rung in manager.rungs] == kept
    pixels = pixels_for([(1, 16, 32)])
    found = manager.execute(pixels, [(1, 16, 32)])
    expected = encoder.eager_forward(pixels, [(1, 16, 32)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="max_bytes=100 is too small"):
        manager.refit({16: 1}, max_bytes=100)
    # judged by the rungs that are left, the rungs of 16 and 128 tokens take 3000 and 4000 bytes
    fitted = manager.refit({16: 1, 128: 1}, background=False).result()
    assert (fitted == (16, 128)) == (max_bytes == 4000)


def test_rungs_that_a_cap_pays_for():
    rungs = tuple(RungLimits(budget, 4 * budget, 8, 8, 0) for budget in (16, 64))
    profile = MemoryProfile(840, {16: 100, 64: 740}, MemoryModel(10.0, 100.0))
    assert cap_rungs(rungs, profile, 840) == rungs
    assert cap_rungs(rungs, profile, 839) == cap_rungs(rungs, profile, 260) == rungs[:1]
    with pytest.raises(ValueError, match="max_bytes=259 is less than the 260 bytes"):
        cap_rungs(rungs, profile, 259)


def test_max_bytes_below_the_smallest_rung(thousand_bytes_each, encoder, rerun_recorder):
    manager = EncoderCudaGraphManager(
        encoder, {**CONFIG, "max_bytes": 1999}, recorder=rerun_recorder
    )
    with pytest.raises(ValueError, match="raise it to 2000"):
        manager.capture()
    assert manager.ladder is None


def test_what_small_rungs_share_is_counted_once(encoder, rerun_recorder, monkeypatch):
    """The smallest rung alone takes a workspace, which would not come again with every rung."""
    weights = {4: [7000, 1000, 1000, 21_000], 1: [13_000]}  # four samples; the middle one alone
    monkeypatch.setattr(memory, "_weigh", lambda encoder, rungs, *_: weights[len(rungs)])
    budgets = [16, 24, 32, 48, 64, 80, 96, 128]
    manager = EncoderCudaGraphManager(encoder, {"token_budgets": budgets}, recorder=rerun_recorder)
    profile = profile_capture(encoder, manager.rungs, recorder=rerun_recorder, num_slots=1)
    per_token = (21_000 - 13_000) / (128 - 64)
    assert profile.model.bytes_per_token == per_token
    assert profile.model.bytes_per_rung == 1000
    # the largest, seven further rungs, and once what the smallest took above them
    assert profile.total_bytes == 21_000 + 7 * 1000 + 6000
