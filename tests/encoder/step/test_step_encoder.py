"""Whole images and crops: order, counts, checkpoints, captured paths."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vitgraph.encoder import CheckpointError, StepEncoder, VisionEncoder, image_tower
from vitgraph.encoder.image_tower import path_configs
from vitgraph.encoder.step_keys import neighbours_to_halves
from vitgraph.kernels.testing import rel_rms

FP32 = 5e-6  # see test_step_towers
COUNTS = [[2, 0, 3], [0, 0, 0], [1, 1, 1], [0, 4, 0]]


def inputs(images, build, counts, seed=1):
    crops = images(sum(counts), build.crop, seed + 1) if sum(counts) else None
    return images(len(counts), build.image, seed), crops, counts


def check(output, want):
    """Against a list of [tokens, width] by image."""
    assert len(output.pooler_output) == len(want)
    assert output.tokens_per_item == tuple(len(w) for w in want)
    for got, expected in zip(output.pooler_output, want, strict=True):
        assert got.shape == expected.shape
        assert rel_rms(got, expected) < FP32


@torch.no_grad()
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_as_the_model_itself(counts, as_tensor, build, images, column_first):
    model = build.hf_model()
    encoder = build.encoder(model)
    args = inputs(images, build, counts)
    want = model.get_image_features(*args)
    given = torch.tensor(counts) if as_tensor else counts
    output = encoder(args[0], args[1], given)
    check(output, want.pooler_output)
    assert rel_rms(output.last_hidden_state, want.last_hidden_state) < FP32


@torch.no_grad()
@pytest.mark.parametrize("counts", COUNTS)
def test_step3(counts, build, images):
    tower = build.step3()
    encoder = build.encoder(tower)
    wholes, crops, _ = inputs(images, build, counts)
    state, projected = tower(wholes)
    cropped = tower(crops)[1] if crops is not None else torch.zeros(0, 4, 48)
    parts = cropped.split(counts)
    want = [torch.cat([p.flatten(0, 1), w]) for p, w in zip(parts, projected, strict=True)]
    output = encoder(wholes, crops, counts)
    check(output, want)
    assert rel_rms(output.last_hidden_state, state) < FP32


@torch.no_grad()
def test_without_crops_and_without_images(build, images):
    encoder = build.encoder(build.step3())
    wholes = images(2, build.image)
    plain = encoder(wholes)
    assert plain.tokens_per_item == (9, 9)
    for counts, crops in ([0, 0], None), ([0, 0], torch.zeros(0, 3, 84, 84)), (None, None):
        again = encoder(wholes, crops, counts)
        assert all(map(torch.equal, plain.pooler_output, again.pooler_output))
    nothing = encoder(torch.zeros(0, 3, 140, 140))
    assert nothing.pooler_output == []
    assert nothing.last_hidden_state.shape == (0, 9, 160)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step3p7", "step3"])
def test_captured_paths_replay_what_eager_computes(kind, build, images, rerun_recorder):
    model = build.hf_model() if kind == "step3p7" else build.step3()
    encoder = build.encoder(model)
    args = [inputs(images, build, counts, 10 * i) for i, counts in enumerate(COUNTS)]
    eager = [encoder(*a) for a in args]
    budgets = {"global": {"token_budgets": [9, 27]}, "local": {"token_budgets": [4, 8, 16]}}
    encoder._capture_with(rerun_recorder, budgets)
    for _ in range(2):
        for a, want in zip(args, eager, strict=True):
            got = encoder(*a)
            check(got, want.pooler_output)
            assert rel_rms(got.last_hidden_state, want.last_hidden_state) < FP32
    stats = encoder.stats()
    assert stats["paths"]["global"]["items"] == 2 * sum(map(len, COUNTS))
    assert stats["paths"]["local"]["items"] == 2 * sum(map(sum, COUNTS))
    assert stats["total"]["misses"] == 0
    encoder.release_graphs()
    assert encoder.graphs is None
    with pytest.raises(RuntimeError, match="nothing is captured"):
        encoder.stats()


@torch.no_grad()
def test_results_belong_to_the_caller(build, images, rerun_recorder):
    encoder = build.encoder(build.step3())
    encoder._capture_with(rerun_recorder, {"token_budgets": [36]})
    first = encoder(*inputs(images, build, [1, 2], 1))
    copies = [rows.clone() for rows in first.pooler_output]
    state = first.last_hidden_state.clone()
    encoder(*inputs(images, build, [1, 2], 5))
    assert all(map(torch.equal, copies, first.pooler_output))
    assert torch.equal(state, first.last_hidden_state)


@torch.no_grad()
def test_states_of_images_of_every_size(build, images, rerun_recorder):
    encoder = build.encoder(build.step3())
    sizes = [build.image, build.crop, 112]
    eager = [encoder.encode(images(2, side)) for side in sizes]
    encoder._capture_with(rerun_recorder, {"token_budgets": [36]})
    for side, want in zip(sizes, eager, strict=True):
        assert rel_rms(encoder.encode(images(2, side)), want) < FP32


def test_new_weights_for_sizes_first_seen_in_inference_mode(build, images):
    encoder = build.encoder(build.hf_model(0))
    with torch.inference_mode():
        before = encoder.encode(images(1, 112)).clone()
    encoder.load_weights(build.hf_model(5))
    assert rel_rms(encoder.encode(images(1, 112)), before) > 0.1


def test_states_of_what_is_no_batch_of_images(build, images):
    encoder = build.encoder(build.step3())
    for bad, message in (
        (images(1, 112)[0], r"\[3, 112, 112\] must be \[images, 3, height, width\]"),
        (images(1, 112)[:, :1], r"\[1, 1, 112, 112\] must be \[images, 3"),
        (images(1, 100), "100"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(bad)
    with pytest.raises(TypeError, match=r"encode: torch\.uint8 must be a floating-point"):
        encoder.encode(images(1, 112).to(torch.uint8))


@torch.no_grad()
def test_counts_of_numpy(build, images):
    encoder = build.encoder(build.step3())
    wholes, crops, counts = inputs(images, build, [1, 2])
    want = encoder(wholes, crops, counts)
    got = encoder(wholes, crops, np.array(counts))
    assert all(map(torch.equal, got.pooler_output, want.pooler_output))
    with pytest.raises(TypeError, match="must be one integer for each image"):
        encoder(wholes, crops, np.array([1.0, 2.0]))


def test_two_threads_make_one_path_of_a_new_size(build, images, monkeypatch):
    encoder = build.encoder(build.hf_model(0))
    make, made, gate = encoder._new_path, [], threading.Barrier(2)

    def slowly(*size):
        made.append(size)
        time.sleep(0.1)
        return make(*size)

    def work():
        gate.wait(10)
        encoder.encode(images(1, 112))

    monkeypatch.setattr(encoder, "_new_path", slowly)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(112, 112)]


def test_a_size_seen_on_another_stream_is_waited_for(build, images, monkeypatch):
    encoder, notes = build.encoder(build.hf_model(0)), []

    class Notes:
        def __init__(self, device, tensors):
            self.table = next(x for x in tensors if x.is_floating_point())
            notes.append(("written", len(tensors), self.table.isfinite().all().item()))

        def order_reads(self):
            notes.append(("ordered", self.table.shape[0]))

    own = image_tower.TowerPath.eager_forward

    def forward(path, *args):
        notes.append(("read", path.size.table.shape[0]))
        return own(path, *args)

    monkeypatch.setattr(image_tower, "Written", Notes)
    monkeypatch.setattr(image_tower.TowerPath, "eager_forward", forward)
    encoder.encode(images(1, 112))
    encoder.encode(images(1, 112))
    # counts, positions, cos and sin
    assert notes == [("written", 4, True), ("read", 64), ("ordered", 64), ("read", 64)]
    (kept,) = encoder._others.values()
    size = kept[0].size
    assert kept[1].table is size.table
    assert len(size.constants()) == sum(isinstance(x, torch.Tensor) for x in vars(size).values())


def test_new_weights_reach_a_size_that_is_just_seen(build, images, monkeypatch):
    """Its positions were read from the old ones."""
    encoder, other = build.encoder(build.hf_model(0)), build.hf_model(5)
    make, read, loaded = encoder._new_path, threading.Event(), threading.Event()

    def slowly(*size):
        path = make(*size)
        read.set()
        loaded.wait(0.2)
        return path

    monkeypatch.setattr(encoder, "_new_path", slowly)
    thread = threading.Thread(target=encoder.encode, args=(images(1, 112),))
    thread.start()
    assert read.wait(10)
    encoder.load_weights(other)
    loaded.set()
    thread.join()
    want = build.encoder(other).encode(images(1, 112))
    assert rel_rms(encoder.encode(images(1, 112)), want) < FP32


@torch.no_grad()
def test_new_weights(build, images, column_first, rerun_recorder):
    model, other = build.hf_model(0), build.hf_model(5)
    encoder = build.encoder(model)
    encoder._capture_with(rerun_recorder, {"token_budgets": [36]})
    encoder.load_weights(other)
    args = inputs(images, build, [1, 2])
    check(encoder(*args), other.get_image_features(*args).pooler_output)


def test_configurations_of_paths(build):
    paths = build.encoder(build.step3()).paths
    automatic = path_configs(paths, {"max_vision_items_per_batch": 3, "num_slots": 2})
    assert automatic["global"].token_budgets == (9, 18, 27)
    assert automatic["local"].token_budgets == (4, 8, 12)
    assert automatic["local"].num_slots == 2
    own = path_configs(paths, {"local": {"token_budgets": [8]}})
    assert own["local"].token_budgets == (8,)
    assert own["global"].token_budgets[:3] == (9, 18, 27)
    for config in automatic, own:
        for name, path in paths.items():
            assert config[name].resolve(path)[-1].max_items >= 1
    with pytest.raises(ValueError, match=r"unknown path or key crops; the paths are global, local"):
        path_configs(paths, {"crops": {}})
    with pytest.raises(ValueError, match="unknown key"):
        path_configs(paths, {"token_budgets": [9], "local": {}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 140, 140, dtype=torch.uint8)}, TypeError, "not raw"),
        ({"pixel_values": [1]}, TypeError, "list"),
        ({"pixel_values": torch.zeros(2, 3, 84, 84)}, ValueError, r"\[images, \*\[3, 140, 140\]\]"),
        ({"pixel_values": torch.zeros(3, 140, 140)}, ValueError, r"\[images, \*\[3, 140, 140\]\]"),
        ({"pixel_values_local": torch.zeros(3, 3, 140, 140)}, ValueError, "the local path"),
        ({"pixel_values_local": torch.zeros(2, 3, 84, 84)}, ValueError, r"\[1, 2\] are 3 crops"),
        ({"pixel_values_local": None}, ValueError, "holds 0"),
        ({"num_local_patches": None}, ValueError, "are 0 crops"),
        ({"num_local_patches": [3]}, ValueError, "2 counts, one for each image"),
        ({"num_local_patches": [4, -1]}, ValueError, "none negative"),
        ({"num_local_patches": [1.0, 2.0]}, TypeError, "one integer for each image"),
        ({"num_local_patches": torch.tensor([1.0, 2.0])}, TypeError, "one integer for each"),
        ({"pixel_values": torch.full((2, 3, 140, 140), torch.nan)}, ValueError, "in image 0"),
        ({"pixel_values_local": torch.full((3, 3, 84, 84), torch.inf)}, ValueError, "infinity"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message, build, images):
    encoder = build.encoder(build.step3())
    wholes, crops, counts = inputs(images, build, [1, 2])
    given = {"pixel_values": wholes, "pixel_values_local": crops, "num_local_patches": counts}
    with pytest.raises(error, match=message):
        encoder(**given | change)


def test_capture_needs_a_gpu(build):
    with pytest.raises(RuntimeError, match="need a CUDA device, this tower is on cpu"):
        build.encoder(build.step3()).capture()


def test_towers_without_a_projector_are_refused(build):
    weights = build.weights(build.hf_tower())
    with pytest.raises(ValueError, match="without its projector"):
        StepEncoder(weights.spec, weights)
    with pytest.raises(ValueError, match="a Step3p7VisionModel has no Step3p7VisionModel at"):
        StepEncoder.from_hf(build.hf_tower())
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"on .'meta'.; move the whole tower"),
    ):
        StepEncoder.from_hf(build.hf_model().to("meta"))


# --- checkpoints ---


def write(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


@torch.no_grad()
def test_folder_of_save_pretrained(build, images, tmp_path, column_first):
    """transformers writes the names and the layout of the released weights."""
    model = build.hf_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": build.crop}))
    written = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("resblocks.0.attn.in_proj_weight") for name in written)
    encoder = StepEncoder.from_pretrained(tmp_path, device="cpu")
    args = inputs(images, build, [1, 2])
    check(encoder(*args), model.get_image_features(*args).pooler_output)
    state = encoder.state_dict()
    for name, p in model.model.vision_model.named_parameters():
        assert torch.equal(state[f"vision_model.{name}"], p), name


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model."])
def test_folder_with_names_of_transformers(prefix, build, images, tmp_path, column_first):
    model = build.hf_model()
    config = model.config.to_dict()
    inner = {f"{prefix}{n}": p for n, p in model.model.named_parameters() if "language" not in n}
    write(tmp_path, config, inner | {"lm_head.weight": model.lm_head.weight.detach().clone()})
    encoder = StepEncoder.from_pretrained(tmp_path, device="cpu", local_size=build.crop)
    args = inputs(images, build, [1, 2])
    check(encoder(*args), model.get_image_features(*args).pooler_output)
    assert encoder.source == str(tmp_path)


def released(model, heads):
    """Tensors of a model by the names of the released weights, q and k in neighbouring pairs."""

    def neighbours(rows):
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    tower, named = model.model.vision_model, {}
    p = dict(tower.named_parameters())
    named["conv1.weight"] = p["embeddings.patch_embedding.weight"]
    named["positional_embedding"] = p["embeddings.position_embedding.weight"]
    for part in ("weight", "bias"):
        named[f"ln_pre.{part}"] = p[f"pre_layernorm.{part}"]
        for j in (1, 2):
            named[f"vit_downsampler{j}.{part}"] = p[f"downsampler{j}.{part}"]
    for i in range(len(tower.layers)):
        ours, theirs = f"layers.{i}", f"transformer.resblocks.{i}"
        for j, name in ((1, "before"), (2, "after")):
            named[f"{theirs}.ls_{j}.gamma"] = p[f"{ours}.lambda_{j}"]
            for part in ("weight", "bias"):
                named[f"{theirs}.ln_{j}.{part}"] = p[f"{ours}.layernorm_{name}.{part}"]
        for part in ("weight", "bias"):
            q, k, v = (p[f"{ours}.self_attn.{x}_proj.{part}"] for x in "qkv")
            fused = torch.cat([neighbours(q), neighbours(k), v])
            named[f"{theirs}.attn.in_proj_{part}"] = fused
            named[f"{theirs}.attn.out_proj.{part}"] = p[f"{ours}.self_attn.out_proj.{part}"]
            named[f"{theirs}.mlp.c_fc.{part}"] = p[f"{ours}.mlp.fc1.{part}"]
            named[f"{theirs}.mlp.c_proj.{part}"] = p[f"{ours}.mlp.fc2.{part}"]
    named = {f"vision_model.{name}": tensor for name, tensor in named.items()}
    return named | {"vit_large_projector.weight": model.model.multi_modal_projector.weight}


@torch.no_grad()
def test_folder_of_step3_vl_10b(build, images, tmp_path, column_first):
    """A model type that transformers does not know, with other names in its config."""
    model = build.hf_model()
    vision = {"width": 64, "layers": 3, "heads": 2, "mlp_ratio": 1.5, "image_size": 140,
              "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
              "ues_cls_token": False, "use_ln_pre": True, "use_ln_post": False,
              "use_abs_posemb": True, "use_rope2d": True, "ls_init_value": 0.1}  # fmt: skip
    config = {"model_type": "step_robotics", "vision_config": vision, "projector_bias": False,
              "text_config": {"hidden_size": 48}, "understand_projector_stride": 2}  # fmt: skip
    write(tmp_path, config, released(model, heads=2))
    encoder = StepEncoder.from_pretrained(tmp_path, device="cpu", local_size=build.crop)
    args = inputs(images, build, [1, 2])
    check(encoder(*args), model.get_image_features(*args).pooler_output)
    for broken in ({"use_ln_post": True}, {"use_rope2d": False}, {"hidden_act": "gelu"}):
        write(tmp_path, config | {"vision_config": vision | broken}, {"a": torch.zeros(1)})
        with pytest.raises(ValueError, match=next(iter(broken))):
            StepEncoder.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [False, True])
def test_folder_of_step3(has_bias, build, images, tmp_path):
    tower = type(build.step3())(build.step3_config, 48, has_bias).eval()
    build.boost(tower)
    config = {"model_type": "step3_vl", "vision_config": build.step3_config,
              "text_config": {"hidden_size": 48}, "projector_bias": has_bias,
              "understand_projector_stride": 2}  # fmt: skip
    tensors = dict(tower.named_parameters()) | {"model.embed_tokens.weight": torch.zeros(2, 2)}
    write(tmp_path, config, tensors)
    encoder = StepEncoder.from_pretrained(tmp_path, device="cpu", local_size=build.crop)
    wholes = images(2, build.image)
    check(encoder(wholes), list(tower(wholes)[1]))
    del tensors["vit_downsampler2.bias"]
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"'vit_downsampler2.bias' is missing"):
        StepEncoder.from_pretrained(tmp_path)


def test_other_folders(build, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl", "vision_config": {}}')
    with pytest.raises(ValueError, match="'qwen2_vl' is no Step model"):
        StepEncoder.from_pretrained(tmp_path)
    for content in (b"[]", b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a JSON object"):
            StepEncoder.from_pretrained(tmp_path)
    config = {"model_type": "step3_vl", "vision_config": build.step3_config,
              "text_config": {"hidden_size": 48}}  # fmt: skip
    write(tmp_path, config, {"model.norm.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no tensor named vision_model\.\* or"):
        StepEncoder.from_pretrained(tmp_path)


def test_packed_encoders_point_here(build, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "step_robotics", "vision_config": {}}')
    with pytest.raises(ValueError, match="StepEncoder"):
        VisionEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="StepEncoder"):
        VisionEncoder.from_hf(build.hf_tower())


def test_pairs_of_a_head():
    rows = torch.arange(16)[:, None]
    got = neighbours_to_halves(rows, num_heads=2)
    assert got.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


@pytest.mark.parametrize(
    "config", [{"token_budgets": []}, {"nonsense": 1}, {"local": {"token_budgets": [-1]}}]
)
def test_a_refused_configuration_leaves_the_graphs(build, rerun_recorder, config):
    encoder = build.encoder(build.hf_model())
    kept = encoder._capture_with(rerun_recorder, {"token_budgets": [36]})
    with pytest.raises(ValueError, match=r"token_budgets|nonsense"):
        encoder._capture_with(rerun_recorder, config)
    assert encoder.graphs is kept
    assert kept.graph_pool is not None


def test_old_graphs_are_gone_before_new_ones_are_recorded(build, rerun_recorder):
    encoder = build.encoder(build.hf_model())
    old = encoder._capture_with(rerun_recorder, {"token_budgets": [36]})
    seen = []

    class Watching(type(rerun_recorder)):
        def warm_up(self, work):
            seen.append(old.graph_pool)
            super().warm_up(work)

    assert encoder._capture_with(Watching(), {"token_budgets": [36]}) is encoder.graphs
    assert set(seen) == {None}


@pytest.mark.parametrize("way", ["live", "folder", "fp8"])
def test_built_in_inference_mode_loaded_outside(way, build, images, tmp_path):
    model, new = build.hf_model(), build.hf_model(seed=1)
    model.save_pretrained(tmp_path)
    precision = "fp8" if way == "fp8" else "native"
    with torch.inference_mode():
        if way == "folder":
            made = StepEncoder.from_pretrained(tmp_path, device="cpu", local_size=build.crop)
        else:
            made = StepEncoder.from_hf(model, local_size=build.crop, precision=precision)
    # inference tensors would be refused as parameters
    assert all(torch.nn.Parameter(value).requires_grad for value in made.state_dict().values())
    made.load_weights(new)
    want = StepEncoder.from_hf(new, local_size=build.crop, precision=precision)
    pixels = images(2, build.image)
    assert torch.equal(made.encode(pixels), want.encode(pixels))
