"""Which launch is the fastest on this GPU: the measurements behind the launch tables.

Matrix products: cuBLAS with the passes that it needs, by its own choice and by the fastest of the
algorithms that it proposes, against each tile of gemm_hopper.py, and for few rows of
gemm_few_rows.py, in bf16, every row live, for the linear layers of all towers at many M. Calls lie
in CUDA graphs, with weights rotated beyond L2 under 16,384 rows as in a tower; a time is the median
of interleaved rounds, and only candidates that are as accurate as plain PyTorch get one. The
results are the tables of kernels/gemm_tuning.py and library_tuning.py, as their literals or as the
file in the user's cache that stands before them and before the tiles of few rows
(kernels/tables.py). Pairs of tiles around a norm are not measured here, but by `products`.

Attention: our kernels, that for Hopper in each configuration, against each usable tile of
FlashAttention-4, for classes of lengths, beside what the rules take (`choose_backend` of
attention.py, `launch_config` of attention_hopper.py, `choose_tile` of attention_fa4.py). They are
code; nothing is stored.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import __version__ as triton_version

from ..kernels import cublaslt, few_rows_tuning, library_tuning
from ..kernels.attention import choose_backend
from ..kernels.attention_fa4 import choose_tile, usable_tiles
from ..kernels.attention_hopper import launch_config
from ..kernels.gemm import hopper_reason
from ..kernels.gemm_tuning import Table, table_to_json
from ..kernels.rows import num_sms
from ..kernels.tuning_cache import write_tuning
from .provenance import Sources, sources
from .report import conditions, number, table
from .timing import TimeBudget
from .tune_contest import Outcome, contest_attention, contest_linear
from .tune_library import algorithm_of
from .tune_shapes import (
    PATCHES,
    AttentionShape,
    LinearShape,
    attention_shapes,
    linear_shapes,
    select,
)
from .tune_table import (
    Row,
    library_literal,
    literal,
    measured_few_rows,
    measured_library,
    measured_table,
)

Log = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        rows: One for each shape and M, with microseconds, error ratios and reasons by candidate.
        table: Entries of the shapes measured at every M.
        few_rows: Their entries of few rows.
        library: Algorithms of the library for them.
        labels: Names of the shapes, by the keys of `table`.
        unmeasured: Labels of the shapes without an entry, or without a time for attention.
    """

    rows: list[Row]
    table: Table
    few_rows: few_rows_tuning.Table
    library: library_tuning.Table
    labels: Mapping[tuple[int, int, str], str]
    unmeasured: list[str]


def run(
    linears: Sequence[LinearShape],
    attentions: Sequence[AttentionShape],
    patches: Sequence[int],
    *,
    measure_linear: Callable[[LinearShape, int], Outcome],
    measure_attention: Callable[[AttentionShape], tuple[Outcome, str | None]],
    time_budget: TimeBudget | None = None,
    log: Log = _to_stderr,
) -> Result:
    """Measure shape by shape, each at all of its rows, as long as there is time to start one.

    Args:
        linears: Layers, each at the rows that batches of `patches` patches give it.
        attentions: Measured after the layers.
        patches: Patches in a batch.
        measure_linear: Outcome of a layer at M rows.
        measure_attention: Outcome of a class, and the candidate that the rule takes.
        time_budget: Asked before each shape; None for no limit.
        log: Takes a line for each measurement.
    """
    rows: list[Row] = []
    time_budget = time_budget or TimeBudget()
    jobs: list[tuple[str, list[Callable[[], Row]]]] = [
        (s.label, [partial(_linear_row, s, M, measure_linear) for M in s.rows(patches)])
        for s in linears
    ]
    jobs += [(s.label, [partial(_attention_row, s, measure_attention)]) for s in attentions]
    for label, works in jobs:
        if not time_budget.allows(label):
            continue
        for work in works:
            rows.append(work())
            log(_line(rows[-1]))
    found = measured_table(rows, linears, patches)
    timed = {row["label"] for row in rows if row["us"]}
    unmeasured = [shape.label for shape in linears if shape.key not in found]
    unmeasured += [shape.label for shape in attentions if shape.label not in timed]
    few_rows = measured_few_rows(rows, found)
    library = measured_library(rows, linears, found)
    labels = {shape.key: shape.label for shape in linears}
    return Result(rows, found, few_rows, library, labels, unmeasured)


