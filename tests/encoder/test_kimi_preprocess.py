"""Pixels of Kimi-K2.5 against Hugging Face's processors, and the embedder that cuts videos."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.kimi_k25 import modeling_kimi_k25 as home
from vitgraph.encoder import Embedder, VisionEncoder
from vitgraph.encoder.frame_rules import contained_size, sampled_frames
from vitgraph.encoder.kimi_preprocess import NavitPreprocessor
from vitgraph.encoder.media import Video
from vitgraph.kernels.testing import rel_rms

DATA = Path(__file__).parents[1] / "data"
SPEC: Any = SimpleNamespace(
    family="kimi_k25", patch_size=14, temporal_patch_size=1, merge_size=2, frame_positions=4
)
SIZES = [(56, 84), (61, 97), (29, 400), (7, 9), (213, 320), (1, 190), (400, 300), (27, 28)]
LIMITS = [(16384, 512), (100, 512), (16384, 20)]
# as published models have them
PUBLISHED = {
    "in_patch_limit": 16384, "patch_size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "merge_kernel_size": 2, "fixed_output_tokens": None, "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 4096, "in_patch_limit_video": None, "sample_fps": 2.0,
    "max_num_frames_each_video": None, "temporal_merge_kernel_size": 4,
    "timestamp_mode": "hh:mm:ss.fff",
}  # fmt: skip


def config(max_patches: int, max_side: int) -> dict[str, Any]:
    return {
        "max_patches": max_patches,
        "size": {"max_height": max_side, "max_width": max_side},
    }


def processors() -> Any:
    """Hugging Face's, which need torchvision."""
    pytest.importorskip("torchvision")
    from transformers.models.kimi_k25 import image_processing_kimi_k25 as images
    from transformers.models.kimi_k25 import video_processing_kimi_k25 as videos

    return SimpleNamespace(
        image=images.Kimi_K25ImageProcessor,
        video=videos.Kimi_K25VideoProcessor,
        navit_resize=images.navit_resize,
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_images_equal_hugging_face_bit_for_bit(size, limits):
    hf = processors()
    image = Image.fromarray(noise(*size))
    expected = hf.image(**config(*limits))(images=[image], return_tensors="np")
    rows, grid = NavitPreprocessor.from_configs(SPEC, config(*limits), {})(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected["pixel_values"].reshape(len(rows), -1))


MEANS = [[0.5] * 3, [0.48145466, 0.4578275, 0.40821073]]


def levels_in_rows(mean: list[float]) -> tuple[Image.Image, np.ndarray]:
    """An image of one token that has every level, and its rows."""
    image = Image.fromarray((np.arange(28 * 28) % 256).astype(np.uint8).reshape(28, 28))
    return image, NavitPreprocessor.from_configs(SPEC, {"image_mean": mean}, {})(image)[0]


@pytest.mark.parametrize("mean", MEANS, ids=str)
def test_normalisation_equals_hugging_face_bit_for_bit(mean):
    hf = processors()
    image, rows = levels_in_rows(mean)
    expected = hf.image(image_mean=mean)(images=[image], return_tensors="np")
    np.testing.assert_array_equal(rows, expected["pixel_values"].reshape(len(rows), -1))


@pytest.mark.parametrize("mean", MEANS, ids=str)
def test_normalisation_is_that_of_whole_levels(mean):
    """As transformers does it for tensors: (level - 255 mean) / (255 deviation), in fp32."""
    image, rows = levels_in_rows(mean)
    levels = torch.from_numpy(np.array(image)).float().expand(3, 28, 28)
    scaled = [torch.tensor(values)[:, None, None] * 255.0 for values in (mean, [0.5] * 3)]
    expected = (levels - scaled[0]) / scaled[1]
    patches = expected.view(3, 2, 14, 2, 14).permute(1, 3, 0, 2, 4).reshape(4, -1)
    np.testing.assert_array_equal(rows, patches.numpy())


@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("size", [(64, 96), (300, 200)], ids=str)
def test_videos_equal_hugging_face_bit_for_bit(size, count):
    """Its chunks are ours, cut by the spec of the tower."""
    hf, frames = processors(), noise(count, *size)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = hf.video(**config(64, 512))(
        videos=[video], do_sample_frames=False, return_tensors="np"
    )
    ours = NavitPreprocessor.from_configs(SPEC, {}, config(64, 512))
    rows, grid = ours(Video(frames, fps=2.0))
    spec = VisionEncoder.from_hf(tower()).spec
    assert [list(clip) for clip in spec.clips(*grid)] == expected["video_grid_thw"].tolist()
    np.testing.assert_array_equal(rows, expected["pixel_values_videos"].reshape(len(rows), -1))


def test_sizes_and_frames_are_those_of_hugging_face():
    hf, rng = processors(), np.random.default_rng(1)
    for _ in range(2000):
        height, width = (int(np.exp(rng.uniform(0, 9.5))) for _ in range(2))
        patches, side = int(rng.integers(4, 20000)), int(rng.integers(2, 600))
        inner, whole = hf.navit_resize(height, width, 14, 2, patches, side)
        assert contained_size(height, width, 14, patches, side) == inner
        assert tuple(-(-n // 28) * 28 for n in inner) == whole
    processor = hf.video()
    for _ in range(500):
        total, rate = int(rng.integers(1, 4000)), float(rng.uniform(2, 120))
        if int(total / rate * 2) < 1:
            continue
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        # it may run one past the end
        expected = [i for i in processor.sample_frames(metadata).tolist() if i < total]
        assert sampled_frames("kimi", total, rate, 2, 4, 768, 1) == expected


# Taken from navit_resize of transformers 5.17, patches of 14.
@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((56, 84), (16384, 512), (56, 84)),
        ((4096, 4096), (16384, 512), (1795, 1795)),
        ((8192, 256), (16384, 512), (7168, 224)),
        ((213, 320), (100, 512), (117, 176)),
        ((29, 400), (16384, 20), (20, 280)),
        ((1, 190), (16384, 10), (1, 140)),
        ((1, 1), (16384, 512), (1, 1)),
    ],
)
def test_sizes(size, limits, expected):
    assert contained_size(*size, 14, *limits) == expected


# Taken from sample_frames of Kimi_K25VideoProcessor of transformers 5.17, at 2 frames a second.
@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [
        (16, 8.0, [0, 4, 8, 12]),
        (60, 24.0, [0, 12, 24, 36, 48]),
        (50, 25.0, [0, 12, 25, 37]),
        (17, 7.0, [0, 4, 8, 12]),
        # Hugging Face's divides by the number of frames, none
        (3, 30.0, [0]),
        # Hugging Face's refuses to take a frame twice
        (3, 1.0, [0, 1, 2]),
    ],
)
def test_sampled_frames(total, rate, expected):
    assert sampled_frames("kimi", total, rate, 2.0, 4, 768, 1) == expected


