"""The `vitgraph` command: embed, info, tune, bench.

Exit status: 0 done, 1 some inputs failed, 2 the command could not start. Results go to stdout,
progress and errors to stderr. torch is imported by the commands that need it, not by `--help`.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .graph_options import (
    BudgetsOption,
    BytesOption,
    CalibrateOption,
    FramesOption,
    GraphsOption,
    ItemsOption,
    ModalityOption,
    NvtxOption,
    SlotsOption,
    graph_choice,
    in_options,
)

EXTRAS = {
    "fa4": (
        "no speed on Hopper, where our kernel took 0.6 to 1.1 of its time at the lengths "
        "measured, and used only with --attention fa4; taken by itself on GPUs that our kernel "
        "does not run on, and not measured there"
    ),
    "flash": "no speed by itself: used only with --attention fa2, and not measured here",
}

app = typer.Typer(
    help="Vision encoders of Hugging Face VLMs, fused and replayed as CUDA graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app(prog_name="vitgraph")


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or 'demo' (random weights).")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="Images and videos, or folders of them.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="FILE.safetensors, FILE.npy or FILE.parquet.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items in one call of the tower.")] = 32,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode. [default: cores, up to 8]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first inputs.")] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="mean, max, tokens for all of them, or the head of the tower. "
            "[default: head in a tower that has one, else mean]",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale embeddings to length 1.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Blocks to pool as well, such as 3,7,-1.")
    ] = None,
    pruning_rate: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the tokens of videos to drop, such as 0.5: those most like the frame "
            "before. [default: keep all]",
            show_default=False,
        ),
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Search folders below folders.")] = True,
    glob: Annotated[str | None, typer.Option(help="Names that count in folders: '*.png'.")] = None,
    local_files_only: Annotated[bool, typer.Option(help="Never ask the Hub.")] = False,
    graphs: GraphsOption = None,
    token_budgets: BudgetsOption = None,
    max_vision_items_per_batch: ItemsOption = None,
    max_frames_per_batch: FramesOption = None,
    modality: ModalityOption = None,
    num_slots: SlotsOption = None,
    calibrate: CalibrateOption = False,
    max_bytes: BytesOption = None,
    nvtx: NvtxOption = False,
    attention: Annotated[str | None, typer.Option(help="Backend, see `vitgraph info`.")] = None,
    precision: Annotated[
        str, typer.Option(help="native, or fp8 for most linear layers of a bfloat16 tower.")
    ] = "native",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log what happens.")] = False,
) -> None:
    """Write one embedding for each image and video.

    Folders are searched for known suffixes, in sorted order; hidden files do not count. An input
    that cannot be used is reported and left out, and the exit status is then 1.
    """
    _configure_logging(quiet, verbose)
    with _usage_errors():
        from .writers import check_output, run_metadata, write_embeddings

        blocks = _parse_layers(layers)
        check_output(output, ragged=pool == "tokens", layers=blocks is not None)
        paths = _find_inputs(inputs, recursive, glob)[:limit]

        from .embedder import POOLS, Embedder
        from .pruning import check_rate

        if pool is not None and pool not in POOLS:
            raise ValueError(f"--pool {pool}: choose from {', '.join(POOLS)}")
        check_rate("--pruning-rate", pruning_rate)
        choice = graph_choice(
            graphs,
            device=device,
            layers=blocks is not None,
            token_budgets=token_budgets,
            max_vision_items_per_batch=max_vision_items_per_batch,
            max_frames_per_batch=max_frames_per_batch,
            modality=modality,
            num_slots=num_slots,
            calibrate=calibrate,
            max_bytes=max_bytes,
            nvtx=nvtx,
        )
        embedder = Embedder.from_pretrained(
            model,
            dtype=dtype,
            device=device,
            revision=revision,
            local_files_only=local_files_only,
            attention=attention,
            precision=precision,
            graphs=choice,
            pruning=pruning_rate is not None,
        )
        encoder = embedder.encoder
        pooling, checked = embedder.choices(pool, blocks, pruning_rate)

    with _out_of_memory():
        result = embedder.encode(
            paths,
            batch_size=batch_size,
            num_workers=num_workers,
            pool=pooling,
            normalize_embeddings=normalize,
            layers=blocks,
            pruning_rate=pruning_rate,
            on_error="skip",
            show_progress_bar=not quiet,
        )
    for error in embedder.errors:
        typer.echo(f"error: {error.message}", err=True)
    skipped = {error.index for error in embedder.errors}
    names = [str(path) for index, path in enumerate(paths) if index not in skipped]
    if not names:
        typer.echo(f"error: none of {len(paths)} inputs could be used; nothing written", err=True)
        raise typer.Exit(1)
    embeddings, by_layer = (result, None) if blocks is None else result
    metadata = run_metadata(
        model=model,
        revision=encoder.revision,
        dtype=str(encoder.dtype).removeprefix("torch."),
        precision=encoder.precision,
        pooling=pooling,
        normalized=normalize,
        layers=checked,
        pruning_rate=pruning_rate,
    )
    try:
        write_embeddings(output, names, embeddings, metadata, by_layer)
    except (OSError, ValueError) as error:
        _fail(f"output {output}: {getattr(error, 'strerror', None) or error}", 1)
    if not quiet:
        width = embeddings[0].shape[-1]
        tail = f", {len(skipped)} failed" if skipped else ""
        typer.echo(f"{output}: {len(names)} embeddings of width {width}{tail}")
    if skipped:
        raise typer.Exit(1)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Hub id, folder, or 'demo'.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    local_files_only: Annotated[bool, typer.Option(help="Never ask the Hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the device, versions, attention backends, families, and what a model's tower is."""
    with _usage_errors():
        from .writers import package_versions

        report: dict[str, Any] = {
            "device": _device_name(),
            "versions": package_versions(),
            "attention": _attention_backends(),
            "families": _families(),
            "extras": EXTRAS,
            "matrix_products": _launch_table(),
            "towers": _towers(),
        }
        if model is not None:
            report["model"] = model
            report["spec"] = _spec(model, revision, local_files_only)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"device  {report['device']}")
    for name, version in report["versions"].items():
        typer.echo(f"{name}  {version or 'not installed'}")
    typer.echo("attention backends")
    for name, reason in report["attention"].items():
        typer.echo(f"  {name}  {'available' if reason is None else reason}")
    typer.echo("families with fused kernels")
    for name, models in report["families"].items():
        typer.echo(f"  {name}  {models}")
    typer.echo("what an extra gains")
    for name, gain in EXTRAS.items():
        typer.echo(f"  vitgraph[{name}]  {gain}")
    typer.echo(f"launch table of matrix products  {report['matrix_products']}")
    typer.echo("vision towers")
    for name, tier in report["towers"].items():
        typer.echo(f"  {name}  {tier}")
    if model is not None:
        typer.echo(f"{model}")
        for name, value in report["spec"].items():
            typer.echo(f"  {name}  {value}")


