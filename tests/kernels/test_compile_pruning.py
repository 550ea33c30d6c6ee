"""Machine code for sm_90 of the kernels of token pruning, at the parameters they ship with."""

import pytest
import torch
from vitgraph.kernels import gather_rows, select_tokens, token_pruning
from vitgraph.kernels.compiled import inspect

DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


@pytest.mark.parametrize("pointer", DTYPES)
@pytest.mark.parametrize("C", [2048, 3584])
def test_token_scores(C, pointer):
    launch = token_pruning.config(C, DTYPES[pointer])
    info = inspect(
        token_pruning._token_scores_kernel,
        {
            "tokens_ptr": pointer, "grid_ptr": "*i32", "score_ptr": "*fp32", "M": "i32",
            "C": "i32", "stride_m": "i32", "num_items": "i32",
        },
        {
            "AREA": 4, "FIRST_FRAME": 4.0, "NOT_A_NUMBER": 3.0, "PADDING": -1.0,
            "ROWS": launch.ROWS, "BLOCK_C": launch.BLOCK_C, "BLOCK_I": token_pruning.BLOCK_I,
        },
        divisible=["C", "stride_m"],
        num_warps=launch.num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 4
    # equal rows need the exact root
    assert "sqrt.rn.f64" in info.ptx


@pytest.mark.parametrize("M", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("masked", [False, True], ids=["rate", "mask"])
def test_select_tokens(M, masked):
    launch = select_tokens.config(M)
    none = {} if masked else {"mask_ptr": None}
    constants = {"AREA": 4, "BLOCK": launch.BLOCK, "BLOCK_I": select_tokens.BLOCK_I}
    tables = {"grid_ptr": "*i32", "keep_ptr": "*i32", "mask_ptr": "*u8", "count_ptr": "*i32"}
    sizes = {"M": "i32", "num_items": "i32"}
    count = inspect(select_tokens._count_kernel, tables | sizes, constants | none)
    assert count.spill_bytes == 0
    outputs = {"source_ptr": "*i32", "index_ptr": "*i32", "kept_ptr": "*i32"}
    select = inspect(
        select_tokens._select_tokens_kernel,
        {"score_ptr": "*fp32"} | tables | outputs | sizes,
        constants | none,
        num_warps=launch.num_warps,
    )
    assert select.spill_bytes == 0


@pytest.mark.parametrize("pointer", DTYPES)
def test_gather_rows(pointer):
    launch = gather_rows.config(3584, DTYPES[pointer].itemsize)
    info = inspect(
        gather_rows._gather_rows_kernel,
        {
            "x_ptr": pointer, "source_ptr": "*i32", "live_ptr": "*i32", "out_ptr": pointer,
            "K": "i32", "C": "i32", "stride_xm": "i32", "stride_ok": "i32",
        },
        {"BLOCK_R": launch.BLOCK_R, "BLOCK_C": launch.BLOCK_C},
        divisible=["C", "stride_xm", "stride_ok"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 8
    assert info.count("STG.E.128") >= 8
