"""PaddleOCR-VL: patches row by row, learned positions, q, k and v as three layers, and no merger.

A norm of the last block's output is what the tower returns; a projector behind it merges.
"""

from typing import Any

from .spec import EncoderSpec
from .transformers_compat import paddleocr_sampling, rope_theta
from .weight_map import Rule, linear, norm


def spec(config: Any) -> EncoderSpec:
    """The tower that a `PaddleOCRVisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation.
    """
    if config.hidden_act != "gelu_pytorch_tanh":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r} is not supported; only "
            "'gelu_pytorch_tanh' is"
        )
    return EncoderSpec(
        family="paddleocr_vl",
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
        eps=config.layer_norm_eps,
        mlp="plain",
        activation="gelu_tanh",
        patch_bias=True,
        position_grid=config.image_size // config.patch_size,
        position_sampling=paddleocr_sampling(config),
        rope_theta=rope_theta(config),
        merger="none",
    )


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower; q, k and v are stacked along the rows."""
    D, F = s.hidden_size, s.mlp_size
    patch, table = (f"vision_model.embeddings.{n}_embedding" for n in ("patch", "position"))
    kernel = (D, s.in_channels, s.patch_size, s.patch_size)
    rules = [
        Rule("patch.weight", (f"{patch}.weight",), kernel),
        Rule("patch.bias", (f"{patch}.bias",), (D,)),
        Rule("position.table", (f"{table}.weight",), (s.position_grid**2, D)),
    ]
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"vision_model.encoder.layers.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.layer_norm1", D, s.norm)
        for kind, shape in (("weight", (D, D)), ("bias", (D,))):
            sources = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(Rule(f"{ours}.qkv.{kind}", sources, shape))
        rules += linear(f"{ours}.proj", f"{theirs}.self_attn.out_proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.layer_norm2", D, s.norm)
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
    return rules + norm("final_norm", "vision_model.post_layernorm", D, s.norm)
