"""Images to the whole views and crops of the Step models, as Hugging Face's processor cuts them.

An image is seen whole, squeezed to a square, and, if it is large or long, in square windows of its
own pixels as well. Sizes and cuts are those of `Step3p7ImageProcessor`, and so are the values:
8-bit antialiased bilinear resizing by PyTorch, which is what torchvision calls on processors with
AVX2 or Arm's; then normalisation in fp32 with mean and deviation in units of a byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from .media import MAX_SOURCE_PIXELS, load_image
from .presets import CLIP_MEAN, CLIP_STD

ELONGATED = 1.5  # a small image is cut if one side is longer than the other by more than this
VERY_ELONGATED = 4.0  # windows of a longer image are as high as its short side
THIN = 32  # a side below it, of an image longer than 1:4, is padded to a square
SNAP = 0.2  # of a window: what is left over of a side becomes a window of its own above this


@dataclass(frozen=True)
class CropPlan:
    """How an image is seen. Sizes are (height, width) in pixels.

    Attributes:
        padded: What the image is padded to with black, on the right and below; or its own size.
        whole: What the whole view is resized to before it is squeezed to a square.
        cut: What the image is resized to before it is cut into windows.
        window: Side of a window; 0 for no crops.
        rows, columns: Windows.
    """

    padded: tuple[int, int]
    whole: tuple[int, int]
    cut: tuple[int, int]
    window: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Crops of the image."""
        return self.rows * self.columns


@dataclass(frozen=True)
class StepPixels:
    """Arguments of a `StepEncoder` call, and what a prompt needs to know of them.

    Attributes:
        pixel_values: [N, 3, S, S] fp32 whole views.
        pixel_values_local: [crops of all images, 3, s, s] fp32; None if no image has any.
        num_local_patches: Crops of each image.
        patch_newline_masks: For each image, for each crop, whether a line of crops ends there with
            more to follow; padded with False to the longest.
    """

    pixel_values: torch.Tensor
    pixel_values_local: torch.Tensor | None
    num_local_patches: tuple[int, ...]
    patch_newline_masks: list[list[bool]]


