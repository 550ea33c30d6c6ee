"""Which matrix product a linear layer takes on compute capability 9.0, as measured.

One NVIDIA H200, Triton 3.6.0, PyTorch 2.11.0 with CUDA 13.0, 2026-11-21: bf16, calls in CUDA
graphs, median of interleaved rounds, the kernel of gemm_hopper.py against cuBLAS and the passes
that cuBLAS needs after it, at 784, 1568, 3136, 6272, 8192, 16384, 32768 and 65536 rows (a quarter
of these in layers on merged patches; InternViT-6B from 3136 on). The table names the faster tile
from the first of these on at which it is no slower than cuBLAS with all rows live; with fewer live
rows it gains, as cuBLAS computes them all. (Products that rotate: 2026-11-22.)

The layers of library_tuning.py, but for up and down of Qwen2-VL, were held against the fastest
algorithm of cuBLAS on 2026-11-22 at 32 numbers of rows up to 20480 (a quarter of these on merged
patches), from 4096 on as if 96 per cent of the rows were live, about what the ladder's steps leave.
Past 20480 they are as above. At 384, 512, 640, 768, 832, 1024, 1280 and 1536 rows the captured
tower as a whole decided for qkv, proj, up and down of Qwen3-VL-8B and Qwen2-VL, and for up and down
of Qwen2.5-VL, as few_rows_tuning.py has it, which names the numbers of rows of the smaller towers
and of GLM too; classes reach to some rows between them.

To extend it: add (first M, tile) to the entries of a shape, in ascending order of M; None as the
tile names the library. A new tile goes into `SHIPPED` as well, which is what the tests go through.
`python -m vitgraph.bench tune --print` measures the shapes of all towers and prints the literal.

Up to some 900 rows few_rows_tuning.py is asked first. What a user has measured by `vitgraph tune`
stands before both (tables.py).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar, get_args

from .activation import Activation
from .rows import ceil_div


@dataclass(frozen=True)
class HopperConfig:
    """Tile [block_m, block_n] of each of the two groups of warps in gemm_hopper.py.

    `block_m` is 64 or 128, `block_n` 2^a or 2^a + 2^b, a multiple of 64 up to 256. `num_stages`
    steps of 64 along K are in flight.
    """

    block_m: int
    block_n: int
    num_stages: int


# as deep a pipeline as 227 KiB of shared memory hold
SQUARE = HopperConfig(128, 128, num_stages=5)
WIDE = HopperConfig(128, 192, num_stages=4)
SHIPPED = (SQUARE, WIDE)

RESIDUAL = "residual"
GATED = "swiglu"  # the two products of gated_linear.py; N counts the rows of both
ROTATED = "rope"  # of rotary_linear.py; below the first M its two kernels
EPILOGUES = ("", RESIDUAL, GATED, ROTATED, *get_args(Activation))

# (N, K, epilogue): (first M, tile), each up to the next; below the first the library
Table = Mapping[tuple[int, int, str], tuple[tuple[int, HopperConfig | None], ...]]

TABLE: dict[tuple[int, int, str], tuple[tuple[int, HopperConfig | None], ...]] = {
    # Qwen3-VL 8B and 32B, Qwen3.5, SigLIP 2 so400m, ...: qkv, proj, up, down
    (3456, 1152, ""): ((16384, SQUARE),),
    (3456, 1152, ROTATED): ((897, SQUARE),),
    (1152, 1152, RESIDUAL): ((20481, WIDE), (65536, SQUARE)),
    (4304, 1152, "gelu_tanh"): (
        (769, SQUARE), (897, None), (3584, WIDE), (4096, SQUARE), (4608, None), (5120, WIDE),
        (6144, SQUARE),
    ),
    (1152, 4304, RESIDUAL): (
        (1537, SQUARE), (1792, None), (8192, WIDE), (9216, None), (20481, WIDE),
    ),
    # mergers of Qwen3-VL 8B
    (4608, 4608, "gelu_erf"): (
        (1792, SQUARE), (2048, WIDE), (2304, SQUARE), (2560, None), (4096, SQUARE),
    ),
    (4096, 4608, ""): ((2048, SQUARE), (2304, None), (2560, SQUARE), (3072, None), (4096, SQUARE)),
    # Qwen2.5-VL and Qwen2-VL: qkv, proj
    (3840, 1280, ""): (
        (512, SQUARE), (640, None), (6656, SQUARE), (9216, WIDE), (10240, SQUARE), (65536, WIDE),
    ),
    (3840, 1280, ROTATED): ((353, SQUARE),),
    (1280, 1280, RESIDUAL): ((20481, SQUARE),),
    # Qwen2.5-VL: gate and up, down
    (6912, 1280, GATED): ((1, SQUARE),),
    (1280, 3456, RESIDUAL): (
        (1409, SQUARE), (1537, None), (16384, SQUARE), (20480, None), (20481, SQUARE),
    ),
    # Qwen2-VL: up, down
    (5120, 1280, "quick_gelu"): ((513, SQUARE), (65536, WIDE)),
    (1280, 5120, RESIDUAL): ((8192, SQUARE),),
    # mergers of Qwen2.5-VL and Qwen2-VL
    (5120, 5120, "gelu_erf"): (
        (384, SQUARE), (416, None), (2048, SQUARE), (2560, None), (3072, WIDE), (4096, SQUARE),
    ),
    (3584, 5120, ""): ((4096, SQUARE),),
    (5120, 5120, ""): ((2048, SQUARE),),
    # Qwen3-VL 2B and 4B, GLM-OCR, InternViT-300M: qkv, proj, up by its activation, down
    (3072, 1024, ""): (
        (9216, WIDE), (10240, None), (12288, SQUARE), (14336, None), (20481, SQUARE),
    ),
    (3072, 1024, ROTATED): ((833, SQUARE),),
    (1024, 1024, RESIDUAL): ((20481, SQUARE),),
    (4096, 1024, "gelu_tanh"): (
        (512, SQUARE), (640, None), (1536, SQUARE), (1664, None), (2048, SQUARE), (2304, WIDE),
        (2560, None), (4608, SQUARE), (5120, None), (18432, SQUARE),
    ),
    (4096, 1024, "gelu_erf"): ((3136, SQUARE),),
    (8192, 1024, GATED): ((1, SQUARE),),
    (1024, 4096, RESIDUAL): ((1664, SQUARE), (1792, None), (20481, SQUARE)),
    # mergers of Qwen3-VL 2B and 4B, of GLM-OCR, projector of InternVL3-8B
    (4096, 4096, "gelu_erf"): ((2048, SQUARE),),
    (9216, 1536, GATED): ((1568, SQUARE),),
    (3584, 4096, "gelu_erf"): ((1568, SQUARE),),
    # Qwen3.5-0.8B, SigLIP 2 base: qkv, proj, up, down
    (2304, 768, ""): ((6272, SQUARE),),
    (2304, 768, ROTATED): ((833, SQUARE),),
    (768, 768, RESIDUAL): ((16384, WIDE), (32768, SQUARE)),
    (3072, 768, "gelu_tanh"): ((3136, SQUARE),),
    (768, 3072, RESIDUAL): ((32768, WIDE),),
    # GLM-4.1V and 4.5V, Step-3.7: qkv, proj
    (4608, 1536, ""): ((3136, SQUARE), (6272, WIDE), (8192, SQUARE)),
    (4608, 1536, ROTATED): ((641, SQUARE), (897, None), (3136, SQUARE)),
    (1536, 1536, RESIDUAL): ((8192, WIDE),),
    # GLM-4.1V and 4.5V: gate and up, down
    (8192, 1536, GATED): ((1, SQUARE),),
    (1536, 4096, RESIDUAL): ((8192, SQUARE), (32768, None), (65536, SQUARE)),
    # Step-3.7: up, down, a convolution
    (8960, 1536, "quick_gelu"): ((784, SQUARE), (3136, WIDE), (6272, SQUARE)),
    (1536, 8960, RESIDUAL): ((16384, SQUARE),),
    (3072, 13824, ""): ((2048, SQUARE), (8192, WIDE)),
    # Step3: qkv, proj, up, down
    (5376, 1792, ""): ((3136, SQUARE), (65536, WIDE)),
    (1792, 1792, ""): ((3136, WIDE), (8192, None), (16384, SQUARE)),
    (15360, 1792, "quick_gelu"): ((784, WIDE), (3136, SQUARE), (8192, WIDE), (16384, SQUARE)),
    (1792, 15360, ""): (
        (784, SQUARE), (1568, WIDE), (3136, SQUARE), (6272, WIDE),
        (8192, SQUARE), (32768, None), (65536, SQUARE),
    ),
    # InternViT-6B: q, k and v by themselves, proj, up, down, projector of InternVL3-38B
    (3200, 3200, ""): ((3136, SQUARE), (65536, WIDE)),
    (3200, 3200, RESIDUAL): ((6272, SQUARE), (8192, None), (16384, SQUARE)),
    (12800, 3200, "gelu_erf"): ((3136, SQUARE), (6272, WIDE), (16384, SQUARE)),
    (3200, 12800, RESIDUAL): (
        (6272, SQUARE), (8192, None), (16384, SQUARE),
        (32768, WIDE), (65536, None),
    ),
    (5120, 12800, "gelu_erf"): ((1568, SQUARE),),
}  # fmt: skip

# Measured shapes within these sides gain from here on, but for 2 per cent at single M, and others
# between them are taken to. Past them the library is used.
MIN_M = 16384
MEASURED_N = (1024, 15360)
MEASURED_K = (1024, 15360)


def epilogue_name(activation: str | None, has_residual: bool) -> str:
    """The third part of a key of `TABLE`."""
    return RESIDUAL if has_residual else activation or ""


def shipped_tiles(activation: str | None) -> tuple[HopperConfig, ...]:
    """Tiles that this epilogue runs with.

    Gated ones must have two equal halves, and a rotation of wide ones does not fit into registers.
    """
    return tuple(t for t in SHIPPED if activation not in (GATED, ROTATED) or t.block_n <= 128)


def tile_by_waves(M: int, N: int, K: int, activation: str | None, num_sms: int) -> HopperConfig:
    """`SQUARE` or `WIDE`, whose waves over `num_sms` multiprocessors take the shorter time."""

    def time(config: HopperConfig) -> float:
        tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
        # a wider tile reads less for each product, which shows where K is long
        rate = 1.0 if config.block_n > 128 else 1.01 - min(K, 5120) / 5120 * 0.04
        return ceil_div(tiles, num_sms) * config.block_m * config.block_n / rate

    return min((t for t in (SQUARE, WIDE) if t in shipped_tiles(activation)), key=time)


def hopper_tile(
    M: int,
    N: int,
    K: int,
    activation: str | None,
    has_residual: bool,
    num_sms: int,
    table: Table = TABLE,
) -> HopperConfig | None:
    """Tile for M rows by measurement, or between measurements by rule; None for the library.

    A shape without an entry takes `tile_by_waves` if M, N and K lie within what was measured.
    """
    entries = table.get((N, K, epilogue_name(activation, has_residual)))
    if entries is not None:
        chosen = None
        for first, tile in entries:
            if first <= M:
                chosen = tile
        return chosen
    known = MEASURED_N[0] <= N <= MEASURED_N[1] and MEASURED_K[0] <= K <= MEASURED_K[1]
    return tile_by_waves(M, N, K, activation, num_sms) if known and M >= MIN_M else None


_Tile = TypeVar("_Tile")
TileReader = Callable[[Any, str, int], _Tile]
AnyTable = Mapping[tuple[int, int, str], tuple[tuple[int, _Tile | None], ...]]


def table_to_json(table: AnyTable[Any]) -> list[dict[str, Any]]:
    """`table` as plain data, in an order that depends on its contents alone."""
    return [
        {
            "N": N,
            "K": K,
            "epilogue": epilogue,
            "tiles": [[M, tile and asdict(tile)] for M, tile in table[N, K, epilogue]],
        }
        for N, K, epilogue in sorted(table)
    ]


def table_from_json(entries: Any) -> Table:
    """The table that `table_to_json` wrote.

    Raises:
        ValueError: an entry is not of that form, or names what gemm_hopper.py is not tested for:
            widths that are not multiples of 8, an unknown epilogue, a tile that is not among
            `shipped_tiles` of the epilogue.
    """
    read_tile = one_of(lambda epilogue, K: shipped_tiles(epilogue))
    return read_table(entries, read_tile, "first M")


def one_of(tiles_for: Callable[[str, int], Iterable[_Tile]]) -> TileReader[_Tile]:
    """A reader of tiles that an epilogue and K may have."""

    def read_tile(content: Any, epilogue: str, K: int) -> _Tile:
        known = {json.dumps(asdict(t), sort_keys=True): t for t in tiles_for(epilogue, K)}
        name = json.dumps(content, sort_keys=True)
        if name not in known:
            raise ValueError(
                f"tile {name} is none that {epilogue or 'bias'!r} runs with: {', '.join(known)}"
            )
        return known[name]

    return read_tile


def of_class(M: int, classes: Iterable[tuple[int, _Tile | None]]) -> _Tile | None:
    """What (last M, tile) entries in ascending order have for M rows; None past the last."""
    return next((tile for last, tile in classes if last >= M), None)


def read_table(
    entries: Any,
    read_tile: TileReader[_Tile],
    bound: str,
    epilogues: Sequence[str] = EPILOGUES,
) -> dict[tuple[int, int, str], tuple[tuple[int, _Tile | None], ...]]:
    """`table_from_json` of any tiles.

    Args:
        entries: What a file holds.
        read_tile: From plain data, an epilogue and K to a tile; raises ValueError.
        bound: What the first number of a class of rows is.
        epilogues: Those that an entry may have.
    """
    if not isinstance(entries, list):
        raise ValueError(f"its entries are a {type(entries).__name__} instead of a list")
    table: dict[tuple[int, int, str], tuple[tuple[int, _Tile | None], ...]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"N", "K", "epilogue", "tiles"}:
            raise ValueError(f"entry {i} does not have N, K, epilogue and tiles")
        N, K, epilogue = entry["N"], entry["K"], entry["epilogue"]
        if not all(_is_count(width) and width % 8 == 0 for width in (N, K)):
            raise ValueError(f"entry {i}: N = {N!r} and K = {K!r} must be multiples of 8")
        if epilogue not in epilogues:
            raise ValueError(f"entry {i}: epilogue {epilogue!r} is not one of {epilogues}")
        if (N, K, epilogue) in table:
            raise ValueError(f"entry {i} repeats {(N, K, epilogue)}")
        read = partial(read_tile, epilogue=epilogue, K=K)
        table[N, K, epilogue] = _row_classes(entry["tiles"], read, bound, f"entry {i}")
    return table


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # bool is a subclass of int


def _row_classes(
    classes: Any, read_tile: Callable[[Any], _Tile], bound: str, where: str
) -> tuple[tuple[int, _Tile | None], ...]:
    if not isinstance(classes, list):
        raise ValueError(f"{where}: tiles is a {type(classes).__name__} instead of a list")
    found: list[tuple[int, _Tile | None]] = []
    for pair in classes:
        if not isinstance(pair, list) or len(pair) != 2 or not _is_count(pair[0]):
            raise ValueError(f"{where}: {pair!r} is not [{bound}, tile]")
        limit, tile = pair
        if found and limit <= found[-1][0]:
            raise ValueError(f"{where}: {bound} {limit} does not ascend from {found[-1][0]}")
        try:
            found.append((limit, None if tile is None else read_tile(tile)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return tuple(found)
