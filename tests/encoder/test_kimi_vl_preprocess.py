"""Pixels of Kimi-VL against the rule of its processor in words; transformers does not have it."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from vitgraph.encoder import MediaError
from vitgraph.encoder.kimi_vl_preprocess import MoonViTPreprocessor, reduced_size

SPEC: Any = SimpleNamespace(
    family="kimi_vl", patch_size=14, temporal_patch_size=1, merge_size=2, frame_positions=0
)
# as the files of published checkpoints have them
RELEASED = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor",
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
    },
    "in_token_limit": 4096, "patch_size": 14, "num_pooled_tokens": 1024, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "pad_input": True,
}  # fmt: skip
SIZES = [(56, 84), (61, 97), (213, 320), (400, 300), (7, 9), (27, 28), (13, 900), (29, 411)]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


def described(image: Image.Image, limit: int, mean: Any, std: Any) -> tuple[torch.Tensor, Any]:
    """Patches and grid by the rule in words: count whole patches; where they are more than the
    limit, scale both sides by the root of the excess, rounded down; fill up with black to the right
    and below; 0..1; normalise; cut row by row."""
    columns, rows = (side // 14 for side in image.size)
    if columns * rows > limit:
        scale = (limit / (columns * rows)) ** 0.5
        width, height = (int(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    below, beside = (-side % 28 for side in levels.shape[1:])
    levels = F.pad(levels, (0, beside, 0, below))
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = (levels.float() / 255 - mean) / std
    cut = pixels.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4)
    return cut.reshape(-1, 3 * 14 * 14), (1, *cut.shape[:2])


@pytest.mark.parametrize("limit", [4096, 100, 7])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pixels(size, limit):
    image = Image.fromarray(noise(*size))
    mean, std = [0.48145466, 0.5, 0.4], [0.26862954, 0.5, 0.3]
    settings = RELEASED | {"in_token_limit": limit, "image_mean": mean, "image_std": std}
    rows, grid = MoonViTPreprocessor.from_configs(SPEC, settings, {})(image)
    expected, grid_of_rule = described(image, limit, mean, std)
    assert grid == grid_of_rule
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected.numpy())


def test_settings(tmp_path):
    released = MoonViTPreprocessor.for_family(SPEC)
    assert released.max_pixels == 4096 * 196
    assert released.image_mean == released.image_std == (0.5,) * 3
    assert MoonViTPreprocessor.from_folder(tmp_path, SPEC) == released
    with_merge = RELEASED | {"merge_kernel_size": [2, 2]}
    # settings that its class does not look at
    with_others = RELEASED | {"resample": 0, "do_resize": False, "size": {"longest_edge": 9}}
    for settings in (RELEASED, with_merge, with_others):
        assert MoonViTPreprocessor.from_configs(SPEC, settings, settings) == released
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED | {"in_token_limit": 9}))
    assert MoonViTPreprocessor.from_folder(tmp_path, SPEC).max_pixels == 9 * 196
    # what the file lacks has the value that the class of the checkpoint's own code gives it
    read = MoonViTPreprocessor.from_configs(SPEC, {"pad_input": True}, {})
    assert read.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert read.image_std == (0.26862954, 0.26130258, 0.27577711)
    assert read.max_pixels == 4096 * 196


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_input": False}, "image processor: pad_input = False is not supported, only true is"),
        ({"pad_input": None}, "pad_input = None is not supported"),
        (
            {"merge_kernel_size": [1, 1]},
            r"merge_kernel_size = \[1, 1\], but the tower has \[2, 2\]",
        ),
        ({"patch_size": 16}, "image processor: patch_size = 16, but the tower has 14"),
        ({"in_token_limit": 0}, "image processor: in_token_limit = 0 must be a positive integer"),
        ({"in_token_limit": "9"}, "in_token_limit = '9' must be a positive integer"),
        ({"image_std": [1]}, r"image_std = \[1\] must be a number, or three"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MoonViTPreprocessor.from_configs(SPEC, RELEASED | change, {})
    with pytest.raises(ValueError, match="pad_input = False is not supported"):
        MoonViTPreprocessor.from_configs(SPEC, {"image_mean": [0.5] * 3}, {})


def test_a_side_has_less_than_512_patches(tmp_path):
    # 511 patches are filled up to 512
    preprocessor = MoonViTPreprocessor.for_family(SPEC)
    assert preprocessor(Image.new("RGB", (510 * 14, 60)))[1] == (1, 6, 510)
    path = tmp_path / "long.png"
    Image.new("RGB", (60, 510 * 14 + 1)).save(path)
    with pytest.raises(MediaError, match=r"long\.png: 7141 x 60 pixels .* 7168 x 84 of whole tok"):
        preprocessor(path)
    assert reduced_size(14, 2800, 14, 1) == (1, 197)
    # of many patches, so that it is reduced before it is looked at
    assert preprocessor(Image.new("RGB", (7168, 196)))[1] == (1, 12, 388)
