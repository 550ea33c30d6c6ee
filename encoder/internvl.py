"""InternVL: tiles of one size, a class row, learned positions, and a projector that joins patches.

The tower of InternVL 2.5, 3 and 3.5 in transformers' own format (repositories that end in `-hf`),
and of Qianfan-OCR, which names its blocks otherwise. Blocks are pre-norm with layer scale; the
large tower (InternViT-6B) has RMSNorm, and norms of q and k over all heads. All rows of the stream,
the class row in front, are the tower's output. The projector drops the class row, joins squares of
2 x 2 patches ("pixel shuffle") and multiplies them twice.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch

from ..kernels.activation import Activation
from ..kernels.norm import MAX_D
from .image_spec import ImageTowerSpec
from .weight_map import Rule, linear, norm

# family, which is the model type of config.json, to the place of its blocks in the tower
LAYERS = {"internvl": "encoder.layer", "qianfan_ocr": "layers"}
TOWER_CLASSES = ("InternVLVisionModel", "QianfanOCRVisionModel")  # of transformers
MODEL_TYPES = tuple(LAYERS)
FIRST_FORMAT = "internvl_chat"  # the model type of the first releases, which is not read
PREFIXES = ("vision_tower.", "multi_modal_projector.", "vision_model.", "mlp1.")
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
NORMS = ("layer_norm", "rms_norm")
# what released weights of Qianfan-OCR, and what `save_pretrained` writes of it, call otherwise
_RENAMES = (
    (r"^vision_model\.(encoder\.)?", "vision_tower."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)


def tower_spec(vision: Any) -> ImageTowerSpec:
    """The tower alone of an `InternVLVisionConfig` or a `QianfanOCRVisionConfig`.

    Raises:
        ValueError: the config asks for what this tower does not have.
    """
    family = str(vision.model_type).removesuffix("_vision")
    if family not in LAYERS:
        raise ValueError(
            f"internvl: a vision config of type {vision.model_type!r} is not supported; only "
            f"{', '.join(f'{name}_vision' for name in LAYERS)} are"
        )
    if not vision.use_absolute_position_embeddings:
        _refuse(family, "use_absolute_position_embeddings", False, "True")
    if vision.use_mask_token:
        _refuse(family, "use_mask_token", True, "False")
    if vision.norm_type not in NORMS:
        _refuse(family, "norm_type", vision.norm_type, " or ".join(map(repr, NORMS)))
    D, heads = vision.hidden_size, vision.num_attention_heads
    return ImageTowerSpec(
        family=family,
        hidden_size=D,
        num_heads=heads,
        depth=vision.num_hidden_layers,
        mlp_size=vision.intermediate_size,
        downsamples=(),
        out_size=0,
        block="pre_norm",
        position_sampling="bicubic",
        image_size=_side(family, "image_size", vision.image_size),
        patch_size=_side(family, "patch_size", vision.patch_size),
        in_channels=vision.num_channels,
        eps=vision.layer_norm_eps,
        layer_scale=True,
        patch_bias=True,
        class_rows=1,
        norm="rms" if vision.norm_type == "rms_norm" else "layer",
        activation=_activation(family, "hidden_act", vision.hidden_act),
        qkv_bias=vision.attention_bias,
        qk_norm=vision.use_qk_norm,
        final_norm=not vision.use_mean_pooling,
    )


def spec(config: Any) -> ImageTowerSpec:
    """The tower and projector of an `InternVLConfig` or a `QianfanOCRConfig`.

    Raises:
        ValueError: the config asks for what they do not have.
    """
    tower, ratio = tower_spec(config.vision_config), config.downsample_ratio
    side = round(1 / ratio) if ratio else 0
    if side < 1 or ratio * side != 1 or side**2 * tower.hidden_size > MAX_D:
        limit = f"1, 1/2, 1/4 and so on, with at most {MAX_D} values in a joined row"
        _refuse(tower.family, "downsample_ratio", ratio, limit)
    return replace(
        tower,
        out_size=config.text_config.hidden_size,
        merge_size=side,
        projector_activation=_activation(
            tower.family, "projector_hidden_act", config.projector_hidden_act
        ),
    )


def model_config(raw: Mapping[str, Any]) -> Any:
    """The config of a full model from its config.json, with the defaults of transformers.

    Raises:
        ValueError: another model type, a text model that transformers does not know, or a field
            that transformers refuses.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = ""
        if model_type == FIRST_FORMAT:
            hint = " in transformers' own format; use the repository that ends in -hf"
        raise ValueError(
            f"model type {model_type!r} is no InternVL{hint}; supported: {', '.join(MODEL_TYPES)}"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    text = (raw.get("text_config") or {}).get("model_type")
    if text is not None and text not in CONFIG_MAPPING:
        raise ValueError(
            f"model type {model_type!r}: the installed transformers does not know its text model "
            f"{text!r}; install a newer release"
        )
    fields = {k: v for k, v in copy.deepcopy(dict(raw)).items() if k != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except StrictDataclassError as error:  # no ValueError; several lines, the field among them
        reason = " ".join(str(error).split())
        raise ValueError(f"{model_type} config: {reason}; correct config.json") from error


def weight_map(s: ImageTowerSpec) -> list[Rule]:
    """Rules for every tensor of the tower and its projector."""
    D, F, P = s.hidden_size, s.mlp_size, s.patch_size
    stem = "vision_tower.embeddings"
    kernel = f"{stem}.patch_embeddings.projection"
    rules = [
        Rule("patch.weight", (f"{kernel}.weight",), (D, s.in_channels, P, P)),
        Rule("patch.bias", (f"{kernel}.bias",), (D,)),
        Rule("class_row", (f"{stem}.cls_token",), (1, 1, D)),
        Rule("position.table", (f"{stem}.position_embeddings",), (1, s.position_grid**2 + 1, D)),
    ]
    for i in range(s.depth):
        ours, theirs = f"blocks.{i}", f"vision_tower.{LAYERS[s.family]}.{i}"
        rules += norm(f"{ours}.norm1", f"{theirs}.layernorm_before", D, s.norm)
        shapes = {"weight": (D, D)} | ({"bias": (D,)} if s.qkv_bias else {})
        for part, shape in shapes.items():
            sources = tuple(f"{theirs}.attention.{x}_proj.{part}" for x in "qkv")
            rules.append(Rule(f"{ours}.qkv.{part}", sources, shape))
        if s.qk_norm:
            rules += norm(f"{ours}.q_norm", f"{theirs}.attention.q_norm", D, "rms")
            rules += norm(f"{ours}.k_norm", f"{theirs}.attention.k_norm", D, "rms")
        rules += linear(f"{ours}.proj", f"{theirs}.attention.projection_layer", D, D)
        rules.append(Rule(f"{ours}.scale1", (f"{theirs}.lambda_1",), (D,)))
        rules += norm(f"{ours}.norm2", f"{theirs}.layernorm_after", D, s.norm)
        rules += linear(f"{ours}.up", f"{theirs}.mlp.fc1", F, D)
        rules += linear(f"{ours}.down", f"{theirs}.mlp.fc2", D, F)
        rules.append(Rule(f"{ours}.scale2", (f"{theirs}.lambda_2",), (D,)))
    if s.final_norm:
        rules += norm("final_norm", "vision_tower.layernorm", D, "layer")
    if s.out_size:
        theirs, joined = "multi_modal_projector", s.merge_size**2 * D
        rules += norm("projector.norm", f"{theirs}.layer_norm", joined, "layer")
        rules += linear("projector.fc1", f"{theirs}.linear_1", s.out_size, joined)
        rules += linear("projector.fc2", f"{theirs}.linear_2", s.out_size, s.out_size)
    return rules


def tower_key(key: str) -> str | None:
    """The name of a checkpoint's tensor inside the model; None if it is not the tower's."""
    name = key.removeprefix("model.")
    return name if name.startswith(PREFIXES) else None


def to_hf_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by Hugging Face's names; q, k and v as three.

    Args:
        tensors: By the names that `tower_key` gives, in either style.

    Raises:
        ValueError: a fused weight that is not of q, k and v.
    """
    named = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        stem, fused, part = name.partition(".attention.qkv.")
        if not fused:
            named[name] = tensor
            continue
        if tensor.shape[0] % 3:
            raise ValueError(
                f"weights: tensor {key!r} has shape {list(tensor.shape)}, which are not q, k and "
                "v; the checkpoint does not match its config"
            )
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            named[f"{stem}.attention.{letter}_proj.{part}"] = rows
    return named


def _side(family: str, name: str, value: Any) -> int:
    """One side of a square that a config gives as a number or as two."""
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        _refuse(family, name, value, "squares")
    return sides[0]


def _activation(family: str, name: str, value: Any) -> Activation:
    if value not in ACTIVATIONS:
        _refuse(family, name, value, ", ".join(map(repr, ACTIVATIONS)))
    return ACTIVATIONS[value]


def _refuse(family: str, name: str, value: Any, supported: str) -> NoReturn:
    raise ValueError(
        f"{family} config: {name} = {value!r} is not supported; supported: {supported}"
    )
