"""Pixels of PaddleOCR-VL: patches row by row, of images whose sides are whole blocks of patches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import PIL.Image

from .frame_rules import resized_image
from .media import MediaError
from .preprocess import Grid, ImagePreprocessor
from .spec import EncoderSpec
from .video import OpenVideo


@dataclass(frozen=True)
class RasterPreprocessor(ImagePreprocessor):
    """`ImagePreprocessor` for a tower without a merger, behind which blocks of patches are merged.

    Attributes: those of `ImagePreprocessor`, and
        block_size: Patches along a side of such a block, `merge_size` of a processor's files.
    """

    block_size: int = 2

    @classmethod
    def from_configs(
        cls, spec: EncoderSpec, image: Mapping[str, Any], video: Mapping[str, Any]
    ) -> Self:
        """The family's settings, changed by those of an image processor.

        Raises:
            ValueError: as `ImagePreprocessor.from_configs`.
        """
        block_size = image.get("merge_size")
        image, video = ({**config, "merge_size": None} for config in (image, video))
        made = super().from_configs(spec, image, video)
        return made if block_size is None else replace(made, block_size=block_size)

    def image(self, image: PIL.Image.Image) -> tuple[np.ndarray, Grid]:
        """Rows and grid of an RGB image; sides shorter than a block are brought to its length."""
        height, width, factor = image.height, image.width, self._factor
        if height < factor:
            height, width = factor, round(width * factor / height)
        if width < factor:
            height, width = round(height * factor / width), factor
        sides = resized_image(height, width, factor, self.min_pixels, self.max_pixels)
        return self._rows(self._resize(image, *sides)[None])

    def video(self, video: OpenVideo) -> tuple[np.ndarray, Grid]:
        """Nothing: transformers has no rule for videos of these models.

        Raises:
            MediaError: always.
        """
        raise MediaError(
            video.name, "is a video, and this model reads images; pass its frames as images"
        )

    @property
    def _factor(self) -> int:
        return self.patch_size * self.block_size
