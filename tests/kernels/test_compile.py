"""What the compiler makes of the kernels for the H200, without one."""

from dataclasses import replace

import pytest
from vitgraph.kernels.activation import _activation_kernel
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.gemm import FP32_CONFIG, TILE_RATES, GemmConfig, _gemm_kernel
from vitgraph.kernels.swiglu import _swiglu_kernel


def inspect_gemm(config: GemmConfig, *, activation="", bias=True, residual=False, tma=True):
    m, n, k = config.block_m, config.block_n, config.block_k
    operand = {
        "x": f"tensordesc<bf16[{m},{k}]>" if tma else "*bf16",
        "weight": f"tensordesc<bf16[{n},{k}]>" if tma else "*bf16",
        "out": f"tensordesc<bf16[{m},{n}]>" if tma else "*bf16",
    }
    integers = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32")
    pointers = {"live_ptr": "*i32", **({"bias_ptr": "*bf16"} if bias else {})}
    constexprs = {
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual,
        "USE_TMA": tma,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": config.group_m,
        **({} if bias else {"bias_ptr": None}),
    }
    return inspect(
        _gemm_kernel,
        operand | integers | pointers,
        constexprs,
        divisible=("N", "K", "stride_xm", "stride_wn", "stride_om"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


EPILOGUES = {
    "bias": {},
    "gelu": {"activation": "gelu_tanh"},
    "erf": {"activation": "gelu_erf"},
    "gelu-residual": {"activation": "gelu_tanh", "residual": True},
    "residual": {"bias": False, "residual": True},
    "bias-residual": {"residual": True},
}


def tile_name(config: GemmConfig) -> str:
    return f"{config.block_m}x{config.block_n}"


@pytest.mark.parametrize(
    ("config", "epilogue"),
    [
        pytest.param(config, epilogue, id=f"{tile_name(config)}-{epilogue}")
        for config in TILE_RATES
        for epilogue in EPILOGUES
    ],
)
def test_gemm_by_tma(config, epilogue):
    info = inspect_gemm(config, **EPILOGUES[epilogue])
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0
    assert info.count("UTMALDG") > 0
    assert info.count("UTMASTG") > 0
    # a multiprocessor has 228 KiB, of which every program reserves 1 KiB
    assert config.programs_per_sm * (info.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize("config", TILE_RATES, ids=tile_name)
def test_gemm_by_pointers(config):
    info = inspect_gemm(config, bias=False, activation="silu", tma=False)
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0
    assert info.count("UTMALDG") == 0


def test_elementwise_kernels_use_wide_accesses():
    rows = {"T": "i32", "F": "i32", "live_ptr": "*i32"}
    blocks = {"BLOCK_T": 4, "BLOCK_F": 512}
    activation = inspect(
        _activation_kernel,
        {"x_ptr": "*bf16", "stride_xt": "i32"} | rows,
        {"ACTIVATION": "quick_gelu", "PDL": False} | blocks,
        divisible=("F", "stride_xt"),
    )
    swiglus = [
        inspect(
            _swiglu_kernel,
            {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride_gt": "i32", "stride_ot": "i32"}
            | rows,
            {"LIMIT": limit} | blocks,
            divisible=("F", "stride_gt", "stride_ot"),
        )
        for limit in (None, 10.0)
    ]
    for info in (activation, *swiglus):
        assert info.spill_bytes == 0
        assert info.count("LDG.E.128") > 0
        assert info.count("STG.E.128") > 0


def test_unknown_and_missing_arguments_are_named():
    with pytest.raises(ValueError, match="not an argument: \\['x'\\]"):
        inspect(_swiglu_kernel, {"x": "*bf16"}, {})


def test_a_spill_is_seen():
    too_large = replace(FP32_CONFIG, block_m=256, block_n=256, block_k=32, num_warps=4)
    assert inspect_gemm(too_large).spill_bytes > 0
