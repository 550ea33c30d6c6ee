"""Which vision tower runs how: with fused kernels, with its own modules, or not at all."""

import importlib.util
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from .families import FAMILIES
from .fp8 import Fp8Plan, pick_plan
from .hf_metadata import TowerRefusedError
from .internvl import MODEL_TYPES as INTERNVL_TYPES
from .internvl import TOWER_CLASSES as INTERNVL
from .kimi_vl import REMOTE_TOWER
from .siglip2 import MODEL_TYPES as SIGLIP2_TYPES
from .siglip2 import TOWER_CLASS as SIGLIP2
from .step_spec import MODEL_TYPES as STEP_TYPES
from .step_spec import TOWER_CLASS
from .vision_encoder import VisionEncoder

if TYPE_CHECKING:
    from .generic import GenericEncoder
    from .internvl_encoder import InternVLEncoder

Tier = Literal["auto", "fused", "generic"]
TIERS = ("auto", "fused", "generic")

# towers that take neither packed patches nor grid_thw: what they take, and the encoder for it
OWN_ENCODERS = {
    TOWER_CLASS: ("whole images and crops", "StepEncoder"),
    SIGLIP2: ("padded batches", "Siglip2Encoder"),
    **dict.fromkeys(INTERNVL, ("batches of tiles", "InternVLEncoder")),
}
_OWN_TYPES = {
    TOWER_CLASS: tuple(STEP_TYPES),
    SIGLIP2: SIGLIP2_TYPES,
    **dict.fromkeys(INTERNVL, INTERNVL_TYPES),
}
# Of transformers 5.17, beside the fused families: model type, class of the tower, and why it cannot
# be captured. What is done with a tower is decided by trying it (`hf_probe`), not by this table,
# and a test holds the table to that.
OTHERS: tuple[tuple[str, str, str | None], ...] = (
    ("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", None),
    ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", None),
    ("cohere_compass", "CohereCompassVisionModel", None),
    ("qwen3_5", "Qwen3_5VisionModel", None),
    ("qwen3_5_moe", "Qwen3_5MoeVisionModel", None),
    ("qwen4_exp", "Qwen4ExpVisionModel", None),
    ("exaone4_5", "Exaone4_5_VisionModel", None),
    ("glm4v", "Glm4vVisionModel", None),
    ("glm4v_moe", "Glm4vMoeVisionModel", None),
    ("glm_ocr", "GlmOcrVisionModel", None),
    ("glm5_next", "Glm5NextVisionModel", None),
    ("glm_image", "GlmImageVisionModel", None),
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel", None),
    ("paddleocr_vl", "PaddleOCRVisionModel", None),
    ("kimi_k25", "Kimi_K25VisionModel", None),
    (
        "minimax_m3_vl",
        "MiniMaxM3VLVisionModel",
        "attends over all images of a call at once, so they would see the padding",
    ),
    (
        "video_llama_3",
        "VideoLlama3VisionModel",
        "needs merge_sizes beside grid_thw, and splits its rows by them on the host",
    ),
    (
        "hunyuan_vl",
        "HunYuanVLVisionTransformer",
        "merges image by image, into rows that are neither patches nor tokens",
    ),
    (
        "muse_glimmer",
        "MuseGlimmerVisionModel",
        "does not hand max_seqlen on, so every block reads the offsets on the host",
    ),
    (
        "cosmos3_edge",
        "Cosmos3EdgeVisionModel",
        "resizes its position table image by image, by sizes read on the host",
    ),
    (
        "minicpmv4_6",
        "MiniCPMV4_6VisionModel",
        "takes target_sizes instead of grid_thw, and merges by sizes read on the host",
    ),
)


@dataclass(frozen=True)
class TowerSupport:
    """How a tower class of transformers runs.

    Attributes:
        tower_class: Its name.
        tier: "fused", "generic" or "refused".
        reason: Why it is refused, or what is unlike other towers; None otherwise.
        is_installed: Whether the installed transformers has the class. Without it, a fused tower
            can be read from a checkpoint, but there is no live one.
    """

    tower_class: str
    tier: Literal["fused", "generic", "refused"]
    reason: str | None = None
    is_installed: bool = True


