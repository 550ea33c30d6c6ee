"""Names of a Step tower's tensors in checkpoints, and their way to Hugging Face's.

Hugging Face's names here are those inside the model (`vision_model.layers.0...`,
`multi_modal_projector.weight`), without a leading `model.`. Released weights of Step-3.7 and
Step3-VL-10B, and what `save_pretrained` writes, have the names of the first implementation: one
fused `in_proj` for q, k and v, whose rope turns neighbouring values of a head. Hugging Face's turns
halves, so the rows of q and k are reordered, exactly as transformers does while loading. Step3 has
one set of names.
"""

import re
from collections.abc import Mapping

import torch

PREFIXES = (
    "vision_model.",
    "multi_modal_projector.",
    "vit_large_projector.",
    "vit_downsampler.",
    "vit_downsampler2.",
)
_RENAMES = (
    (r"^vit_large_projector\.", "multi_modal_projector."),
    (r"^vision_model\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.transformer\.resblocks\.", "vision_model.layers."),
    (r"^vision_model\.ln_pre\.", "vision_model.pre_layernorm."),
    (r"^vision_model\.vit_downsampler([12])\.", r"vision_model.downsampler\1."),
    (r"\.ls_([12])\.gamma$", r".lambda_\1"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_1\.", ".layernorm_before."),
    (r"\.ln_2\.", ".layernorm_after."),
)


def tower_key(key: str) -> str | None:
    """The name of a checkpoint's tensor inside the model; None if it is not the tower's."""
    name = key.removeprefix("model.")
    return name if name.startswith(PREFIXES) else None


def to_hf_names(
    tensors: Mapping[str, torch.Tensor], family: str, num_heads: int
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by Hugging Face's names, in Hugging Face's layout.

    Args:
        tensors: By the names that `tower_key` gives, in either style.
        family: "step3p7" or "step3_vl".
        num_heads: Attention heads, in which rows of q and k are reordered.

    Raises:
        ValueError: a fused weight that is not of q, k and v of these heads.
    """
    if family == "step3_vl":
        return dict(tensors)
    named = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        stem, fused, part = name.partition(".in_proj_")
        if not fused:
            named[name] = tensor
            continue
        if tensor.shape[0] % (3 * 2 * num_heads):
            raise ValueError(
                f"weights: tensor {key!r} has shape {list(tensor.shape)}, which are not q, k and v "
                f"of {num_heads} heads; the checkpoint does not match its config"
            )
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            if letter != "v":
                rows = neighbours_to_halves(rows, num_heads)
            named[f"{stem}.{letter}_proj.{part}"] = rows
    return named


def neighbours_to_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [D, ...] of q or k: pairs (2i, 2i + 1) of each head become (i, i + half)."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
