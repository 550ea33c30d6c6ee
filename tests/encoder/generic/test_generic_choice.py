"""Which tier a tower gets, and that a tower which cannot be captured is refused with its reason."""

import json
import sys

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.vision_utils import get_vision_position_ids
from typer.testing import CliRunner
from vitgraph.encoder import VisionEncoder, encoder_for, towers
from vitgraph.encoder.cli import app
from vitgraph.encoder.families import FAMILIES
from vitgraph.encoder.generic import GenericEncoder
from vitgraph.encoder.towers import tower_report

REASONS = {
    # from transformers 5.23 on it has segments, and one pooled row for all of them
    "minimax_m3_vl": "computes no cu_seqlens|1 rows are neither",
    "video_llama_3": "needs merge_sizes beside grid_thw",
    "hunyuan_vl": r"rows are neither the 104 patches nor the 26 tokens",
    "muse_glimmer": r"needs values \(aten\._local_scalar_dense",
    "cosmos3_edge": r"modeling_cosmos3_edge\.py:\d+ .*needs values \(aten\._local_scalar_dense",
    "minicpmv4_6": r"takes \(pixel_values, target_sizes.*not packed pixel rows",
    "siglip2": r"takes \(pixel_values, pixel_attention_mask, spatial_shapes.*not packed pixel rows",
    "step3p7": r"takes \(pixel_values, kwargs\), not packed pixel rows",
}
FUSED = {name for family in FAMILIES.values() for name in family.tower_classes}


def test_refusals_say_why(build, refused_type):
    tower = build(refused_type)
    with pytest.raises(ValueError, match=REASONS[refused_type]) as caught:
        encoder_for(tower, tier="generic")
    assert str(caught.value).startswith(f"{type(tower).__name__} ")
    assert tower.config._attn_implementation == "sdpa"


def test_report_says_what_happens(build, model_type):
    tower = build(model_type)
    name = type(tower).__name__
    tiers = {support.tower_class: support.tier for support in tower_report()}
    assert tiers[name] == ("fused" if name in FUSED else "generic")
    encoder = encoder_for(tower)
    assert isinstance(encoder, VisionEncoder if name in FUSED else GenericEncoder)
    assert isinstance(encoder_for(tower, tier="generic"), GenericEncoder)


def test_report_of_refused(build, refused_type):
    name = type(build(refused_type)).__name__
    support = next(s for s in tower_report() if s.tower_class == name)
    # these have encoders of their own
    has_own = refused_type in ("siglip2", "step3p7")
    assert support.tier == ("fused" if has_own else "refused")
    assert support.reason


def test_info_lists_towers():
    result = CliRunner().invoke(app, ["info", "--json"])
    listed = json.loads(result.stdout)["towers"]
    assert listed["Qwen3VLVisionModel"] == "fused"
    assert listed["Siglip2VisionModel"] == "fused: padded batches, by Siglip2Encoder"
    assert listed["MiniCPMV4_6VisionModel"].startswith("refused: takes target_sizes")
    text = CliRunner().invoke(app, ["info"]).stdout
    assert "  MiniCPMV4_6VisionModel  refused: takes target_sizes" in text


def test_classes_of_other_versions(monkeypatch, tmp_path):
    """Fused towers without a class are said to have none: they can be read, but not swapped."""
    assert all(support.is_installed for support in tower_report())
    older = tmp_path / "models"
    for folder, tower in (("qwen3_vl", "Qwen3VLVisionModel"), ("glm4v", "Glm4vVisionModelOld")):
        (older / folder).mkdir(parents=True)
        (older / folder / f"modeling_{folder}.py").write_text(f"x = 1\nclass {tower}(Base):\n")
    (older / "glm_image").mkdir()  # a folder without the class, as after a renaming
    monkeypatch.setattr(towers, "_transformers_folders", lambda: [tmp_path])
    found = {support.tower_class: support.is_installed for support in tower_report()}
    assert [name for name, installed in found.items() if installed] == ["Qwen3VLVisionModel"]
    assert found.keys() == FUSED | towers.OWN_ENCODERS.keys()
    lines = CliRunner().invoke(app, ["info"]).stdout.splitlines()
    assert "  Qwen3VLVisionModel  fused" in lines
    assert "  Glm4vVisionModel  fused: not in the installed transformers" in lines
    step = "  Step3p7VisionModel  fused: whole images and crops, by StepEncoder; not in the"
    assert f"{step} installed transformers" in lines


def test_bad_choices(build):
    tower = build("glm_image")
    with pytest.raises(ValueError, match="'best' must be one of auto, fused, generic"):
        encoder_for(tower, tier="best")
    with pytest.raises(ValueError, match="leave precision = 'fp8' out"):
        encoder_for(tower, tier="generic", precision="fp8")
    with pytest.raises(ValueError, match="unknown backend 'fa9'"):
        encoder_for(tower, tier="generic", attention="fa9")
    with pytest.raises(ValueError, match=r"are on \['meta'\]"):
        encoder_for(tower.to("meta"), tier="generic")
    mixed = build("glm_ocr")
    mixed.blocks[0].half()
    with pytest.raises(ValueError, match=r"\['torch.float16', 'torch.float32'\]; cast the whole"):
        encoder_for(mixed, tier="generic")