def test_rows_are_patches_row_by_row_on_black():
    image = noise(30, 45)
    rows, grid = NavitPreprocessor.for_family(SPEC)(image)
    assert grid == (1, 4, 4)
    whole = np.zeros((56, 56, 3), dtype=np.float64)
    whole[:30, :45] = image
    for r in range(4):
        for c in range(4):
            patch = whole[14 * r : 14 * r + 14, 14 * c : 14 * c + 14].transpose(2, 0, 1)
            error = np.abs(rows[4 * r + c] - (patch / 255 - 0.5).flatten() / 0.5)
            assert error.max() < 1e-6
    assert (rows[15] == -1).all()


def test_what_is_reduced_is_close_to_pil():
    image = Image.open(DATA / "coffee.jpg").convert("RGB")
    ours = NavitPreprocessor.from_configs(SPEC, config(100, 512), {})
    rows, (_, h, w) = ours(image)
    height, width = contained_size(image.height, image.width, 14, 100, 512)
    values = rows.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(14 * h, 14 * w, 3)
    levels = (values[:height, :width] + 1) * 127.5
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    assert np.abs(levels - resized).max() < 1.01
    assert (np.abs(levels - resized) > 0.5).mean() < 0.02


def test_settings():
    preset = NavitPreprocessor.for_family(SPEC)
    assert (preset.max_pixels, preset.video_max_pixels) == (16384 * 196, 4096 * 196)
    assert (preset.max_side, preset.video_fps) == (512, 2.0)
    # the defaults of transformers' classes, as they are saved; videos have limits of their own
    image = config(16384, 512) | {"image_processor_type": "Kimi_K25ImageProcessor", "resample": 3}
    video = config(4096, 512) | {"fps": 2, "temporal_patch_size": 4, "merge_size": 2}
    for pair in ((image, video), (image, image), ({}, {})):
        assert NavitPreprocessor.from_configs(SPEC, *pair) == preset
    published = {"media_proc_cfg": PUBLISHED, "processor_class": "KimiK25Processor"}
    assert NavitPreprocessor.from_configs(SPEC, published, published) == preset
    changed = PUBLISHED | {
        "in_patch_limit": 100, "in_patch_limit_each_frame": 50, "patch_limit_on_one_side": 30,
        "sample_fps": 1.0, "image_mean": [0.25] * 3,
    }  # fmt: skip
    read = NavitPreprocessor.from_configs(SPEC, *[{"media_proc_cfg": changed}] * 2)
    assert (read.max_pixels, read.video_max_pixels) == (100 * 196, 50 * 196)
    assert (read.max_side, read.video_fps, read.image_mean) == (30, 1.0, (0.25,) * 3)


