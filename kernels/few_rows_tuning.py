"""Which products of few rows take the kernel of gemm_few_rows.py, as measured.

One NVIDIA H200, Triton 3.6.0, PyTorch 2.11.0 with CUDA 13.0, 2026-11-21 to 24, bf16. Such a
product takes a few microseconds, and how much of it hides under its neighbours decides. So these
are the tiles with which the captured tower as a whole was fastest, one layer after another
exchanged, as `python -m vitgraph.bench products` does; lastly by a script around the same code,
among tiles whose area is near the least that one wave allows, with both ways of loading: at every
number of rows that the ladder has from 288 to 1,024 (capture/budgets.py), at 192 and 1,152 (Qwen),
and at 224 (Qwen3-VL) or 256. Where two towers share a shape, the better one for both. A tile holds
down to the entry before, where its programs are fewer. Up to 128 rows a product was measured
behind or before its norm, by a script that is not here, or not at all. Past the last entry, and in
shapes without one, gemm_tuning.py and the library decide.

To measure again: `python -m vitgraph.bench products` exchanges them in a captured tower.
`vitgraph tune` measures them product by product on the user's GPU, and what it found stands before
this table (tables.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .gemm_tuning import GATED, RESIDUAL, ROTATED, of_class, one_of, read_table
from .rows import ceil_div

BLOCKS_N = (64, 128, 192, 256, 320, 384)  # that FewRowsConfig may have
# one half of a tile for the gate, in whole parts of 64 columns of both its powers of two
GATED_BLOCKS_N = (128, 256, 384)
_SHARED_BYTES = 227 << 10  # that a program may have on compute capability 9.0


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile [block_m, block_n] of a program of gemm_few_rows.py, and the parts of K.

    `block_m` is 64 or 128, `block_n` a multiple of 64 up to 384, of a gate one of `GATED_BLOCKS_N`.
    `num_stages` steps of 64 along K are in flight, two or more, as deep as shared memory holds
    beside a few vectors. With `producer` a warp is kept apart for loads: the program starts later,
    and no step waits for all its warps.

    Raises:
        ValueError: a field that the kernel cannot run with.
    """

    block_m: int
    block_n: int
    num_stages: int
    splits: int = 1
    producer: bool = False

    def __post_init__(self):
        for name, values in (("block_m", (64, 128)), ("block_n", BLOCKS_N)):
            value = getattr(self, name)
            if type(value) is not int or value not in values:
                raise ValueError(
                    f"FewRowsConfig: {name} = {value!r} must be one of "
                    f"{', '.join(map(str, values))}"
                )
        # 16-bit rows of both operands; what whole stages leave is enough for the barriers
        most = _SHARED_BYTES // ((self.block_m + self.block_n) * 64 * 2)
        if type(self.num_stages) is not int or not 2 <= self.num_stages <= most:
            raise ValueError(
                f"FewRowsConfig: num_stages = {self.num_stages!r} must be from 2 to the {most} "
                f"that {_SHARED_BYTES} bytes of shared memory hold of {self.block_m} x "
                f"{self.block_n}"
            )
        if type(self.splits) is not int or self.splits < 1:
            raise ValueError(
                f"FewRowsConfig: splits = {self.splits!r} must be an integer of at least 1, the "
                "parts of K"
            )
        if type(self.producer) is not bool:
            raise ValueError(
                f"FewRowsConfig: producer = {self.producer!r} must be True or False, whether a "
                "warp is kept apart for loads"
            )

    @property
    def max_registers(self) -> int:
        """Registers of a thread: a small tile shares a multiprocessor with another one.

        With a warp kept apart four more warps have as many.
        """
        is_small = self.block_m * self.block_n <= 64 * 128
        if self.producer:
            return 128 if is_small else 168
        if self.block_n > 320:
            return 255  # sums alone take 192
        return 168 if is_small else 224


