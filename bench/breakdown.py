"""Where the time of a call goes: kernels of the replay, gaps between them, and what surrounds it.

A profiler records a few replays: the kernels of one, their times, and the time in which none ran.
Kernels on a side stream, and those that start early, overlap others, so the busy time is the union
of all, not their sum. What a kernel adds to a replay is the time from the end of whatever ended
before it to its own end; over all kernels these steps make up the replay. Blocks of a tower are the
same kernels over and over, and several of them may have one name: so those of one block are listed
by their places, as the mean over the longest run of equal blocks. The call, the replay and the
host's part of the call are measured before a profiler has run in the process, which slows them.
"""

import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

from .ours_providers import OursTower
from .provider import make_job
from .report import number, table
from .towers_config import build_tower, tower_config
from .workloads import Grid

_PROFILED = 5
_MOST_KERNELS = 24  # of a block
Row = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One kernel, copy or fill on the device: its name and when it ran, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Share:
    """Kernels of one name in one replay.

    Attributes:
        count: How many.
        us: Microseconds that they ran, in all.
        step_us: Microseconds between the ends of what ended before them and their own, in all.
    """

    name: str
    count: float
    us: float
    step_us: float


def short_name(name: str) -> str:
    """A kernel's name without its template arguments, its parameters, and namespaces."""
    plain = re.split(r"[<(]", name.removeprefix("void "))[0].strip()
    return plain.rsplit("::", 1)[-1] or name


def shares(replays: Sequence[Sequence[Span]]) -> list[Share]:
    """Kernels of one replay by name, the longest steps first, from the spans of several."""
    found: dict[str, list[tuple[float, float]]] = {}
    for spans in replays:
        before = min(span.start for span in spans)
        for span in sorted(spans, key=lambda span: span.end):
            times = span.end - span.start, span.end - before
            found.setdefault(short_name(span.name), []).append(times)
            before = span.end
    rows = [
        Share(
            name,
            len(times) / len(replays),
            *(sum(us) / len(replays) for us in zip(*times, strict=True)),
        )
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row.step_us)


def repeated(names: Sequence[str]) -> tuple[int, int, int]:
    """Where the longest run of equal blocks begins, the kernels of one, and how many there are.

    Of blocks that run as long the shortest; no blocks where nothing repeats.
    """
    best = 0, 0, 0
    for length in range(1, _MOST_KERNELS + 1):
        matches = [a == b for a, b in zip(names, names[length:], strict=False)]
        start = 0
        for i, is_match in enumerate([*matches, False]):
            if is_match:
                continue
            # so many kernels equal those of the block before them
            count = (i - start) // length + 1
            if count > 1 and count * length > best[1] * best[2]:
                best = start, length, count
            start = i + 1
    return best


def block_of(replays: Sequence[Sequence[Span]]) -> list[Share]:
    """Kernels of one block in their order, from a norm on if there is one.

    The mean over the equal blocks of the replays; where a side stream comes in between at different
    places, over those replays whose blocks are the most common.
    """
    found: dict[tuple[str, ...], list[Sequence[Span]]] = {}
    for spans in replays:
        ordered = sorted(spans, key=lambda span: span.end)
        names = [short_name(span.name) for span in ordered]
        start, length, count = repeated(names)
        if count == 0:
            continue
        end = start + count * length
        start += next((i for i in range(length) if "norm" in names[start + i]), 0)
        # with the kernel before each, from whose end the first step is counted
        for first in range(start or length, end - length + 1, length):
            block = tuple(names[first : first + length])
            found.setdefault(block, []).append(ordered[first - 1 : first + length])
    names_of = max(found, key=lambda names: len(found[names]), default=())
    blocks = found.get(names_of, [])
    return [
        Share(
            name,
            1,
            mean(block[i + 1].end - block[i + 1].start for block in blocks),
            mean(block[i + 1].end - block[i].end for block in blocks),
        )
        for i, name in enumerate(names_of)
    ]


