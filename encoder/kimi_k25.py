"""Kimi-K2.5's tower, MoonViT: patches row by row, clips of up to four frames that attend together.

Learned positions are resampled bicubically, and patches of a clip get a fixed position for their
frame. What leaves the tower are the 2 x 2 patches of a token side by side, averaged over the frames
of the clip; a projector behind it reads them.

The rope of a head turns pairs (i, i + half) by column and row in turn: column 0, row 0, column 1
and so on. Ours takes all rows, then all columns, so rows of q and k are reordered within each head;
their products stay the same.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .spec import EncoderSpec
from .step_keys import neighbours_to_halves
from .transformers_compat import rope_theta
from .weight_map import Rule, linear, norm

EPS = 1e-5  # of all norms, which no config changes
_RENAMES = (
    (r"^patch_embed\.pos_emb\.weight$", "patch_embed.pos_emb.position_embeddings"),
    (r"^encoder\.blocks\.", "layers."),
    (r"^encoder\.", ""),
    # the second first: it must not meet what the first has become
    (r"^(layers\.\d+)\.norm1\.", r"\1.norm2."),
    (r"^(layers\.\d+)\.norm0\.", r"\1.norm1."),
    (r"\.mlp\.fc1\.", ".mlp.fc2."),
    (r"\.mlp\.fc0\.", ".mlp.fc1."),
    (r"\.wo\.", ".attn.proj."),
)


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Kimi_K25VisionConfig` describes.

    Raises:
        ValueError: the config asks for another activation, or for what `tower_spec` refuses.
    """
    if config.hidden_act != "gelu_pytorch_tanh":
        raise ValueError(
            f"{config.model_type}: hidden_act = {config.hidden_act!r} is not supported; only "
            "'gelu_pytorch_tanh' is"
        )
    return tower_spec(
        config, "pos_emb", rope_theta=rope_theta(config), segments="clips",
        frame_positions=config.pos_emb_time,
    )  # fmt: skip


def tower_spec(config: Any, table: str, **own: Any) -> EncoderSpec:
    """What the configs of MoonViT have in common.

    Args:
        config: Of the tower.
        table: How the names of the sides of its table of positions begin.
        own: Fields of the spec that other configs do not have.

    Raises:
        ValueError: a table of positions or blocks of patches that are not square.
    """
    height, width = f"{table}_height", f"{table}_width"
    sides = {
        f"{height}, {width}": (getattr(config, height), getattr(config, width)),
        "merge_kernel_size": tuple(config.merge_kernel_size),
    }
    for name, (rows, columns) in sides.items():
        if rows != columns:
            raise ValueError(
                f"{config.model_type}: {name} = {rows}, {columns} is not supported; only equal "
                "sides are"
            )
    merge_size = config.merge_kernel_size[0]
    return EncoderSpec(
        family="kimi_k25",
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        depth=config.num_hidden_layers,
        mlp_size=config.intermediate_size,
        out_size=config.hidden_size * merge_size**2,
        patch_size=config.patch_size,
        temporal_patch_size=1,
        merge_size=merge_size,
        norm="layer",
        eps=EPS,
        mlp="plain",
        activation="gelu_tanh",
        patch_bias=True,
        position_grid=getattr(config, height),
        position_sampling="bicubic",
        merger="mean",
        **own,
    )


def weight_map(s: EncoderSpec) -> list[Rule]:
    """Rules for every tensor of the tower; q, k and v are stacked along the rows."""
    D, F, side = s.hidden_size, s.mlp_size, s.position_grid
    pad = s.padded_mlp_size - F
    table = ("patch_embed.pos_emb.position_embeddings",)
    rules = [
        Rule(
            "patch.weight", ("patch_embed.proj.weight",),
            (D, s.in_channels, s.patch_size, s.patch_size),
        ),
        Rule("patch.bias", ("patch_embed.proj.bias",), (D,)),
        Rule("position.table", table, (side, side, D), row_axes=2),
    ]  # fmt: skip
    order = rope_order(s.head_dim)
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"layers.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.norm1", D, s.norm)
        for kind, shape in (("weight", (D, D)), ("bias", (D,))):
            sources = tuple(f"{theirs}.attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(Rule(f"{ours}.qkv.{kind}", sources, shape, row_orders=(order, order, ())))
        rules += linear(f"{ours}.proj", f"{theirs}.attn.proj", D, D)
        rules += norm(f"{ours}.norm2", f"{theirs}.norm2", D, s.norm)
        up, down = f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2"
        rules.append(Rule(f"{ours}.up.weight", (f"{up}.weight",), (F, D), pad_rows=pad))
        rules.append(Rule(f"{ours}.up.bias", (f"{up}.bias",), (F,), pad_rows=pad))
        rules.append(Rule(f"{ours}.down.weight", (f"{down}.weight",), (D, F), pad_columns=pad))
        rules.append(Rule(f"{ours}.down.bias", (f"{down}.bias",), (D,)))
    return rules + norm("final_norm", "final_layernorm", D, s.norm)


def rope_order(head_dim: int) -> tuple[int, ...]:
    """The row of a head of q or k in Hugging Face's order, for each row in ours."""
    half = head_dim // 2
    one_half = (*range(1, half, 2), *range(0, half, 2))  # rows, then columns
    return one_half + tuple(half + i for i in one_half)


def to_hf_names(tensors: Mapping[str, torch.Tensor], spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by Hugging Face's names, in Hugging Face's layout.

    Published checkpoints, and what `save_pretrained` writes, have the names of the first
    implementation: one `wqkv`, whose rope turns neighbouring values of a head. Hugging Face's turns
    halves, so the rows of q and k are reordered, exactly as transformers does while loading.

    Raises:
        ValueError: a `wqkv` that is not of q, k and v of this tower's heads.
    """
    named = {}
    for key, tensor in tensors.items():
        name = key
        if name.startswith(("encoder.", "patch_embed.")):
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
        stem, fused, kind = name.partition(".wqkv.")
        if not fused:
            named[name] = tensor
            continue
        if tensor.shape[0] != 3 * spec.hidden_size:
            raise ValueError(
                f"weights: tensor {key!r} has shape {list(tensor.shape)}, expected "
                f"{3 * spec.hidden_size} rows of q, k and v; the checkpoint does not match its "
                "config"
            )
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            if letter != "v":
                rows = neighbours_to_halves(rows, spec.num_heads)
            named[f"{stem}.attn.{letter}_proj.{kind}"] = rows
    return named
