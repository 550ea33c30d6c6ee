"""Whole views and crops: the cuts by hand, the values by PIL, and both by Hugging Face's own."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from vitgraph.encoder import MediaError, StepPreprocessor
from vitgraph.encoder.presets import CLIP_MEAN, CLIP_STD

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

# (height, width): padded, whole, cut, window, rows, columns
PLANS = {
    # fits a whole view and is not long: seen once
    (728, 728): ((728, 728), (728, 728), (728, 728), 0, 0, 0),
    (300, 450): ((300, 450), (300, 450), (300, 450), 0, 0, 0),
    # fits, but longer than 1.5 : 1: windows as high as the short side, 300 left over of 300
    (300, 451): ((300, 451), (300, 451), (300, 600), 300, 1, 2),
    (400, 700): ((400, 700), (400, 700), (400, 800), 400, 1, 2),
    # larger: windows of 504; 500 is shorter than one, 225 left over of 504 make another
    (500, 729): ((500, 729), (500, 729), (500, 1008), 504, 1, 2),
    (1000, 1500): ((1000, 1500), (1000, 1500), (1008, 1512), 504, 2, 3),
    # a fifth of a window is 100.8
    (1108, 900): ((1108, 900), (1108, 900), (1008, 1008), 504, 2, 2),
    (1109, 900): ((1109, 900), (1109, 900), (1512, 1008), 504, 3, 2),
    # longer than 4 : 1
    (200, 900): ((200, 900), (200, 900), (200, 1000), 200, 1, 5),
    (3000, 600): ((3000, 600), (3000, 600), (3024, 504), 504, 6, 1),
    # beyond 3024: scaled down first
    (6048, 1008): ((6048, 1008), (3024, 504), (3024, 504), 504, 6, 1),
    # thin and longer than 4 : 1: padded to a square
    (20, 300): ((300, 300), (300, 300), (300, 300), 0, 0, 0),
    (31, 124): ((31, 124), (31, 124), (31, 124), 31, 1, 4),
    (31, 125): ((125, 125), (125, 125), (125, 125), 0, 0, 0),
}


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", PLANS)
def test_plans(size):
    plan = StepPreprocessor().plan(*size)
    got = (plan.padded, plan.whole, plan.cut, plan.window, plan.rows, plan.columns)
    assert got == PLANS[size]


def normalised(image):
    """[3, h, w] of a PIL image, by the definition."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - MEAN) / STD


def resized(image, size):
    return image.resize(size, PIL.Image.Resampling.BILINEAR)


# one level of 255, over the smallest deviation: PyTorch's 8-bit filter rounds its weights to
# 16 bits, PIL's to 22
LEVEL = 1.01 / 255 / min(CLIP_STD)


@pytest.mark.parametrize(("height", "width"), [(400, 700), (505, 1200), (300, 200), (20, 300)])
def test_values_against_pil(height, width):
    preprocessor, image = StepPreprocessor(), picture(height, width)
    whole, crops, plan = preprocessor.image(image)
    black = PIL.Image.new("RGB", plan.padded[::-1])
    black.paste(image)
    view = normalised(resized(resized(black, plan.whole[::-1]), (728, 728)))
    assert whole.shape == (3, 728, 728)
    assert (whole - view).abs().max() <= 2 * LEVEL  # resized twice
    assert crops.shape == (plan.count, 3, 504, 504)
    cut = resized(image, plan.cut[::-1])
    for i, crop in enumerate(crops):
        top, left = (plan.window * k for k in divmod(i, plan.columns))
        right, low = min(left + plan.window, cut.width), min(top + plan.window, cut.height)
        window = resized(cut.crop((left, top, right, low)), (504, 504))
        assert (crop - normalised(window)).abs().max() <= 2 * LEVEL


