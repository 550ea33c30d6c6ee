"""`Embedder` and the command line with InternVL, against Hugging Face's model and processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qianfan_ocr.processing_qianfan_ocr import QianfanOCRProcessor
from typer.testing import CliRunner
from vitgraph.encoder import (
    Embedder,
    InternVLEncoder,
    InternVLPreprocessor,
    MediaError,
    load_encoder,
    swap_vision_tower,
)
from vitgraph.encoder import embedder as embedder_module
from vitgraph.encoder.cli import app
from vitgraph.encoder.media import Video
from vitgraph.encoder.presets import IMAGENET_MEAN, IMAGENET_STD
from vitgraph.kernels.testing import rel_rms

DATA = Path(__file__).parents[2] / "data"
FILES = [DATA / name for name in ("astronaut.jpg", "chelsea.png", "coffee.jpg", "rocket.jpg")]
VIDEO = DATA / "pan.mp4"
FP32 = 5e-6  # see test_internvl_towers
TILES = [5, 7, 7, 7, 1, 5, 7]  # of each of `images()`
MOST = 6
WORDS = ["<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]


class Processor(InternVLProcessor):
    """Hugging Face's, without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def images():
    """Photographs, a small picture that is one tile, a square and a long one."""
    rng = np.random.default_rng(0)
    sizes = [(100, 90), (200, 200), (30, 400)]
    drawn = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.open(path).copy() for path in FILES] + [
        Image.fromarray(pixels) for pixels in drawn
    ]