def test_one_mean_is_that_of_every_channel():
    changed = {"media_proc_cfg": PUBLISHED | {"image_mean": 0.25, "image_std": 0.3}}
    read = NavitPreprocessor.from_configs(SPEC, changed, changed)
    assert (read.image_mean, read.image_std) == ((0.25,) * 3, (0.3,) * 3)


def test_settings_that_hugging_face_saves(tmp_path):
    hf = processors()
    hf.image(**config(300, 40)).save_pretrained(tmp_path)
    read = NavitPreprocessor.from_folder(tmp_path, SPEC)
    assert (read.max_pixels, read.video_max_pixels, read.max_side) == (300 * 196, 4096 * 196, 40)
    hf.video(**config(200, 40), fps=4).save_pretrained(tmp_path)
    read = NavitPreprocessor.from_folder(tmp_path, SPEC)
    assert (read.max_pixels, read.video_max_pixels, read.max_side) == (300 * 196, 200 * 196, 40)
    assert read.video_fps == 4


@pytest.mark.parametrize(
    ("image", "video", "message"),
    [
        ({"size": {"max_height": 9, "max_width": 8}}, {}, "must have equal max_height and max_wid"),
        ({"size": {"longest_edge": 9}}, {}, "must have equal max_height and max_width"),
        (config(9, 8), config(9, 9), r"\{'image': 8, 'video': 9\} patches differ"),
        ({}, {"temporal_patch_size": 2}, "video processor: temporal_patch_size = 2, but clips of"),
        ({"resample": 2}, {}, "image processor: resample = 2 is not supported, only 3"),
        ({"patch_size": 16}, {}, "image processor: patch_size = 16, but the tower has 14"),
        (
            {"media_proc_cfg": PUBLISHED | {"fixed_output_tokens": 64}},
            {},
            "image processor: media_proc_cfg.fixed_output_tokens = 64 is not supported",
        ),
        ({"size": 5}, {}, "image processor: size = 5 must have equal max_height and max_width"),
        (
            {"size": {"max_height": "a", "max_width": "a"}},
            {},
            "image processor: size.max_height = 'a' must be a positive integer",
        ),
        (
            {"media_proc_cfg": [1]},
            {},
            r"image processor: media_proc_cfg = \[1\] must be an object",
        ),
        (
            {"media_proc_cfg": {"in_patch_limit": "a"}},
            {},
            "image processor: media_proc_cfg.in_patch_limit = 'a' must be a positive integer",
        ),
        ({}, {"max_patches": 0}, "video processor: max_patches = 0 must be a positive integer"),
        (
            {},
            {"media_proc_cfg": {"patch_limit_on_one_side": 0}},
            "video processor: media_proc_cfg.patch_limit_on_one_side = 0 must be a positive",
        ),
        ({"image_mean": "a"}, {}, "image processor: image_mean = 'a' must be a number, or three"),
        ({}, {"image_std": [1]}, r"video processor: image_std = \[1\] must be a number, or three"),
    ],
)
def test_settings_that_are_refused(image, video, message):
    with pytest.raises(ValueError, match=message):
        NavitPreprocessor.from_configs(SPEC, image, video)


