"""Swapping the vision tower of a live Hugging Face model for the fused encoder."""

import torch

from .families import FAMILIES
from .fp8 import Fp8Plan
from .hf_tower import GraphChoice, SwappedTower, SwapStats

__all__ = ["SwapStats", "SwappedTower", "swap_vision_tower"]

MODELS = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


def swap_vision_tower(
    model: torch.nn.Module,
    *,
    graphs: GraphChoice = True,
    attention: str | None = None,
    precision: str | Fp8Plan = "native",
) -> SwappedTower:
    """Let the fused encoder compute the vision features of `model`, this instance only.

    The tower object stays in place and keeps its weights, names and attributes; the encoder shares
    most of their memory. On a CUDA device, graphs are captured before this returns.

    Args:
        model: A `Qwen2VL`, `Qwen2_5_VL`, `Qwen3VL` or `Qwen3VLMoe` `...ForConditionalGeneration`,
            its inner `...Model`, or any model that has one of their towers at `visual` or
            `model.visual`.
        graphs: True replays CUDA graphs with an automatic ladder of budgets, a configuration says
            which, False runs the same kernels without graphs. Without CUDA, nothing is captured.
        attention: Backend for whole-frame attention; None chooses.
        precision: "native", or "fp8" for most linear layers; see `VisionEncoder.from_pretrained`.

    Returns:
        The handle; `restore()` or leaving its `with` block undoes the swap.

    Raises:
        ValueError: no supported tower; one already swapped, adapted, quantised, or spread over
            devices (device_map); an invalid configuration; or a precision that cannot be had.
        TypeError: `graphs` is of another type.
    """
    tower = _find_tower(model)
    if any(isinstance(value, SwappedTower) for value in tower.__dict__.values()):
        raise ValueError(
            f"swap_vision_tower: the {type(tower).__name__} of this {type(model).__name__} is "
            "already swapped; call restore() on the handle of the first swap"
        )
    return SwappedTower(tower, graphs=graphs, attention=attention, precision=precision)


def _find_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The supported tower of a full or inner model.

    Raises:
        ValueError: there is none; the message lists what is supported.
    """
    supported = {family.tower_class for family in FAMILIES.values()}
    holders = (getattr(model, "model", None), model)
    towers = [t for t in (getattr(holder, "visual", None) for holder in holders) if t is not None]
    for tower in towers:
        if isinstance(tower, torch.nn.Module) and type(tower).__name__ in supported:
            return tower
    found = f"its vision tower is a {type(towers[0]).__name__}" if towers else "no vision tower"
    raise ValueError(
        f"swap_vision_tower: model is a {type(model).__name__}, {found}; supported: "
        f"{', '.join(MODELS)}, their inner models, and others with a tower of these classes at "
        f"'visual' or 'model.visual': {', '.join(sorted(supported))}"
    )
