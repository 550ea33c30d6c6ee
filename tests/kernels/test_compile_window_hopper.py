"""What the compiler makes of the Gluon window attention for the H200, without one."""

import re

import pytest
from vitgraph.kernels.attention_hopper import SHARED_BYTES, box, split_head_dim
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.window_attention_hopper import MAX_WINDOW, room

kernel = pytest.importorskip("vitgraph.kernels.window_attention_hopper_kernel")


def inspect_window(D, dtype="bf16", *, out="", spare=0):
    def descriptor(columns):
        shape, layout = box(MAX_WINDOW, columns)
        return f"tensordesc<{dtype}{shape},{layout!r}>"

    signature = {
        "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{out or dtype}", "cu_ptr": "*i32",
        "scale_log2": "fp32",
    }  # fmt: skip
    constexprs = {"D": D, "HEADS": 16, "ROOM": spare, "num_warps": 4}
    halves = split_head_dim(D // 2)
    for name, widths in (("q", halves), ("k", halves), ("v", split_head_dim(D))):
        for i, width in enumerate(widths):
            if width:
                signature[f"{name}{i}"] = descriptor(width)
            else:
                constexprs[f"{name}{i}"] = None
    return inspect(
        kernel.window_attention_hopper_kernel, signature, constexprs,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


CASES = [(80, "bf16", ""), (80, "fp16", ""), (80, "bf16", "fp8e4nv"), (64, "bf16", ""),
         (16, "bf16", ""), (48, "bf16", ""), (96, "bf16", ""), (112, "bf16", ""),
         (128, "bf16", "")]  # fmt: skip


@pytest.mark.parametrize(("D", "dtype", "out"), CASES)
def test_nothing_spills_and_boxes_come_by_tma(D, dtype, out):
    info = inspect_window(D, dtype, out=out)
    assert info.spill_bytes == 0
    parts = sum(2 * 2 if width else 0 for width in split_head_dim(D // 2))
    assert info.count("UTMALDG") == parts + sum(width > 0 for width in split_head_dim(D))
    assert info.count("HGMMA") > 0
    if out:
        assert "cvt.rn.satfinite.e4m3x2" in info.ptx


def test_four_programs_of_qwen2_5_vl_fit_on_a_multiprocessor():
    info = inspect_window(80)
    assert info.registers * 128 * 4 <= 1 << 16
    assert (info.shared_bytes + 1024) * 4 <= 228 << 10


def test_constants_alone_are_read_before_the_wait():
    """Offsets and angles, which the layout wrote; q, k and v come behind it."""
    sass = inspect_window(80).sass.splitlines()
    (wait,) = (i for i, line in enumerate(sass) if "ACQBULK" in line)
    loads = [i for i, line in enumerate(sass) if re.search(r"\bLDG\b", line)]
    copies = [i for i, line in enumerate(sass) if "UTMALDG" in line]
    assert loads
    assert max(loads) < wait < min(copies)


@pytest.mark.parametrize("D", [16, 64, 80, 96, 128])
def test_with_room_two_programs_fit_and_no_third(D):
    used = inspect_window(D, spare=room(D)).shared_bytes + 1024  # the system's own
    assert 2 * used <= 228 << 10 < 3 * used
    assert used <= SHARED_BYTES
    assert inspect_window(D).shared_bytes + 1024 + (room(D) - 1 << 10) <= used
