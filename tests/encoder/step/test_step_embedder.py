"""`Embedder` and the command line with Step towers, against Hugging Face's model and processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor
from typer.testing import CliRunner
from vitgraph.capture.multi_path import MultiPathManager
from vitgraph.encoder import (
    Embedder,
    MediaError,
    StepEncoder,
    StepPreprocessor,
    swap_vision_tower,
)
from vitgraph.encoder import embedder as embedder_module
from vitgraph.encoder.cli import app
from vitgraph.encoder.feed import feed_of, folder_preprocessor
from vitgraph.encoder.image_tower import path_configs
from vitgraph.encoder.media import Video
from vitgraph.kernels.testing import rel_rms

DATA = Path(__file__).parents[2] / "data"
FILES = [DATA / name for name in ("astronaut.jpg", "chelsea.png", "coffee.jpg", "rocket.jpg")]
VIDEO = DATA / "pan.mp4"
FP32 = 5e-6  # see test_step_towers
MOST = 300  # longest side of an image before it is cut


class Processor(Step3p7ImageProcessor):
    """Hugging Face's plan, cuts and order; what it calls torchvision for is done by PyTorch."""

    def resize(self, image, size, resample=None, **options):
        shape = size.height, size.width
        if image.shape[-2:] == shape:
            return image
        return F.interpolate(image, shape, mode="bilinear", antialias=True, align_corners=False)

    def pad(self, images, pad_size, **options):
        return [
            F.pad(x, (0, pad_size.width - x.shape[2], 0, pad_size.height - x.shape[1]))
            for x in images
        ]

    def normalize(self, image, mean, std, **options):
        return (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def of(self, images):
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        settings = {
            key: getattr(self, key)
            for key in ("do_rescale", "rescale_factor", "do_normalize", "resample", "size")
        }
        return self._preprocess(
            tensors, image_mean=tuple(self.image_mean), image_std=tuple(self.image_std),
            patch_size=self.patch_size, disable_grouping=True, return_tensors="pt", **settings,
        )  # fmt: skip


def images():
    """Photographs of many crops, and pictures of none, of some, and one that is padded."""
    rng = np.random.default_rng(0)
    sizes = [(100, 120), (60, 140), (20, 100)]
    drawn = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    pictures = [Image.fromarray(pixels) for pixels in drawn]
    return pictures[:1] + [Image.open(path).copy() for path in FILES] + pictures[1:]


@pytest.fixture
def processor(build):
    size = {"height": build.image, "width": build.image}
    return Processor(size=size, patch_size=build.crop, max_image_size=MOST)


@pytest.fixture
def saved(build, processor, tmp_path, column_first):
    """A folder with a model and its processor, and what they make of `images()`."""
    folder, model = tmp_path / "model", build.hf_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor.of(images())
    counts = inputs["num_local_patches"]
    assert min(counts) == 0
    assert max(counts) > 4
    with torch.no_grad():
        output = model.get_image_features(
            inputs["pixel_values"], inputs["pixel_values_local"], counts
        )
    return folder, output.pooler_output


def check(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert rel_rms(torch.from_numpy(ours), theirs) < FP32


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_folder_gives_what_hugging_face_gives(batch_size, build, saved):
    folder, tokens = saved
    embedder = Embedder.from_pretrained(folder, device="cpu", local_files_only=True)
    assert isinstance(embedder.encoder, StepEncoder)
    assert embedder.preprocessor == StepPreprocessor(build.image, build.crop, MOST)
    options = {"batch_size": batch_size}
    check(embedder.encode(images(), pool="tokens", **options), tokens)
    check(embedder.encode(images(), **options), [t.mean(0) for t in tokens])
    check(embedder.encode(images(), pool="max", **options), [t.amax(0) for t in tokens])


def test_crops_come_before_the_whole_image(build, saved):
    """Said by sizes too: 4 tokens a crop and then 9 of the whole, as that alone would be."""
    folder, _ = saved
    embedder = Embedder.from_pretrained(folder, device="cpu")
    image = images()[1]
    tokens = embedder.encode(image, pool="tokens")
    pixels = embedder.preprocessor([image])
    (count,) = pixels.num_local_patches
    assert len(tokens) == 4 * count + 9
    alone = embedder.encoder(pixels.pixel_values).pooler_output[0]
    assert rel_rms(torch.from_numpy(tokens[-9:]), alone) < FP32


def test_batches_are_bounded_in_patches(saved, monkeypatch):
    folder, tokens = saved
    embedder = Embedder.from_pretrained(folder, device="cpu")
    sizes, call = [], StepEncoder.__call__

    def watched(self, pixels, crops, counts):
        sizes.append(100 * len(pixels) + 36 * len(crops))
        return call(self, pixels, crops, counts)

    monkeypatch.setattr(StepEncoder, "__call__", watched)
    monkeypatch.setattr(embedder_module, "MAX_BATCH_PATCHES", 700)
    check(embedder.encode(images(), pool="tokens"), tokens)
    assert max(sizes) <= 700
    assert 1 < len(sizes) < len(tokens)


def test_videos_are_refused_and_the_rest_is_kept(saved, tmp_path):
    folder, tokens = saved
    embedder = Embedder.from_pretrained(folder, device="cpu")
    with pytest.raises(MediaError, match=r"pan\.mp4: is a video, .* pass its frames as images"):
        embedder.encode([FILES[0], VIDEO])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    frames = Video(np.zeros((2, 8, 8, 3), np.uint8))
    mixed = [VIDEO, FILES[0], FILES[1], broken, frames, *FILES[2:], tmp_path / "no.jpg"]
    options = {"on_error": "skip", "batch_size": 2, "pool": "tokens"}
    for num_workers in (0, 3):
        check(embedder.encode(mixed, num_workers=num_workers, **options), tokens[1:5])
        assert [error.index for error in embedder.errors] == [0, 3, 4, 7]
        assert embedder.errors[2].message.startswith("input 4 (Video object): is a video")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_rate": 0.5}, "step3p7 reads images; leave pruning_rate out"),
        ({"layers": [0]}, r"layers = \[0\]: this tower \(step3p7\) returns the states of no"),
        ({"pool": "head"}, r"this tower \(step3p7\) has no pooling head; choose 'mean'"),
        ({"truncate_dim": 49}, "from 1 to the width 48"),
    ],
)
def test_arguments_that_are_refused(arguments, message, build):
    embedder = Embedder(build.encoder(build.hf_model()))
    with pytest.raises(ValueError, match=message):
        embedder.encode(images(), **arguments)


