"""Which frames of a video GLM's processors take: Hugging Face's arithmetic, frame for frame."""

import math
from collections.abc import Iterable

import numpy as np

# GLM-4.6V: (seconds up to which a clip is of that kind, rows of frames a second)
DENSITIES = ((30.0, 3.0), (300.0, 1.0), (math.inf, 0.5))
LONGEST = 2400.0  # seconds that GLM-4.6V counts
MOST_FRAMES = 640


def glm4v_frames(total: int, source_fps: float, fps: float, max_seconds: float) -> list[int]:
    """GLM-4.1V and 4.5V: `fps` frames a second, and of clips over `max_seconds` as many in all."""
    last, duration = total - 1, total / source_fps
    if duration <= max_seconds:
        count = max(math.floor(duration * fps), 1)
        return _even(min(last, math.ceil(i * source_fps / fps)) for i in range(count))
    count = int(max_seconds * fps)
    if count >= total:
        return _even(range(total))
    return _even(min(last, math.ceil(t * source_fps)) for t in np.linspace(0, duration, count))


def glm46v_frames(total: int, source_fps: float, temporal_factor: int) -> list[int]:
    """GLM-4.6V and GLM-OCR: fewer frames a second the longer the clip, 640 at most.

    A clip too short for any frame gives its first.
    """
    duration = min(total / source_fps, LONGEST)
    rows = next(density for bound, density in DENSITIES if duration <= bound)
    count = min(int(duration * rows * temporal_factor), MOST_FRAMES)
    return _spread(total, source_fps, count, temporal_factor * rows)


def glm5_frames(
    total: int, source_fps: float, fps: float, max_frames: int, max_seconds: float
) -> list[int]:
    """GLM-5: `fps` frames for each of the first `max_seconds` (of all if 0), `max_frames` at most.

    A clip too short for any frame gives its first.
    """
    duration = total / source_fps
    counted = min(duration, max_seconds) if max_seconds > 0 else duration
    return _spread(total, source_fps, min(int(counted * fps), max_frames), fps)


def _spread(total: int, source_fps: float, count: int, per_second: float) -> list[int]:
    """`count` frames, `per_second` of a second where the clip has as many."""
    if total < count:
        return _even(np.linspace(0, total - 1, count, dtype=int).tolist())
    # a running sum and a product, whose roundings decide at whole seconds
    indices, due, frame_time = [], 0.0, 1 / source_fps
    for index in range(total):
        if index * frame_time >= due:
            due += 1 / per_second
            indices.append(index)
            if due >= int(total / source_fps):
                break
    if len(indices) < count:
        indices = np.linspace(indices[0], indices[-1], count, dtype=int).tolist()
    elif len(indices) > count:
        indices = np.linspace(0, total - 1, count, dtype=int).tolist()
    return _even(indices or [0])


def _even(indices: Iterable[int]) -> list[int]:
    """Each index once, and the last twice if that makes their number even."""
    once = list(dict.fromkeys(int(i) for i in indices))
    return once + once[-1:] if len(once) % 2 else once
