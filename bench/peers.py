"""Which peers can run on this machine, and what the others lack."""

import importlib
import importlib.util

import torch

from ..kernels.attention import backend_report
from .contest import PEERS


def installed_peers(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Names of the peers that can run on `device`, and why each of the others cannot.

    What depends on the tower, such as a family that a peer lacks, is said in its rows.
    """
    reasons = {name: reason for name in PEERS if (reason := _missing(name, device)) is not None}
    return [name for name in PEERS if name not in reasons], reasons


def _missing(name: str, device: torch.device) -> str | None:
    """What `name` lacks here; None if nothing."""
    if name == "hf-eager-sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if name.startswith("hf-"):  # all of them attend with the FlashAttention-2 inside torch
        return backend_report(device)["torch"]
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        importlib.import_module("vllm")
    except Exception as error:  # whatever its import meets: a library of another version, say
        return f"vllm does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None
