"""Videos: decoded with PyAV, or frames that are in memory already."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import torch

from .media import (
    MAX_SOURCE_PIXELS,
    MediaError,
    Video,
    check_size,
    describe,
    load_image,
    readable_file,
)


@dataclass(frozen=True)
class OpenVideo:
    """A video whose size is known and whose frames are read on demand.

    Attributes:
        name: The input, for messages.
        num_frames: Frames that decode.
        fps: None if unknown.
        height, width: In pixels, as stored.
        origin: Encoded file or bytes, or the frames.
    """

    name: str
    num_frames: int
    fps: float | None
    height: int
    width: int
    origin: Any

    def frames(self, indices: Sequence[int]) -> Iterator[PIL.Image.Image]:
        """RGB frames at `indices`, which do not decrease.

        Raises:
            MediaError: the data is corrupt, or ends early.
        """
        if isinstance(self.origin, list | np.ndarray):
            for index in indices:
                try:
                    image = load_image(self.origin[index])
                except MediaError as error:
                    raise MediaError(self.name, f"frame {index}: {error.problem}") from error
                if image.size != (self.width, self.height):
                    raise MediaError(
                        self.name,
                        f"frame {index} has {image.height} x {image.width} pixels, the first has "
                        f"{self.height} x {self.width}; frames of a video share one size",
                    )
                yield image
            return
        wanted = iter(indices)
        target = next(wanted, None)
        with _container(self.origin, self.name) as container:
            for position, frame in enumerate(container.decode(video=0)):
                if target is None:
                    return
                if position == target:
                    image = frame.to_image()
                    while target == position:
                        yield image
                        target = next(wanted, None)
        if target is not None:
            raise MediaError(
                self.name,
                f"frame {target} of {self.num_frames} does not decode; the video is corrupt, "
                "encode it again",
            )


def open_video(source: Any, *, max_source_pixels: int = MAX_SOURCE_PIXELS) -> OpenVideo:
    """Look at a video without decoding it.

    Args:
        source: Path, encoded bytes, `Video`, or a mapping with its fields.
        max_source_pixels: Largest height x width of a frame.

    Raises:
        MediaError: missing, empty, corrupt or truncated, without frames, or with frames that
            `load_image` would refuse.
    """
    if isinstance(source, Mapping):
        extra = set(source) - {"frames", "fps"}
        if extra or "frames" not in source:
            raise MediaError(
                f"mapping with keys {sorted(map(str, source))}",
                'a video is {"frames": ..., "fps": ...} with fps optional',
            )
        source = Video(**source)
    if isinstance(source, Video):
        return _open_frames(source, max_source_pixels)
    name = describe(source)
    if isinstance(source, str | Path):
        origin: Any = str(readable_file(source))
    else:
        origin = bytes(source)
    with _container(origin, name) as container:
        stream = container.streams.video[0]
        rate: Fraction | None = stream.average_rate or stream.guessed_rate
        check_size(name, stream.height, stream.width, max_source_pixels)
        stored = shown = 0
        for packet in container.demux(stream):
            if packet.size:
                stored += 1
                shown += not packet.is_discard
        if stored < stream.frames:
            raise MediaError(
                name,
                f"the video is truncated: {stored} of {stream.frames} frames are there; copy or "
                "download it again",
            )
        if not shown:
            raise MediaError(name, "a video without frames")
        return OpenVideo(
            name, shown, float(rate) if rate else None, stream.height, stream.width, origin
        )


def _open_frames(video: Video, max_source_pixels: int) -> OpenVideo:
    frames = video.frames
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
    if isinstance(frames, np.ndarray):
        name = f"Video of {describe(frames)}"
        if frames.ndim != 4 or (frames.shape[-1] != 3 and frames.shape[1] != 3):
            raise MediaError(name, "frames in an array have the shape [F, H, W, 3] or [F, 3, H, W]")
        if frames.shape[-1] != 3:
            frames = frames.transpose(0, 2, 3, 1)
    elif isinstance(frames, Sequence) and not isinstance(frames, str | bytes):
        frames = list(frames)
        name = f"Video of {len(frames)} frames"
    else:
        raise MediaError(
            f"Video of {describe(frames)}", "pass frames as an array or as a sequence of images"
        )
    fps = video.fps
    if fps is not None and not (fps > 0 and np.isfinite(fps)):
        raise MediaError(name, f"fps = {fps!r} must be positive; None takes every frame")
    if not len(frames):
        raise MediaError(name, "a video without frames")
    try:
        first = load_image(frames[0], max_source_pixels=max_source_pixels)
    except MediaError as error:
        raise MediaError(name, f"frame 0: {error.problem}") from error
    return OpenVideo(name, len(frames), fps, first.height, first.width, frames)


@contextmanager
def _container(origin: str | bytes, name: str) -> Iterator[Any]:
    """An open container with a video stream; errors of FFmpeg become `MediaError`."""
    try:
        with closing(av.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin)) as file:
            if not file.streams.video:
                raise MediaError(name, "no video stream inside; encode it again")
            # frames in parallel only: slices of one frame would wait for each other in a pool of
            # workers that decode several videos
            file.streams.video[0].thread_type = "FRAME"
            yield file
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            name, f"the video is corrupt or of an unknown format ({error}); encode it again"
        ) from error
