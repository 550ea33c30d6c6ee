"""Images from files, bytes, arrays and PIL, as upright 8-bit RGB; every refusal names its input."""

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif", ".jp2"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv"}
)

# Beyond PIL's own limit (PIL.Image.MAX_IMAGE_PIXELS x 2, 179 million) a file is refused first by
# PIL, which reads that limit as a global; ours is what stays when a program lifts PIL's.
MAX_SOURCE_PIXELS = 2**28
MAX_ASPECT_RATIO = 200  # Hugging Face's processors refuse longer images

Kind = Literal["image", "video"]

_IMAGE_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6",
    b"\0\0\0\x0cjP  ",
)  # fmt: skip
_VIDEO_MAGIC = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"0&\xb2u")
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")

# A PIL image that was opened but not read reads itself on first use, which is not thread-safe.
_LOAD_LOCK = threading.Lock()


class MediaError(ValueError):
    """An image or video that cannot be used; `source` says which one, the message also why."""

    def __init__(self, source: str, problem: str):
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


@dataclass(frozen=True)
class Video:
    """Frames in memory.

    Attributes:
        frames: [F, H, W, 3] uint8 (or floats from 0 to 1), or a sequence of images of one size.
        fps: Their rate, by which they are sampled; None takes them as sampled already.
    """

    frames: Any
    fps: float | None = None


