"""The swap of a Step tower: whole images and crops come as batches of pixels, without grids."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch

from .fp8 import Fp8Plan
from .grids import PIXEL_DTYPES
from .hf_tower import GraphChoice, SwappedTower
from .step_spec import ROPE_AXES, RopeAxes, step3p7_spec
from .step_tower import (
    GLOBAL,
    LOCAL,
    LOCAL_SIZE,
    StepTower,
    live_tensors,
    live_weights,
    path_configs,
)

logger = logging.getLogger("vitgraph")

# arguments that say nothing of the result
IGNORED = ("return_dict", "use_cache", "output_hidden_states", "output_attentions")


class SwappedStepTower(SwappedTower):
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
        # "generic": nothing is looked up among the families of packed patches
        super().__init__(
            tower, graphs=graphs, attention=attention, precision=precision, tier="generic"
        )
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

        change = self._seen.change()
        # an image says its grid by its shape
        reason = self._reason_for_hf(pixel_values, pixel_values, change, kwargs)
        if reason is None and pixel_values is not None:
            reason = self._reason_for_pixels(pixel_values)
        if reason is None and pixel_values is not None:
            self._follow(change)
            self._fused_calls += 1
            encoder: Any = self.encoder
            return self._pack(BaseModelOutput(encoder.encode(pixel_values)), kwargs)
        self._note(str(reason))
        # an optimizer may step after this call, in ways that versions do not show
        self._is_dirty |= reason in ("grad", "training")
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

    def _own_attention(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _build(self) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            encoder = HfStepTower.of_tower(
                self.tower, attention=self._attention, precision=self._precision,
                rope_axes=self.rope_axes,
            )  # fmt: skip
            # here, as the tower is not patched yet and known to be one that can be swapped
            if self._their_axes is None:
                self._their_axes = rope_axes_of(self.tower)
            if self._graphs is False:
                return encoder
            config = None if self._graphs is True else self._graphs
            path_configs(encoder.paths, config)  # refused without a GPU too
            if encoder.device.type == "cuda":
                encoder.capture(config)
            elif not self._said_no_graphs:
                logger.info("vision tower on %s: no CUDA graphs, calls run eagerly", encoder.device)
                self._said_no_graphs = True
        return encoder


class HfStepTower(StepTower):
    """A tower that knows which arguments of Hugging Face's forward it does not serve."""

    @classmethod
    def of_tower(
        cls,
        tower: torch.nn.Module,
        *,
        attention: str | None,
        precision: str | Fp8Plan,
        rope_axes: RopeAxes,
    ) -> Self:
        """The tower alone of a live `Step3p7VisionModel`, where it is.

        Raises:
            ValueError: its parameters are on several devices, or hold no data; or a precision that
                cannot be had.
        """
        spec = step3p7_spec(tower.config, rope_axes=rope_axes)
        weights = live_weights(spec, live_tensors(tower, None))
        sizes = {GLOBAL: spec.image_size, LOCAL: LOCAL_SIZE}
        return cls(spec, weights, sizes, attention, precision)

    def unserved_argument(self, kwargs: Mapping[str, Any]) -> str | None:
        """The first argument of a call that only the tower's own forward heeds."""
        return next((n for n, v in kwargs.items() if n not in IGNORED and v is not None), None)


def rope_axes_of(tower: Any) -> RopeAxes:
    """The order in which a live tower's own rope takes the axes, found by trying it."""
    rotary = tower.rotary_emb
    # the patch in row 1 and column 0: the first quarter of a head turns if rows come first
    device = rotary.inv_freq.device
    _, sin = rotary(torch.zeros(1, device=device), torch.tensor([[1, 0]], device=device))
    return "hw" if sin[0, 0] != 0 else "wh"
