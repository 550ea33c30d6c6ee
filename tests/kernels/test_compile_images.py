"""Machine code for sm_90 of the kernels of whole images, at their own launch parameters."""

import pytest
import torch
import triton
from vitgraph.kernels import add_norm, conv_rows, image_embed
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.patch_embed import config


@pytest.mark.parametrize(
    ("T", "D", "class_rows", "side"),
    [(2704, 1536, 0, 728), (1300, 1792, 4, 504), (1025, 1024, 1, 448)],
)
def test_image_embed(T, D, class_rows, side):
    launch = config(T, torch.bfloat16)
    info = inspect(
        image_embed._image_embed_kernel,
        {
            "images_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
            "table_ptr": "*fp32", "live_ptr": "*i32", "x_ptr": "*bf16", "T": "i32", "D": "i32",
        },
        ({} if class_rows else {"bias_ptr": None}) | {
            "R": class_rows + (side // 14) ** 2, "CLASS_ROWS": class_rows, "H": side, "W": side,
            "SIDE": 14, "K": 588, "BLOCK_T": launch.BLOCK_T, "BLOCK_D": launch.BLOCK_D,
            "BLOCK_K": launch.BLOCK_P,
        },
        divisible=["D"],
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0


@pytest.mark.parametrize(
    ("D", "kernel", "has_offset"), [(1536, 3, True), (1792, 2, False), (3200, 2, False)]
)
def test_conv_rows(D, kernel, has_offset):
    info = inspect(
        conv_rows._conv_rows_kernel,
        {
            "x_ptr": "*bf16", "offset_ptr": "*fp32", "live_ptr": "*i32", "out_ptr": "*bf16",
            "T": "i32", "D": "i32",
        },
        ({} if has_offset else {"offset_ptr": None}) | {
            "R": 2704, "SKIP": 0, "H": 52, "W": 52, "OUT": 676, "OUT_W": 26, "KERNEL": kernel,
            "STRIDE": 2, "PADDING": kernel // 3, "BLOCK_R": conv_rows.BLOCK_R,
            "BLOCK_D": conv_rows.BLOCK_D,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 4
    assert info.count("STG.E.128") >= 4


@pytest.mark.parametrize("D", [1792, 4608])
def test_add_norm(D):
    info = inspect(
        add_norm._add_norm_kernel,
        {
            "x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
            "live_ptr": "*i32", "T": "i32", "D": "i32", "eps": "fp32",
        },
        {"BLOCK_D": triton.next_power_of_2(D)},
        divisible=["D"],
        num_warps=add_norm.num_warps(D),
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 2
    assert info.count("STG.E.128") >= 1
