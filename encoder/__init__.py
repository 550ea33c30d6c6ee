"""Vision towers of Hugging Face VLMs: loading, encoding, swapping."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..capture import EncoderCudaGraphConfig
    from .checkpoint import CheckpointError
    from .embedder import Embedder
    from .fp8 import Fp8Plan
    from .media import MediaError
    from .spec import EncoderSpec
    from .swap import SwappedTower, swap_vision_tower
    from .vision_encoder import VisionEncoder, VisionOutput

_HOMES = {
    "CheckpointError": ".checkpoint",
    "Embedder": ".embedder",
    "EncoderCudaGraphConfig": "..capture",
    "EncoderSpec": ".spec",
    "Fp8Plan": ".fp8",
    "MediaError": ".media",
    "SwappedTower": ".swap",
    "VisionEncoder": ".vision_encoder",
    "VisionOutput": ".vision_encoder",
    "swap_vision_tower": ".swap",
}

__all__ = [
    "CheckpointError",
    "Embedder",
    "EncoderCudaGraphConfig",
    "EncoderSpec",
    "Fp8Plan",
    "MediaError",
    "SwappedTower",
    "VisionEncoder",
    "VisionOutput",
    "swap_vision_tower",
]


def __getattr__(name: str) -> Any:
    # on first use: `vitgraph --help` must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
