"""Calls on a captured ladder: dispatch against every single choice, ownership, overlap."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from statistics import mean, median

import torch

from ..capture import EncoderCudaGraphManager, plan
from ..capture.captured import ONLY_VARIANT
from .capture_session import Result, Session, holding, random_layouts
from .report import number, table
from .timing import Effort, summarise, time_calls
from .workloads import Grid

MOST_REGRET = 1.03
_NEXT_RUNGS = 3  # the smallest that holds a call, and the next two
# A turn of a contender: calls that do not count for so long, and then calls that do.
_SETTLE_S, _COUNT_S = 0.1, 0.05
_LEAST_COUNTED = 2
_OVERLAPPED_CALLS = 50


def dispatch(session: Session) -> Result:
    """Wall time of `execute` over that of the best single choice, on random layouts.

    A single choice is the same call with its plan given: checks, staging, results that the caller
    owns. Only what is counted in `stats()` is left out.
    """
    manager, encoder = session.calibrated(), session.encoder
    largest = manager.rungs[-1].token_budget
    layouts = random_layouts(
        session.layouts, session.seed, merge=encoder.spec.merge_size, largest=largest
    )
    contests: list[dict[str, Callable[[], object]]] = []
    for grid in layouts:
        choices: dict[str, Callable[[], object]] = {
            "execute": lambda g=grid: manager.execute(session.pixels(g), g),
            "eager": lambda g=grid: session.run_on(None, g),
        }
        for rung in holding(manager, encoder.item_specs(grid))[:_NEXT_RUNGS]:
            choices[str(rung.token_budget)] = lambda r=rung, g=grid: session.run_on(r, g)
        contests.append(choices)
    ways = [_way(manager, choices["execute"]) for choices in contests]
    measured = settled_ms(contests, session.effort.min_rounds, session.seed)
    rows = []
    for grid, way, times in zip(layouts, ways, measured, strict=True):
        execute = times.pop("execute")
        best = min(times, key=times.__getitem__)
        rows.append({
            "items": len(grid),
            "tokens": session.tokens(grid),
            "way": way,
            "best": best,
            "execute_ms": execute,
            "ratio": execute / times[best],
            "single_ms": times,
        })  # fmt: skip
    return {"layouts": rows, **regret(rows)}


def settled_ms(
    contests: Sequence[Mapping[str, Callable[[], object]]], turns: int, seed: int
) -> list[dict[str, float]]:
    """Ms of whole calls, each among calls of its own kind; for each contest by name.

    The least of the medians of each turn. Other processes slow the host, and with it short calls,
    for seconds: one turn of every contest comes before the next of any. Near its limit of power a
    GPU runs a call up to some per cent faster or slower by what ran in the tenths of a second
    before: where contenders alternate, the one after a light contender wins. So a turn is many
    calls, and contenders come in random order.
    """
    rng = random.Random(seed)
    times = [dict.fromkeys(calls, inf) for calls in contests]
    for _ in range(turns):
        for calls, least in zip(contests, times, strict=True):
            for name in rng.sample(list(calls), len(calls)):
                _run_for(calls[name], _SETTLE_S, 1)
                taken = median(_run_for(calls[name], _COUNT_S, _LEAST_COUNTED))
                least[name] = min(least[name], taken)
    return times


def _run_for(call: Callable[[], object], seconds: float, least: int) -> list[float]:
    """Ms of each of as many calls as fit into `seconds`, and of at least so many."""
    taken: list[float] = []
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def regret(rows: Sequence[Result]) -> Result:
    """Worst and mean ratio to the best single choice, and how calls were served."""
    ratios = [row["ratio"] for row in rows]
    return {
        "worst_ratio": max(ratios),
        "mean_ratio": mean(ratios),
        "median_ratio": median(ratios),
        "over_limit": sum(ratio > MOST_REGRET for ratio in ratios),
        "ways": dict(Counter(row["way"] for row in rows)),
    }


def _way(manager: EncoderCudaGraphManager, call: Callable[[], object]) -> str:
    """How `call` is served: "replay", "eager" or "split"."""
    before = manager.stats()
    call()
    after = manager.stats()
    replays, misses = (after[key] - before[key] for key in ("replays", "misses"))
    if replays == 0:
        return "eager"
    return "replay" if replays == 1 and misses == 0 else "split"


def dispatch_text(result: Result) -> str:
    """The five worst layouts, and the summary."""
    rows = [
        (
            f"{row['tokens']} tokens", row["items"], row["way"], row["best"],
            number(row["execute_ms"], 4), f"{row['ratio']:.3f}",
        )
        for row in sorted(result["layouts"], key=lambda row: -row["ratio"])[:5]
    ]  # fmt: skip
    header = ("dispatch, worst", "items", "way", "best", "ms", "of best")
    ways = ", ".join(f"{way} {count}" for way, count in sorted(result["ways"].items()))
    return (
        f"{table(header, rows)}\n{len(result['layouts'])} layouts: worst "
        f"{result['worst_ratio']:.3f}, mean {result['mean_ratio']:.3f}, median "
        f"{result['median_ratio']:.3f}, above {MOST_REGRET}: {result['over_limit']} ({ways})"
    )


def ownership(session: Session) -> Result:
    """Whole calls by who owns the results, over the replay alone; pixels are on the GPU."""
    rows = []
    with session.replaying() as manager:
        for count in (1, 8):
            grid = session.squares(count)
            pixels = session.pixels(grid)
            replays = _replays(session, grid)
            out = manager.execute(pixels, grid)

            def lease(pixels: torch.Tensor = pixels, grid: Sequence[Grid] = grid) -> None:
                manager.lease(pixels, grid).release()

            # all there is of a tower without a merger
            pooled = "pooler_output" if "pooler_output" in out else "last_hidden_state"
            ways: dict[str, Callable[[], object]] = {
                "replay": replays,
                "execute": lambda p=pixels, g=grid: manager.execute(p, g),
                "out=": lambda p=pixels, g=grid, o=out: manager.execute(p, g, out=o),
                pooled: lambda p=pixels, g=grid, n=pooled: manager.execute(p, g, names=(n,)),
                "lease": lease,
            }
            walls, hosts = _wall_and_host(ways, 5 * session.effort.rounds)
            rows += [
                {
                    "images": count,
                    "way": way,
                    "ms": walls[way],
                    "over_replay_ms": walls[way] - walls["replay"],
                    "host_ms": hosts[way],
                }
                for way in ways
            ]
    return {"calls": rows}


def _replays(session: Session, grid: Sequence[Grid]) -> Callable[[], None]:
    """The replays of a call and nothing else."""
    manager = session.manager
    items = session.encoder.item_specs(list(grid))
    batches = plan(items, manager.rungs, manager.costs)
    recordings = [session.recording(b.rung) for b in batches if b.rung]

    def replay() -> None:
        for recording in recordings:
            recording.replay()

    return replay


def _wall_and_host(
    ways: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median ms until the device is done, and until the call returns; contenders take turns."""
    walls: dict[str, list[float]] = {way: [] for way in ways}
    hosts: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 2):
        for way, call in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            returned = time.perf_counter()
            torch.cuda.synchronize()
            if turn >= 2:
                walls[way].append((time.perf_counter() - start) * 1e3)
                hosts[way].append((returned - start) * 1e3)
    return (
        {way: summarise(times).ms for way, times in walls.items()},
        {way: summarise(times).ms for way, times in hosts.items()},
    )


