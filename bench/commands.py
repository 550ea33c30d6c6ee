"""What each benchmark command runs: from parsed options to rows, conditions and a text."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .timing import QUICK, Effort, TimeBudget

# rows, what the conditions say beyond the machine, and the text for the eye
Outcome = tuple[list[dict[str, Any]], dict[str, Any], str]


def run_towers(arguments: argparse.Namespace) -> Outcome:
    """`towers`."""
    from . import towers

    providers: list[str] = list(arguments.providers or towers.DEFAULT_PROVIDERS)
    if arguments.compile and "hf-compile-graph" not in providers:
        providers.append("hf-compile-graph")
    return _at_workloads(arguments, providers)


def run_peers(arguments: argparse.Namespace) -> Outcome:
    """`peers`: `towers` with what is installed."""
    from .contest import OURS
    from .peers import installed_peers

    found, missing = installed_peers(_place(arguments))
    rows, settings, text = _at_workloads(arguments, [*found, *OURS])
    lines = [f"missing {name}: {reason}" for name, reason in missing.items()]
    return rows, {**settings, "missing": missing}, "\n".join([text, *lines])


def run_scaling(arguments: argparse.Namespace) -> Outcome:
    """`scaling`."""
    from dataclasses import replace

    from . import scaling
    from .contest import summary

    asked = {
        "tokens": arguments.max_tokens,
        "images": arguments.max_images,
        "rung": arguments.rung,
    }
    limits = replace(
        scaling.QUICK_LIMITS if arguments.quick else scaling.Limits(),
        **{name: value for name, value in asked.items() if value is not None},
    )
    time_budget = TimeBudget(arguments.budget_s)
    rows = scaling.run(
        arguments.towers or scaling.DEFAULT_TOWERS,
        arguments.axes or scaling.AXES,
        arguments.providers or scaling.DEFAULT_PROVIDERS,
        limits=limits,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        attention=_attention(arguments),
        effort=QUICK if arguments.quick else scaling.EFFORT,
        seed=arguments.seed,
        time_budget=time_budget,
    )
    settings = _settings(arguments, time_budget)
    return rows, settings, "\n".join(filter(None, [summary(rows), time_budget.note()]))


def run_kernels(arguments: argparse.Namespace) -> Outcome:
    """`kernels`."""
    from . import kernels
    from .registry import REGISTRY

    place = _place(arguments)
    ceilings = kernels.measure_ceilings(place) if place.type == "cuda" else None
    rows = kernels.run(
        arguments.cases or tuple(REGISTRY),
        shapes=lambda label: arguments.shapes is None or arguments.shapes in label,
        device=place,
        dtype=getattr(torch, arguments.dtype),
        ceilings=ceilings,
        effort=Effort(
            warmup_s=0.005 if arguments.quick else 0.02, rounds=5 if arguments.quick else 20
        ),
        seed=arguments.seed,
    )
    found = {"copy_gbps": ceilings.gbps, "gemm_tflops": ceilings.tflops} if ceilings else None
    return rows, {"ceilings": found, "seed": arguments.seed}, kernels.summary(rows)


def run_capture(arguments: argparse.Namespace) -> Outcome:
    """`capture`."""
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


def run_images(arguments: argparse.Namespace) -> Outcome:
    """`images`."""
    from . import images

    names = arguments.towers or tuple(images.TOWERS)
    if unknown := sorted(set(names) - set(images.TOWERS)):
        raise ValueError(
            f"bench: tower {', '.join(unknown)} is not known; use {', '.join(images.TOWERS)}"
        )
    time_budget = TimeBudget(arguments.budget_s)
    rows = images.run(
        {name: images.TOWERS[name] for name in names},
        arguments.workloads,
        arguments.providers or images.PROVIDERS,
        device=_place(arguments),
        dtype=getattr(torch, arguments.dtype),
        effort=QUICK if arguments.quick else Effort(),
        seed=arguments.seed,
        time_budget=time_budget,
    )
    settings = {"dtype": arguments.dtype, "seed": arguments.seed, **time_budget.to_json()}
    return rows, settings, "\n".join(filter(None, [images.summary(rows), time_budget.note()]))


def run_breakdown(arguments: argparse.Namespace) -> Outcome:
    """`breakdown`."""
    from . import breakdown
    from .towers_config import DEFAULT_TOWERS
    from .workloads import resolve

    rows = breakdown.run(
        arguments.towers or DEFAULT_TOWERS,
        resolve(arguments.workloads or ["img224"], arguments.seed),
        rounds=10 if arguments.quick else 40,
        attention=arguments.attention,
        precision=arguments.precision,
        seed=arguments.seed,
    )
    settings = {"seed": arguments.seed, "dtype": "bfloat16", "precision": arguments.precision}
    return rows, settings, breakdown.summary(rows)


def run_packing(_: argparse.Namespace) -> Outcome:
    """`packing`."""
    from . import packing

    rows = packing.waste_rows()
    return rows, {}, packing.summary(rows)


def run_tune(arguments: argparse.Namespace) -> Outcome:
    """`tune`."""
    from . import tune

    patches = arguments.rows or tune.PATCHES
    time_budget = TimeBudget(arguments.budget_s)
    result = tune.run_here(arguments.shapes or (), patches, time_budget=time_budget)
    text = tune.printed_table(result) if arguments.print else tune.summary(result)
    return result.rows, {**tune.settings(result, patches), **time_budget.to_json()}, text


def run_products(arguments: argparse.Namespace) -> Outcome:
    """`products`."""
    from . import products
    from .towers_config import DEFAULT_TOWERS

    time_budget = TimeBudget(arguments.budget_s)
    rows = products.run(
        arguments.towers or DEFAULT_TOWERS,
        arguments.rows or products.DEFAULT_ROWS,
        images=arguments.images,
        only=arguments.layers or products.LAYERS,
        turns=arguments.turns,
        seed=arguments.seed,
        time_budget=time_budget,
    )
    settings = {"dtype": "bfloat16", "seed": arguments.seed, **time_budget.to_json()}
    return rows, settings, "\n".join(filter(None, [products.summary(rows), time_budget.note()]))


MEASURING: Mapping[str, Callable[[argparse.Namespace], Outcome]] = {
    "towers": run_towers,
    "peers": run_peers,
    "scaling": run_scaling,
    "kernels": run_kernels,
    "capture": run_capture,
    "breakdown": run_breakdown,
    "images": run_images,
    "packing": run_packing,
    "tune": run_tune,
    "products": run_products,
}


def plot(arguments: argparse.Namespace) -> str:
    """`plot`: the files that were written."""
    from .plots import write_plots

    return "\n".join(map(str, write_plots(arguments.files, arguments.output)))


def readme(arguments: argparse.Namespace) -> str:
    """`readme`: Markdown."""
    from .readme_table import readme_table, readme_tables

    if arguments.plain_file is None:
        return readme_table(arguments.file)
    return readme_tables(arguments.file, arguments.plain_file)


def digest(arguments: argparse.Namespace) -> str:
    """`digest`: sha256 of the sources here, or of a commit."""
    from .provenance import commit_digest, source_digest

    if arguments.commit is None:
        return source_digest()
    found = commit_digest(arguments.commit)
    if found is None:
        raise ValueError(
            f"bench: digest {arguments.commit}: the history beside these sources holds no such "
            "commit; run it in a clone that does"
        )
    return found


PRINTING: Mapping[str, Callable[[argparse.Namespace], str]] = {
    "plot": plot,
    "readme": readme,
    "digest": digest,
}


def _at_workloads(arguments: argparse.Namespace, providers: list[str]) -> Outcome:
    from . import towers
    from .contest import summary
    from .towers_config import DEFAULT_TOWERS
    from .workloads import WORKLOADS, resolve

    time_budget = TimeBudget(arguments.budget_s)
    rows = towers.run(
        arguments.towers or DEFAULT_TOWERS,
        resolve(arguments.workloads or list(WORKLOADS), arguments.seed),
        providers,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        budgets=arguments.budgets,
        attention=_attention(arguments),
        effort=QUICK if arguments.quick else Effort(),
        seed=arguments.seed,
        time_budget=time_budget,
    )
    settings = {"budgets": arguments.budgets, **_settings(arguments, time_budget)}
    return rows, settings, "\n".join(filter(None, [summary(rows), time_budget.note()]))


def _place(arguments: argparse.Namespace) -> torch.device:
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _attention(arguments: argparse.Namespace) -> str | None:
    """Backend of ours that was asked for."""
    from .ours_providers import PLAIN

    return PLAIN if arguments.plain else arguments.attention


def _settings(arguments: argparse.Namespace, time_budget: TimeBudget) -> dict[str, Any]:
    return {
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "plain": arguments.plain,
        **time_budget.to_json(),
    }
