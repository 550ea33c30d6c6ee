"""Qwen2.5-VL: RMSNorm, SwiGLU with biases, window attention in most blocks, one merger."""

from typing import Any

from .spec import EncoderSpec
from .transformers_compat import rope_theta
from .weight_map import Rule, linear, merger, norm


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Qwen2_5_VLVisionConfig` describes.

    Raises:
        ValueError: the config asks for an activation or a window that the tower does not have.
    """
    if config.hidden_act != "silu":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r} is not supported; only "
            "'silu' is"
        )
    token_side = config.patch_size * config.spatial_merge_size
    return EncoderSpec(
        family="qwen2_5_vl",
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        depth=config.depth,
        mlp_size=config.intermediate_size,
        out_size=config.out_hidden_size,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        in_channels=config.in_channels,
        merge_size=config.spatial_merge_size,
        norm="rms",
        mlp="gated",
        activation="silu",
        # whole tokens: 112 pixels are 4 tokens of 28, so 8 patches
        window_size=config.window_size // token_side * config.spatial_merge_size,
        # a shallow tower may keep the default indices of a deep one
        full_attention_layers=tuple(i for i in config.fullatt_block_indexes if i < config.depth),
        rope_theta=rope_theta(config),
    )


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower."""
    D, F, joined = s.hidden_size, s.mlp_size, s.hidden_size * s.patches_per_token
    pad = s.padded_mlp_size - F
    kernel = (D, s.in_channels, s.temporal_patch_size, s.patch_size, s.patch_size)
    rules = [Rule("patch.weight", ("patch_embed.proj.weight",), kernel)]
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        mlp = f"{theirs}.mlp"
        rules += norm(f"{ours}.norm1", f"{theirs}.norm1", D, s.norm)
        rules += linear(f"{ours}.qkv", f"{theirs}.attn.qkv", 3 * D, D)
        rules += linear(f"{ours}.proj", f"{theirs}.attn.proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.norm2", D, s.norm)
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        for kind, shape in (("weight", (F, D)), ("bias", (F,))):
            sources = tuple(f"{name}.{kind}" for name in gate_up)
            rules.append(Rule(f"{ours}.up.{kind}", sources, shape, pad_rows=pad))
        down = f"{mlp}.down_proj"
        rules.append(Rule(f"{ours}.down.weight", (f"{down}.weight",), (D, F), pad_columns=pad))
        rules.append(Rule(f"{ours}.down.bias", (f"{down}.bias",), (D,)))
    names = ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")
    return rules + merger("merger", names, D, s.norm, joined, s.out_size)