# (N, K, epilogue): (last M, tile), each from the one before on; None for another product. RESIDUAL
# stands for sums of parts that the next norm adds to the stream, GATED for both products of
# gated_linear.py (N counts both), ROTATED for products that rotate.
Table = Mapping[tuple[int, int, str], tuple[tuple[int, FewRowsConfig | None], ...]]

_NARROW = FewRowsConfig(64, 64, num_stages=6)
_DEEP = FewRowsConfig(64, 64, num_stages=12)
_THIRDS = FewRowsConfig(64, 64, num_stages=6, splits=3)
_DEEP_THIRDS = FewRowsConfig(64, 64, num_stages=12, splits=3)
_WIDE = FewRowsConfig(64, 128, num_stages=8)
_WIDE_PAIRS = FewRowsConfig(64, 128, num_stages=4)  # two on a multiprocessor
_TALL = FewRowsConfig(64, 192, num_stages=6)
_BROAD = FewRowsConfig(64, 256, num_stages=5)
_BROADER = FewRowsConfig(64, 320, num_stages=4)
_BROADEST = FewRowsConfig(64, 384, num_stages=4)
_WIDE_SUMS = FewRowsConfig(64, 128, num_stages=9)
_WIDE_HALVES = FewRowsConfig(64, 128, num_stages=9, splits=2)
_WIDE_THIRDS = FewRowsConfig(64, 128, num_stages=9, splits=3)
_TALL_HALVES = FewRowsConfig(64, 192, num_stages=6, splits=2)
_TALL_THIRDS = FewRowsConfig(64, 192, num_stages=6, splits=3)
_BROAD_HALVES = FewRowsConfig(64, 256, num_stages=5, splits=2)
_BROAD_THIRDS = FewRowsConfig(64, 256, num_stages=5, splits=3)
_BROADER_THIRDS = FewRowsConfig(64, 320, num_stages=4, splits=3)
_WIDE_QUARTERS = FewRowsConfig(64, 128, num_stages=9, splits=4)
_SQUARE = FewRowsConfig(128, 128, num_stages=6)
_LARGE = FewRowsConfig(128, 192, num_stages=4)
_HUGE = FewRowsConfig(128, 256, num_stages=4)

_FED_NARROW = replace(_NARROW, producer=True)
_FED_DEEP = replace(_DEEP, producer=True)
_FED_THIRDS = replace(_THIRDS, producer=True)
_FED_DEEP_THIRDS = replace(_DEEP_THIRDS, producer=True)
_FED_WIDE = replace(_WIDE, producer=True)
_FED_TALL = replace(_TALL, producer=True)
_FED_BROAD = replace(_BROAD, producer=True)
_FED_BROADER = replace(_BROADER, producer=True)
_FED_BROADEST = replace(_BROADEST, producer=True)
_FED_WIDE_SUMS = replace(_WIDE_SUMS, producer=True)
_FED_WIDE_THIRDS = replace(_WIDE_THIRDS, producer=True)
_FED_SQUARE = replace(_SQUARE, producer=True)
_FED_LARGE = replace(_LARGE, producer=True)
_FED_HUGE = replace(_HUGE, producer=True)
_FED_VAST = FewRowsConfig(128, 320, num_stages=4, producer=True)
_FED_VASTEST = FewRowsConfig(128, 384, num_stages=3, producer=True)

