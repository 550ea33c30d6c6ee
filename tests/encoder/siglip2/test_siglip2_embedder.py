"""`Embedder` and the command line with SigLIP 2, against Hugging Face's model and processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from typer.testing import CliRunner
from vitgraph.capture import EncoderCudaGraphManager
from vitgraph.encoder import Embedder, MediaError, Siglip2Encoder, Siglip2Preprocessor
from vitgraph.encoder import embedder as embedder_module
from vitgraph.encoder.cli import app
from vitgraph.encoder.media import Video
from vitgraph.kernels.testing import rel_rms

DATA = Path(__file__).parents[2] / "data"
FILES = [DATA / name for name in ("astronaut.jpg", "chelsea.png", "coffee.jpg", "rocket.jpg")]
VIDEO = DATA / "pan.mp4"
FP32 = 5e-6  # see test_siglip2_encoder
MOST = 61  # patches of an image


def images():
    """Photographs, and pictures of other shapes: a row, a column, a point.

    None is one patch wide: torch 2.13 resizes the positions of such an image wrongly on a CPU.
    """
    rng = np.random.default_rng(0)
    sizes = [(1, 100), (90, 6), (1, 1)]
    drawn = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.open(path).copy() for path in FILES] + [
        Image.fromarray(pixels) for pixels in drawn
    ]


@pytest.fixture
def saved(build, tmp_path):
    """`saved(model)`: the model and a processor in a folder, and what they make of `images()`."""

    def save(model):
        folder = tmp_path / "model"
        processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=MOST)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        inputs = processor(images=images(), return_tensors="pt")
        tower = getattr(model, "vision_model", model)
        with torch.no_grad():
            output = tower(**inputs)
        masks = inputs["pixel_attention_mask"].bool()
        states = zip(output.last_hidden_state, masks, strict=True)
        return folder, output.pooler_output, [state[mask] for state, mask in states]

    return save


def check(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert rel_rms(torch.from_numpy(ours), theirs) < FP32


@pytest.mark.parametrize("kind", ["model", "tower"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_folder_gives_what_hugging_face_gives(kind, batch_size, build, saved):
    folder, pooled, states = saved(getattr(build, kind)())
    embedder = Embedder.from_pretrained(folder, device="cpu", local_files_only=True)
    assert isinstance(embedder.encoder, Siglip2Encoder)
    assert embedder.preprocessor == Siglip2Preprocessor(4, MOST)
    options = {"batch_size": batch_size}
    check(embedder.encode(images(), **options), pooled)
    check(embedder.encode(images(), pool="head", **options), pooled)
    check(embedder.encode(images(), pool="tokens", **options), states)
    check(embedder.encode(images(), pool="mean", **options), [s.mean(0) for s in states])
    check(embedder.encode(images(), pool="max", **options), [s.amax(0) for s in states])
    unit = torch.nn.functional.normalize(pooled[:, :10], dim=-1)
    check(embedder.encode(images(), normalize_embeddings=True, truncate_dim=10, **options), unit)


def test_batches_are_bounded_in_patches(build, saved, monkeypatch):
    folder, pooled, _ = saved(build.model())
    embedder = Embedder.from_pretrained(folder, device="cpu")
    sizes = []
    calls = type(embedder.encoder).__call__

    def watched(self, pixels, shapes, **options):
        sizes.append(len(pixels))
        return calls(self, pixels, shapes, **options)

    monkeypatch.setattr(Siglip2Encoder, "__call__", watched)
    monkeypatch.setattr(embedder_module, "MAX_BATCH_PATCHES", 130)
    check(embedder.encode(images()), pooled)
    assert max(sizes) <= 130
    assert 1 < len(sizes) < len(pooled)


def test_layers_come_beside_the_head(build, saved):
    model = build.model()
    folder, pooled, _ = saved(model)
    embedder = Embedder.from_pretrained(folder, device="cpu")
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=MOST)
    inputs = processor(images=images(), return_tensors="pt")
    with torch.no_grad():
        want = model.vision_model(**inputs, output_hidden_states=True).hidden_states
    masks = inputs["pixel_attention_mask"].bool()
    result = embedder.encode(images(), layers=[0, -1], batch_size=2)
    check(result.embeddings, pooled)
    assert sorted(result.layers) == [0, 2]
    for block in (0, 2):
        states = [s[m] for s, m in zip(want[block + 1], masks, strict=True)]
        check(result.layers[block], states)
    result = embedder.encode(images(), pool="mean", layers=[1])
    check(result.layers[1], [s[m].mean(0) for s, m in zip(want[2], masks, strict=True)])
    assert embedder.encode([], layers=[1]).layers == {1: []}


def test_a_tower_without_a_head(build, saved):
    folder, _, states = saved(build.tower(with_head=False))
    embedder = Embedder.from_pretrained(folder, device="cpu")
    check(embedder.encode(images()), [s.mean(0) for s in states])
    check(embedder.encode(images(), pool="tokens"), states)
    with pytest.raises(ValueError, match=r"this tower \(siglip2\) has no pooling head; choose 'm"):
        embedder.encode(images(), pool="head")


def test_lfm2(build, tmp_path):
    """Its own processor cuts tiles; whoever wants whole images says so."""
    model = build.lfm2()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Lfm2VlImageProcessor cuts images in another way"):
        Embedder.from_pretrained(tmp_path, device="cpu")
    embedder = Embedder(Siglip2Encoder.from_hf(model), Siglip2Preprocessor(4, MOST))
    assert embedder.encode(images()).shape == (7, 64)


def test_videos_are_refused_and_the_rest_is_kept(build, saved, tmp_path):
    folder, pooled, _ = saved(build.model())
    embedder = Embedder.from_pretrained(folder, device="cpu")
    with pytest.raises(MediaError, match=r"pan\.mp4: is a video, .* pass its frames as images"):
        embedder.encode([FILES[0], VIDEO])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    frames = Video(np.zeros((2, 8, 8, 3), np.uint8))
    mixed = [FILES[0], VIDEO, FILES[1], broken, frames, *FILES[2:], VIDEO.read_bytes()]
    for num_workers in (0, 3):
        got = embedder.encode(mixed, on_error="skip", batch_size=2, num_workers=num_workers)
        check(got, pooled[: len(FILES)])
        assert [error.index for error in embedder.errors] == [1, 3, 4, 7]
        assert embedder.errors[2].message.startswith("input 4 (Video object): is a video")


def test_pruning_is_refused(build):
    embedder = Embedder(Siglip2Encoder.from_hf(build.tower()))
    with pytest.raises(ValueError, match="siglip2 reads images; leave pruning_rate out"):
        embedder.encode(images(), pruning_rate=0.5)


def test_preprocessors(build):
    encoder = Siglip2Encoder.from_hf(build.tower())
    assert Embedder(encoder).preprocessor == Siglip2Preprocessor(patch_size=4)
    with pytest.raises(ValueError, match="patch_size = 16, the tower 4"):
        Embedder(encoder, Siglip2Preprocessor())


def test_captured_calls(build, saved, rerun_recorder):
    """With graphs, which the CPU runs again; calls with layers run eagerly."""
    folder, pooled, states = saved(build.model())
    embedder = Embedder.from_pretrained(folder, device="cpu")
    encoder = embedder.encoder
    config = {"token_budgets": [64, 256], "max_vision_items_per_batch": 4}
    manager = EncoderCudaGraphManager(encoder, config, recorder=rerun_recorder)
    manager.capture()
    encoder.graphs = manager
    check(embedder.encode(images(), batch_size=5), pooled)
    check(embedder.encode(images(), pool="tokens"), states)
    assert manager.stats()["hits"] > 0
    hits = manager.stats()["hits"]
    check(embedder.encode(images(), layers=[1]).embeddings, pooled)
    assert manager.stats()["hits"] == hits


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(build, saved, tmp_path):
    folder, pooled, states = saved(build.model())
    output = tmp_path / "out.npy"
    result = run("embed", folder, *FILES, "-o", output, "--device", "cpu", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 4 embeddings of width 64\n"
    check(np.load(output), pooled[:4])
    sidecar = json.loads((tmp_path / "out.npy.json").read_text())
    assert sidecar["names"] == [str(path) for path in FILES]
    assert sidecar["metadata"]["pooling"] == "head"
    output = tmp_path / "out.safetensors"
    options = ["--device", "cpu", "--layers", "1", "-q"]
    assert run("embed", folder, *FILES, "-o", output, "--pool", "tokens", *options).exit_code == 0
    with safe_open(output, "np") as file:
        rows, ends = file.get_tensor("tokens"), file.get_tensor("offsets")
        check(np.split(rows, ends[1:-1]), states[:4])
        assert np.array_equal(file.get_tensor("layer_1.offsets"), ends)
    assert run("embed", folder, *FILES, "-o", output, "--pool", "head", *options).exit_code == 0
    with safe_open(output, "np") as file:
        check(file.get_tensor("embeddings"), pooled[:4])
        assert len(file.get_tensor("layer_1.tokens")) == ends[-1]


def test_command_line_and_a_video(build, saved, tmp_path):
    folder, pooled, _ = saved(build.model())
    output = tmp_path / "out.npy"
    result = run("embed", folder, DATA, "-o", output, "--device", "cpu", "-q")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {VIDEO}: is a video, and this model reads images; pass its frames as images\n"
    )
    check(np.load(output), pooled[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "cls"], "--pool cls: choose from mean, max, tokens, head"),
        (["--pruning-rate", "0.5"], "siglip2 reads images; leave pruning_rate out"),
        (["--layers", "3"], "outside this tower's blocks 0..2"),
        (["--precision", "int4"], "precision = 'int4' is not known"),
    ],
)
def test_usage_errors(arguments, message, build, saved, tmp_path):
    folder, _, _ = saved(build.model())
    output = tmp_path / "out.safetensors"
    result = run("embed", folder, *FILES, "-o", output, "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()


def test_info(build, saved):
    folder, _, _ = saved(build.model())
    result = run("info", folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["spec"]["family"] == "siglip2"
    assert report["spec"]["position_grid"] == 8
