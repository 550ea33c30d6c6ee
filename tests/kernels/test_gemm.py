import pytest
import torch
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels.gemm import (
    FP32_CONFIG,
    TILE_RATES,
    GemmConfig,
    cost,
    gemm,
    gemm_config,
    gemm_ref,
)
from vitgraph.kernels.testing import assert_as_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = GemmConfig(32, 32, 32, num_warps=4, num_stages=2, group_m=2)

SHAPES = [
    pytest.param(1, 16, 32, id="one"),
    pytest.param(67, 75, 41, id="odd"),  # rows of 41 elements are not aligned: pointers
    pytest.param(160, 136, 72, id="aligned"),  # descriptors, 5 x 5 tiles on 4 programs
]
ACTIVATIONS = [None, "gelu_tanh", "gelu_erf", "quick_gelu", "silu"]


def make(device, *shape, dtype=torch.float32, scale=1.0, seed=0):
    g = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, device=device, generator=g) * scale + 0.25).to(dtype)


def operands(device, T, N, K, dtype):
    x = make(device, T, K, dtype=dtype)
    weight = make(device, N, K, dtype=dtype, scale=K**-0.5, seed=1)
    bias = make(device, N, dtype=dtype, seed=2)
    residual = make(device, T, N, dtype=dtype, seed=3)
    return x, weight, bias, residual


