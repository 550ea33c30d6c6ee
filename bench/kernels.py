"""Kernels against their definition, their competitors and the roofline of this GPU.

Each contender is held against the fp64 oracle first; one that is more than twice as far from it as
plain PyTorch in the same dtype gets no time. Times are medians over replays of one CUDA graph whose
calls rotate over clones of the arguments, together larger than twice the L2 cache: cold, as in a
tower. The ceilings (copy bandwidth, cuBLAS on 8192^3) are measured in the same run.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.roofline import Cost, speed_of_light_ms
from ..kernels.testing import error_ratio
from .registry import REGISTRY, Case, Dims, Draw
from .report import number, table
from .timing import Effort, Timing, record_each, time_calls, time_graphs

MAX_ERR_RATIO = 2.0
_MAX_CLONES = 16

Row = dict[str, Any]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run: a copy (read and written bytes), and a bf16 GEMM."""

    gbps: float
    tflops: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth over 2 GiB and the rate of an 8192^3 GEMM on random bf16 data."""
    source = torch.randn(2**29, device=device).bfloat16()
    target = torch.empty_like(source)
    x, w = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    graphs = {
        "copy": record_each([partial(target.copy_, source)] * 4),
        "gemm": record_each([partial(F.linear, x, w)] * 4),
    }
    times = time_graphs(graphs, Effort(warmup_s=0.1, rounds=10))
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / times["copy"].ms / 1e6, 2 * 8192**3 / times["gemm"].ms / 1e9)


def run(
    cases: Sequence[str] = tuple(REGISTRY),
    *,
    shapes: Callable[[str], bool] = lambda label: True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ceilings: Ceilings | None = None,
    effort: Effort = Effort(warmup_s=0.02, rounds=20),  # noqa: B008 (frozen)
    seed: int = 0,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Row]:
    """Benchmark the named cases; one row for each case, shape and provider.

    Args:
        cases: Names in `registry.REGISTRY`.
        shapes: Which shape labels to run.
        device: None is the current GPU if there is one, else the CPU (whole calls, warm caches).
        dtype: Of the tensors.
        ceilings: For the roofline column, from `measure_ceilings`; None leaves it empty.
        effort: How long to measure.
        seed: Of the inputs.
        log: Takes one line for each finished row.

    Raises:
        ValueError: an unknown case.
    """
    unknown = [name for name in cases if name not in REGISTRY]
    if unknown:
        raise ValueError(
            f"bench: case {unknown[0]!r} is not known; use some of {', '.join(REGISTRY)}"
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    for name in cases:
        case = REGISTRY[name]
        for label, dims in case.shapes.items():
            if not shapes(label):
                continue
            draw = Draw(place, dtype, torch.Generator(place).manual_seed(seed))
            with torch.inference_mode():
                timings, ratios, reasons = _contest(case, dims, draw, effort)
            cost = case.cost(dims, dtype)
            baseline = timings.get(next(iter(case.providers)))
            for provider in case.providers:
                rows.append(
                    {
                        "case": name,
                        "shape": label,
                        "dtype": str(dtype).removeprefix("torch."),
                        "provider": provider,
                        **_figures(timings.get(provider), cost, ceilings, baseline),
                        "err_ratio": ratios.get(provider),
                        **({"reason": reasons[provider]} if provider in reasons else {}),
                    }
                )
                log(_line(rows[-1]))
    return rows


def _contest(
    case: Case, dims: Dims, draw: Draw, effort: Effort
) -> tuple[dict[str, Timing], dict[str, float], dict[str, str]]:
    """Timings of the accurate providers, error ratios, and why the others have no time."""
    arguments = case.make(dims, draw)
    oracle = case.reference(*_clone(arguments, torch.float64))
    eager = case.reference(*_clone(arguments))
    ratios: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, provider in case.providers.items():
        # a benchmark of many goes on when one fails, and its row carries the failure
        try:
            ratios[name] = error_ratio(provider(*_clone(arguments)), eager, oracle)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not ratios[name] <= MAX_ERR_RATIO:  # NaN as well
            reasons[name] = f"error is {ratios[name]:.3g} times plain PyTorch's own"
    del oracle, eager
    sound = {name: p for name, p in case.providers.items() if name not in reasons}
    if draw.device.type != "cuda":
        warm = {name: partial(p, *_clone(arguments)) for name, p in sound.items()}
        return time_calls(warm, lambda: None, effort), ratios, reasons
    clones = [_clone(arguments) for _ in range(_num_clones(arguments, draw.device))]
    graphs = {name: record_each([partial(p, *c) for c in clones]) for name, p in sound.items()}
    return time_graphs(graphs, effort), ratios, reasons


def _clone(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Fresh copies; floating-point tensors in `dtype` if one is given."""
    return tuple(
        a.detach().to(dtype=dtype if dtype and a.is_floating_point() else a.dtype, copy=True)
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    )


def _num_clones(arguments: Sequence[Any], device: torch.device) -> int:
    size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, torch.Tensor))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_CLONES, max(2, math.ceil(2 * l2 / max(1, size))))


def _figures(
    timing: Timing | None, cost: Cost, ceilings: Ceilings | None, baseline: Timing | None
) -> Row:
    if timing is None:
        names = ("us", "us_p20", "us_p80", "gbps", "tflops", "roofline", "speedup")
        return dict.fromkeys(names)
    light = ceilings and speed_of_light_ms(cost, ceilings.tflops, ceilings.gbps)
    return {
        "us": timing.ms * 1e3,
        "us_p20": timing.p20 * 1e3,
        "us_p80": timing.p80 * 1e3,
        "gbps": cost.bytes / timing.ms / 1e6,
        "tflops": cost.flops / timing.ms / 1e9,
        "roofline": light and light / timing.ms,
        "speedup": baseline and baseline.ms / timing.ms,
    }


def summary(rows: Sequence[Row]) -> str:
    """One line a row; a reason stands where there is no time."""
    header = ["case", "shape", "provider", "us", "GB/s", "TFLOP/s", "roofline", "speedup", "err"]
    lines = [
        [
            r["case"], r["shape"], r["provider"], number(r["us"]), number(r["gbps"]),
            number(r["tflops"]),
            "-" if r["roofline"] is None else f"{r['roofline']:.0%}",
            "-" if r["speedup"] is None else f"{r['speedup']:.2f}x",
            number(r["err_ratio"]),
        ]
        for r in rows
    ]  # fmt: skip
    reasons = {f"{r['case']} {r['provider']}: {r['reason']}": None for r in rows if "reason" in r}
    return "\n".join([table(header, lines), *reasons])


def _line(row: Row) -> str:
    result = f"{row['us']:.1f} us" if row["us"] is not None else row["reason"]
    return f"{row['case']:16} {row['shape']:32} {row['provider']:10} {result}"
