"""Which tiles make a captured tower of few rows fastest: what kernels/few_rows_tuning.py rests on.

One image fills a graph of so many rows. Each candidate of each layer is checked against the
definition by itself; then the tower is captured with it, and a time is the median of replays.
Nothing is stored: the table is code.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..encoder.vision_encoder import VisionEncoder
from ..kernels.few_rows_tuning import FewRowsConfig
from ..kernels.gated_linear import gated_linear
from ..kernels.gemm import hopper_reason
from ..kernels.gemm_few_rows import launch, linear_partials
from ..kernels.gemm_tuning import GATED, RESIDUAL
from ..kernels.launch import compiling
from ..kernels.pdl import FEW_ROWS
from ..kernels.residual import residual
from ..kernels.rows import num_sms
from ..kernels.tables import tuning
from .few_rows_search import Choice, Sweep, Tile, candidates, descend, tile_name
from .ours_providers import encoder_of
from .report import number, table
from .timing import Effort, TimeBudget, record, time_graphs
from .towers_config import build_tower, tower_config
from .tune_contest import MAX_ERR_RATIO, LinearOperands
from .tune_shapes import LinearShape, layers

DEFAULT_ROWS = (128, 256)
LAYERS = ("qkv", "proj", "up", "down")
TURNS = 2
_EFFORT = Effort(warmup_s=0.005, rounds=15, min_rounds=15)

Row = dict[str, Any]


def run(
    towers: Sequence[str],
    rows: Sequence[int] = DEFAULT_ROWS,
    *,
    only: Sequence[str] = LAYERS,
    turns: int = TURNS,
    seed: int = 0,
    time_budget: TimeBudget | None = None,
) -> list[Row]:
    """A row for each turn of each layer of each tower, at each number of rows.

    Args:
        towers: Names of towers.
        rows: Patches in the image, all of them live.
        only: Layers of `LAYERS` that are exchanged; the others keep what the tables name.
        turns: Of each layer.
        seed: Of weights and pixels.
        time_budget: Asked before each turn of a layer; None for no limit.

    Raises:
        ValueError: there is no GPU that the kernel runs on, an unknown tower or layer, no turn, or
            a number of rows that no image has or for which no kernel starts early.
    """
    for name in towers:
        tower_config(name)
    bad = [count for count in rows if count % 4 or not 0 < count <= FEW_ROWS]
    if bad or not rows:
        raise ValueError(
            f"few-rows: rows {bad or list(rows)} must be multiples of 4, from 4 to {FEW_ROWS}"
        )
    if unknown := [name for name in only if name not in LAYERS]:
        raise ValueError(
            f"few-rows: layer {', '.join(unknown)} is not known; use {', '.join(LAYERS)}"
        )
    if turns < 1:
        raise ValueError(f"few-rows: turns = {turns} must be at least 1")
    if not torch.cuda.is_available():
        raise ValueError("few-rows: measuring needs a CUDA device, and there is none")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := hopper_reason(device, torch.bfloat16):
        raise ValueError(f"few-rows: there is nothing to measure here, as our kernel: {reason}")
    time_budget = time_budget or TimeBudget()
    found: list[Row] = []
    for name in towers:
        hf = build_tower(name, device=device, dtype=torch.bfloat16, seed=seed)
        encoder = encoder_of(hf, tower_config(name).spec)
        for count in rows:
            tower = CapturedTower(encoder, count, seed)
            tried = {
                layer: candidates(shape, count, num_sms(device))
                for layer, shape in tower.shapes.items()
                if layer in only
            }
            tower.compile(tried)
            sweeps = descend(
                tried, tower.us, turns=turns, time_budget=time_budget,
                label=f"{name} {count} rows", log=partial(_log, name, count),
            )  # fmt: skip
            found += [row_of(name, count, tower.shapes[s.layer], s) for s in sweeps]
    return found


def row_of(tower: str, rows: int, shape: LinearShape, sweep: Sweep) -> Row:
    """What the JSON says of one turn of a layer; tiles by `tile_name`."""
    return {
        "tower": tower,
        "rows": rows,
        "layer": sweep.layer,
        "turn": sweep.turn,
        "N": shape.N,
        "K": shape.K,
        "epilogue": shape.epilogue,
        "us": {tile_name(tile): us for tile, us in sweep.us.items()},
        "reasons": {tile_name(tile): reason for tile, reason in sweep.reasons.items()},
        "chosen": tile_name(sweep.chosen),
        "config": None if sweep.chosen is None else asdict(sweep.chosen),
    }


def summary(rows: Sequence[Row], most: int = 3) -> str:
    """For each layer the tower's time without a tile and with the best ones, in its last turn."""
    last = {(row["tower"], row["rows"], row["layer"]): row for row in rows}
    header = ["us of the tower", "layer", "turn", "no tile"]
    header += [cell for i in range(1, most + 1) for cell in (f"tile {i}", "us")]
    lines = []
    for (tower, count, layer), row in last.items():
        best = sorted((us, name) for name, us in row["us"].items() if name != tile_name(None))
        cells = [cell for us, name in best[:most] for cell in (name, number(us, 4))]
        cells += ["-"] * (2 * most - len(cells))
        library = number(row["us"].get(tile_name(None)), 4)
        lines.append([f"{tower} {count} rows", layer, row["turn"], library, *cells])
    reasons = {
        f"{row['tower']} {row['rows']} rows {row['layer']} {name}: {reason}"
        for row in rows
        for name, reason in row["reasons"].items()
    }
    return "\n".join([table(header, lines), *sorted(reasons)])


