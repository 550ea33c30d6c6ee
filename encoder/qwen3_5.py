"""Qwen3.5, Qwen3.5-MoE, Qwen3.6 and Qwen4-Exp: the tower of Qwen3-VL without deepstack."""

from typing import Any

from .qwen3_vl import tower_spec
from .spec import EncoderSpec


def spec(config: Any) -> EncoderSpec:
    """The tower that a `Qwen3_5VisionConfig`, or that of a sibling, describes.

    Released configs still list deepstack layers, an empty list; the tower has no such mergers.

    Raises:
        ValueError: the config asks for what `qwen3_vl.tower_spec` refuses.
    """
    return tower_spec(config, deepstack_layers=())
