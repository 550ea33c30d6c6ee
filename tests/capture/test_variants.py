"""Rungs that are recorded in several ways, and which of them serves a batch."""

from collections import Counter

import pytest
import torch
from vitgraph.capture import EncoderCudaGraphManager, captured
from vitgraph.capture.graph import BudgetGraphMetadata as Graph

FORKED = 32  # tokens from which on a rung has two graphs
LONG = 48  # patches of a frame that is long
FEW, MANY = [(1, 8, 8)], [(1, 4, 8), (2, 4, 4)]  # both fill 16 tokens


@pytest.fixture
def forking_encoder(fake_encoder):
    class ForkingEncoder(fake_encoder):
        """The variant that serves a call is written into its results."""

        def __init__(self):
            super().__init__()
            self.asked = []
            self.warmed = Counter()

        def variants(self, limits):
            return ("short", "long") if limits.token_budget >= FORKED else ("short",)

        def variant_of(self, limits, items):
            self.asked.append((limits.token_budget, len(items)))
            pairs = sum(item.attention_pairs for item in items)
            is_long = pairs / sum(item.input_size for item in items) >= LONG
            return "long" if is_long and limits.token_budget >= FORKED else "short"

        def variant_forward(self, variant, inputs, outputs, limits):
            assert variant in self.variants(limits)
            self.warmed[limits.token_budget, variant] += 1
            self._forward(inputs["pixel_values"], inputs["grid"], outputs, limits.max_frames)
            outputs["pooler_output"][:, 0] = 7 if variant == "long" else 5

        def graph_forward(self, inputs, outputs, limits):
            raise AssertionError("an encoder with variants is asked for one of them")

    return ForkingEncoder()


@pytest.fixture(params=[1, 2])
def manager(forking_encoder, rerun_recorder, request):
    config = {"token_budgets": [16, 64], "num_slots": request.param}
    manager = EncoderCudaGraphManager(forking_encoder, config, recorder=rerun_recorder)
    manager.capture()
    return manager


def marks(manager, pixels_for, grid):
    """What the results say of the variant; the rest of them is right."""
    pixels = pixels_for(grid)
    got = manager.execute(pixels, grid)
    expected = manager._encoder.eager_forward(pixels, grid)
    assert torch.equal(got["pooler_output"][:, 1:], expected["pooler_output"][:, 1:])
    assert torch.equal(got["last_hidden_state"], expected["last_hidden_state"])
    return set(got["pooler_output"][:, 0].tolist())


def test_every_variant_is_warmed_up_and_recorded(manager, forking_encoder):
    # warmed up once, and run once after each recording
    slots = len(manager.ladder.ring.slots)
    assert forking_encoder.warmed == dict.fromkeys(
        [(16, "short"), (64, "short"), (64, "long")], 1 + slots
    )
    small, large = manager.ladder.rungs.values()
    assert [set(graph.recordings) for graph in small.graphs] == [{"short"}] * slots
    assert [set(graph.recordings) for graph in large.graphs] == [{"short", "long"}] * slots


def test_graphs_are_counted(manager):
    slots = len(manager.ladder.ring.slots)
    assert manager.get_num_graphs_to_capture() == 3 * slots


def test_memory_is_foretold_by_graph(forking_encoder, rerun_recorder, monkeypatch):
    """Buffers take 500 bytes and a graph 10."""
    recorded = []
    monkeypatch.setattr(
        captured, "BudgetGraphMetadata", lambda *args: recorded.append(args) or Graph(*args)
    )

    class Meter:
        def __init__(self, device):
            pass

        def settle(self):
            recorded.clear()

        def take(self):
            graphs = sum(len(args[1]) for args in recorded)
            recorded.clear()
            return 10 * graphs if graphs else 500

    monkeypatch.setattr(captured, "_Meter", Meter)
    config = {"token_budgets": [16, 32, 40, 48, 64]}
    manager = EncoderCudaGraphManager(forking_encoder, config, recorder=rerun_recorder)
    profile = manager.profile_memory()
    manager.capture()
    assert manager.stats()["bytes"] == 500 + 10 * (1 + 2 * 4)
    assert profile.total_bytes == pytest.approx(manager.stats()["bytes"], abs=len(manager.rungs))


@pytest.mark.parametrize("names", [(), ("short", "short")])
def test_variants_that_cannot_be_told_apart(forking_encoder, rerun_recorder, names):
    forking_encoder.variants = lambda limits: names
    manager = EncoderCudaGraphManager(
        forking_encoder, {"token_budgets": [16]}, recorder=rerun_recorder
    )
    with pytest.raises(ValueError, match="rung of 16 tokens; it must name one variant or more"):
        manager.capture()


def test_a_variant_that_was_not_recorded(manager, forking_encoder, pixels_for):
    forking_encoder.variant_of = lambda limits, items: "other"
    with pytest.raises(ValueError, match="'other' for the rung of 16 tokens, recorded as short; "):
        manager.execute(pixels_for(FEW), FEW)


def test_a_batch_is_served_by_its_variant(manager, pixels_for):
    layouts = [(FEW, 5), (FEW * 3, 7), (MANY * 3, 5), (FEW * 3, 7), (MANY, 5), (MANY + FEW * 3, 7)]
    for grid, mark in layouts * 2:
        assert marks(manager, pixels_for, grid) == {mark}
    assert manager.stats()["misses"] == 0


def test_variants_of_a_layout_are_asked_once(manager, forking_encoder, pixels_for):
    for _ in range(3):
        marks(manager, pixels_for, FEW * 3)
    assert forking_encoder.asked == [(64, 3)]
    # measured on another rung, the same items may take another graph
    for rung in [*manager.rungs, *manager.rungs]:
        got = manager.run_on(rung, pixels_for(FEW), FEW)["pooler_output"]
        assert set(got[:, 0].tolist()) == {5 if rung.token_budget == 16 else 7}
    assert forking_encoder.asked == [(64, 3), (16, 1), (64, 1)]


def test_each_replay_of_a_split_has_its_own(manager, pixels_for):
    grid = [*FEW * 4, *MANY * 4]
    assert marks(manager, pixels_for, grid) == {5, 7}
    assert manager.stats()["replays"] > 1


def test_a_refit_records_all_variants(manager, forking_encoder, pixels_for):
    manager.refit({32: 10, 64: 1}, background=False).result()
    assert forking_encoder.warmed[32, "short"] == forking_encoder.warmed[32, "long"] == 1
    assert [rung.token_budget for rung in manager.rungs] == [32, 64]
    assert marks(manager, pixels_for, FEW * 2) == {7}
    assert marks(manager, pixels_for, MANY * 2) == {5}
