"""SigLIP 2 against transformers: sizes, padding, weights, checkpoints, captured calls."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.encoder import (
    CheckpointError,
    Siglip2Encoder,
    VisionEncoder,
    encoder_for,
    siglip2_encoder,
)
from vitgraph.encoder.siglip2_encoder import image_sizes
from vitgraph.encoder.siglip2_tower import Siglip2Tower
from vitgraph.kernels.testing import rel_rms

# Three blocks and a head round some 40 times in a row by 2**-24, 4e-7 if independent; boosted
# scores, of which softmax takes the exponential, make some ten of that. What is wrong shows above
# 1e-3.
FP32 = 5e-6
LAYOUTS = {
    "mixed": [[3, 5], [12, 10], [1, 20], [8, 8], [2, 9]],
    "one": [[5, 11]],
    "table": [[8, 8]],
    "large": [[16, 16], [4, 64]],
    # no more than one row, but more than one column: see test_positions
    "thin": [[1, 1], [40, 2], [1, 33]],
}


def live(batch, rows):
    return rows[batch["pixel_attention_mask"].bool()]


def check(output, want, batch):
    assert rel_rms(output.last_hidden_state, live(batch, want.last_hidden_state)) < FP32
    assert output.pooler_output.shape == want.pooler_output.shape
    # each image by itself: a small one must not hide behind the others
    for got, expected in zip(output.pooler_output, want.pooler_output, strict=True):
        assert rel_rms(got, expected) < FP32


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_transformers(layout, build, batch):
    tower = build.tower()
    args = batch(LAYOUTS[layout])
    want = tower(**args)
    encoder = Siglip2Encoder.from_hf(tower)
    output = encoder(**args)
    check(output, want, args)
    assert output.patches_per_image == tuple(h * w for h, w in LAYOUTS[layout])
    packed = encoder(live(args, args["pixel_values"]), LAYOUTS[layout])
    assert torch.equal(packed.pooler_output, output.pooler_output)
    assert torch.equal(packed.last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_padding_of_the_caller_is_not_read(build, batch):
    encoder = Siglip2Encoder.from_hf(build.tower())
    args = batch(LAYOUTS["mixed"], length=130)
    want = encoder(**args)
    args["pixel_values"][args["pixel_attention_mask"] == 0] = torch.nan
    again = encoder(**args)
    assert torch.equal(again.pooler_output, want.pooler_output)
    assert torch.equal(again.last_hidden_state, want.last_hidden_state)


@torch.no_grad()
def test_tower_without_a_head(build, batch):
    tower = build.tower(with_head=False)
    args = batch(LAYOUTS["mixed"])
    output = Siglip2Encoder.from_hf(tower)(**args)
    want = live(args, tower(**args).last_hidden_state)
    assert rel_rms(output.last_hidden_state, want) < FP32
    assert output.pooler_output is None


@torch.no_grad()
def test_no_images(build):
    encoder = Siglip2Encoder.from_hf(build.tower())
    for pixels in torch.zeros(0, 48), torch.zeros(0, 9, 48):
        output = encoder(pixels, [])
        assert output.last_hidden_state.shape == output.pooler_output.shape == (0, 64)


@torch.no_grad()
def test_static_buffers_with_poisoned_padding(build, batch):
    tower = build.tower()
    encoder = Siglip2Encoder.from_hf(tower)
    args = batch(LAYOUTS["mixed"])
    want = encoder(**args)
    limits = encoder.rung_limits(320, 9, 12)
    assert limits.max_items == limits.max_frames == 9
    assert encoder.rung_limits(320, 12, 9) == limits
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in encoder.input_specs(limits).items()
    }
    inputs["pixel_values"].fill_(torch.nan)
    rows = live(args, args["pixel_values"])
    inputs["pixel_values"][: len(rows)] = rows
    grid = torch.tensor([(1, h, w) for h, w in LAYOUTS["mixed"]])
    inputs["grid"][: len(grid)] = grid
    outputs = {
        name: torch.full(spec.shape, torch.nan, dtype=spec.dtype)
        for name, spec in encoder.output_specs(limits).items()
    }
    encoder.graph_forward(inputs, outputs, limits)
    state, pooled = outputs["last_hidden_state"], outputs["pooler_output"]
    assert rel_rms(state[: len(rows)], want.last_hidden_state) < FP32
    assert rel_rms(pooled[: len(grid)], want.pooler_output) < FP32
    assert state.isfinite().all()
    assert pooled.isfinite().all()


@torch.no_grad()
def test_captured_calls(build, batch, rerun_recorder):
    tower = build.tower()
    encoder = Siglip2Encoder.from_hf(tower)
    with pytest.raises(RuntimeError, match="nothing is captured"):
        encoder.stats()
    with pytest.raises(RuntimeError, match="need a CUDA device, this tower is on cpu"):
        encoder.capture()
    capture_on_cpu(encoder, rerun_recorder, {"token_budgets": [64, 300, 600]})
    batches = [batch(shapes, seed=seed) for seed, shapes in enumerate(LAYOUTS.values())]
    results = [(encoder(**args), tower(**args), args) for args in batches]
    for output, want, args in results:  # after all calls: results belong to the caller
        check(output, want, args)
    stats = encoder.stats()
    assert stats["items"] == stats["hits"] == sum(map(len, LAYOUTS.values()))
    encoder.release_graphs()
    assert encoder.graphs is None


@torch.no_grad()
def test_one_image_larger_than_all_rungs_runs_eagerly(build, batch, rerun_recorder):
    tower = build.tower()
    encoder = Siglip2Encoder.from_hf(tower)
    capture_on_cpu(encoder, rerun_recorder, {"token_budgets": [64]})
    args = batch([[3, 3], [9, 9], [2, 5]])
    check(encoder(**args), tower(**args), args)
    stats = encoder.stats()
    assert (stats["hits"], stats["misses"]) == (2, 1)


def capture_on_cpu(encoder, recorder, config):
    manager = EncoderCudaGraphManager(encoder, config, recorder=recorder)
    manager.capture()
    encoder.graphs = manager


@torch.no_grad()
def test_weights_both_ways(build, batch, rerun_recorder):
    tower, other = build.tower(0), build.tower(5)
    encoder = Siglip2Encoder.from_hf(tower)
    state = encoder.state_dict()
    assert state.keys() == tower.state_dict().keys()
    for name, p in tower.named_parameters():
        assert torch.equal(state[name], p), name
    capture_on_cpu(encoder, rerun_recorder, {"token_budgets": [300]})
    encoder.load_weights(other)
    args = batch(LAYOUTS["mixed"])
    check(encoder(**args), other(**args), args)
    fresh = build.tower(9)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh(**args).pooler_output, other(**args).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["model", "tower"])
def test_folder_of_save_pretrained(kind, build, batch, tmp_path):
    saved = build.model() if kind == "model" else build.tower()
    tower = saved.vision_model if kind == "model" else saved
    saved.save_pretrained(tmp_path)
    encoder = Siglip2Encoder.from_pretrained(tmp_path, device="cpu")
    assert encoder.source == str(tmp_path)
    args = batch(LAYOUTS["mixed"])
    check(encoder(**args), tower(**args), args)
    half = Siglip2Encoder.from_pretrained(str(tmp_path), device="cpu", dtype="bfloat16")
    assert half(**args).pooler_output.dtype == torch.bfloat16


def test_sizes_of_numpy():
    """As an image processor returns them without tensors."""
    assert image_sizes(np.array([[3, 5], [2, 2]])) == [(3, 5), (2, 2)]
    assert image_sizes([(3, np.int64(5))]) == [(3, 5)]
    with pytest.raises(TypeError, match=r"spatial_shapes\[0\] = .* must be integers"):
        image_sizes(np.array([[3.0, 5.0]]))
    with pytest.raises(ValueError, match=r"spatial_shapes\[0\] = 3: must be the rows and columns"):
        image_sizes([3, 5])


def test_other_folders(build, tmp_path):
    tensors = {"vision_model.head.probe": torch.zeros(1, 1, 64)}
    for config, message in (
        ({"model_type": "siglip"}, "'siglip' is no SigLIP 2 with native aspect .* have one size"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl' is no SigLIP 2"),
        ({"model_type": "lfm2_vl", "vision_config": {"model_type": "clip"}}, "of type 'clip' here"),
        ({"model_type": "siglip2", "vision_config": build.vision}, "patch_embedding.weight' is mi"),
        (build.vision | {"model_type": "siglip2_vision_model", "hidden_act": "relu"}, "'relu'"),
        (build.vision | {"model_type": "siglip2_vision_model", "num_patches": 65}, "not a square"),
        ([], "not a JSON object but a list"),
        ({"model_type": "siglip2", "vision_config": [3]}, "json: vision_config is a list, not a"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            Siglip2Encoder.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    save_file({"text_model.head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor named vision_model\.\* or"):
        Siglip2Encoder.from_pretrained(tmp_path, device="cpu")


NAN = torch.full((2, 15, 48), torch.nan)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": torch.zeros(2, 15, 48, dtype=torch.uint8)}, TypeError, "not raw uint8"),
        ({"pixel_values": [1]}, TypeError, "list"),
        ({"pixel_values": torch.zeros(2, 14, 48)}, ValueError, r"\[15, 4\] patches .* 48 values"),
        ({"pixel_values": torch.zeros(3, 15, 48)}, ValueError, "does not hold 2 images"),
        ({"pixel_values": torch.zeros(2, 15, 40)}, ValueError, "of 48 values"),
        ({"pixel_values": torch.zeros(20, 48)}, ValueError, r"packed: \[19, 48\]"),
        ({"pixel_values": torch.zeros(19, 48)}, ValueError, "packed patches have none"),
        ({"pixel_values": NAN}, ValueError, "in patch 0"),
        ({"spatial_shapes": torch.ones(2, 2)}, TypeError, "torch.float32 must be integers"),
        ({"spatial_shapes": [[3, 5.0], [2, 2]]}, TypeError, r"\[0\] = \[3, 5.0\]: must be int"),
        ({"spatial_shapes": [[3, 5], [2, 0]]}, ValueError, r"\[1\] = \[2, 0\]: must be at least 1"),
        ({"spatial_shapes": torch.ones(2, 3).int()}, ValueError, r"pass \[images, 2\]"),
        ({"spatial_shapes": [[3, 5], [1, 2]]}, ValueError, "does not mark the first h . w"),
        ({"pixel_attention_mask": torch.ones(2, 15)}, ValueError, "does not mark the first"),
        ({"pixel_attention_mask": torch.ones(2, 4)}, ValueError, r"\[2, 4\] does not mark"),
    ],
)
def test_bad_arguments(change, error, message, build, batch):
    encoder = Siglip2Encoder.from_hf(build.tower())
    with pytest.raises(error, match=message):
        encoder(**batch([[3, 5], [2, 2]]) | change)


def test_images_only(build):
    encoder = Siglip2Encoder.from_hf(build.tower())
    assert isinstance(encoder, Siglip2Tower)
    with pytest.raises(ValueError, match=r"grid_thw\[1\] = \(2, 3, 4\): SigLIP 2 takes images"):
        encoder.item_specs([(1, 2, 2), (2, 3, 4)])


def test_kernels_that_rotate_do_more(build):
    spec = Siglip2Encoder.from_hf(build.tower()).spec
    with pytest.raises(ValueError, match=r"rope_theta = 0.0 \(no rope\) .* qk_norm = True"):
        replace(spec, qk_norm=True)


def test_other_encoders_point_here(build, tmp_path):
    tower = build.tower()
    with pytest.raises(ValueError, match=r"spatial_shapes, .*Siglip2Encoder, or swap"):
        VisionEncoder.from_hf(tower)
    with pytest.raises(ValueError, match=r"use vitgraph\.encoder\.Siglip2Encoder"):
        encoder_for(tower)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2", "vision_config": {}}')
    with pytest.raises(ValueError, match="Siglip2Encoder"):
        VisionEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Linear is no Siglip2VisionModel"):
        Siglip2Encoder.from_hf(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"on \['meta'\]; move the whole tower"):
        Siglip2Encoder.from_hf(tower.to("meta"))


def test_a_refused_configuration_leaves_the_graphs(build, rerun_recorder, monkeypatch):
    encoder = Siglip2Encoder.from_hf(build.tower())
    capture_on_cpu(encoder, rerun_recorder, {"token_budgets": [64]})
    kept = encoder.graphs
    monkeypatch.setattr(siglip2_encoder, "check_capturable", lambda *_: None)
    with pytest.raises(ValueError, match="token_budgets"):
        encoder.capture({"token_budgets": []})
    assert encoder.graphs is kept
    assert kept.ladder is not None
    with pytest.raises(RuntimeError, match="CUDA"):  # as far as a CPU goes
        encoder.capture({"token_budgets": [64]})
    assert (encoder.graphs, kept.ladder) == (None, None)


@pytest.mark.parametrize("shapes", [None, 5, torch.tensor(3), np.array(3)])
def test_shapes_that_are_no_table(shapes):
    with pytest.raises(TypeError, match=r"^spatial_shapes = .*pass \[images, 2\]"):
        image_sizes(shapes)


def test_costs_are_kept_apart_by_the_head(build):
    """The spec does not say whether there is one, and pooling takes time."""
    towers = [build.tower(with_head=with_head) for with_head in (True, False)]
    prints = [Siglip2Encoder.from_hf(tower).fingerprint() for tower in towers]
    assert prints[0] != prints[1]
    assert prints[0] == Siglip2Encoder.from_hf(build.tower()).fingerprint()


@pytest.mark.parametrize("way", ["live", "folder"])
def test_built_in_inference_mode_loaded_outside(way, build, batch, tmp_path):
    tower, new = build.tower(), build.tower(seed=1)
    tower.save_pretrained(tmp_path)
    with torch.inference_mode():
        if way == "live":
            made = Siglip2Encoder.from_hf(tower)
        else:
            made = Siglip2Encoder.from_pretrained(tmp_path, device="cpu")
    # inference tensors would be refused as parameters
    assert all(torch.nn.Parameter(value).requires_grad for value in made.state_dict().values())
    made.load_weights(new)
    args = batch(LAYOUTS["mixed"])
    got, want = made(**args), Siglip2Encoder.from_hf(new)(**args)
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
