"""Patches of SigLIP 2 against Hugging Face's processor, bit for bit."""

import json

import numpy as np
import PIL.Image
import pytest
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from vitgraph.encoder import MediaError, Siglip2Preprocessor
from vitgraph.encoder.media import Video

SIZES = [
    (256, 256), (480, 640), (641, 333), (16, 16), (3, 5), (1, 1), (1, 180), (199, 1), (37, 1500),
    (2000, 1999), (255, 257),
]  # fmt: skip
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def check(preprocessor, processor, image):
    want = processor(images=[image], return_tensors="np")
    rows, grid = preprocessor(image)
    assert grid == (1, *want["spatial_shapes"][0])
    assert rows.dtype == np.float32
    assert len(rows) == want["pixel_attention_mask"].sum() <= preprocessor.max_num_patches
    np.testing.assert_array_equal(rows, want["pixel_values"][0][: len(rows)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(16, 256), (16, 1024), (14, 100), (16, 7), (4, 61)])
def test_equals_transformers(size, limits):
    patch_size, most = limits
    processor = Siglip2ImageProcessorPil(patch_size=patch_size, max_num_patches=most)
    check(Siglip2Preprocessor(patch_size, most), processor, picture(*size))


def test_sizes_equal_transformers():
    """Sizes alone, many of them."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        get_image_size_for_max_num_patches as theirs,
    )

    rng = np.random.default_rng(1)
    drawn = [
        (*(int(n) for n in np.exp(rng.uniform(0, 9, 2))), int(rng.choice([14, 16, 32])),
         int(rng.integers(1, 1500)))
        for _ in range(300)
    ]  # fmt: skip
    # where a finer search would find one patch more
    for h, w, patch, most in [*drawn, (3429, 5858, 16, 1024), (9428, 4939, 16, 256)]:
        rows, columns = Siglip2Preprocessor(patch, most).grid(h, w)
        assert (rows * patch, columns * patch) == theirs(h, w, patch, most), (h, w, patch, most)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": MEAN, "image_std": STD},
        {"image_mean": 0.4, "image_std": 0.25},
        {"resample": 3},
        {"rescale_factor": 1 / 127.5},
        {"max_num_patches": 99, "patch_size": 8},
    ],
)
def test_settings_of_a_folder(settings, tmp_path):
    processor = Siglip2ImageProcessorPil(**settings)
    processor.save_pretrained(tmp_path)
    check(Siglip2Preprocessor.from_folder(tmp_path), processor, picture(300, 200))


def test_settings_of_a_nested_file_and_of_none(tmp_path):
    assert Siglip2Preprocessor.from_folder(tmp_path) == Siglip2Preprocessor()
    nested = {"image_processor": {"max_num_patches": 64}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "preprocessor_config.json").write_text('{"max_num_patches": 65}')
    assert Siglip2Preprocessor.from_folder(tmp_path).max_num_patches == 64
    for text, message in (("[]", "JSON object is expected"), ("{", "not JSON")):
        (tmp_path / "processor_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Siglip2Preprocessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize = false"),
        ({"do_normalize": False}, "do_normalize = false"),
        ({"image_processor_type": "Lfm2VlImageProcessorFast"}, "Lfm2VlImageProcessorFast cuts"),
        ({"max_num_patches": -1}, "max_num_patches = -1 must be a positive integer"),
        ({"max_num_patches": 9.5}, "max_num_patches = 9.5 must be a positive integer"),
        ({"patch_size": "16"}, "patch_size = '16' must be a positive integer"),
        ({"patch_size": 16.5}, "patch_size = 16.5 must be a positive integer"),
        ({"rescale_factor": "a"}, "rescale_factor = 'a' must be a positive number"),
        ({"rescale_factor": 0}, "rescale_factor = 0 must be a positive number"),
        ({"resample": 99}, "resample = 99 is no filter of PIL, which has 0, 1, 2, 3, 4, 5"),
        ({"resample": "cubic"}, "resample = 'cubic' is no filter of PIL"),
        ({"image_std": [0, 1, 1]}, r"image_std = \(0, 1, 1\): no deviation may be zero"),
        ({"image_std": 0}, r"image_std = \(0, 0, 0\): no deviation may be zero"),
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\] must be a number, or three of them"),
        ({"image_mean": "abc"}, "image_mean = 'abc' must be a number, or three of them"),
        ({"image_mean": [0.5, None, 0.5]}, "must be a number, or three of them"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        Siglip2Preprocessor.from_config(config)


def test_lfm2_cuts_images_in_another_way(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lfm2_vl"}')
    with pytest.raises(ValueError, match=r"Lfm2VlImageProcessor cuts .* Embedder a Siglip2Prep"):
        Siglip2Preprocessor.from_folder(tmp_path)


def test_bad_images(tmp_path):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for source, message in (
        (tmp_path / "missing.png", r"missing\.png: no such file"),
        (Video(frames), "Video object: is a video, .* pass its frames as images"),
        ({"frames": frames}, "is a video"),
    ):
        with pytest.raises(MediaError, match=message):
            Siglip2Preprocessor()(source)
