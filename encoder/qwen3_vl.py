"""Qwen3-VL, its MoE, omni and Cohere relatives: LayerNorm, tanh GELU, learned positions, deepstack.

Towers without deepstack, or with other names for the same weights, are variations of this one.
"""

from collections.abc import Sequence
from typing import Any

from .spec import EncoderSpec
from .transformers_compat import rope_theta
from .weight_map import Rule, linear, merger, norm


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Qwen3VLVisionConfig`, or that of a relative with deepstack, describes.

    Raises:
        ValueError: the config asks for what `tower_spec` refuses.
    """
    return tower_spec(config, deepstack_layers=config.deepstack_visual_indexes)


def tower_spec(config: Any, *, deepstack_layers: Sequence[int]) -> EncoderSpec:
    """The tower with deepstack mergers after `deepstack_layers`.

    Raises:
        ValueError: the config asks for another activation, or positions that are not a square.
    """
    if config.hidden_act != "gelu_pytorch_tanh":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r} is not supported; only "
            "'gelu_pytorch_tanh' is"
        )
    side = round(config.num_position_embeddings**0.5)
    if side**2 != config.num_position_embeddings:
        raise ValueError(
            f"{config.model_type}: num_position_embeddings = {config.num_position_embeddings} is "
            "not a square"
        )
    return EncoderSpec(
        family="qwen3_vl",
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        depth=config.depth,
        mlp_size=config.intermediate_size,
        out_size=config.out_hidden_size,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        in_channels=config.in_channels,
        merge_size=config.spatial_merge_size,
        norm="layer",
        mlp="plain",
        activation="gelu_tanh",
        patch_bias=True,
        position_grid=side,
        deepstack_layers=tuple(deepstack_layers),
        rope_theta=rope_theta(config),
    )


def weight_map(
    s: EncoderSpec,
    *,
    merger_parts: tuple[str, str, str] = ("norm", "linear_fc1", "linear_fc2"),
    deepstack: str = "deepstack_merger_list",
) -> list[Rule]:
    """Rules for every tensor of the tower.

    `merger_parts` are the names of a merger's norm and linear layers, `deepstack` is that of the
    list of deepstack mergers.
    """

    def parts(prefix: str) -> tuple[str, str, str]:
        norm_name, first, second = merger_parts
        return f"{prefix}.{norm_name}", f"{prefix}.{first}", f"{prefix}.{second}"

    D, F, joined = s.hidden_size, s.mlp_size, s.hidden_size * s.patches_per_token
    kernel = (D, s.in_channels, s.temporal_patch_size, s.patch_size, s.patch_size)
    rules = [
        Rule("patch.weight", ("patch_embed.proj.weight",), kernel),
        Rule("patch.bias", ("patch_embed.proj.bias",), (D,)),
        Rule("position.table", ("pos_embed.weight",), (s.position_grid**2, D)),
    ]
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.norm1", D, s.norm)
        rules += linear(f"{ours}.qkv", f"{theirs}.attn.qkv", 3 * D, D)
        rules += linear(f"{ours}.proj", f"{theirs}.attn.proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.norm2", D, s.norm)
        rules += linear(f"{ours}.up", f"{theirs}.mlp.linear_fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.linear_fc2", D, F)
    rules += merger("merger", parts("merger"), D, s.norm, joined, s.out_size)
    for j in range(len(s.deepstack_layers)):
        names = parts(f"{deepstack}.{j}")
        rules += merger(f"deepstack.{j}", names, joined, s.norm, joined, s.out_size)
    return rules
