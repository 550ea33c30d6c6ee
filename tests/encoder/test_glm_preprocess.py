"""Pixels of GLM's towers against Hugging Face's processors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import (
    Glm5NextImageProcessorPil,
    smart_resize,
)
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from vitgraph.encoder.frame_rules import resized_clip, sampled_frames
from vitgraph.encoder.glm5_preprocess import CanvasPreprocessor, canvas
from vitgraph.encoder.media import Video
from vitgraph.encoder.preprocess import ImagePreprocessor

SIZES = [(56, 84), (61, 97), (29, 400), (7, 9), (213, 320), (1, 190), (333, 334), (27, 28)]
PROCESSORS = {"glm4v": Glm4vImageProcessorPil, "glm_ocr": Glm46VImageProcessorPil}


def spec(family: str):
    return SimpleNamespace(family=family, patch_size=14, temporal_patch_size=2, merge_size=2)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", PROCESSORS)
def test_images_equal_hugging_face_bit_for_bit(family, size):
    ours = ImagePreprocessor.for_family(spec(family))
    limits = {"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels}
    image = Image.fromarray(noise(*size))
    expected = PROCESSORS[family](size=limits)(images=[image], return_tensors="np")
    rows, grid = ours(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected["pixel_values"])


@pytest.mark.parametrize("limits", [(1568, 6272), (8000, 100000), (600000, 800000)])
def test_pixel_limits_count_both_frames(limits):
    config = {"size": {"shortest_edge": limits[0], "longest_edge": limits[1]}}
    ours = ImagePreprocessor.from_configs(spec("glm4v"), config, {})
    image = Image.fromarray(noise(240, 500))
    expected = Glm4vImageProcessorPil(**config)(images=[image], return_tensors="np")
    rows, grid = ours(image)
    assert limits[0] <= 2 * 196 * grid[1] * grid[2] <= limits[1]
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(rows, expected["pixel_values"])


# Taken from sample_frames of Glm4vVideoProcessor, Glm46VVideoProcessor and Glm5NextVideoProcessor
# of transformers 5.17, at 2 frames a second.
@pytest.mark.parametrize(
    ("rule", "total", "rate", "expected"),
    [
        ("glm4v", 16, 8.0, [0, 4, 8, 12]),
        ("glm4v", 60, 24.0, [0, 12, 24, 36, 48, 48]),
        ("glm4v", 3, 30.0, [0, 0]),
        ("glm4v", 50, 25.0, [0, 13, 25, 38]),
        ("glm46v", 16, 8.0, [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]),
        ("glm46v", 60, 24.0, [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 32, 35, 38, 41, 45, 45]),
        ("glm46v", 10, 30.0, [0, 0]),
        # Hugging Face's takes none, and fails
        ("glm46v", 3, 30.0, [0, 0]),
        ("glm5", 3, 30.0, [0, 0]),
        ("glm5", 16, 8.0, [0, 4, 8, 12]),
        ("glm5", 60, 24.0, [0, 9, 18, 27, 36, 36]),
    ],
)
def test_sampled_frames(rule, total, rate, expected):
    assert sampled_frames(rule, total, rate, 2.0, 4, 768, 2) == expected


@pytest.mark.parametrize(
    ("rule", "count", "first", "last"),
    [("glm4v", 600, [0, 34, 67], [19967, 19999]), ("glm46v", 640, [0, 31, 62], [19967, 19999])],
)
def test_sampled_frames_of_long_clips(rule, count, first, last):
    indices = sampled_frames(rule, 20000, 25.0, 2.0, 4, 768, 2)
    assert (len(indices), indices[:3], indices[-2:]) == (count, first, last)


@pytest.mark.parametrize(("seconds", "count"), [(20, 120), (100, 200), (400, 400), (2000, 640)])
def test_longer_clips_of_glm46v_have_fewer_frames_a_second(seconds, count):
    assert len(sampled_frames("glm46v", 25 * seconds, 25.0, 2.0, 4, 768, 2)) == count


@pytest.mark.parametrize("rule", ["glm4v", "glm46v", "glm5"])
def test_sampled_frames_stay_inside_any_clip(rule):
    for total in range(1, 200):
        for rate in (0.5, 24.0, 29.97, 60.0):
            indices = sampled_frames(rule, total, rate, 2.0, 4, 64, 2)
            assert indices == sorted(indices)
            assert len(indices) % 2 == 0
            assert 0 <= indices[0] <= indices[-1] < total


def test_video_frames_are_resized_by_their_number():
    pre = ImagePreprocessor.for_family(spec("glm4v"))
    frames = np.stack([noise(100, 150, seed) for seed in range(16)])
    _, grid = pre(Video(frames, fps=8.0))
    height, width = resized_clip(4, 100, 150, 28, 2, pre.video_min_pixels, pre.video_max_pixels)
    assert grid == (2, height // 14, width // 14)
    low = ImagePreprocessor.from_configs(
        spec("glm4v"), {}, {"size": {"shortest_edge": 784, "longest_edge": 30000}}
    )
    _, grid = low(Video(frames, fps=8.0))
    assert 4 * 196 * grid[1] * grid[2] <= 30000


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ({}, "glm4v"),
        ({"video_preprocessor_config.json": "Glm46VVideoProcessor"}, "glm46v"),
        ({"preprocessor_config.json": "Glm46VImageProcessor"}, "glm46v"),
        (
            {
                "preprocessor_config.json": "Glm46VImageProcessor",
                "video_preprocessor_config.json": "Glm4vVideoProcessor",
            },
            "glm4v",
        ),
    ],
)
def test_the_files_of_a_folder_say_how_videos_are_sampled(files, rule, tmp_path):
    for name, kind in files.items():
        key = "video_processor_type" if "video" in name else "image_processor_type"
        (tmp_path / name).write_text(json.dumps({key: kind, "max_duration": 60}))
    pre = ImagePreprocessor.from_folder(tmp_path, spec("glm4v"))
    assert pre.video_rule == rule
    assert pre.video_max_seconds == (60 if files else 300)


def test_another_length_limits_frames():
    assert len(sampled_frames("glm4v", 20000, 25.0, 2.0, 4, 768, 2, max_seconds=60)) == 120


@pytest.mark.parametrize("tokens", [(16, 8000), (4, 12), (40, 60)])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_images_of_glm5_equal_hugging_face_bit_for_bit(size, tokens):
    config = {"min_image_tokens": tokens[0], "max_image_tokens": tokens[1]}
    # the size that its saved configs hold has no meaning
    ours = CanvasPreprocessor.from_configs(
        spec("glm5_next"), {**config, "size": {"longest_edge": 1}}, {"max_duration": 0}
    )
    image = Image.fromarray(noise(*size))
    expected = Glm5NextImageProcessorPil(**config)(images=[image], return_tensors="np")
    rows, grid = ours(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(rows, expected["pixel_values"])


def test_canvases_equal_hugging_face():
    draw = np.random.default_rng(0)
    for _ in range(300):
        frames, height, width = (int(n) for n in draw.integers(1, (9, 900, 900)))
        low, high = sorted(int(n) for n in draw.integers(8, 900, 2))
        expected = smart_resize(frames, height, width, min_pixels=low, max_pixels=high)
        token = 2 * 28 * 28
        assert canvas(frames, height, width, 28, 2, low * token, high * token) == expected


def test_videos_of_glm5_lie_on_one_canvas():
    pre = CanvasPreprocessor.for_family(spec("glm5_next"))
    nothing = {"size": {"longest_edge": 1}}
    assert CanvasPreprocessor.from_configs(spec("glm5_next"), nothing, nothing) == pre
    assert (pre.max_frames, pre.video_max_seconds) == (2048, 0)
    # enlarged: four frames of 30 x 40 are less than 16 tokens
    _, grid = pre(Video(np.zeros((16, 30, 40, 3), np.uint8), fps=8.0))
    assert grid == (2, 6, 8)
    small = CanvasPreprocessor.from_configs(spec("glm5_next"), {}, {"min_image_tokens": 1})
    _, grid = small(Video(np.zeros((16, 30, 40, 3), np.uint8), fps=8.0))
    assert grid == (2, 4, 4)
    frames = np.stack([noise(80, 90, seed) for seed in range(16)])
    rows, grid = pre(Video(frames, fps=8.0))
    assert grid == (2, 6, 8)  # 84 x 112
    # the first row of a frame's patches is its content, the last its black edge
    black = (0 - np.array(pre.image_mean)) / np.array(pre.image_std)
    patch = rows[6 * 8 - 1].reshape(3, 2, 14, 14)
    np.testing.assert_allclose(patch, np.broadcast_to(black[:, None, None, None], patch.shape))
    content = (frames[0, :14, :14] / 255 - pre.image_mean) / np.array(pre.image_std)
    np.testing.assert_allclose(
        rows[0].reshape(3, 2, 14, 14)[:, 0], content.transpose(2, 0, 1), atol=1e-6
    )


def test_settings_of_glm5_that_are_refused():
    with pytest.raises(ValueError, match="patch_expand_factor = 2 is not supported"):
        CanvasPreprocessor.from_configs(spec("glm5_next"), {"patch_expand_factor": 2}, {})
    with pytest.raises(
        ValueError, match="max_pixels = 3000 is too small for 4 frames of one token"
    ):
        canvas(4, 100, 100, 28, 2, 1000, 3000)
