import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vitgraph.encoder import embedder as embedder_module
from vitgraph.encoder.demo import demo_encoder
from vitgraph.encoder.embedder import Embedder, LayerResults
from vitgraph.encoder.media import MediaError, Video
from vitgraph.encoder.preprocess import ImagePreprocessor

DATA = Path(__file__).parents[1] / "data"
FILES = sorted(p for p in DATA.iterdir() if p.suffix != ".md")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def alone(embedder) -> list[np.ndarray]:
    """The embedding of each file by itself, by way of the encoder only."""
    results = []
    for path in FILES:
        rows, grid = embedder.preprocessor(path)
        output = embedder.encoder(torch.from_numpy(rows), [grid])
        results.append(output.pooler_output.float().mean(0).numpy())
    return results


def test_the_demo_is_the_same_every_time_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = demo_encoder("cpu"), demo_encoder("cpu")
    assert torch.equal(torch.rand(4), expected)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_demo_depends_on_the_image(embedder):
    image = Image.open(DATA / "astronaut.jpg")
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    a, b, c = embedder.encode([image, flipped, DATA / "coffee.jpg"], normalize_embeddings=True)
    assert a @ b < 0.999  # positions matter
    assert a @ c < a @ b


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_the_order_of_the_inputs(embedder, alone, batch_size, num_workers):
    order = [4, 0, 3, 1, 2, 0]
    inputs = [FILES[i] for i in order]
    result = embedder.encode(inputs, batch_size=batch_size, num_workers=num_workers)
    assert result.dtype == np.float32
    assert result.shape == (6, 128)
    np.testing.assert_allclose(result, [alone[i] for i in order], rtol=1e-4, atol=1e-5)


def test_batches_are_bounded_in_patches(embedder, alone, monkeypatch):
    monkeypatch.setattr(embedder_module, "MAX_BATCH_PATCHES", 300)
    np.testing.assert_allclose(embedder.encode(FILES), alone, rtol=1e-4, atol=1e-5)


def test_every_kind_of_item(embedder, alone):
    path = DATA / "astronaut.jpg"
    image = Image.open(path)
    pixels = np.array(image)
    items = [path, str(path), path.read_bytes(), image, pixels, torch.from_numpy(pixels)]
    expected = alone[FILES.index(path)]
    for row in embedder.encode(items):
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    video = Video(np.stack([pixels] * 4), fps=2.0)
    assert embedder.encode([video, {"frames": video.frames, "fps": 2.0}]).shape == (2, 128)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_model_folder_gives_what_hugging_face_gives(family, build_model, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 20000, "longest_edge": 60000},
        patch_size=model.config.vision_config.patch_size,
    )
    processor.save_pretrained(tmp_path)
    images = [Image.open(path) for path in FILES if path.suffix != ".mp4"]
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        output = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    counts = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    tokens = Embedder.from_pretrained(tmp_path, device="cpu").encode(images, pool="tokens")
    for ours, theirs in zip(tokens, output.pooler_output.split(counts), strict=True):
        assert np.linalg.norm(ours - theirs.numpy()) < 1e-4 * np.linalg.norm(theirs.numpy())


def test_a_single_item_gives_a_single_result(embedder, alone):
    result = embedder.encode(FILES[0])
    assert result.shape == (128,)
    np.testing.assert_allclose(result, alone[0], rtol=1e-4, atol=1e-5)
    assert embedder.encode(FILES[0], convert_to_tensor=True).shape == (128,)


def test_iterators_and_nothing(embedder):
    assert embedder.encode(path for path in FILES).shape == (5, 128)
    assert embedder.encode([]).shape == (0, 128)
    assert embedder.encode([], pool="tokens") == []


