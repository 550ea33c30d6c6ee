"""Where measurements made on the user's own GPU are kept: one file for each GPU and versions.

The file lies in `$VITGRAPH_CACHE/tuning`, by default `~/.cache/vitgraph/tuning`, under a name made
of everything that the measurements depend on. Nothing here reads it more than it is asked to.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from . import cublaslt

# of the file; another one is not found, so older files are left alone
FORMAT = 4


def cache_folder() -> Path:
    """The user's folder of what this library has measured: `$VITGRAPH_CACHE` if it is set."""
    folder = os.environ.get("VITGRAPH_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "vitgraph"


def made_on(gpu: str) -> dict[str, Any]:
    """What a measurement on the GPU of that name depends on, as the file states it."""
    return {
        "format": FORMAT,
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cublaslt": cublaslt.version(),
    }


def tuning_path(gpu: str) -> Path:
    """The file of the GPU of that name under the present versions."""
    identity = json.dumps(made_on(gpu), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
    return cache_folder() / "tuning" / f"{name}-{digest}.json"


def read_tuning(gpu: str) -> dict[str, Any] | None:
    """What `write_tuning` kept for that GPU, None if there is no file.

    Raises:
        ValueError: the file is not JSON of this form, or says that it was made elsewhere.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(tuning_path(gpu).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of an object")
    if content.get("made_on") != made_on(gpu):
        raise ValueError(f"made_on is {content.get('made_on')}, not {made_on(gpu)}")
    return content


def write_tuning(gpu: str, content: Mapping[str, Any]) -> Path:
    """Keep `content` for that GPU, in place of an earlier file; whole or not at all."""
    path = tuning_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made_on": made_on(gpu), **content}, indent=1, allow_nan=False)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)
    return path
