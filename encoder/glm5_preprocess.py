"""Pixels of GLM-5: content that is never enlarged past its budget, on a black canvas of patches."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import PIL.Image

from .frame_rules import sampled_frames
from .preprocess import Grid, ImagePreprocessor
from .spec import EncoderSpec
from .video import OpenVideo


@dataclass(frozen=True)
class CanvasPreprocessor(ImagePreprocessor):
    """`ImagePreprocessor` whose inputs keep their shape to the pixel.

    The sides of an input are rounded up to whole tokens, and what it does not fill is black, below
    and to the right. Limits count the pixels of all frames of the canvas, an image being
    `temporal_patch_size` frames.
    """

    max_frames: int = 2048
    video_max_seconds: float = 0.0

    @classmethod
    def from_configs(
        cls, spec: EncoderSpec, image: Mapping[str, Any], video: Mapping[str, Any]
    ) -> Self:
        """The family's settings, changed by those of an image and of a video processor.

        Limits are `min_image_tokens` and `max_image_tokens` of either; `size` has no meaning there.

        Raises:
            ValueError: as `ImagePreprocessor.from_configs`, or a `patch_expand_factor` but 1.
        """
        token = spec.temporal_patch_size * (spec.patch_size * spec.merge_size) ** 2
        configs = []
        for config, title in ((image, "image"), (video, "video")):
            if config.get("patch_expand_factor") not in (None, 1):
                raise ValueError(
                    f"{title} processor: patch_expand_factor = {config['patch_expand_factor']} is "
                    "not supported, only 1 is; call the encoder with pixel_values"
                )
            limits = {
                f"{end}_pixels": config[f"{end}_image_tokens"] * token
                for end in ("min", "max")
                if config.get(f"{end}_image_tokens") is not None
            }
            configs.append({**config, "size": {}, "min_pixels": None, "max_pixels": None} | limits)
        return super().from_configs(spec, *configs)

    def image(self, image: PIL.Image.Image) -> tuple[np.ndarray, Grid]:
        """Rows and grid of an RGB image; both temporal slices of a row are the same."""
        limits = self.min_pixels, self.max_pixels
        return self._rows(self._framed([image], self.temporal_patch_size, image.size, *limits))

    def video(self, video: OpenVideo) -> tuple[np.ndarray, Grid]:
        """Rows and grid of a video: sampled, each frame on its canvas.

        Raises:
            MediaError: a frame cannot be decoded.
        """
        indices = sampled_frames(
            self.video_rule, video.num_frames, video.fps, self.video_fps,
            self.min_frames, self.max_frames, self.temporal_patch_size, self.video_max_seconds,
        )  # fmt: skip
        indices += indices[-1:] * (-len(indices) % self.temporal_patch_size)
        limits = self.video_min_pixels, self.video_max_pixels
        size = video.width, video.height
        return self._rows(self._framed(video.frames(indices), len(indices), size, *limits))

    def _framed(
        self,
        frames: Iterable[PIL.Image.Image],
        count: int,
        size: tuple[int, int],
        min_pixels: int,
        max_pixels: int,
    ) -> np.ndarray:
        """[F, H, W, 3] uint8: `frames` of (width, height) `size`, which count as `count`."""
        width, height = size
        whole = canvas(
            count, height, width, self._factor, self.temporal_patch_size, min_pixels, max_pixels
        )
        scale = min(whole[0] / height, whole[1] / width)
        if count * height * width >= min_pixels:
            scale = min(1.0, scale)
        inner = [
            max(1, min(most, math.floor(side * scale)))
            for most, side in zip(whole, (height, width), strict=True)
        ]
        framed = []
        for frame in frames:
            black = np.zeros((*whole, 3), dtype=np.uint8)
            black[: inner[0], : inner[1]] = self._resize(frame, *inner)
            framed.append(black)
        return np.stack(framed)


def canvas(
    num_frames: int,
    height: int,
    width: int,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Sides of the canvas, multiples of `factor`, by Hugging Face's arithmetic.

    Raises:
        ValueError: `max_pixels` has no room for one token in every frame.
    """

    def aligned(side: int) -> int:
        return math.ceil(side / factor) * factor

    frames = max(temporal_factor, round(num_frames / temporal_factor) * temporal_factor)
    sides = aligned(height), aligned(width)
    if frames * sides[0] * sides[1] < min_pixels:
        scale = math.sqrt(min_pixels / (num_frames * height * width))
        sides = aligned(math.ceil(height * scale)), aligned(math.ceil(width * scale))
    if frames * sides[0] * sides[1] <= max_pixels:
        return sides
    if frames * factor**2 > max_pixels:
        raise ValueError(
            f"max_pixels = {max_pixels} is too small for {frames} frames of one token, "
            f"{factor} x {factor} pixels each; raise it, or take fewer frames"
        )
    # the tallest content whose canvas fits
    sides, low, high = (factor, factor), 1, height
    while low <= high:
        tall = (low + high) // 2
        candidate = aligned(tall), aligned(max(1, math.floor(width * tall / height)))
        if frames * candidate[0] * candidate[1] <= max_pixels:
            sides, low = candidate, tall + 1
        else:
            high = tall - 1
    return sides
