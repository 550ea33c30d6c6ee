"""Kernels that start before the one before has ended: who does, and what they wait for."""

import re
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
from vitgraph.kernels import (
    activation,
    layout,
    norm,
    norm_fp8,
    patch_embed,
    pdl,
    residual,
    rope,
    window_attention,
    zero_padding,
)
from vitgraph.kernels.compiled import inspect
from vitgraph.kernels.pdl import (
    FEW_ROWS,
    first_options,
    kernel_chain,
    ordinary_kernels,
    pdl_options,
    starts_early,
)


class Rows:
    """What `starts_early` asks of a tensor."""

    def __init__(self, count=1, device="cuda"):
        self.count = count
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def __len__(self):
        return self.count


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A device of compute capability 9.0, or what a test sets."""
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    pdl._has_pdl.cache_clear()
    yield found
    pdl._has_pdl.cache_clear()


def test_only_inside_a_chain():
    assert not starts_early(Rows())
    with kernel_chain():
        assert starts_early(Rows())
        with kernel_chain():
            assert starts_early(Rows())
        assert starts_early(Rows()), "the inner one has ended, the outer has not"
    assert not starts_early(Rows())


def test_ordinary_kernels_in_a_chain():
    with kernel_chain():
        with ordinary_kernels():
            assert not starts_early(Rows())
        assert starts_early(Rows()), "the chain goes on"


def test_an_error_ends_the_chain():
    with pytest.raises(RuntimeError, match="in the chain"), kernel_chain():
        raise RuntimeError("in the chain")
    assert not starts_early(Rows())


def test_other_threads_are_not_in_it():
    seen = []
    with kernel_chain():
        thread = threading.Thread(target=lambda: seen.append(starts_early(Rows())))
        thread.start()
        thread.join()
        assert starts_early(Rows())
    assert seen == [False]


def test_few_rows_on_a_gpu_that_can():
    with kernel_chain():
        assert starts_early(Rows(FEW_ROWS))
        assert not starts_early(Rows(FEW_ROWS + 1))
        assert not starts_early(Rows(device="cpu"))
        assert not starts_early(torch.zeros(3))


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_capability(capability, expected, hopper):
    hopper.capability = capability
    with kernel_chain():
        assert starts_early(Rows()) == expected


def test_options():
    late, early = {"PDL": False}, {"PDL": True, "launch_pdl": True}
    assert pdl_options(Rows()) == late
    with kernel_chain():
        assert pdl_options(Rows()) == early
        assert pdl_options(Rows(FEW_ROWS + 1)) == late


def test_the_first_of_a_chain_is_an_ordinary_launch():
    """Whose next one may start at once; all behind that may take what it writes for constant."""
    assert not {"pdl_options", "starts_early", "wait_for_previous"} & set(vars(layout))
    assert first_options(Rows()) == {"PDL": False}
    with kernel_chain():
        assert first_options(Rows()) == {"PDL": True}
        assert first_options(Rows(FEW_ROWS + 1)) == {"PDL": False}


# what the compiler makes of them

WAIT, LET = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
POINTERS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16"}


def inspect_norm(early, splits=0, D=1152):
    launch = norm.config(256, D)
    width, rest = norm.blocks(D, launch)
    absent = {"destination_ptr": None, "state_ptr": None}
    absent |= {} if splits else {"partials_ptr": None}
    return inspect(
        norm._norm_kernel,
        {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "offset_ptr": "*fp32",
            "live_ptr": "*i32", "y_ptr": "*bf16", "T": "i32", "eps": "fp32",
            **({"partials_ptr": "*fp32"} if splits else {}),
        },
        absent | {
            "IS_RMS": False, "LIVE_GROUP": 1, "SPLITS": splits, "ROWS": launch.rows,
            "D": D, "BLOCK_D": width, "REST": rest, "PDL": early,
        },
        num_warps=launch.num_warps, launch_pdl=early,
    )  # fmt: skip


def inspect_residual(early, splits=2):
    return inspect(
        residual._residual_kernel,
        {
            "x_ptr": "*bf16", "partials_ptr": "*fp32", "offset_ptr": "*fp32", "live_ptr": "*i32",
            "out_ptr": "*bf16", "T": "i32", "D": "i32",
        },
        {"SPLITS": splits, "BLOCK_T": residual.BLOCK_T, "BLOCK_D": 2048, "PDL": early},
        divisible=["D"], launch_pdl=early,
    )  # fmt: skip


def inspect_rope(early):
    return inspect(
        rope._rope_kernel,
        {
            "qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "num_angles": "i32",
        },
        {
            "weight_ptr": None, "EPS": 0.0, "HEADS": 32, "HALF": 40, "BLOCK_H": 32,
            "BLOCK_HALF": triton.next_power_of_2(40), "PDL": early,
        },
        launch_pdl=early,
    )  # fmt: skip


def inspect_rope_units(kernel, early):
    return inspect(
        kernel,
        {
            "qkv_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "live_ptr": "*i32",
            "T": "i32", "num_angles": "i32",
        },
        {"HEADS": 32, "HALF": 36, "UNIT": 4, "BLOCK": rope.UNITS, "PDL": early},
        num_warps=8, launch_pdl=early,
    )  # fmt: skip


def inspect_rope_by_units(early):
    return inspect_rope_units(rope._rope_units_kernel, early)


def inspect_rope_of_neighbours(early):
    return inspect_rope_units(rope._rope_neighbours_kernel, early)


def inspect_norm_fp8(early):
    launch = norm.config(256, 1152)
    width, rest = norm.blocks(1152, launch)
    return inspect(
        norm_fp8._norm_fp8_kernel,
        {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "offset_ptr": "*fp32",
            "live_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "norms_ptr": "*fp32",
            "bound_ptr": "*fp32", "T": "i32", "stride_qt": "i32", "eps": "fp32",
        },
        {
            "D": 1152, "IS_RMS": False, "ROWS": launch.rows, "BLOCK_D": width, "REST": rest,
            "ALIGNED": True, "PDL": early,
        },
        divisible=["stride_qt"], num_warps=launch.num_warps, launch_pdl=early,
    )  # fmt: skip


def inspect_activation(early):
    return inspect(
        activation._activation_kernel,
        {"x_ptr": "*bf16", "live_ptr": "*i32", "T": "i32", "F": "i32", "stride_xt": "i32"},
        {
            "ACTIVATION": "quick_gelu", "BLOCK_T": activation.BLOCK_T,
            "BLOCK_F": activation.BLOCK_F, "PDL": early,
        },
        divisible=["F", "stride_xt"], launch_pdl=early,
    )  # fmt: skip


def inspect_window(early):
    config = window_attention.launch_config(64, 80, torch.bfloat16)
    qkv = torch.empty(1, 3, 16, 80, dtype=torch.bfloat16, device="meta")
    return inspect(
        window_attention._window_attention_kernel,
        POINTERS | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "cu_ptr": "*i32", "scale_log2": "fp32"},
        window_attention.kernel_constants(*qkv.unbind(1), config) | {"PDL": early},
        num_warps=config.num_warps, launch_pdl=early,
    )  # fmt: skip


def inspect_zeros(early):
    return inspect(
        zero_padding._zero_padding_kernel,
        {"x0_ptr": "*u8", "live_ptr": "*i32", "T": "i32", "row_bytes0": "i32"},
        {f"x{i}_ptr": None for i in (1, 2, 3)} | {f"row_bytes{i}": None for i in (1, 2, 3)}
        | {"BLOCK": zero_padding.BLOCK, "PDL": early},
        divisible=["row_bytes0"], launch_pdl=early,
    )  # fmt: skip


def inspect_embed(early, source=False, side=48):
    launch = patch_embed.config(256, torch.bfloat16)
    names = ["pixels", "weight", "bias", "source", "table", "position", "live", "x"]
    kinds = dict.fromkeys(("source", "position", "live"), "*i32")
    absent = [*([] if source else ["source"]), *([] if side else ["table", "position"])]
    return inspect(
        patch_embed._patch_embed_kernel,
        {f"{name}_ptr": kinds.get(name, "*bf16") for name in names} | {"T": "i32", "D": "i32"},
        {f"{name}_ptr": None for name in absent} | {
            "P": 1536, "SIDE": side, "SAMPLING": "bilinear_corners", "BLOCK_T": launch.BLOCK_T,
            "BLOCK_D": launch.BLOCK_D, "BLOCK_P": launch.BLOCK_P, "FEW": True, "PDL": early,
        },
        divisible=["D"], num_warps=launch.num_warps, num_stages=launch.num_stages, launch_pdl=early,
    )  # fmt: skip


def inspect_layout(early):
    pointers = ("grid", "cu_seqlens", "cu_window_seqlens", "position", "source", "live", "tickets")
    return inspect(
        layout._layout_kernel,
        dict.fromkeys((f"{name}_ptr" for name in pointers), "*i32")
        | dict.fromkeys(("inv_freq_ptr", "cos_ptr", "sin_ptr"), "*fp32")
        | dict.fromkeys(("num_items", "num_rows", "num_frames", "num_windows"), "i32"),
        {
            "MERGE": 2, "WINDOW": 0, "CLIPS": False, "HALF": 40, "BLOCK": layout.BLOCK,
            "BLOCK_I": layout.BLOCK_I, "BLOCK_HALF": 64, "PDL": early,
        },
    )  # fmt: skip


def arguments_accessed(lines):
    """Numbers of the pointers among the arguments that global loads and stores start from."""
    origins: dict[str, set[int]] = {}
    accessed: set[int] = set()
    for line in lines:
        code = line.split("//")[0]
        registers = re.findall(r"%[a-z]+\d+", code)
        found = {int(n) for n in re.findall(r"ld\.param\.[bu]64.*_param_(\d+)", code)}
        if re.search(r"\b(ld|st|red|atom)\.global|cp\.async", code):
            address = re.findall(r"%[a-z]+\d+", "".join(re.findall(r"\[(.*?)\]", code)))
            accessed |= set().union(*(origins.get(r, set()) for r in address))
        elif registers:
            target, *sources = registers
            origins[target] = found.union(*(origins.get(r, set()) for r in sources))
    return accessed


def before_the_wait(ptx):
    lines = ptx.splitlines()
    (wait,) = (i for i, line in enumerate(lines) if WAIT in line)
    (let,) = (i for i, line in enumerate(lines) if LET in line)
    assert wait < let, "the next kernel may start only when all before this one have ended"
    return lines[:wait], lines


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("D", [1152, 4608])
def test_a_norm_reads_constants_alone_before_it_waits(D, splits):
    info = inspect_norm(True, splits, D)
    early, whole = before_the_wait(info.ptx)
    names = ["x", *(["partials"] if splits else []), "weight", "bias", "offset", "live", "y"]
    assert {names[i] for i in arguments_accessed(whole)} == set(names)
    assert {names[i] for i in arguments_accessed(early)} == {"weight", "bias", "offset", "live"}
    assert info.spill_bytes == 0


def test_a_norm_in_fp8_reads_constants_alone_before_it_waits():
    info = inspect_norm_fp8(True)
    early, whole = before_the_wait(info.ptx)
    names = ["x", "weight", "bias", "offset", "live", "q", "scale", "norms", "bound"]
    assert {names[i] for i in arguments_accessed(whole)} == set(names)
    assert {names[i] for i in arguments_accessed(early)} == {"weight", "bias", "offset", "live"}
    assert info.spill_bytes == 0


ROPES = [inspect_rope, inspect_rope_by_units, inspect_rope_of_neighbours]


@pytest.mark.parametrize(
    ("inspect_kernel", "layout"),
    [
        (inspect_residual, 3), *((rope, 3) for rope in ROPES), (inspect_activation, 1),
        (inspect_window, 6), (inspect_zeros, 1),
    ],
)  # fmt: skip
def test_of_all_arguments_that_of_the_layout_is_read_before_the_wait(inspect_kernel, layout):
    """Live counts, or offsets of windows."""
    info = inspect_kernel(True)
    early, whole = before_the_wait(info.ptx)
    assert arguments_accessed(early) == {layout}
    assert {0, layout} <= arguments_accessed(whole)
    assert info.count("ACQBULK") == info.count("PREEXIT") == 1


@pytest.mark.parametrize(
    "inspect_kernel",
    [
        inspect_norm, inspect_norm_fp8, inspect_residual, *ROPES, inspect_activation,
        inspect_window, inspect_zeros, inspect_embed, inspect_layout,
    ],
)  # fmt: skip
def test_outside_a_chain_nothing_is_waited_for(inspect_kernel):
    ptx = inspect_kernel(False).ptx
    assert WAIT not in ptx
    assert LET not in ptx


@pytest.mark.parametrize("side", [0, 48])
def test_an_embedding_multiplies_before_it_waits_for_the_layout(side):
    info = inspect_embed(True, side=side)
    early, whole = before_the_wait(info.ptx)
    names = ["pixels", "weight", "bias", *(["table", "position"] if side else []), "live", "x"]
    assert {names[i] for i in arguments_accessed(early)} == {"pixels", "weight"}
    assert {names[i] for i in arguments_accessed(whole)} == set(names)
    assert sum("wgmma.mma_async" in line for line in early) > 0
    assert "wgmma.mma_async" not in "\n".join(whole[len(early) :])
    assert info.spill_bytes == 0


def test_an_embedding_in_another_order_waits_for_it():
    early, whole = before_the_wait(inspect_embed(True, source=True).ptx)
    assert arguments_accessed(early) == set()
    assert len(arguments_accessed(whole)) == 8


def test_a_layout_lets_the_next_kernel_start_first_of_all():
    info = inspect_layout(True)
    lines = info.ptx.splitlines()
    (let,) = (i for i, line in enumerate(lines) if LET in line)
    assert not arguments_accessed(lines[:let])
    assert WAIT not in info.ptx


# on a GPU


@pytest.mark.gpu
def test_a_chain_computes_what_single_calls_do(monkeypatch):
    monkeypatch.undo()
    g = torch.Generator("cuda").manual_seed(0)
    T, D = 200, 1152
    start = torch.randn(T, D, device="cuda", generator=g).bfloat16()
    weight, bias = (torch.randn(D, device="cuda", generator=g).bfloat16() for _ in range(2))
    partials = torch.randn(3, T, D, device="cuda", generator=g)

    def calls(x):
        for _ in range(4):
            y = norm.norm(x, weight, bias, 1e-6, kind="layer", partials=partials)
            activation.activation_(y, "quick_gelu")
            residual.residual(x, bias.float(), partials=y.float().view(1, T, D), out=x)

    want = start.clone()
    calls(want)
    got = start.clone()
    with kernel_chain():
        got.add_(0)
        got.add_(0)
        calls(got)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernel_chain():
        got.add_(0)  # the first two have to be ordinary kernels
        got.add_(0)
        calls(got)
    for _ in range(20):
        got.copy_(start)
        graph.replay()
        assert torch.equal(got, want)