def test_preprocessors(build):
    encoder = build.encoder(build.hf_model())
    assert Embedder(encoder).preprocessor == StepPreprocessor(build.image, build.crop)
    with pytest.raises(ValueError, match="image_size = 728, the tower 140"):
        Embedder(encoder, StepPreprocessor())
    with pytest.raises(ValueError, match="crop_size = 504, the tower 84"):
        Embedder(encoder, StepPreprocessor(build.image))


def test_captured_calls(saved, rerun_recorder):
    """With graphs, which the CPU runs again."""
    folder, tokens = saved
    embedder = Embedder.from_pretrained(folder, device="cpu")
    encoder = embedder.encoder
    config = {"global": {"token_budgets": [36]}, "local": {"token_budgets": [16, 64]}}
    manager = MultiPathManager(
        encoder.paths, path_configs(encoder.paths, config), recorder=rerun_recorder
    )
    manager.capture()
    encoder.graphs = manager
    for batch_size in (1, 4):
        check(embedder.encode(images(), pool="tokens", batch_size=batch_size), tokens)
    assert all(path["hits"] > 0 for path in encoder.stats()["paths"].values())


@torch.no_grad()
def test_folder_of_step3(build, processor, tmp_path):
    tower = build.step3()
    config = {"model_type": "step3_vl", "vision_config": build.step3_config,
              "text_config": {"hidden_size": 48}, "understand_projector_stride": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dict(tower.named_parameters()), tmp_path / "model.safetensors")
    processor.save_pretrained(tmp_path)
    inputs = processor.of(images())
    wholes, crops = tower(inputs["pixel_values"])[1], tower(inputs["pixel_values_local"])[1]
    pieces = zip(crops.split(list(inputs["num_local_patches"])), wholes, strict=True)
    want = [torch.cat([*part, whole]) for part, whole in pieces]
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    assert embedder.encoder.spec.family == "step3_vl"
    check(embedder.encode(images(), pool="tokens", batch_size=3), want)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(saved, tmp_path):
    folder, tokens = saved
    output = tmp_path / "out.npy"
    result = run("embed", folder, *FILES, "-o", output, "--device", "cpu", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 4 embeddings of width 48\n"
    check(np.load(output), [t.mean(0) for t in tokens[1:5]])
    assert json.loads((tmp_path / "out.npy.json").read_text())["metadata"]["pooling"] == "mean"
    output = tmp_path / "out.safetensors"
    options = ["--pool", "tokens", "--device", "cpu", "-q"]
    result = run("embed", folder, DATA, "-o", output, *options)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {VIDEO}: is a video, and this model reads images; pass its frames as images\n"
    )
    with safe_open(output, "np") as file:
        rows, ends = file.get_tensor("tokens"), file.get_tensor("offsets")
        check(np.split(rows, ends[1:-1]), tokens[1:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "layers = [0]: this tower (step3p7) returns the states of no blocks"),
        (["--pruning-rate", "0.5"], "step3p7 reads images; leave pruning_rate out"),
        (["--pool", "head"], "this tower (step3p7) has no pooling head"),
    ],
)
def test_usage_errors(arguments, message, saved, tmp_path):
    output = tmp_path / "out.safetensors"
    result = run("embed", saved[0], *FILES, "-o", output, "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()


def test_info(saved):
    result = run("info", saved[0], "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["spec"]["family"] == "step3p7"


def test_a_tower_of_a_swap_is_no_encoder(build):
    with swap_vision_tower(build.hf_model(), rope_axes="hw") as handle:
        for call in (feed_of, Embedder, lambda tower: folder_preprocessor(tower, "nowhere")):
            with pytest.raises(ValueError, match=r"a ImageTower cannot be fed.*load_encoder"):
                call(handle.encoder)