def tiles_of_transformers(kind, processor):
    """Tiles of `images()` [tiles, 3, S, S], by the processor of the whole model."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"start_image_token": "<img>", "end_image_token": "</img>",
               "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", extra_special_tokens=special
    )
    is_qianfan = kind == "qianfan"
    whole = (QianfanOCRProcessor if is_qianfan else Processor)(processor, tokenizer)
    place = "<image>" if is_qianfan else "<IMG_CONTEXT>"
    text = " ".join([place] * len(TILES))
    # as arrays: transformers 5.17 calls numpy for counts in tensors, which numpy warns of
    return torch.from_numpy(np.stack(whole(images=images(), text=[text])["pixel_values"]))


@pytest.fixture
def saved(build, tmp_path):
    """`saved(kind)`: a model and a processor in a folder, and the tokens of `images()` by both."""

    def save(kind="300m"):
        folder, model = tmp_path / "model", build.model(kind)
        processor = GotOcr2ImageProcessorPil(
            size={"height": build.side, "width": build.side}, max_patches=MOST,
            image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD),
        )  # fmt: skip
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert (
            json.loads((folder / "preprocessor_config.json").read_text())["crop_to_patches"]
            is False
        )
        pixels = tiles_of_transformers(kind, processor)
        with torch.no_grad():
            features = model.get_image_features(pixels).pooler_output
        return folder, [part.flatten(0, 1) for part in features.split(TILES)]

    return save


def check(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert rel_rms(torch.from_numpy(ours), theirs) < FP32


@pytest.mark.parametrize("kind", ["300m", "6b", "qianfan"])
def test_a_folder_gives_what_hugging_face_gives(kind, build, saved):
    folder, tokens = saved(kind)
    embedder = Embedder.from_pretrained(folder, device="cpu", local_files_only=True)
    assert isinstance(embedder.encoder, InternVLEncoder)
    assert embedder.preprocessor == InternVLPreprocessor(build.side, max_tiles=MOST)
    for batch_size in (1, 3, 32):
        options = {"batch_size": batch_size}
        check(embedder.encode(images(), pool="tokens", **options), tokens)
        check(embedder.encode(images(), **options), [t.mean(0) for t in tokens])
        check(embedder.encode(images(), pool="max", **options), [t.amax(0) for t in tokens])
    unit = [torch.nn.functional.normalize(t.mean(0)[:10], dim=-1) for t in tokens]
    check(embedder.encode(images(), normalize_embeddings=True, truncate_dim=10), unit)


def test_one_image_and_none(saved):
    folder, tokens = saved()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    for source in (FILES[0], str(FILES[0]), FILES[0].read_bytes(), images()[0]):
        one = embedder.encode(source)
        assert one.shape == (48,)
        check([one], [tokens[0].mean(0)])
    small = embedder.encode(images()[4], pool="tokens")
    check([small], [tokens[4]])
    assert small.shape == (16, 48)
    assert embedder.encode([]).shape == (0, 48)
    assert embedder.encode([], pool="tokens") == []


def test_what_the_encoder_makes_of_the_tiles(saved):
    """As in the README: the preprocessor's tiles are the encoder's argument."""
    folder, tokens = saved()
    encoder = load_encoder(folder, device="cpu")
    assert isinstance(encoder, InternVLEncoder)
    tiles = InternVLPreprocessor.from_folder(folder)(FILES[1])
    features = encoder(tiles).pooler_output
    check([features.flatten(0, 1).numpy()], [tokens[1]])
    # the thumbnail, which comes last, is what a single tile would be
    whole = Embedder(encoder, InternVLPreprocessor(tiles.shape[-1], max_tiles=1))
    check([whole.encode(FILES[1], pool="tokens")], [tokens[1][-16:]])


def test_batches_are_bounded_in_patches(saved, monkeypatch):
    folder, tokens = saved()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    sizes, features = [], InternVLEncoder.features

    def watched(self, pixels, names):
        sizes.append(64 * len(pixels))
        return features(self, pixels, names)

    monkeypatch.setattr(InternVLEncoder, "features", watched)
    check(embedder.encode(images(), pool="tokens"), tokens)
    assert sizes == [64 * sum(TILES)]  # one call
    sizes.clear()
    monkeypatch.setattr(embedder_module, "MAX_BATCH_PATCHES", 64 * 14)
    check(embedder.encode(images(), pool="tokens"), tokens)
    assert sizes == [64 * 12, 64 * 14, 64 * 13]


def test_captured_calls(build, saved, rerun_recorder):
    """With graphs, which the CPU runs again; more tiles than the largest rung, too."""
    folder, tokens = saved()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    embedder.encoder._capture_with(rerun_recorder, {"token_budgets": [16, 64, 128]})
    for batch_size in (1, 2, 32):
        check(embedder.encode(images(), pool="tokens", batch_size=batch_size), tokens)
    path = embedder.encoder.stats()["paths"]["tiles"]
    assert (path["items"], path["misses"]) == (3 * sum(TILES), 0)
    assert path["hits"] > 0


def test_videos_are_refused_and_the_rest_is_kept(saved, tmp_path):
    folder, tokens = saved()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    with pytest.raises(MediaError, match=r"pan\.mp4: is a video, .* pass its frames as images"):
        embedder.encode([FILES[0], VIDEO])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    frames = Video(np.zeros((2, 8, 8, 3), np.uint8))
    mixed = [VIDEO, FILES[0], FILES[1], broken, frames, *FILES[2:], tmp_path / "no.jpg"]
    options = {"on_error": "skip", "batch_size": 2, "pool": "tokens"}
    for num_workers in (0, 3):
        check(embedder.encode(mixed, num_workers=num_workers, **options), tokens[:4])
        assert [error.index for error in embedder.errors] == [0, 3, 4, 7]
        assert embedder.errors[2].message.startswith("input 4 (Video object): is a video")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_rate": 0.5}, "internvl reads images; leave pruning_rate out"),
        ({"layers": [0]}, r"layers = \[0\]: this tower \(internvl\) returns the states of no"),
        ({"pool": "head"}, r"this tower \(internvl\) has no pooling head; choose 'mean'"),
        ({"truncate_dim": 49}, "from 1 to the width 48"),
    ],
)
def test_arguments_that_are_refused(arguments, message, build):
    embedder = Embedder(InternVLEncoder.from_hf(build.model()))
    with pytest.raises(ValueError, match=message):
        embedder.encode(images(), **arguments)


def test_preprocessors(build):
    model = build.model()
    encoder = InternVLEncoder.from_hf(model)
    assert Embedder(encoder).preprocessor == InternVLPreprocessor(build.side)
    with pytest.raises(ValueError, match="tile_size = 448, the tower 112; use that of the tower's"):
        Embedder(encoder, InternVLPreprocessor())
    with pytest.raises(ValueError, match="came without its projector, which makes the tokens"):
        Embedder(InternVLEncoder.from_hf(model.model.vision_tower))


def test_the_encoder_of_a_swap(build, saved):
    folder, tokens = saved()
    with swap_vision_tower(build.model()) as handle:
        embedder = Embedder(handle.encoder, InternVLPreprocessor.from_folder(folder))
        check(embedder.encode(images(), pool="tokens"), tokens)


def test_a_folder_without_a_processor_is_cut_into_tiles_of_the_tower(build, saved):
    folder, _ = saved()
    (folder / "preprocessor_config.json").unlink()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert embedder.preprocessor == InternVLPreprocessor(build.side)


def test_folders_that_are_refused(saved, tmp_path):
    folder, _ = saved()
    for settings, message in (
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor cuts images in anot"),
        ({"do_resize": False}, "do_resize = false is not supported"),
        ({"size": {"height": 84, "width": 84}}, "tile_size = 84, the tower 112"),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            Embedder.from_pretrained(folder, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat", "vision_config": {}}')
    with pytest.raises(ValueError, match="use the repository that ends in -hf"):
        Embedder.from_pretrained(tmp_path, device="cpu")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(saved, tmp_path):
    folder, tokens = saved()
    output = tmp_path / "out.npy"
    result = run("embed", folder, *FILES, "-o", output, "--device", "cpu", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 4 embeddings of width 48\n"
    check(np.load(output), [t.mean(0) for t in tokens[:4]])
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
        check(np.split(rows, ends[1:-1]), tokens[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "layers = [0]: this tower (internvl) returns the states of no blocks"),
        (["--pruning-rate", "0.5"], "internvl reads images; leave pruning_rate out"),
        (["--pool", "head"], "this tower (internvl) has no pooling head"),
    ],
)
def test_usage_errors(arguments, message, saved, tmp_path):
    folder, _ = saved()
    output = tmp_path / "out.safetensors"
    result = run("embed", folder, *FILES, "-o", output, "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()
