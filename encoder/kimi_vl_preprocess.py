"""Pixels of Kimi-VL: never enlarged, filled up with black to whole tokens, patches row by row.

As those of Kimi-K2.5, but resized by PIL and normalised from 0..1. An image with too long a side is
refused, where Kimi-K2.5 reduces it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import PIL.Image

from .media import MediaError, describe, load_image, refuse_video
from .preprocess import Grid, ImagePreprocessor, whole_number
from .presets import CLIP_MEAN, CLIP_STD
from .spec import EncoderSpec
from .video import OpenVideo

SIDE_LIMIT = 512  # patches that no side may have
# what the class of the checkpoints' own code takes for settings that its file lacks; released files
# have all of them, and these are not those
_CLASS_DEFAULTS: dict[str, Any] = {
    "pad_input": False,
    "merge_kernel_size": [2, 2],
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


class MoonViTPreprocessor(ImagePreprocessor):
    """`ImagePreprocessor` whose images are reduced where they are too large, and else kept.

    What an image leaves of its last tokens is black, below and to the right. `max_pixels` are whole
    patches here, and those of videos have no meaning.
    """

    @classmethod
    def from_configs(
        cls, spec: EncoderSpec, image: Mapping[str, Any], video: Mapping[str, Any]
    ) -> Self:
        """The released settings, or those of an image processor, all of them, where there is one.

        Args:
            spec: Of the tower.
            image: Settings of an image processor; empty for the released ones.
            video: Without meaning.

        Raises:
            ValueError: a patch geometry other than the tower's, mean and deviation that are no
                numbers, a limit that is no positive integer, or images that are cropped to whole
                patches (pad_input is false).
        """
        if not image:
            return cls.for_family(spec)
        given = _CLASS_DEFAULTS | dict(image)
        if given["pad_input"] is not True:
            raise ValueError(
                f"image processor: pad_input = {given['pad_input']} is not supported, only true "
                "is, as released: images cropped to patches need not be whole tokens; call the "
                "encoder with pixel_values"
            )
        merge = given["merge_kernel_size"]
        if merge != [spec.merge_size] * 2:
            raise ValueError(
                f"image processor: merge_kernel_size = {merge!r}, but the tower has "
                f"{[spec.merge_size] * 2}; use the processor of this model"
            )
        known = {key: given.get(key) for key in ("patch_size", "image_mean", "image_std")}
        made = super().from_configs(spec, known, {})
        if (limit := given.get("in_token_limit")) is None:
            return made
        most = whole_number(limit, "image processor: in_token_limit")
        return replace(made, max_pixels=most * spec.patch_size**2)

    def __call__(self, source: Any) -> tuple[np.ndarray, Grid]:
        """Rows [h*w, C*P*P] fp32 and (1, h, w) of one image.

        Args:
            source: What `load_image` takes.

        Raises:
            MediaError: the input cannot be used, or is a video.
        """
        refuse_video(source)
        image = load_image(source, max_source_pixels=self.max_source_pixels)
        return self.image(image, describe(source))

    def image(self, image: PIL.Image.Image, name: str = "image") -> tuple[np.ndarray, Grid]:
        """Rows and grid of an RGB image, `name` in errors.

        Raises:
            MediaError: a side has too many patches.
        """
        most = self.max_pixels // self.patch_size**2
        inner = reduced_size(image.height, image.width, self.patch_size, most)
        height, width = (-(-side // self._factor) * self._factor for side in inner)
        if max(height, width) >= SIDE_LIMIT * self.patch_size:
            raise MediaError(
                name,
                f"{image.height} x {image.width} pixels (height x width) are {height} x {width} of "
                f"whole tokens; this model takes less than {SIDE_LIMIT * self.patch_size} along a "
                "side: scale it down, crop or split it",
            )
        black = np.zeros((1, height, width, 3), dtype=np.uint8)
        black[0, : inner[0], : inner[1]] = self._resize(image, *inner)
        return self._rows(black)

    def video(self, video: OpenVideo) -> tuple[np.ndarray, Grid]:
        """Nothing: these models read images.

        Raises:
            MediaError: always.
        """
        raise MediaError(
            video.name, "is a video, and this model reads images; pass its frames as images"
        )

    @property
    def _block(self) -> int:
        return 1


def reduced_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Sides of an image that had more whole patches than `max_patches`, else its own.

    What comes out is filled up to whole tokens, and may then have some patches more.
    """
    patches = (height // patch_size) * (width // patch_size)
    if patches <= max_patches:
        return height, width
    scale = math.sqrt(max_patches / patches)
    return max(1, int(height * scale)), max(1, int(width * scale))
