"""The matrix product for compute capability 9.0, and when a linear layer takes it."""

import sys

import pytest
import torch
import triton
import vitgraph.kernels
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.gemm import GemmConfig, gemm, gemm_ref
from vitgraph.kernels.gemm_tuning import (
    GATED,
    MIN_M,
    RESIDUAL,
    SHIPPED,
    SQUARE,
    TABLE,
    WIDE,
    HopperConfig,
    hopper_tile,
    shipped_tiles,
    tile_by_waves,
)
from vitgraph.kernels.linear import choose_backend, linear
from vitgraph.kernels.testing import assert_as_accurate

BF16 = torch.bfloat16
LIBRARY = ("library", None)
CUDA = torch.device("cuda")


def test_table_is_well_formed():
    for (N, K, epilogue), entries in TABLE.items():
        assert N % 8 == 0
        assert K % 8 == 0
        firsts = [first for first, _ in entries]
        assert firsts == sorted(set(firsts))
        assert {tile for _, tile in entries} <= {*shipped_tiles(epilogue), None}


@pytest.mark.parametrize(
    ("M", "N", "K", "activation", "has_residual", "tile"),
    [
        (16383, 3456, 1152, None, False, None),
        (16384, 3456, 1152, None, False, SQUARE),
        (9216, 3840, 1280, None, False, WIDE),
        (20480, 1152, 4304, None, True, None),
        (20481, 1152, 1152, None, True, WIDE),
        (65535, 1152, 1152, None, True, WIDE),
        (65536, 1152, 1152, None, True, SQUARE),
        (500_000, 4304, 1152, "gelu_tanh", False, SQUARE),
        # no entry, but between those that have one
        (16384, 6144, 1152, "gelu_erf", False, SQUARE),
        (MIN_M - 1, 6144, 1152, "gelu_erf", False, None),
        # past what was measured
        (65536, 16384, 1152, None, False, None),
        (65536, 1152, 512, None, False, None),
    ],
)
def test_tile_by_measurement(M, N, K, activation, has_residual, tile):
    assert hopper_tile(M, N, K, activation, has_residual, num_sms=132) == tile


def test_a_row_class_of_the_table_ends_where_the_next_begins(monkeypatch):
    classes = ((100, SQUARE), (200, None), (300, WIDE))
    monkeypatch.setitem(TABLE, (8, 8, RESIDUAL), classes)
    chosen = [hopper_tile(M, 8, 8, None, True, 132) for M in (99, 100, 199, 200, 299, 300, 9999)]
    assert chosen == [None, SQUARE, SQUARE, None, None, WIDE, WIDE]


def test_rule_of_waves():
    # one wave of wide tiles, two of square ones
    assert tile_by_waves(128 * 132, 192, 1152, None, num_sms=132) == WIDE
    # one wave of either, but wide tiles stick out by half
    assert tile_by_waves(128 * 66, 256, 1152, None, num_sms=132) == SQUARE
    # the columns of gate and up must be equal halves
    assert tile_by_waves(128 * 132, 192, 1152, GATED, num_sms=132) == SQUARE


