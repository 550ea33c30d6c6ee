"""SVG plots of results: `python -m vitgraph.bench plot RESULT.json... -o FOLDER`.

From `scaling`: latency against tokens and against images, and against the live share of a rung,
each with its floor. From `kernels`: the roofline, achieved rate against arithmetic intensity under
the ceilings of the same run. The same result and matplotlib give the same bytes, so that plots can
be committed beside it. matplotlib comes with `pip install 'vitgraph[bench]'`.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_SALT = "vitgraph"
_COLORS = {  # the same provider in the same colour on every plot
    "hf-eager-sdpa": "tab:gray", "hf-eager-fa2": "tab:brown", "hf-exact-graph": "tab:olive",
    "hf-compile-graph": "tab:pink", "vllm-eager": "tab:purple", "vllm-graph": "tab:cyan",
    "ours-eager": "tab:orange", "ours-graph": "tab:green", "ours": "tab:blue",
    "ours-fp8": "tab:red",
}  # fmt: skip
_OURS_KERNELS = ("vitgraph", "triton", "hopper", "auto")
_MARKERS = "os^vDP*X<>hpd"


def write_plots(files: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Plot every file; the SVGs are called after it, `<stem>-<what>.svg`.

    Returns:
        The paths written, in `folder`.

    Raises:
        ValueError: matplotlib is missing, a file is no result that has a plot, or two files have
            one name.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            f"plot: matplotlib is missing ({error}); pip install 'vitgraph[bench]'"
        ) from error
    drawn: dict[str, str] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the style of whoever runs it
        matplotlib.rc("svg", hashsalt=_SALT, fonttype="none")
        matplotlib.rc("font", size=9.0)
        for file in files:
            for name, figure in _figures(Path(file)):
                if name in drawn:
                    raise ValueError(f"plot: two results would be {name}; rename {file}")
                drawn[name] = _svg(figure)
    written = [Path(folder) / name for name in drawn]
    for path, text in zip(written, drawn.values(), strict=True):
        write_text(path, text)
    return written


def _figures(path: Path) -> Iterator[tuple[str, "Figure"]]:
    try:
        result = json.loads(path.read_text())
        meta, rows = dict(result["meta"]), [dict(row) for row in result["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"plot: {path} is no result of `vitgraph bench` ({error!r})") from error
    if rows and all("axis" in row for row in rows):
        for tower in dict.fromkeys(row["tower"] for row in rows):
            for axis in dict.fromkeys(row["axis"] for row in rows):
                here = [r for r in rows if r["tower"] == tower and r["axis"] == axis]
                if here:
                    yield f"{path.stem}-{axis}-{tower}.svg", _latency(meta, here, tower, axis)
    elif rows and all("gbps" in row for row in rows):
        yield f"{path.stem}-roofline.svg", _roofline(meta, rows)
    else:
        raise ValueError(f"plot: {path} is no result of `scaling` or `kernels`, which have plots")


def _latency(meta: Row, rows: Sequence[Row], tower: str, axis: str) -> "Figure":
    """One line a provider, medians with their 20th to 80th percentile, over the floor."""
    figure, axes = _canvas()
    place, label = _ABSCISSAE[axis]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        timed = sorted(
            (r for r in rows if r["provider"] == provider and r["ms"] is not None), key=place
        )
        if not timed:
            continue
        x, color = [place(r) for r in timed], _COLORS[provider]
        axes.plot(x, [r["ms"] for r in timed], color=color, label=provider, linewidth=1.2)
        low, high = ([r[key] for r in timed] for key in ("ms_p20", "ms_p80"))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        # hollow where a call of ours replays nothing: no rung holds it
        faces = ["white" if r["replays"] == 0 else color for r in timed]
        axes.scatter(
            x, [r["ms"] for r in timed], s=16, c=faces, edgecolors=color, linewidths=1, zorder=3
        )
    floors = dict(sorted((place(r), r["floor_ms"]) for r in rows if r["floor_ms"] is not None))
    if floors:
        axes.plot(list(floors), list(floors.values()), "k--", label="floor", linewidth=1.2)
    if axis == "occupancy":
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 105)
    else:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({place(row) for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, ha="right")
        axes.minorticks_off()
    rung = rows[0]["rung_tokens"]
    of_rung = f", rung of {rung:,} tokens" if rung else ""
    _finish(axes, f"{tower}{of_rung}, {meta['dtype']}, {_where(meta)}", label, "ms a call")
    if missing := _without_time(rows):
        axes.text(0, 1.01, missing, transform=axes.transAxes, fontsize=6, va="bottom")
    return figure


def _without_time(rows: Sequence[Row]) -> str:
    """Which providers lack a time at how many points."""
    points = len({row["workload"] for row in rows})
    lacking: dict[str, int] = {}
    for row in rows:
        lacking[row["provider"]] = lacking.get(row["provider"], 0) + (row["ms"] is None)
    said = [f"{name} at {count} of {points}" for name, count in lacking.items() if count]
    return f"no time: {', '.join(said)}" if said else ""


_ABSCISSAE: dict[str, tuple[Callable[[Row], float], str]] = {
    "tokens": (lambda row: row["tokens"], "tokens of one image (hollow: launched eagerly)"),
    "images": (lambda row: row["images"], "images of 448 x 448 (hollow: launched eagerly)"),
    "occupancy": (lambda row: 100 * row["live_share"], "% of the rung's tokens that are live"),
}


def _roofline(meta: Row, rows: Sequence[Row]) -> "Figure":
    """TFLOP/s against FLOP a byte, a marker a case; ours in blue, the others in grey."""
    figure, axes = _canvas()
    timed = [row for row in rows if row["us"] is not None]
    intensities: list[float] = []
    labelled: set[str] = set()
    for number, case in enumerate(dict.fromkeys(row["case"] for row in timed)):
        for is_ours in (False, True):
            here = [
                row
                for row in timed
                if row["case"] == case and (row["provider"] in _OURS_KERNELS) == is_ours
            ]
            if not here:
                continue
            x = [1e3 * r["tflops"] / r["gbps"] for r in here]
            intensities += x
            axes.scatter(
                x,
                [r["tflops"] for r in here],
                s=18,
                marker=_MARKERS[number % len(_MARKERS)],
                color="tab:blue" if is_ours else "tab:gray",
                alpha=0.8,
                linewidths=0,
                label=None if case in labelled else case,
                zorder=3 if is_ours else 2,
            )
            labelled.add(case)
    ceilings = meta.get("ceilings")
    if ceilings and intensities:
        flops, bandwidth = ceilings["gemm_tflops"], ceilings["copy_gbps"]
        ridge = 1e3 * flops / bandwidth
        x = [min([*intensities, ridge / 2]), ridge, max([*intensities, 2 * ridge])]
        y = [min(flops, at * bandwidth / 1e3) for at in x]
        axes.plot(x, y, "k-", linewidth=1.2, label=f"{bandwidth:.0f} GB/s, {flops:.0f} TFLOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    missing = "" if ceilings else ", ceilings not measured"
    _finish(axes, f"ours blue, others grey, {_where(meta)}{missing}", "FLOP a byte", "TFLOP/s")
    return figure


def _canvas() -> tuple["Figure", "Axes"]:
    # no pyplot: it would look for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, pad=14)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", alpha=0.3, linewidth=0.5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.8)


def _where(meta: Row) -> str:
    """GPU and commit of a result."""
    commit = str(meta.get("commit"))[:7] + (" with changes" if meta.get("dirty") else "")
    return f"{meta.get('gpu') or 'CPU'}, commit {commit}"


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
