"""A refit in the background: how long calls take meanwhile, and whether results stay right."""

import time
from collections.abc import Mapping, Sequence
from statistics import quantiles

import torch

from ..capture import plan
from ..capture.sample_layouts import equal_images
from .capture_session import Result, Session
from .report import number, table
from .workloads import Grid

_REFIT_TIMEOUT_S = 120.0


def refit(session: Session) -> Result:
    """Latency of calls without and during a refit in the background, and what it left right."""
    with session.replaying() as manager:
        calls = [session.squares(count) for count in (1, 2, 4, 8)]
        old = manager.rungs
        histogram = refit_histogram([rung.token_budget for rung in old])
        kept = [rung for rung in old if rung.token_budget in histogram][-8:]
        checks = [
            (rung, equal_images(session.encoder, rung, rung.token_budget * 6 // 10, 4))
            for rung in kept
        ]
        before = [session.run_on(rung, grid) for rung, grid in checks if grid]

        def call(turn: int) -> float:
            grid = calls[turn % len(calls)]
            start = time.perf_counter()
            manager.execute(session.pixels(grid), grid)
            # not the device: while another thread captures, CUDA refuses to wait for all streams
            torch.cuda.current_stream().synchronize()
            return (time.perf_counter() - start) * 1e3

        turns = 4 * session.effort.rounds
        for turn in range(len(calls)):
            call(turn)
        without = [call(turn) for turn in range(turns)]
        start = time.perf_counter()
        future = manager.refit(histogram, max_rungs=len(histogram), background=True)
        during: list[float] = []
        while not future.done() or len(during) < len(calls):
            during.append(call(len(during)))
            if time.perf_counter() - start > _REFIT_TIMEOUT_S:
                raise RuntimeError(f"a refit was not done after {_REFIT_TIMEOUT_S:.0f} s")
        budgets = future.result()
        seconds = time.perf_counter() - start
        after = [session.run_on(rung, grid) for rung, grid in checks if grid]
        return {
            "rungs_before": len(old),
            "rungs_after": len(budgets),
            "new_rungs": len(set(budgets) - {rung.token_budget for rung in old}),
            "seconds": seconds,
            "without": latency(without),
            "during": latency(during),
            "same_on_kept_rungs": all(map(_same, before, after)),
            "kept_rungs_checked": len(before),
            "same_as_run_on": all(_execute_equals_run_on(session, grid) for grid in calls),
        }


def refit_histogram(budgets: Sequence[int]) -> dict[int, float]:
    """Traffic whose best ladder keeps a fourth of `budgets`, the largest one too, and adds some."""
    kept = list(budgets[::-4])
    new = {budget - 8 for budget in budgets[-2::-8]} - set(budgets)
    return dict.fromkeys(sorted({*kept, *(b for b in new if b > 0)}), 1.0)


def latency(ms: Sequence[float]) -> Result:
    """Percentiles of call times."""
    percentiles = quantiles(ms, n=100, method="inclusive") if len(ms) > 1 else [ms[0]] * 99
    return {
        "calls": len(ms),
        "p50_ms": percentiles[49],
        "p99_ms": percentiles[98],
        "max_ms": max(ms),
    }


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def _execute_equals_run_on(session: Session, grid: Sequence[Grid]) -> bool:
    """True if a call gives bit for bit what the rung that serves it gives."""
    manager = session.manager
    (batch,) = plan(session.encoder.item_specs(list(grid)), manager.rungs, manager.costs)
    return _same(manager.execute(session.pixels(grid), grid), session.run_on(batch.rung, grid))


def refit_text(result: Result) -> str:
    """Latencies, and what was checked."""
    rows = [
        (
            name, result[name]["calls"], number(result[name]["p50_ms"], 4),
            number(result[name]["p99_ms"], 4), number(result[name]["max_ms"], 4),
        )
        for name in ("without", "during")
    ]  # fmt: skip
    text = table(("refit", "calls", "p50 ms", "p99 ms", "max ms"), rows)
    return (
        f"{text}\n{result['rungs_before']} rungs to {result['rungs_after']}, "
        f"{result['new_rungs']} of them new, in {result['seconds']:.2f} s; kept rungs "
        f"{'unchanged' if result['same_on_kept_rungs'] else 'CHANGED'}, calls "
        f"{'equal' if result['same_as_run_on'] else 'DIFFER FROM'} their rung's replay"
    )
