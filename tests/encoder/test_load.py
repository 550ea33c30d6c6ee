"""Which encoder a checkpoint gets, by its config.json alone."""

import json

import pytest
import torch
from vitgraph.encoder import (
    CheckpointError,
    Embedder,
    InternVLEncoder,
    Siglip2Encoder,
    StepEncoder,
    VisionEncoder,
    load_encoder,
)
from vitgraph.encoder.checkpoint import Checkpoint
from vitgraph.encoder.load import encoder_of_checkpoint, tower_spec

VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_patches": 64, "patch_size": 4,
}  # fmt: skip
STEP = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 140}
CONFIGS = {
    "siglip2": ({"vision_config": VISION}, Siglip2Encoder, "siglip2"),
    "siglip2_vision_model": (VISION, Siglip2Encoder, "siglip2"),
    "lfm2_vl": ({"vision_config": VISION}, Siglip2Encoder, "siglip2"),
    "step3p7": (
        {"vision_config": STEP, "text_config": {"hidden_size": 48}}, StepEncoder, "step3p7",
    ),
    "step_robotics": (
        {"vision_config": STEP, "text_config": {"hidden_size": 48}}, StepEncoder, "step3p7",
    ),
    "step3_vl": (
        {"vision_config": STEP | {"output_hidden_size": 80, "intermediate_size": 96},
         "text_config": {"hidden_size": 48}},
        StepEncoder, "step3_vl",
    ),
    "internvl": (
        {"vision_config": {"hidden_size": 64, "num_attention_heads": 2},
         "text_config": {"model_type": "qwen2", "hidden_size": 48}},
        InternVLEncoder, "internvl",
    ),
    "qianfan_ocr": (
        {"vision_config": {"hidden_size": 64, "num_attention_heads": 2},
         "text_config": {"model_type": "qwen3", "hidden_size": 48}},
        InternVLEncoder, "qianfan_ocr",
    ),
    "qwen3_vl": (
        {"vision_config": {"model_type": "qwen3_vl", "hidden_size": 64, "num_heads": 2},
         "text_config": {"model_type": "qwen3_vl_text"}},
        VisionEncoder, "qwen3_vl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_class_follows_the_model_type(model_type, tmp_path, monkeypatch):
    config, expected, family = CONFIGS[model_type]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    asked = []
    for kind in (VisionEncoder, Siglip2Encoder, StepEncoder, InternVLEncoder):

        def from_checkpoint(cls, checkpoint, **options):
            asked.append((cls, options))

        monkeypatch.setattr(kind, "from_checkpoint", classmethod(from_checkpoint))
    load_encoder(tmp_path, device="cpu", dtype="float64", precision="fp8")
    encoder_of_checkpoint(Checkpoint.open(tmp_path), device="cpu")
    options = {"device": "cpu", "dtype": "float64", "precision": "fp8", "attention": None}
    assert asked == [(expected, options), (expected, {"device": "cpu"})]
    spec = tower_spec(Checkpoint.open(tmp_path))
    assert spec.family == family
    assert spec.hidden_size == 64


def test_loaded_weights_compute(build_model, pixel_rows, tmp_path):
    model = build_model("qwen3_vl")
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, device="cpu", local_files_only=True)
    grids = [(1, 4, 6)]
    rows = pixel_rows("qwen3_vl", grids)
    with torch.no_grad():
        want = model.model.visual(rows, grid_thw=torch.tensor(grids)).pooler_output
    torch.testing.assert_close(encoder(rows, grids).pooler_output, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "siglip"}, ValueError, "'siglip' is no SigLIP 2 .* images have one size"),
        ({"model_type": "bert"}, ValueError, "'bert' has no supported vision tower; supported"),
        ({}, ValueError, "model type None has no supported vision tower"),
        ([], CheckpointError, "not a JSON object"),
        (
            {"model_type": "step3p7", "vision_config": [1]},
            CheckpointError,
            "vision_config is a list, not a JSON object",
        ),
        (
            {"model_type": "siglip2", "vision_config": "x"},
            CheckpointError,
            "vision_config is a str, not a JSON object",
        ),
    ],
)
def test_models_that_are_refused(config, error, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_encoder, Embedder.from_pretrained):
        with pytest.raises(error, match=message):
            load(tmp_path, device="cpu")
    with pytest.raises(error, match=message):
        tower_spec(Checkpoint.open(tmp_path))
