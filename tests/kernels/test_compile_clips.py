"""Machine code for sm_90 of the kernels for clips of frames, at the parameters they ship with."""

import pytest
from vitgraph.kernels import frame_positions, layout, temporal_mean
from vitgraph.kernels.compiled import inspect

POINTERS = ["*bf16", "*fp32"]


@pytest.mark.parametrize("pointer", POINTERS)
def test_temporal_mean(pointer):
    info = inspect(
        temporal_mean._temporal_mean_kernel,
        {
            "x_ptr": pointer, "grid_ptr": "*i32", "out_ptr": pointer, "Q": "i32", "D": "i32",
            "num_items": "i32",
        },
        {
            "MERGE": 2, "BLOCK_Q": temporal_mean.BLOCK_Q, "BLOCK_D": temporal_mean.BLOCK_D,
            "BLOCK_I": layout.BLOCK_I,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 2
    assert info.count("STG.E.128") >= 2
    # a mean of one frame must be that frame
    assert "div.rn.f32" in info.ptx


@pytest.mark.parametrize("pointer", POINTERS)
def test_frame_positions(pointer):
    info = inspect(
        frame_positions._add_frame_positions_kernel,
        {
            "x_ptr": pointer, "table_ptr": "*fp32", "grid_ptr": "*i32", "T": "i32", "D": "i32",
            "num_items": "i32",
        },
        {
            "BLOCK_T": frame_positions.BLOCK_T, "BLOCK_D": frame_positions.BLOCK_D,
            "BLOCK_I": layout.BLOCK_I,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 4
    assert info.count("STG.E.128") >= 4
