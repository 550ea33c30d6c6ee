"""Whole towers at the workloads, against Hugging Face, vLLM and the floor."""

import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from .contest import OTHER_PRECISION, PROVIDERS, Contest, Row, row_line
from .floor import FloorMeter
from .ours_providers import Budgets
from .timing import Effort, TimeBudget
from .towers_config import DEFAULT_TOWERS, tower_config
from .workloads import WORKLOADS, Grid

# compiling every block for every layout takes minutes: only on request
SLOW_PROVIDERS = ("hf-compile-graph",)
DEFAULT_PROVIDERS = tuple(
    name for name in PROVIDERS if name not in (*SLOW_PROVIDERS, *OTHER_PRECISION)
)


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
    time_budget: TimeBudget | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Row]:
    """Time `providers` on every tower and workload; one row for each combination.

    Args:
        towers: Names in `towers_config.TOWERS`.
        workloads: Name to grids; see `workloads.resolve`.
        providers: Names in `contest.PROVIDERS`.
        device: None is the current GPU if there is one, else the CPU (where floors are None and
            contenders that need a GPU say so).
        dtype: Of the towers, bf16 or fp16: the oracle is fp32.
        budgets: Which graphs `ours` captures; see `OursTower`.
        attention: Backend of `ours`; None for its choice, "plain" for that without packages.
        effort: How long to measure.
        seed: Of weights and pixels.
        time_budget: When to start no further workload; it knows afterwards what was left out.
        log: Takes one line for each finished row.

    Raises:
        ValueError: an unknown tower or provider, a dtype as wide as the oracle's, or videos for a
            tower that is measured on images.
    """
    place = check_arguments(towers, providers, dtype, device)
    check_workloads(towers, workloads)
    meter = FloorMeter(place) if place.type == "cuda" else None
    time_budget = time_budget or TimeBudget()
    rows: list[Row] = []
    for name in towers:
        contest: Contest | None = None
        for label, grids in workloads.items():
            if not time_budget.allows(f"{name} {label}"):
                continue
            contest = contest or Contest(
                name,
                list(workloads.values()),
                device=place,
                dtype=dtype,
                budgets=budgets,
                attention=attention,
                seed=seed,
                meter=meter,
            )
            for row in contest.rows(grids, providers, effort):
                rows.append({"tower": name, "workload": label, **row})
                log(row_line(rows[-1]))
        if contest is not None:
            contest.release()
    return rows


def check_arguments(
    towers: Sequence[str],
    providers: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> torch.device:
    """The device to use, once all names are known to exist.

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
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_workloads(towers: Sequence[str], workloads: Mapping[str, Sequence[Grid]]) -> None:
    """Refuse videos for towers that are measured on images.

    Raises:
        ValueError: there are some.
    """
    videos = [label for label, grids in workloads.items() if any(t > 1 for t, _, _ in grids)]
    for name in towers:
        if tower_config(name).images_only and videos:
            images = " ".join(label for label in workloads if label not in videos)
            raise ValueError(
                f"bench: {name} is measured on images, and there are videos in "
                f"{', '.join(videos)}; use --workloads {images or 'img448'}"
            )
