"""Hugging Face's arithmetic for Qwen, GLM and Kimi: resized sides, and frames of a video."""

import math
from typing import Literal

import numpy as np
import torch

from .glm_frames import glm4v_frames, glm5_frames, glm46v_frames

VideoRule = Literal["qwen2", "qwen3", "glm4v", "glm46v", "glm5", "kimi"]


def resized_image(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Sides that are multiples of `factor`, with an area between the limits and the shape kept.

    Also the rule for each frame of a Qwen2-VL or Qwen2.5-VL video.
    """
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def resized_clip(
    num_frames: int,
    height: int,
    width: int,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Sides of a Qwen3-VL or GLM video, whose limits count the pixels of all frames together.

    Also the rule for a GLM image, which counts as `temporal_factor` frames.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    rounded_frames = round(num_frames / temporal_factor) * temporal_factor
    if rounded_frames * new_height * new_width > max_pixels:
        scale = math.sqrt((num_frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif rounded_frames * new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def contained_size(
    height: int, width: int, patch_size: int, max_patches: int, max_side: int
) -> tuple[int, int]:
    """Sides of a Kimi image or frame, never enlarged: at most so many patches, and along a side.

    The number of patches is that of whole ones in the original, so what comes out may have some
    more, the more so once its sides are filled up to whole tokens.
    """
    patches = max(1, height // patch_size) * max(1, width // patch_size)
    longest = max_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    new_height, new_width = max(1, int(height * scale)), max(1, int(width * scale))
    return min(new_height, longest), min(new_width, longest)


def capped_pixels(
    rule: VideoRule,
    num_frames: int,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
    max_tokens: int,
) -> int:
    """`max_pixels` under `cap_pixels_per_frame`, with `max_tokens` its `max_video_tokens`."""
    least = int(min_pixels * 1.05)
    if rule == "qwen2":
        total = int(max_tokens * factor * factor * 0.9)
        return max(min(max_pixels, total * temporal_factor // num_frames), least)
    return max(min(max_tokens * factor * factor, max_pixels // num_frames), least) * num_frames


def sampled_frames(
    rule: VideoRule,
    total: int,
    source_fps: float | None,
    fps: float | None,
    min_frames: int,
    max_frames: int,
    temporal_factor: int,
    max_seconds: float = 300.0,
) -> list[int]:
    """Indices of the frames that are encoded, none below the one before.

    Every frame where either rate is unknown, up to `max_frames` of them; Qwen2's rule also takes
    every frame of clips shorter than `temporal_factor`.
    """
    if source_fps is None or fps is None:
        return np.linspace(0, total - 1, min(total, max_frames)).round().astype(int).tolist()
    if rule == "glm4v":
        return glm4v_frames(total, source_fps, fps, max_seconds)
    if rule == "glm46v":
        return glm46v_frames(total, source_fps, temporal_factor)
    if rule == "glm5":
        return glm5_frames(total, source_fps, fps, max_frames, max_seconds)
    if rule == "kimi":
        # Hugging Face's refuses more frames than there are, and none
        count = min(max(int(total / source_fps * fps), 1), total)
        return _spread(total, count)
    if rule == "qwen3":
        count = min(max(int(total / source_fps * fps), min_frames), max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()
    if total < temporal_factor:
        return list(range(total))
    most = math.floor(min(max_frames, total) / temporal_factor) * temporal_factor
    wanted = min(max(total / source_fps * fps, min_frames), most, total)
    count = max(1, math.floor(wanted / temporal_factor)) * temporal_factor
    return _spread(total, count)


def _spread(total: int, count: int) -> list[int]:
    # torch's own arange, as in Hugging Face's: its rounding picks the frames. It may run one past
    # the end where total / count is not exact.
    indices = torch.arange(0, total, total / count).int().tolist()
    return [i for i in indices if i < total]
