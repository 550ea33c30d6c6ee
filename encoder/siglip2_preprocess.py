"""Images to the patches of SigLIP 2 (NaFlex), as Hugging Face's processor cuts them.

An image is resized to the largest whole patches that keep its shape and are at most
`max_num_patches`; smaller ones grow. Values are those of `Siglip2ImageProcessorPil`, the class that
transformers takes without torchvision, bit for bit. Resized by torchvision they are up to a level
of 255 apart.
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

from .media import MAX_SOURCE_PIXELS, load_image, refuse_video
from .preprocess import Grid, per_channel, read_json, value_table, whole_number
from .presets import HALF

# The scale of an image is searched in these steps, and never above 100.
SCALE_STEP = 1e-5
MAX_SCALE = 100.0


@dataclass(frozen=True)
class Siglip2Preprocessor:
    """Settings of the preprocessing; calling it turns an image into patches.

    Attributes:
        patch_size: Pixels along a side of a patch.
        max_num_patches: Most patches of an image.
        image_mean, image_std: Of each channel, for pixels from 0 to 1; one number is for all.
        resample: PIL's filter.
        rescale_factor: From stored values to 0..1.
        max_source_pixels: Largest image that is read, in pixels.
    """

    patch_size: int = 16
    max_num_patches: int = 256
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    resample: int = int(PIL.Image.Resampling.BILINEAR)
    rescale_factor: float = 1 / 255
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        for name in ("patch_size", "max_num_patches"):
            whole_number(getattr(self, name), f"Siglip2Preprocessor: {name}")
        if not isinstance(self.rescale_factor, Real) or not 0 < self.rescale_factor < math.inf:
            raise ValueError(
                f"Siglip2Preprocessor: rescale_factor = {self.rescale_factor!r} must be a positive "
                "number"
            )
        for name in ("image_mean", "image_std"):
            value = per_channel(getattr(self, name), f"Siglip2Preprocessor: {name}")
            object.__setattr__(self, name, value)
        if 0 in self.image_std:
            raise ValueError(
                f"Siglip2Preprocessor: image_std = {self.image_std}: no deviation may be zero"
            )
        filters = [int(known) for known in PIL.Image.Resampling]
        if self.resample not in filters:
            raise ValueError(
                f"Siglip2Preprocessor: resample = {self.resample!r} is no filter of PIL, which has "
                f"{', '.join(map(str, sorted(filters)))}"
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Siglip2Preprocessor":
        """The settings in a model folder, and those of the released models where it has none.

        Reads processor_config.json (nested settings) or preprocessor_config.json.

        Raises:
            ValueError: a file is no JSON object, or asks for what is not supported.
        """
        nested = read_json(Path(folder) / "processor_config.json")
        config = nested.get("image_processor")
        config = config or read_json(Path(folder) / "preprocessor_config.json")
        if not config and read_json(Path(folder) / "config.json").get("model_type") == "lfm2_vl":
            config = {"image_processor_type": "Lfm2VlImageProcessor"}
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Siglip2Preprocessor":
        """The released settings, changed by those of an image processor.

        Raises:
            ValueError: the processor of another model, a step switched off, or a setting without
                meaning.
        """
        kind = config.get("image_processor_type")
        if kind is not None and not str(kind).startswith("Siglip2"):
            raise ValueError(
                f"image processor: {kind} cuts images in another way than Siglip2ImageProcessor; "
                "call Siglip2Encoder with its pixel_values, or give Embedder a Siglip2Preprocessor"
            )
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(key) is False:
                raise ValueError(
                    f"image processor: {key} = false is not supported; preprocess yourself and "
                    "call the encoder with pixel_values"
                )
        keys = (
            "patch_size", "max_num_patches", "image_mean", "image_std", "resample",
            "rescale_factor",
        )  # fmt: skip
        given = {key: config[key] for key in keys if config.get(key) is not None}
        return cls(**given)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels."""

        def patches(scale: float) -> tuple[int, int]:
            rows, columns = (math.ceil(side * scale / self.patch_size) for side in (height, width))
            return max(1, rows), max(1, columns)

        low, high = SCALE_STEP / 10, MAX_SCALE
        while high - low >= SCALE_STEP:
            middle = (low + high) / 2
            if math.prod(patches(middle)) <= self.max_num_patches:
                low = middle
            else:
                high = middle
        return patches(low)

    def __call__(self, source: Any) -> tuple[np.ndarray, Grid]:
        """Patches [h * w, P] fp32, values (row, column, channel), and (1, h, w) of one image.

        Args:
            source: What `media.load_image` takes.

        Raises:
            MediaError: the input cannot be used, or is a video.
        """
        refuse_video(source)
        image = load_image(source, max_source_pixels=self.max_source_pixels)
        side, (h, w) = self.patch_size, self.grid(image.height, image.width)
        resized = image.resize((w * side, h * side), PIL.Image.Resampling(self.resample))
        pixels = np.asarray(resized).reshape(h, side, w, side, 3).swapaxes(1, 2)
        rows = np.empty(pixels.shape, dtype=np.float32)
        for channel in range(3):
            rows[..., channel] = self._table[channel].take(pixels[..., channel])
        return rows.reshape(h * w, -1), (1, h, w)

    @cached_property
    def _table(self) -> np.ndarray:
        return value_table(self.rescale_factor, self.image_mean, self.image_std)
