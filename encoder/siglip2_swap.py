"""The swap of a SigLIP 2 tower: images come as a padded batch, and go back as one."""

from collections.abc import Sequence
from typing import Any

import torch

from .image_swap import SwappedImageTower
from .siglip2_encoder import Siglip2Encoder, image_sizes, mask_agrees


class SwappedSiglip2Tower(SwappedImageTower):
    """A `Siglip2VisionModel` whose calls go to the fused tower; also the handle of the swap.

    Rows of `last_hidden_state` past the patches of an image are zeros; Hugging Face computes them
    from the padding, and nothing may read them. Beside the reasons of `SwappedTower`, calls go to
    Hugging Face's forward for masks that mark other patches than the first ones of each image
    ("pixel_attention_mask"), for images without patches or larger than the batch is padded to
    ("spatial_shapes"), and for arguments that only that forward knows. Sizes and masks on a GPU
    are read on the host, as Hugging Face's forward reads the sizes.
    """

    def __call__(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The tower's forward of a padded batch, with its arguments and output class."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        reason = self._reason_for_hf(pixel_values, pixel_values, kwargs)
        sizes: list[tuple[int, int]] = []
        if reason is None and pixel_values is not None:
            sizes, reason = _readable(pixel_values, pixel_attention_mask, spatial_shapes)
        reason = self._settle(reason)
        if reason is None and pixel_values is not None:
            encoder: Any = self.encoder
            output = encoder(pixel_values, sizes, check_finite=False)
            state: Any = _padded(output.last_hidden_state, output.patches_per_image, pixel_values)
            return self._pack(BaseModelOutputWithPooling(state, output.pooler_output), kwargs)
        return self._hf_forward(
            pixel_values=pixel_values, pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes, **kwargs,
        )  # fmt: skip

    def _new_encoder(self) -> Siglip2Encoder:
        return Siglip2Encoder.from_hf(
            self.tower, attention=self._attention, precision=self._precision
        )


def _readable(
    pixels: torch.Tensor, mask: torch.Tensor | None, shapes: torch.Tensor | None
) -> tuple[list[tuple[int, int]], str | None]:
    """The sizes of the images; and why the batch belongs to Hugging Face's forward, if it does."""
    if shapes is None:
        return [], "no spatial_shapes"
    if pixels.ndim != 3 or not pixels.is_floating_point():
        return [], "pixel_values"
    try:
        sizes = image_sizes(shapes)
    except (TypeError, ValueError):
        return [], "spatial_shapes"
    length = pixels.shape[1]
    if len(sizes) != len(pixels) or any(h * w > length for h, w in sizes):
        return [], "spatial_shapes"
    # without a mask that forward lets images see their padding
    is_whole = all(h * w == length for h, w in sizes)
    agrees = is_whole if mask is None else mask_agrees(mask, sizes, length)
    return sizes, None if agrees else "pixel_attention_mask"


def _padded(rows: torch.Tensor, counts: Sequence[int], pixels: torch.Tensor) -> torch.Tensor:
    """[images, patches, D] of packed rows, zeros past the patches of each image."""
    images, length = pixels.shape[:2]
    if all(count == length for count in counts):
        return rows.view(images, length, rows.shape[1])
    batch = rows.new_zeros(images, length, rows.shape[1])
    places = [batch[i, :count] for i, count in enumerate(counts)]
    torch._foreach_copy_(places, list(rows.split(list(counts))))
    return batch
