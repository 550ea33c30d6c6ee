"""Which products are tried for a tower's layers, and in what order.

A product runs under its neighbours, or in what they leave of caches and clocks, so the time of the
whole tower decides: layer after layer takes the candidate with which that is least while the others
stay as they are, several times over. The clock is an argument.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from ..kernels.cublaslt import Algorithm
from ..kernels.few_rows_tuning import (
    BLOCKS_N,
    GATED_BLOCKS_N,
    DeferredTiles,
    FewRowsConfig,
    deferred_tiles,
    few_rows_tile,
)
from ..kernels.gemm_few_rows import BLOCK_K
from ..kernels.gemm_tuning import GATED, RESIDUAL, HopperConfig, shipped_tiles
from ..kernels.pdl import FEW_ROWS
from ..kernels.rows import ceil_div
from .timing import TimeBudget
from .tune_library import LIBRARY, algorithm_name
from .tune_shapes import LinearShape

# a tile of gemm_few_rows.py or gemm_hopper.py, an algorithm of the library, or its own choice
Product = FewRowsConfig | HopperConfig | Algorithm | None
# and for a norm the tiles around it that leave it no kernel, or none
Candidate = Product | DeferredTiles
Choice = Mapping[str, Candidate]  # by layer

_BLOCKS_M = (64, 128)
_LEAST_STAGES, _MOST_STAGES = 3, 12
_MOST_PARTS = 8
_LEAST_STEPS = 3  # of a part
_WAVES = (0.5, 0.8, 1.0, 1.6)  # programs for each multiprocessor that cutting K aims at
_MOST_WAVES = 2  # programs for each multiprocessor, of a product in one part
_KIB = 1024
_ADDED = "added"  # to the stream in place, for a norm that follows
_NORM_BYTES = 8  # of vectors that a deferred norm has in fp32


@dataclass(frozen=True)
class Sweep:
    """One layer's turn.

    Attributes:
        layer: Its name.
        turn: Counted from 1.
        us: Microseconds of the tower with each candidate.
        reasons: Why the others have none.
        chosen: What the layer keeps until its next turn.
    """

    layer: str
    turn: int
    us: Mapping[Candidate, float]
    reasons: Mapping[Candidate, str]
    chosen: Candidate


def candidate_name(candidate: Candidate) -> str:
    """An algorithm's name, or rows x columns, stages, groups or parts of K, and if it is fed."""
    if candidate is None:
        return LIBRARY
    if isinstance(candidate, tuple):
        return " + ".join(map(candidate_name, candidate))
    if isinstance(candidate, Algorithm):
        return algorithm_name(candidate)
    name = f"{candidate.block_m}x{candidate.block_n} s{candidate.num_stages}"
    if isinstance(candidate, HopperConfig):
        return f"{name} by 2"
    if candidate.splits > 1:
        name = f"{name} in {candidate.splits}"
    return f"{name} fed" if candidate.producer else name


def candidates(
    shape: LinearShape, rows: int, num_sms: int, algorithms: Sequence[Algorithm] = ()
) -> list[Candidate]:
    """The library, by its own choice and by `algorithms`, and all tiles that could be of use.

    Those of few rows are tried up to `FEW_ROWS`.
    """
    found: list[Candidate] = [None, *algorithms, *shipped_tiles(shape.epilogue)]
    if rows > FEW_ROWS:
        return found
    found.append(few_rows_tile(rows, *shape.key))
    found += _few_rows(shape, rows, num_sms)
    return list(dict.fromkeys(found))


def deferred_candidates(shape: LinearShape, rows: int, num_sms: int) -> list[Candidate]:
    """A kernel for the norm in front of a layer of `shape`, or tiles of the products around it."""
    if rows > FEW_ROWS:
        return [None]
    before = _few_rows(LinearShape("", shape.K, shape.K, _ADDED), rows, num_sms)
    pairs = product(before, _few_rows(shape, rows, num_sms, _NORM_BYTES))
    return list(dict.fromkeys([None, deferred_tiles(rows, *shape.key), *pairs]))