TABLE: Table = {
    # Qwen3-VL-8B and 32B: qkv, proj, up, down
    (3456, 1152, ""): ((256, _FED_WIDE), (704, None), (896, _FED_LARGE)),
    (3456, 1152, ROTATED): (
        (256, _FED_WIDE), (448, _TALL), (512, _FED_SQUARE), (576, _BROAD), (896, _FED_LARGE),
        (1152, _HUGE),
    ),
    (1152, 1152, RESIDUAL): (
        (128, _FED_THIRDS), (256, _NARROW), (448, None), (512, _WIDE_SUMS), (768, None),
        (896, _WIDE_SUMS),
    ),
    (4304, 1152, "gelu_tanh"): (
        (128, _NARROW), (256, _WIDE_PAIRS), (768, None), (896, _HUGE), (1152, _FED_VAST),
    ),
    (1152, 4304, RESIDUAL): (
        (128, _DEEP_THIRDS), (192, _WIDE_QUARTERS), (256, _WIDE_THIRDS), (320, _WIDE_HALVES),
        (352, _TALL_THIRDS), (448, _WIDE_HALVES), (480, _TALL_HALVES), (832, None),
        (896, _WIDE_SUMS),
    ),
    # their mergers: the last one, and from 65 tokens on those beside the blocks as well
    (4608, 4608, "gelu_erf"): ((32, None), (64, _FED_DEEP), (96, None), (128, _FED_WIDE_SUMS)),
    (4096, 4608, ""): ((64, _FED_DEEP),),
    # Qwen3-VL-2B and 4B, GLM-OCR: qkv, proj, up of Qwen3-VL, down
    (3072, 1024, ""): (
        (320, _WIDE), (512, _TALL), (704, _BROAD), (768, _BROADER), (832, None), (896, _BROADEST),
        (960, _FED_LARGE), (1024, _BROADEST),
    ),
    (3072, 1024, ROTATED): (
        (256, _WIDE), (288, _FED_WIDE), (320, _WIDE), (512, _FED_TALL), (640, _FED_SQUARE),
        (704, _BROAD), (1024, _FED_LARGE),
    ),
    (1024, 1024, RESIDUAL): (
        (384, _WIDE_HALVES), (512, _WIDE_SUMS), (768, None), (832, _WIDE_SUMS),
    ),
    (4096, 1024, "gelu_tanh"): ((256, _WIDE),),
    (1024, 4096, RESIDUAL): ((320, _WIDE_THIRDS), (512, _WIDE_HALVES)),
    # Qwen2.5-VL and Qwen2-VL: qkv, proj
    (3840, 1280, ""): (
        (256, _WIDE), (384, _TALL), (448, _BROAD), (480, _SQUARE), (512, _FED_SQUARE),
        (576, _BROADER), (640, None), (704, _BROADER), (768, None), (832, _BROADEST), (896, _HUGE),
    ),
    (3840, 1280, ROTATED): (
        (256, _FED_WIDE), (384, _TALL), (448, _BROAD), (512, _FED_SQUARE), (576, _BROADER),
        (640, _FED_LARGE), (704, _BROADER), (768, _FED_LARGE), (832, _BROADEST), (1024, _HUGE),
        (1152, _FED_VAST),
    ),
    (1280, 1280, RESIDUAL): (
        (128, _FED_THIRDS), (256, _WIDE_HALVES), (352, None), (448, _WIDE_SUMS), (512, None),
        (640, _FED_WIDE_SUMS), (768, None), (832, _WIDE_SUMS),
    ),
    # Qwen2.5-VL: gate and up, down
    (6912, 1280, GATED): (
        (128, FewRowsConfig(64, 128, num_stages=9)), (256, _SQUARE), (832, None),
        (896, _FED_VASTEST),
    ),
    (1280, 3456, RESIDUAL): (
        (128, _THIRDS), (256, _WIDE_THIRDS), (384, _WIDE_HALVES), (480, _BROAD_THIRDS),
        (640, None), (704, _BROAD_HALVES),
    ),
    # Qwen2-VL: up, down
    (5120, 1280, "quick_gelu"): (
        (128, _WIDE), (256, _TALL), (384, _SQUARE), (512, _LARGE), (768, _HUGE), (1024, _FED_VAST),
    ),
    (1280, 5120, RESIDUAL): (
        (128, _FED_DEEP_THIRDS), (192, _WIDE_QUARTERS), (256, _WIDE_THIRDS), (320, _WIDE_HALVES),
        (352, None), (384, _WIDE_HALVES), (416, _BROAD_THIRDS), (512, None),
        (576, _BROADER_THIRDS), (640, None), (704, _BROAD_HALVES),
    ),
    # Qwen3.5-0.8B: qkv, proj, up, down
    (2304, 768, ROTATED): (
        (256, _FED_NARROW), (416, _FED_WIDE), (448, _WIDE), (512, _FED_TALL), (640, _WIDE_PAIRS),
        (704, _FED_TALL), (832, _WIDE_PAIRS), (896, _FED_SQUARE), (1024, _FED_LARGE),
    ),
    (768, 768, RESIDUAL): ((384, _DEEP), (640, _WIDE_SUMS)),
    (3072, 768, "gelu_tanh"): ((256, _NARROW), (384, None), (640, _WIDE_PAIRS)),
    (768, 3072, RESIDUAL): (
        (256, _FED_WIDE_THIRDS), (320, _WIDE_QUARTERS), (416, _WIDE_THIRDS), (640, _WIDE_HALVES),
    ),
    # GLM-4.1V: qkv, proj, gate and up, down
    (4608, 1536, ROTATED): (
        (256, _FED_SQUARE), (320, _FED_TALL), (352, _FED_BROAD), (384, _FED_SQUARE), (448, _BROAD),
        (512, None), (640, _FED_LARGE), (704, _BROADEST), (832, _HUGE), (896, _FED_HUGE),
        (960, _FED_VAST),
    ),
    (1536, 1536, RESIDUAL): ((256, _WIDE_SUMS),),
    (1536, 4096, RESIDUAL): ((320, _WIDE_HALVES), (384, _BROAD_THIRDS), (416, _TALL_HALVES)),
}  # fmt: skip