class CapturedTower:
    """One tower at one number of rows, captured anew for every choice of tiles."""

    def __init__(self, encoder: VisionEncoder, rows: int, seed: int):
        """Static inputs of a graph that one image of `rows` patches fills.

        Raises:
            ValueError: the image is so thin that a graph has no room for its windows.
        """
        device, spec = encoder.device, encoder.spec
        self._encoder = encoder
        image = image_of(rows, spec.merge_size)
        self._limits = encoder.rung_limits(rows // spec.patches_per_token, 1, 1)
        (item,) = encoder.item_specs([image])
        if item.num_windows > self._limits.max_windows:
            raise ValueError(
                f"few-rows: the image of {rows} patches, {image[1]} x {image[2]}, has "
                f"{item.num_windows} windows, and its graph holds {self._limits.max_windows}; "
                "choose rows of which a quarter has more divisors"
            )
        self._inputs = _zeros(encoder.input_specs(self._limits), device)
        self._outputs = _zeros(encoder.output_specs(self._limits), device)
        generator = torch.Generator(device).manual_seed(seed)
        self._inputs["pixel_values"].normal_(generator=generator)
        self._inputs["grid"].copy_(torch.tensor([image], dtype=torch.int32))
        self._checked: dict[tuple[str, FewRowsConfig], float] = {}
        found = layers(spec)
        self.shapes = {name: found[name] for name in LAYERS}
        self._operands = {
            name: LinearOperands(shape, rows, device, encoder.dtype)
            for name, shape in self.shapes.items()
        }

    def compile(self, tried: Mapping[str, Sequence[Tile]]) -> None:
        """Compile the kernels of all candidates, several at a time."""
        with compiling():
            for layer, tiles in tried.items():
                for tile in tiles:
                    with self._table({layer: tile}):
                        self._forward()

    @torch.inference_mode()
    def us(self, choice: Choice) -> float:
        """Microseconds of a replay.

        Raises:
            ValueError: a tile of `choice` is not as accurate as plain PyTorch.
        """
        for layer, tile in choice.items():
            if tile is not None and not self._error(layer, tile) <= MAX_ERR_RATIO:
                raise ValueError(
                    f"error is {self._error(layer, tile):.3g} times plain PyTorch's own"
                )
        with self._table(choice):
            graph, _ = record(self._forward)
        return time_graphs({"tower": (graph, 1)}, _EFFORT)["tower"].ms * 1e3

    def _forward(self) -> None:
        self._encoder.graph_forward(self._inputs, self._outputs, self._limits)

    def _error(self, layer: str, tile: FewRowsConfig) -> float:
        if (layer, tile) not in self._checked:
            product = partial(_product, tile, self.shapes[layer].epilogue)
            self._checked[layer, tile] = self._operands[layer].check(product)
        return self._checked[layer, tile]

    @contextmanager
    def _table(self, choice: Choice) -> Iterator[None]:
        """The table in force, but what `choice` names instead, for every number of rows."""
        tables = tuning(self._encoder.device)
        in_force = tables.few_rows
        chosen = {
            self.shapes[layer].key: () if tile is None else ((FEW_ROWS, tile),)
            for layer, tile in choice.items()
        }
        tables.few_rows = {**in_force, **chosen}
        try:
            yield
        finally:
            tables.few_rows = in_force


def image_of(rows: int, merge: int) -> tuple[int, int, int]:
    """The grid of one frame of so many patches that is nearest to a square."""
    tokens = rows // merge**2
    height = max(h for h in range(1, tokens + 1) if h * h <= tokens and tokens % h == 0)
    return 1, height * merge, tokens // height * merge


def _product(
    tile: FewRowsConfig, epilogue: str, x, weight, bias, *, live_rows, **options: Any
) -> None:
    """One layer as a forward computes it with `tile`, parts added up."""
    if epilogue == RESIDUAL:
        partials = linear_partials(x, weight, config=tile, live_rows=live_rows)
        stream = options["residual"]
        residual(stream, None, live_rows=live_rows, partials=partials, out=stream)
    elif epilogue == GATED:
        place = {"backend": "few_rows", "config": tile, "live_rows": live_rows}
        gated_linear(x, weight, bias, out=options["out"], **place)
    else:
        activation = options["activation"]
        launch(x, weight, bias, options["out"], live_rows, activation=activation, config=tile)


def _zeros(specs: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(s.shape, dtype=s.dtype, device=device) for n, s in specs.items()}


def _log(tower: str, rows: int, sweep: Sweep) -> None:
    best = sorted((us, tile_name(tile)) for tile, us in sweep.us.items())[:4]
    cells = ", ".join(f"{name} {us:.1f}" for us, name in best)
    place = f"{tower} {rows} rows, turn {sweep.turn}, {sweep.layer}"
    print(f"{place}  us: {cells or 'none'}", file=sys.stderr, flush=True)
