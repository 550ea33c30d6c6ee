"""SigLIP 2 with native aspect ratio (NaFlex): no rope, positions resized with antialias, a head.

The blocks are those of any other tower, patches row by row. Behind their last norm, attention of
one learned probe pools the patches of an image (`siglip2_head`). LFM2-VL has such a tower without
the head.
"""

import re
from collections.abc import Mapping
from typing import Any

from .spec import EncoderSpec
from .weight_map import Rule, linear, norm

TOWER_CLASS = "Siglip2VisionModel"  # of transformers
MODEL_TYPES = ("siglip2", "siglip2_vision_model", "lfm2_vl")
PLACES = ("vision_model", "vision_tower")  # where models keep it
PREFIXES = ("vision_model.", "vision_tower.", "embeddings.")
_KEY = re.compile(
    r"(?:model\.)?(?:vision_model\.|vision_tower\.)*((?:embeddings|encoder|post_layernorm|head)\..*)"
)


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Siglip2VisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation, or positions that are not a square.
    """
    if config.hidden_act != "gelu_pytorch_tanh":
        raise ValueError(
            f"siglip2: hidden_act = {config.hidden_act!r} is not supported; only "
            "'gelu_pytorch_tanh' is"
        )
    side = round(config.num_patches**0.5)
    if side**2 != config.num_patches:
        raise ValueError(f"siglip2: num_patches = {config.num_patches} is not a square")
    return EncoderSpec(
        family="siglip2",
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        depth=config.num_hidden_layers,
        mlp_size=config.intermediate_size,
        out_size=config.hidden_size,
        patch_size=config.patch_size,
        temporal_patch_size=1,
        in_channels=config.num_channels,
        merge_size=1,
        norm="layer",
        mlp="plain",
        activation="gelu_tanh",
        eps=config.layer_norm_eps,
        patch_bias=True,
        position_grid=side,
        position_sampling="bilinear_antialias",
        rope_theta=0.0,
        merger="none",
    )


def has_head(config: Any) -> bool:
    """Whether a tower of this config pools its patches."""
    return bool(getattr(config, "vision_use_head", True))


def weight_map(s: EncoderSpec, with_head: bool) -> list[Rule]:
    """Rules for every tensor of the tower."""
    D, F = s.hidden_size, s.mlp_size
    rules = linear("patch", "embeddings.patch_embedding", D, s.patch_values)
    table = ("embeddings.position_embedding.weight",)
    rules.append(Rule("position.table", table, (s.position_grid**2, D)))
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.layer_norm1", D, "layer")
        for part, shape in (("weight", (D, D)), ("bias", (D,))):
            sources = tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv")
            rules.append(Rule(f"{ours}.qkv.{part}", sources, shape))
        rules += linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.layer_norm2", D, "layer")
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
    rules += norm("final_norm", "post_layernorm", D, "layer")
    if with_head:
        rules.append(Rule("head.probe", ("head.probe",), (1, 1, D)))
        for part, shape in (("weight", (3 * D, D)), ("bias", (3 * D,))):
            rules.append(Rule(f"head.qkv.{part}", (f"head.attention.in_proj_{part}",), shape))
        rules += linear("head.proj", "head.attention.out_proj", D, D)
        rules += norm("head.norm", "head.layernorm", D, "layer")
        rules += linear("head.up", "head.mlp.fc1", F, D)
        rules += linear("head.down", "head.mlp.fc2", D, F)
    return rules


def vision_config(raw: Mapping[str, Any]) -> Any:
    """The vision config of a model's config.json.

    Raises:
        ValueError: another model type, or a vision tower of another.
    """
    from transformers import Siglip2VisionConfig

    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = "; its images have one size" if model_type == "siglip" else ""
        raise ValueError(
            f"model type {model_type!r} is no SigLIP 2 with native aspect ratio (NaFlex){hint}; "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
    inner = raw if model_type == "siglip2_vision_model" else raw.get("vision_config") or {}
    if inner.get("model_type", "siglip2_vision_model") not in MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has a vision tower of type {inner['model_type']!r} here, "
            "which is no SigLIP 2 with native aspect ratio (NaFlex)"
        )
    return Siglip2VisionConfig.from_dict(dict(inner))


def tower_key(key: str) -> str | None:
    """The name of a checkpoint's tensor inside the tower; None if it is not the tower's."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None
