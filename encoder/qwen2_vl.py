"""Qwen2-VL: LayerNorm, quick GELU, rope only, one merger."""

from typing import Any

from .spec import EncoderSpec
from .transformers_compat import rope_theta
from .weight_map import Rule, linear, merger, norm


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Qwen2VLVisionConfig` describes."""
    return EncoderSpec(
        family="qwen2_vl",
        hidden_size=config.embed_dim,
        num_heads=config.num_heads,
        depth=config.depth,
        mlp_size=int(config.embed_dim * config.mlp_ratio),
        out_size=config.hidden_size,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        in_channels=config.in_channels,
        merge_size=config.spatial_merge_size,
        norm="layer",
        mlp="plain",
        activation="quick_gelu",
        rope_theta=rope_theta(config),
    )


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower."""
    D, F, joined = s.hidden_size, s.mlp_size, s.hidden_size * s.patches_per_token
    kernel = (D, s.in_channels, s.temporal_patch_size, s.patch_size, s.patch_size)
    rules = [Rule("patch.weight", ("patch_embed.proj.weight",), kernel)]
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.norm1", D, s.norm)
        rules += linear(f"{ours}.qkv", f"{theirs}.attn.qkv", 3 * D, D)
        rules += linear(f"{ours}.proj", f"{theirs}.attn.proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.norm2", D, s.norm)
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
    names = ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")
    return rules + merger("merger", names, D, s.norm, joined, s.out_size)