def run_here(
    shapes: Sequence[str] = (),
    patches: Sequence[int] = PATCHES,
    *,
    with_attention: bool = True,
    time_budget: TimeBudget | None = None,
    log: Log = _to_stderr,
) -> Result:
    """`run` on the current GPU.

    Args:
        shapes: Only those whose label holds one of these texts; all of them by default.
        patches: Patches in a batch; mergers have a quarter of the rows.
        with_attention: Measure attention as well.
        time_budget: Asked before each shape; None for no limit.
        log: Takes a line for each measurement.

    Raises:
        ValueError: there is no CUDA device, no shape has such a label, or `patches` is empty or
            holds a number below 1.
    """
    if not patches or min(patches) < 1:
        raise ValueError(f"tune: rows {list(patches)} must be at least 1")
    linears = select(linear_shapes(), shapes)
    attentions = select(attention_shapes(), shapes) if with_attention else []
    if not linears and not attentions:
        known = "; ".join(s.label for s in (*linear_shapes(), *attention_shapes()))
        raise ValueError(f"tune: no shape has {' or '.join(shapes)} in its label; labels: {known}")
    if not torch.cuda.is_available():
        raise ValueError("tune: measuring needs a CUDA device, and there is none")
    device = torch.device("cuda", torch.cuda.current_device())

    def measure_attention(shape: AttentionShape) -> tuple[Outcome, str | None]:
        return contest_attention(shape, device=device), _by_rule(shape, device)

    return run(
        linears,
        attentions,
        patches,
        measure_linear=partial(contest_linear, device=device),
        measure_attention=measure_attention,
        time_budget=time_budget,
        log=log,
    )


def tune_this_gpu(
    shapes: Sequence[str] = (),
    *,
    time_budget: TimeBudget | None = None,
    log: Log = _to_stderr,
) -> tuple[Path, Result]:
    """Measure the matrix products on the current GPU and keep their table in the user's cache.

    An earlier file of this GPU and these versions is replaced. This process and others that run
    already keep the table that they have read.

    Raises:
        ValueError: the kernel of gemm_hopper.py does not run here, no shape was measured in full,
            or as for `run_here`.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: measuring needs a CUDA device, and there is none")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        raise ValueError(f"tune: the library is the only choice here, as our kernel: {reason}")
    made_of = sources()  # before a wrong VITGRAPH_COMMIT costs the measurements
    result = run_here(shapes, with_attention=False, time_budget=time_budget, log=log)
    return store(result, torch.cuda.get_device_name(device), made_of), result


def store(result: Result, gpu: str, made_of: Sources | None = None) -> Path:
    """Keep the table of `result` as that of the GPU of this name.

    Raises:
        ValueError: it has no entry.
    """
    if not result.table:
        raise ValueError(
            f"tune: none of {len(result.unmeasured)} shapes was measured in full, so nothing is "
            "stored; give it more time, or fewer shapes"
        )
    content = {
        "gemm": table_to_json(result.table),
        "few_rows": table_to_json(result.few_rows),
        "library": table_to_json(result.library),
        "conditions": conditions(made_of=made_of),
    }
    return write_tuning(gpu, content)


def settings(result: Result, patches: Sequence[int]) -> dict[str, Any]:
    """What the JSON of a run says besides its rows."""
    return {
        "patches": list(patches),
        "table": table_to_json(result.table),
        "few_rows": table_to_json(result.few_rows),
        "library": table_to_json(result.library),
        "unmeasured": result.unmeasured,
    }


def summary(result: Result) -> str:
    """Microseconds of every candidate, the fastest of each row, and what has no entry."""
    parts = []
    for kind in ("linear", "attention"):
        rows = [row for row in result.rows if row["kind"] == kind]
        if not rows:
            continue
        times = [_by_column(row) for row in rows]
        names = list(dict.fromkeys(name for columns in times for name in columns))
        extra = ["by rule"] if kind == "attention" else []
        header = [kind, "M", *(f"{name} us" for name in names), "fastest", *extra]
        lines = [
            [
                _short(row), row["M"], *(number(columns.get(name)) for name in names),
                _fastest(row) or "-", *(row["by_rule"] or "-" for _ in extra),
            ]
            for row, columns in zip(rows, times, strict=True)
        ]  # fmt: skip
        parts.append(table(header, lines))
    reasons = {
        f"{_short(row)} M={row['M']} {name}: {reason}"
        for row in result.rows
        for name, reason in row["reasons"].items()
    }
    parts += sorted(reasons)
    parts += [f"not measured in full: {label}" for label in result.unmeasured]
    return "\n".join(parts)


def printed_table(result: Result) -> str:
    """The literals of kernels/gemm_tuning.py and library_tuning.py with the run's conditions."""
    made = conditions()
    versions = (
        f"Triton {triton_version}, PyTorch {made['torch']} with CUDA {made['cuda']}, "
        f"cuBLASLt {cublaslt.version()}"
    )
    note = f"{made['gpu']}, {versions}, {str(made['date'])[:10]}"
    ours = literal(result.table, result.labels, note)
    return f"{ours}\n\n{library_literal(result.library, result.labels, note)}"