@dataclass(frozen=True)
class StepPreprocessor:
    """Settings of the preprocessing; calling it turns images into a `StepPixels`.

    Attributes:
        image_size: Pixels along a side of a whole view.
        crop_size: Pixels along a side of a crop.
        max_image_size: Longest side of an image before it is cut; larger ones are scaled down.
        image_mean, image_std: Of each channel, for pixels from 0 to 1.
        rescale_factor: From stored values to 0..1.
        max_source_pixels: Largest image that is read, in pixels.
    """

    image_size: int = 728
    crop_size: int = 504
    max_image_size: int = 3024
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        for name in ("image_size", "crop_size", "max_image_size", "rescale_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"StepPreprocessor: {name} = {getattr(self, name)} must be positive"
                )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"StepPreprocessor: image_mean = {self.image_mean} and image_std = "
                f"{self.image_std} must be three numbers each, and no deviation zero"
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "StepPreprocessor":
        """The settings in a model folder, and those of the released models where it has none.

        Reads processor_config.json (nested settings) or preprocessor_config.json.

        Raises:
            ValueError: a file is no JSON object, or asks for what is not supported.
        """
        config: Mapping[str, Any] = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            path = Path(folder) / name
            if not config and path.is_file():
                try:
                    content = json.loads(path.read_text())
                except ValueError as error:
                    raise ValueError(f"{path}: not JSON ({error})") from error
                if not isinstance(content, dict):
                    raise ValueError(
                        f"{path}: a JSON object is expected, found {type(content).__name__}"
                    )
                nested = name == "processor_config.json"
                config = content.get("image_processor") or {} if nested else content
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "StepPreprocessor":
        """The released settings, changed by those of an image processor.

        Raises:
            ValueError: a step switched off, another filter, or a size that is not a square.
        """
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(key) is False:
                raise ValueError(
                    f"image processor: {key} = false is not supported; preprocess yourself and "
                    "call the encoder with pixel_values"
                )
        bilinear = int(PIL.Image.Resampling.BILINEAR)
        if config.get("resample") not in (None, bilinear):
            raise ValueError(
                f"image processor: resample = {config['resample']} is not supported, only "
                f"{bilinear} (bilinear)"
            )
        size = config.get("size") or {}
        if size and size.get("height") != size.get("width"):
            raise ValueError(f"image processor: size = {size} must be a square")
        given = {
            "image_size": size.get("height"),
            "crop_size": config.get("patch_size"),
            "max_image_size": config.get("max_image_size"),
            "image_mean": config.get("image_mean"),
            "image_std": config.get("image_std"),
            "rescale_factor": config.get("rescale_factor"),
        }
        changes: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v
        }
        return cls(**changes)

    def plan(self, height: int, width: int) -> CropPlan:
        """How an image of height x width pixels is seen."""
        padded: tuple[int, int] = (height, width)
        long, short = max(padded), min(padded)
        if short < THIN and long / short > VERY_ELONGATED:
            padded = (long, long)
        whole = padded
        if long > self.max_image_size:
            scale = self.max_image_size / long
            whole = int(padded[0] * scale), int(padded[1] * scale)
        long, short = max(whole), min(whole)
        if long <= self.image_size:
            window = short if long / short > ELONGATED else 0
        elif long / short > VERY_ELONGATED:
            window = min(short, self.crop_size)
        else:
            window = self.crop_size
        if window == 0:
            return CropPlan(padded, whole, whole, 0, 0, 0)
        cut = _snapped(whole[0], window), _snapped(whole[1], window)
        # a side that is shorter than a window is one window of that size
        rows, columns = (-(-side // window) for side in cut)
        return CropPlan(padded, whole, cut, window, rows, columns)

    def image(self, source: Any) -> tuple[torch.Tensor, torch.Tensor, CropPlan]:
        """The whole view [3, S, S] and the crops [count, 3, s, s] of one image, fp32, and its plan.

        Args:
            source: What `media.load_image` takes.

        Raises:
            MediaError: the input cannot be used.
        """
        loaded = load_image(source, max_source_pixels=self.max_source_pixels)
        pixels = torch.from_numpy(np.array(loaded)).permute(2, 0, 1).contiguous()
        height, width = pixels.shape[1:]
        plan = self.plan(height, width)
        if plan.padded != (height, width):
            pixels = F.pad(pixels, (0, plan.padded[1] - width, 0, plan.padded[0] - height))
        square = (self.image_size, self.image_size)
        whole = _resized(_resized(pixels[None], plan.whole), square)
        crops = pixels.new_empty(0, 3, self.crop_size, self.crop_size)
        if plan.window:
            cut = _resized(pixels[None], plan.cut)
            windows = [
                part for row in cut.split(plan.window, 2) for part in row.split(plan.window, 3)
            ]
            crops = torch.cat([_resized(w, (self.crop_size, self.crop_size)) for w in windows])
        return self._normalised(whole)[0], self._normalised(crops), plan

    def __call__(self, sources: Sequence[Any]) -> StepPixels:
        """Whole views and crops of some images, in order.

        Raises:
            MediaError: an input cannot be used.
        """
        seen = [self.image(source) for source in sources]
        plans = [plan for _, _, plan in seen]
        crops = [part for _, part, _ in seen if len(part)]
        empty = torch.empty(0, 3, self.image_size, self.image_size)
        masks = [
            [column == p.columns - 1 and row < p.rows - 1 for row in range(p.rows)
             for column in range(p.columns)]
            for p in plans
        ]  # fmt: skip
        longest = max((len(mask) for mask in masks), default=0)
        return StepPixels(
            torch.stack([whole for whole, _, _ in seen]) if seen else empty,
            torch.cat(crops) if crops else None,
            tuple(plan.count for plan in plans),
            [mask + [False] * (longest - len(mask)) for mask in masks],
        )

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.image_mean) * (1.0 / self.rescale_factor)
        std = torch.tensor(self.image_std) * (1.0 / self.rescale_factor)
        return pixels.float().sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _snapped(side: int, window: int) -> int:
    """`side` as a whole number of windows; as it is if it is shorter than one."""
    if side < window:
        return side
    return window * (side // window + (side % window > SNAP * window))


def _resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [N, 3, h, w] resized to (height, width)."""
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
