"""What the compiler makes of the attention kernels for the H200, without one."""

import pytest
import torch
from vitgraph.kernels import attention_triton, window_attention
from vitgraph.kernels.compiled import inspect

POINTERS = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")


def views(D):
    return torch.zeros(1, 3, 16, D, dtype=torch.bfloat16).unbind(1)


def inspect_attention(D, capability=90, out="bf16"):
    config = attention_triton.launch_config(D, torch.bfloat16)
    q, k, v = views(D)
    return config, inspect(
        attention_triton._varlen_attention_kernel,
        POINTERS
        | {"cu_seqlens_ptr": "*i32", "num_segments": "i32", "scale_log2": "fp32"}
        | {"out_ptr": f"*{out}"},
        attention_triton.kernel_constants(q, k, v, q.contiguous(), config),
        capability=capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def inspect_window(D, max_window, out="bf16"):
    config = window_attention.launch_config(max_window, D, torch.bfloat16)
    return inspect(
        window_attention._window_attention_kernel,
        POINTERS
        | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "cu_ptr": "*i32", "scale_log2": "fp32"}
        | {"out_ptr": f"*{out}"},
        window_attention.kernel_constants(*views(D), config) | {"PDL": False},
        num_warps=config.num_warps,
    )


def loop_of(sass: str) -> str:
    """The main loop from its first matrix instruction to the branch that closes it."""
    lines = sass.splitlines()
    first = next(i for i, line in enumerate(lines) if "HGMMA" in line)
    last = next(i for i, line in enumerate(lines) if i > first and " BRA " in line)
    return "\n".join(lines[first:last])


@pytest.mark.parametrize("D", [64, 72, 80])
def test_attention(D):
    config, info = inspect_attention(D)
    # scores, then the columns of v in blocks of 64 and 32
    assert info.count(f"HGMMA.64x{config.block_n}x16") > 0
    assert info.count("HGMMA.64x64x16") > 0
    assert info.count("HGMMA.64x16x16") == 0, "16 columns of v are compiled to wrong code"
    # two programs on a multiprocessor at least: 64 Ki registers and 227 KiB
    assert info.registers * 32 * config.num_warps * 2 <= 1 << 16
    assert info.shared_bytes * 2 <= 227 << 10
    loop = loop_of(info.sass)
    assert "LDL" not in loop
    assert "STL" not in loop
    assert info.spill_bytes == 0
    assert info.count("LDGSTS.E.BYPASS.128") > 0, "k and v are not loaded 16 bytes at a time"


@pytest.mark.parametrize("capability", [80, 89])
def test_attention_on_older_devices(capability):
    _, info = inspect_attention(80, capability)
    assert info.spill_bytes == 0
    assert info.count("HMMA") > 0
    assert info.shared_bytes <= 99 << 10


@pytest.mark.parametrize("max_window", [64, 128, 256])
def test_window(max_window):
    info = inspect_window(80, max_window)
    assert info.spill_bytes == 0
    assert info.count("HGMMA") > 0
    assert info.count("LDG.E.128") > 0


def test_casts_to_fp8():
    for info in (
        inspect_window(80, 64, "fp8e4nv"),
        inspect_attention(80, out="fp8e4nv")[1],
        inspect_attention(80, 89, out="fp8e4nv")[1],
    ):
        assert "cvt.rn.satfinite.e4m3x2" in info.ptx
        assert info.spill_bytes == 0
