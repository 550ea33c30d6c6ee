"""The table of products of few rows: its entries, the layers they name, and what a tile may be."""

from dataclasses import replace

import pytest
import vitgraph.bench.towers_config as towers
from vitgraph.encoder.families import FAMILIES
from vitgraph.kernels.few_rows_tuning import (
    BLOCKS_N,
    DEFERRED,
    GATED_BLOCKS_N,
    TABLE,
    FewRowsConfig,
    few_rows_tile,
    shipped_few_rows,
)
from vitgraph.kernels.gemm_few_rows import BLOCK_K
from vitgraph.kernels.gemm_tuning import GATED, RESIDUAL, ROTATED

TILE = FewRowsConfig(64, 64, num_stages=6)


def shapes_of_towers():
    found = set()
    for name, config in towers.TOWERS.items():
        spec = FAMILIES[config.family].spec(config.vision_config())
        D, F = spec.hidden_size, spec.padded_mlp_size
        if not name.startswith("tiny"):
            up = (2 * F, D, GATED) if spec.mlp == "gated" else (F, D, spec.activation)
            found |= {(3 * D, D, ""), (3 * D, D, ROTATED), (D, D, RESIDUAL), up, (D, F, RESIDUAL)}
            if spec.merger == "mlp":
                joined = spec.patches_per_token * D
                found |= {(joined, joined, "gelu_erf"), (spec.out_size, joined, "")}
    return found


def test_the_table_names_layers_of_towers():
    assert set(TABLE) <= shapes_of_towers()


@pytest.mark.parametrize("key", sorted(TABLE), ids=str)
def test_an_entry_is_well_formed(key):
    N, K, epilogue = key
    lasts = [last for last, _ in TABLE[key]]
    assert lasts
    assert lasts == sorted(set(lasts))
    assert TABLE[key][-1][1] is not None
    for _, tile in TABLE[key]:
        if tile is None:  # something else is faster there
            continue
        assert tile.block_m in (64, 128)
        assert tile.block_n in BLOCKS_N
        assert epilogue != GATED or tile.block_n in GATED_BLOCKS_N
        assert tile.num_stages >= 2
        assert 1 <= tile.splits <= -(-K // BLOCK_K)
        assert tile.splits == 1 or epilogue == RESIDUAL
    assert N % (16 if epilogue == GATED else 8) == 0
    assert K % 8 == 0


@pytest.mark.parametrize("key", DEFERRED, ids=str)
def test_tiles_behind_a_norm_are_among_those_that_a_user_may_name(key):
    _, K, epilogue = key
    shipped = shipped_few_rows(epilogue, K)
    assert {pair[1] for _, pair in DEFERRED[key] if pair} <= {*shipped}
    assert len(shipped) == len({*shipped})


def test_a_class_of_rows_ends_with_its_last(monkeypatch):
    wide = replace(TILE, block_n=128)
    monkeypatch.setitem(TABLE, (8, 8, ""), ((10, TILE), (20, wide)))
    chosen = [few_rows_tile(M, 8, 8, "") for M in (1, 10, 11, 20, 21)]
    assert chosen == [TILE, TILE, wide, wide, None]
    assert few_rows_tile(1, 8, 16, "") is None
    assert few_rows_tile(1, 8, 8, RESIDUAL) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 32}, "block_m = 32 must be one of 64, 128"),
        ({"block_m": 256}, "block_m = 256 must be one of 64, 128"),
        ({"block_m": 64.0}, "block_m = 64.0 must be one of 64, 128"),
        ({"block_n": 0}, "block_n = 0 must be one of 64, 128, 192, 256, 320"),
        ({"block_n": 96}, "block_n = 96 must be one of 64, 128, 192, 256, 320"),
        ({"num_stages": 1}, "num_stages = 1 must be from 2 to the 14 that 232448 bytes .* 64 x 64"),
        ({"num_stages": 15}, "num_stages = 15 must be from 2 to the 14 "),
        (
            {"num_stages": 5, "block_m": 128, "block_n": 256},
            "num_stages = 5 must be from 2 to the 4",
        ),
        ({"num_stages": 4.0}, "num_stages = 4.0 must be from 2"),
        ({"splits": 0}, "splits = 0 must be an integer of at least 1"),
        ({"splits": 1.5}, "splits = 1.5 must be an integer of at least 1"),
        ({"producer": 1}, "producer = 1 must be True or False"),
    ],
    ids=str,
)
def test_tiles_that_the_kernel_cannot_run(change, message):
    with pytest.raises(ValueError, match=rf"^FewRowsConfig: {message}"):
        replace(TILE, **change)


def test_the_deepest_rings():
    for block_m, block_n, most in (
        (64, 64, 14), (64, 256, 5), (128, 128, 7), (128, 256, 4), (128, 320, 4),
    ):  # fmt: skip
        assert FewRowsConfig(block_m, block_n, most).num_stages == most
        with pytest.raises(ValueError, match=f"to the {most} that"):
            FewRowsConfig(block_m, block_n, most + 1)
