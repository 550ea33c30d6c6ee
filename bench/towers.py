"""Whole towers: correctness first, then time, against Hugging Face, vLLM and the floor.

A contender whose features are further from the fp32 oracle than `MAX_ERR_RATIO` times what Hugging
Face's own eager tower loses in the same dtype gets no time, and the row says why. The ratio is
taken item by item and feature by feature, and the worst one counts: an error in one small image of
a batch must not drown in the others.
"""

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.testing import error_ratio
from .floor import Floor, FloorMeter, TowerShape
from .hf_providers import hf_builders
from .ours_providers import Budgets, OursTower
from .provider import Builder, Job, Provider, UnavailableError, features_of, make_job
from .report import number, table
from .timing import Effort, Timing, time_calls
from .towers_config import DEFAULT_TOWERS, build_tower, fp32_copy, tower_config
from .vllm_providers import VllmTower
from .workloads import WORKLOADS, Grid

MAX_ERR_RATIO = 1.3
# compiling every block for every layout takes minutes: only on request
SLOW_PROVIDERS = ("hf-compile-graph",)
DEFAULT_PROVIDERS = (
    "hf-eager-sdpa", "hf-eager-fa2", "hf-exact-graph", "vllm-eager", "vllm-graph",
    "ours-eager", "ours-graph", "ours",
)  # fmt: skip
PROVIDERS = (*DEFAULT_PROVIDERS, *SLOW_PROVIDERS)

Row = dict[str, Any]


def run(
    towers: Sequence[str] = DEFAULT_TOWERS,
    workloads: Mapping[str, Sequence[Grid]] = WORKLOADS,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    budgets: Budgets = "auto",
    attention: str | None = None,
    effort: Effort = Effort(),  # noqa: B008 (frozen)
    seed: int = 0,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Row]:
    """Time `providers` on every tower and workload; one row for each combination.

    Args:
        towers: Names in `towers_config.TOWERS`.
        workloads: Name to grids; see `workloads.resolve`.
        providers: Names in `PROVIDERS`.
        device: None is the current GPU if there is one, else the CPU (where floors are None and
            contenders that need a GPU say so).
        dtype: Of the towers, bf16 or fp16: the oracle is fp32.
        budgets: Which graphs `ours` captures; see `OursTower`.
        attention: Backend of `ours`; None for its choice.
        effort: How long to measure.
        seed: Of weights and pixels.
        log: Takes one line for each finished row.

    Raises:
        ValueError: an unknown tower or provider, or a dtype as wide as the oracle's.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"bench: dtype = {dtype}; errors are taken against fp32, use bfloat16 or float16"
        )
    unknown = [name for name in providers if name not in PROVIDERS]
    if unknown:
        raise ValueError(
            f"bench: provider {unknown[0]!r} is not known; use some of {', '.join(PROVIDERS)}"
        )
    for name in towers:
        tower_config(name)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    meter = FloorMeter(place) if place.type == "cuda" else None
    rows: list[Row] = []
    for name in towers:
        tower = build_tower(name, device=place, dtype=dtype, seed=seed)
        ours = OursTower(tower, list(workloads.values()), budgets, attention)
        vllm = VllmTower(tower_config(name).family, tower)
        builders = {**hf_builders(tower), **vllm.builders(), **ours.builders()}
        wanted = {provider: builders[provider] for provider in providers}
        oracle = fp32_copy(name, tower)
        shape = TowerShape.of(tower.config)
        for label, grids in workloads.items():
            job = make_job(grids, shape.patch_values, device=place, dtype=dtype, seed=seed)
            floor = meter.floor(shape, grids) if meter is not None else None
            reference = _reference(oracle, builders["hf-eager-sdpa"], job, shape.merge)
            for row in _measure(job, wanted, reference, floor, effort, place):
                rows.append({"tower": name, "workload": label, **row})
                log(_line(rows[-1]))
            del reference
            _free(place)  # graphs and features of this job, before those of the next
        ours.release()
        vllm.release()
        del tower, oracle, ours, vllm, builders, wanted
        _free(place)
    return rows


class Reference:
    """The oracle's features and those of Hugging Face's eager tower, and the items' token rows."""

    def __init__(
        self, oracle: list[torch.Tensor], eager: list[torch.Tensor], tokens: Sequence[int]
    ):
        self._oracle = oracle
        self._eager = eager
        self._tokens = list(tokens)

    def worst_ratio(self, features: Sequence[torch.Tensor]) -> float:
        """Largest error ratio over features and items; NaN if any is NaN.

        Raises:
            ValueError: another number of features, or other shapes.
        """
        shapes = [tuple(x.shape) for x in features]
        expected = [tuple(x.shape) for x in self._oracle]
        if shapes != expected:
            raise ValueError(f"features have shapes {shapes} instead of {expected}")
        ratios = [
            error_ratio(a, e, o)
            for actual, eager, oracle in zip(features, self._eager, self._oracle, strict=True)
            for a, e, o in zip(
                *(x.split(self._tokens) for x in (actual, eager, oracle)), strict=True
            )
        ]
        return math.nan if any(math.isnan(r) for r in ratios) else max(ratios)


