"""What a benchmark writes: the conditions it ran under, JSON, and a table for the eye."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .provenance import Sources, sources

_GPU_QUERY = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def conditions(
    command: Sequence[str] | None = None, made_of: Sources | None = None
) -> dict[str, Any]:
    """GPU, driver, clocks, versions, sources, date and command line of this run.

    Args:
        command: Words of the command line; None for those of this process.
        made_of: What was measured; None for the sources as they are now, which differ from those
            that ran if somebody edited them in between.

    Raises:
        ValueError: VITGRAPH_COMMIT names no commit.
    """
    gpu = _query_gpu()
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": gpu.pop("driver", None),
        "clocks": gpu or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
        "flash_attn_4": _version("flash-attn-4"),
        "vitgraph": _version("vitgraph"),
        **asdict(made_of or sources()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv if command is None else command),
    }


def write_json(
    path: str | Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write {"meta": ..., "rows": [...]}, never half a file; NaN becomes null."""
    write_content(path, {"meta": meta, "rows": rows})


def write_content(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, never half a file; NaN becomes null."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, never half a file; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, the first one aligned left and the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant figures; a dash for none."""
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _query_gpu() -> dict[str, str]:
    """Readings of the current GPU; empty where there is no nvidia-smi to ask."""
    if not torch.cuda.is_available():
        return {}
    # by uuid: CUDA_VISIBLE_DEVICES renumbers the devices of this process, not those of nvidia-smi
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    answer = _run(
        "nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_GPU_QUERY.values())}",
        "--format=csv,noheader,nounits",
    )  # fmt: skip
    if answer is None:
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return dict(zip(_GPU_QUERY, values, strict=True))


def _run(*command: str) -> str | None:
    """Standard output of `command`; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout is not None else None
