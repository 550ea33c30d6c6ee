"""What every encoder asks before its work is recorded in CUDA graphs."""

from collections.abc import Iterable

import torch


def check_capturable(device: torch.device, attention: Iterable[str]) -> None:
    """Refuse an encoder on `device` with these attention backends.

    Raises:
        RuntimeError: it is not on a CUDA device.
        ValueError: a backend is "reference".
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"capture: CUDA graphs need a CUDA device, this tower is on {device}; load it or move "
            "it there, or call the encoder without capture"
        )
    if "reference" in attention:
        raise ValueError(
            "capture: attention = 'reference' reads offsets on the host, which a graph cannot; "
            "choose another backend (see `vitgraph info`) or call the encoder without capture"
        )
