"""The swap of a Step tower: whole images and crops come as batches of pixels, without grids."""

import logging
from typing import Any

import torch

from .fp8 import Fp8Plan
from .grids import PIXEL_DTYPES
from .hf_tower import GraphChoice
from .image_spec import ROPE_AXES, RopeAxes
from .image_swap import SwappedImageTower
from .image_tower import ImageTower, live_tensors, live_weights, path_configs
from .step_spec import GLOBAL, LOCAL, LOCAL_SIZE, step3p7_spec

logger = logging.getLogger("vitgraph")


class SwappedStepTower(SwappedImageTower):
    """A `Step3p7VisionModel` whose calls go to the fused tower; also the handle of the swap.

    Graphs serve whole images and crops of 504 x 504 pixels; batches of other sizes are encoded
    eagerly. The projector stays the model's own. Beside the reasons of `SwappedTower`, calls go to
    Hugging Face's forward for images whose sides are not whole patches ("image size"), for pixels
    that are not floats ("pixel_values dtype"), and for arguments that only that forward knows.

    transformers before 5.23 turns the lower half of a head by the row of a patch, the released
    weights by the column. Swapped calls follow the weights unless `rope_axes` says "hw"; where this
    differs from the forward of the installed transformers, a warning says so.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        *,
        graphs: GraphChoice,
        attention: str | None,
        precision: str | Fp8Plan = "native",
        rope_axes: RopeAxes = "wh",
    ):
        if rope_axes not in ROPE_AXES:
            raise ValueError(
                f"swap_vision_tower: rope_axes = {rope_axes!r} must be 'wh' (as the released "
                "weights have it) or 'hw' (as transformers before 5.23 computes it)"
            )
        self.rope_axes: RopeAxes = rope_axes
        self._their_axes: RopeAxes | None = None
        super().__init__(tower, graphs=graphs, attention=attention, precision=precision)
        if (theirs := self._their_axes) != rope_axes:
            logger.warning(
                "vision tower: the installed transformers rotates with axes %r, the swapped calls "
                "with %r; calls that go to Hugging Face's forward (with gradients, say) give other "
                "features. The released weights need 'wh'; rope_axes=%r makes both agree",
                theirs, rope_axes, theirs,
            )  # fmt: skip

    def __call__(self, pixel_values: torch.Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
        """The tower's forward of images [N, C, H, W], with its arguments and output class."""
        if rest:
            raise TypeError(
                f"{type(self.tower).__name__}: takes pixel_values alone by position, got "
                f"{len(rest)} more; pass them by name"
            )
        from transformers.modeling_outputs import BaseModelOutput

        # an image says its grid by its shape
        reason = self._reason_for_hf(pixel_values, pixel_values, kwargs)
        if reason is None and pixel_values is not None:
            reason = self._reason_for_pixels(pixel_values)
        reason = self._settle(reason)
        if reason is None and pixel_values is not None:
            encoder: Any = self.encoder
            return self._pack(BaseModelOutput(encoder.encode(pixel_values)), kwargs)
        return self._hf_forward(pixel_values, **kwargs)

    def _reason_for_pixels(self, images: torch.Tensor) -> str | None:
        """Why only Hugging Face's forward takes these images, None for the fused one."""
        if images.dtype not in PIXEL_DTYPES:
            return "pixel_values dtype"
        encoder: Any = self.encoder
        spec = encoder.spec
        if images.ndim != 4 or images.shape[1] != spec.in_channels:
            return "image size"
        can_cut = all(side > 0 and side % spec.patch_size == 0 for side in images.shape[2:])
        return None if can_cut else "image size"

    def _new_encoder(self) -> ImageTower:
        spec = step3p7_spec(self.tower.config, rope_axes=self.rope_axes)
        weights = live_weights(spec, live_tensors(self.tower, None))
        sizes = {GLOBAL: spec.image_size, LOCAL: LOCAL_SIZE}
        encoder = ImageTower(spec, weights, sizes, self._attention, self._precision)
        # here, as the tower is not patched yet and known to be one that can be swapped
        if self._their_axes is None:
            self._their_axes = rope_axes_of(self.tower)
        return encoder

    def _check_config(self, encoder: Any, config: Any) -> None:
        path_configs(encoder.paths, config)


def rope_axes_of(tower: Any) -> RopeAxes:
    """The order in which a live tower's own rope takes the axes, found by trying it."""
    rotary = tower.rotary_emb
    # the patch in row 1 and column 0: the first quarter of a head turns if rows come first
    device = rotary.inv_freq.device
    _, sin = rotary(torch.zeros(1, device=device), torch.tensor([[1, 0]], device=device))
    return "hw" if sin[0, 0] != 0 else "wh"
