"""Towers of images (whole ones and crops, tiles, padded batches) against Hugging Face's.

- `hf-eager-sdpa`: the model's own forward, on SDPA, as its users call it.
- `hf-exact-graph`: its modules, whatever they read on the host computed beforehand, as one CUDA
  graph of exactly this batch, replayed; no server could keep one for each.
- `ours-eager`: our encoder launch by launch.
- `ours`: the whole call of our captured encoder: staging, replays, joining.

A contender whose error against fp32 exceeds 1.3 times that of `hf-eager-sdpa` gets no time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.testing import rel_rms
from . import internvl_contest, siglip2_contest, step_contest
from .image_contest import ImageContest, Parts
from .internvl_contest import INTERNVL_TOWERS, InternVLContest
from .siglip2_contest import SIGLIP2_TOWERS, Siglip2Contest
from .step_config import STEP_TOWERS
from .step_contest import StepContest
from .timing import Effort, TimeBudget, Timing, record, time_calls

PROVIDERS = ("hf-eager-sdpa", "hf-exact-graph", "ours-eager", "ours")
MAX_ERROR = 1.3  # times that of the baseline


@dataclass(frozen=True)
class ImageTower:
    """How to build a contest (from device, dtype and seed), and its workloads by name."""

    build: Callable[[torch.device, torch.dtype, int], ImageContest]
    workloads: Mapping[str, Any]


def step_tower(name: str) -> ImageTower:
    """A Step tower of `STEP_TOWERS`."""
    spec = STEP_TOWERS[name]
    return ImageTower(lambda *where: StepContest(spec, *where), step_contest.WORKLOADS)


def siglip2_tower(name: str) -> ImageTower:
    """A tower of `SIGLIP2_TOWERS`."""
    sizes = SIGLIP2_TOWERS[name]
    return ImageTower(lambda *where: Siglip2Contest(sizes, *where), siglip2_contest.WORKLOADS)


def internvl_tower(name: str) -> ImageTower:
    """A tower of `INTERNVL_TOWERS`."""
    sizes = INTERNVL_TOWERS[name]
    return ImageTower(lambda *where: InternVLContest(*sizes, *where), internvl_contest.WORKLOADS)


TOWERS: dict[str, ImageTower] = {
    "step-3.7": step_tower("step-3.7"),
    **{name: siglip2_tower(name) for name in SIGLIP2_TOWERS},
    **{name: internvl_tower(name) for name in INTERNVL_TOWERS},
}


@torch.no_grad()
def run(
    towers: Mapping[str, ImageTower],
    workloads: Sequence[str] | None = None,
    providers: Sequence[str] = PROVIDERS,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    effort: Effort,
    seed: int = 0,
    time_budget: TimeBudget,
) -> list[dict[str, Any]]:
    """A row for each tower, workload (None: all of its own) and provider.

    A row has `ms` (median), `p20`, `p80`, `patches`, and `max_err_ratio`, the worst part's error
    over that of `hf-eager-sdpa`. A provider that is too inexact or cannot run has `ms` None and a
    `reason`. Without a GPU, `hf-exact-graph` is left out and `ours` is not captured.

    Raises:
        ValueError: an unknown provider, or a workload that none of the towers has.
    """
    if unknown := sorted(set(providers) - set(PROVIDERS)):
        raise ValueError(
            f"bench: provider {', '.join(unknown)} is not known; use {', '.join(PROVIDERS)}"
        )
    known = dict.fromkeys(name for tower in towers.values() for name in tower.workloads)
    if unknown := sorted(set(workloads or ()) - set(known)):
        raise ValueError(
            f"bench: workload {', '.join(unknown)} is not known; use {', '.join(known)}"
        )
    rows: list[dict[str, Any]] = []
    for tower, entry in towers.items():
        names = [n for n in entry.workloads if workloads is None or n in workloads]
        names = [n for n in names if time_budget.allows(f"{tower} {n}")]
        if not names:
            continue
        contest = entry.build(device, dtype, seed)
        try:
            for name in names:
                found = _workload(contest, entry.workloads[name], providers, effort)
                rows += [{"tower": tower, "workload": name} | row for row in found]
        finally:
            contest.encoder.release_graphs()
    return rows


def _workload(
    contest: ImageContest, workload: Any, providers: Sequence[str], effort: Effort
) -> list[dict[str, Any]]:
    """A row for each provider."""
    inputs = contest.inputs(workload)
    is_cuda = contest.encoder.device.type == "cuda"
    synchronize = torch.cuda.synchronize if is_cuda else _nothing
    exact, eager = contest.hf(inputs, exact=True), contest.hf(inputs)
    results: dict[str, Parts] = {}
    calls: dict[str, Callable[[], Any]] = {}
    timings: dict[str, Timing] = {}
    reasons: dict[str, str] = {}

    def ours() -> Any:
        return contest.ours(inputs)

    if "hf-eager-sdpa" in providers:
        calls["hf-eager-sdpa"], results["hf-eager-sdpa"] = lambda: contest.hf(inputs), eager
    if "hf-exact-graph" in providers and is_cuda:
        # kept: the graph reads what it holds
        without_host = contest.hf_without_host(inputs)
        graph, output = record(without_host)
        graph.replay()
        calls["hf-exact-graph"] = graph.replay
        results["hf-exact-graph"] = contest.recorded_parts(output, inputs)
    if "ours-eager" in providers:
        with _without_graphs(contest.encoder):
            results["ours-eager"] = contest.parts(ours(), inputs)
            timings |= time_calls({"ours-eager": ours}, synchronize, effort)
    if "ours" in providers:
        if is_cuda and contest.encoder.graphs is None:
            contest.encoder.capture()
        results["ours"] = contest.parts(ours(), inputs)
        calls["ours"] = ours
    ratios = {name: _error(parts, eager, exact) for name, parts in results.items()}
    for name, ratio in ratios.items():
        if ratio > MAX_ERROR:
            reasons[name] = f"error {ratio:.2f} times that of hf-eager-sdpa"
            calls.pop(name, None)
    timings |= time_calls(calls, synchronize, effort)
    rows = []
    for name, ratio in ratios.items():
        row = {"provider": name, "patches": contest.patches(inputs), "max_err_ratio": ratio}
        row |= {"floor_ms": None, "ms": None}
        if name in reasons:
            row["reason"] = reasons[name]
        else:
            timing = timings[name]
            row |= {"ms": timing.ms, "p20": timing.p20, "p80": timing.p80}
        rows.append(row)
    return rows


@contextmanager
def _without_graphs(encoder: Any) -> Iterator[None]:
    """Calls run launch by launch meanwhile; the graphs are there again afterwards."""
    graphs, encoder.graphs = encoder.graphs, None
    try:
        yield
    finally:
        encoder.graphs = graphs


def _error(parts: Parts, eager: Parts, exact: Parts) -> float:
    """The worst part's error over that of Hugging Face's own forward in the dtype."""
    return max(
        rel_rms(part, oracle) / rel_rms(base, oracle)
        for part, base, oracle in zip(parts, eager, exact, strict=True)
    )


def _nothing() -> None:
    """There is nothing to wait for on a CPU."""


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for the eye."""
    lines = [f"{'tower':16} {'workload':12} {'provider':16} {'ms':>9} {'error':>6}"]
    for row in rows:
        ms = f"{'-':>9}" if row["ms"] is None else f"{row['ms']:9.3f}"
        lines.append(
            f"{row['tower']:16} {row['workload']:12} {row['provider']:16} {ms} "
            f"{row['max_err_ratio']:6.2f}"
        )
    return "\n".join(lines)
