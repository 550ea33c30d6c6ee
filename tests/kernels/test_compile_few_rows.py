"""What the compiler makes of the matrix product of few rows for the H200, without one."""

import pytest
from vitgraph.kernels import gemm_few_rows
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.few_rows_tuning import (
    BLOCKS_N,
    DEFERRED,
    TABLE,
    FewRowsConfig,
    shipped_few_rows,
)
from vitgraph.kernels.gemm_tuning import GATED, RESIDUAL, ROTATED

kernel_module = pytest.importorskip("vitgraph.kernels.gemm_few_rows_kernel")
gl = kernel_module.gl

# what a product has of a norm (deferred_norm.py): added to the stream before, or behind either kind
ADDED, LAYER, RMS = "added", "layer", "rms"

# those of the table, and what `linear` and `gated_linear` take without an entry
LAUNCHES = {
    *((tile, epilogue) for (_, _, epilogue), tiles in TABLE.items() for _, tile in tiles if tile),
    *((FewRowsConfig(64, 64, 6), name) for name in ("", "gelu_tanh", "gelu_erf", "quick_gelu")),
    (FewRowsConfig(64, 64, 6), "silu"),
    # a user's table may name any of them
    *((tile, ROTATED) for tile in shipped_few_rows("", 1152)),
    (FewRowsConfig(64, 128, 4), GATED),
    # as many sums as a thread can have; the table has it with a warp for loads alone
    (FewRowsConfig(128, 384, 3), GATED),
}
PAIRS = [
    (epilogue, *tiles)
    for (_, _, epilogue), classes in DEFERRED.items()
    for _, tiles in classes
    if tiles is not None
]
DEFERRING = {(before, "", ADDED) for _, before, _ in PAIRS} | {
    (behind, epilogue, RMS if epilogue == GATED else LAYER) for epilogue, _, behind in PAIRS
}


def name_of(launch):
    tile, epilogue, *part = launch
    name = f"{tile.block_m}x{tile.block_n}s{tile.num_stages}{' fed' if tile.producer else ''}"
    return "-".join([name, epilogue or "bias", *part])


