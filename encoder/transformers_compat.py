"""What differs between the releases of transformers that we work with, read in one way."""

from typing import Any, Literal

import torch


def rope_theta(config: Any) -> float:
    """Base of a vision tower's axial rope, as the installed release computes it.

    `config.rope_parameters` holds it where the config's class knows axial ropes. Older towers
    (transformers 5.13) have 10,000 built in and do not look at that key.
    """
    if getattr(type(config), "default_rope_type", None) != "axial":
        return 10000.0
    return float((config.rope_parameters or {}).get("rope_theta", 10000.0))


def paddleocr_sampling(config: Any) -> Literal["bilinear_corners", "bilinear"]:
    """How PaddleOCR-VL's tower resamples its positions, as the installed release does it.

    By corners in transformers 5.17, by edges in 5.23; the class says which, where it lets one
    choose (not yet in 5.13, by corners).
    """
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionEmbeddings

    with torch.device("meta"):
        embeddings = PaddleOCRVisionEmbeddings(config)
    by_corners = getattr(embeddings, "interpolation_align_corners", True)
    return "bilinear_corners" if by_corners else "bilinear"


def selects_last_state(value: Any, num_states: int) -> bool:
    """Whether an `output_hidden_states` of transformers 5.23 asks for the last state alone.

    Indices may stand there beside a flag since then; models that read one state pass its index on.
    """
    chosen = value if isinstance(value, list | tuple) else [value]
    indices = [i for i in chosen if isinstance(i, int) and not isinstance(i, bool)]
    return bool(indices) and len(indices) == len(chosen) and {*indices} <= {-1, num_states - 1}


def image_features_select_states() -> bool:
    """Whether `get_image_features` asks its tower for the state it reads, as since 5.23."""
    from transformers.utils import output_capturing

    return hasattr(output_capturing, "select_hidden_states")