def ownership_text(result: Result) -> str:
    """One line a way and call."""
    rows = [
        (
            f"{row['images']} x 448^2 {row['way']}", number(row["ms"], 4),
            f"{row['over_replay_ms']:.3f}", f"{row['host_ms']:.3f}",
        )
        for row in result["calls"]
    ]  # fmt: skip
    return table(("ownership", "ms", "over replay", "host ms"), rows)


def overlap(session: Session) -> Result:
    """Calls from pinned fp32 pixels in a row, leased, with one slot and with two."""
    grid = session.squares(8)
    pixels = session.pixels(grid).float().cpu().pin_memory()
    tokens = session.tokens(grid)
    managers = {
        slots: session.new_manager({"token_budgets": [tokens], "num_slots": slots})
        for slots in (1, 2)
    }
    try:
        for manager in managers.values():
            manager.capture()

        def leases(manager: EncoderCudaGraphManager) -> None:
            for _ in range(_OVERLAPPED_CALLS):
                manager.lease(pixels, grid).release()

        ladder = managers[1].ladder
        assert ladder is not None
        recording = ladder.rungs[ladder.limits[0]].graphs[0].recordings[ONLY_VARIANT]

        def replays() -> None:
            for _ in range(_OVERLAPPED_CALLS):
                recording.replay()

        calls: dict[str, Callable[[], object]] = {
            "one_slot": lambda: leases(managers[1]),
            "two_slots": lambda: leases(managers[2]),
            "replays_only": replays,
        }
        effort = Effort(warmup_s=0.0, rounds=session.effort.min_rounds, min_rounds=3)
        times = time_calls(calls, torch.cuda.synchronize, effort)
    finally:
        for manager in managers.values():
            manager.clear()
    per_call = {name: timing.ms / _OVERLAPPED_CALLS for name, timing in times.items()}
    return {
        "calls": _OVERLAPPED_CALLS,
        "pixel_bytes": pixels.nbytes,
        "ms_per_call": per_call,
        "speedup": per_call["one_slot"] / per_call["two_slots"],
    }


def overlap_text(result: Result) -> str:
    """One line a number of slots."""
    rows = [
        (name.replace("_", " "), number(ms, 4), number(1e3 / ms, 4))
        for name, ms in result["ms_per_call"].items()
    ]
    text = table(("overlap, 8 x 448^2", "ms a call", "calls/s"), rows)
    return f"{text}\none slot over two: {result['speedup']:.3f}"