def inspect_few_rows(tile: FewRowsConfig, epilogue: str, part: str = ""):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    m, n, k = tile.block_m, tile.block_n, gemm_few_rows.BLOCK_K
    head = 1 << (n.bit_length() - 1)
    is_gated, is_partial = epilogue == GATED, epilogue == RESIDUAL

    def descriptor(rows, columns):
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    signature = {
        "x": descriptor(m, k),
        "weight": descriptor(head // 2 if is_gated else head, k),
        "live_ptr": "*i32",
        **dict.fromkeys(("M", "N", "K", "part_steps", "longer_parts"), "i32"),
        "eps": "fp32",
    }
    is_rotated = epilogue == ROTATED
    activation = "silu" if is_gated else "" if is_partial or is_rotated else epilogue
    constexprs = {
        "ACTIVATION": activation, "IS_GATED": is_gated, "STAGES": tile.num_stages,
        "HAS_PRODUCER": tile.producer,
        "IS_RMS": part == RMS, "MOST_GROUPS": gemm_few_rows.MOST_GROUPS, "num_warps": m // 16,
    }  # fmt: skip
    for name, is_given, kind in (
        ("bias_ptr", not is_partial and part != ADDED, "*fp32" if part else "*bf16"),
        ("stream", part == ADDED, descriptor(m, gemm_few_rows.STORE_N)),
        ("gain_ptr", part == ADDED, "*bf16"),
        ("offset_ptr", part == ADDED, "*fp32"),
        ("moments_ptr", part != "", "*fp32"),
        ("sums_ptr", part == LAYER, "*fp32"),
        ("position_ptr", is_rotated, "*i32"),
        ("turns_ptr", is_rotated, "*fp32"),
        ("out", not is_partial, descriptor(m, gemm_few_rows.STORE_N)),
        ("partial_ptr", is_partial, "*fp32"),
        ("weight_tail", n > head, descriptor((n - head) // (2 if is_gated else 1), k)),
    ):
        if is_given:
            signature[name] = kind
        else:
            constexprs[name] = None
    return inspect(
        kernel_module.gemm_few_rows_kernel,
        signature,
        constexprs,
        divisible=("N", "K"),
        num_warps=m // 16,
        maxnreg=tile.max_registers,
        launch_pdl=True,
    )


@pytest.mark.parametrize("launch", sorted(LAUNCHES | DEFERRING, key=name_of), ids=name_of)
def test_tile(launch):
    tile, epilogue, *part = launch
    info = inspect_few_rows(*launch)
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0
    assert info.sass.count("gsb0, 0x0") == 1, "products wait for all before them at the end alone"
    assert info.shared_bytes <= 227 << 10
    # TMA stores of rounded tiles, plain ones of partial sums
    assert (info.count("UTMASTG") > 0) == (epilogue != RESIDUAL)
    # a warp kept apart for loads and those that multiply wait each, and let the next kernel start
    assert info.count("ACQBULK") == info.count("PREEXIT") == 1 + tile.producer
    lines = info.sass.splitlines()
    waits = [i for i, line in enumerate(lines) if "ACQBULK" in line]
    loads = [i for i, line in enumerate(lines) if "UTMALDG" in line]
    # releases of Triton put the two groups in either order, and only one of them loads
    wait = min(i for i in waits if i > loads[0])
    early = [i for i in loads if i < wait]
    has_tail = tile.block_n & (tile.block_n - 1) != 0
    weights = (1 + has_tail) * (1 + (epilogue == GATED))
    of_stream = tile.block_n // gemm_few_rows.STORE_N if part == [ADDED] else 0
    most = tile.num_stages * weights + of_stream
    assert len(early) == most, "a ring of weights and the stream, and x only after the wait"
    assert len(loads) > most


@pytest.mark.parametrize("launch", sorted(LAUNCHES | DEFERRING, key=name_of), ids=name_of)
def test_shared_memory_has_one_use(launch):
    """Barriers keep theirs, though they are last used before the results leave."""
    tile, epilogue, *part = launch
    ring = tile.num_stages * (tile.block_m + tile.block_n) * gemm_few_rows.BLOCK_K * 2
    stream = tile.block_m * tile.block_n * 2 if part == [ADDED] else 0
    # bytes of a column in vectors: bias, that with turns, or what a deferred norm needs
    column = {ADDED: 2 + 4, LAYER: 4 + 4, RMS: 4, ROTATED: 2 + 4, RESIDUAL: 0}
    vectors = tile.block_n * column.get(part[0] if part else epilogue, 2)
    barriers = 8 * (tile.num_stages + (stream > 0))
    if tile.producer:
        barriers += 8 * (1 + tile.num_stages)
    assert inspect_few_rows(*launch).shared_bytes >= ring + stream + vectors + barriers


@pytest.mark.parametrize("block_n", BLOCKS_N)
@pytest.mark.parametrize("block_m", [64, 128])
def test_the_deepest_ring_that_is_not_refused_fits(block_m, block_n):
    """Of sums, which need no buffers for results."""
    depths = range(2, 20)
    deepest = max(n for n in depths if _is_taken(block_m, block_n, n))
    info = inspect_few_rows(FewRowsConfig(block_m, block_n, deepest), RESIDUAL)
    one_more = info.shared_bytes // deepest * (deepest + 1)
    assert info.shared_bytes <= 227 << 10 < one_more


def _is_taken(block_m: int, block_n: int, num_stages: int) -> bool:
    try:
        FewRowsConfig(block_m, block_n, num_stages)
    except ValueError:
        return False
    return True


def registers_of_two(tile):
    # a warp kept apart counts as four
    return 2 * 32 * (tile.block_m // 16 + 4 * tile.producer) * tile.max_registers


@pytest.mark.parametrize("tile", sorted({t for t, *_ in LAUNCHES | DEFERRING}, key=str), ids=str)
def test_a_small_tile_leaves_room_for_another_program(tile):
    assert registers_of_two(tile) <= 1 << 16 or tile.block_m * tile.block_n > 64 * 128


def test_small_tiles_with_short_rings_share_a_multiprocessor():
    shortest = {64: 6, 128: 4}
    for tile, epilogue in LAUNCHES:
        if tile.num_stages <= shortest.get(tile.block_m * tile.block_n // 64, 0):
            # 228 KiB, of which each program takes one more
            assert 2 * (inspect_few_rows(tile, epilogue).shared_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize("producer", [False, True])
@pytest.mark.parametrize(
    ("epilogue", "vectors"), [(ROTATED, True), ("gelu_tanh", True), (RESIDUAL, False)]
)
def test_everything_but_x_is_asked_for_before_the_wait(epilogue, vectors, producer):
    """By the warps that multiply; a warp that loads needs the live rows alone."""
    info = inspect_few_rows(FewRowsConfig(64, 64, 6, producer=producer), epilogue)
    loads = [part.count("ld.global") for part in info.ptx.split("griddepcontrol.wait")]
    assert (loads[0] > 1) == vectors
    assert loads[1:] == ([1, 0] if producer else [0])


@pytest.mark.parametrize("producer", [False, True])
@pytest.mark.parametrize("part", [LAYER, RMS])
def test_moments_are_on_their_way_during_the_products(part, producer):
    """All that is read behind the wait: of two rows a thread sums and squares of eight groups."""
    info = inspect_few_rows(FewRowsConfig(64, 128, 8, producer=producer), "gelu_tanh", part)
    before, behind, *last = info.ptx.split("griddepcontrol.wait")
    assert before.count("ld.global.v4") == 0
    assert all(rest.count("ld.global") == 0 for rest in last)
    assert behind.count("ld.global.v4") == 2 * 2 * 8 // 4
    assert behind.rindex("ld.global.v4") < behind.index("wgmma.mma_async")
