"""The norm that two products divide between them: its definition, what it refuses, and on a GPU."""

from dataclasses import replace

import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder.families import FAMILIES
from vitgraph.encoder.weights import up_epilogue
from vitgraph.kernels import deferred_norm as module
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels.activation import activation_ref
from vitgraph.kernels.deferred_norm import (
    DeferredNorm,
    ScaledRows,
    add_linear_scaled,
    choose_deferred,
    linear_of_scaled,
)
from vitgraph.kernels.few_rows_tuning import DEFERRED, GATED_BLOCKS_N, FewRowsConfig, deferred_tiles
from vitgraph.kernels.gated_linear import gated_linear_ref
from vitgraph.kernels.gemm_few_rows import GROUP, MOST_GROUPS, launch
from vitgraph.kernels.gemm_tuning import GATED
from vitgraph.kernels.linear import linear_ref
from vitgraph.kernels.norm import norm, norm_ref
from vitgraph.kernels.pdl import kernel_chain
from vitgraph.kernels.testing import assert_as_accurate

BF16 = torch.bfloat16
EPS = 1e-6
TILE = FewRowsConfig(64, 64, num_stages=6)
HALVES = FewRowsConfig(64, 128, num_stages=4)  # with room for a gate
# widths of no tower, with halves of a tile past the end, and a stream as wide as it may be
OTHERS = {
    (200, 192, "gelu_erf"): ((64, (HALVES, TILE)),),
    (208, 2048, GATED): ((64, (TILE, HALVES)),),
    (456, 192, "quick_gelu"): ((64, (HALVES, FewRowsConfig(128, 320, num_stages=4))),),
}