# For the products before and behind a norm that deferred_norm.py divides between them, by (N, K,
# epilogue) of the second: (last M, tiles of both), each from the one before on; None where the norm
# is better a kernel of its own, as it is taken to be up to 128 rows. Measured in the same way and
# by the same script (`products --layers norm2` exchanges them as well): replays take 0.3 to 5.5 per
# cent less, the smallest of which are within what captures differ by.
DeferredTiles = tuple[FewRowsConfig, FewRowsConfig]
DeferredTable = Mapping[tuple[int, int, str], tuple[tuple[int, DeferredTiles | None], ...]]

DEFERRED: DeferredTable = {
    # Qwen3-VL-8B and 32B
    (4304, 1152, "gelu_tanh"): (
        (128, None), (192, (_FED_DEEP, _FED_WIDE)), (288, (_FED_DEEP, _TALL)),
        (320, (_FED_DEEP, _FED_TALL)), (384, (_FED_DEEP, _FED_SQUARE)), (448, (_WIDE, _BROAD)),
        (512, (_WIDE, _BROADER)), (576, (_FED_WIDE, _BROADER)), (640, (_WIDE, _FED_LARGE)),
        (896, (_WIDE, _HUGE)),
    ),
    # Qwen3-VL-2B and 4B
    (4096, 1024, "gelu_tanh"): (
        (128, None), (256, (_FED_DEEP, _FED_WIDE)), (352, (_FED_DEEP, _TALL)),
        (384, (_FED_DEEP, _FED_TALL)), (448, (_WIDE, _BROAD)), (512, (_WIDE, _FED_SQUARE)),
        (640, (_WIDE, _BROADER)), (768, (_WIDE, _FED_LARGE)), (1024, (_WIDE, _HUGE)),
    ),
    # Qwen2.5-VL
    (6912, 1280, GATED): (
        (128, None), (192, (_FED_DEEP, _FED_BROAD)), (256, (_FED_DEEP, _FED_SQUARE)),
        (320, (_FED_DEEP, _BROADEST)), (352, (_FED_WIDE, _FED_BROADEST)),
        (384, (_FED_DEEP, _BROADEST)), (416, (_FED_WIDE, _FED_BROADEST)),
        (448, (_FED_WIDE, _BROADEST)), (480, (_WIDE, _HUGE)), (512, (_FED_WIDE, _HUGE)),
        (576, (_FED_WIDE, _FED_VASTEST)), (832, (_WIDE, _FED_VASTEST)),
    ),
    # Qwen2-VL
    (5120, 1280, "quick_gelu"): (
        (128, None), (192, (_FED_DEEP, _FED_WIDE)), (256, (_FED_DEEP, _FED_TALL)),
        (320, (_FED_DEEP, _BROAD)), (384, (_FED_DEEP, _FED_SQUARE)),
        (448, (_FED_WIDE, _FED_BROADER)),
        (512, (_WIDE, _FED_BROADER)), (768, (_WIDE, _HUGE)), (832, (_WIDE, _FED_VAST)),
    ),
    # Qwen3.5-0.8B
    (3072, 768, "gelu_tanh"): (
        (128, None), (256, (_FED_DEEP, _FED_WIDE)), (288, (_FED_DEEP, _WIDE)),
        (320, (_FED_DEEP, _FED_WIDE)), (416, (_FED_DEEP, _FED_TALL)), (512, (_WIDE, _FED_TALL)),
        (640, (_WIDE, _WIDE_PAIRS)), (704, (_WIDE, _FED_BROAD)), (1024, (_WIDE, _FED_LARGE)),
    ),
    # GLM-OCR, GLM-4.1V
    (8192, 1024, GATED): (
        (128, None), (256, (_FED_DEEP, _FED_SQUARE)), (288, (_FED_WIDE, _FED_BROADEST)),
        (384, (_FED_DEEP, _FED_BROADEST)), (512, (_WIDE, _HUGE)), (576, (_FED_WIDE, _FED_VASTEST)),
        (768, (_WIDE, _FED_VASTEST)), (832, (_WIDE, _HUGE)),
    ),
    (8192, 1536, GATED): (
        (128, None), (256, (_FED_WIDE, _SQUARE)), (288, (_FED_WIDE, _FED_BROADEST)),
        (320, (_FED_DEEP, _FED_BROADEST)), (384, (_FED_WIDE, _FED_BROADEST)),
        (512, (_WIDE, _HUGE)), (704, (_WIDE, _FED_VASTEST)),
    ),
}  # fmt: skip


