"""Towers of images (whole ones and crops, tiles, padded batches) beside a peer's.

The peer is Hugging Face's tower, or, for Step3, which transformers does not have, one of plain
PyTorch modules:

- `hf-eager-sdpa`: the model's own forward, on SDPA, as its users call it.
- `hf-exact-graph`: its modules, whatever they read on the host computed beforehand, as one CUDA
  graph of exactly this batch, replayed; no server could keep one for each.
- `plain-eager-sdpa`, `plain-exact-graph`: the same two of the plain tower.
- `ours-eager`: our encoder launch by launch.
- `ours`: the whole call of our captured encoder: staging, replays, joining.

A contender whose error against the peer in fp32 exceeds 1.3 times that of its forward in the dtype,
whose result is not finite, or that fails, gets no time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..kernels.testing import error_ratio
from . import internvl_contest, siglip2_contest, step_contest
from .image_contest import ImageContest, Parts
from .internvl_contest import INTERNVL_TOWERS, InternVLContest
from .oracle import without_tf32
from .siglip2_contest import SIGLIP2_TOWERS, Siglip2Contest
from .step_config import STEP_TOWERS
from .step_contest import Step3Contest, StepContest
from .timing import Effort, TimeBudget, Timing, record, time_calls

PROVIDERS = (
    "hf-eager-sdpa", "hf-exact-graph", "plain-eager-sdpa", "plain-exact-graph", "ours-eager", "ours"
)  # fmt: skip
MAX_ERROR = 1.3  # times that of the baseline


@dataclass(frozen=True)
class ContestedTower:
    """What is contested.

    Attributes:
        build: The contest from device, dtype and seed.
        workloads: By name.
        peer: Whose tower is beside ours: "hf" for Hugging Face's, "plain" for one of plain PyTorch
            modules where Hugging Face has none.
    """

    build: Callable[[torch.device, torch.dtype, int], ImageContest]
    workloads: Mapping[str, Any]
    peer: Literal["hf", "plain"] = "hf"

    def providers(self) -> tuple[str, ...]:
        """Those of `PROVIDERS` that it has: its peer's and ours."""
        return tuple(p for p in PROVIDERS if p.startswith((f"{self.peer}-", "ours")))


def step_tower(name: str) -> ContestedTower:
    """A Step tower of `STEP_TOWERS`."""
    spec = STEP_TOWERS[name]
    if spec.family == "step3_vl":
        return ContestedTower(
            lambda *where: Step3Contest(spec, *where), step_contest.STEP3_WORKLOADS, "plain"
        )
    return ContestedTower(lambda *where: StepContest(spec, *where), step_contest.WORKLOADS)


def siglip2_tower(name: str) -> ContestedTower:
    """A tower of `SIGLIP2_TOWERS`."""
    sizes = SIGLIP2_TOWERS[name]
    return ContestedTower(lambda *where: Siglip2Contest(sizes, *where), siglip2_contest.WORKLOADS)


def internvl_tower(name: str) -> ContestedTower:
    """A tower of `INTERNVL_TOWERS`."""
    sizes = INTERNVL_TOWERS[name]
    return ContestedTower(
        lambda *where: InternVLContest(*sizes, *where), internvl_contest.workloads(name)
    )


TOWERS: dict[str, ContestedTower] = {
    **{name: step_tower(name) for name in STEP_TOWERS},
    **{name: siglip2_tower(name) for name in SIGLIP2_TOWERS},
    **{name: internvl_tower(name) for name in INTERNVL_TOWERS},
}


