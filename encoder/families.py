"""The tower families that vitgraph knows, by the names that configs and checkpoints use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import qwen2_5_vl, qwen2_vl, qwen3_vl
from .spec import EncoderSpec
from .weight_map import Rule


@dataclass(frozen=True)
class Family:
    """How one family is read.

    Attributes:
        model_type: `model_type` of the full model's config.
        tower_class: Name of the tower's class in transformers.
        spec: Vision config to spec.
        weight_map: Spec to the rules of its weights.
    """

    model_type: str
    tower_class: str
    spec: Callable[[Any], EncoderSpec]
    weight_map: Callable[[EncoderSpec], list[Rule]]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", qwen2_vl.spec, qwen2_vl.weight_map
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VisionTransformerPretrainedModel",
            qwen2_5_vl.spec,
            qwen2_5_vl.weight_map,
        ),
        Family("qwen3_vl", "Qwen3VLVisionModel", qwen3_vl.spec, qwen3_vl.weight_map),
        Family("qwen3_vl_moe", "Qwen3VLMoeVisionModel", qwen3_vl.spec, qwen3_vl.weight_map),
    )
}


def family_of_model(model_type: str | None) -> Family:
    """The family of a full model's `model_type`.

    Raises:
        ValueError: the type is not supported; the message lists the supported ones.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ValueError(
            f"model type {model_type!r} has no supported vision tower; supported: "
            f"{', '.join(FAMILIES)}"
        )
    return family


def family_of_tower(tower: object) -> Family:
    """The family of a live Hugging Face tower.

    Raises:
        ValueError: the tower's class is not supported; the message lists the supported ones.
    """
    name = type(tower).__name__
    for family in FAMILIES.values():
        if family.tower_class == name:
            return family
    supported = ", ".join(f.tower_class for f in FAMILIES.values())
    raise ValueError(f"vision tower {name!r} is not supported; supported: {supported}")