@pytest.fixture
def h200(monkeypatch):
    """Let the chooser find an H200 with everything it needs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear_module, "num_sms", lambda device: 132)
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)


QKV = (65536, 3456, 1152, BF16, CUDA, None, False)


def test_chooser(h200):
    assert choose_backend(*QKV) == ("hopper", SQUARE)
    assert choose_backend(*QKV) == choose_backend(*QKV)
    fp16 = choose_backend(65536, 1152, 4304, torch.float16, CUDA, None, True)
    assert fp16 == ("hopper", WIDE)
    assert choose_backend(2048, 3456, 1152, BF16, CUDA, None, False) == LIBRARY
    assert choose_backend(65536, 3456, 1152, torch.float32, CUDA, None, False) == LIBRARY
    assert choose_backend(65536, 3456, 1152, BF16, torch.device("cpu"), None, False) == LIBRARY


@pytest.mark.parametrize(("N", "K"), [(3420, 1280), (1280, 3420)])
def test_rows_that_are_not_aligned_go_to_the_library(N, K, h200):
    assert choose_backend(65536, N, K, BF16, CUDA, None, False) == LIBRARY


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_use_the_library(capability, h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_backend(*QKV) == LIBRARY
    reason = gemm_module.hopper_reason(CUDA, BF16)
    assert f"cuda has {capability[0]}.{capability[1]}" in str(reason)


def test_a_triton_without_gluon_uses_the_library(monkeypatch):
    gemm_module._gluon_reason.cache_clear()
    monkeypatch.setattr(gemm_module, "is_interpreting", lambda: False)
    monkeypatch.setitem(sys.modules, "vitgraph.kernels.gemm_hopper", None)
    monkeypatch.delattr(vitgraph.kernels, "gemm_hopper", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear_module, "num_sms", lambda device: 132)
    try:
        assert choose_backend(*QKV) == LIBRARY
        assert f"Triton {triton.__version__} lacks" in str(gemm_module.hopper_reason(CUDA, BF16))
    finally:
        gemm_module._gluon_reason.cache_clear()


def test_cpu_tensors_are_refused():
    x = torch.zeros(16, 16, dtype=BF16)
    with pytest.raises(ValueError, match=r"backend='hopper' cannot run here: .* device is cpu"):
        linear(x, x, backend="hopper")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_auto_takes_the_epilogues_of_the_library(activation, h200):
    x = torch.zeros(16, 16)
    with pytest.raises(ValueError, match="backend='auto' cannot add"):
        linear(x, x, None if activation else x[0], activation=activation, residual=x.clone())


# the rest runs on the GPU alone: Gluon has no interpreter

# every epilogue, N with and without a part of a tile, short and long K; gated ones are two products
# of another function (test_gated_linear.py)
SHAPES = [
    (3456, 1152, ""),
    (1152, 1152, RESIDUAL),
    (4304, 1152, "gelu_tanh"),
    (1152, 4304, RESIDUAL),
    (5120, 1280, "quick_gelu"),
    (768, 768, RESIDUAL),
    (4608, 4608, "gelu_erf"),
    (1792, 15360, ""),
    (1152, 1152, "silu"),
]
IDS = [f"{N}x{K}-{epilogue or 'bias'}" for N, K, epilogue in SHAPES]


@pytest.fixture(scope="module")
def needs_hopper():
    if reason := gemm_module.hopper_reason(CUDA, BF16):
        pytest.skip(reason)


def draw(*shape, seed, scale=1.0, dtype=BF16):
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=g) * scale).to(dtype)


class Call:
    """One product with its operands; `run` writes `out`, or adds to a copy of `residual`."""

    def __init__(self, M, N, K, epilogue, dtype=BF16):
        has_residual = epilogue == RESIDUAL
        self.x = draw(M, K, seed=M, dtype=dtype)
        self.weight = draw(N, K, seed=1, scale=K**-0.5, dtype=dtype)
        self.bias = None if has_residual else draw(N, seed=2, dtype=dtype)
        self.residual = draw(M, N, seed=3, dtype=dtype) if has_residual else None
        self.activation = None if has_residual else epilogue or None
        self.out = torch.empty(M, N, dtype=dtype, device="cuda")

    def reset(self):
        """Put what the call starts from into `out`."""
        if self.residual is None:
            self.out.fill_(7.0)
        else:
            self.out.copy_(self.residual)
        return self.out.clone()

    def run(self, config, live_rows=None):
        target = "out" if self.residual is None else "residual"
        gemm(
            self.x, self.weight, self.bias, activation=self.activation, live_rows=live_rows,
            config=config, **{target: self.out},
        )  # fmt: skip

    def check(self, live):
        if live == 0:
            return
        x, residual = self.x[:live], None if self.residual is None else self.residual[:live]
        operands = [x, self.weight, self.bias, residual]
        wide = [None if t is None else t.double() for t in operands]
        eager = gemm_ref(*operands[:3], activation=self.activation, residual=operands[3])
        oracle = gemm_ref(*wide[:3], activation=self.activation, residual=wide[3])
        assert_as_accurate(self.out[:live], eager, oracle, name="y")


def rows_written(config: HopperConfig, live, M):
    return min(M, -(-live // config.block_m) * config.block_m)


def tile_name(config: HopperConfig):
    return f"{config.block_m}x{config.block_n}"


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
@pytest.mark.parametrize(("N", "K", "epilogue"), SHAPES, ids=IDS)
@pytest.mark.parametrize("M", [1, 130, 1000, 5056])
def test_matches_oracle(M, N, K, epilogue, config, needs_hopper):
    call = Call(M, N, K, epilogue)
    call.reset()
    call.run(config)
    call.check(M)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
@pytest.mark.parametrize(
    ("N", "K", "epilogue"),
    [(1152, 1152, RESIDUAL), (4304, 1152, "gelu_tanh"), (3840, 1280, "")],
)
@pytest.mark.parametrize("live", [0, 1, 127, 128, 129, 1700, 2999, 3000, 100_000])
def test_live_rows(live, N, K, epilogue, config, needs_hopper):
    M = 3000
    call = Call(M, N, K, epilogue)
    num_live = min(live, M)
    call.x[num_live:] = float("nan")  # stale rows must not reach live ones
    before = call.reset()
    call.run(config, torch.tensor([live], dtype=torch.int32, device="cuda"))
    call.check(num_live)
    written = rows_written(config, num_live, M)
    assert torch.equal(call.out[written:], before[written:])


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
@pytest.mark.parametrize(("N", "K", "epilogue"), SHAPES, ids=IDS)
def test_replay_equals_eager(N, K, epilogue, config, needs_hopper):
    M = 2500
    call = Call(M, N, K, epilogue)
    live_rows = torch.tensor([M], dtype=torch.int32, device="cuda")
    call.reset()
    call.run(config, live_rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(config, live_rows)
    for live in (M, 100, 1300, 0, 2499):
        call.x.copy_(draw(M, K, seed=live))
        live_rows.fill_(live)
        call.reset()
        call.run(config, live_rows)
        eager = call.out.clone()
        before = call.reset()
        graph.replay()
        assert torch.equal(call.out, eager)
        call.check(live)
        written = rows_written(config, live, M)
        assert torch.equal(call.out[written:], before[written:])


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
def test_fp16(config, needs_hopper):
    call = Call(1000, 1152, 1152, "gelu_tanh", dtype=torch.float16)
    call.reset()
    call.run(config)
    call.check(1000)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
def test_strided_operands(config, needs_hopper):
    call = Call(700, 1152, 1152, "")
    wide_x = torch.full((700, 1280), float("nan"), dtype=BF16, device="cuda")
    wide_out = torch.zeros(700, 1408, dtype=BF16, device="cuda")
    x, out = wide_x[:, 64 : 64 + 1152], wide_out[:, 128 : 128 + 1152]
    x.copy_(call.x)
    gemm(x, call.weight, call.bias, out=out, config=config)
    call.out = out.contiguous()
    call.check(700)
    assert not wide_out[:, :128].any()
    assert not wide_out[:, 128 + 1152 :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=tile_name)
def test_a_row_does_not_depend_on_the_others(config, needs_hopper):
    call = Call(1000, 4304, 1152, "gelu_tanh")
    call.reset()
    call.run(config)
    alone = gemm(call.x[300:400], call.weight, call.bias, activation="gelu_tanh", config=config)
    assert torch.equal(alone, call.out[300:400])


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K", "epilogue"), SHAPES, ids=str)
def test_linear_takes_it_from_the_table(N, K, epilogue, needs_hopper):
    M = 20500  # from where on the table has all of them
    call = Call(M, N, K, epilogue)
    has_residual = epilogue == RESIDUAL
    backend, tile = choose_backend(M, N, K, BF16, call.x.device, call.activation, has_residual)
    assert backend == "hopper"
    call.reset()
    call.run(tile)
    want, target = call.out.clone(), "residual" if has_residual else "out"
    for name in ("auto", "hopper"):
        call.reset()
        linear(
            call.x, call.weight, call.bias, activation=call.activation, backend=name,
            **{target: call.out},
        )  # fmt: skip
        assert torch.equal(call.out, want)


@pytest.mark.gpu
def test_linear_leaves_rows_that_are_not_aligned_to_the_library(needs_hopper):
    M, N, K = 16400, 1152, 1152
    call = Call(M, N, K, "")
    shifted = torch.zeros(M * K + 1, dtype=BF16, device="cuda")[1:].view(M, K)
    shifted.copy_(call.x)
    linear(shifted, call.weight, call.bias, out=call.out)
    call.check(M)
    with pytest.raises(ValueError, match="rows that start at multiples of 16 bytes"):
        linear(shifted, call.weight, call.bias, backend="hopper")


@pytest.mark.gpu
def test_a_config_that_cannot_run_is_refused(needs_hopper):
    x = torch.zeros(64, 64, device="cuda")
    with pytest.raises(ValueError, match=r"multiplies fp16 and bf16, not torch\.float32"):
        gemm(x, x, config=SQUARE)
    assert gemm(x, x, config=GemmConfig(32, 32, 32, num_warps=4, num_stages=2)).shape == (64, 64)
