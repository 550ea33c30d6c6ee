"""What differs between the releases of transformers that we work with, read in one way."""

from typing import Any


def rope_theta(config: Any) -> float:
    """Base of a vision tower's axial rope, as the installed release computes it.

    `config.rope_parameters` holds it where the config's class knows axial ropes. Older towers
    (transformers 5.13) have 10,000 built in and do not look at that key.
    """
    if getattr(type(config), "default_rope_type", None) != "axial":
        return 10000.0
    return float((config.rope_parameters or {}).get("rope_theta", 10000.0))
