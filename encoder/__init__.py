"""Vision towers of Hugging Face VLMs: loading, encoding, swapping."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..capture import EncoderCudaGraphConfig
    from .checkpoint import CheckpointError
    from .embedder import Embedder
    from .fp8 import Fp8Plan
    from .generic import GenericEncoder
    from .internvl_encoder import InternVLEncoder, InternVLOutput
    from .internvl_preprocess import InternVLPreprocessor
    from .load import load_encoder
    from .media import MediaError
    from .siglip2_encoder import Siglip2Encoder, Siglip2Output
    from .siglip2_preprocess import Siglip2Preprocessor
    from .spec import EncoderSpec
    from .step_encoder import StepEncoder, StepOutput
    from .step_preprocess import StepPreprocessor
    from .swap import SwappedTower, swap_vision_tower
    from .towers import encoder_for
    from .vision_encoder import VisionEncoder, VisionOutput

_HOMES = {
    "CheckpointError": ".checkpoint",
    "Embedder": ".embedder",
    "EncoderCudaGraphConfig": "..capture",
    "EncoderSpec": ".spec",
    "Fp8Plan": ".fp8",
    "GenericEncoder": ".generic",
    "InternVLEncoder": ".internvl_encoder",
    "InternVLOutput": ".internvl_encoder",
    "InternVLPreprocessor": ".internvl_preprocess",
    "MediaError": ".media",
    "Siglip2Encoder": ".siglip2_encoder",
    "Siglip2Output": ".siglip2_encoder",
    "Siglip2Preprocessor": ".siglip2_preprocess",
    "StepEncoder": ".step_encoder",
    "StepOutput": ".step_encoder",
    "StepPreprocessor": ".step_preprocess",
    "SwappedTower": ".swap",
    "VisionEncoder": ".vision_encoder",
    "VisionOutput": ".vision_encoder",
    "encoder_for": ".towers",
    "load_encoder": ".load",
    "swap_vision_tower": ".swap",
}

__all__ = [
    "CheckpointError",
    "Embedder",
    "EncoderCudaGraphConfig",
    "EncoderSpec",
    "Fp8Plan",
    "GenericEncoder",
    "InternVLEncoder",
    "InternVLOutput",
    "InternVLPreprocessor",
    "MediaError",
    "Siglip2Encoder",
    "Siglip2Output",
    "Siglip2Preprocessor",
    "StepEncoder",
    "StepOutput",
    "StepPreprocessor",
    "SwappedTower",
    "VisionEncoder",
    "VisionOutput",
    "encoder_for",
    "load_encoder",
    "swap_vision_tower",
]


def __getattr__(name: str) -> Any:
    # on first use: `vitgraph --help` must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
