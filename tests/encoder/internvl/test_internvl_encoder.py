"""The encoder of InternVL: captured tiles, checkpoints, choices, bad input."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from vitgraph.encoder import (
    CheckpointError,
    InternVLEncoder,
    VisionEncoder,
    encoder_for,
)
from vitgraph.encoder.checkpoint import Checkpoint
from vitgraph.encoder.cli import app
from vitgraph.encoder.image_tower import path_configs
from vitgraph.encoder.load import tower_spec
from vitgraph.encoder.towers import tower_report
from vitgraph.kernels.testing import rel_rms

FP32 = 5e-6  # see test_internvl_towers


def check(output, want):
    assert rel_rms(output.last_hidden_state, want.last_hidden_state) < FP32
    assert rel_rms(output.pooler_output, want.pooler_output) < FP32


@torch.no_grad()
def test_replays_are_what_eager_computes(kind, build, tiles, rerun_recorder):
    encoder = InternVLEncoder.from_hf(build.model(kind))
    batches = [tiles(n, build.side, seed=n) for n in (1, 3, 2, 4, 1)]
    eager = [encoder(x) for x in batches]
    encoder._capture_with(rerun_recorder, {"token_budgets": [16, 32, 64]})
    for _ in range(2):
        for x, want in zip(batches, eager, strict=True):
            check(encoder(x), want)
    path = encoder.stats()["paths"]["tiles"]
    assert (path["items"], path["misses"]) == (22, 0)
    # more tiles than the largest rung holds, and a size without graphs
    check(encoder(tiles(9, build.side)), InternVLEncoder.from_hf(build.model(kind))(tiles(9, 112)))
    assert encoder(tiles(2, 84)).pooler_output.shape == (2, 9, 48)
    assert encoder.stats()["paths"]["tiles"]["items"] == 31
    encoder.release_graphs()
    with pytest.raises(RuntimeError, match="nothing is captured"):
        encoder.stats()


@torch.no_grad()
def test_results_belong_to_the_caller(build, tiles, rerun_recorder):
    encoder = InternVLEncoder.from_hf(build.model())
    encoder._capture_with(rerun_recorder, {"token_budgets": [64]})
    first = encoder(tiles(3, build.side, seed=1))
    copies = first.last_hidden_state.clone(), first.pooler_output.clone()
    encoder(tiles(4, build.side, seed=2))
    assert torch.equal(first.last_hidden_state, copies[0])
    assert torch.equal(first.pooler_output, copies[1])


@torch.no_grad()
def test_no_tiles(build):
    encoder = InternVLEncoder.from_hf(build.model())
    nothing = encoder(torch.zeros(0, 3, 112, 112))
    assert nothing.last_hidden_state.shape == (0, 65, 64)
    assert nothing.pooler_output.shape == (0, 16, 48)


def test_configurations(build):
    paths = InternVLEncoder.from_hf(build.model()).paths
    config = path_configs(paths, {"max_vision_items_per_batch": 3})
    assert config["tiles"].token_budgets == (16, 32, 48)
    with pytest.raises(ValueError, match="the paths are tiles"):
        path_configs(paths, {"global": {}})


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(2, 3, 112, 112, dtype=torch.uint8), TypeError, "not raw"),
        ([1], TypeError, "list"),
        (torch.zeros(3, 112, 112), ValueError, r"\[3, 112, 112\] must be \[tiles, 3, height"),
        (torch.zeros(2, 1, 112, 112), ValueError, r"must be \[tiles, 3, height, width\]"),
        (torch.zeros(2, 3, 112, 126), ValueError, "112 x 126 pixels: .* multiples of 28"),
        (torch.zeros(2, 3, 0, 112), ValueError, "0 x 112 pixels"),
        (torch.full((2, 3, 112, 112), torch.nan), ValueError, "in tile 0"),
    ],
)
def test_bad_pixels(pixels, error, message, build):
    encoder = InternVLEncoder.from_hf(build.model())
    with pytest.raises(error, match=message):
        encoder(pixels)


def test_capture_needs_a_gpu(build):
    with pytest.raises(RuntimeError, match="need a CUDA device, this tower is on cpu"):
        InternVLEncoder.from_hf(build.model()).capture()


# --- which encoder a tower gets ---


def test_the_tower_chooses_its_encoder(kind, build, tiles):
    tower = build.model(kind).model.vision_tower
    for tier in ("auto", "fused"):
        assert isinstance(encoder_for(tower, tier=tier), InternVLEncoder)
    with pytest.raises(ValueError, match=r"use vitgraph\.encoder\.InternVLEncoder"):
        encoder_for(tower, tier="generic")
    with pytest.raises(ValueError, match=r"tiles of one size.*InternVLEncoder"):
        VisionEncoder.from_hf(tower)
    support = {s.tower_class: s for s in tower_report()}[type(tower).__name__]
    assert (support.tier, support.reason) == ("fused", "batches of tiles, by InternVLEncoder")


def test_other_models_are_refused(build):
    with pytest.raises(ValueError, match=r"a Linear has no InternVLVisionModel or .* its tower"):
        InternVLEncoder.from_hf(torch.nn.Linear(1, 1))
    model = build.model()
    with pytest.raises(ValueError, match=r"on .'meta'.; move the whole tower"):
        InternVLEncoder.from_hf(model.to("meta"))


# --- checkpoints ---


@torch.no_grad()
def test_folder_of_save_pretrained(kind, build, tiles, tmp_path):
    """Of Qianfan-OCR, transformers writes the names of the released weights."""
    model = build.model(kind)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    is_released = any(n.endswith("encoder.layers.0.attn.qkv.weight") for n in written)
    assert is_released == (kind == "qianfan")
    encoder = InternVLEncoder.from_pretrained(tmp_path, device="cpu")
    images = tiles(2, build.side)
    check(encoder(images), model.get_image_features(images))
    state = encoder.state_dict()
    for name, p in model.model.named_parameters():
        if not name.startswith("language_model."):
            assert torch.equal(state.pop(name), p), name
    assert not state
    assert encoder.source == str(tmp_path)
    result = CliRunner().invoke(app, ["info", str(tmp_path), "--json"])
    assert json.loads(result.stdout)["spec"] == json.loads(json.dumps(encoder.spec.to_dict()))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_with_and_without_a_prefix(prefix, build, tiles, tmp_path):
    """Released InternVL weights have none; transformers writes one since."""
    model = build.model()
    model.config.save_pretrained(tmp_path)
    named = {f"{prefix}{n}": p for n, p in model.model.named_parameters() if "language" not in n}
    save_file(named | {"language_model.lm_head.weight": torch.zeros(2)},
              tmp_path / "model.safetensors")  # fmt: skip
    images = tiles(2, build.side)
    encoder = InternVLEncoder.from_pretrained(tmp_path, device="cpu")
    check(encoder(images), model.get_image_features(images))
    del named[f"{prefix}multi_modal_projector.linear_2.bias"]
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'multi_modal_projector.linear_2.bias' is missing"):
        InternVLEncoder.from_pretrained(tmp_path)


def test_other_folders(build, tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))

    write({"model_type": "qwen2_vl", "vision_config": {}})
    with pytest.raises(ValueError, match="'qwen2_vl' is no InternVL; supported: internvl"):
        InternVLEncoder.from_pretrained(tmp_path)
    write({"model_type": "internvl_chat", "vision_config": {}})
    with pytest.raises(ValueError, match="use the repository that ends in -hf"):
        InternVLEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"InternVLEncoder with the repository that ends in -hf"):
        VisionEncoder.from_pretrained(tmp_path)
    write([])
    with pytest.raises(CheckpointError, match="not a JSON object"):
        InternVLEncoder.from_pretrained(tmp_path)
    write({"model_type": "internvl", "text_config": {"model_type": "of_tomorrow"}})
    with pytest.raises(ValueError, match="does not know its text model 'of_tomorrow'"):
        InternVLEncoder.from_pretrained(tmp_path)
    build.model().config.save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor named vision_tower\.\* or"):
        InternVLEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tiles of one size.*InternVLEncoder"):
        VisionEncoder.from_pretrained(tmp_path)
    write({"model_type": "internvl", "vision_config": "x"})
    with pytest.raises(CheckpointError, match="vision_config is a str, not a JSON object"):
        InternVLEncoder.from_pretrained(tmp_path)


def test_a_fused_weight_of_another_model(build, tmp_path):
    build.model("qianfan").save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    key = next(n for n in written if n.endswith("layers.0.attn.qkv.weight"))
    save_file(written | {key: torch.zeros(100, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \[100, 64\], which are not q, k and v"):
        InternVLEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"downsample_ratio": "a"}, "internvl config: .*'downsample_ratio'.*'a'"),
        ({"vision_config": {"num_attention_heads": 0}}, "num_heads = 0 must be a positive"),
        ({"vision_config": {"patch_size": [0, 0]}}, "patch_size = 0 must be a positive"),
        ({"vision_config": {"hidden_size": "x"}}, "internvl config: .*'hidden_size'.*'x'"),
    ],
)
def test_fields_that_are_refused(top, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl", **top}))
    with pytest.raises(ValueError, match=message) as caught:
        tower_spec(Checkpoint.open(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["live", "folder", "fused"])
def test_built_in_inference_mode_loaded_outside(way, build, tiles, tmp_path):
    kind = "qianfan" if way == "fused" else "300m"
    model, new = build.model(kind), build.model(kind, seed=1)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        if way == "live":
            made = InternVLEncoder.from_hf(model)
        else:
            made = InternVLEncoder.from_pretrained(tmp_path, device="cpu")
    # inference tensors would be refused as parameters
    assert all(torch.nn.Parameter(value).requires_grad for value in made.state_dict().values())
    made.load_weights(new)
    pixels = tiles(2, build.side)
    check(made(pixels), InternVLEncoder.from_hf(new)(pixels))