def busy_us(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one of `spans` ran."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return total


def replays_of(spans: Sequence[Span], replays: int) -> list[list[Span]]:
    """`spans` of several replays of one graph in a row, divided where the longest pauses are.

    Raises:
        ValueError: fewer spans than replays.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    if len(ordered) < replays:
        raise ValueError(f"breakdown: {len(ordered)} kernels were seen in {replays} replays")
    pauses = [(b.start - a.end, i) for i, (a, b) in enumerate(pairwise(ordered), 1)]
    cuts = sorted(i for _, i in sorted(pauses, reverse=True)[: replays - 1])
    return [ordered[a:b] for a, b in pairwise([0, *cuts, len(ordered)])]


def run(
    towers: Sequence[str],
    workloads: Mapping[str, Sequence[Grid]],
    *,
    rounds: int = 40,
    attention: str | None = None,
    precision: str = "native",
    seed: int = 0,
) -> list[Row]:
    """A row for each tower and workload; see the module docstring.

    `attention` and `precision` are those of the encoder.

    Raises:
        ValueError: no CUDA device, or an unknown tower.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench: breakdown needs a CUDA device; there is none here")
    works = partial(_works, towers, workloads, attention, precision, seed)
    # launches are slower in a process in which a profiler has run: all walls come first
    walls = [_walls(work.call, work.replay, rounds) for work in works()]
    rows = []
    for work, times in zip(works(), walls, strict=True):
        rows.append({"tower": work.tower, "workload": work.workload, "patches": work.patches})
        rows[-1].update(summarise(_profile(work.replay), *times))
    return rows


@dataclass(frozen=True)
class _Work:
    tower: str
    workload: str
    patches: int
    call: Callable[[], object]
    replay: Callable[[], object]  # of what `call` has staged


def _works(
    towers: Sequence[str],
    workloads: Mapping[str, Sequence[Grid]],
    attention: str | None,
    precision: str,
    seed: int,
) -> Iterator[_Work]:
    """Calls and replays of every tower and workload; those of one tower until the next comes."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    every = list(workloads.values())
    for name in towers:
        tower = build_tower(name, device=device, dtype=dtype, seed=seed)
        ours = OursTower(tower, every, "auto", attention, precision, tower_config(name).spec)
        builders = ours.builders()
        for workload, grids in workloads.items():
            spec = ours.encoder().spec
            job = make_job(grids, spec.patch_values, device=device, dtype=dtype, seed=seed)
            call, replay = builders["ours"](job).call, builders["ours-graph"](job).call
            call()
            yield _Work(name, workload, len(job.pixel_values), call, replay)
        ours.release()


def summarise(
    spans: Sequence[Span],
    call_ms: float,
    host_ms: float,
    replay_ms: float,
    replays: int = _PROFILED,
) -> Row:
    """The row of one workload: its parts in microseconds, and its kernels by name."""
    each = replays_of(spans, replays)
    span = median(max(s.end for s in one) - one[0].start for one in each)
    busy = median(busy_us(one) for one in each)
    kernels = shares(each)
    return {
        "call_ms": call_ms,
        "host_ms": host_ms,
        "replay_ms": replay_ms,
        "kernels": len(spans) / replays,
        "kernel_us": sum(share.us for share in kernels),
        "busy_us": busy,
        "gap_us": span - busy,
        "outside_graph_us": (call_ms - replay_ms) * 1e3,
        "by_kernel": [vars(share) for share in kernels],
        "block": [vars(share) for share in block_of(each)],
    }


def summary(rows: Sequence[Row], most: int = 12) -> str:
    """Parts of every workload, and the kernels that take longest of each."""
    parts = table(
        ("us", "call", "replay", "kernels", "busy", "gaps", "outside", "host"),
        [
            (
                f"{row['tower']} {row['workload']}", number(row["call_ms"] * 1e3, 4),
                number(row["replay_ms"] * 1e3, 4), f"{row['kernels']:.0f}",
                number(row["busy_us"], 4), number(row["gap_us"]),
                number(row["outside_graph_us"]), number(row["host_ms"] * 1e3),
            )
            for row in rows
        ],
    )  # fmt: skip
    lists = [
        table(
            (f"{row['tower']} {row['workload']}", "count", "us", "us each", "steps", "step"),
            [
                (
                    k["name"],
                    f"{k['count']:g}",
                    number(k["us"], 4),
                    number(k["us"] / k["count"]),
                    number(k["step_us"], 4),
                    number(k["step_us"] / k["count"]),
                )
                for k in row["by_kernel"][:most]
            ],
        )
        for row in rows
    ]
    blocks = [
        table(
            (f"a block of {row['tower']} {row['workload']}", "us", "step"),
            [(k["name"], number(k["us"]), number(k["step_us"])) for k in row["block"]],
        )
        for row in rows
        if row["block"]
    ]
    return "\n\n".join([parts, *lists, *blocks])


def _profile(replay: Callable[[], object]) -> list[Span]:
    """What ran on the device in `_PROFILED` replays, each after the one before was done."""
    torch.cuda.synchronize()
    with torch.profiler.profile(**_profiler_options()) as profiler:
        for _ in range(_PROFILED):
            replay()
            torch.cuda.synchronize()
            time.sleep(1e-3)  # a pause that no gap within a replay comes near
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def _profiler_options() -> dict[str, Any]:
    options: dict[str, Any] = {"activities": [torch.profiler.ProfilerActivity.CUDA]}
    if "acc_events" in inspect.signature(torch.profiler.profile).parameters:
        options["acc_events"] = True  # without it, releases that know it warn of dropped events
    return options


def _walls(
    call: Callable[[], object], replay: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median ms of the call, of its part on the host, and of the replay; they take turns."""
    walls: list[float] = []
    hosts: list[float] = []
    replays: list[float] = []
    for _ in range(rounds + 3):
        for work, wall, host in ((call, walls, hosts), (replay, replays, None)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            returned = time.perf_counter()
            torch.cuda.synchronize()
            wall.append((time.perf_counter() - start) * 1e3)
            if host is not None:
                host.append((returned - start) * 1e3)
    return median(walls[3:]), median(hosts[3:]), median(replays[3:])
