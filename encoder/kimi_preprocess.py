"""Pixels of Kimi-K2.5: never enlarged, filled up with black to whole tokens, patches row by row."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import PIL.Image
import torch

from .frame_rules import contained_size, sampled_frames
from .preprocess import Grid, ImagePreprocessor, whole_number
from .spec import EncoderSpec
from .video import OpenVideo

# keys of `media_proc_cfg`, the settings that published checkpoints come with, and transformers'
_KEYS = {
    "patch_size": "patch_size",
    "merge_kernel_size": "merge_size",
    "patch_limit_on_one_side": "max_side",
    "image_mean": "image_mean",
    "image_std": "image_std",
}
_IMAGE_KEYS = _KEYS | {"in_patch_limit": "max_patches"}
_VIDEO_KEYS = _KEYS | {
    "in_patch_limit_each_frame": "max_patches",
    "sample_fps": "fps",
    "temporal_merge_kernel_size": "temporal_patch_size",
}
# settings of `media_proc_cfg` that change what comes out, and are off wherever they are known
_OFF = ("fixed_output_tokens", "in_patch_limit_video", "max_num_frames_each_video")


@dataclass(frozen=True)
class NavitPreprocessor(ImagePreprocessor):
    """`ImagePreprocessor` whose inputs are reduced where they are too large, and else kept.

    What an input leaves of its last tokens is black, below and to the right. Frames of a video are
    sized one by one; its (t, h, w) counts all of them, and `EncoderSpec.clips` cuts it.

    Attributes: those of `ImagePreprocessor`, whose `max_pixels` are whole patches here, and
        max_side: Patches along a side.
    """

    max_side: int = 512

    @classmethod
    def from_configs(
        cls, spec: EncoderSpec, image: Mapping[str, Any], video: Mapping[str, Any]
    ) -> Self:
        """The family's settings, changed by those of an image and of a video processor.

        Limits are `max_patches` and `size` of either, or those of `media_proc_cfg`.

        Raises:
            ValueError: as `ImagePreprocessor.from_configs`; sides that differ, between height and
                width or images and videos; clips of another length than the tower's; another
                filter than bicubic; or a setting of `media_proc_cfg` that transformers' processors
                do not have.
        """
        configs, sides = [], {}
        for config, title, keys in ((image, "image", _IMAGE_KEYS), (video, "video", _VIDEO_KEYS)):
            given = _flattened(config, title, keys)
            clip = given.pop("temporal_patch_size", None)
            if clip not in (None, spec.frame_positions):
                raise ValueError(
                    f"{title} processor: temporal_patch_size = {clip}, but clips of this tower "
                    f"have {spec.frame_positions} frames; use the processor of this model"
                )
            if given.get("resample") not in (None, PIL.Image.Resampling.BICUBIC):
                raise ValueError(
                    f"{title} processor: resample = {given['resample']} is not supported, only "
                    f"{int(PIL.Image.Resampling.BICUBIC)} (bicubic) is; call the encoder with "
                    "pixel_values"
                )
            sides[title] = given.pop("max_side", None)
            if (limit := given.pop("max_patches", None)) is not None:
                given |= {"min_pixels": 1, "max_pixels": limit * spec.patch_size**2}
            configs.append(given)
        found = {side for side in sides.values() if side is not None}
        if len(found) > 1:
            raise ValueError(
                f"processors: sides of at most {sides} patches differ between images and videos; "
                "encode videos through pixel_values"
            )
        made = super().from_configs(spec, *configs)
        return replace(made, max_side=found.pop()) if found else made

    def image(self, image: PIL.Image.Image) -> tuple[np.ndarray, Grid]:
        """Rows and grid of an RGB image."""
        return self._rows(self._filled_up([image], image.size, self.max_pixels))

    def video(self, video: OpenVideo) -> tuple[np.ndarray, Grid]:
        """Rows and grid of a video: sampled, each frame sized by itself.

        Raises:
            MediaError: a frame cannot be decoded.
        """
        indices = sampled_frames(
            self.video_rule, video.num_frames, video.fps, self.video_fps,
            self.min_frames, self.max_frames, self.temporal_patch_size,
        )  # fmt: skip
        size = video.width, video.height
        return self._rows(self._filled_up(video.frames(indices), size, self.video_max_pixels))

    def _filled_up(
        self, frames: Iterable[PIL.Image.Image], size: tuple[int, int], max_pixels: int
    ) -> np.ndarray:
        """[F, H, W, 3] uint8: `frames` of (width, height) `size`, on black."""
        width, height = size
        most = max_pixels // self.patch_size**2
        inner = contained_size(height, width, self.patch_size, most, self.max_side)
        whole = [-(-side // self._factor) * self._factor for side in inner]
        filled = []
        for frame in frames:
            black = np.zeros((*whole, 3), dtype=np.uint8)
            black[: inner[0], : inner[1]] = self._resize(frame, *inner)
            filled.append(black)
        return np.stack(filled)

    @property
    def _block(self) -> int:
        return 1

    def _resize(self, image: PIL.Image.Image, height: int, width: int) -> np.ndarray:
        # transformers has this processor for tensors alone: torch's bicubic, one level from PIL's
        # in a few pixels of a thousand
        if image.size == (width, height):
            return np.asarray(image)
        channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(
            channels_first, (height, width), mode="bicubic", antialias=True
        )
        return resized[0].permute(1, 2, 0).numpy()

    @cached_property
    def _table(self) -> np.ndarray:
        # tensors are not scaled to 0..1: their mean and deviation are, to 0..255
        value = np.arange(256, dtype=np.float32)
        scale = np.float32(1.0 / self.rescale_factor)
        mean = np.array(self.image_mean, dtype=np.float32)[:, None] * scale
        std = np.array(self.image_std, dtype=np.float32)[:, None] * scale
        return (value - mean) / std


def _flattened(config: Mapping[str, Any], title: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """The settings of `config` and of its `media_proc_cfg`, by transformers' names.

    Raises:
        ValueError: a setting of another kind, or one that is not supported.
    """
    given = dict(config)
    if title == "video" and "image_processor_type" in given:
        given.pop("max_patches", None)  # those of images, where videos have none of their own
    published = given.pop("media_proc_cfg", None) or {}
    if not isinstance(published, Mapping):
        raise ValueError(f"{title} processor: media_proc_cfg = {published!r} must be an object")
    for name in _OFF:
        if published.get(name) is not None:
            raise ValueError(
                f"{title} processor: media_proc_cfg.{name} = {published[name]} is not supported, "
                "only null is; call the encoder with pixel_values"
            )
    for name, ours in keys.items():
        if name in published:
            given[ours] = published[name]
            if ours in ("max_patches", "max_side") and published[name] is not None:
                whole_number(published[name], f"{title} processor: media_proc_cfg.{name}")
    if given.get("max_patches") is not None:
        whole_number(given["max_patches"], f"{title} processor: max_patches")
    if (size := given.pop("size", None)) is not None:
        is_object = isinstance(size, Mapping)
        height, width = (size.get(f"max_{s}") if is_object else None for s in ("height", "width"))
        if height is None or height != width:
            raise ValueError(
                f"{title} processor: size = {size!r} must have equal max_height and max_width, in "
                "patches"
            )
        given.setdefault("max_side", whole_number(height, f"{title} processor: size.max_height"))
    return given
