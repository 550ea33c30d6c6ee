"""Swapping the vision tower of a live Hugging Face model for an encoder of ours."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .families import FAMILIES, WRAPPERS
from .fp8 import Fp8Plan
from .hf_tower import GraphChoice, SwappedTower, SwapStats
from .image_spec import RopeAxes
from .internvl import TOWER_CLASSES as INTERNVL
from .internvl_swap import SwappedInternVLTower, parent_of
from .kimi_vl import REMOTE_TOWER
from .siglip2 import TOWER_CLASS as SIGLIP2
from .siglip2_swap import SwappedSiglip2Tower
from .step_spec import TOWER_CLASS
from .step_swap import SwappedStepTower
from .towers import OWN_ENCODERS, Tier, takes_packed_patches

__all__ = ["SwapStats", "SwappedTower", "swap_vision_tower"]

# where transformers keeps vision towers
PATHS = tuple(
    prefix + name
    for name in ("visual", "vision_tower", "vision_model")
    for prefix in ("model.", "")
)


def swap_vision_tower(
    model: torch.nn.Module,
    *,
    graphs: GraphChoice = True,
    attention: str | None = None,
    precision: str | Fp8Plan = "native",
    tier: Tier = "auto",
    rope_axes: RopeAxes | None = None,
) -> SwappedTower:
    """Let an encoder of ours compute the vision features of `model`, this instance only.

    The tower object stays in place and keeps its weights, names and attributes; the encoder shares
    most of their memory. On a CUDA device, graphs are captured before this returns.

    Args:
        model: A full model of a supported family (`vitgraph info` lists them), its inner
            `...Model`, or any model that has one of their towers where they have it. The tower of
            InternVL may also come alone.
        graphs: True replays CUDA graphs with an automatic ladder of budgets, a configuration says
            which, False runs the same kernels without graphs. Without CUDA, nothing is captured.
        attention: Backend for whole-frame attention; None chooses.
        precision: "native", or "fp8" for most linear layers; see `VisionEncoder.from_pretrained`.
        tier: "auto" takes our kernels where there is such a family, else the tower's own modules
            with our attention and graphs; "fused" and "generic" insist on one of them.
        rope_axes: Of Step towers alone: "wh" (the default) as the released weights have it, "hw" as
            transformers before 5.23 computes it (`step_swap`).

    Returns:
        The handle; `restore()` or leaving its `with` block undoes the swap.

    Raises:
        ValueError: no supported tower; one already swapped, adapted, quantised, or spread over
            devices (device_map); an invalid configuration; or a precision that cannot be had.
        TypeError: `graphs` is of another type.
    """
    tower = _find_tower(model, tier)
    if any(isinstance(value, SwappedTower) for value in tower.__dict__.values()):
        raise ValueError(
            f"swap_vision_tower: the {type(tower).__name__} of this {type(model).__name__} is "
            "already swapped; call restore() on the handle of the first swap"
        )
    name = type(tower).__name__
    if name in OWN_ENCODERS and tier == "generic":
        raise ValueError(
            f"swap_vision_tower: a {name} runs with fused kernels; leave tier = {tier!r} out"
        )
    if name == TOWER_CLASS:
        return SwappedStepTower(
            tower, graphs=graphs, attention=attention, precision=precision,
            rope_axes=rope_axes or "wh",
        )  # fmt: skip
    if rope_axes is not None:
        raise ValueError(
            f"swap_vision_tower: rope_axes = {rope_axes!r} is for a {TOWER_CLASS}, this is a "
            f"{type(tower).__name__}; leave it out"
        )
    if name == SIGLIP2:
        return SwappedSiglip2Tower(tower, graphs=graphs, attention=attention, precision=precision)
    if name in INTERNVL:
        parent = parent_of(model, tower)
        return SwappedInternVLTower(
            tower, parent, graphs=graphs, attention=attention, precision=precision
        )
    return SwappedTower(tower, graphs=graphs, attention=attention, precision=precision, tier=tier)


def _find_tower(model: torch.nn.Module, tier: Tier) -> torch.nn.Module:
    """The tower of a full or inner model: of a fused family, else any, unless fused is asked for.

    Raises:
        ValueError: there is none; the message lists what is supported.
    """
    if type(model).__name__ in INTERNVL:
        return model
    found = None
    for family in FAMILIES.values():
        for tower in _at_paths(model, family.tower_paths):
            if type(tower).__name__ in family.tower_classes:
                return tower
            found = found or tower
    for tower in _at_paths(model, PATHS):
        if type(tower).__name__ in OWN_ENCODERS:
            return tower
        if tier != "fused" and takes_packed_patches(tower):
            return tower
        found = found or tower
    if type(found).__name__ == REMOTE_TOWER:
        raise ValueError(
            f"swap_vision_tower: model is a {type(model).__name__}, its vision tower a "
            f"{REMOTE_TOWER}, which transformers has no class for: it runs by code that came with "
            "its checkpoint. Load the tower with vitgraph.encoder.VisionEncoder.from_pretrained("
            "folder or Hub id), and hand [pooler_output.unflatten(1, (-1, hidden_size))], with the "
            "tower's hidden_size, to the projector of the model"
        )
    what = f"its vision tower is a {type(found).__name__}" if found else "no vision tower"
    live = [family for family in FAMILIES.values() if family.tower_classes]
    paths = dict.fromkeys(p for family in FAMILIES.values() for p in family.tower_paths)
    classes = sorted(name for family in FAMILIES.values() for name in family.tower_classes)
    raise ValueError(
        f"swap_vision_tower: model is a {type(model).__name__}, {what}; supported: models of "
        f"{', '.join(family.models for family in live)}, their inner models, and "
        f"others with a tower of these classes at {' or '.join(map(repr, paths))}: "
        f"{', '.join(classes)}; and any tower that takes packed patches and their grid_thw"
    )


def _at_paths(model: torch.nn.Module, paths: Iterable[str]) -> Iterator[torch.nn.Module]:
    """The modules at `paths` of a model, and of the model inside it (`WRAPPERS`)."""
    inner = (getattr(model, wrapper.attribute, None) for wrapper in WRAPPERS.values())
    for holder in (model, *inner):
        for path in paths:
            place: Any = holder
            for name in path.split("."):
                place = getattr(place, name, None)
            if isinstance(place, torch.nn.Module):
                yield place
