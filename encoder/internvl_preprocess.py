"""Images to the tiles of InternVL and Qianfan-OCR, as Hugging Face's processor cuts them.

An image is squeezed to the grid of square tiles whose shape is nearest to its own, and cut row by
row. If that makes several tiles, one more comes last: the whole image (the thumbnail). Values are
those of `GotOcr2ImageProcessorPil`, the class that transformers takes without torchvision, bit for
bit. Resized by torchvision they are mostly within two levels of 255 of these.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from .media import MAX_SOURCE_PIXELS, load_image, refuse_video
from .preprocess import per_channel, read_json, value_table, whole_number
from .presets import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

PROCESSOR = "GotOcr2ImageProcessor"
TILE_SIZE = 448  # pixels, of the released models
# what that class has, and a file of it that leaves them out
CLASS_DEFAULTS: dict[str, Any] = {
    "tile_size": 384, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip


@dataclass(frozen=True)
class InternVLPreprocessor:
    """Settings of the preprocessing; calling it turns an image into tiles.

    Attributes:
        tile_size: Pixels along a side of a tile.
        min_tiles, max_tiles: Bounds of the tiles of an image, without its thumbnail;
            `min_patches` and `max_patches` of a processor's files. One at most is the whole image.
        image_mean, image_std: Of each channel, for pixels from 0 to 1; one number is for all.
        resample: PIL's filter.
        rescale_factor: From stored values to 0..1.
        max_source_pixels: Largest image that is read, in pixels.
    """

    tile_size: int = TILE_SIZE
    min_tiles: int = 1
    max_tiles: int = 12
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    resample: int = int(PIL.Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        for name in ("tile_size", "min_tiles", "max_tiles"):
            whole_number(getattr(self, name), f"InternVLPreprocessor: {name}")
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"InternVLPreprocessor: min_tiles = {self.min_tiles} and max_tiles = "
                f"{self.max_tiles} must be in order"
            )
        whole_number(self.max_source_pixels, "InternVLPreprocessor: max_source_pixels")
        factor = self.rescale_factor
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 < factor < math.inf:
            raise ValueError(
                f"InternVLPreprocessor: rescale_factor = {self.rescale_factor!r} must be a "
                "positive number"
            )
        for name in ("image_mean", "image_std"):
            value = per_channel(getattr(self, name), f"InternVLPreprocessor: {name}")
            object.__setattr__(self, name, value)
        if min(self.image_std) <= 0:
            raise ValueError(
                f"InternVLPreprocessor: image_std = {self.image_std}: deviations must be positive"
            )
        filters = [int(known) for known in PIL.Image.Resampling]
        if isinstance(self.resample, bool | float) or self.resample not in filters:
            raise ValueError(
                f"InternVLPreprocessor: resample = {self.resample!r} is no filter of PIL, which "
                f"has {', '.join(map(str, sorted(filters)))}"
            )
        with np.errstate(over="ignore"):
            table = self._table
        if not np.isfinite(table).all():
            raise ValueError(
                f"InternVLPreprocessor: rescale_factor = {self.rescale_factor} and image_std = "
                f"{self.image_std} make values beyond fp32; correct them"
            )

    @classmethod
    def from_folder(cls, folder: str | Path, tile_size: int = TILE_SIZE) -> "InternVLPreprocessor":
        """The settings in a model folder, and those of the released models where it has no file.

        Reads processor_config.json (nested settings) or preprocessor_config.json.

        Args:
            folder: Of the model.
            tile_size: Side of a tile in pixels where there is no file.

        Raises:
            ValueError: a file is no JSON object, or asks for what is not supported.
        """
        nested = read_json(Path(folder) / "processor_config.json")
        config = nested.get("image_processor")
        config = config or read_json(Path(folder) / "preprocessor_config.json")
        return cls.from_config(config) if config else cls(tile_size)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "InternVLPreprocessor":
        """The settings of an image processor; what it leaves out is as in transformers' class.

        Files say `crop_to_patches` = false, but the processors of these models cut all the same,
        whatever it is.

        Raises:
            ValueError: the processor of another model, a step switched off, tiles that are not
                square, or a setting without meaning.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"image processor: {config!r} must be an object with its settings")
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        if kind is not None and not str(kind).startswith(PROCESSOR):
            raise ValueError(
                f"image processor: {kind} cuts images in another way than {PROCESSOR}; call "
                "InternVLEncoder with its pixel_values, or give Embedder an InternVLPreprocessor"
            )
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(key) is False:
                raise ValueError(
                    f"image processor: {key} = false is not supported; preprocess yourself and "
                    "call the encoder with pixel_values"
                )
        names = {
            "min_patches": "min_tiles", "max_patches": "max_tiles", "image_mean": "image_mean",
            "image_std": "image_std", "resample": "resample", "rescale_factor": "rescale_factor",
        }  # fmt: skip
        given = {ours: config[key] for key, ours in names.items() if config.get(key) is not None}
        if config.get("size") is not None:
            given["tile_size"] = _side(config["size"])
        return cls(**(CLASS_DEFAULTS | given))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of an image of height x width pixels, without its thumbnail.

        Of grids whose shape is equally near, a larger one is taken unless it has twice the pixels
        of the image or more.
        """
        best, nearest = (1, 1), math.inf
        for rows, columns in self._grids:
            distance = abs(width / height - columns / rows)
            is_small = height * width > 0.5 * self.tile_size**2 * rows * columns
            if distance < nearest or (distance == nearest and is_small):
                best, nearest = (rows, columns), distance
        return best

    def __call__(self, source: Any) -> torch.Tensor:
        """Tiles [n, 3, S, S] fp32 of one image: row by row, then the thumbnail if n > 1.

        Args:
            source: What `media.load_image` takes.

        Raises:
            MediaError: the input cannot be used, or is a video.
        """
        refuse_video(source)
        image = load_image(source, max_source_pixels=self.max_source_pixels)
        side, (rows, columns) = self.tile_size, self.grid(image.height, image.width)
        whole = self._resized(image, rows, columns)
        tiles = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        tiles = tiles.reshape(rows * columns, side, side, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, self._resized(image, 1, 1)[None]])
        pixels = np.empty((len(tiles), 3, side, side), dtype=np.float32)
        for channel in range(3):
            pixels[:, channel] = self._table[channel].take(tiles[..., channel])
        return torch.from_numpy(pixels)

    @cached_property
    def _grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each grid: with few tiles before many, and few columns before many."""
        grids = [
            (rows, columns)
            for columns in range(1, self.max_tiles + 1)
            for rows in range(-(-self.min_tiles // columns), self.max_tiles // columns + 1)
        ]
        return tuple(sorted(grids, key=math.prod))

    @cached_property
    def _table(self) -> np.ndarray:
        return value_table(self.rescale_factor, self.image_mean, self.image_std)

    def _resized(self, image: PIL.Image.Image, rows: int, columns: int) -> np.ndarray:
        """[rows * S, columns * S, 3] uint8."""
        size = columns * self.tile_size, rows * self.tile_size
        return np.asarray(image.resize(size, PIL.Image.Resampling(self.resample)))


def _side(size: Any) -> Any:
    """One side of the square that a file gives as an object or as a number."""
    if not isinstance(size, Mapping):
        return size
    sides = {key: value for key, value in size.items() if value is not None}
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        raise ValueError(f"image processor: size = {sides} must be a square, with height and width")
    return sides["height"]
