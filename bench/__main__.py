"""Command line of the benchmarks: `python -m vitgraph.bench towers`, `kernels`, `capture`, ..."""

import argparse
import sys
from collections.abc import Sequence

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitgraph bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    towers = commands.add_parser("towers", help="whole towers against their competitors")
    towers.add_argument("--towers", nargs="+", metavar="NAME")
    towers.add_argument("--workloads", nargs="+", metavar="NAME", help="or mix<N>: N random images")
    towers.add_argument("--providers", nargs="+", metavar="NAME")
    towers.add_argument(
        "--compile", action="store_true", help="add hf-compile-graph (minutes for each workload)"
    )
    towers.add_argument(
        "--budgets",
        choices=("auto", "ladder", "tight"),
        default="auto",
        help="graphs of `ours`: rungs of the automatic ladder that are used, all of it, or exact",
    )
    towers.add_argument("--attention", metavar="BACKEND", help="of `ours`; default: its own choice")
    kernels = commands.add_parser("kernels", help="single kernels against the roofline")
    kernels.add_argument("cases", nargs="*", metavar="CASE")
    kernels.add_argument("--shapes", metavar="TEXT", help="only shapes whose label holds TEXT")
    capture = commands.add_parser("capture", help="the capture manager on one tower")
    capture.add_argument("--tower", metavar="NAME", help="default: qwen3-vl-8b")
    capture.add_argument("--sections", nargs="+", metavar="NAME", help="default: all of them")
    capture.add_argument("--layouts", type=int, metavar="N", help="random layouts for dispatch")
    capture.add_argument("--attention", metavar="BACKEND", help="default: the tower's own choice")
    capture.add_argument("--samples", metavar="FILE", help="write what calibration measured")
    packing = commands.add_parser("packing", help="padding that packing leaves; runs nothing")
    readme = commands.add_parser("readme", help="the README's table, from a result of `towers`")
    readme.add_argument("file", metavar="FILE")
    for command in (towers, kernels):
        command.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
        command.add_argument("--device", help="default: the GPU if there is one")
    for command in (towers, kernels, capture):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--quick", action="store_true", help="fewer repetitions")
    for command in (towers, kernels, capture, packing):
        command.add_argument("--json", metavar="FILE", help="write conditions and rows")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; the table goes to stdout, progress to stderr.

    Returns:
        0, 1 if a section of `capture` failed, or 2 for an argument that has no such value.
    """
    arguments = _parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else list(argv)
    # after parsing: --help must not wait for transformers
    from .readme_table import readme_table
    from .report import conditions, write_content, write_json

    try:
        if arguments.command == "readme":
            print(readme_table(arguments.file))
            return 0
        rows, extra, text = _RUNNERS[arguments.command](arguments)
    except ValueError as error:
        print(f"vitgraph {error}", file=sys.stderr)
        return 2
    samples = extra.pop("samples", None)
    if arguments.json or samples:
        meta = {**conditions(["vitgraph", "bench", *given]), **extra}
        if arguments.json:
            write_json(arguments.json, meta, rows)
        if samples:
            write_content(arguments.samples, {**meta, "samples": samples})
    print(text)
    return int(any("error" in row for row in rows))


def _run_towers(arguments: argparse.Namespace) -> tuple[list[dict], dict, str]:
    from . import towers
    from .timing import QUICK, Effort
    from .towers_config import DEFAULT_TOWERS
    from .workloads import WORKLOADS, resolve

    providers: list[str] = list(arguments.providers or towers.DEFAULT_PROVIDERS)
    if arguments.compile and "hf-compile-graph" not in providers:
        providers.append("hf-compile-graph")
    rows = towers.run(
        arguments.towers or DEFAULT_TOWERS,
        resolve(arguments.workloads or list(WORKLOADS), arguments.seed),
        providers,
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
        budgets=arguments.budgets,
        attention=arguments.attention,
        effort=QUICK if arguments.quick else Effort(),
        seed=arguments.seed,
    )
    settings = {"budgets": arguments.budgets, "dtype": arguments.dtype, "seed": arguments.seed}
    return rows, settings, towers.summary(rows)


def _run_kernels(arguments: argparse.Namespace) -> tuple[list[dict], dict, str]:
    from . import kernels
    from .registry import REGISTRY
    from .timing import Effort

    place = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ceilings = kernels.measure_ceilings(place) if place.type == "cuda" else None
    rows = kernels.run(
        arguments.cases or tuple(REGISTRY),
        shapes=lambda label: arguments.shapes is None or arguments.shapes in label,
        device=place,
        dtype=DTYPES[arguments.dtype],
        ceilings=ceilings,
        effort=Effort(
            warmup_s=0.005 if arguments.quick else 0.02, rounds=5 if arguments.quick else 20
        ),
        seed=arguments.seed,
    )
    found = {"copy_gbps": ceilings.gbps, "gemm_tflops": ceilings.tflops} if ceilings else None
    return rows, {"ceilings": found, "seed": arguments.seed}, kernels.summary(rows)


def _run_capture(arguments: argparse.Namespace) -> tuple[list[dict], dict, str]:
    from . import capture

    tower = arguments.tower or capture.DEFAULT_TOWER
    sections = arguments.sections or tuple(capture.SECTIONS)
    if arguments.samples and "calibration" not in sections:
        raise ValueError(
            f"bench: --samples {arguments.samples} is written by the section calibration, which "
            f"is not among --sections {' '.join(sections)}; add it"
        )
    rows, samples = capture.run(
        tower,
        sections,
        attention=arguments.attention,
        layouts=arguments.layouts,
        quick=arguments.quick,
        seed=arguments.seed,
    )
    settings = {"tower": tower, "dtype": "bfloat16", "seed": arguments.seed}
    if arguments.samples:
        settings["samples"] = samples
    return rows, settings, capture.summary(rows)


def _run_packing(_: argparse.Namespace) -> tuple[list[dict], dict, str]:
    from . import packing

    rows = packing.waste_rows()
    return rows, {}, packing.summary(rows)


_RUNNERS = {
    "towers": _run_towers,
    "kernels": _run_kernels,
    "capture": _run_capture,
    "packing": _run_packing,
}


if __name__ == "__main__":
    sys.exit(main())