def test_tokens_are_ragged(embedder, alone):
    tokens = embedder.encode(FILES, pool="tokens")
    for item, path, mean in zip(tokens, FILES, alone, strict=True):
        _, (t, h, w) = embedder.preprocessor(path)
        assert item.shape == (t * h * w // 4, 128)
        np.testing.assert_allclose(item.mean(0), mean, rtol=1e-3, atol=1e-4)
    largest = embedder.encode(FILES, pool="max")
    np.testing.assert_allclose(largest, [item.max(0) for item in tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_pruning_drops_tokens_of_videos(embedder, batch_size):
    rate = 0.7
    options = {"pruning_rate": rate, "batch_size": batch_size}
    tokens = embedder.encode(FILES, pool="tokens", **options)
    for path, kept in zip(FILES, tokens, strict=True):
        rows, grid = embedder.preprocessor(path)
        output = embedder.encoder(torch.from_numpy(rows), [grid], pruning_rate=rate)
        assert (len(output.pooler_output) < len(rows) // 4) == (path.suffix == ".mp4")
        np.testing.assert_allclose(kept, output.pooler_output, rtol=1e-3, atol=1e-4)
    for pool, reduce in (("mean", np.mean), ("max", np.max)):
        pooled = embedder.encode(FILES, pool=pool, **options)
        expected = [reduce(kept, 0) for kept in tokens]
        np.testing.assert_allclose(pooled, expected, rtol=1e-3, atol=1e-4)


def test_pruning_leaves_layers_whole(embedder):
    video = next(path for path in FILES if path.suffix == ".mp4")
    whole = embedder.encode(video, layers=[1], pool="tokens")
    pruned = embedder.encode(video, layers=[1], pool="tokens", pruning_rate=0.5)
    np.testing.assert_array_equal(pruned.layers[1], whole.layers[1])
    assert len(pruned.embeddings) == int(len(whole.embeddings) * 0.5)


@pytest.mark.parametrize("pruning", [False, True])
def test_pruning_is_captured_if_asked_for(monkeypatch, pruning):
    asked = []
    monkeypatch.setattr(embedder_module, "pick_device", lambda device: torch.device("cuda:0"))
    encoder = demo_encoder("cpu")
    monkeypatch.setattr(embedder_module, "demo_encoder", lambda *args, **options: encoder)
    monkeypatch.setattr(encoder, "capture", lambda config, **options: asked.append(options))
    Embedder.from_pretrained("demo", device="cuda", pruning=pruning)
    Embedder.from_pretrained("demo", device="cuda", pruning=pruning, graphs=False)
    assert [options["pruning"] for options in asked] == [pruning]


def test_kinds_of_results(embedder):
    tensor = embedder.encode(FILES[:2], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    as_list = embedder.encode(FILES[:2], convert_to_numpy=False)
    assert isinstance(as_list, list)
    assert torch.equal(torch.stack(as_list), tensor)


def test_truncation_comes_before_normalisation(embedder):
    whole = embedder.encode(FILES)
    short = embedder.encode(FILES, truncate_dim=10, normalize_embeddings=True)
    expected = whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "tokens"])
def test_layers_are_pooled_over_patches(embedder, pool):
    result = embedder.encode(FILES[:2], layers=[1, -1], pool=pool)
    assert isinstance(result, LayerResults)
    assert sorted(result.layers) == [1, 3]
    for index, path in enumerate(FILES[:2]):
        rows, grid = embedder.preprocessor(path)
        states = embedder.encoder(torch.from_numpy(rows), [grid], layers=[1]).hidden_states[1]
        expected = states.mean(0) if pool == "mean" else states
        np.testing.assert_allclose(result.layers[1][index], expected, rtol=1e-3, atol=1e-4)


def test_layers_of_a_tower_with_windows_are_in_pixel_order():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )
    from vitgraph.encoder import VisionEncoder

    config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=64, num_heads=2, intermediate_size=96, out_hidden_size=64,
        fullatt_block_indexes=[],
    )  # fmt: skip
    encoder = VisionEncoder.from_hf(Qwen2_5_VisionTransformerPretrainedModel(config).eval())
    # a dark square among bright pixels, 12 x 16 patches: more than one window
    pixels = np.full((168, 224, 3), 250, np.uint8)
    pixels[140:168, 196:224] = 0
    (states,) = Embedder(encoder).encode([pixels], pool="tokens", layers=[0]).layers[0]
    distance = np.linalg.norm(states - np.median(states, 0), axis=1)
    # the square is the last merged block, so its patches are the last rows
    assert set(np.argsort(distance)[-4:]) == {188, 189, 190, 191}


def test_bad_inputs_stop_or_are_skipped(embedder, alone, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    missing = tmp_path / "missing.jpg"
    inputs = [FILES[0], broken, FILES[1], np.zeros((4, 4, 3), np.int32), missing]
    with pytest.raises(MediaError, match=r"broken\.png"):
        embedder.encode(inputs)
    result = embedder.encode(inputs, on_error="skip")
    np.testing.assert_allclose(result, alone[:2], rtol=1e-4, atol=1e-5)
    assert [error.index for error in embedder.errors] == [1, 3, 4]
    assert embedder.errors[1].message.startswith("input 3 (ndarray int32")
    assert embedder.encode([broken], on_error="skip").shape == (0, 128)
    with pytest.raises(MediaError):
        embedder.encode(broken, on_error="skip")
    embedder.encode(FILES[:1])
    assert embedder.errors == []


def test_an_iterator_that_fails_stops(embedder):
    def inputs():
        yield FILES[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        embedder.encode(inputs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"pool": "cls"}, "'cls' is unknown; choose from mean, max, tokens"),
        ({"layers": [4]}, r"\[4\] outside this tower's blocks 0\.\.3"),
        ({"layers": [-5]}, "outside this tower's blocks"),
        ({"truncate_dim": 129}, "from 1 to the width 128"),
        ({"truncate_dim": 0}, "truncate_dim = 0"),
        ({"on_error": "ignore"}, "'ignore' is unknown"),
        ({"num_workers": -1}, "num_workers = -1"),
        ({"pruning_rate": 1.0}, r"encode: pruning_rate=1\.0 is not a fraction"),
        ({"pruning_rate": -0.1}, "at least 0 and less than 1"),
        ({"pruning_rate": float("nan")}, "pruning_rate=nan"),
        ({"pruning_rate": [0.5] * 5}, "give one number"),
        ({"pruning_rate": False}, "pruning_rate=False"),
    ],
)
def test_arguments_that_are_refused(embedder, arguments, message):
    with pytest.raises(ValueError, match=message):
        embedder.encode(FILES, **arguments)


