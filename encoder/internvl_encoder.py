"""The image tower and projector of InternVL as an object: tiles to features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .fp8 import Fp8Plan, pick_plan
from .grids import PIXEL_DTYPES
from .image_spec import ImageTowerSpec
from .image_tower import ImageTower, live_tensors, live_weights
from .image_weights import ImageTowerWeights
from .internvl import (
    PREFIXES,
    TOWER_CLASSES,
    model_config,
    spec,
    to_hf_names,
    tower_key,
    tower_spec,
)
from .vision_encoder import pick_device, pick_dtype

TILES = "tiles"  # name of the one path


@dataclass
class InternVLOutput:
    """Features of tiles, in the caller's order.

    Attributes:
        last_hidden_state: [tiles, 1 + patches, D] of the tower, the class row in front.
        pooler_output: [tiles, tokens, out_size] what the projector makes of the patches, token by
            token row by row, as the model's `get_image_features` returns it; None for a tower
            without its projector.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None


class InternVLEncoder(ImageTower):
    """The tower and projector of InternVL with fused kernels, eager until `capture` is called.

    Tiles of the model's size, 448 x 448 pixels in all released ones, have CUDA graphs; those of
    other sizes are encoded eagerly, with positions resized as transformers resizes them.

    Attributes: those of `ImageTower`, whose one path is "tiles", and
        source: Name of the checkpoint, None for a live module.
        revision: Commit of the checkpoint on the Hub.
    """

    def __init__(
        self,
        spec: ImageTowerSpec,
        weights: ImageTowerWeights,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
        source: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(spec, weights, {TILES: spec.image_size}, attention, precision)
        self.source = source
        self.revision = revision

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "InternVLEncoder":
        """Load only the vision tower and projector of a model folder or Hub repository.

        Args:
            path_or_id: Folder of an InternVL in transformers' own format (repositories that end in
                -hf) or of Qianfan-OCR; or a Hub id.
            dtype: Type of the weights; None or "auto" is the checkpoint's own on a GPU and fp32 on
                the CPU.
            device: None is the current GPU if there is one, else the CPU.
            revision, token, cache_dir, local_files_only: As in transformers.
            attention: Attention backend; None chooses (see `vitgraph info`).
            precision: As in `VisionEncoder.from_pretrained`. The projector has no fp8 layers, and
                a tower with norms of q and k (InternViT-6B) none for them: it takes
                Fp8Plan(layers=("proj", "up", "down")).

        Raises:
            ValueError: the model cannot be found or read, is no InternVL, or a tensor is missing or
                misshapen; or an argument has no such value.
        """
        place = pick_device(device)
        checkpoint = Checkpoint.open(
            path_or_id,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, device=place, attention=attention, precision=precision
        )

    @classmethod
    @torch.inference_mode(False)  # tensors made of the checkpoint's are weights
    @torch.no_grad()
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "InternVLEncoder":
        """`from_pretrained` for a checkpoint that has been opened."""
        place = pick_device(device)
        pick_plan(precision)  # an unknown name is refused before the weights are read
        shape = spec(model_config(checkpoint.raw_config()))
        tensors = to_hf_names(checkpoint.named_tensors(tower_key, PREFIXES, place))
        kind = pick_dtype(dtype, place, next(iter(tensors.values())).dtype)
        return cls(
            shape, ImageTowerWeights(shape, tensors, place, kind), attention=attention,
            precision=precision, source=checkpoint.name, revision=checkpoint.revision,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls,
        model: torch.nn.Module,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "InternVLEncoder":
        """Take the tower and projector of a live model, on their device and in their dtype.

        Args:
            model: An `InternVLForConditionalGeneration` or `QianfanOCRForConditionalGeneration`,
                its inner model, or its tower alone, which has no projector.
            attention, precision: As in `from_pretrained`.

        Raises:
            ValueError: another model, or one that is spread over devices or holds no data.
        """
        tower, projector, shape = find_parts(model)
        weights = live_weights(shape, live_tensors(tower, projector, "vision_tower"))
        return cls(shape, weights, attention=attention, precision=precision)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight from a model like that of `from_hf` into the same memory.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        module, projector, _ = find_parts(tower)
        self._load(live_tensors(module, projector, "vision_tower"))

    def __call__(
        self, pixel_values: torch.Tensor, *, check_finite: bool | None = None
    ) -> InternVLOutput:
        """Encode tiles.

        Args:
            pixel_values: [N, C, H, W] normalised tiles, all of one size, any float dtype and
                device; values are rounded to the tower's dtype.
            check_finite: Refuse NaN and infinity. None does so for pixels on the CPU; True also
                for those on a GPU, which waits for the device; False never.

        Raises:
            TypeError: pixels of another type.
            ValueError: sides that the tower cannot cut, or pixels that are not finite.
        """
        self._check_tiles(pixel_values, check_finite)
        names = ["last_hidden_state"] + ["pooler_output"] * bool(self.spec.out_size)
        outputs = self.features(pixel_values, names)
        return InternVLOutput(outputs["last_hidden_state"], outputs.get("pooler_output"))

    def _check_tiles(self, pixels: torch.Tensor, check_finite: bool | None) -> None:
        if not isinstance(pixels, torch.Tensor) or pixels.dtype not in PIXEL_DTYPES:
            kind = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels)
            raise TypeError(
                f"pixel_values: {kind} must be a floating-point tensor of normalised pixels (the "
                "image processor's output, not raw uint8)"
            )
        if pixels.ndim != 4 or pixels.shape[1] != self.spec.in_channels:
            raise ValueError(
                f"pixel_values: shape {list(pixels.shape)} must be [tiles, "
                f"{self.spec.in_channels}, height, width]"
            )
        if check_finite is None:
            check_finite = pixels.is_cpu
        if check_finite and not bool(torch.isfinite(pixels).all()):
            bad = int((~torch.isfinite(pixels).flatten(1).all(1)).nonzero()[0])
            raise ValueError(
                f"pixel_values: NaN or infinity in tile {bad}; check the image and its "
                "normalisation"
            )


def find_parts(
    model: torch.nn.Module,
) -> tuple[torch.nn.Module, torch.nn.Module | None, ImageTowerSpec]:
    """Tower, projector and spec of a live model; no projector for a tower alone.

    Raises:
        ValueError: another model, or a config that is not supported.
    """
    if type(model).__name__ in TOWER_CLASSES:
        return model, None, tower_spec(model.config)
    inner: Any = getattr(model, "model", model)
    tower: Any = getattr(inner, "vision_tower", None)
    projector: Any = getattr(inner, "multi_modal_projector", None)
    if type(tower).__name__ not in TOWER_CLASSES or projector is None:
        raise ValueError(
            f"from_hf: a {type(model).__name__} has no {' or '.join(TOWER_CLASSES)} at "
            "'vision_tower' with a 'multi_modal_projector'; pass a full InternVL or Qianfan-OCR "
            "model, its inner model, or its tower"
        )
    return tower, projector, spec(inner.config)
