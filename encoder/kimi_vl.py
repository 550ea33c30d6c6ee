"""Kimi-VL's tower, the first MoonViT: that of Kimi-K2.5 for images alone.

transformers has no class for it, only code that comes with its checkpoints, which is never run: the
config is read as it stands in config.json. The tensors of those checkpoints have the names and the
layout that published checkpoints of Kimi-K2.5 have, and `state_dict()` gives them the names that
transformers has for that tower.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .kimi_k25 import tower_spec
from .spec import EncoderSpec

REMOTE_TOWER = "MoonVitPretrainedModel"  # the class in the code that comes with checkpoints


@dataclass(frozen=True)
class MoonViTConfig:
    """`vision_config` of a config.json; defaults are those of the code that comes with it.

    Attributes:
        patch_size: Pixels along a side of a patch.
        init_pos_emb_height, init_pos_emb_width: Sides of the table of positions.
        num_attention_heads, num_hidden_layers, hidden_size, intermediate_size: Of the blocks.
        merge_kernel_size: Patches of a token, below and beside each other.
    """

    model_type: ClassVar[str] = "moonvit"

    patch_size: int = 14
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    merge_kernel_size: tuple[int, ...] = (2, 2)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_pair = field.name == "merge_kernel_size"
            numbers = value if is_pair and isinstance(value, list | tuple) else [value]
            if len(numbers) != 1 + is_pair or not all(_is_size(n) for n in numbers):
                what = "two positive integers" if is_pair else "a positive integer"
                raise ValueError(
                    f"{self.model_type}: {field.name} = {value!r} must be {what}; correct "
                    "vision_config in config.json"
                )


def vision_config(raw: Mapping[str, Any]) -> MoonViTConfig:
    """The tower's config in the config.json of a Kimi-VL.

    Raises:
        ValueError: it is no object, that of another tower, or a size is no positive integer.
    """
    given = raw.get("vision_config", {})
    if not isinstance(given, Mapping):
        raise ValueError(
            f"model type {raw.get('model_type')!r}: vision_config = {given!r} must be an object; "
            "correct config.json, or leave it out for the sizes of the released towers"
        )
    kind = given.get("model_type", MoonViTConfig.model_type)
    if kind != MoonViTConfig.model_type:
        raise ValueError(
            f"model type {raw.get('model_type')!r} has a vision tower of type {kind!r} here; only "
            f"{MoonViTConfig.model_type!r} is supported"
        )
    names = [field.name for field in fields(MoonViTConfig)]
    return MoonViTConfig(**{name: given[name] for name in names if name in given})


def spec(config: MoonViTConfig) -> EncoderSpec:
    """The tower that a config describes.

    Raises:
        ValueError: what `kimi_k25.tower_spec` refuses.
    """
    return tower_spec(config, "init_pos_emb", images_only=True)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
