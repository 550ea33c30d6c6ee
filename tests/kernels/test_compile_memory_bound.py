"""Machine code for sm_90 of the kernels that move rows, at the launch parameters they ship with."""

import pytest
import torch
import triton
from vitgraph.kernels import (
    layout,
    norm,
    patch_embed,
    positions,
    probe_attention,
    residual,
    rope,
    zero_padding,
)
from vitgraph.kernels.compiled import inspect


@pytest.mark.parametrize("has_state", [False, True], ids=["alone", "state"])
@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("T", [196, 4096])
@pytest.mark.parametrize("D", [1024, 1152, 1280, 4608])
def test_norm(D, T, is_rms, has_state):
    launch = norm.config(T, D)
    block_d, rest = norm.blocks(D, launch)
    none = {"destination_ptr": None, "partials_ptr": None}
    none |= {"bias_ptr": None} if is_rms else {}
    none |= {} if has_state else {"state_ptr": None}
    info = inspect(
        norm._norm_kernel,
        {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "offset_ptr": "*fp32",
            "live_ptr": "*i32", "y_ptr": "*bf16", "T": "i32", "eps": "fp32",
            **({"state_ptr": "*bf16"} if has_state else {}),
        },
        none | {
            "D": D, "IS_RMS": is_rms, "LIVE_GROUP": 1, "SPLITS": 0, "ROWS": launch.rows,
            "BLOCK_D": block_d, "REST": rest, "PDL": False,
        },
        num_warps=launch.num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 2
    assert info.count("STG.E.128") >= 1 + has_state
    if launch.split:  # five to a sum of each row and block; none for vectors
        sums = 1 if is_rms else 2
        exchanges = 5 * sums * launch.rows * (2 if rest else 1)
        # once more for programs of live rows alone, which are spared a third of the instructions
        assert exchanges < info.count("SHFL") <= 2 * exchanges


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("D", [64, 72, 80, 96, 128])
def test_rope(D, has_norm):
    info = inspect(
        rope._rope_kernel,
        {
            "qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "num_angles": "i32", "weight_ptr": "*bf16",
        },
        ({} if has_norm else {"weight_ptr": None}) | {
            "EPS": 1e-5 if has_norm else 0.0, "HEADS": 32, "HALF": D // 2, "BLOCK_H": 32,
            "BLOCK_HALF": triton.next_power_of_2(D // 2), "PDL": False,
        },
    )  # fmt: skip
    assert info.spill_bytes == 0
    # half a head is 64, 72, 80, 96 or 128 bytes: every row of it starts on 8 bytes at least
    assert info.count("LDG.E.64") + info.count("LDG.E.128") >= 2


@pytest.mark.parametrize("D", [72, 88])
def test_rope_by_units(D):
    half = D // 2
    unit = half & -half
    info = inspect(
        rope._rope_units_kernel,
        {
            "qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "T": "i32", "num_angles": "i32",
        },
        {"HEADS": 32, "HALF": half, "UNIT": unit, "BLOCK": rope.UNITS, "PDL": False},
        num_warps=8,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 32  # eight programs of eight warps fill a multiprocessor
    # a unit of each half, of angles too
    assert info.count("LDG.E.64") + info.count("LDG.E.128") >= 2


@pytest.mark.parametrize("D", [64, 72, 80, 128])
def test_rope_of_neighbours(D):
    info = inspect(
        rope._rope_neighbours_kernel,
        {
            "qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "T": "i32", "num_angles": "i32",
        },
        {"HEADS": 32, "HALF": D // 2, "UNIT": 4, "BLOCK": rope.UNITS, "PDL": False},
        num_warps=8,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 32
    # a unit, its cosines and its sines, each at once
    assert info.count("LDG.E.128") >= 3
    assert info.count("STG.E.128") >= 1


@pytest.mark.parametrize("T", [256, 16384])
@pytest.mark.parametrize(
    ("P", "D", "side", "sampling"),
    [
        (1536, 1152, 48, "bilinear_corners"),
        (1176, 1280, 0, "bilinear_corners"),
        (588, 1152, 27, "bilinear_corners"),
        (588, 1152, 27, "bilinear"),
        (1176, 1536, 24, "bilinear"),
        (1176, 1536, 24, "bicubic"),
        (768, 1152, 16, "bilinear_antialias"),
    ],
)
def test_patch_embed(T, P, D, side, sampling):
    launch = patch_embed.config(T, torch.bfloat16, sampling)
    info = inspect(
        patch_embed._patch_embed_kernel,
        {
            "pixels_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
            "source_ptr": "*i32", "table_ptr": "*bf16", "position_ptr": "*i32",
            "live_ptr": "*i32", "x_ptr": "*bf16", "T": "i32", "D": "i32",
        },
        ({} if side else {"table_ptr": None, "position_ptr": None, "bias_ptr": None}) | {
            "P": P, "SIDE": side, "SAMPLING": sampling, "BLOCK_T": launch.BLOCK_T,
            "BLOCK_D": launch.BLOCK_D, "BLOCK_P": launch.BLOCK_P,
            "FEW": T <= patch_embed.MOST_FEW, "PDL": False,
        },
        divisible=["D"],
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0


@pytest.mark.parametrize("sampling", ["bilinear_corners", "bilinear", "bicubic"])
def test_positions_added_to_products(sampling):
    info = inspect(
        patch_embed._add_rows_kernel,
        {
            "products_ptr": "*fp32", "bias_ptr": "*bf16", "table_ptr": "*bf16",
            "position_ptr": "*i32", "live_ptr": "*i32", "x_ptr": "*bf16", "T": "i32", "D": "i32",
        },
        {
            "SIDE": 48, "SAMPLING": sampling, "BLOCK_T": patch_embed.ADD_T,
            "BLOCK_D": patch_embed.ADD_D,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    # products of four elements at once
    assert info.count("LDG.E.128") >= 4
    assert info.count("STG.E.64") + info.count("STG.E.128") >= 1


@pytest.mark.parametrize("sampling", ["bilinear_corners", "bilinear", "bicubic"])
def test_add_positions(sampling):
    info = inspect(
        positions._add_positions_kernel,
        {
            "x_ptr": "*bf16", "table_ptr": "*bf16", "position_ptr": "*i32", "live_ptr": "*i32",
            "T": "i32", "D": "i32",
        },
        {
            "SIDE": 24, "SAMPLING": sampling, "BLOCK_T": positions.BLOCK_T,
            "BLOCK_D": positions.BLOCK_D,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    # x and every tap of the table
    assert info.count("LDG.E.128") >= (17 if sampling == "bicubic" else 5)
    assert info.count("STG.E.128") >= 1


def test_add_antialiased_positions():
    info = inspect(
        positions._add_positions_kernel,
        {
            "x_ptr": "*bf16", "table_ptr": "*bf16", "position_ptr": "*i32", "live_ptr": "*i32",
            "T": "i32", "D": "i32",
        },
        {
            "SIDE": 16, "SAMPLING": "bilinear_antialias", "BLOCK_T": positions.BLOCK_T,
            "BLOCK_D": positions.BLOCK_D,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes <= 8  # none with Triton 3.6, two registers with 3.9
    assert info.count("FFMA") > 0  # fp32 products
    assert info.count("STG.E.128") >= 1


@pytest.mark.parametrize("D", [64, 72, 96])
def test_probe_attention(D):
    info = inspect(
        probe_attention._probe_attention_kernel,
        {
            "q_ptr": "*fp32", "k_ptr": "*bf16", "v_ptr": "*bf16", "cu_seqlens_ptr": "*i32",
            "out_ptr": "*bf16", "stride_kt": "i32", "stride_vt": "i32", "scale": "fp32",
        },
        {
            "D": D, "BLOCK_N": probe_attention.BLOCK_N,
            "BLOCK_D": triton.next_power_of_2(D),
        },
        divisible=["stride_kt", "stride_vt"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.64") + info.count("LDG.E.128") >= 2


@pytest.mark.parametrize("splits", [0, 3])
def test_residual(splits):
    partials = {"partials_ptr": "*fp32"} if splits else {}
    info = inspect(
        residual._residual_kernel,
        {
            "x_ptr": "*bf16", "offset_ptr": "*fp32", "live_ptr": "*i32", "out_ptr": "*bf16",
            "T": "i32", "D": "i32", **partials,
        },
        ({} if splits else {"partials_ptr": None}) | {
            "SPLITS": splits, "BLOCK_T": residual.BLOCK_T, "BLOCK_D": 2048, "PDL": False,
        },
        divisible=["D"],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.count("LDG.E.128") >= 2


@pytest.mark.parametrize("buffers", range(1, zero_padding.MOST_BUFFERS + 1))
def test_zero_padding(buffers):
    pointers = [f"x{i}_ptr" for i in range(zero_padding.MOST_BUFFERS)]
    sizes = [f"row_bytes{i}" for i in range(zero_padding.MOST_BUFFERS)]
    info = inspect(
        zero_padding._zero_padding_kernel,
        {
            **dict.fromkeys(pointers[:buffers], "*u8"), **dict.fromkeys(sizes[:buffers], "i32"),
            "live_ptr": "*i32", "T": "i32",
        },
        {
            **dict.fromkeys((*pointers[buffers:], *sizes[buffers:])),
            "BLOCK": zero_padding.BLOCK, "PDL": False,
        },
        divisible=sizes[:buffers],
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 32  # eight programs of four warps are there at once
    assert info.count("STG.E.128") == buffers * zero_padding.BLOCK // (4 * 32 * 16)


@pytest.mark.parametrize(("window", "clips"), [(0, False), (8, False), (0, True)])
def test_layout(window, clips):
    info = inspect(
        layout._layout_kernel,
        {
            "grid_ptr": "*i32", "inv_freq_ptr": "*fp32", "cu_seqlens_ptr": "*i32",
            "cu_window_seqlens_ptr": "*i32", "position_ptr": "*i32", "source_ptr": "*i32",
            "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "tickets_ptr": "*i32", "num_items": "i32",
            "num_rows": "i32", "num_frames": "i32", "num_windows": "i32",
        },
        {
            "MERGE": 2, "WINDOW": window, "CLIPS": clips, "HALF": 40, "BLOCK": layout.BLOCK,
            "BLOCK_I": layout.BLOCK_I, "BLOCK_HALF": 64, "PDL": False,
        },
    )  # fmt: skip
    # the reduction of large angles needs a short array in local memory; nothing else may spill
    assert info.spill_bytes <= 32
    # angles reach thousands of radians: the approximate instructions alone would be wrong
    assert "sin.approx" not in info.ptx
