"""Contenders on one tower: correctness first, then time, beside the floor.

A contender whose features are further from the fp32 oracle than `MAX_ERR_RATIO` times what Hugging
Face's own eager tower loses in the same dtype gets no time, and the row says why.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .floor import Floor, FloorMeter, TowerShape
from .fp8_provider import Fp8Tower
from .hf_providers import hf_builders
from .oracle import Reference, reference_of
from .ours_providers import Budgets, OursTower
from .provider import Builder, Job, Provider, UnavailableError, make_job
from .report import number, table
from .timing import Effort, Timing, time_calls
from .towers_config import build_tower, fp32_copy, tower_config
from .vllm_providers import VllmTower
from .workloads import Grid

MAX_ERR_RATIO = 1.3
PEERS = (
    "hf-eager-sdpa", "hf-eager-fa2", "hf-exact-graph", "hf-compile-graph", "vllm-eager",
    "vllm-graph",
)  # fmt: skip
OURS = ("ours-eager", "ours-graph", "ours")
OTHER_PRECISION = ("ours-fp8",)
PROVIDERS = (*PEERS, *OURS, *OTHER_PRECISION)

Row = dict[str, Any]


class Contest:
    """A tower with its contenders and its oracle, ready for any workload.

    Args:
        name: In `towers_config.TOWERS`.
        workloads: All that will be asked; decides which graphs `ours` captures.
        device: Where all of them run.
        dtype: Of the tower; the oracle is fp32.
        budgets: Graphs of `ours`; see `OursTower`.
        attention: Backend of `ours`; None for its choice, "plain" for that without packages.
        seed: Of weights and pixels.
        meter: Measures floors; None leaves them out.
    """

    def __init__(
        self,
        name: str,
        workloads: Sequence[Sequence[Grid]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        budgets: Budgets = "auto",
        attention: str | None = None,
        seed: int = 0,
        meter: FloorMeter | None = None,
    ):
        self._device = device
        self._dtype = dtype
        self._attention = attention
        self._seed = seed
        self._meter = meter
        self._tower = build_tower(name, device=device, dtype=dtype, seed=seed)
        self._oracle = fp32_copy(name, self._tower)
        self._hf = hf_builders(self._tower)
        config = tower_config(name)
        self._vllm = VllmTower(config.family, self._tower)
        self._spec = config.spec
        self._ours = OursTower(self._tower, workloads, budgets, attention, spec=config.spec)
        self._fp8 = Fp8Tower(
            name, workloads, budgets, attention, device=device, dtype=dtype, seed=seed
        )
        self.shape = TowerShape.of(self._tower.config)

    def use_budgets(self, budgets: tuple[int, ...]) -> None:
        """Let `ours` capture rungs of exactly these tokens, instead of those that it has."""
        self._ours.release()
        free(self._device)
        self._ours = OursTower(self._tower, (), budgets, self._attention, spec=self._spec)
        self._fp8.use_budgets(budgets)

    def rows(self, grids: Sequence[Grid], providers: Sequence[str], effort: Effort) -> list[Row]:
        """Check and time `providers` on one workload; a row for each.

        A floor that does not fit into GPU memory is left out. Without an oracle there are no times.
        """
        every = {**self._hf, **self._vllm.builders(), **self._ours.builders()}
        every |= self._fp8.builders()
        builders = {name: every[name] for name in providers}
        job = make_job(
            grids, self.shape.patch_values, device=self._device, dtype=self._dtype, seed=self._seed
        )
        try:
            floor = self._meter.floor(self.shape, grids) if self._meter else None
        except torch.OutOfMemoryError:
            floor = None
        try:
            reference = reference_of(self._oracle, self._hf["hf-eager-sdpa"], job, self.shape.merge)
        except Exception as error:  # a benchmark of many goes on, and the rows carry the failure
            reason = f"no oracle to check against: {_first_line(error)}"
            rows = [_row(name, job, reason=reason, floor=floor) for name in builders]
        else:
            rows = _measure(job, builders, reference, floor, effort, self._device)
            del reference
        free(self._device)  # graphs and features of this job, before those of the next
        return rows

    def release(self) -> None:
        """Free graphs and weights; it cannot be used afterwards."""
        for contender in (self._ours, self._fp8, self._vllm):
            contender.release()
        del self._tower, self._oracle, self._hf, self._ours, self._fp8, self._vllm, contender
        free(self._device)


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
            if provider.failure is not None:
                if failure := provider.failure():
                    reasons[name] = failure
                else:
                    ready[name] = provider
                continue
            features = provider.features()
            ratios[name] = reference.worst_ratio(features)
            del features
        except UnavailableError as error:
            reasons[name] = str(error)
        except Exception as error:
            reasons[name] = _first_line(error)
        else:
            if ratios[name] <= MAX_ERR_RATIO:
                ready[name] = provider
            else:  # NaN as well
                reasons[name] = f"error is {ratios[name]:.3g} times Hugging Face eager's own"
    calls = {name: provider.call for name, provider in ready.items()}
    timings, failures = _time(calls, effort, device)
    return [
        _row(
            name,
            job,
            timing=timings.get(name),
            provider=ready.get(name),
            ratio=ratios.get(name),
            reason=reasons.get(name) or failures.get(name),
            floor=floor,
        )
        for name in builders
    ]


def _time(
    calls: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of all calls, taking turns; and why those that ran out of memory have none."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    try:
        return time_calls(calls, synchronize, effort), {}
    except torch.OutOfMemoryError:
        pass
    # one at a time, so that only a call that does not fit by itself goes without
    timings: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        free(device)
        try:
            timings |= time_calls({name: call}, synchronize, effort)
        except torch.OutOfMemoryError as error:
            failures[name] = _first_line(error)
    return timings, failures


def _row(
    name: str,
    job: Job,
    *,
    timing: Timing | None = None,
    provider: Provider | None = None,
    ratio: float | None = None,
    reason: str | None = None,
    floor: Floor | None = None,
) -> Row:
    row: Row = {
        "provider": name,
        "ms": timing and timing.ms,
        "ms_p20": timing and timing.p20,
        "ms_p80": timing and timing.p80,
        "samples": timing and timing.samples,
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
        "attention": provider and provider.attention,
        "replays": provider and provider.replays,
        "max_err_ratio": ratio,
    }
    if provider is not None and provider.criterion is not None:
        row["criterion"] = provider.criterion
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


def row_line(row: Row) -> str:
    """A finished row on one line."""
    result = f"{row['ms']:.3f} ms" if row["ms"] is not None else row["reason"]
    ratio = number(row["max_err_ratio"])
    return f"{row['tower']:14} {row['workload']:12} {row['provider']:16} err {ratio:>5}  {result}"


def free(device: torch.device) -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _nothing() -> None:
    """The CPU has nothing to wait for."""
