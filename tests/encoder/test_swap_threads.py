"""Threads that call one swapped tower while a change of it is followed."""

import pytest
import torch
from vitgraph.encoder import VisionEncoder, hf_tower, swap_vision_tower
from vitgraph.kernels.testing import rel_rms

FEATURES_BAR = 2.2e-5  # see test_swap_changes.py


def call_of(model, call):
    """`call()` of the tower without gradients, which are a matter of each thread."""

    def run():
        with torch.no_grad():
            return model.model.visual(*call()).pooler_output

    return run


@pytest.mark.parametrize("change", ["values", "storage"])
def test_one_thread_follows_and_the_other_waits(change, qwen3, call, meet):
    tower, work = qwen3.model.visual, call_of(qwen3, call)
    handle = swap_vision_tower(qwen3, graphs=False)
    before = work()
    changed = {name: 1.1 * value for name, value in tower.state_dict().items()}
    tower.load_state_dict(changed, assign=change == "storage")
    if change == "values":
        inside = handle.encoder, "load_weights"
    else:
        inside = handle, "_new_encoder"
    entries, results = meet(handle, inside, work, work)
    assert entries == ["first"]
    stats = handle.stats()
    assert (stats.refreshes, stats.rebuilds) == ((1, 0) if change == "values" else (0, 1))
    assert stats.fused_calls == 3
    handle.restore()
    want = work()
    assert rel_rms(before, want) > 1e-3
    for result in results:
        assert rel_rms(result, want) <= FEATURES_BAR


def test_calls_on_other_streams_wait_for_new_weights(qwen3, call, monkeypatch):
    notes = []

    class Notes:
        def __init__(self, device):
            assert device == handle.encoder.device
            notes.append("written")

        def order_reads(self):
            notes.append("ordered")

    def noted(name):
        own = getattr(VisionEncoder, name)

        def method(self, *args):
            notes.append(name)
            return own(self, *args)

        monkeypatch.setattr(VisionEncoder, name, method)

    monkeypatch.setattr(hf_tower, "Written", Notes)
    for name in ("load_weights", "__call__"):
        noted(name)
    work, read = call_of(qwen3, call), ["ordered", "__call__"]
    handle = swap_vision_tower(qwen3, graphs=False)
    work()
    handle.refresh()
    work()
    work()
    assert notes == ["__call__", "load_weights", "written", *read, *read]
    qwen3.double()
    work()
    assert notes[7:] == ["written", *read]


def test_a_call_waits_for_a_refresh(qwen3, call, meet):
    work = call_of(qwen3, call)
    handle = swap_vision_tower(qwen3, graphs=False)
    qwen3.model.visual.blocks[1].attn.proj.bias.data.mul_(30)
    entries, (_, result) = meet(handle, (handle.encoder, "load_weights"), handle.refresh, work)
    assert entries == ["first"]
    assert handle.stats().refreshes == 1
    handle.restore()
    assert rel_rms(result, work()) <= FEATURES_BAR


def test_a_restore_waits_for_an_encoder_being_built(qwen3, call, meet, monkeypatch):
    """Else its graphs would never be freed."""
    released = []
    monkeypatch.setattr(VisionEncoder, "release_graphs", lambda self: released.append(self))
    work = call_of(qwen3, call)
    handle = swap_vision_tower(qwen3, graphs=False)
    first = handle.encoder
    qwen3.double()
    entries, (result, _) = meet(handle, (handle, "_new_encoder"), work, handle.restore)
    assert entries == ["first"]
    assert released == [first, handle.encoder]
    assert handle.encoder is not first
    assert not handle.is_active
    assert rel_rms(result, work()) <= FEATURES_BAR
