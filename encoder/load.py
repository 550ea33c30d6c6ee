"""Which encoder a checkpoint needs, and loading it: one way in for towers of every kind."""

from pathlib import Path
from typing import Any

import torch

from . import internvl, siglip2, step_spec
from .checkpoint import Checkpoint
from .fp8 import Fp8Plan
from .image_spec import ImageTowerSpec
from .internvl_encoder import InternVLEncoder
from .siglip2_encoder import Siglip2Encoder
from .spec import EncoderSpec
from .step_encoder import StepEncoder
from .vision_encoder import VisionEncoder

AnyEncoder = VisionEncoder | Siglip2Encoder | StepEncoder | InternVLEncoder
EncoderClass = (
    type[VisionEncoder] | type[Siglip2Encoder] | type[StepEncoder] | type[InternVLEncoder]
)


def load_encoder(
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
) -> AnyEncoder:
    """Load the vision tower of a model folder or Hub repository, of the class that it needs.

    Args:
        path_or_id: Folder written by `save_pretrained`, or a Hub id. Its config.json decides: a
            `StepEncoder` for Step models, a `Siglip2Encoder` for SigLIP 2 (NaFlex) and LFM2-VL,
            an `InternVLEncoder` for InternVL and Qianfan-OCR, a `VisionEncoder` for all others.
        dtype, device, revision, local_files_only, token, cache_dir, attention, precision: As in
            `VisionEncoder.from_pretrained`.

    Raises:
        ValueError: as `from_pretrained` of that class.
    """
    checkpoint = Checkpoint.open(
        path_or_id,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    return encoder_of_checkpoint(
        checkpoint, dtype=dtype, device=device, attention=attention, precision=precision
    )


def encoder_of_checkpoint(checkpoint: Checkpoint, **options: Any) -> AnyEncoder:
    """`load_encoder` for a checkpoint that has been opened; `options` as there."""
    return encoder_class(checkpoint.raw_config()).from_checkpoint(checkpoint, **options)


def tower_spec(checkpoint: Checkpoint) -> EncoderSpec | ImageTowerSpec:
    """What the tower of a checkpoint is, without its weights.

    Raises:
        ValueError: the model has no supported tower.
    """
    raw = checkpoint.raw_config()
    kind = encoder_class(raw)
    if kind is StepEncoder:
        return step_spec.spec_of_model(raw)
    if kind is Siglip2Encoder:
        return siglip2.spec(siglip2.vision_config(raw))
    if kind is InternVLEncoder:
        return internvl.spec(internvl.model_config(raw))
    family, config = checkpoint.family_and_config()
    return family.spec(config)


def encoder_class(config: dict[str, Any]) -> EncoderClass:
    """The class of encoder for a model with this config.json."""
    model_type = str(config.get("model_type"))
    if model_type in step_spec.MODEL_TYPES:
        return StepEncoder
    # one of images of one size is told so there, not that its type is unknown
    if model_type in siglip2.MODEL_TYPES or model_type == "siglip":
        return Siglip2Encoder
    # one in the format of the first release is told there which repository to use
    if model_type in (*internvl.MODEL_TYPES, internvl.FIRST_FORMAT):
        return InternVLEncoder
    return VisionEncoder