def _reference(oracle: Any, eager: Builder, job: Job, merge: int) -> Reference:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            exact = features_of(oracle(job.pixel_values.float(), grid_thw=job.grid_thw))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    tokens = [t * h * w // merge for t, h, w in job.grids]
    return Reference(exact, eager(job).features(), tokens)


def _measure(
    job: Job,
    builders: Mapping[str, Builder],
    reference: Reference,
    floor: Floor | None,
    effort: Effort,
    device: torch.device,
) -> list[Row]:
    """Build, check and then time together all contenders of one job."""
    ready: dict[str, Provider] = {}
    ratios: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, build in builders.items():
        # a benchmark of many goes on when one fails, and its row carries the failure
        try:
            provider = build(job)
            features = provider.features()
            ratios[name] = reference.worst_ratio(features)
            del features
        except UnavailableError as error:
            reasons[name] = str(error)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if ratios[name] <= MAX_ERR_RATIO:
                ready[name] = provider
            else:  # NaN as well
                reasons[name] = f"error is {ratios[name]:.3g} times Hugging Face eager's own"
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    calls = {name: provider.call for name, provider in ready.items()}
    timings = time_calls(calls, synchronize, effort)
    return [
        _row(
            name,
            job,
            timings.get(name),
            ready.get(name),
            ratios.get(name),
            reasons.get(name),
            floor,
        )
        for name in builders
    ]


def _row(
    name: str,
    job: Job,
    timing: Timing | None,
    provider: Provider | None,
    ratio: float | None,
    reason: str | None,
    floor: Floor | None,
) -> Row:
    row: Row = {
        "provider": name,
        "ms": timing and timing.ms,
        "ms_p20": timing and timing.p20,
        "ms_p80": timing and timing.p80,
        "floor_ms": floor and floor.ms,
        "floor_parts": floor
        and {
            "gemm_ms": floor.gemm_ms,
            "attention_ms": floor.attention_ms,
            "norm_ms": floor.norm_ms,
            "gap_ms": floor.gap_ms,
            "attention_backend": floor.backend,
        },
        "patches": len(job.pixel_values),
        "padded_patches": provider and provider.padded_patches,
        "max_err_ratio": ratio,
    }
    if reason is not None:
        row["reason"] = reason
    return row


def summary(rows: Sequence[Row]) -> str:
    """A table of times, one line a tower and workload, one column a provider; reasons below."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["tower"], row["workload"]), {})[row["provider"]] = row
    lines = []
    for (tower, workload), by_name in cells.items():
        any_row = next(iter(by_name.values()))
        ours = by_name.get("ours", {})
        floor, ms, padded = any_row["floor_ms"], ours.get("ms"), ours.get("padded_patches")
        lines.append([
            f"{tower} {workload}", any_row["patches"], number(floor),
            *(number(by_name[n]["ms"]) if n in by_name else "-" for n in names),
            number(ms / floor if ms and floor else None),
            number(padded / any_row["patches"] if padded else None),
        ])  # fmt: skip
    text = table(["ms", "patches", "floor", *names, "ours/floor", "padded/live"], lines)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "reason" in row:
            where = f"{row['tower']} {row['workload']}"
            reasons.setdefault(f"{row['provider']}: {row['reason']}", []).append(where)
    notes = [
        f"{reason} ({len(where)} of {len(cells)}, first {where[0]})"
        for reason, where in reasons.items()
    ]
    return "\n".join([text, *notes])


def _line(row: Row) -> str:
    result = f"{row['ms']:.3f} ms" if row["ms"] is not None else row["reason"]
    ratio = number(row["max_err_ratio"])
    return f"{row['tower']:14} {row['workload']:9} {row['provider']:16} err {ratio:>5}  {result}"


def _nothing() -> None:
    """The CPU has nothing to wait for."""


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
