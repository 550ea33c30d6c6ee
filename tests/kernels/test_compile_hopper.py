"""What the compiler makes of the Gluon matrix product for the H200, without one."""

import pytest
from vitgraph.kernels import background, linear_fp8
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.gemm_tuning import GATED, ROTATED, HopperConfig, shipped_tiles

gemm_hopper = pytest.importorskip("vitgraph.kernels.gemm_hopper")
gl = gemm_hopper.gl

FP8 = "fp8e4nv"

EPILOGUES = {
    "bias": {},
    "gelu": {"activation": "gelu_tanh"},
    "erf": {"activation": "gelu_erf"},
    "quick": {"activation": "quick_gelu"},
    "silu": {"activation": "silu"},
    "gated": {"activation": "silu", "gated": True},
    "residual": {"bias": False, "residual": True},
    "rotated": {"rotated": True},
}
# of fp8 operands, by what is written; all by one tile
FP8_EPILOGUES = {
    "bias": {},
    "residual": {"bias": False, "residual": True},
    "gated": {"activation": "silu", "gated": True},
    "gelu": {"activation": "gelu_tanh"},
    "erf": {"activation": "gelu_erf"},
    "quick": {"activation": "quick_gelu"},
    "plain-fp8": {"out": FP8},
    "gelu-fp8": {"activation": "gelu_tanh", "out": FP8},
    "erf-fp8": {"activation": "gelu_erf", "out": FP8},
    "quick-fp8": {"activation": "quick_gelu", "out": FP8},
    "rotated": {"rotated": True},
    "silu-fp8": {"activation": "silu", "out": FP8},
}


def inspect_hopper(
    config: HopperConfig, *, activation="", bias=True, residual=False, gated=False, operands="bf16",
    out="bf16", rotated=False,
):  # fmt: skip
    def descriptor(rows, columns, element):
        size = 1 if element == FP8 else 2
        layout = gl.NVMMASharedLayout(
            swizzle_byte_width=columns * size, element_bitwidth=8 * size, rank=2
        )
        return f"tensordesc<{element}[{rows}, {columns}],{layout!r}>"

    is_fp8 = operands == FP8
    m, n = config.block_m, config.block_n
    k = gemm_hopper.BLOCK_K_BYTES // (1 if is_fp8 else 2)
    head = 1 << (n.bit_length() - 1)
    signature = {
        "x": descriptor(m, k, operands),
        "weight": descriptor(head // 2 if gated else head, k, operands),
        "out": descriptor(m, gemm_hopper.STORE_N, out),
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
        ("weight_tail", n > head, descriptor(n - head, k, operands)),
        ("x_scale_ptr", is_fp8, "*fp32"),
        ("w_scale_ptr", is_fp8, "*fp32"),
        ("out_scale_ptr", out == FP8, "*fp32"),
        ("position_ptr", rotated, "*i32"),
        ("turns_ptr", rotated, "*fp32"),
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


def key_of(epilogue):
    """As gemm_tuning.py names it."""
    names = {"gated": GATED, "rotated": ROTATED}
    return next((names[n] for n in names if n in epilogue), epilogue.get("activation"))


def tiles_and(epilogues):
    """Every epilogue with the tiles that it ships with."""
    return [
        pytest.param(config, epilogue, id=f"{config.block_m}x{config.block_n}-{name}")
        for name, epilogue in epilogues.items()
        for config in shipped_tiles(key_of(epilogue))
    ]


def check_shipped(info, product, other):
    """It multiplies by `product` alone, moves tiles by TMA, spills nothing and fits."""
    assert info.spill_bytes == 0
    assert info.registers <= gemm_hopper.MAX_REGISTERS
    assert info.count(product) > 0
    assert info.count(other) == 0
    assert info.count("UTMALDG") > 0
    assert info.count("UTMASTG") > 0
    assert info.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(("config", "epilogue"), tiles_and(EPILOGUES))
def test_tile(config, epilogue):
    info = inspect_hopper(config, **epilogue)
    check_shipped(info, "HGMMA", "QGMMA")
    assert "e4m3x2" not in info.ptx
    # pairs lie in a thread: rotating them exchanges nothing
    assert info.count("SHFL") == 0
    assert ("sin.approx" in info.ptx) == ("rotated" in epilogue)


@pytest.mark.parametrize("epilogue", [{}, {"activation": "gelu_erf"}], ids=["bias", "erf"])
def test_tile_of_the_background(epilogue):
    check_shipped(inspect_hopper(background.TILE, **epilogue), "HGMMA", "QGMMA")


@pytest.mark.parametrize("epilogue", FP8_EPILOGUES.values(), ids=list(FP8_EPILOGUES))
def test_fp8_tile(epilogue):
    info = inspect_hopper(linear_fp8.TILE, operands=FP8, **epilogue)
    check_shipped(info, "QGMMA", "HGMMA")
    # rounded to the nearest and saturated, where the output is fp8
    assert ("cvt.rn.satfinite.e4m3x2.f32" in info.ptx) == ("out" in epilogue)