class Operands:
    """Both products around one norm, of T rows."""

    def __init__(self, T, key, kind, dtype=torch.float64, device="cpu", seed=0):
        N, D, self.epilogue = key
        self.kind = kind
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape, scale=1.0, mean=0.0):
            return (torch.randn(*shape, generator=g, device=device) * scale + mean).to(dtype)

        self.x, self.w1 = draw(T, 96), draw(D, 96, scale=96**-0.5)
        # rows of every size, with a mean and with channels far above the others
        self.before = (draw(T, D) + 0.5) * draw(T, 1, scale=3)
        self.before[:, 5] *= 50
        self.gain, self.w2, self.bias = draw(D, mean=1.0), draw(N, D, scale=D**-0.5), draw(N)
        self.shift = draw(D) if kind == "layer" else None
        self.offset = draw(D).to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.is_gated = self.epilogue == GATED
        self.activation = None if self.is_gated else self.epilogue
        self.norm = DeferredNorm.of(kind, EPS, self.gain, self.shift, self.w2, self.bias)
        self.stream = self.before.clone()
        self.scaled = ScaledRows.over(torch.full_like(self.before, 3.0))
        self.scaled.moments.fill_(float("nan"))
        self.out = draw(T, N // 2 if self.is_gated else N) * 0 + 5

    def first(self, live=None, config=TILE):
        add_linear_scaled(
            self.x, self.w1, self.stream, self.norm, self.offset,
            out=self.scaled, live_rows=live, config=config,
        )  # fmt: skip

    def second(self, live=None, config=None):
        return linear_of_scaled(
            self.scaled, self.w2, self.norm,
            activation=self.activation, is_gated=self.is_gated,
            out=self.out, live_rows=live, config=config or (HALVES if self.is_gated else TILE),
        )  # fmt: skip

    def behind_a_norm(self, stream, dtype):
        """What the second layer makes of `stream` with a norm of its own."""
        gain, shift, weight, bias = (
            None if t is None else t.to(dtype) for t in (self.gain, self.shift, self.w2, self.bias)
        )
        y = norm_ref(stream.to(dtype), gain, shift, EPS, kind=self.kind, offset=self.offset)
        if self.is_gated:
            return gated_linear_ref(y, weight, bias)
        return linear_ref(y, weight, bias, activation=self.activation)


def live_rows(count, device="cpu"):
    return torch.tensor([count], dtype=torch.int32, device=device)


# the definition


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("epilogue", ["gelu_tanh", GATED])
def test_it_is_the_layer_behind_the_norm(kind, epilogue):
    call = Operands(37, (128, 192, epilogue), kind)
    call.first()
    torch.testing.assert_close(call.stream, call.before + call.x @ call.w1.t())
    torch.testing.assert_close(call.second(), call.behind_a_norm(call.stream, torch.float64))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_without_biases(kind):
    call = Operands(5, (64, 64, "silu"), kind)
    call.bias = call.shift = call.offset = None
    call.norm = DeferredNorm.of(kind, EPS, call.gain, None, call.w2, None)
    assert call.norm.bias is None
    call.first()
    y = norm_ref(call.stream, call.gain, None, EPS, kind=kind) @ call.w2.t()
    torch.testing.assert_close(call.second(), activation_ref(y, "silu"))


def test_moments_are_those_of_groups():
    call = Operands(9, (64, 192, "silu"), "layer")
    call.first()
    s = call.stream + call.offset
    torch.testing.assert_close(call.scaled.rows, s * call.gain)
    for group in range(3):
        columns = s[:, group * GROUP : (group + 1) * GROUP]
        totals, squares = call.scaled.moments[:, :, group].unbind(1)
        torch.testing.assert_close(totals, columns.sum(1))
        torch.testing.assert_close(squares, columns.var(1, correction=0) * GROUP)
    assert call.scaled.moments[:, :, 3:].isnan().all(), "no groups there"


def test_rows_past_the_live_ones_are_left_alone():
    call = Operands(9, (64, 64, "silu"), "layer")
    call.first(live_rows(4))
    call.second(live_rows(4))
    assert torch.equal(call.stream[4:], call.before[4:])
    assert (call.scaled.rows[4:] == 3).all()
    assert (call.out[4:] == 5).all()
    torch.testing.assert_close(call.out[:4], call.behind_a_norm(call.stream[:4], torch.float64))
    call.first(live_rows(100))  # more than there are: all
    assert (call.scaled.rows != 3).all()


@pytest.mark.parametrize("holder", ["stream", "offset"])
def test_a_mean_far_above_the_deviation_on_a_cpu(holder):
    """No worse than rounding a stream that holds its biases."""
    call = Operands(200, (256, 1152, "gelu_tanh"), "layer", dtype=BF16)
    call.before = torch.randn(200, 1152, generator=torch.Generator().manual_seed(1)).to(BF16)
    call.offset.zero_()
    if holder == "stream":
        call.before += 100
    else:
        call.offset += 100
    call.stream = call.before.clone()
    call.first()
    call.second()
    exact = call.before.double() + call.x.double() @ call.w1.double().t()
    theirs = torch.addmm(call.before + call.offset.to(BF16), call.x, call.w1.t())
    oracle = call.behind_a_norm(exact, torch.float64)
    call.offset.zero_()
    assert_as_accurate(call.out, call.behind_a_norm(theirs, BF16), oracle)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_autocast_does_not_round_the_vectors(kind):
    call = Operands(3, (128, 64, "silu"), kind, dtype=BF16)
    with torch.autocast("cpu", torch.bfloat16):
        found = DeferredNorm.of(kind, EPS, call.gain, call.shift, call.w2, call.bias)
    for mine, want in ((found.sums, call.norm.sums), (found.bias, call.norm.bias)):
        assert (mine is None) == (want is None)
        assert want is None or (mine.dtype == torch.float32 and torch.equal(mine, want))


def test_new_weights_go_to_the_same_memory():
    call, other = (Operands(3, (64, 64, "silu"), "layer", seed=seed) for seed in (0, 1))
    sums, bias = call.norm.sums, call.norm.bias
    call.norm.refresh(other.norm)
    assert call.norm.sums is sums
    assert torch.equal(sums, other.norm.sums)
    assert call.norm.bias is bias
    assert torch.equal(bias, other.norm.bias)


# what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w1": torch.zeros(64, 95).double()}, ValueError, "must share K"),
        ({"stream": torch.zeros(8, 64).double()}, ValueError, "residual must be"),
        ({"gain": torch.zeros(63).double()}, ValueError, r"gain \(63,\) must be \[64\]"),
        ({"offset": torch.zeros(63).double()}, ValueError, r"offset \(63,\) must be \[64\]"),
        ({"offset": torch.zeros(64)}, TypeError, "offset must be torch.float64 on cpu, got .*32"),
        ({"rows": torch.zeros(9, 64)}, ValueError, "rows of the scaled rows must be contiguous"),
        ({"moments": torch.zeros(9, 2, 1)}, ValueError, r"contiguous \[9, 2, 32\] torch.float64"),
    ],
)
def test_the_first_refuses(change, error, message):
    call = Operands(9, (64, 64, "silu"), "layer")
    for name, value in change.items():
        if name == "gain":
            call.norm = replace(call.norm, gain=value)
        elif name in ("rows", "moments"):
            call.scaled = replace(call.scaled, **{name: value})
        else:
            setattr(call, name, value)
    with pytest.raises(error, match=f"add_linear_scaled: .*{message}"):
        call.first()