@app.command()
def tune(
    shapes: Annotated[
        list[str] | None,
        typer.Option(help="Only layers whose label holds this, such as qwen3-vl-8b; repeatable."),
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(help="Seconds after which no further layer is begun.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
) -> None:
    """Measure which matrix products are fastest on this GPU, and keep the table for later runs.

    It replaces an earlier one of this GPU and these versions, and stands before the shipped tables,
    that of few rows too, for the layers that were measured. (Norms that take no kernel in some
    forwards of few rows stay so, with the tiles that are shipped.) `vitgraph info` says which is in
    use.
    """
    with _usage_errors():
        from ..bench.timing import TimeBudget
        from ..bench.tune import tune_this_gpu

        def log(line: str) -> None:
            if not quiet:
                typer.echo(line, err=True)

        path, result = tune_this_gpu(shapes or (), time_budget=TimeBudget(budget_s), log=log)
    for label in result.unmeasured:
        typer.echo(f"not measured: {label}", err=True)
    if not quiet:
        typer.echo(f"{path}: {len(result.table)} layers")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure towers, scaling, kernels and capture, plot results; `vitgraph bench --help`."""
    from ..bench.__main__ import main as run

    raise typer.Exit(run(context.args) or 0)


def _find_inputs(inputs: list[Path], recursive: bool, glob: str | None) -> list[Path]:
    """Files as given, and those in folders."""
    from .media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        pattern = glob or "*"
        inside = sorted(
            file
            for file in (path.rglob(pattern) if recursive else path.glob(pattern))
            if file.suffix.lower() in known
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not inside:
            named = f" that match {glob!r}" if glob else ""
            raise ValueError(f"{path}: no images or videos{named} in this folder")
        found += inside
    return found


def _parse_layers(layers: str | None) -> list[int] | None:
    if layers is None:
        return None
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"--layers {layers}: give block indices such as 3,7,-1") from error


def _spec(model: str, revision: str | None, local_files_only: bool) -> dict[str, Any]:
    if model == "demo":
        from .demo import demo_encoder

        return demo_encoder("cpu").spec.to_dict()
    from .checkpoint import Checkpoint
    from .load import tower_spec

    checkpoint = Checkpoint.open(model, revision=revision, local_files_only=local_files_only)
    return tower_spec(checkpoint).to_dict()


def _device_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _attention_backends() -> dict[str, str | None]:
    from ..kernels.attention import backend_report

    return backend_report()


def _towers() -> dict[str, str]:
    from .towers import tower_report

    lines = {}
    for support in tower_report():
        notes = [support.reason] if support.reason else []
        if not support.is_installed:
            notes.append("not in the installed transformers")
        lines[support.tower_class] = support.tier + (": " + "; ".join(notes) if notes else "")
    return lines


def _families() -> dict[str, str]:
    from .families import FAMILIES

    return {name: family.models for name, family in FAMILIES.items()}


def _launch_table() -> str:
    import torch

    from ..kernels.tables import tuning_report

    return tuning_report(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _configure_logging(quiet: bool, verbose: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vitgraph").setLevel(level)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Errors of arguments, the model or the machine: one line, exit status 2."""
    try:
        yield
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        logging.getLogger("vitgraph").info("usage error", exc_info=True)
        _fail(" ".join(in_options(str(error)).split()), 2)


@contextmanager
def _out_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first_line = str(error).split(". ")[0]
        _fail(f"{first_line}; lower --batch-size", 1)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
