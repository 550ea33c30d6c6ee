"""The image towers of Step-3.7, Step3-VL-10B and Step3 as an object: whole images and crops."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .fp8 import Fp8Plan, pick_plan
from .grids import PIXEL_DTYPES
from .image_spec import ImageTowerSpec, RopeAxes
from .image_tower import ImageTower, live_tensors, live_weights
from .image_weights import ImageTowerWeights
from .step_keys import PREFIXES, to_hf_names, tower_key
from .step_preprocess import StepPreprocessor
from .step_spec import GLOBAL, LOCAL, LOCAL_SIZE, TOWER_CLASS, spec_of_model, step3p7_spec
from .vision_encoder import pick_device, pick_dtype


@dataclass
class StepOutput:
    """Features of images, in the caller's order.

    Attributes:
        last_hidden_state: [images, tokens, state_size] of the whole images, before the projector.
        pooler_output: For each image [tokens, out_size]: those of its crops, in order, and then
            those of the whole image. Views of one tensor.
        tokens_per_item: Rows of each of them.
    """

    last_hidden_state: torch.Tensor
    pooler_output: list[torch.Tensor]
    tokens_per_item: tuple[int, ...]


class StepEncoder(ImageTower):
    """A Step tower and its projector with fused kernels, eager until `capture` is called.

    Attributes: those of `ImageTower`, and
        source: Name of the checkpoint, None for a live module.
        revision: Commit of the checkpoint on the Hub.
    """

    def __init__(
        self,
        spec: ImageTowerSpec,
        weights: ImageTowerWeights,
        *,
        local_size: int = LOCAL_SIZE,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
        source: str | None = None,
        revision: str | None = None,
    ):
        """An encoder for weights with a projector.

        Raises:
            ValueError: no projector, sides that the tower cannot cut, an attention backend that
                cannot be used, or a precision that cannot be had.
        """
        if not spec.out_size:
            raise ValueError(
                "StepEncoder: this tower comes without its projector (out_size = 0); load a whole "
                "model, or pass one to from_hf"
            )
        sizes = {GLOBAL: spec.image_size, LOCAL: local_size}
        super().__init__(spec, weights, sizes, attention, precision)
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
        local_size: int | None = None,
        rope_axes: RopeAxes = "wh",
    ) -> "StepEncoder":
        """Load only the vision tower and projector of a model folder or Hub repository.

        Weights may have the names of the released checkpoints or Hugging Face's.

        Args:
            path_or_id: Folder with config.json and safetensors files, or a Hub id.
            dtype: Type of the weights; None or "auto" is the checkpoint's own on a GPU and fp32 on
                the CPU.
            device: None is the current GPU if there is one, else the CPU.
            revision, token, cache_dir, local_files_only: As in transformers.
            attention: Attention backend; None chooses (see `vitgraph info`).
            precision: As in `VisionEncoder.from_pretrained`; the convolutions and the projector
                have no fp8 layers.
            local_size: Pixels along a side of a crop; None for what the folder's image processor
                cuts, 504 if it has none.
            rope_axes: "wh" as the weights were trained; "hw" swaps rows and columns, as
                transformers before 5.23 does.

        Raises:
            ValueError: the model cannot be found or read, is no Step model, or a tensor is missing
                or misshapen; or an argument has no such value.
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
            checkpoint, dtype=dtype, device=place, attention=attention, precision=precision,
            local_size=local_size, rope_axes=rope_axes,
        )  # fmt: skip

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
        local_size: int | None = None,
        rope_axes: RopeAxes = "wh",
    ) -> "StepEncoder":
        """`from_pretrained` for a checkpoint that has been opened."""
        place = pick_device(device)
        pick_plan(precision)  # an unknown name is refused before the weights are read
        spec = spec_of_model(checkpoint.raw_config(), rope_axes)
        stored = checkpoint.named_tensors(tower_key, PREFIXES, place)
        tensors = to_hf_names(stored, spec.family, spec.num_heads)
        kind = pick_dtype(dtype, place, next(iter(tensors.values())).dtype)
        weights = ImageTowerWeights(spec, tensors, place, kind)
        if local_size is None:
            local_size = StepPreprocessor.from_folder(checkpoint.folder).crop_size
        return cls(
            spec, weights, local_size=local_size, attention=attention, precision=precision,
            source=checkpoint.name, revision=checkpoint.revision,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls,
        model: torch.nn.Module,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
        local_size: int = LOCAL_SIZE,
        rope_axes: RopeAxes = "wh",
    ) -> "StepEncoder":
        """Take the tower and projector of a live `Step3p7...` model, where they are.

        Args:
            model: A `Step3p7ForConditionalGeneration` or its inner `Step3p7Model`.
            attention, precision, rope_axes: As in `from_pretrained`.
            local_size: Pixels along a side of a crop.

        Raises:
            ValueError: another model, or one that is spread over devices or holds no data.
        """
        inner = getattr(model, "model", model)
        tower: Any = getattr(inner, "vision_model", None)
        projector: Any = getattr(inner, "multi_modal_projector", None)
        if type(tower).__name__ != TOWER_CLASS or projector is None:
            raise ValueError(
                f"from_hf: a {type(model).__name__} has no Step3p7VisionModel at 'vision_model' "
                "with a 'multi_modal_projector'; pass a Step3p7ForConditionalGeneration or its "
                "inner Step3p7Model"
            )
        bias = projector.bias is not None
        spec = step3p7_spec(tower.config, projector.out_features, bias, rope_axes)
        weights = live_weights(spec, live_tensors(tower, projector))
        return cls(spec, weights, local_size=local_size, attention=attention, precision=precision)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight from a whole model into the same memory; captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        inner: Any = getattr(tower, "model", tower)
        self._load(live_tensors(inner.vision_model, inner.multi_modal_projector))

    def __call__(
        self,
        pixel_values: torch.Tensor,
        pixel_values_local: torch.Tensor | None = None,
        num_local_patches: Sequence[int] | torch.Tensor | None = None,
        *,
        check_finite: bool | None = None,
    ) -> StepOutput:
        """Encode images and their crops.

        Args:
            pixel_values: [N, C, H, W] normalised whole images, any float dtype and device; values
                are rounded to the tower's dtype.
            pixel_values_local: [sum of the counts, C, h, w] the crops of all images, in order;
                None for none.
            num_local_patches: How many crops each image has, 0 included; None for none at all.
            check_finite: Refuse NaN and infinity. None does so for pixels on the CPU; True also
                for those on a GPU, which waits for the device; False never.

        Raises:
            TypeError: pixels or counts of another type.
            ValueError: shapes or counts that do not belong together.
        """
        self._check_images("pixel_values", pixel_values, GLOBAL, check_finite)
        counts = _crop_counts(num_local_patches, len(pixel_values))
        crops = 0 if pixel_values_local is None else len(pixel_values_local)
        if sum(counts) != crops:
            raise ValueError(
                f"num_local_patches: {list(counts)} are {sum(counts)} crops, but "
                f"pixel_values_local holds {crops}; pass the count of every image"
            )
        images = {GLOBAL: pixel_values}
        if pixel_values_local is not None and crops:
            self._check_images("pixel_values_local", pixel_values_local, LOCAL, check_finite)
            images[LOCAL] = pixel_values_local
        with torch.no_grad():
            # of crops only the projected tokens are wanted
            return self._join(self.run(images, {LOCAL: ["pooler_output"]}), counts)

    def _join(
        self, outputs: Mapping[str, Mapping[str, torch.Tensor]], counts: Sequence[int]
    ) -> StepOutput:
        """Crops of each image in front of the image itself."""
        per_image, per_crop = (self.paths[name].size.tokens for name in (GLOBAL, LOCAL))
        state = outputs[GLOBAL]["last_hidden_state"]
        state = state.view(len(counts), per_image, self.spec.state_size)
        rows, sizes = outputs[GLOBAL]["pooler_output"], [per_image] * len(counts)
        if sum(counts):
            crops = outputs[LOCAL]["pooler_output"]
            pieces, first = [], 0
            for i, count in enumerate(counts):
                pieces.append(crops[first * per_crop : (first + count) * per_crop])
                pieces.append(rows[i * per_image : (i + 1) * per_image])
                first += count
            rows, sizes = torch.cat(pieces), [n * per_crop + per_image for n in counts]
        return StepOutput(state, list(rows.split(sizes)) if sizes else [], tuple(sizes))

    def _check_images(
        self, name: str, pixels: torch.Tensor, path: str, check_finite: bool | None
    ) -> None:
        size = self.paths[path].size
        if not isinstance(pixels, torch.Tensor) or pixels.dtype not in PIXEL_DTYPES:
            kind = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels)
            raise TypeError(
                f"{name}: {kind} must be a floating-point tensor of normalised pixels (the image "
                "processor's output, not raw uint8)"
            )
        expected = [self.spec.in_channels, size.height, size.width]
        if pixels.ndim != 4 or list(pixels.shape[1:]) != expected:
            raise ValueError(
                f"{name}: shape {list(pixels.shape)} must be [images, *{expected}], the size of "
                f"the {path} path"
            )
        if check_finite is None:
            check_finite = pixels.is_cpu
        if check_finite and not bool(torch.isfinite(pixels).all()):
            bad = int((~torch.isfinite(pixels).flatten(1).all(1)).nonzero()[0])
            raise ValueError(
                f"{name}: NaN or infinity in image {bad}; check the image and its normalisation"
            )


def _crop_counts(counts: Sequence[int] | torch.Tensor | None, images: int) -> list[int]:
    if counts is None:
        return [0] * images
    if isinstance(counts, torch.Tensor):
        if counts.is_floating_point() or counts.ndim != 1:
            raise TypeError(
                f"num_local_patches: {counts.dtype} {list(counts.shape)} must be one integer for "
                "each image"
            )
        counts = counts.tolist()
    try:
        plain = [operator.index(n) for n in counts]  # numpy's integers too
    except TypeError as error:
        raise TypeError(
            f"num_local_patches: {counts} must be one integer for each image"
        ) from error
    if len(plain) != images or min(plain, default=0) < 0:
        raise ValueError(
            f"num_local_patches: {plain} must be {images} counts, one for each image, none negative"
        )
    return plain