@pytest.mark.parametrize("width", [96, 64 * 33])
def test_widths_without_whole_groups_are_refused(width):
    call = Operands(3, (64, width, "silu"), "layer")
    with pytest.raises(ValueError, match=rf"D = {width} must be a multiple of 64 of at most 2048"):
        call.first()
    with pytest.raises(ValueError, match=rf"D = {width} must be a multiple of 64 of at most 2048"):
        call.second()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' is not one of"),
        ({"is_gated": True}, "a gate needs .* no activation but its own silu, got .*'silu'"),
        ({"is_gated": True, "activation": None, "w2": torch.zeros(63, 64)}, "a gate needs weight"),
        ({"out": torch.zeros(9, 63).double()}, r"out must be \[9, 64\] torch.float64 on cpu"),
        ({"out": torch.zeros(9, 64)}, r"out must be \[9, 64\] torch.float64 .* got .* torch.float"),
        ({"sums": torch.zeros(63).double()}, r"sums \(63,\) must be \[64\]"),
        ({"bias": torch.zeros(128).double()[::2]}, r"bias \(64,\) must be \[64\], contiguous"),
    ],
)
def test_the_second_refuses(change, message):
    call = Operands(9, (64, 64, "silu"), "layer")
    call.first()
    for name, value in change.items():
        if name in ("sums", "bias"):
            call.norm = replace(call.norm, **{name: value})
        else:
            setattr(call, name, value)
    with pytest.raises(ValueError, match=f"linear_of_scaled: .*{message}"):
        call.second()


def test_a_gate_needs_two_halves():
    call = Operands(3, (128, 64, GATED), "rms")
    call.first()
    for block_n in (64, 192, 320):
        with pytest.raises(ValueError, match="has no two halves in whole parts of 64 columns"):
            call.second(config=replace(TILE, block_n=block_n, num_stages=2))


def test_vectors_are_as_wide_as_moments():
    call = Operands(3, (128, 64, "silu"), "layer")
    call.first()
    call.norm = replace(call.norm, sums=call.norm.sums.float())
    with pytest.raises(TypeError, match=r"sums must be torch.float64 on cpu, got torch.float32"):
        call.second()


# the table


def towers_by_key():
    found = {}
    for name, config in towers.TOWERS.items():
        spec = FAMILIES[config.family].spec(config.vision_config())
        if not name.startswith("tiny"):
            N = spec.padded_mlp_size * (2 if spec.mlp == "gated" else 1)
            found.setdefault((N, spec.hidden_size, up_epilogue(spec)), spec)
    return found


@pytest.mark.parametrize("key", sorted(DEFERRED), ids=str)
def test_an_entry_is_well_formed(key):
    _, D, epilogue = key
    assert key in towers_by_key()
    assert epilogue, "a gate with a limit is a kernel of its own"
    lasts = [last for last, _ in DEFERRED[key]]
    assert lasts == sorted(set(lasts))
    assert DEFERRED[key][-1][1] is not None
    assert D % GROUP == 0
    assert D <= GROUP * MOST_GROUPS
    for _, tiles in DEFERRED[key]:
        if tiles is None:
            continue
        first, second = tiles
        assert first.splits == second.splits == 1
        assert epilogue != GATED or second.block_n in GATED_BLOCKS_N


