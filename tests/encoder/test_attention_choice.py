"""Which attention backend serves a layout, in graphs and out of them."""

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.capture import EncoderCudaGraphConfig
from vitgraph.capture.staging import allocate
from vitgraph.encoder import VisionEncoder, recordable
from vitgraph.kernels.attention import LongSegments

LONG, ENOUGH = 100, 160  # patches of a frame, and of a call
SMALL, LARGE, VIDEO = (1, 4, 8), (1, 12, 12), (4, 6, 8)


@pytest.fixture
def hf():
    return towers.empty_tower(towers.tower_config("tiny-qwen3-vl"), device="cpu", dtype=torch.half)


@pytest.fixture
def choose(monkeypatch):
    """A machine on which another backend is faster for long frames."""

    def choose(device, dtype, head_dim, segment_rows=0.0, num_rows=0):
        return "far" if segment_rows >= LONG and num_rows >= ENOUGH else "near"

    monkeypatch.setattr(recordable, "choose_backend", choose)


@pytest.fixture
def used(monkeypatch):
    """The backends of the forwards that ran."""
    taken = []

    def forward(weights, batch, outputs, *, attention, states=None):
        taken.append(attention)

    monkeypatch.setattr(recordable, "tower_forward", forward)
    return taken


def rungs_of(encoder, *budgets):
    return EncoderCudaGraphConfig(token_budgets=budgets).resolve(encoder)


def test_a_rung_has_a_graph_for_long_frames_if_it_holds_one(hf, choose):
    encoder = VisionEncoder.from_hf(hf)
    small, large = rungs_of(encoder, 36, 64)
    assert LONG < small.max_patches < ENOUGH <= large.max_patches
    assert encoder.variants(small) == ("near",)
    assert encoder.variants(large) == ("near", "far")


def test_the_fingerprint_says_where_long_begins(hf, choose, monkeypatch):
    encoder = VisionEncoder.from_hf(hf)
    before = encoder.fingerprint()
    assert "near far" in before
    monkeypatch.setattr(recordable, "long_segments", lambda head_dim: LongSegments(1, 2))
    assert encoder.fingerprint() != before


@pytest.mark.parametrize(
    ("grids", "backend"),
    [
        ([LARGE], "near"),  # 144 are not enough
        ([LARGE] * 2, "far"),
        ([SMALL], "near"),
        ([VIDEO], "near"),  # 192 patches, in frames of 48
        ([LARGE, SMALL], "far"),  # 124 on average over patches, 88 over frames
        ([LARGE] + 4 * [SMALL], "near"),  # 91
        ([VIDEO] + 2 * [LARGE], "far"),  # 106
    ],
)
def test_the_mean_frame_of_a_patch_decides(hf, choose, used, grids, backend):
    encoder = VisionEncoder.from_hf(hf)
    (rung,) = rungs_of(encoder, 256)
    assert encoder.variant_of(rung, encoder.item_specs(grids)) == backend
    patches = sum(t * h * w for t, h, w in grids)
    encoder.eager_forward(torch.zeros(patches, encoder.spec.patch_values), grids)
    assert used == [backend]


def test_a_variant_is_recorded_with_its_backend(hf, choose, used):
    encoder = VisionEncoder.from_hf(hf)
    (rung,) = rungs_of(encoder, 64)
    inputs = allocate(encoder.input_specs(rung), encoder.device)
    outputs = allocate(encoder.output_specs(rung), encoder.device)
    for variant in encoder.variants(rung):
        encoder.variant_forward(variant, inputs, outputs, rung)
    encoder.graph_forward(inputs, outputs, rung)
    assert used == ["near", "far", "near"]


def test_a_backend_that_was_asked_for_serves_everything(hf, choose):
    encoder = VisionEncoder.from_hf(hf, attention="reference")
    (rung,) = rungs_of(encoder, 256)
    assert encoder.variants(rung) == ("reference",)
    assert encoder.variant_of(rung, encoder.item_specs([LARGE])) == "reference"
