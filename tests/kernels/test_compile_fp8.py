"""Machine code for sm_90 of the kernels that quantise, at the launch parameters they ship with."""

import pytest
import triton
from vitgraph.kernels import norm_fp8, quantize
from vitgraph.kernels.compiled import inspect


@pytest.mark.parametrize("has_y", [True, False], ids=["y", "no-y"])
@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("D", [1024, 1152, 1280])
def test_norm_fp8(D, is_rms, has_y):
    launch = norm_fp8.config(D)
    info = inspect(
        norm_fp8._norm_fp8_kernel,
        {
            "x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
            "offset_ptr": "*fp32", "live_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
            "T": "i32", "D": "i32", "eps": "fp32",
        },
        ({"bias_ptr": None} if is_rms else {}) | ({} if has_y else {"y_ptr": None}) | {
            "IS_RMS": is_rms, "ROWS": launch.rows, "BLOCK_D": triton.next_power_of_2(D),
        },
        divisible=["D"],
        num_warps=launch.num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 64  # eight programs of four warps fill a multiprocessor
    assert info.count("LDG.E.128") >= 2 + has_y
    # q, and the stream if it changes; eight values of a thread may make eight bytes
    assert info.count("STG.E.128") + info.count("STG.E.64") >= 1 + has_y
    assert "cvt.rn.satfinite.e4m3x2.f32" in info.ptx


@pytest.mark.parametrize(
    ("F", "transform"),
    [
        (1152, ""), (1280, ""), (4304, "gelu_tanh"), (4096, "gelu_tanh"), (5120, "quick_gelu"),
        (3456, "swiglu"), (4608, "gelu_erf"), (4608, ""),
    ],
)  # fmt: skip
def test_quantize(F, transform):
    rows, num_warps = quantize.config(F)
    main, rest = quantize.column_blocks(F)
    info = inspect(
        quantize._quantize_kernel,
        {
            "x_ptr": "*bf16", "live_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
            "T": "i32", "F": "i32", "stride_xt": "i32",
        },
        {"TRANSFORM": transform, "ROWS": rows, "MAIN": main, "REST": rest},
        divisible=["F", "stride_xt"],
        num_warps=num_warps,
    )  # fmt: skip
    assert info.spill_bytes == 0
    assert info.registers <= 64
    operands = 2 if transform == "swiglu" else 1
    assert info.count("LDG.E.128") >= operands * (main // (num_warps * 32 * 8))
    assert info.count("STG.E.128") + info.count("STG.E.64") >= 1
    assert "cvt.rn.satfinite.e4m3x2.f32" in info.ptx