class ReadsPixels(Qwen3_5VisionModel):
    """A tower of a later version that asks the device for a value."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        if hidden_states.abs().max().item() > 1e6:
            hidden_states = hidden_states / 2
        return super().forward(hidden_states, grid_thw, **kwargs)


class DropsRows(Qwen3_5VisionModel):
    """A shape that depends on values."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        kept = hidden_states[hidden_states[:, 0] > -1e6]
        return super().forward(kept, grid_thw, **kwargs)


class SeesPadding(Qwen3_5VisionModel):
    """Every row depends on all rows of the call."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        output = super().forward(hidden_states, grid_thw, **kwargs)
        output.last_hidden_state = output.last_hidden_state / hidden_states.shape[0]
        return output


class CountsItems(Qwen3_5VisionModel):
    """An output of a row for each item."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        output = super().forward(hidden_states, grid_thw, **kwargs)
        output.pooler_output = output.pooler_output[: len(grid_thw)]
        return output


class MixesFrames(Qwen3_5VisionModel):
    """A video's features depend on what else is in the call."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        if "cu_seqlens" not in kwargs and int(grid_thw[:, 0].max()) > 1:
            hidden_states = hidden_states.flip(0)
        return super().forward(hidden_states, grid_thw, **kwargs)


class NoKwargs(Qwen3_5VisionModel):
    def forward(self, hidden_states, grid_thw):
        return super().forward(hidden_states, grid_thw)


class ReturnsTensor(Qwen3_5VisionModel):
    def forward(self, hidden_states, grid_thw, **kwargs):
        return super().forward(hidden_states, grid_thw, **kwargs).pooler_output


class NoOffsets(Qwen3_5VisionModel):
    """Its positions can be handed in, its attention knows no segments."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        get_vision_position_ids(grid_thw, 2, kwargs=kwargs)
        return super().forward(hidden_states, torch.tensor([[1, 4, 26]]), **kwargs)


FUTURE = [
    (ReadsPixels, r"at test_generic_choice\.py:\d+ .*needs values \(aten\._local_scalar_dense"),
    (DropsRows, r"needs values \(aten\.nonzero"),
    (SeesPadding, r"a row of its last_hidden_state over static buffers is \S+ times its norm away"),
    (CountsItems, r"2 rows are neither"),
    (MixesFrames, r"a row of its \w+ over static buffers is"),
    (NoKwargs, r"no tensors computed beforehand"),
    (ReturnsTensor, "returns a Tensor, no ModelOutput"),
    (NoOffsets, r"computes from other tensors than grid_thw"),
]


@pytest.mark.parametrize(("kind", "reason"), FUTURE, ids=[kind.__name__ for kind, _ in FUTURE])
def test_towers_of_later_versions(build, boosted, kind, reason):
    """Nothing is taken on trust: what cannot be proven is refused."""
    tower = boosted(kind._from_config(build("qwen3_5").config))
    with pytest.raises(ValueError, match=reason):
        encoder_for(tower, tier="generic")


class Renamed(Qwen3_5VisionModel):
    """A class that nobody has heard of, with nothing in the way."""


def test_unknown_class_is_taken_if_it_holds(build, boosted):
    tower = boosted(Renamed._from_config(build("qwen3_5").config))
    encoder = encoder_for(tower)
    assert isinstance(encoder, GenericEncoder)
    pixels = torch.randn(24, 1536, generator=torch.Generator().manual_seed(2))
    own = tower(pixels, grid_thw=torch.tensor([(1, 4, 6)]))
    assert torch.allclose(encoder(pixels, [(1, 4, 6)]).pooler_output, own.pooler_output, atol=1e-4)


class Batched(Qwen3_5VisionModel):
    """Outputs in a batch of one, several in one field, and an empty field."""

    def forward(self, hidden_states, grid_thw, **kwargs):
        output = super().forward(hidden_states, grid_thw, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state[None],
            pooler_output=output.pooler_output,
            hidden_states=(output.last_hidden_state, output.pooler_output[None]),
            attentions=(),
        )


def test_outputs_of_any_form(build, boosted):
    tower = boosted(Batched._from_config(build("qwen3_5").config))
    encoder = encoder_for(tower)
    pixels = torch.randn(24, 1536, generator=torch.Generator().manual_seed(2))
    own, got = tower(pixels, grid_thw=torch.tensor([(1, 4, 6)])), encoder(pixels, [(1, 4, 6)])
    assert list(got) == list(own)
    assert got.last_hidden_state.shape == own.last_hidden_state.shape == (1, 24, 64)
    assert isinstance(got.hidden_states, tuple)
    assert got.attentions == ()
    for a, b in zip(got.hidden_states, own.hidden_states, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-4)


def test_values_that_are_not_finite(build):
    tower = build("glm_ocr")
    with torch.no_grad():
        tower.merger.proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the pooler_output of its own forward is not finite"):
        encoder_for(tower, tier="generic")


def test_table_is_quick():
    """`vitgraph info` does not import the modeling files."""
    before = set(sys.modules)
    tower_report()
    assert not {name for name in set(sys.modules) - before if ".modeling_" in name}
