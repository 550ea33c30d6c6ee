"""The ladder itself: what it takes in seconds and bytes, and what replays cost by live length."""

import json
from collections.abc import Callable
from math import ceil
from statistics import median

import torch

from ..capture import CostSample, EncoderCudaGraphManager, RungLimits
from ..capture.calibration import cache_path
from ..capture.sample_layouts import equal_images
from .capture_session import Result, Session, free_bytes, timed
from .report import number, table

RUNG_CLASSES = (64, 256, 1024, 4096, 8192, 16384)  # tokens
LIVE_SHARES = (0.3, 0.6, 1.0)
# Of an image of 448 x 448 pixels where patches have 16; rungs with few slots get larger images.
_IMAGE_TOKENS = 196
_FEWEST_IMAGES = 10
_REPLAYED_TOKENS = 8192  # replays between two events, so that short ones can be told apart


def ladder(session: Session) -> Result:
    """Seconds and bytes of the whole ladder against those of its largest rung alone."""
    manager = session.manager
    manager.clear()
    cold_s, _ = timed(manager.capture)
    manager.clear()
    before = free_bytes()
    profile_s, profile = timed(manager.profile_memory)
    profile_left = before - free_bytes()
    largest = manager.rungs[-1].token_budget
    alone = session.new_manager({"token_budgets": [largest]})
    alone_s, _ = timed(alone.capture)
    alone_bytes = before - free_bytes()
    alone.clear()
    before = free_bytes()
    warm_s, _ = timed(manager.capture)
    whole = before - free_bytes()
    counted = manager.stats()["bytes"]
    manager.clear()
    left = before - free_bytes()
    again_s, _ = timed(manager.capture)
    return {
        "rungs": len(manager.rungs),
        "largest_tokens": largest,
        "cold_s": cold_s,
        "warm_s": median((warm_s, again_s)),
        "alone_s": alone_s,
        "bytes": whole,
        "bytes_in_stats": counted,
        "alone_bytes": alone_bytes,
        "ratio_to_largest": whole / alone_bytes,
        "profile_s": profile_s,
        "profile_bytes": profile.total_bytes,
        "profile_error": profile.total_bytes / whole - 1,
        "bytes_left_by_profile": profile_left,
        "bytes_left_by_clear": left,
    }


def ladder_text(result: Result) -> str:
    """One line a figure."""
    mib = 1 << 20
    lines = [
        ("rungs", result["rungs"]),
        ("capture, first in the process, s", number(result["cold_s"])),
        ("capture, after clear(), s", number(result["warm_s"])),
        ("largest rung alone, s", number(result["alone_s"])),
        ("ladder, MiB", f"{result['bytes'] / mib:.0f}"),
        ("ladder by stats(), MiB", f"{result['bytes_in_stats'] / mib:.0f}"),
        ("largest rung alone, MiB", f"{result['alone_bytes'] / mib:.0f}"),
        ("ladder / largest rung", f"{result['ratio_to_largest']:.3f}"),
        ("profile_memory(), MiB", f"{result['profile_bytes'] / mib:.0f}"),
        ("profile_memory(), s", number(result["profile_s"])),
        ("its error, %", f"{100 * result['profile_error']:+.1f}"),
        ("left by profile_memory(), MiB", f"{result['bytes_left_by_profile'] / mib:.1f}"),
        ("left by clear(), MiB", f"{result['bytes_left_by_clear'] / mib:.1f}"),
    ]
    return table(("ladder", ""), lines)


def live_length(session: Session) -> Result:
    """Replays of rungs that are 30, 60 and 100 % live with images of one size."""
    rungs = session.captured().rungs
    chosen = {
        next((rung for rung in rungs if rung.token_budget >= tokens), None)
        for tokens in RUNG_CLASSES
    }
    ascending = sorted(filter(None, chosen), key=lambda rung: rung.token_budget)
    return {"rungs": [row for rung in ascending for row in _live_rows(session, rung)]}


def live_images(session: Session, rung: RungLimits) -> list[tuple[int, int, int]]:
    """Equal images that fill `rung`: of about 196 tokens, but ten or more if it has the slots."""
    count = max(_FEWEST_IMAGES, ceil(rung.token_budget / _IMAGE_TOKENS))
    return equal_images(
        session.encoder, rung, rung.token_budget, min(count, rung.max_items, rung.token_budget)
    )


def _live_rows(session: Session, rung: RungLimits) -> list[Result]:
    full = live_images(session, rung)
    layouts = {share: full[: max(1, round(share * len(full)))] for share in LIVE_SHARES}
    recording = session.recording(rung)
    replays = max(1, _REPLAYED_TOKENS // rung.token_budget)
    times: dict[float, list[float]] = {share: [] for share in LIVE_SHARES}
    for _ in range(session.effort.rounds):
        for share, grid in layouts.items():
            session.run_on(rung, grid)  # stages the tables, and warms up
            times[share].append(event_ms(recording.replay, replays))
    full_ms = median(times[1.0])
    return [
        {
            "token_budget": rung.token_budget,
            "asked_share": share,
            "images": len(grid),
            "live_share": session.tokens(grid) / rung.token_budget,
            "padded_over_live": rung.token_budget / session.tokens(grid),
            "ms": median(times[share]),
            "time_share": median(times[share]) / full_ms,
        }
        for share, grid in layouts.items()
    ]


def event_ms(replay: Callable[[], None], replays: int) -> float:
    """Milliseconds of one of `replays` replays, between events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def live_length_text(result: Result) -> str:
    """One line a rung and live share."""
    rows = [
        (
            f"{row['token_budget']} at {row['asked_share']:.0%}", row["images"],
            f"{row['live_share']:.3f}", f"{row['padded_over_live']:.2f}", number(row["ms"], 4),
            f"{row['time_share']:.3f}",
        )
        for row in result["rungs"]
    ]  # fmt: skip
    return table(("live length", "images", "live", "padded/live", "ms", "of full"), rows)


def calibration(session: Session) -> Result:
    """Seconds to measure the costs, and to read them back; keeps the samples in the session."""
    manager = session.captured()
    measured_s, costs = timed(lambda: manager.calibrate(use_cache=False))
    cached_s, again = timed(manager.calibrate)
    content = json.loads(cache_path(session.encoder, manager.rungs).read_text())
    session.samples = [CostSample.from_json(row) for row in content["samples"]]
    errors = [
        abs(
            (
                costs.eager(sample.load)
                if sample.token_budget is None
                else costs.terms(_rung(manager, sample.token_budget)).of(sample.load)
            )
            / sample.us
            - 1
        )
        for sample in session.samples
    ]
    return {
        "seconds": measured_s,
        "cached_seconds": cached_s,
        "samples": len(session.samples),
        "fit_error_median": median(errors),
        "fit_error_worst": max(errors),
        "same_from_cache": again == costs,
        "eager_floor_us": costs.eager_curve.floor,
        "costs": costs.to_json(),
    }


def _rung(manager: EncoderCudaGraphManager, token_budget: int) -> RungLimits:
    return next(rung for rung in manager.rungs if rung.token_budget == token_budget)


def calibration_text(result: Result) -> str:
    """One line a figure."""
    lines = [
        ("measured, s", number(result["seconds"])),
        ("read from its file, s", number(result["cached_seconds"])),
        ("samples", result["samples"]),
        ("error of the fit, median %", f"{100 * result['fit_error_median']:.2f}"),
        ("error of the fit, worst %", f"{100 * result['fit_error_worst']:.2f}"),
        ("least time of an eager call, us", number(result["eager_floor_us"], 4)),
    ]
    return table(("calibration", ""), lines)
