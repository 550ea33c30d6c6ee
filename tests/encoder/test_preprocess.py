import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vitgraph.encoder.frame_rules import resized_clip, sampled_frames
from vitgraph.encoder.media import Video
from vitgraph.encoder.preprocess import ImagePreprocessor

SIZES = [(56, 84), (61, 97), (29, 400), (7, 9), (213, 320), (1, 190), (333, 334)]


def spec(family: str):
    patch = 14 if family in ("qwen2_vl", "qwen2_5_vl") else 16
    return SimpleNamespace(family=family, patch_size=patch, temporal_patch_size=2, merge_size=2)


def hf_processor(ours: ImagePreprocessor) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels},
        patch_size=ours.patch_size,
        image_mean=list(ours.image_mean),
        image_std=list(ours.image_std),
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_images_equal_hugging_face_bit_for_bit(family, size):
    ours = ImagePreprocessor.for_family(spec(family))
    image = Image.fromarray(noise(*size))
    expected = hf_processor(ours)(images=[image], return_tensors="np")
    rows, grid = ours(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected["pixel_values"])


@pytest.mark.parametrize("limits", [(784, 1568), (4000, 50000), (300000, 400000)])
def test_pixel_limits_equal_hugging_face(limits):
    config = {"size": {"shortest_edge": limits[0], "longest_edge": limits[1]}}
    ours = ImagePreprocessor.from_configs(spec("qwen2_5_vl"), config, {})
    image = Image.fromarray(noise(240, 500))
    expected = hf_processor(ours)(images=[image], return_tensors="np")
    rows, grid = ours(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(rows, expected["pixel_values"])


def rows_by_definition(frames: np.ndarray, pre: ImagePreprocessor) -> np.ndarray:
    """Rows of [F, H, W, 3] uint8 by index arithmetic, without a transpose."""
    size, merge = pre.patch_size, pre.merge_size
    normal = (frames / 255 - np.array(pre.image_mean)) / np.array(pre.image_std)
    t, h, w = len(frames) // 2, frames.shape[1] // size, frames.shape[2] // size
    rows = []
    for clip in range(t):
        for block in range((h // merge) * (w // merge)):
            top, left = divmod(block, w // merge)
            for inner in range(merge**2):
                y = (top * merge + inner // merge) * size
                x = (left * merge + inner % merge) * size
                patch = normal[2 * clip : 2 * clip + 2, y : y + size, x : x + size]
                rows.append(np.moveaxis(patch, 3, 0).ravel())
    return np.stack(rows)


@pytest.mark.parametrize("num_frames", [2, 4, 5])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_video_rows_follow_the_layout_and_repeat_an_odd_last_frame(family, num_frames):
    pre = ImagePreprocessor.for_family(spec(family))
    side = 4 * pre.patch_size
    # an area inside the limits: nothing is resized
    pre = ImagePreprocessor.from_configs(
        spec(family), {}, {"min_pixels": side * side, "max_pixels": 16 * side * side}
    )
    frames = np.stack([noise(side, side, seed) for seed in range(num_frames)])
    rows, grid = pre(Video(frames))
    padded = np.concatenate([frames, frames[-1:]]) if num_frames % 2 else frames
    assert grid == (len(padded) // 2, 4, 4)
    np.testing.assert_allclose(rows, rows_by_definition(padded, pre), atol=1e-6)


def test_a_single_frame_is_a_clip_of_one_temporal_patch():
    for family in ("qwen2_vl", "qwen3_vl"):
        pre = ImagePreprocessor.for_family(spec(family))
        rows, grid = pre({"frames": [Image.fromarray(noise(64, 64))], "fps": 30})
        assert grid[0] == 1
        assert len(rows) == grid[1] * grid[2]


def test_video_frames_are_resized_as_images_are():
    pre = ImagePreprocessor.for_family(spec("qwen3_vl"))
    frames = np.stack([noise(100, 150, seed) for seed in range(4)])
    rows, grid = pre(Video(frames))
    height, width = resized_clip(4, 100, 150, 32, 2, pre.video_min_pixels, pre.video_max_pixels)
    resized = np.stack(
        [np.asarray(Image.fromarray(f).resize((width, height), Image.BICUBIC)) for f in frames]
    )
    assert grid == (2, height // 16, width // 16)
    np.testing.assert_allclose(rows, rows_by_definition(resized, pre), atol=1e-6)


# Taken from Qwen3VLVideoProcessor.sample_frames and Qwen2VLVideoProcessor.sample_frames of
# transformers 5.17, at 2 frames a second.
@pytest.mark.parametrize(
    ("rule", "total", "rate", "expected"),
    [
        ("qwen3", 16, 8.0, [0, 5, 10, 15]),
        ("qwen2", 16, 8.0, [0, 4, 8, 12]),
        ("qwen3", 60, 24.0, [0, 15, 30, 44, 59]),
        ("qwen2", 60, 24.0, [0, 15, 30, 45]),
        ("qwen3", 3, 30.0, [0, 1, 2]),
        ("qwen2", 3, 30.0, [0, 1]),
        ("qwen3", 1, 30.0, [0]),
        ("qwen2", 1, 30.0, [0]),
        ("qwen3", 5, None, [0, 1, 2, 3, 4]),
    ],
)
def test_sampled_frames(rule, total, rate, expected):
    assert sampled_frames(rule, total, rate, 2.0, 4, 768, 2) == expected


@pytest.mark.parametrize("rule", ["qwen2", "qwen3"])
def test_sampled_frames_stay_inside_any_clip(rule):
    for total in range(1, 400):
        for rate in (0.5, 24.0, 29.97, 60.0):
            indices = sampled_frames(rule, total, rate, 2.0, 4, 64, 2)
            assert indices == sorted(set(indices))
            assert indices
            assert 0 <= indices[0] <= indices[-1] < total
            assert len(indices) <= 65  # torch.arange may round to one more


def test_hugging_face_video_processors_agree():
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    frames = np.stack([noise(25, 40, seed).repeat(4, 0).repeat(4, 1) for seed in range(5)])
    for family, processor in (
        ("qwen2_vl", Qwen2VLVideoProcessor()),
        (
            "qwen3_vl",
            Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824}),
        ),
    ):
        theirs = processor(
            videos=[frames.transpose(0, 3, 1, 2)],
            video_metadata=[{"total_num_frames": 5, "fps": 8.0}],
            do_sample_frames=True,
            fps=2,
            cap_pixels_per_frame=False,
            return_tensors="np",
        )
        rows, grid = ImagePreprocessor.for_family(spec(family))(Video(frames, fps=8.0))
        assert theirs["video_grid_thw"].tolist() == [list(grid)]
        # torchvision rounds resized pixels its own way
        assert np.abs(theirs["pixel_values_videos"] - rows).mean() < 5e-3


STYLES = {
    "flat": {"preprocessor_config.json": {"min_pixels": 5000, "max_pixels": 90000}},
    "size": {"preprocessor_config.json": {"size": {"shortest_edge": 5000, "longest_edge": 90000}}},
    "size with pixels": {
        "preprocessor_config.json": {"size": {"min_pixels": 5000, "max_pixels": 90000}}
    },
    "nested": {
        "processor_config.json": {
            "image_processor": {"size": {"shortest_edge": 5000, "longest_edge": 90000}}
        },
        "preprocessor_config.json": {"min_pixels": 1, "max_pixels": 2},
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_folders_are_read_in_every_style(style, tmp_path):
    for name, content in STYLES[style].items():
        (tmp_path / name).write_text(json.dumps(content))
    pre = ImagePreprocessor.from_folder(tmp_path, spec("qwen2_5_vl"))
    assert (pre.min_pixels, pre.max_pixels) == (5000, 90000)
    # like transformers, a video without settings of its own takes those of images
    assert (pre.video_min_pixels, pre.video_max_pixels) == (5000, 90000)


def test_video_settings_of_a_folder(tmp_path):
    video = {
        "size": {"shortest_edge": 4096, "longest_edge": 50000},
        "fps": 4,
        "max_frames": 16,
        "cap_pixels_per_frame": True,
    }
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    pre = ImagePreprocessor.from_folder(tmp_path, spec("qwen3_vl"))
    assert (pre.video_min_pixels, pre.video_max_pixels) == (4096, 50000)
    assert (pre.video_fps, pre.max_frames, pre.video_token_cap) == (4, 16, 768)
    assert pre.max_pixels == 16777216


def test_an_empty_folder_gives_the_presets(tmp_path):
    pre = ImagePreprocessor.from_folder(tmp_path, spec("qwen3_vl"))
    assert pre == ImagePreprocessor.for_family(spec("qwen3_vl"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 32}, "patch_size = 32, but the tower has 14"),
        ({"do_resize": False}, "do_resize = false"),
        ({"size": 3}, "size = 3"),
        ({"min_pixels": 10, "max_pixels": 5}, "in order"),
        ({"image_std": [1, 0, 1]}, "no deviation zero"),
    ],
)
def test_settings_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ImagePreprocessor.from_configs(spec("qwen2_vl"), config, {})


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: not JSON"):
        ImagePreprocessor.from_folder(tmp_path, spec("qwen2_vl"))
