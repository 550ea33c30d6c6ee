"""What the compiler makes of the Gluon attention for the H200, without one."""

import re

import pytest
import torch
from vitgraph.kernels.attention_hopper import (
    MAX_REGISTERS,
    ROWS,
    LaunchConfig,
    box,
    holds_maximum,
    launch_config,
    q_buffers,
    short_step,
    split_head_dim,
)
from vitgraph.kernels.compiled import inspect

kernel = pytest.importorskip("vitgraph.kernels.attention_hopper_kernel")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def inspect_attention(D, config: LaunchConfig, dtype="bf16", *, drawn=False, out=""):
    first, second = split_head_dim(D)

    def descriptor(rows, columns):
        shape, layout = box(rows, columns)
        return f"tensordesc<{dtype}{shape},{layout!r}>"

    signature = {
        "out_ptr": f"*{out or dtype}",
        "cu_ptr": "*i32",
        "num_segments": "i32",
        "scale_log2": "fp32",
    }
    constexprs = {
        "D": D,
        "HEADS": 16,
        "GROUPS": config.groups,
        "STAGES": config.num_stages,
        "Q_BUFFERS": q_buffers(config, D, DTYPES[dtype]),
        "TAIL": short_step(config, D),
        "HELD": holds_maximum(config, D, DTYPES[dtype]),
        "num_warps": 4,
    }
    if drawn:
        signature["tickets_ptr"] = "*i32"
    else:
        constexprs["tickets_ptr"] = None
    for name, rows in (("q", ROWS), ("k", config.block_n), ("v", config.block_n)):
        signature[f"{name}0"] = descriptor(rows, first)
        if second:
            signature[f"{name}1"] = descriptor(rows, second)
        else:
            constexprs[f"{name}1"] = None
    return inspect(
        kernel.attention_hopper_kernel,
        signature,
        constexprs,
        num_warps=4,
        maxnreg=MAX_REGISTERS[config.groups],
    )


def main_loops(sass: str) -> list[list[str]]:
    """Instructions of the innermost loops that hold matrix instructions."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = []
    for end, (_, text) in enumerate(lines):
        if branch := re.search(r"\bBRA .*?0x([0-9a-f]+)", text):
            start = index[int(branch[1], 16)]
            body = [text for _, text in lines[start : end + 1]]
            # a wait that has to be repeated lies after the exit and jumps back
            if any("HGMMA" in text for text in body) and not any("EXIT" in text for text in body):
                spans.append((start, end + 1))
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] for b in spans if b != a)]
    return [[text for _, text in lines[start:end]] for start, end in inner]


def steps(sass: str) -> tuple[list[list[str]], list[list[str]]]:
    """The loops of `main_loops`, and those of groups that begin again, which load by themselves."""
    loops = main_loops(sass)
    again = [loop for loop in loops if any("UTMALDG" in text for text in loop)]
    return [loop for loop in loops if loop not in again], again


CASES = [
    pytest.param(D, launch_config(D, rows, 16, 132), dtype, id=f"{D}-{rows}-{dtype}")
    for D in (64, 72, 80, 128)
    for rows, dtype in (
        (196, "bf16"),
        (1296, "bf16"),
        (4096, "bf16"),
        (4096, "fp16"),
        (16384, "bf16"),
    )
] + [
    pytest.param(D, launch_config(D, 16384, 16, 132), "bf16", id=f"{D}-16384-bf16")
    for D in (40, 88, 96)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 72])
def test_where_tiles_are_few_no_second_program_fits(D, dtype):
    info = inspect_attention(D, launch_config(D, 256, 16, 132), dtype)
    used = info.shared_bytes + 1024  # the system's own
    assert used <= 228 << 10 < 2 * used


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize(("D", "config", "dtype"), CASES)
def test_attention(D, config, dtype, drawn):
    info = inspect_attention(D, config, dtype, drawn=drawn)
    first, second = split_head_dim(D)
    # a barrier that is initialised and never used shares its memory with other data
    turns = config.groups if config.groups > 1 else 0
    mail = 4 if drawn else 0
    held = holds_maximum(config, D, DTYPES[dtype])
    parts = config.groups if held else 0
    loads = 2 * q_buffers(config, D, DTYPES[dtype]) + 3 * config.num_stages + parts
    ready = 1
    assert info.ptx.count("mbarrier.init") == ready + loads + turns + mail
    assert info.ptx.count("atom.") == (2 if drawn else 0)
    # what a tile begins with may wait in local memory, nothing that its steps use
    assert info.spill_bytes <= 256
    assert not any(re.search("LDL|STL", text) for loop in steps(info.sass)[0] for text in loop)
    assert info.shared_bytes * config.programs_per_sm <= 227 << 10
    assert info.count("UTMALDG.3D") > 0
    assert re.search("USETMAXREG.*0x18 ", info.sass), "the loads keep the registers of a group"
    if config.groups == 2:
        assert re.search("USETMAXREG.*0xf0 ", info.sass), "a group does not get 240 registers"
    assert info.count(f"HGMMA.64x{config.block_n}x16") > 0
    assert info.count(f"HGMMA.64x{first}x16") > 0
    assert second == 0 or info.count(f"HGMMA.64x{second}x16") > 0


@pytest.mark.parametrize(("D", "rows"), [(64, 784), (64, 1296), (72, 784), (80, 16384), (128, 784)])
def test_casts_to_fp8(D, rows):
    """Two values an instruction, saturating, and stores of 8 bytes; the steps are as ever."""
    config = launch_config(D, rows, 16, 132)
    wide, info = (inspect_attention(D, config, out=out) for out in ("bf16", "fp8e4nv"))
    assert "cvt.rn.satfinite.e4m3x2.f32" in info.ptx
    assert info.count("STG.E.64") > 0
    assert info.spill_bytes <= 320  # none of it in the steps
    loops = steps(info.sass)[0]
    assert not any(re.search("LDL|STL", text) for loop in loops for text in loop)
    assert [len(loop) for loop in loops] == [len(loop) for loop in steps(wide.sass)[0]]


@pytest.mark.parametrize(("D", "config", "dtype"), CASES)
def test_softmax_runs_under_the_products_with_v(D, config, dtype):
    """Between the wait for the scores and the wait for the products that were started after."""
    held = holds_maximum(config, D, DTYPES[dtype])
    loops, again = steps(inspect_attention(D, config, dtype).sass)
    assert len(loops) == config.groups
    assert len(again) == (config.groups if held else 0)
    for loop in loops:
        waits = [i for i, text in enumerate(loop) if "WARPGROUP.DEPBAR" in text]
        assert len(waits) == 2
        started = 2 if split_head_dim(D)[1] else 1
        assert f"gsb0, {started:#x}" in loop[waits[0]]
        assert "gsb0, 0x0" in loop[waits[1]]
        assert not any("HGMMA" in text for text in loop[waits[0] :])
        exponentials = [i for i, text in enumerate(loop) if "MUFU.EX2" in text]
        # 64 rows over 128 threads, and alpha where the maximum runs
        assert len(exponentials) == config.block_n // 2 + (0 if held else 2)
        assert any("FMNMX" in text for text in loop) != held
        assert all(waits[0] < i < waits[1] for i in exponentials)