def _few_rows(
    shape: LinearShape, rows: int, num_sms: int, column_bytes: int = 0
) -> list[FewRowsConfig]:
    """Tiles of few rows; `column_bytes` of shared memory are more than others need a column."""
    found = []
    for block_m in _BLOCKS_M[: ceil_div(rows, 64)]:
        for block_n in BLOCKS_N:
            if shape.epilogue == GATED and block_n not in GATED_BLOCKS_N:
                continue  # no two halves
            tiles = ceil_div(rows, block_m) * ceil_div(shape.N, block_n)
            for splits in _parts(shape, tiles, num_sms):
                most = partial(_stages, shape, block_m, block_n, splits, column_bytes)
                depths = _depths(most, ceil_div(tiles * splits, num_sms))
                found += [
                    FewRowsConfig(block_m, block_n, depth, splits, producer)
                    for depth, producer in product(depths, (False, True))
                ]
    return found


def descend(
    layers: Mapping[str, Sequence[Candidate]],
    measure: Callable[[Choice], float],
    *,
    turns: int,
    time_budget: TimeBudget,
    label: str = "",
    log: Callable[[Sweep], None] = lambda sweep: None,
) -> list[Sweep]:
    """Exchange one layer after another, from the library's own choice for all of them.

    Args:
        layers: Candidates by layer.
        measure: Microseconds of the tower with a candidate for each layer. What it raises is the
            reason why the candidate has no time.
        turns: Of each layer.
        time_budget: Asked before each turn of a layer.
        label: What `time_budget` is told, before the layer.
        log: Takes each sweep.
    """
    current: dict[str, Candidate] = dict.fromkeys(layers)
    sweeps: list[Sweep] = []
    for turn in range(1, turns + 1):
        for layer, tried in layers.items():
            if not time_budget.allows(f"{label} {layer} turn {turn}".strip()):
                continue
            us: dict[Candidate, float] = {}
            reasons: dict[Candidate, str] = {}
            for candidate in tried:
                # a table of many goes on when one fails, and its row carries the failure
                try:
                    us[candidate] = measure({**current, layer: candidate})
                except Exception as error:
                    reasons[candidate] = f"{type(error).__name__}: {error}".partition("\n")[0]
            current[layer] = min(us, key=us.__getitem__, default=current[layer])
            sweeps.append(Sweep(layer, turn, us, reasons, current[layer]))
            log(sweeps[-1])
    return sweeps


def _parts(shape: LinearShape, tiles: int, num_sms: int) -> list[int]:
    """Numbers of parts of K that are worth a try with so many tiles."""
    if shape.epilogue != RESIDUAL:
        return [1] if tiles <= _MOST_WAVES * num_sms else []
    most = max(1, min(_MOST_PARTS, ceil_div(shape.K, BLOCK_K) // _LEAST_STEPS))
    return sorted({min(most, max(1, round(waves * num_sms / tiles))) for waves in _WAVES})


def _depths(most: Callable[[int], int], resident: int) -> set[int]:
    """Stages that leave room for a multiprocessor's `resident` programs, or for one more.

    That may be the first of the next kernel. Where so many have only shallow pipelines, one program
    after the other. `most` are the stages with so many programs.
    """
    depths = {most(min(programs, 3)) for programs in (resident, resident + 1)}
    return {depth for depth in depths if depth >= _LEAST_STAGES} or {most(1)}


def _stages(
    shape: LinearShape, block_m: int, block_n: int, splits: int, column_bytes: int, programs: int
) -> int:
    """The deepest ring with which so many programs fit a multiprocessor of 228 KiB."""
    room = (228 // programs - 1) * _KIB  # each program takes one more
    room -= _KIB + column_bytes * block_n  # barriers and vectors over its columns
    if shape.epilogue == _ADDED:
        room -= block_m * block_n * 2  # of the stream
    steps = ceil_div(ceil_div(shape.K, BLOCK_K), splits)
    return min(room // ((block_m + block_n) * BLOCK_K * 2), steps, _MOST_STAGES)
