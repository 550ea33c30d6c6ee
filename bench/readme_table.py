"""The README's tables, from committed results: `python -m vitgraph.bench readme FILE`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# of a tower that transformers does not have: those of one of plain PyTorch modules
_PLAIN = ("plain-eager-sdpa", "plain-exact-graph")
_PLAIN_NOTE = (
    "(plain): transformers does not have this tower. The columns of HF hold the times of one of "
    "plain PyTorch modules with the same weights, which speed-up and error are against too."
)
# what a caller of a peer can run on any layout, and the best that a graph per layout reaches
_EAGER = ("hf-eager-sdpa", "hf-eager-fa2", _PLAIN[0])
_EXACT = ("hf-exact-graph", "hf-compile-graph", _PLAIN[1])
_VLLM = ("vllm-eager", "vllm-graph")
_BACKENDS = {"fa4": "FlashAttention-4", "fa3": "FlashAttention-3", "fa2": "FlashAttention-2"}


def readme_table(path: str | Path) -> str:
    """Markdown of the results in `path`: times in ms, and ours against the fastest correct peer.

    A row where ours is not ahead names the peer that is faster; a contender without a time (it
    failed, or was wrong) has a dash. A tower whose peer is not Hugging Face's is marked, with a
    note below the table. Results with `ours-fp8` become a table of that against `ours`.

    Raises:
        ValueError: the file is no result of `bench towers`.
    """
    meta, rows = _read(path)
    try:
        return _table(meta, rows)
    except (KeyError, TypeError) as error:
        raise _no_result(path, error) from error


def readme_tables(path: str | Path, plain_path: str | Path) -> str:
    """`readme_table` of both files under headings: with a FlashAttention package, and without.

    Raises:
        ValueError: a file is no result of `bench towers`; `plain_path` was not measured with
            `--plain`, or `path` was; or `path` does not say which attention it used.
    """
    (meta, rows), (plain_meta, _) = _read(path), _read(plain_path)
    if not plain_meta.get("plain"):
        raise ValueError(f"readme: {plain_path} is not from `bench towers --plain`; measure it so")
    if meta.get("plain"):
        raise ValueError(
            f"readme: {path} is from `bench towers --plain`; pass it as --plain-file, and a result "
            "without that option first"
        )
    ours = [str(r["attention"]) for r in rows if r.get("provider") == "ours" and r.get("attention")]
    if not ours:
        raise ValueError(
            f"readme: {path} names no attention backend of `ours`, which the heading needs; "
            "measure it again"
        )
    names = " and ".join(_BACKENDS.get(name, f"our `{name}`") for name in sorted(set(ours)))
    return "\n".join([
        f"With {names}:", "", readme_table(path), "",
        "Plain install, without any package of FlashAttention:", "", readme_table(plain_path),
    ])  # fmt: skip


def _read(path: str | Path) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    try:
        result = json.loads(Path(path).read_text())
        meta, rows = result["meta"], result["rows"]
        return dict(meta), [dict(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_result(path, error) from error


def _no_result(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"readme: {path} is no result of `bench towers` ({error!r})")


def _table(meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        cells.setdefault((row["tower"], row["workload"]), {})[row["provider"]] = row
    if any("ours-fp8" in by_name for by_name in cells.values()):
        return "\n".join([*_fp8_lines(cells), "", *_origin(meta)])
    has_vllm = any(_fastest(by_name, _VLLM) for by_name in cells.values())
    has_floor = any(row["floor_ms"] is not None for row in rows)
    columns = ["HF eager", "HF graph", *(["vLLM"] if has_vllm else []), "ours"]
    columns += ["speed-up", *(["floor"] if has_floor else []), "error"]
    header = ["tower", "workload", "patches", *columns]
    lines = [_line(header), _line(["---", "---", *["---:"] * (len(header) - 2)])]
    for (tower, workload), by_name in cells.items():
        ours = by_name["ours"]
        groups = (_EAGER, _EXACT, _VLLM) if has_vllm else (_EAGER, _EXACT)
        ratio = ours["max_err_ratio"]
        mark = " (plain)" if _is_plain(by_name) else ""
        lines.append(
            _line([
                tower + mark, workload, f"{ours['patches']:,}",
                *(_ms(_fastest(by_name, group)) for group in groups), _ms(ours["ms"]),
                _speed_up(by_name), *([_ms(ours["floor_ms"])] if has_floor else []),
                "-" if ratio is None else f"{ratio:.2f}",
            ])
        )  # fmt: skip
    if any(map(_is_plain, cells.values())):
        lines += ["", _PLAIN_NOTE]
    return "\n".join([*lines, "", *_origin(meta)])


def _origin(meta: Mapping[str, Any]) -> list[str]:
    """What was measured on, when and how."""
    changes = " with changes" if meta["dirty"] else ""
    lines = [
        f"{meta['gpu']}, torch {meta['torch']}, triton {meta['triton']}, transformers "
        f"{meta['transformers']}, {meta['dtype']}, commit {meta['commit'][:12]}{changes}, "
        f"{meta['date'][:10]}: `{meta['command']}`.",
    ]
    if meta.get("not_run"):
        lines += ["", f"Not run, time was over: {', '.join(meta['not_run'])}."]
    return lines


def _fp8_lines(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    lines = [
        _line(["tower", "workload", "patches", "ours", "ours with fp8", "times faster"]),
        _line(["---", "---", *["---:"] * 4]),
    ]
    for (tower, workload), by_name in cells.items():
        native, fp8 = (by_name.get(name, {}).get("ms") for name in ("ours", "ours-fp8"))
        gain = "-" if native is None or fp8 is None else f"{native / fp8:.2f}"
        patches = f"{next(iter(by_name.values()))['patches']:,}"
        lines.append(_line([tower, workload, patches, _ms(native), _ms(fp8), gain]))
    return lines


def _is_plain(by_name: Mapping[str, Any]) -> bool:
    """Whether what ran beside ours is not Hugging Face's."""
    return any(name in by_name for name in _PLAIN)


def _speed_up(by_name: Mapping[str, Any]) -> str:
    """Fastest peer over ours; where that is not above 1, with the name of the peer."""
    peers = {
        name: row["ms"]
        for name, row in by_name.items()
        if not name.startswith("ours") and row["ms"] is not None
    }
    ours = by_name["ours"]["ms"]
    if ours is None:
        return "no time"
    if not peers:
        return "-"
    name = min(peers, key=lambda peer: peers[peer])
    ratio = peers[name] / ours
    return f"{ratio:.2f}" if ratio > 1 else f"{ratio:.2f}, behind {name}"


def _fastest(by_name: Mapping[str, Any], names: Sequence[str]) -> float | None:
    times = [by_name[n]["ms"] for n in names if n in by_name and by_name[n]["ms"] is not None]
    return min(times, default=None)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