@torch.no_grad()
def run(
    towers: Mapping[str, ContestedTower],
    workloads: Sequence[str] | None = None,
    providers: Sequence[str] = PROVIDERS,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    effort: Effort,
    seed: int = 0,
    time_budget: TimeBudget,
) -> list[dict[str, Any]]:
    """A row for each tower, workload (None: all of its own) and provider, ours or its peer's.

    A row has `ms` (median), `p20`, `p80`, `patches`, and `max_err_ratio`, the worst part's error
    over that of the peer's forward in the dtype. A provider that is too inexact or cannot run has
    `ms` None and a `reason`. Without a GPU, a peer's graph is left out and `ours` is not captured.

    Raises:
        ValueError: an unknown provider, or none that a tower has; a workload that none of the
            towers has; or fp32, against which errors are measured.
    """
    if dtype == torch.float32:
        raise ValueError(
            "bench: --dtype float32 is what errors are measured against; use bfloat16 or float16"
        )
    if unknown := sorted(set(providers) - set(PROVIDERS)):
        raise ValueError(
            f"bench: provider {', '.join(unknown)} is not known; use {', '.join(PROVIDERS)}"
        )
    for name, entry in towers.items():
        if not set(providers) & set(entry.providers()):
            raise ValueError(
                f"bench: {name} has no {', '.join(providers)}; leave it out, or add one of "
                f"{', '.join(entry.providers())}"
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
                found = _workload(contest, entry.workloads[name], entry.peer, providers, effort)
                rows += [{"tower": tower, "workload": name} | row for row in found]
        finally:
            contest.encoder.release_graphs()
    return rows


def _workload(
    contest: ImageContest, workload: Any, peer: str, providers: Sequence[str], effort: Effort
) -> list[dict[str, Any]]:
    """A row for each provider."""
    inputs = contest.inputs(workload)
    is_cuda = contest.encoder.device.type == "cuda"
    synchronize = torch.cuda.synchronize if is_cuda else _nothing
    with without_tf32():
        exact = contest.theirs(inputs, exact=True)
    eager = contest.theirs(inputs)
    timings: dict[str, Timing] = {}
    kept: list[Any] = []  # what recorded graphs read

    def ours() -> Any:
        return contest.ours(inputs)

    def peer_eager() -> tuple[Parts, Callable[[], Any]]:
        return eager, lambda: contest.theirs(inputs)

    def peer_graph() -> tuple[Parts, Callable[[], Any]]:
        kept.append(contest.theirs_without_host(inputs))
        graph, output = record(kept[-1])
        graph.replay()
        return contest.recorded_parts(output, inputs), graph.replay

    def ours_eager() -> tuple[Parts, None]:
        with _without_graphs(contest.encoder):
            parts = contest.parts(ours(), inputs)
            timings.update(time_calls({"ours-eager": ours}, synchronize, effort))
        return parts, None

    def ours_captured() -> tuple[Parts, Callable[[], Any]]:
        if is_cuda and contest.encoder.graphs is None:
            contest.encoder.capture()
        return contest.parts(ours(), inputs), ours

    baseline = f"{peer}-eager-sdpa"
    ways = {baseline: peer_eager, f"{peer}-exact-graph": peer_graph}
    ways |= {"ours-eager": ours_eager, "ours": ours_captured}
    if not is_cuda:
        del ways[f"{peer}-exact-graph"]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, way in ways.items():
        if name not in providers:
            continue
        row = rows[name] = {"provider": name, "patches": contest.patches(inputs)}
        row |= {"floor_ms": None, "ms": None, "max_err_ratio": None}
        try:
            parts, call = way()
            row["max_err_ratio"] = ratio = _error(parts, eager, exact)
        except Exception as error:  # the others go on
            row["reason"] = f"{type(error).__name__}: {error}"
            continue
        if not ratio <= MAX_ERROR:
            row["reason"] = f"error {ratio:.2f} times that of {baseline}"
        elif call is not None:
            calls[name] = call
    timings |= time_calls(calls, synchronize, effort)
    for name, row in rows.items():
        if "reason" not in row:
            timing = timings[name]
            row |= {"ms": timing.ms, "p20": timing.p20, "p80": timing.p80}
    return list(rows.values())


@contextmanager
def _without_graphs(encoder: Any) -> Iterator[None]:
    """Calls run launch by launch meanwhile; the graphs are there again afterwards."""
    graphs, encoder.graphs = encoder.graphs, None
    try:
        yield
    finally:
        encoder.graphs = graphs


def _error(parts: Parts, eager: Parts, exact: Parts) -> float:
    """The worst part's error over that of the peer's own forward in the dtype."""
    ratios = [error_ratio(*three) for three in zip(parts, eager, exact, strict=True)]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def _nothing() -> None:
    """There is nothing to wait for on a CPU."""


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for the eye."""
    lines = [f"{'tower':16} {'workload':12} {'provider':17} {'ms':>9} {'error':>6}"]
    for row in rows:
        ms = f"{'-':>9}" if row["ms"] is None else f"{row['ms']:9.3f}"
        ratio = row["max_err_ratio"]
        lines.append(
            f"{row['tower']:16} {row['workload']:12} {row['provider']:17} {ms} "
            f"{'-' if ratio is None else format(ratio, '.2f'):>6} {row.get('reason', '')}".rstrip()
        )
    return "\n".join(lines)