def tower_report() -> list[TowerSupport]:
    """The known tower classes: all fused ones first, then others of the installed transformers."""
    report = [
        TowerSupport(name, "fused", None, _is_installed(name, (family.name, *family.model_types)))
        for family in FAMILIES.values()
        for name in family.tower_classes
    ]
    fused = [support.tower_class for support in report]
    report += [
        TowerSupport(name, "fused", f"{takes}, by {encoder}", _is_installed(name, _OWN_TYPES[name]))
        for name, (takes, encoder) in OWN_ENCODERS.items()
    ]
    for model_type, name, reason in OTHERS:
        if name not in fused and _is_installed(name, (model_type,)):
            report.append(TowerSupport(name, "generic" if reason is None else "refused", reason))
    return sorted(report, key=lambda s: ("fused", "generic", "refused").index(s.tier))


def _is_installed(tower_class: str, model_types: Iterable[str]) -> bool:
    """Whether a modeling file of `model_types` defines the class; nothing is imported."""
    defined = re.compile(rf"^class {tower_class}\b", re.MULTILINE)
    for model_type in dict.fromkeys(model_types):
        for folder in _transformers_folders():
            path = folder / "models" / model_type / f"modeling_{model_type}.py"
            if path.is_file() and defined.search(path.read_text(encoding="utf-8")):
                return True
    return False


def _transformers_folders() -> list[Path]:
    spec = importlib.util.find_spec("transformers")
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]


def takes_packed_patches(tower: torch.nn.Module) -> bool:
    """Whether the forward of `tower` takes a `grid_thw`."""
    return "grid_thw" in inspect.signature(type(tower).forward).parameters


def is_fused(tower: torch.nn.Module) -> bool:
    """Whether there are fused kernels for the class of `tower`."""
    name = type(tower).__name__
    return any(name in family.tower_classes for family in FAMILIES.values())


def encoder_for(
    tower: torch.nn.Module,
    *,
    tier: Tier = "auto",
    attention: str | None = None,
    precision: str | Fp8Plan = "native",
) -> "VisionEncoder | GenericEncoder | InternVLEncoder":
    """An encoder of a live Hugging Face tower, on its device and in its dtype.

    Args:
        tower: Any vision tower of transformers that takes packed patches and `grid_thw`, or that
            of InternVL, which takes tiles.
        tier: "fused" for kernels of ours, "generic" for the tower's own modules with our attention;
            "auto" is "fused" where there is such a family (`vitgraph info`), else "generic".
        attention: Backend for attention; None chooses.
        precision: See `VisionEncoder.from_pretrained`; a generic encoder has "native" only.

    Raises:
        ValueError: the tower cannot be captured in this tier, with the reason; or an argument has
            no such value.
    """
    if tier not in TIERS:
        raise ValueError(f"encoder_for: tier = {tier!r} must be one of {', '.join(TIERS)}")
    name = type(tower).__name__
    if name in INTERNVL and tier != "generic":
        from .internvl_encoder import InternVLEncoder

        return InternVLEncoder.from_hf(tower, attention=attention, precision=precision)
    # of the one by code of its own, `from_hf` says what to do
    if tier == "fused" or (tier == "auto" and (is_fused(tower) or name == REMOTE_TOWER)):
        return VisionEncoder.from_hf(tower, attention=attention, precision=precision)
    if pick_plan(precision) is not None:
        raise ValueError(
            f"{name} runs with its own modules (generic tier), which compute in their own "
            f"precision; leave precision = {precision!r} out"
        )
    from .generic import GenericEncoder  # here: it imports transformers, which takes a second

    try:
        return GenericEncoder(tower, attention=attention)
    except TowerRefusedError as refusal:
        way_out = "use tier='fused'" if is_fused(tower) else "use the model without vitgraph"
        if name in OWN_ENCODERS:
            way_out = f"use vitgraph.encoder.{OWN_ENCODERS[name][1]}"
        raise ValueError(
            f"{name} cannot be captured with its own modules (generic tier): {refusal}; {way_out}"
        ) from refusal
