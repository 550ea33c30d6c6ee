"""Tiles of InternVL against Hugging Face's processor, bit for bit."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from vitgraph.encoder import InternVLPreprocessor, MediaError
from vitgraph.encoder.media import Video
from vitgraph.encoder.presets import IMAGENET_MEAN, IMAGENET_STD

# (height, width) to rows and columns of up to 12 tiles of 112 pixels
GRIDS = {
    # 1, 4 and 9 tiles are equally near: as many as have less than twice the pixels of the image,
    # so 4 from 158.4 pixels a side and 9 from 237.6
    (1, 1): (1, 1),
    (158, 158): (1, 1),
    (159, 159): (2, 2),
    (237, 237): (2, 2),
    (238, 238): (3, 3),
    (2000, 2000): (3, 3),
    # likewise 1 x 2 and 2 x 4
    (100, 200): (1, 2),
    (400, 800): (2, 4),
    (800, 400): (4, 2),
    # others have one nearest
    (300, 400): (3, 4),
    (300, 700): (2, 5),
    (1, 180): (1, 12),
    (199, 1): (12, 1),
    # between 1 x 3 (or 2 x 6) and 1 x 4
    (10, 35): (1, 3),
    (100, 350): (1, 4),
    (200, 700): (2, 6),
}
SIZES = [*GRIDS, (480, 640), (641, 333), (3, 5), (37, 1500), (112, 112), (1000, 999), (112, 224)]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def square(side):
    return {"height": side, "width": side}


def check(preprocessor, processor, image):
    want = processor(images=[image], crop_to_patches=True, return_tensors="pt")
    tiles = preprocessor(image)
    assert len(tiles) == want["num_patches"][0]
    assert tiles.dtype == torch.float32
    assert torch.equal(tiles, want["pixel_values"])


@pytest.mark.parametrize("size", GRIDS)
def test_grids(size):
    assert InternVLPreprocessor(112).grid(*size) == GRIDS[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(112, 1, 12), (28, 1, 40), (56, 3, 5), (84, 1, 1), (56, 4, 4)])
def test_equals_transformers(size, limits):
    side, least, most = limits
    processor = GotOcr2ImageProcessorPil(
        size=square(side), min_patches=least, max_patches=most, image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )  # fmt: skip
    check(InternVLPreprocessor(side, least, most), processor, picture(*size))


def test_grids_equal_transformers():
    """Grids alone, many of them."""
    rng = np.random.default_rng(1)
    for _ in range(500):
        height, width = (int(n) for n in np.exp(rng.uniform(0, 9, 2)))
        if rng.random() < 0.3:  # a shape that a grid has exactly
            height, width = (int(n) for n in rng.integers(1, 40) * rng.integers(1, 12, 2))
        side, least = int(rng.choice([28, 448])), int(rng.integers(1, 10))
        most = least + int(rng.integers(0, 30))
        rows, columns = InternVLPreprocessor(side, least, most).grid(height, width)
        want = get_optimal_tiled_canvas((height, width), (side, side), least, most)
        assert (columns, rows) == want, (height, width, side, least, most)


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    """Said by values: pixels of a tile are where they were, the thumbnail is the mean colour."""
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 40
    pixels = np.broadcast_to(colours, (2, 3, 56, 56, 3)).swapaxes(1, 2).reshape(112, 168, 3)
    tiles = InternVLPreprocessor(56, max_tiles=6, image_mean=0, image_std=1)(pixels)
    assert tiles.shape == (7, 3, 56, 56)
    inside = tiles[:6, :, 8:-8, 8:-8] * 255  # beyond the reach of the filter
    want = torch.arange(6.0).view(6, 1, 1, 1).mul(40).expand_as(inside)
    torch.testing.assert_close(inside, want, rtol=0, atol=1e-4)
    assert abs(tiles[6].mean() * 255 - 100) < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
        {"image_mean": 0.4, "image_std": 0.25},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5},
        {"min_patches": 2, "max_patches": 6, "size": square(56)},
        {"max_patches": 1, "size": 112},
        {"crop_to_patches": True},
        {},
    ],
)
def test_settings_of_a_folder(settings, tmp_path):
    processor = GotOcr2ImageProcessorPil(**{"size": square(84)} | settings)
    processor.save_pretrained(tmp_path)
    check(InternVLPreprocessor.from_folder(tmp_path), processor, picture(300, 200))


def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 4}')
    processor = GotOcr2ImageProcessorPil.from_pretrained(tmp_path)
    check(InternVLPreprocessor.from_folder(tmp_path), processor, picture(50, 90))


def test_settings_of_a_nested_file_and_of_none(tmp_path):
    released = InternVLPreprocessor.from_folder(tmp_path)
    assert released == InternVLPreprocessor(448, 1, 12, IMAGENET_MEAN, IMAGENET_STD, 3, 1 / 255)
    nested = {"image_processor": {"max_patches": 4}, "image_seq_length": 256}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 5}')
    assert InternVLPreprocessor.from_folder(tmp_path).max_tiles == 4
    # as that of a released repository
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 256}')
    assert InternVLPreprocessor.from_folder(tmp_path).max_tiles == 5
    for text, message in (
        ("[]", "JSON object is expected"),
        ("{", "not JSON"),
        ('{"image_processor": "GotOcr2"}', "image processor: 'GotOcr2' must be an object"),
    ):
        (tmp_path / "processor_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            InternVLPreprocessor.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast"])
def test_names_of_the_processor(kind):
    config = {
        "image_processor_type": kind,
        "size": {"height": 28, "width": 28, "longest_edge": None},
    }
    assert InternVLPreprocessor.from_config(config).tile_size == 28


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize = false"),
        ({"do_rescale": False}, "do_rescale = false"),
        ({"do_normalize": False}, "do_normalize = false"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor cuts .* another way"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "CLIPFeatureExtractor cuts"),
        ({"size": {"height": 448, "width": 336}}, r"size = \{'height': 448, .*must be a square"),
        ({"size": {"shortest_edge": 448}}, r"size = \{'shortest_edge': 448\} must be a square"),
        ({"size": square(448) | {"longest_edge": 9}}, "'longest_edge': 9} must be a square"),
        ({"size": [448, 448]}, r"tile_size = \[448, 448\] must be a positive integer"),
        ({"size": square("448")}, "tile_size = '448' must be a positive integer"),
        ({"size": 0}, "tile_size = 0 must be a positive integer"),
        ({"min_patches": 0}, "min_tiles = 0 must be a positive integer"),
        ({"max_patches": 2.5}, "max_tiles = 2.5 must be a positive integer"),
        ({"min_patches": 13}, "min_tiles = 13 and max_tiles = 12 must be in order"),
        ({"rescale_factor": "a"}, "rescale_factor = 'a' must be a positive number"),
        ({"rescale_factor": 0}, "rescale_factor = 0 must be a positive number"),
        ({"rescale_factor": 1e37}, r"rescale_factor = 1e\+37 and image_std = .* beyond fp32"),
        ({"resample": 99}, "resample = 99 is no filter of PIL, which has 0, 1, 2, 3, 4, 5"),
        ({"resample": True}, "resample = True is no filter"),
        ({"resample": 3.0}, "resample = 3.0 is no filter"),
        ({"rescale_factor": True}, "rescale_factor = True must be a positive number"),
        ({"image_std": [0, 1, 1]}, r"image_std = \(0, 1, 1\): deviations must be positive"),
        ({"image_std": [1, -1, 1]}, r"image_std = \(1, -1, 1\): deviations must be positive"),
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\] must be a number, or three of them"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        InternVLPreprocessor.from_config(config)


def test_a_limit_of_source_pixels_has_to_be_one():
    with pytest.raises(ValueError, match="max_source_pixels = 0 must be a positive integer"):
        InternVLPreprocessor(max_source_pixels=0)


def test_bad_images(tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for source, message in (
        (tmp_path / "missing.png", r"missing\.png: no such file"),
        (Video(frames), "Video object: is a video, .* pass its frames as images"),
        ({"frames": frames}, "is a video"),
    ):
        with pytest.raises(MediaError, match=message):
            InternVLPreprocessor()(source)