def _linear_row(shape: LinearShape, M: int, measure: Callable[[LinearShape, int], Outcome]) -> Row:
    row = {"N": shape.N, "K": shape.K, "epilogue": shape.epilogue}
    return {"kind": "linear", "label": shape.label, "M": M, **row, **_figures(measure(shape, M))}


def _attention_row(
    shape: AttentionShape, measure: Callable[[AttentionShape], tuple[Outcome, str | None]]
) -> Row:
    outcome, by_rule = measure(shape)
    row = {"lengths": shape.lengths, "heads": shape.heads, "head_dim": shape.head_dim}
    return {
        "kind": "attention", "label": shape.label, "M": sum(shape.lengths), **row,
        **_figures(outcome), "by_rule": by_rule,
    }  # fmt: skip


def _figures(outcome: Outcome) -> Row:
    return {
        "candidates": list({**outcome.err_ratio, **outcome.reasons}),
        "us": dict(outcome.us),
        "err_ratio": dict(outcome.err_ratio),
        "reasons": dict(outcome.reasons),
    }


def _by_rule(shape: AttentionShape, device: torch.device) -> str | None:
    backend = choose_backend(device, torch.bfloat16, shape.head_dim)
    rows = sum(shape.lengths)
    if backend == "hopper":
        return f"hopper {launch_config(shape.head_dim, rows, shape.heads, num_sms(device))}"
    if backend != "fa4":
        return backend
    available = frozenset(usable_tiles(device, shape.head_dim))
    if not available:
        return None
    return f"fa4 {choose_tile(max(shape.lengths), rows, available)}"


def _short(row: Row) -> str:
    """The shape without the towers that have it."""
    if row["kind"] == "attention":
        return row["label"]
    return f"{row['N']}x{row['K']} {row['epilogue'] or 'bias'}"


def _by_column(row: Row) -> dict[str, float | None]:
    """Microseconds by candidate, the library's algorithms as one: they differ from row to row."""
    columns: dict[str, float | None] = {}
    for name in row["candidates"]:
        us = row["us"].get(name)
        if algorithm_of(name) is not None:
            name, best = "its algorithms", columns.get("its algorithms")
            us = best if us is None or (best is not None and best < us) else us
        columns[name] = us
    return columns


def _fastest(row: Row) -> str | None:
    return min(row["us"], key=row["us"].__getitem__, default=None)


def _line(row: Row) -> str:
    cells = [f"{name} {us:.1f}" for name, us in row["us"].items()]
    cells += [f"{name} - ({reason})" for name, reason in row["reasons"].items()]
    return f"{row['label']} M={row['M']}  us: {', '.join(cells)}"
