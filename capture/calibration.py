"""Measuring what replays and eager calls cost, and keeping the curve in a file.

The file lies in `$VITGRAPH_CACHE/calibration`, by default `~/.cache/vitgraph/calibration`, under a
name made of everything that the times depend on: GPU, versions, encoder and rungs.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from .cost import CostSample, Load, MeasuredCosts
from .cost_fit import fit_costs
from .packing import total_of
from .protocol import EncoderItemSpec, RungLimits, SupportsEncoderCudaGraph
from .sample_layouts import equal_images
from .staging import PIXELS, Grid

# Runs items on a rung, or eagerly for None.
RunOn = Callable[[RungLimits | None, torch.Tensor, Sequence[Grid]], object]

# Small rungs, which take little time, are all measured: libraries pick their kernels by size, so
# one may be slower than the next. Of the others some are; those between are interpolated.
_ALL_UP_TO_TOKENS = 2048
_MEASURED_RUNGS = 12
# A longer frame adds nothing to the fit but time: attention is quadratic.
_LONGEST_FRAME_TOKENS = 4096
_SECONDS_PER_SAMPLE = 0.04
# The first calls find a device and a host that have been idle, and take longer.
_SAMPLES_OF_WARM_UP = 12
# Shorter eager calls may wait for the host, which other processes slow down for seconds at a time:
# they are measured twice, the whole list apart, and again while their last two times are not this
# close. The least time counts.
_HOST_MATTERS_US = 50_000.0
_CLOSE = 1.03
_MOST_TIMES = 5
# Near its limit of power a GPU runs a call some per cent faster or slower by what ran in the tenth
# of a second before: a call is counted among calls of its own kind. Short calls do not get there.
_SECONDS_TO_SETTLE = 0.1
_CALLS_TO_SETTLE = 10
# Three calls of a sample, or as many as take so long: long calls vary less.
_SECONDS_ENOUGH = 0.25


def calibrate(
    encoder: SupportsEncoderCudaGraph,
    rungs: Sequence[RungLimits],
    run_on: RunOn,
    *,
    show_progress: bool = False,
) -> list[CostSample]:
    """Wall times of whole calls, medians: of rungs at 30, 60 and 100 % live, and eagerly.

    Every small rung is measured and up to 12 of the others, and every large one with eight images.
    Eager calls are measured on full layouts of some of both, on eight images for every large rung,
    and on up to four times the largest.
    """
    small = [rung for rung in rungs if rung.token_budget <= _ALL_UP_TO_TOKENS]
    large = rungs[len(small) :]
    some_large = [large[i] for i in _spread(len(large), _MEASURED_RUNGS)]
    some_small = [small[i] for i in _spread(len(small), 2 * _MEASURED_RUNGS)]
    largest = rungs[-1]
    jobs: list[tuple[RungLimits | None, list[Grid]]] = []
    jobs += [(rung, grid) for rung in (*small, *some_large) for grid in _layouts(encoder, rung)]
    # Full rungs only: what eager calls cost at 60 % of one they cost at 100 % of another.
    jobs += [(None, g) for rung in (*some_small, *some_large) for g in _full(encoder, rung)]
    many = equal_images(encoder, largest, largest.token_budget, 8)
    jobs += [(None, many * times) for times in (2, 4) if many]
    # What most large calls are like: neither a few huge images nor as many as there are slots. Both
    # ways of running them, or one would be believed cheaper.
    for rung in large:
        several = equal_images(encoder, rung, rung.token_budget, 8)
        jobs += [(way, several) for way in (rung, None) if several]
    longest = max(_patches(encoder.item_specs(grid)) for _, grid in jobs)
    spec = encoder.input_specs(largest)[PIXELS]
    pixels = torch.randn(longest, *spec.shape[1:], device=encoder.device).to(spec.dtype)

    def sample(rung: RungLimits | None, grid: Sequence[Grid]) -> CostSample:
        load = total_of([Load.of(item) for item in encoder.item_specs(grid)])
        us = _time(encoder.device, lambda: run_on(rung, pixels[: load.patches], grid))
        return CostSample(None if rung is None else rung.token_budget, load, us)

    warm_at = time.perf_counter() + _SAMPLES_OF_WARM_UP * _SECONDS_PER_SAMPLE
    while time.perf_counter() < warm_at:
        sample(*jobs[0])
    samples: list[CostSample] = []
    with tqdm(total=len(jobs), desc="calibrate", file=sys.stderr, disable=not show_progress) as bar:
        for job in jobs:
            samples.append(sample(*job))
            bar.update()
        again = [i for i, s in enumerate(samples) if _may_wait_for_host(s)]
        last = {i: samples[i].us for i in again}
        for _ in range(_MOST_TIMES - 1):
            if not again:
                break
            bar.reset(total=len(again))
            apart = []
            for i in again:
                found = sample(*jobs[i])
                if max(found.us, last[i]) > _CLOSE * min(found.us, last[i]):
                    apart.append(i)
                last[i] = found.us
                samples[i] = min(samples[i], found, key=lambda one: one.us)
                bar.update()
            again = apart
    return samples


def load_costs(
    encoder: SupportsEncoderCudaGraph, rungs: Sequence[RungLimits]
) -> MeasuredCosts | None:
    """The costs that `store_costs` kept for this machine, encoder and ladder, or None.

    Raises:
        ValueError: the file is damaged.
    """
    path = cache_path(encoder, rungs)
    if not path.exists():
        return None
    try:
        samples = [CostSample.from_json(row) for row in json.loads(path.read_text())["samples"]]
        return fit_costs(samples, rungs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"calibrate: {path} is damaged ({error}); delete it, or call "
            "calibrate(use_cache=False) to measure again"
        ) from error


def store_costs(
    encoder: SupportsEncoderCudaGraph, rungs: Sequence[RungLimits], samples: Sequence[CostSample]
) -> MeasuredCosts:
    """Fit `samples`, and keep them in the file; written aside first, so that it is never half."""
    costs = fit_costs(samples, rungs)
    path = cache_path(encoder, rungs)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"made_on": _conditions(encoder), "samples": [sample.to_json() for sample in samples]}
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(content))
    aside.replace(path)
    return costs


def cache_path(encoder: SupportsEncoderCudaGraph, rungs: Sequence[RungLimits]) -> Path:
    """Where the samples of this machine, encoder and ladder are kept."""
    folder = os.environ.get("VITGRAPH_CACHE")
    base = Path(folder) if folder else Path.home() / ".cache" / "vitgraph"
    identity = json.dumps([_conditions(encoder), [str(rung) for rung in rungs]], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return base / "calibration" / f"{name}.json"


def _conditions(encoder: SupportsEncoderCudaGraph) -> dict[str, Any]:
    device = encoder.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": _version("triton"),
        "vitgraph": _version("vitgraph"),
        "encoder": encoder.fingerprint(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # run from a source tree that is not installed


def _layouts(encoder: SupportsEncoderCudaGraph, rung: RungLimits) -> list[list[Grid]]:
    """Full as one and as many images, 60 % live in four, 30 % in two."""
    budget = rung.token_budget
    partly = [equal_images(encoder, rung, budget * 6 // 10, 4)]
    partly.append(equal_images(encoder, rung, budget * 3 // 10, 2))
    return [*_full(encoder, rung), *filter(None, partly)]


def _full(encoder: SupportsEncoderCudaGraph, rung: RungLimits) -> list[list[Grid]]:
    budget = rung.token_budget
    few = equal_images(encoder, rung, budget, -(-budget // _LONGEST_FRAME_TOKENS))
    many = equal_images(encoder, rung, budget, rung.max_items)
    return [grid for grid in (few, many) if grid]


def _time(device: torch.device, work: Callable[[], object]) -> float:
    """Microseconds of `work` until the device is done, the median of calls."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            # not the device: another thread may be recording on a stream of its own
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter() - start

    seconds = max(once(), 1e-6)
    for _ in range(min(_CALLS_TO_SETTLE, int(_SECONDS_TO_SETTLE / seconds))):
        once()
    times = [once()]
    seconds = max(times[0], 1e-6)
    least = min(3, ceil(_SECONDS_ENOUGH / seconds))
    repeats = min(15, max(least, int(_SECONDS_PER_SAMPLE / seconds)))
    times += [once() for _ in range(repeats - 1)]
    return median(times) * 1e6


def _may_wait_for_host(sample: CostSample) -> bool:
    return sample.token_budget is None and sample.us < _HOST_MATTERS_US


def _patches(items: Sequence[EncoderItemSpec]) -> int:
    return sum(item.input_size for item in items)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
