"""Latency against size: one growing image, more and more images, and how full one rung is.

- `tokens`: one image of 64 to 65,536 tokens. Past the largest rung the call of a user runs eagerly
  (`replays` is 0), and what does not fit into memory has a reason instead of a time.
- `images`: 1 to 64 images of 448 x 448 pixels in one call.
- `occupancy`: one rung, 10 to 100 % of its tokens live; only contenders of ours.

Contenders are checked against the oracle at every point before they are timed, and every point has
its own floor, as in `towers`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from ..capture.config import automatic_slots
from .contest import OURS, Contest, Row, row_line
from .floor import FloorMeter
from .timing import Effort, TimeBudget
from .towers import check_arguments
from .towers_config import tower_config
from .workloads import Grid, num_patches

AXES = ("tokens", "images", "occupancy")
DEFAULT_TOWERS = ("qwen3-vl-8b",)
DEFAULT_PROVIDERS = ("hf-eager-sdpa", "hf-eager-fa2", *OURS)
LEAST_TOKENS = 64
IMAGE_SIDE = 448  # pixels
EFFORT = Effort(min_rounds=3, limit_s=10.0)
_MERGE = 2
_MOST_IMAGES_OF_A_RUNG = 16


@dataclass(frozen=True)
class Limits:
    """How far the axes go.

    Attributes:
        tokens: Of the largest image; at least 64.
        images: In the largest call.
        rung: Tokens of the rung whose occupancy varies; at least 64.
        factor: From one point to the next on the first two axes.
        occupancies: Live tokens of the rung, in per cent.
    """

    tokens: int = 65536
    images: int = 64
    rung: int = 16384
    factor: int = 2
    occupancies: tuple[int, ...] = tuple(range(10, 101, 10))

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--max-tokens", self.tokens, LEAST_TOKENS),
            ("--max-images", self.images, 1),
            ("--rung", self.rung, LEAST_TOKENS),
        ):
            if value < least:
                raise ValueError(f"bench: {name} {value} must be at least {least}")


# attention over one image grows with the square of its tokens
QUICK_LIMITS = Limits(tokens=16384, factor=4, occupancies=(10, 40, 70, 100))


@dataclass(frozen=True)
class Point:
    """One workload of an axis."""

    label: str
    grids: tuple[Grid, ...]

    @property
    def tokens(self) -> int:
        """Rows after the merger."""
        return num_patches(self.grids) // _MERGE**2


def token_points(limits: Limits) -> list[Point]:
    """One image, square or twice as wide as high."""
    return [Point(f"tokens-{n}", (_image(n),)) for n in _steps(LEAST_TOKENS, limits.tokens, limits)]


def image_points(limits: Limits, patch_size: int) -> list[Point]:
    """More and more images of 448 x 448 pixels, rounded down to whole tokens."""
    side = IMAGE_SIDE // (_MERGE * patch_size) * _MERGE
    grid = (1, side, side)
    return [Point(f"images-{n}", (grid,) * n) for n in _steps(1, limits.images, limits)]


def occupancy_points(limits: Limits) -> list[Point]:
    """The rung ever fuller: equal square images, and one smaller that brings the tokens up."""
    # half of the slots at most: the smaller image needs one
    count = min(_MOST_IMAGES_OF_A_RUNG, automatic_slots(limits.rung)[0] // 2)
    side = isqrt(limits.rung // count)
    points = []
    for percent in limits.occupancies:
        whole, rest = divmod(limits.rung * percent // 100, side * side)
        grids = [_of_tokens(side, side)] * whole
        if rest:
            rows = isqrt(rest)
            grids.append(_of_tokens(rows, rest // rows))
        points.append(Point(f"live-{percent}%", tuple(grids)))
    return points


def run(
    towers: Sequence[str] = DEFAULT_TOWERS,
    axes: Sequence[str] = AXES,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    *,
    limits: Limits = Limits(),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    effort: Effort = EFFORT,
    seed: int = 0,
    time_budget: TimeBudget | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Row]:
    """Time `providers` along `axes`; rows as those of `towers.run`, and where on its axis each is.

    A row's `axis`, `tokens`, `images`, `rung_tokens` and `live_share` (of that rung; None for both
    off the axis of occupancy) say what was asked, `attention` and `replays` how ours computed it.

    Args:
        towers: Names in `towers_config.TOWERS`.
        axes: Names in `AXES`.
        providers: Names in `contest.PROVIDERS`.
        limits: How far the axes go.
        device: None is the current GPU if there is one, else the CPU (where floors are None and
            contenders that need a GPU say so).
        dtype: Of the towers, bf16 or fp16: the oracle is fp32.
        attention: Backend of `ours`; None for its choice, "plain" for that without packages.
        effort: How long to measure.
        seed: Of weights and pixels.
        time_budget: When to start no further point; it knows afterwards what was left out.
        log: Takes one line for each finished row.

    Raises:
        ValueError: an unknown tower, axis or provider, or a dtype as wide as the oracle's.
    """
    place = check_arguments(towers, providers, dtype, device)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ValueError(f"bench: axis {unknown[0]!r} is not known; use some of {', '.join(AXES)}")
    meter = FloorMeter(place) if place.type == "cuda" else None
    time_budget = time_budget or TimeBudget()
    rows: list[Row] = []
    for name in towers:
        points = _points(name, axes, limits)
        shared = [point.grids for axis, point in points if axis != "occupancy"]
        contest: Contest | None = None
        on_rung = False
        for axis, point in points:
            if not time_budget.allows(f"{name} {point.label}"):
                continue
            contest = contest or Contest(
                name, shared, device=place, dtype=dtype, attention=attention, seed=seed, meter=meter
            )
            if axis == "occupancy" and not on_rung:
                contest.use_budgets((limits.rung,))
                on_rung = True
            asked = [p for p in providers if axis != "occupancy" or p in OURS]
            for row in contest.rows(point.grids, asked, effort):
                rows.append({"tower": name, **_place(axis, point, limits), **row})
                log(row_line(rows[-1]))
        if contest is not None:
            contest.release()
    return rows


def _points(name: str, axes: Sequence[str], limits: Limits) -> list[tuple[str, Point]]:
    """All points in the order of `AXES`, so that graphs are captured once for each of two sets."""
    of_axis = {
        "tokens": token_points(limits),
        "images": image_points(limits, tower_config(name).vision_config().patch_size),
        "occupancy": occupancy_points(limits),
    }
    return [(axis, point) for axis in AXES if axis in axes for point in of_axis[axis]]


def _place(axis: str, point: Point, limits: Limits) -> Row:
    """Where a row is on its axis."""
    on_rung = axis == "occupancy"
    return {
        "axis": axis,
        "workload": point.label,
        "tokens": point.tokens,
        "images": len(point.grids),
        "rung_tokens": limits.rung if on_rung else None,
        "live_share": point.tokens / limits.rung if on_rung else None,
    }


def _steps(first: int, last: int, limits: Limits) -> Iterator[int]:
    while first <= last:
        yield first
        first *= limits.factor


def _image(tokens: int) -> Grid:
    """A power of two of tokens as one image."""
    rows = 2 ** ((tokens.bit_length() - 1) // 2)
    return _of_tokens(rows, tokens // rows)


def _of_tokens(rows: int, columns: int) -> Grid:
    return (1, _MERGE * rows, _MERGE * columns)