class OnGpu:
    """A weight as `choose_deferred` sees it."""

    def __init__(self, N, K, dtype=BF16, address=0):
        self.shape, self.dtype, self.device, self.is_cuda = (N, K), dtype, torch.device("cuda"), 1
        self.itemsize, self.address = dtype.itemsize, address

    def data_ptr(self):
        return self.address

    def stride(self, axis):
        return (self.shape[1], 1)[axis]


def test_who_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)

    def choose(M, first=(1152, 1152), second=(4304, 1152), **change):
        return choose_deferred(M, OnGpu(*first), OnGpu(*second, **change), "gelu_tanh")

    tiles = deferred_tiles(200, 4304, 1152, "gelu_tanh")
    assert tiles is not None
    assert choose(200) == tiles
    assert choose(64) is None
    assert choose(4096) is None
    assert choose(200, second=(4312, 1152)) is None
    assert choose(200, dtype=torch.float16) is None, "z could overflow"
    assert choose(200, address=2) is None
    assert choose_deferred(200, OnGpu(1152, 1152), OnGpu(4304, 1152), "gelu_erf") is None
    zeros = torch.zeros(1, dtype=BF16).expand(4304, 1152)
    assert choose_deferred(200, zeros, zeros, "gelu_tanh") is None, "on a CPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert choose(200) is None


# on a GPU alone: Gluon has no interpreter


def kind_of(key):
    return towers_by_key()[key].norm if key in DEFERRED else "layer"


PAIRS = [
    (key, tiles)
    for key, classes in {**DEFERRED, **OTHERS}.items()
    for _, tiles in classes
    if tiles is not None
]
# with warps kept apart for loads, and without
PAIRS = list(dict.fromkeys(
    (key, tuple(replace(tile, producer=way) for tile in tiles))
    for key, tiles in PAIRS
    for way in (False, True)
))  # fmt: skip


def pair_name(pair):
    (N, D, epilogue), tiles = pair
    return f"{N}x{D}-{epilogue}-" + "-".join(
        f"{t.block_m}x{t.block_n}s{t.num_stages}{' fed' if t.producer else ''}" for t in tiles
    )


@pytest.fixture(scope="module")
def needs_hopper():
    if reason := gemm_module.hopper_reason(torch.device("cuda"), BF16):
        pytest.skip(reason)


def on_gpu(T, key, kind=None):
    return Operands(T, key, kind or kind_of(key), dtype=BF16, device="cuda", seed=T)


def check(call, live):
    """Against fp64, each product from what it was given."""
    if live == 0:
        return
    x, before, w1 = call.x[:live], call.before[:live], call.w1
    oracle = before.double() + x.double() @ w1.double().t()
    assert_as_accurate(call.stream[:live], torch.addmm(before, x, w1.t()), oracle)
    stream = call.stream[:live]
    rows, moments = module.scaled_ref(stream, call.gain, call.offset)
    torch.testing.assert_close(call.scaled.rows[:live], rows, rtol=2**-7, atol=0)
    found = call.scaled.moments[:live, :, : moments.shape[2]]
    # of a sum of 64, to the rounding of its magnitudes
    limit = (stream.double() + call.offset.double()).square().unflatten(1, (-1, GROUP)).sum(2)
    assert (found[:, 0] - moments[:, 0]).abs().le(64 * 2**-22 * limit.sqrt() + 1e-6).all()
    assert (found[:, 1] - moments[:, 1]).abs().le(64 * 2**-22 * limit + 1e-6).all()
    eager, oracle = (call.behind_a_norm(stream, dtype) for dtype in (BF16, torch.float64))
    assert_as_accurate(call.out[:live], eager, oracle)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("T", [1, 64, 200, 300])
def test_matches_oracle(T, pair, needs_hopper):
    key, tiles = pair
    call = on_gpu(T, key)
    call.first(config=tiles[0])
    call.second(config=tiles[1])
    check(call, T)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("live", [0, 1, 64, 65, 129, 250, 1000])