def test_a_huge_image_is_scaled_down_first():
    image = picture(3100, 1600)
    whole, crops, plan = StepPreprocessor().image(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    def torch_resized(x, size):
        return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)

    assert plan.whole == (3024, 1560)
    view = torch_resized(torch_resized(pixels, (3024, 1560)), (728, 728))[0].float() / 255
    torch.testing.assert_close(whole, (view - MEAN) / STD, rtol=1e-6, atol=1e-6)
    cut = torch_resized(pixels, (3024, 1512))[:, :, 504:1008, :504][0].float() / 255
    assert len(crops) == 18
    torch.testing.assert_close(crops[3], (cut - MEAN) / STD, rtol=1e-6, atol=1e-6)


def test_a_whole_view_of_the_right_size_is_exact():
    image = picture(728, 728)
    whole, crops, _ = StepPreprocessor().image(image)
    torch.testing.assert_close(whole, normalised(image), rtol=1e-6, atol=1e-6)
    assert len(crops) == 0


def test_a_batch_keeps_the_order():
    preprocessor = StepPreprocessor()
    images = [picture(1000, 1500), picture(100, 100), picture(700, 900)]
    pixels = preprocessor(images)
    assert pixels.num_local_patches == (6, 0, 4)
    assert pixels.pixel_values.shape == (3, 3, 728, 728)
    first, last = (preprocessor.image(images[i]) for i in (0, 2))
    assert torch.equal(pixels.pixel_values[2], last[0])
    assert torch.equal(pixels.pixel_values_local, torch.cat([first[1], last[1]]))
    assert pixels.patch_newline_masks == [
        [False, False, True, False, False, False],
        [False] * 6,
        [False, True, False, False, False, False],
    ]
    plain = preprocessor([images[1]])
    assert plain.pixel_values_local is None
    assert plain.patch_newline_masks == [[]]
    assert preprocessor([]).pixel_values.shape == (0, 3, 728, 728)


def test_settings_of_a_folder(tmp_path):
    assert StepPreprocessor.from_folder(tmp_path) == StepPreprocessor()
    config = {"size": {"height": 56, "width": 56}, "patch_size": 28, "max_image_size": 300,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
              "rescale_factor": 0.5, "resample": 2}  # fmt: skip
    want = StepPreprocessor(56, 28, 300, (0.5,) * 3, (0.5,) * 3, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert StepPreprocessor.from_folder(tmp_path) == want
    nested = {"image_processor": config | {"patch_size": 14}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert StepPreprocessor.from_folder(tmp_path).crop_size == 14
    for text, message in (("[]", "JSON object is expected"), ("{", "not JSON")):
        (tmp_path / "processor_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            StepPreprocessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_normalize": False}, "do_normalize = false"),
        ({"resample": 3}, "resample = 3"),
        ({"size": {"height": 4, "width": 5}}, "must be a square"),
        ({"size": {"height": -4, "width": -4}}, "image_size = -4 must be positive"),
        ({"image_std": [0, 1, 1]}, "no deviation zero"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        StepPreprocessor.from_config(config)


def test_bad_images(tmp_path):
    with pytest.raises(MediaError, match=r"missing\.png"):
        StepPreprocessor()([tmp_path / "missing.png"])


@pytest.fixture(scope="module")
def hf_processor():
    try:
        import torchvision  # noqa: F401
        from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"Hugging Face's processor needs torchvision ({error})")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torchvision resizes in fp32 on this processor")
    return Step3p7ImageProcessor()


@pytest.mark.parametrize("size", [*PLANS, (1600, 3100), (10, 12), (300, 3000)])
def test_equals_transformers(size, hf_processor):
    image = picture(*size)
    want, got = hf_processor([image], return_tensors="pt"), StepPreprocessor()([image])
    assert torch.equal(got.pixel_values, want["pixel_values"])
    assert list(got.num_local_patches) == list(want["num_local_patches"])
    if got.pixel_values_local is None:
        assert "pixel_values_local" not in want
    else:
        assert torch.equal(got.pixel_values_local, want["pixel_values_local"])
        assert got.patch_newline_masks == want["patch_newline_masks"]