def table_digest(table: Table | DeferredTable = TABLE) -> str:
    """Changes with `table`."""
    return hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest()[:16]


def shipped_few_rows(epilogue: str, K: int) -> tuple[FewRowsConfig, ...]:
    """Tiles of both tables that a product with this epilogue over K columns runs with."""

    def kind(name: str) -> str:
        return name if name in (RESIDUAL, GATED) else ""

    entries = [(key[2], tile) for key, classes in TABLE.items() for _, tile in classes]
    # behind a norm
    entries += [(key[2], pair and pair[1]) for key, pairs in DEFERRED.items() for _, pair in pairs]
    tiles = dict.fromkeys(
        tile for name, tile in entries if tile is not None and kind(name) == kind(epilogue)
    )
    return tuple(tile for tile in tiles if tile.splits <= ceil_div(K, 64))


def few_rows_from_json(entries: Any) -> Table:
    """The table of few rows that `gemm_tuning.table_to_json` wrote.

    Raises:
        ValueError: an entry is not of that form, or names a tile that is not among
            `shipped_few_rows`.
    """
    return read_table(entries, one_of(shipped_few_rows), "last M")


def few_rows_tile(
    M: int, N: int, K: int, epilogue: str, table: Table = TABLE
) -> FewRowsConfig | None:
    """Tile for M rows; None where another product is the faster, or nothing is known."""
    return of_class(M, table.get((N, K, epilogue), ()))


def deferred_tiles(
    M: int, N: int, K: int, epilogue: str, table: DeferredTable = DEFERRED
) -> DeferredTiles | None:
    """Tiles of both products for M rows; None where the norm between them is better a kernel."""
    return of_class(M, table.get((N, K, epilogue), ()))
