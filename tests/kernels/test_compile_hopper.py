"""What the compiler makes of the Gluon matrix product for the H200, without one."""

import pytest
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.gemm_tuning import GATED, HopperConfig, shipped_tiles

gemm_hopper = pytest.importorskip("vitgraph.kernels.gemm_hopper")
gl = gemm_hopper.gl

EPILOGUES = {
    "bias": {},
    "gelu": {"activation": "gelu_tanh"},
    "erf": {"activation": "gelu_erf"},
    "quick": {"activation": "quick_gelu"},
    "silu": {"activation": "silu"},
    "gated": {"activation": "silu", "gated": True},
    "residual": {"bias": False, "residual": True},
}


def inspect_hopper(config: HopperConfig, *, activation="", bias=True, residual=False, gated=False):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    m, n, k = config.block_m, config.block_n, gemm_hopper.BLOCK_K
    head = 1 << (n.bit_length() - 1)

    def descriptor(rows, columns):
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    signature = {
        "x": descriptor(m, k),
        "weight": descriptor(head // 2 if gated else head, k),
        "out": descriptor(m, gemm_hopper.STORE_N),
        "live_ptr": "*i32",
        **dict.fromkeys(("M", "N", "K"), "i32"),
    }
    constexprs = {
        "ACTIVATION": activation,
        "HAS_RESIDUAL": residual,
        "IS_GATED": gated,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "GROUP_M": gemm_hopper.GROUP_M,
        "STAGES": config.num_stages,
        "BUFFERS": gemm_hopper.BUFFERS,
        "num_warps": 4,
    }
    for name, is_given, kind in (
        ("bias_ptr", bias, "*bf16"),
        ("weight_tail", n > head, descriptor(n - head, k)),
    ):
        if is_given:
            signature[name] = kind
        else:
            constexprs[name] = None
    return inspect(
        gemm_hopper._gemm_hopper_kernel,
        signature,
        constexprs,
        divisible=("N", "K"),
        num_warps=4,
        maxnreg=gemm_hopper.MAX_REGISTERS,
    )


@pytest.mark.parametrize(
    ("config", "epilogue"),
    [
        pytest.param(config, epilogue, id=f"{config.block_m}x{config.block_n}-{name}")
        for name, epilogue in EPILOGUES.items()
        for config in shipped_tiles(GATED if name == "gated" else epilogue.get("activation"))
    ],
)
def test_tile(config, epilogue):
    info = inspect_hopper(config, **epilogue)
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0
    assert info.count("UTMALDG") > 0
    assert info.count("UTMASTG") > 0
    assert info.shared_bytes <= 227 * 1024
