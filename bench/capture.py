"""The capture manager on a whole tower, section by section; a failing one spares the others."""

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

from ..capture import EncoderCudaGraphManager
from . import capture_calls, capture_ladder, capture_refit
from .capture_session import Result, Session
from .ours_providers import encoder_of
from .report import table
from .timing import Effort
from .towers_config import build_tower, tower_config

DEFAULT_TOWER = "qwen3-vl-8b"
DEFAULT_LAYOUTS, QUICK_LAYOUTS = 60, 12

# What measures a section, and what prints it.
Section = tuple[Callable[[Session], Result], Callable[[Result], str]]
SECTIONS: Mapping[str, Section] = {
    "ladder": (capture_ladder.ladder, capture_ladder.ladder_text),
    "live_length": (capture_ladder.live_length, capture_ladder.live_length_text),
    "calibration": (capture_ladder.calibration, capture_ladder.calibration_text),
    "dispatch": (capture_calls.dispatch, capture_calls.dispatch_text),
    "ownership": (capture_calls.ownership, capture_calls.ownership_text),
    "overlap": (capture_calls.overlap, capture_calls.overlap_text),
    "refit": (capture_refit.refit, capture_refit.refit_text),
}
_FULL = Effort(rounds=9, min_rounds=5)
_QUICK = Effort(rounds=3, min_rounds=3)


def run(
    tower: str = DEFAULT_TOWER,
    sections: Sequence[str] = tuple(SECTIONS),
    *,
    attention: str | None = None,
    layouts: int | None = None,
    quick: bool = False,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: print(line, flush=True),
) -> tuple[list[Result], list[Result]]:
    """Measure `sections` on `tower` in bf16 on the current GPU.

    Args:
        tower: Name in `towers_config.TOWERS`.
        sections: Names in `SECTIONS`; they run in the order of that table.
        attention: Backend of the tower; None for its choice.
        layouts: Random layouts for dispatch; None for 60, or 12 if quick.
        quick: Fewer repetitions.
        seed: Of weights, pixels and layouts.
        log: Takes the table of each section when it is done.

    Returns:
        A row for each section, with its figures or an `error`; and the samples that calibration
        measured, as plain values.

    Raises:
        ValueError: an unknown tower or section, no layouts, or no CUDA device.
    """
    spec = tower_config(tower).spec
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ValueError(
            f"bench: section {unknown[0]!r} is not known; use some of {', '.join(SECTIONS)}"
        )
    if layouts is None:
        layouts = QUICK_LAYOUTS if quick else DEFAULT_LAYOUTS
    if layouts < 1:
        raise ValueError(f"bench: --layouts {layouts} must be at least 1")
    if not torch.cuda.is_available():
        raise ValueError(
            "bench: capture needs a CUDA device, and torch sees none; run it on a machine with a "
            "GPU (`packing` and `towers --device cpu` run without)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    module = build_tower(tower, device=device, dtype=torch.bfloat16, seed=seed)
    encoder = encoder_of(module, spec, attention=attention)
    manager = EncoderCudaGraphManager(encoder)
    session = Session(encoder, manager, _QUICK if quick else _FULL, layouts, seed, samples=[])
    try:
        rows = run_sections(
            session, {name: SECTIONS[name] for name in SECTIONS if name in sections}, log
        )
    finally:
        manager.clear()
    return rows, [sample.to_json() for sample in session.samples]


def run_sections(
    session: Session, sections: Mapping[str, Section], log: Callable[[str], None]
) -> list[Result]:
    """A row for each of `sections`; one that raises gets its error for figures."""
    rows = []
    for name, (measure, text) in sections.items():
        start = time.perf_counter()
        # a benchmark of many goes on when one fails, and its row carries the failure
        try:
            with torch.no_grad():
                found = measure(session)
            log(f"{text(found)}\n")
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            notes = getattr(error, "__notes__", [])
            found = {"error": "; ".join([f"{type(error).__name__}: {error}", *notes])}
            log(f"{name}: {found['error']}\n")
        rows.append({"section": name, "section_s": time.perf_counter() - start, **found})
    return rows


def verdicts(rows: Sequence[Result]) -> list[tuple[str, float, str, bool]]:
    """(figure, value, target, whether it is met) for every target that `rows` say something of."""
    by_name = {row["section"]: row for row in rows if "error" not in row}
    found = []
    if row := by_name.get("ladder"):
        left = row["bytes_left_by_clear"] / row["bytes"]
        found += [
            ("warm capture, s", row["warm_s"], "< 15", row["warm_s"] < 15),
            ("ladder / largest rung", row["ratio_to_largest"], "<= 1.25",
             row["ratio_to_largest"] <= 1.25),
            ("error of profile_memory()", row["profile_error"], "within 0.1",
             abs(row["profile_error"]) <= 0.1),
            ("left by clear() / ladder", left, "<= 0.01", left <= 0.01),
        ]  # fmt: skip
    if row := by_name.get("live_length"):
        largest = max(entry["token_budget"] for entry in row["rungs"])
        share = next(
            entry["time_share"]
            for entry in row["rungs"]
            if entry["token_budget"] == largest and entry["asked_share"] == 0.6
        )
        found.append((f"rung {largest}, 60 % live / full", share, "<= 0.72", share <= 0.72))
    if row := by_name.get("dispatch"):
        most = capture_calls.MOST_REGRET
        worst = row["worst_ratio"]
        found.append(("worst call / best single choice", worst, f"<= {most}", worst <= most))
    if row := by_name.get("overlap"):
        found.append(("one slot / two slots", row["speedup"], ">= 1", row["speedup"] >= 1))
    if row := by_name.get("refit"):
        right = row["same_on_kept_rungs"] and row["same_as_run_on"]
        found.append(("results right across a refit", float(right), "1", right))
    return found


def summary(rows: Sequence[Result]) -> str:
    """Every target with what was measured, and the sections that failed."""
    lines = [
        (name, f"{value:.3f}", target, "met" if met else "MISSED")
        for name, value, target, met in verdicts(rows)
    ]
    failed = [f"{row['section']} failed: {row['error']}" for row in rows if "error" in row]
    tables = [table(("target", "measured", "wanted", ""), lines)] if lines else []
    return "\n".join([*tables, *failed])
