"""GLM-4.1V, 4.5V and 4.6V, GLM-OCR and GLM-5: RMSNorm, SwiGLU, a convolution that joins patches.

GLM-4V has heads of 128, no biases, a norm behind the patch embedding, and learned positions that
are resampled bicubically. GLM-OCR and GLM-5 have biases and a norm of each head of q and k instead,
and GLM-5 bounds its gates.
"""

from typing import Any

from .glm_merger import glm_merger_rules
from .spec import EncoderSpec
from .transformers_compat import rope_theta
from .weight_map import Rule, linear, norm


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Glm4vVisionConfig` or `Glm4vMoeVisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation.
    """
    return EncoderSpec(
        **_common(config),
        # transformers names the two MLPs so: the blocks' are as wide as a merged token
        mlp_size=config.out_hidden_size,
        merger_size=config.intermediate_size,
        proj_bias=False,
        mlp_bias=False,
        embed_norm="rms",
        position_grid=config.image_size // config.patch_size,
        position_sampling="bicubic",
    )


def ocr_spec(config: Any) -> EncoderSpec:
    """The tower that a `GlmOcrVisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation.
    """
    return EncoderSpec(
        **_common(config),
        mlp_size=config.intermediate_size,
        merger_size=config.out_hidden_size * config.in_channels,
        proj_bias=config.attention_bias,
        mlp_bias=config.attention_bias,
        qk_norm=True,
    )


def glm5_spec(config: Any) -> EncoderSpec:
    """The tower that a `Glm5NextVisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation.
    """
    return EncoderSpec(
        **_common(config),
        mlp_size=config.intermediate_size,
        merger_size=config.projection_intermediate_size,
        proj_bias=config.attention_bias,
        mlp_bias=config.attention_bias,
        qk_norm=True,
        gate_limit=float(config.swiglu_limit),
    )


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower."""
    D, F = s.hidden_size, s.mlp_size
    pad = s.padded_mlp_size - F
    kernel = (D, s.in_channels, s.temporal_patch_size, s.patch_size, s.patch_size)
    rules = [
        Rule("patch.weight", ("patch_embed.proj.weight",), kernel),
        Rule("patch.bias", ("patch_embed.proj.bias",), (D,)),
    ]
    if s.embed_norm != "none":
        rules += norm("embed_norm", "post_conv_layernorm", D, s.embed_norm)
    if s.position_grid:
        source = ("embeddings.position_embedding.weight",)
        rules.append(Rule("position.table", source, (s.position_grid**2, D)))
    for i in range(s.depth):
        ours = theirs = f"blocks.{i}"
        attn, mlp = f"{theirs}.attn", f"{theirs}.mlp"
        rules += norm(f"{ours}.norm1", f"{theirs}.norm1", D, s.norm)
        rules += linear(f"{ours}.qkv", f"{attn}.qkv", 3 * D, D, bias=s.qkv_bias)
        if s.qk_norm:
            sources = (f"{attn}.q_norm.weight", f"{attn}.k_norm.weight")
            rules.append(Rule(f"{ours}.qk_norm.weight", sources, (s.head_dim,)))
        rules += linear(f"{ours}.proj", f"{attn}.proj", D, D, bias=s.proj_bias)
        rules += norm(f"{ours}.norm2", f"{theirs}.norm2", D, s.norm)
        for kind, shape in (("weight", (F, D)), ("bias", (F,)))[: 1 + s.mlp_bias]:
            sources = tuple(f"{mlp}.{half}_proj.{kind}" for half in ("gate", "up"))
            rules.append(Rule(f"{ours}.up.{kind}", sources, shape, pad_rows=pad))
        down = (f"{mlp}.down_proj.weight",)
        rules.append(Rule(f"{ours}.down.weight", down, (D, F), pad_columns=pad))
        if s.mlp_bias:
            rules.append(Rule(f"{ours}.down.bias", (f"{mlp}.down_proj.bias",), (D,)))
    return rules + glm_merger_rules(s)


def _common(config: Any) -> dict[str, Any]:
    if config.hidden_act != "silu":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r} is not supported; only "
            "'silu' is"
        )
    return {
        "family": "glm4v",
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "out_size": config.out_hidden_size,
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "in_channels": config.in_channels,
        "merge_size": config.spatial_merge_size,
        "norm": "rms",
        "eps": config.rms_norm_eps,
        "mlp": "gated",
        "activation": "silu",
        "patch_bias": True,
        "qkv_bias": config.attention_bias,
        "rope_theta": rope_theta(config),
        "merger": "glm",
    }