def describe(source: Any) -> str:
    """A short name of an input, for messages."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"bytes of length {len(source)}"
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"{type(source).__name__} {source.dtype} of shape {tuple(source.shape)}"
    if isinstance(source, PIL.Image.Image):
        return f"PIL image of size {source.size}"
    return f"{type(source).__name__} object"


def media_kind(source: Any) -> Kind:
    """Whether `source` is an image or a video: by content where it is telling, else by suffix.

    Raises:
        MediaError: no such file, an empty one, an unsupported suffix, or bytes that are neither.
    """
    if isinstance(source, Video | Mapping):
        return "video"
    if isinstance(source, str | Path):
        path = readable_file(source)
        suffix = path.suffix.lower()
        if suffix and suffix not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise MediaError(
                str(source),
                f"unsupported suffix {suffix!r}; images: {' '.join(sorted(IMAGE_SUFFIXES))}, "
                f"videos: {' '.join(sorted(VIDEO_SUFFIXES))}",
            )
        with path.open("rb") as file:
            kind = _kind_of(file.read(16))
        if kind is None and suffix:
            kind = "video" if suffix in VIDEO_SUFFIXES else "image"
    elif isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise MediaError(describe(source), "no data; pass the whole file")
        kind = _kind_of(bytes(source[:16]))
    else:
        return "image"
    if kind is None:
        raise MediaError(
            describe(source),
            "neither an image nor a video that is known by its first bytes; decode it yourself and "
            "pass a PIL image, an array or a Video",
        )
    return kind


def refuse_video(source: Any) -> None:
    """Refuse a video where a tower reads images alone.

    Raises:
        MediaError: it is a video, or what `media_kind` refuses.
    """
    if media_kind(source) == "video":
        raise MediaError(
            describe(source), "is a video, and this model reads images; pass its frames as images"
        )


def readable_file(source: str | Path) -> Path:
    """The path of a file that exists and holds something.

    Raises:
        MediaError: it does not, or it is a URL.
    """
    if isinstance(source, str) and "://" in source[:10]:
        raise MediaError(source, "URLs are not fetched; download the file and pass its path")
    path = Path(source)
    try:
        if not path.exists():
            path = path.expanduser()
        if path.is_dir():
            raise MediaError(str(source), "is a folder; pass the files in it")
        if not path.exists():
            raise MediaError(str(source), "no such file; check the path")
        if path.stat().st_size == 0:
            raise MediaError(str(source), "the file is empty (0 bytes); copy or download it again")
        path.open("rb").close()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
        problem = getattr(error, "strerror", None) or error
        raise MediaError(str(source), f"cannot be read: {problem}") from error
    return path


def check_size(source: str, height: int, width: int, max_source_pixels: int) -> None:
    """Refuse images without pixels, with too many, or too thin.

    Raises:
        MediaError: says which.
    """
    if height == 0 or width == 0:
        raise MediaError(source, f"{height} x {width} pixels (height x width): nothing to encode")
    if height * width > max_source_pixels:
        raise MediaError(
            source,
            f"{height} x {width} = {height * width} pixels exceed max_source_pixels = "
            f"{max_source_pixels}; scale it down or raise max_source_pixels",
        )
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise MediaError(
            source,
            f"{height} x {width} pixels (height x width) have an aspect ratio of {ratio:.0f}, "
            f"beyond {MAX_ASPECT_RATIO}; crop or split it",
        )


def load_image(source: Any, *, max_source_pixels: int = MAX_SOURCE_PIXELS) -> PIL.Image.Image:
    """An upright 8-bit RGB image.

    As `transformers.image_utils.load_image`: EXIF orientation is applied, alpha is dropped, only
    the first frame of an animation counts. 16-bit grey keeps its high byte (transformers clips it
    to white).

    Args:
        source: Path, encoded bytes, PIL image, array or tensor. Arrays are [H, W], [H, W, C] or
            [C, H, W] with C of 1, 3 or 4 (where both fit, arrays are read channels last, tensors
            channels first), of uint8 or of floats from 0 to 1.
        max_source_pixels: Largest height x width.

    Raises:
        MediaError: missing, empty, corrupt or truncated, no pixels, too many, thinner than 1:200,
            or an array of another type, shape or range.
    """
    name = describe(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        image = PIL.Image.fromarray(_to_uint8(source, name, max_source_pixels))
    elif isinstance(source, PIL.Image.Image):
        check_size(name, source.height, source.width, max_source_pixels)
        with _LOAD_LOCK, _decoding(name):
            image = _to_rgb(source, name)
    elif isinstance(source, str | Path | bytes | bytearray | memoryview):
        path = isinstance(source, str | Path)
        file = readable_file(source) if path else io.BytesIO(source)
        with _decoding(name), PIL.Image.open(file) as stored:
            check_size(name, stored.height, stored.width, max_source_pixels)
            image = _to_rgb(stored, name)
    else:
        raise MediaError(name, "not an image: pass a path, bytes, PIL image, array or tensor")
    return image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """What PIL raises, as `MediaError`."""
    try:
        yield
    except MediaError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise MediaError(
            name, f"{error}; scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise MediaError(name, "not an image that PIL can read; convert it to PNG") from error
    except Exception as error:  # decoders of foreign bytes raise nearly anything
        raise MediaError(
            name, f"the image is corrupt or truncated ({error}); copy or export it again"
        ) from error


def _to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    image.load()
    if image.mode in ("I", "F"):
        raise MediaError(
            name, f"32-bit pixels (PIL mode {image.mode}) have no fixed range; scale to uint8"
        )
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        high = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
        upright = PIL.Image.fromarray(high)
    return upright.convert("RGB")


def _to_uint8(source: np.ndarray | torch.Tensor, name: str, max_source_pixels: int) -> np.ndarray:
    """[H, W, 3] uint8."""
    channels_first = isinstance(source, torch.Tensor)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        array = (source.float() if source.is_floating_point() else source).numpy()
    else:
        array = source
    if array.ndim == 4:
        raise MediaError(name, "four axes: wrap a video in Video(frames), or pass list(images)")
    if array.ndim not in (2, 3):
        raise MediaError(name, "an image has the shape [H, W], [H, W, C] or [C, H, W]")
    if array.ndim == 3:
        order = (0, -1) if channels_first else (-1, 0)
        axis = next((i for i in order if array.shape[i] in (1, 3, 4)), None)
        if axis is None:
            raise MediaError(name, "neither the first nor the last axis has 1, 3 or 4 channels")
        array = np.moveaxis(array, axis, -1)
    else:
        array = array[:, :, None]
    check_size(name, array.shape[0], array.shape[1], max_source_pixels)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise MediaError(name, "NaN or infinite pixels; replace them first")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise MediaError(
                name,
                f"float pixels must lie in 0..1, found {low:g}..{high:g}; pass uint8 for 0..255, "
                "and pixels before any normalisation",
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(name, f"dtype {array.dtype}; pass uint8, or floats from 0 to 1")
    array = array[:, :, :3] if array.shape[2] >= 3 else np.repeat(array[:, :, :1], 3, 2)
    return np.ascontiguousarray(array)


def _kind_of(head: bytes) -> Kind | None:
    if head.startswith(_IMAGE_MAGIC):
        return "image"
    if head[:4] == b"RIFF":
        return "image" if head[8:12] == b"WEBP" else "video"
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in _STILL_BRANDS else "video"
    return "video" if head.startswith(_VIDEO_MAGIC) else None