def as_double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(actual, x, weight, bias, name="y", **epilogue):
    residual = epilogue.pop("residual", None)
    eager = gemm_ref(x, weight, bias, residual=residual, **epilogue)
    xd, wd, bd, rd = as_double(x, weight, bias, residual)
    oracle = gemm_ref(xd, wd, bd, residual=rd, **epilogue)
    # fp32: one running sum over K, where the library keeps several
    factor = 3.0 if x.dtype == torch.float32 else 2.0
    assert_as_accurate(actual, eager, oracle, factor=factor, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_matches_oracle(T, N, K, dtype, device):
    x, weight, bias, residual = operands(device, T, N, K, dtype)
    config = SMALL if dtype == torch.float32 else None
    check(gemm(x, weight, config=config), x, weight, None)
    check(gemm(x, weight, bias, config=config), x, weight, bias)
    summed = residual.clone()
    assert gemm(x, weight, bias, residual=summed, config=config) is summed
    check(summed, x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, has_residual, dtype, device):
    x, weight, bias, residual = operands(device, 33, 40, 24, dtype)
    residual = residual if has_residual else None
    summed = None if residual is None else residual.clone()
    actual = gemm(x, weight, bias, activation=activation, residual=summed)
    check(actual, x, weight, bias, activation=activation, residual=residual)


def test_activations_of_fp32_are_exact_to_the_last_place(device):
    """Of small values, and without sums, whose own error would hide theirs."""
    x = operands(device, 64, 64, 64, torch.float32)[0] * 0.1
    y = gemm(x, torch.eye(64, device=device), activation="gelu_erf", config=SMALL)
    gelu = torch.nn.functional.gelu
    assert_as_accurate(y, gelu(x), gelu(x.double()))


@pytest.mark.parametrize("live", [0, 1, 31, 32, 45, 96, 1000])
@pytest.mark.parametrize("aligned", [True, False], ids=["descriptors", "pointers"])
def test_live_rows(live, aligned, device):
    T, N, K = 96, 40, 32 if aligned else 33
    x, weight, bias, residual = operands(device, T, N, K, torch.bfloat16)
    num_live = min(live, T)
    written = min(T, -(-num_live // SMALL.block_m) * SMALL.block_m)
    x[num_live:] = float("nan")  # stale rows must not reach live ones
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    out = torch.full((T, N), 7.0, dtype=torch.bfloat16, device=device)
    summed = residual.clone()
    gemm(x, weight, bias, out=out, live_rows=live_rows, config=SMALL)
    gemm(x, weight, bias, residual=summed, live_rows=live_rows, config=SMALL)
    if num_live:
        check(out[:num_live], x[:num_live], weight, bias)
        check(summed[:num_live], x[:num_live], weight, bias, residual=residual[:num_live])
    assert (out[written:] == 7.0).all()
    assert torch.equal(summed[written:], residual[written:])
    assert out[num_live:written].isnan().all(), "the rows named as written have changed"


@pytest.mark.parametrize("start", [16, 13], ids=["descriptors", "pointers"])
def test_strided_operands(start, device):
    K, N = 29, 45
    surroundings = {"fill_value": float("nan"), "device": device}
    wide_x, wide_weight = torch.full((40, 64), **surroundings), torch.full((N, 64), **surroundings)
    x, weight = wide_x[:, start : start + K], wide_weight[:, start : start + K]
    x.copy_(make(device, 40, K))
    weight.copy_(make(device, N, K, seed=1))
    wide_out = torch.zeros(40, 96, device=device)
    out = wide_out[:, 32 : 32 + N]
    assert gemm(x, weight, out=out) is out
    check(out.contiguous(), x.contiguous(), weight.contiguous(), None)
    assert not wide_out[:, :32].any()
    assert not wide_out[:, 32 + N :].any()


def test_result_of_a_row_does_not_depend_on_the_others(device):
    x, weight, bias, _ = operands(device, 130, 64, 64, torch.bfloat16)
    alone = gemm(x[:50], weight, bias, config=SMALL)
    assert torch.equal(gemm(x, weight, bias, config=SMALL)[:50], alone)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_result_does_not_depend_on_the_number_of_programs(programs, device):
    x, weight, bias, _ = operands(device, 130, 72, 64, torch.bfloat16)
    alone = gemm(x, weight, bias, config=SMALL, programs=programs)
    assert torch.equal(gemm(x, weight, bias, config=SMALL), alone)


def test_most_programs_are_launched(device, monkeypatch):
    grids = []
    monkeypatch.setattr(
        gemm_module, "launch_kernel", lambda kernel, grid, *_, **__: grids.append(grid)
    )
    x, weight, _, _ = operands(device, 130, 72, 64, torch.bfloat16)  # 5 x 3 tiles
    for programs in (1, 2, 1000):
        gemm(x, weight, config=SMALL, programs=programs)
    assert grids[:2] == [(1,), (2,)]
    assert grids[2] == (min(15, gemm_module.num_sms(x.device)),)


@pytest.mark.parametrize(("T", "N"), [(0, 8), (8, 0)])
def test_empty(T, N, device):
    x, weight = torch.zeros(T, 16, device=device), torch.zeros(N, 16, device=device)
    assert gemm(x, weight).shape == (T, N)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": zeros(2, 9)}, ValueError, "must share K"),
        ({"x": zeros(8)}, ValueError, "must share K"),
        ({"x": zeros(8, 2).T}, ValueError, "elements of a row of x must be adjacent"),
        ({"bias": zeros(3)}, ValueError, r"bias must be \[4\], got \[3\]"),
        ({"residual": zeros(2, 3)}, ValueError, r"residual must be \[2, 4\]"),
        ({"out": zeros(2, 3)}, ValueError, r"out must be \[2, 4\]"),
        ({"out": zeros(2, 4), "residual": zeros(2, 4)}, ValueError, "out must not be given"),
        ({"activation": "relu"}, ValueError, "activation='relu' is not one of"),
        ({"bias": zeros(4, dtype=torch.float64)}, TypeError, "bias is torch.float64"),
        ({"live_rows": zeros(1)}, ValueError, "live_rows must be one int32"),
        ({"live_rows": zeros(2, dtype=torch.int32)}, ValueError, "live_rows must be one int32"),
        ({"x": zeros(2, 0), "weight": zeros(4, 0)}, ValueError, "no columns"),
        ({"programs": 0}, ValueError, "programs = 0 must be at least 1, or None"),
    ],
)
def test_bad_arguments(arguments, error, message, device):
    arguments = {"x": zeros(2, 8), "weight": zeros(4, 8)} | arguments
    with pytest.raises(error, match=message):
        gemm(**{
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
        })  # fmt: skip


def test_fp64_is_refused(device):
    x = torch.zeros(2, 8, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        gemm(x, x)


def test_config():
    tiles = {M: gemm_config(M, 1152, 1152, torch.bfloat16, num_sms=132) for M in (64, 4096, 65536)}
    areas = [c.block_m * c.block_n for c in tiles.values()]
    assert areas == sorted(areas), "more rows never want a smaller tile here"
    assert tiles[64].block_m == 64
    assert (tiles[65536].block_m, tiles[65536].block_n) == (128, 128)
    assert gemm_config(65536, 5120, 5120, torch.float32, 132) == FP32_CONFIG
    assert set(tiles.values()) <= set(TILE_RATES)


def test_cost():
    assert cost(10, 20, 30, torch.bfloat16).flops == 2 * 10 * 20 * 30
    plain, summed = (cost(10, 20, 30, torch.bfloat16, has_residual=r) for r in (False, True))
    assert summed.bytes - plain.bytes == 10 * 20 * 2


@pytest.mark.gpu
def test_replay_with_fewer_rows():
    x, weight, bias, _ = operands("cuda", 512, 384, 256, torch.bfloat16)
    live_rows = torch.tensor([512], dtype=torch.int32, device="cuda")
    out = torch.zeros(512, 384, dtype=torch.bfloat16, device="cuda")
    gemm(x, weight, bias, out=out, live_rows=live_rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(x, weight, bias, out=out, live_rows=live_rows)
    for live in (512, 100, 300):
        x.copy_(make("cuda", 512, 256, dtype=torch.bfloat16, seed=live))
        live_rows.fill_(live)
        out.fill_(7.0)
        graph.replay()
        check(out[:live], x[:live], weight, bias)
        assert (out[-(-live // 128) * 128 :] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", TILE_RATES, ids=lambda c: f"{c.block_m}x{c.block_n}")
@pytest.mark.parametrize("K", [1152, 1182], ids=["descriptors", "pointers"])
def test_shipped_tiles(config, K):
    x, weight, bias, residual = operands("cuda", 1000, 1152, K, torch.bfloat16)
    summed = residual.clone()
    gemm(x, weight, bias, residual=summed, config=config)
    check(summed, x, weight, bias, residual=residual)
