"""The README's table, from a committed result: `python -m vitgraph.bench readme FILE`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# what a caller of Hugging Face can run on any layout, and the best that a graph per layout reaches
_EAGER = ("hf-eager-sdpa", "hf-eager-fa2")
_EXACT = ("hf-exact-graph", "hf-compile-graph")


def readme_table(path: str | Path) -> str:
    """Markdown of the results in `path`: times in ms, and ours against the fastest Hugging Face.

    Raises:
        ValueError: the file is no result of `bench towers`.
    """
    try:
        result = json.loads(Path(path).read_text())
        meta, rows = result["meta"], result["rows"]
        cells = _by_workload(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"readme: {path} is no result of `bench towers` ({error!r})") from error
    lines = [
        "| tower | workload | patches | HF eager | HF graph | ours | speed-up | floor | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (tower, workload), row in cells.items():
        eager, exact = _fastest(row, _EAGER), _fastest(row, _EXACT)
        ours = row["ours"]
        speedup = min(t for t in (eager, exact) if t is not None) / ours["ms"]
        lines.append(
            f"| {tower} | {workload} | {ours['patches']:,} | {_ms(eager)} | {_ms(exact)} | "
            f"{_ms(ours['ms'])} | {speedup:.2f} | {_ms(ours['floor_ms'])} | "
            f"{ours['max_err_ratio']:.2f} |"
        )
    lines += [
        "",
        f"{meta['gpu']}, torch {meta['torch']}, triton {meta['triton']}, transformers "
        f"{meta['transformers']}, {meta['dtype']}, commit {meta['commit']}, {meta['date'][:10]}: "
        f"`{meta['command']}`.",
    ]
    return "\n".join(lines)


def _by_workload(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        cells.setdefault((row["tower"], row["workload"]), {})[row["provider"]] = row
    return {key: by_name for key, by_name in cells.items() if by_name["ours"]["ms"] is not None}


def _fastest(by_name: Mapping[str, Any], names: Sequence[str]) -> float | None:
    times = [by_name[n]["ms"] for n in names if n in by_name and by_name[n]["ms"] is not None]
    return min(times, default=None)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
