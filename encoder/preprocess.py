"""Pixels of images and videos to rows of `pixel_values`, as Hugging Face's Qwen processors do."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import PIL.Image

from .families import FAMILIES
from .frame_rules import VideoRule, capped_pixels, resized_clip, resized_image, sampled_frames
from .media import MAX_SOURCE_PIXELS, MediaError, load_image, media_kind
from .spec import EncoderSpec
from .video import OpenVideo, open_video

Grid = tuple[int, int, int]
Made = TypeVar("Made")


class Preprocessor(Protocol):
    """What turns inputs into pixel rows; `Family.preprocessor` names a class of it.

    The classmethods `for_family(spec)` and `from_folder(folder, spec)` of that class build it.
    Calls come from several threads at once.
    """

    @property
    def patch_size(self) -> int:
        """As in `EncoderSpec`."""
        ...

    @property
    def temporal_patch_size(self) -> int:
        """As in `EncoderSpec`."""
        ...

    @property
    def merge_size(self) -> int:
        """As in `EncoderSpec`."""
        ...

    def __call__(self, source: Any) -> tuple[np.ndarray, Grid]:
        """Rows [t*h*w, C*tp*P*P] fp32 and (t, h, w) of one image or video.

        A video may have more frames than an item of the tower: `EncoderSpec.clips` cuts it.
        """
        ...


@dataclass(frozen=True)
class ImagePreprocessor:
    """Settings of the preprocessing; calling it turns an input into pixel rows.

    Pixel limits are areas after resizing. Those of videos count one frame for the rule "qwen2" and
    all frames for "qwen3".

    Attributes:
        patch_size, temporal_patch_size, merge_size: As in `EncoderSpec`.
        image_mean, image_std: Of each channel, for pixels from 0 to 1.
        min_pixels, max_pixels: Limits of images.
        video_min_pixels, video_max_pixels: Limits of videos.
        video_rule: Whose arithmetic samples and resizes videos, and GLM's images.
        video_fps: Frames taken a second; None takes all, up to `max_frames`.
        min_frames, max_frames: Bounds of the frames that are taken; GLM's and Kimi's rules have
            none.
        video_max_seconds: Length of a video from which the rules "glm4v" and "glm5" take no more
            frames; 0 is none for the latter.
        video_token_cap: `max_video_tokens` where `cap_pixels_per_frame` is on; None is off.
        resample: PIL's filter.
        rescale_factor: From stored values to 0..1.
        max_source_pixels: Largest image or frame that is read, in pixels.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    video_rule: VideoRule
    video_fps: float | None = 2.0
    min_frames: int = 4
    max_frames: int = 768
    video_max_seconds: float = 300.0
    video_token_cap: int | None = None
    resample: int = int(PIL.Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("min_frames", "max_frames"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"ImagePreprocessor: {low} = {getattr(self, low)} and {high} = "
                    f"{getattr(self, high)} must be positive and in order"
                )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                f"ImagePreprocessor: image_mean = {self.image_mean} and image_std = "
                f"{self.image_std} must be three numbers each, and no deviation zero"
            )
        if self.video_fps is not None and not self.video_fps > 0:
            raise ValueError(
                f"ImagePreprocessor: video_fps = {self.video_fps} must be positive; None takes all"
            )

    @classmethod
    def for_family(cls, spec: EncoderSpec) -> Self:
        """The settings that the family's checkpoints were released with."""
        return cls(
            patch_size=spec.patch_size,
            temporal_patch_size=spec.temporal_patch_size,
            merge_size=spec.merge_size,
            **vars(FAMILIES[spec.family].preset),
        )

    @classmethod
    def from_folder(cls, folder: str | Path, spec: EncoderSpec) -> Self:
        """The settings in a model folder, and the family's where it has none.

        Reads, in transformers' order, processor_config.json (nested settings),
        preprocessor_config.json and video_preprocessor_config.json; a video without settings of
        its own takes those of images.

        Raises:
            ValueError: a file is no JSON object, or asks for what `from_configs` refuses.
        """
        nested = read_json(Path(folder) / "processor_config.json")
        image = nested.get("image_processor") or read_json(
            Path(folder) / "preprocessor_config.json"
        )
        video = nested.get("video_processor") or read_json(
            Path(folder) / "video_preprocessor_config.json"
        )
        return cls.from_configs(spec, image, video or image)

    @classmethod
    def from_configs(
        cls, spec: EncoderSpec, image: Mapping[str, Any], video: Mapping[str, Any]
    ) -> Self:
        """The family's settings, changed by those of an image and of a video processor.

        Raises:
            ValueError: a patch geometry other than the tower's, a step switched off, or mean and
                deviation that are no numbers or differ between images and videos.
        """
        preset = cls.for_family(spec)
        changes: dict[str, Any] = {}
        for config, title in ((image, "image"), (video, "video")):
            for key in ("patch_size", "temporal_patch_size", "merge_size"):
                if config.get(key) not in (None, getattr(spec, key)):
                    raise ValueError(
                        f"{title} processor: {key} = {config[key]}, but the tower has "
                        f"{getattr(spec, key)}; use the processor of this model"
                    )
            for key in ("do_resize", "do_rescale", "do_normalize"):
                if config.get(key) is False:
                    raise ValueError(
                        f"{title} processor: {key} = false is not supported; preprocess yourself "
                        "and call the encoder with pixel_values"
                    )
        for key in ("image_mean", "image_std"):
            if image.get(key) is not None:
                changes[key] = per_channel(image[key], f"image processor: {key}")
            if video.get(key) is not None and per_channel(
                video[key], f"video processor: {key}"
            ) != changes.get(key, getattr(preset, key)):
                raise ValueError(
                    f"video processor: {key} = {video[key]} differs from that of images; encode "
                    "videos through pixel_values"
                )
        for key in ("resample", "rescale_factor"):
            if image.get(key) is not None:
                changes[key] = image[key]
        for prefix, config in (("", image), ("video_", video)):
            for name, value in zip(("min_pixels", "max_pixels"), _limits(config), strict=True):
                if value is not None:
                    changes[prefix + name] = int(value)
        for key, name in (
            ("fps", "video_fps"),
            ("min_frames", "min_frames"),
            ("max_frames", "max_frames"),
            ("max_duration", "video_max_seconds"),
        ):
            if video.get(key) is not None:
                changes[name] = video[key]
        if preset.video_rule in ("glm4v", "glm46v"):
            # checkpoints of one model type came with either processor
            kind = video.get("video_processor_type") or image.get("image_processor_type") or ""
            for beginning, rule in (("Glm4v", "glm4v"), ("Glm46V", "glm46v")):
                if kind.startswith(beginning):
                    changes["video_rule"] = rule
        if video.get("cap_pixels_per_frame"):
            default = 128000 if preset.video_rule == "qwen2" else 768
            changes["video_token_cap"] = int(video.get("max_video_tokens") or default)
        return replace(preset, **changes)

    def __call__(self, source: Any) -> tuple[np.ndarray, Grid]:
        """Rows [t*h*w, C*tp*P*P] fp32 and (t, h, w) of one image or video.

        Args:
            source: What `load_image` takes, a video file or its bytes, or a `Video`.

        Raises:
            MediaError: the input cannot be used.
        """
        if media_kind(source) == "video":
            return self.video(open_video(source, max_source_pixels=self.max_source_pixels))
        return self.image(load_image(source, max_source_pixels=self.max_source_pixels))

    def image(self, image: PIL.Image.Image) -> tuple[np.ndarray, Grid]:
        """Rows and grid of an RGB image; both temporal slices of a row are the same."""
        sides, limits = (image.height, image.width), (self.min_pixels, self.max_pixels)
        if self.video_rule in ("glm4v", "glm46v"):
            count = self.temporal_patch_size
            height, width = resized_clip(count, *sides, self._factor, count, *limits)
        else:
            height, width = resized_image(*sides, self._factor, *limits)
        return self._rows(self._resize(image, height, width)[None])

    def video(self, video: OpenVideo) -> tuple[np.ndarray, Grid]:
        """Rows and grid of a video: sampled, each frame resized, an odd count padded by the last.

        Raises:
            MediaError: a frame cannot be decoded.
        """
        indices = sampled_frames(
            self.video_rule, video.num_frames, video.fps, self.video_fps,
            self.min_frames, self.max_frames, self.temporal_patch_size, self.video_max_seconds,
        )  # fmt: skip
        # a clip shorter than a patch is filled up before its size is chosen
        count = max(len(indices), self.temporal_patch_size)
        low, high = self.video_min_pixels, self.video_max_pixels
        if self.video_token_cap is not None:
            high = capped_pixels(
                self.video_rule, count, self._factor, self.temporal_patch_size, low, high,
                self.video_token_cap,
            )  # fmt: skip
        if self.video_rule != "qwen2":
            height, width = resized_clip(
                count, video.height, video.width, self._factor, self.temporal_patch_size, low, high
            )
        else:
            height, width = resized_image(video.height, video.width, self._factor, low, high)
        frames = [self._resize(frame, height, width) for frame in video.frames(indices)]
        frames += frames[-1:] * (-len(frames) % self.temporal_patch_size)
        return self._rows(np.stack(frames))

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    @property
    def _block(self) -> int:
        """Patches along a side of the blocks that rows come in."""
        return self.merge_size

    @cached_property
    def _table(self) -> np.ndarray:
        return value_table(self.rescale_factor, self.image_mean, self.image_std)

    def _resize(self, image: PIL.Image.Image, height: int, width: int) -> np.ndarray:
        return np.asarray(
            image.resize((width, height), resample=PIL.Image.Resampling(self.resample))
        )

    def _rows(self, frames: np.ndarray) -> tuple[np.ndarray, Grid]:
        """[F, H, W, 3] uint8, F of 1 or a multiple of the temporal patch size, to rows.

        Rows follow (t, h / merge, w / merge, merge, merge), values (C, tp, P, P).
        """
        size, merge = self.patch_size, self._block
        depth = min(len(frames), self.temporal_patch_size)
        t, h, w = len(frames) // depth, frames.shape[1] // size, frames.shape[2] // size
        blocks = frames.reshape(
            t, depth, h // merge, merge, size, w // merge, merge, size, frames.shape[3]
        )
        patches = np.ascontiguousarray(blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
        patches = patches.reshape(t * h * w, 3, depth, size * size)
        rows = np.empty((t * h * w, 3, self.temporal_patch_size, size * size), dtype=np.float32)
        for channel in range(3):
            rows[:, channel, :depth] = self._table[channel].take(patches[:, channel])
        rows[:, :, depth:] = rows[:, :, :1]
        return rows.reshape(t * h * w, -1), (t, h, w)


def per_channel(value: Any, what: str) -> tuple[float, ...]:
    """A number for each channel, from three or from one for all, as transformers takes them.

    Raises:
        ValueError: something else; `what` it is called.
    """
    numbers = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value,) * 3
    if len(numbers) != 3 or not all(isinstance(x, Real) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{what} = {value!r} must be a number, or three of them")
    return numbers


def whole_number(value: Any, what: str) -> int:
    """`value`, a positive integer.

    Raises:
        ValueError: it is none; `what` it is called.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} = {value!r} must be a positive integer")
    return int(value)


def value_table(rescale: float, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[3, 256] fp32: the normalised value of each byte, by Hugging Face's own roundings."""
    unit = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    means, stds = (np.array(v, dtype=np.float32)[:, None] for v in (mean, std))
    return (unit - means) / stds


def preprocess_named(preprocess: Callable[[Any], Made], source: Any, index: int) -> Made:
    """`preprocess(source)`; errors of inputs without a path say which one of many it was.

    Raises:
        MediaError: the input cannot be used.
    """
    try:
        return preprocess(source)
    except MediaError as error:
        if isinstance(source, str | Path):
            raise
        raise MediaError(f"input {index} ({error.source})", error.problem) from error


def _limits(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(min, max) pixels in any of the styles that configs were released with."""
    size = config.get("size") or {}
    if not isinstance(size, Mapping):
        raise ValueError(f"processor: size = {size!r} must be an object with pixel limits")
    low = size.get("shortest_edge", size.get("min_pixels"))
    high = size.get("longest_edge", size.get("max_pixels"))
    given_low, given_high = config.get("min_pixels"), config.get("max_pixels")
    return low if given_low is None else given_low, high if given_high is None else given_high


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content