def tower() -> Any:
    """Boosted weights, under which every patch shows in the output."""
    torch.manual_seed(0)
    cls = home.Kimi_K25VisionModel
    tower = cls._from_config(
        cls.config_class(
            hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96,
            pos_emb_height=8, pos_emb_width=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in tower.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3 if p.shape[-1] == 64 and p.ndim == 3 else p[0].numel() ** -0.5)
    return tower.eval()


def test_embedder_cuts_videos_into_clips():
    hf, frames = tower(), noise(9, 64, 96)
    embedder = Embedder(VisionEncoder.from_hf(hf))
    video, image = {"frames": frames, "fps": 2.0}, Image.fromarray(frames[0])
    rows, grid = embedder.preprocessor(Video(frames, fps=2.0))
    assert grid == (9, 6, 8)
    pixels = torch.from_numpy(rows).view(-1, 3, 14, 14)
    with torch.no_grad():
        tokens = [
            hf(part, torch.tensor([[len(part) // 48, 6, 8]])).pooler_output.flatten(1)
            for part in pixels.split(4 * 48)
        ]
        still = hf(pixels[:48], torch.tensor([[1, 6, 8]])).pooler_output.flatten(1)
    expected = torch.cat(tokens)
    first, last, again = embedder.encode([image, video, image], pool="tokens")
    assert (first.shape, last.shape) == ((12, 256), (36, 256))
    assert rel_rms(torch.from_numpy(last), expected) < 1e-4
    for one in (first, again):
        assert rel_rms(torch.from_numpy(one), still) < 1e-4
    mean = embedder.encode([video, image])
    assert mean.shape == (2, 256)
    assert rel_rms(torch.from_numpy(mean), torch.stack([expected.mean(0), still.mean(0)])) < 1e-4
    layers = embedder.encode([video, image], pool="tokens", layers=[0]).layers[0]
    assert [len(rows) for rows in layers] == [9 * 48, 48]
    with pytest.raises(ValueError, match="averages the frames of a clip"):
        embedder.encode([video], pruning_rate=0.5)


def test_embedder_of_a_folder(tmp_path):
    from transformers import Kimi_K25Config

    text = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    hf = tower()
    Kimi_K25Config(text_config=text, vision_config=hf.config.to_dict()).save_pretrained(tmp_path)
    from safetensors.torch import save_file

    state = {f"model.vision_tower.{k}": v.contiguous() for k, v in hf.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    settings = {"media_proc_cfg": PUBLISHED | {"in_patch_limit": 50}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    assert isinstance(embedder.preprocessor, NavitPreprocessor)
    assert embedder.preprocessor.max_pixels == 50 * 196
    image = Image.open(DATA / "coffee.jpg")
    rows, grid = embedder.preprocessor(image)
    with torch.no_grad():
        pixels = torch.from_numpy(rows).view(-1, 3, 14, 14)
        expected = hf(pixels, torch.tensor([grid])).pooler_output.flatten(1)
    assert rel_rms(torch.from_numpy(embedder.encode(image, pool="tokens")), expected) < 1e-4
