"""Machine code for sm_90 of the kernels that quantise, at the launch parameters they ship with."""

import pytest
import triton
from vitgraph.kernels import bounded_fp8, norm, norm_fp8, quantize
from vitgraph.kernels.compiled import inspect

CAST = "cvt.rn.satfinite.e4m3x2.f32"


def loads(info):
    """128-bit loads from global memory."""
    return info.count("LDG.E.128")


def stores(info):
    """Stores of 8 or 16 values in fp8 at a time."""
    return info.count("STG.E.128") + info.count("STG.E.64")


# (T, is_rms, whether there are bounds); those are a few instructions a row
NORMS = [
    (16384, False, True), (4096, False, False), (4096, False, True), (4096, True, True),
    (1024, False, True), (1024, True, False), (256, False, True), (256, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("T", "is_rms", "has_bounds"), NORMS)
@pytest.mark.parametrize("D", [1024, 1152, 1280])
def test_norm_fp8(D, T, is_rms, has_bounds):
    launch = norm.config(T, D)
    block_d, rest = norm.blocks(D, launch)
    assert (launch.split, rest > 0) == (T >= 4096, T >= 4096 and D > 1024)
    absent = {"bias_ptr": None} if is_rms else {}
    if not has_bounds:
        absent |= {"bound_ptr": None, "norms_ptr": None}
    info = inspect(
        norm_fp8._norm_fp8_kernel,
        {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "offset_ptr": "*fp32",
            "live_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
            "norms_ptr": "*fp32", "bound_ptr": "*fp32", "T": "i32",
            "stride_qt": "i32", "eps": "fp32",
        },
        absent | {
            "D": D, "IS_RMS": is_rms, "ROWS": launch.rows, "BLOCK_D": block_d,
            "REST": rest, "ALIGNED": True, "PDL": False,
        },
        divisible=["stride_qt"],
        num_warps=launch.num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    if not launch.split:  # else a warp holds two rows in its registers
        assert info.registers <= 72  # seven programs of four warps on a multiprocessor
    else:  # five to a sum or maximum of each row and block; none for vectors and columns of q
        results = 3 if is_rms else 4
        exchanges = 5 * results * launch.rows * (2 if rest else 1) + 4
        # once more for programs of live rows alone, which are spared a quarter of the instructions
        assert exchanges < info.count("SHFL") <= 2 * exchanges
    assert loads(info) >= launch.rows * block_d // (launch.num_warps * 32 * 8)
    assert stores(info) >= 1
    assert CAST in info.ptx


@pytest.mark.parametrize("has_bound", [True, False], ids=["bound", "no-bound"])
@pytest.mark.parametrize("F", [1152, 1280, 4304, 4096, 3456, 4608])
def test_quantize(F, has_bound):
    rows, num_warps = quantize.config(F)
    main, rest = quantize.column_blocks(F)
    info = inspect(
        quantize._quantize_kernel,
        {
            "x_ptr": "*bf16", "live_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
            "norms_ptr": "*fp32", "bound_ptr": "*fp32", "T": "i32", "F": "i32", "stride_xt": "i32",
            "stride_qt": "i32",
        },
        ({} if has_bound else {"bound_ptr": None, "norms_ptr": None})
        | {"ROWS": rows, "MAIN": main, "REST": rest},
        divisible=["F", "stride_xt", "stride_qt"],
        num_warps=num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    # room for 16 programs of one warp and four of more, each with a row in flight
    assert info.registers * num_warps * 32 * (16 if num_warps == 1 else 4) <= 65536
    assert loads(info) >= main // (num_warps * 32 * 8)
    assert stores(info) >= 1
    assert CAST in info.ptx


@pytest.mark.parametrize("activation", ["", "gelu_tanh", "gelu_erf", "quick_gelu", "silu"])
def test_quantize_bounded(activation):
    rows, columns = bounded_fp8.BLOCK_T, bounded_fp8.BLOCK_F
    assert triton.next_power_of_2(rows * columns) == rows * columns == 16 * 4 * 32
    info = inspect(
        bounded_fp8._quantize_bounded_kernel,
        {
            "y_ptr": "*bf16", "bound_ptr": "*fp32", "live_ptr": "*i32",
            "q_ptr": "*fp8e4nv", "T": "i32", "F": "i32", "stride_yt": "i32", "stride_qt": "i32",
        },
        {"ACTIVATION": activation, "BLOCK_T": rows, "BLOCK_F": columns},
        divisible=["F", "stride_yt", "stride_qt"],
        num_warps=4,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 64
    assert loads(info) >= 2
    assert stores(info) >= 1
    assert CAST in info.ptx
