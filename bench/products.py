"""Which products make a captured tower fastest: what kernels/few_rows_tuning.py rests on.

Images fill a graph of so many rows. Each candidate of each layer is checked against the definition
by itself; then the tower is captured with it, and a time is the median of replays. Nothing is
stored: the tables are code.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..capture.graph import CudaGraphRecorder, Recorder, paused_gc
from ..encoder.vision_encoder import VisionEncoder
from ..kernels.cublaslt import Algorithm
from ..kernels.few_rows_tuning import FewRowsConfig
from ..kernels.gated_linear import gated_linear
from ..kernels.gemm import gemm, hopper_reason
from ..kernels.gemm_few_rows import launch, linear_partials
from ..kernels.gemm_tuning import GATED, RESIDUAL, ROTATED, HopperConfig, shipped_tiles
from ..kernels.launch import compiling
from ..kernels.library_linear import library_linear
from ..kernels.residual import residual
from ..kernels.rows import num_sms
from ..kernels.tables import tuning
from .deferred_contest import DeferredOperands
from .ours_providers import encoder_of
from .product_search import (
    Candidate,
    Choice,
    Product,
    Sweep,
    candidate_name,
    candidates,
    deferred_candidates,
    descend,
)
from .report import number, table
from .timing import Effort, TimeBudget, time_graphs
from .towers_config import build_tower, tower_config
from .tune_contest import MAX_ERR_RATIO, LinearOperands
from .tune_library import LIBRARY
from .tune_shapes import LinearShape, layers

DEFAULT_ROWS = (128, 256)
LAYERS = ("qkv", "proj", "up", "down")
NORM = "norm2"  # between `proj` and `up`, which have the tiles of deferred_norm.py without it
TURNS = 2
_EFFORT = Effort(warmup_s=0.005, rounds=15, min_rounds=15)

Row = dict[str, Any]


def run(
    towers: Sequence[str],
    rows: Sequence[int] = DEFAULT_ROWS,
    *,
    images: int = 1,
    only: Sequence[str] = LAYERS,
    turns: int = TURNS,
    seed: int = 0,
    time_budget: TimeBudget | None = None,
) -> list[Row]:
    """A row for each turn of each layer of each tower, at each number of rows.

    Args:
        towers: Names of towers.
        rows: Patches of all images, all of them live.
        images: Images of one size that share them.
        only: Layers of `LAYERS` that are exchanged, beside a norm that is a kernel; the others keep
            what the tables name. Or `NORM` alone, whose library stands for that kernel.
        turns: Of each layer.
        seed: Of weights and pixels.
        time_budget: Asked before each turn of a layer; None for no limit.

    Raises:
        ValueError: there is no GPU that our kernels run on, an unknown tower or layer, no turn, or
            a number of rows that so many images of one size cannot have.
    """
    for name in towers:
        tower_config(name)
    bad = [count for count in rows if images < 1 or count < 1 or count % (4 * images)]
    if bad or not rows:
        raise ValueError(
            f"products: rows {bad or list(rows)} must be multiples of 4 for each of {images} images"
        )
    if unknown := [name for name in only if name not in (*LAYERS, NORM)]:
        raise ValueError(
            f"products: layer {', '.join(unknown)} is not known; use {', '.join(LAYERS)} or {NORM}"
        )
    if NORM in only and len(only) > 1:
        raise ValueError(
            f"products: layer {NORM} has the tiles of proj and up, so it is exchanged alone; got "
            f"{', '.join(only)}"
        )
    if turns < 1:
        raise ValueError(f"products: turns = {turns} must be at least 1")
    if not torch.cuda.is_available():
        raise ValueError("products: measuring needs a CUDA device, and there is none")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        raise ValueError(f"products: there is nothing to measure here, as our kernel: {reason}")
    time_budget = time_budget or TimeBudget()
    found: list[Row] = []
    recorder = CudaGraphRecorder(device)
    for name in towers:
        hf = build_tower(name, device=device, dtype=torch.bfloat16, seed=seed)
        encoder = encoder_of(hf, tower_config(name).spec)
        for count in rows:
            tower = CapturedTower(encoder, recorder, count, images, seed)
            tried = {
                layer: candidates(shape, count, num_sms(device), tower.algorithms(layer))
                for layer, shape in tower.shapes.items()
                if layer in only
            }
            if NORM in only:
                tried[NORM] = deferred_candidates(tower.shapes["up"], count, num_sms(device))
            tower.compile(tried)
            in_force = tower.us({})
            sweeps = descend(
                tried, tower.us, turns=turns, time_budget=time_budget,
                label=f"{name} {count} rows", log=partial(_log, name, count),
            )  # fmt: skip
            found += [
                row_of(name, count, images, in_force, tower.shapes[_product_of(sweep)], sweep)
                for sweep in sweeps
            ]
    return found


def row_of(
    tower: str, rows: int, images: int, in_force: float, shape: LinearShape, sweep: Sweep
) -> Row:
    """What the JSON says of one turn of a layer; candidates by `candidate_name`.

    `in_force` are the microseconds of the tower by the tables as they are.
    """
    return {
        "tower": tower,
        "rows": rows,
        "images": images,
        "tables_us": in_force,
        "layer": sweep.layer,
        "turn": sweep.turn,
        "N": shape.N,
        "K": shape.K,
        "epilogue": shape.epilogue,
        "us": {candidate_name(tried): us for tried, us in sweep.us.items()},
        "reasons": {candidate_name(tried): reason for tried, reason in sweep.reasons.items()},
        "chosen": candidate_name(sweep.chosen),
        "config": _plain(sweep.chosen),
    }


def _product_of(sweep: Sweep) -> str:
    """The layer whose shape stands for a sweep: that behind a norm for the norm."""
    return "up" if sweep.layer == NORM else sweep.layer


def _plain(candidate: Candidate) -> Any:
    if isinstance(candidate, tuple):
        return [asdict(tile) for tile in candidate]
    return None if candidate is None else asdict(candidate)


def summary(rows: Sequence[Row], most: int = 3) -> str:
    """For each layer the tower's time by the tables, the library's own choice and the best."""
    last = {(row["tower"], row["rows"], row["layer"]): row for row in rows}
    header = ["us of the tower", "tables", "layer", "turn", LIBRARY]
    header += [cell for i in range(1, most + 1) for cell in (f"best {i}", "us")]
    lines = []
    for (tower, count, layer), row in last.items():
        best = sorted((us, name) for name, us in row["us"].items() if name != LIBRARY)
        cells = [cell for us, name in best[:most] for cell in (name, number(us, 4))]
        cells += ["-"] * (2 * most - len(cells))
        library = number(row["us"].get(LIBRARY), 4)
        tables = number(row["tables_us"], 4)
        lines.append([f"{tower} {count} rows", tables, layer, row["turn"], library, *cells])
    reasons = {
        f"{row['tower']} {row['rows']} rows {row['layer']} {name}: {reason}"
        for row in rows
        for name, reason in row["reasons"].items()
    }
    return "\n".join([table(header, lines), *sorted(reasons)])


class CapturedTower:
    """One tower at one number of rows, captured anew for every choice of products."""

    def __init__(
        self, encoder: VisionEncoder, recorder: Recorder, rows: int, images: int, seed: int
    ):
        """Static inputs of a graph that `images` of together `rows` patches fill.

        Raises:
            ValueError: the image is so thin that a graph has no room for its windows.
        """
        device, spec = encoder.device, encoder.spec
        self._encoder = encoder
        self._rows = rows
        image = image_of(rows // images, spec.merge_size)
        self._limits = encoder.rung_limits(rows // spec.patches_per_token, images, images)
        num_windows = sum(item.num_windows for item in encoder.item_specs([image] * images))
        if num_windows > self._limits.max_windows:
            raise ValueError(
                f"products: {images} x {rows // images} patches, {image[1]} x {image[2]}, have "
                f"{num_windows} windows, and the graph holds {self._limits.max_windows}; "
                "choose rows of which a quarter has more divisors"
            )
        self._inputs = _zeros(encoder.input_specs(self._limits), device)
        self._outputs = _zeros(encoder.output_specs(self._limits), device)
        generator = torch.Generator(device).manual_seed(seed)
        self._inputs["pixel_values"].normal_(generator=generator)
        self._inputs["grid"].copy_(torch.tensor([image] * images, dtype=torch.int32))
        self._recorder = recorder
        self._checked: dict[tuple[str, Candidate], float] = {}
        found = layers(spec)
        self.shapes = {name: found[name] for name in LAYERS}
        self._operands = {
            name: LinearOperands(shape, rows, device, encoder.dtype)
            for name, shape in self.shapes.items()
        }
        self._deferred = DeferredOperands(
            self._operands["proj"], self._operands["up"], spec.norm, spec.eps
        )

    def algorithms(self, layer: str) -> list[Algorithm]:
        """Those of the library that are worth a try."""
        operands = self._operands[layer]
        return [] if operands.is_gated else operands.algorithms()

    def compile(self, tried: Mapping[str, Sequence[Candidate]]) -> None:
        """Compile the kernels of all candidates, several at a time."""
        with compiling():
            for layer, several in tried.items():
                for candidate in several:
                    with self._tables({layer: candidate}):
                        self._forward()

    @torch.inference_mode()
    def us(self, choice: Choice) -> float:
        """Microseconds of a replay.

        Raises:
            ValueError: a candidate of `choice` is not as accurate as plain PyTorch.
        """
        for layer, candidate in choice.items():
            if candidate is not None and not self._error(layer, candidate) <= MAX_ERR_RATIO:
                raise ValueError(
                    f"error is {self._error(layer, candidate):.3g} times plain PyTorch's own"
                )
        with self._tables(choice), paused_gc(collect=False):
            self._recorder.warm_up(self._forward)
            graph = self._recorder.record(self._forward, self._recorder.new_pool())
        return time_graphs({"tower": (graph, 1)}, _EFFORT)["tower"].ms * 1e3

    def _forward(self) -> None:
        self._encoder.graph_forward(self._inputs, self._outputs, self._limits)

    def _error(self, layer: str, candidate: Candidate) -> float:
        if (layer, candidate) not in self._checked:
            if isinstance(candidate, tuple):
                error = self._deferred.check(candidate)
            else:
                product = partial(_product, candidate, self.shapes[layer].epilogue)
                error = self._operands[layer].check(product)
            self._checked[layer, candidate] = error
        return self._checked[layer, candidate]

    @contextmanager
    def _tables(self, choice: Choice) -> Iterator[None]:
        """The tables in force, but for what `choice` names instead."""
        tables = tuning(self._encoder.device)
        in_force = tables.few_rows, tables.table, tables.library, tables.deferred
        few_rows, table, library = dict(tables.few_rows), dict(tables.table), dict(tables.library)
        deferred = dict(tables.deferred)
        if choice:
            deferred[self.shapes["up"].key] = ()
        for layer, candidate in choice.items():
            if layer == NORM:
                if isinstance(candidate, tuple):
                    deferred[self.shapes["up"].key] = ((self._rows, candidate),)
                continue
            shape = self.shapes[layer]
            keys = [shape.key]
            if layer == "qkv":  # whether it rotates or not
                keys.append((shape.N, shape.K, ROTATED))
            for key in keys:
                few_rows[key] = table[key] = ()
                if isinstance(candidate, FewRowsConfig):
                    few_rows[key] = ((self._rows, candidate),)
                elif candidate in shipped_tiles(key[2]):
                    table[key] = ((1, candidate),)
            if shape.epilogue != GATED:  # no algorithm is tried there
                library[shape.library_key] = ()
            if isinstance(candidate, Algorithm):
                library[shape.library_key] = ((self._rows, candidate),)
        tables.few_rows, tables.table, tables.library = few_rows, table, library
        tables.deferred = deferred
        try:
            yield
        finally:
            tables.few_rows, tables.table, tables.library, tables.deferred = in_force


def image_of(rows: int, merge: int) -> tuple[int, int, int]:
    """The grid of one frame of so many patches that is nearest to a square."""
    tokens = rows // merge**2
    height = max(h for h in range(1, tokens + 1) if h * h <= tokens and tokens % h == 0)
    return 1, height * merge, tokens // height * merge


def _product(
    candidate: Product, epilogue: str, x, weight, bias, *, live_rows, **options: Any
) -> None:
    """One layer as a forward computes it with `candidate`, parts added up."""
    if candidate is None or isinstance(candidate, Algorithm):
        library_linear(x, weight, bias, live_rows=live_rows, algorithm=candidate, **options)
    elif epilogue == GATED:
        backend = "hopper" if isinstance(candidate, HopperConfig) else "few_rows"
        place = {"backend": backend, "config": candidate, "live_rows": live_rows}
        gated_linear(x, weight, bias, out=options["out"], **place)
    elif isinstance(candidate, HopperConfig):
        gemm(x, weight, bias, live_rows=live_rows, config=candidate, **options)
    else:
        _few_rows(candidate, epilogue, x, weight, bias, live_rows=live_rows, **options)


def _few_rows(
    tile: FewRowsConfig, epilogue: str, x, weight, bias, *, live_rows, **options: Any
) -> None:
    if epilogue == RESIDUAL:
        partials = linear_partials(x, weight, config=tile, live_rows=live_rows)
        stream = options["residual"]
        residual(stream, None, live_rows=live_rows, partials=partials, out=stream)
    else:
        activation = options["activation"]
        launch(x, weight, bias, options["out"], live_rows, activation=activation, config=tile)


def _zeros(specs: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(s.shape, dtype=s.dtype, device=device) for n, s in specs.items()}


def _log(tower: str, rows: int, sweep: Sweep) -> None:
    best = sorted((us, candidate_name(tried)) for tried, us in sweep.us.items())[:4]
    cells = ", ".join(f"{name} {us:.1f}" for us, name in best)
    place = f"{tower} {rows} rows, turn {sweep.turn}, {sweep.layer}"
    print(f"{place}  us: {cells or 'none'}", file=sys.stderr, flush=True)