def test_live_rows(live, pair, needs_hopper):
    (key, tiles), T = pair, 250
    call = on_gpu(T, key)
    num_live = min(live, T)
    call.x[num_live:] = call.stream[num_live:] = float("nan")  # stale rows
    counts = live_rows(live, "cuda")
    torch.cuda.synchronize()
    call.first(counts, tiles[0])
    call.second(counts, tiles[1])
    check(call, num_live)
    assert call.scaled.rows.isfinite().all()
    assert call.out.isfinite().all(), "of finite rows, in a tile with live ones"
    written = [min(T, -(-num_live // tile.block_m) * tile.block_m) for tile in tiles]
    assert not call.scaled.rows[num_live : written[0]].any()
    assert (call.scaled.rows[written[0] :] == 3).all(), "tiles without a live row are left alone"
    assert (call.out[written[1] :] == 5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_without_offset_or_biases(kind, needs_hopper):
    call = on_gpu(100, (4304, 1152, "gelu_tanh"), kind)
    call.bias = call.shift = None
    call.offset = torch.zeros(1152, device="cuda")
    call.norm = DeferredNorm.of(kind, EPS, call.gain, None, call.w2, None)
    add_linear_scaled(call.x, call.w1, call.stream, call.norm, None, out=call.scaled, config=TILE)
    call.second()
    check(call, 100)


@pytest.mark.gpu
def test_a_mean_far_above_the_deviation(needs_hopper):
    """No worse than what rounding the stream itself has cost by then."""
    call = on_gpu(200, (4304, 1152, "gelu_tanh"))
    call.before = torch.randn_like(call.before) + 100
    call.offset.zero_()
    call.stream = call.before.clone()
    call.first()
    call.second()
    exact = call.before.double() + call.x.double() @ call.w1.double().t()
    oracle = call.behind_a_norm(exact, torch.float64)
    eager = call.behind_a_norm(torch.addmm(call.before, call.x, call.w1.t()), BF16)
    assert_as_accurate(call.out, eager, oracle)


@pytest.mark.gpu
def test_the_kernel_refuses(needs_hopper):
    call = on_gpu(100, (4304, 1152, "gelu_tanh"))
    with pytest.raises(ValueError, match="cuts K into parts; use splits=1"):
        call.first(config=replace(TILE, splits=2))
    half = Operands(9, (64, 64, "silu"), "layer", dtype=torch.float16, device="cuda")
    with pytest.raises(TypeError, match=r"rows in torch.float16 can overflow; use bfloat16"):
        half.first()


class Chain:
    """Blocks as a tower has them: nothing just before the first product writes the stream."""

    def __init__(self, T):
        self.call = on_gpu(T, (4304, 1152, "gelu_tanh"))
        self.first = self.call.before
        self.live = live_rows(T, "cuda")
        g = torch.Generator("cuda").manual_seed(3)
        self.qkv = torch.randn(96, 1152, device="cuda", generator=g).to(BF16) / 30
        self.down = torch.randn(1152, 4304, device="cuda", generator=g).to(BF16) / 60
        self.parts = torch.empty(3, T, 1152, device="cuda")

    def run(self):
        call, partials = self.call, None
        call.stream.copy_(self.first)  # an ordinary kernel; nothing writes the live rows
        for _ in range(4):
            y = norm(
                call.stream, call.gain, None, EPS, kind="rms",
                live_rows=self.live, partials=partials,
            )  # fmt: skip
            launch(y, self.qkv, None, call.x, self.live, config=TILE)
            call.first(self.live, FewRowsConfig(64, 64, 12, producer=True))
            call.second(self.live, FewRowsConfig(64, 192, 6))
            sums = FewRowsConfig(64, 128, 9, splits=3)
            launch(call.out, self.down, None, self.parts, self.live, config=sums)
            partials = self.parts


@pytest.mark.gpu
@pytest.mark.parametrize("T", [64, 224])
def test_a_captured_chain_equals_calls_one_by_one(T, needs_hopper):
    chain = Chain(T)
    graph = torch.cuda.CUDAGraph()
    chain.run()  # compiles
    with kernel_chain():
        chain.run()
        with torch.cuda.graph(graph):
            chain.run()
    for live in (T, T - 33):
        chain.live.fill_(live)
        chain.run()
        want = chain.call.out[:live].clone()
        assert want.isfinite().all()
        assert want.std() > 0
        for _ in range(50):
            chain.call.out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(chain.call.out[:live], want)