def test_inputs_that_are_no_inputs(embedder):
    with pytest.raises(ValueError, match="inputs of type int"):
        embedder.encode(3)


def test_a_preprocessor_of_another_family_is_refused(embedder):
    from types import SimpleNamespace

    other = SimpleNamespace(family="qwen2_vl", patch_size=14, temporal_patch_size=2, merge_size=2)
    with pytest.raises(ValueError, match="patch_size = 14, the tower 16"):
        Embedder(embedder.encoder, ImagePreprocessor.for_family(other))


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        Embedder.from_pretrained("demo", device="cpu", graphs=True)


def test_progress_follows_the_logger(embedder, capfd, caplog):
    embedder.encode(FILES[:1])
    assert "encode" not in capfd.readouterr().err
    with caplog.at_level(logging.INFO, "vitgraph"):
        embedder.encode(FILES[:1])
    assert "1/1" in capfd.readouterr().err
    embedder.encode(FILES[:1], show_progress_bar=True)
    assert "1/1" in capfd.readouterr().err


@pytest.mark.gpu
def test_graphs_and_eager_agree_on_a_gpu():
    eager = Embedder.from_pretrained("demo", device="cuda", graphs=False)
    captured = Embedder.from_pretrained(
        "demo", device="cuda", graphs={"token_budgets": [256, 1024]}
    )
    assert captured.encoder.graphs is not None
    a, b = (e.encode(FILES, normalize_embeddings=True, batch_size=2) for e in (eager, captured))
    assert (a * b).sum(1).min() > 0.999


@pytest.mark.gpu
def test_pruning_in_graphs_and_eagerly_agree_on_a_gpu():
    captured = Embedder.from_pretrained(
        "demo", device="cuda", graphs={"token_budgets": [256, 1024]}, pruning=True
    )
    eager = Embedder.from_pretrained("demo", device="cuda", graphs=False)
    a, b = (
        e.encode(FILES, pool="tokens", pruning_rate=0.5, batch_size=2) for e in (eager, captured)
    )
    assert [len(rows) for rows in a] == [len(rows) for rows in b]
    assert captured.encoder.graphs.stats()["misses"] == 0
