"""The matrix product of few rows: who takes it, what it refuses, and its sums on a GPU."""

from dataclasses import replace

import pytest
import torch
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels import gemm_few_rows as module
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels.few_rows_tuning import TABLE, FewRowsConfig, few_rows_tile
from vitgraph.kernels.gated_linear import gated_linear, gated_linear_ref
from vitgraph.kernels.gemm_few_rows import (
    BLOCK_K,
    choose_partials,
    linear_partials,
    partials_ref,
)
from vitgraph.kernels.gemm_tuning import GATED, RESIDUAL, ROTATED
from vitgraph.kernels.linear import choose_backend, linear, linear_ref
from vitgraph.kernels.norm import norm
from vitgraph.kernels.partials import add_partials_ref
from vitgraph.kernels.pdl import kernel_chain
from vitgraph.kernels.testing import assert_as_accurate

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
TILE = FewRowsConfig(64, 64, num_stages=6)

# the definition


def test_parts_are_whole_steps_that_sum_to_the_product():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4304, generator=g), torch.randn(5, 4304, generator=g)
    for splits in (1, 2, 3, 7, 68):
        parts = partials_ref(x, weight, splits)
        assert parts.shape == (splits, 3, 5)
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts.sum(0), x @ weight.t(), rtol=1e-4, atol=1e-3)
    assert partials_ref(x.double(), weight.double(), 2).dtype == torch.float64
    # 68 steps in three: 23, 23 and 22
    edges = [0, 23 * BLOCK_K, 46 * BLOCK_K, 4304]
    for s, part in enumerate(partials_ref(x, weight, 3)):
        columns = slice(edges[s], edges[s + 1])
        torch.testing.assert_close(part, x[:, columns] @ weight[:, columns].t())


# who takes it


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear_module, "num_sms", lambda device: 132)
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)


def test_auto_takes_it_for_few_rows(h200, monkeypatch):
    def choose(M, has_residual=False, dtype=BF16, device=CUDA):
        return choose_backend(M, 3456, 1152, dtype, device, None, has_residual)

    assert choose(256) == ("few_rows", few_rows_tile(256, 3456, 1152, ""))
    assert choose(257) == ("library", None)
    assert choose(256, dtype=torch.float32) == ("library", None)
    assert choose(256, device=torch.device("cpu")) == ("library", None)
    monkeypatch.setattr(linear_module, "few_rows_tile", lambda *_: TILE)
    assert choose(256) == ("few_rows", TILE)
    assert choose(256, has_residual=True) == ("library", None), "it cannot add in place"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert choose(256) == ("library", None)


class OnGpu:
    """A weight as `choose_partials` sees it."""

    def __init__(self, N, K, dtype=BF16, address=0, stride=None):
        self.shape, self.dtype, self.device, self.is_cuda = (N, K), dtype, CUDA, True
        self.itemsize, self.address, self.strides = dtype.itemsize, address, (stride or K, 1)

    def data_ptr(self):
        return self.address

    def stride(self, axis):
        return self.strides[axis]


def test_who_leaves_partial_sums(h200, monkeypatch):
    tile = few_rows_tile(200, 1152, 4304, RESIDUAL)
    assert tile is not None
    assert choose_partials(200, OnGpu(1152, 4304)) == tile
    assert choose_partials(200, torch.zeros(1152, 4304, dtype=BF16)) is None, "on a CPU"
    monkeypatch.setitem(TABLE, (1152, 4304, RESIDUAL), ((256, tile), (384, None)))
    assert choose_partials(256, OnGpu(1152, 4304)) == tile
    assert choose_partials(257, OnGpu(1152, 4304)) is None
    assert choose_partials(385, OnGpu(1152, 4304)) is None
    assert choose_partials(200, OnGpu(1160, 4304)) is None
    assert choose_partials(200, OnGpu(1152, 4304, dtype=torch.float32)) is None
    assert choose_partials(200, OnGpu(1152, 4304, address=8)) is None
    assert choose_partials(200, OnGpu(1152, 4304, stride=4305)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose_partials(200, OnGpu(1152, 4304)) is None


# what is refused


def test_cpu_tensors_are_refused():
    x = torch.zeros(16, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"linear_partials cannot run here: .* device is cpu; use"):
        linear_partials(x, x, config=TILE)
    with pytest.raises(ValueError, match=r"backend='few_rows' cannot run here: .* device is cpu"):
        linear(x, x, backend="few_rows")
    with pytest.raises(ValueError, match=r"backend='few_rows' cannot run here: .* device is cpu"):
        gated_linear(x, x, backend="few_rows")


@pytest.fixture
def launches(monkeypatch):
    """Calls that reached the kernel, on a device that has it."""
    for place in (module, linear_module):
        monkeypatch.setattr(place, "hopper_reason", lambda device, dtype: None)
    found = []
    monkeypatch.setattr(module, "launch", lambda *arguments, **options: found.append(options))
    return found


def shifted(rows, columns):
    """Rows that start two bytes past a multiple of 16."""
    return torch.zeros(rows * columns + 1, dtype=BF16)[1:].view(rows, columns)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(8, 72, dtype=BF16)}, ValueError, "must share K"),
        ({"weight": torch.zeros(8, 128)}, TypeError, "weight is torch.float32 on cpu, but x is"),
        ({"live_rows": torch.zeros(1)}, ValueError, "live_rows must be one int32"),
        ({"config": replace(TILE, splits=3)}, ValueError, "splits = 3 of K = 128 .* its 2 steps"),
        ({"out": torch.zeros(2, 16, 8)}, ValueError, r"out must be contiguous \[1, 16, 8\] fp32"),
        ({"out": torch.zeros(1, 16, 8).half()}, ValueError, "fp32 on cpu, got .* torch.float16"),
        ({"out": torch.zeros(1, 8, 16).mT}, ValueError, "out must be contiguous"),
        ({"x": shifted(16, 128)}, ValueError, "rows must start at multiples of 16 bytes"),
        ({"weight": shifted(8, 128)}, ValueError, "rows must start at multiples of 16 bytes"),
    ],
)  # fmt: skip
def test_linear_partials_refuses(change, error, message, launches):
    given = {"x": torch.zeros(16, 128, dtype=BF16), "weight": torch.zeros(8, 128, dtype=BF16)}
    given |= {"config": TILE} | change
    with pytest.raises(error, match=message):
        linear_partials(given.pop("x"), given.pop("weight"), **given)
    assert not launches


def test_linear_partials_passes_on_what_it_is_given(launches):
    x, weight = torch.zeros(16, 128, dtype=BF16), torch.zeros(8, 128, dtype=BF16)
    config = replace(TILE, splits=2)
    assert linear_partials(x, weight, config=config).shape == (2, 16, 8)
    assert launches == [{"config": config}]
    assert linear_partials(x[:0], weight, config=config).shape == (2, 0, 8)
    assert len(launches) == 1, "nothing to do"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(16, 8, dtype=BF16)}, "cannot add to a residual in place; use"),
        ({"x": shifted(16, 128)}, "rows that start at multiples of 16 bytes"),
        ({"weight": shifted(8, 128)}, "rows that start at multiples of 16 bytes"),
        ({"weight": torch.zeros(12, 128, dtype=BF16)}, "rows that start at multiples of 16 bytes"),
        ({"out": torch.zeros(16, 9, dtype=BF16)[:, :8]}, "rows that start at multiples of 16"),
        (
            {"x": torch.zeros(16, 0, dtype=BF16), "weight": torch.zeros(8, 0, dtype=BF16)},
            "columns to sum over",
        ),
    ],
)
def test_linear_refuses(change, message, launches):
    given = {"x": torch.zeros(16, 128, dtype=BF16), "weight": torch.zeros(8, 128, dtype=BF16)}
    given |= change
    with pytest.raises(ValueError, match=f"linear: backend='few_rows' .*{message}"):
        linear(given.pop("x"), given.pop("weight"), backend="few_rows", **given)
    assert not launches


# the rest runs on the GPU alone: Gluon has no interpreter

# (test_rotary_linear.py has those that rotate)
KEYS = [key for key in sorted(TABLE) if key[2] != ROTATED]
PRODUCTS = [(key, tile) for key in KEYS for _, tile in TABLE[key] if tile is not None]
ROUNDED = [(key, tile) for key, tile in PRODUCTS if key[2] != RESIDUAL]
ROUNDED += [((1160, 1152, "gelu_erf"), TILE), ((72, 200, "silu"), TILE), ((72, 72, ""), TILE)]
ROUNDED += [((144, 200, GATED), FewRowsConfig(64, 128, num_stages=4))]
# fewer places in the ring than parts of the result that leave through it
ROUNDED += [((520, 1152, "gelu_tanh"), FewRowsConfig(64, 256, num_stages=n)) for n in (2, 3)]
ROUNDED += [((5120, 1280, "quick_gelu"), FewRowsConfig(128, 320, num_stages=4))]
ROUNDED += [((3840, 1280, ""), FewRowsConfig(64, 384, num_stages=4))]
# the second tile starts in the gate and ends past it
ROUNDED += [((N, 200, GATED), FewRowsConfig(128, 384, num_stages=3)) for N in (400, 768)]
SUMMED = [(key, tile) for key, tile in PRODUCTS if key[2] == RESIDUAL]
SUMMED += [((1152, 4304, RESIDUAL), replace(TILE, splits=s)) for s in (1, 5, 7)]
SUMMED += [((1152, 4304, RESIDUAL), FewRowsConfig(128, 192, 4, splits=5))]
SUMMED += [((72, 200, RESIDUAL), replace(TILE, splits=4))]


def in_both_ways(products):
    """With a warp kept apart for loads, and without."""
    ways = [(key, replace(tile, producer=way)) for key, tile in products for way in (False, True)]
    return list(dict.fromkeys(ways))


def product_name(product):
    (N, K, epilogue), tile = product
    name = f"{tile.block_m}x{tile.block_n}s{tile.num_stages}p{tile.splits}"
    name += " fed" if tile.producer else ""
    return f"{N}x{K}-{epilogue or 'bias'}-{name}"


@pytest.fixture(scope="module")
def needs_hopper():
    if reason := gemm_module.hopper_reason(CUDA, BF16):
        pytest.skip(reason)


def draw(*shape, seed, scale=1.0, dtype=BF16):
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=g) * scale).to(dtype)


def rows(count):
    return torch.tensor([count], dtype=torch.int32, device="cuda")


class Product:
    """One product of M rows; `run` writes `out`, which starts as 7."""

    def __init__(self, M, key, tile, dtype=BF16):
        (N, K, self.epilogue), self.tile = key, tile
        self.is_gated, self.is_partial = self.epilogue == GATED, self.epilogue == RESIDUAL
        self.x = draw(M, K, seed=M, dtype=dtype)
        self.weight = draw(N, K, seed=1, scale=K**-0.5, dtype=dtype)
        self.bias = None if self.is_partial else draw(N, seed=2, dtype=dtype)
        shape = (tile.splits, M, N) if self.is_partial else (M, N // 2 if self.is_gated else N)
        kind = torch.float32 if self.is_partial else dtype
        self.out = torch.full(shape, 7.0, device="cuda", dtype=kind)

    def run(self, live_rows=None):
        if self.is_partial:
            linear_partials(
                self.x, self.weight, config=self.tile, live_rows=live_rows, out=self.out
            )
        else:
            activation = "silu" if self.is_gated else self.epilogue or None
            module.launch(
                self.x, self.weight, self.bias, self.out, live_rows,
                activation=activation, is_gated=self.is_gated, config=self.tile,
            )  # fmt: skip

    def check(self, live):
        if live == 0:
            return
        x, weight, bias = self.x[:live], self.weight, self.bias
        if self.is_partial:
            self._check_parts(x.double(), weight.double(), self.out[:, :live])
            stream = draw(live, len(weight), seed=5, dtype=x.dtype)
            oracle = stream.double() + x.double() @ weight.double().t()
            summed = add_partials_ref(stream, self.out[:, :live])
            assert_as_accurate(summed, torch.addmm(stream, x, weight.t()), oracle)
            return
        wide = [x.double(), weight.double(), bias.double()]
        if self.is_gated:
            eager, oracle = gated_linear_ref(x, weight, bias), gated_linear_ref(*wide)
        else:
            f = {"activation": self.epilogue or None}
            eager, oracle = linear_ref(x, weight, bias, **f), linear_ref(*wide, **f)
        assert_as_accurate(self.out[:live], eager, oracle)

    def _check_parts(self, x, weight, parts):
        splits = self.tile.splits
        assert parts.isfinite().all()
        # a tensor core adds 16 exact products at a time to a sum that it cuts to 22 bits at least;
        # no such sum is larger than that of the magnitudes
        steps = -(-x.shape[1] // 16 // splits) + BLOCK_K // 16
        bound = steps * 2.0**-22 * partials_ref(x.abs(), weight.abs(), splits)
        error = (parts.double() - partials_ref(x, weight, splits)).abs()
        assert (error <= bound).all()

    def rows_written(self, live):
        block = self.tile.block_m
        return min(len(self.x), -(-live // block) * block)


@pytest.mark.gpu
@pytest.mark.parametrize("product", in_both_ways(ROUNDED + SUMMED), ids=product_name)
@pytest.mark.parametrize("M", [1, 64, 200, 300])
def test_matches_oracle(M, product, needs_hopper):
    call = Product(M, *product)
    call.run()
    call.check(M)


@pytest.mark.gpu
@pytest.mark.parametrize("product", in_both_ways(ROUNDED + SUMMED), ids=product_name)
@pytest.mark.parametrize("live", [0, 1, 64, 65, 129, 250, 1000])
def test_live_rows(live, product, needs_hopper):
    M = 250
    call = Product(M, *product)
    num_live = min(live, M)
    call.x[num_live:] = float("nan")  # stale rows must not reach live ones
    call.run(rows(live))
    call.check(num_live)
    past = call.out[..., call.rows_written(num_live) :, :]
    assert (past == 7).all(), "tiles without a live row are left alone"


@pytest.mark.gpu
@pytest.mark.parametrize("product", in_both_ways([ROUNDED[0], SUMMED[0]]), ids=product_name)
def test_fp16(product, needs_hopper):
    call = Product(200, *product, dtype=torch.float16)
    call.run()
    call.check(200)


@pytest.mark.gpu
def test_strided_operands(needs_hopper):
    call = Product(200, (3456, 1152, ""), FewRowsConfig(64, 128, num_stages=8))
    wide = torch.full((200, 1280), float("nan"), dtype=BF16, device="cuda")
    x = wide[:, 64 : 64 + 1152]
    x.copy_(call.x)
    wide_out = torch.zeros(200, 3600, dtype=BF16, device="cuda")
    out = wide_out[:, 64 : 64 + 3456]
    linear(x, call.weight, call.bias, out=out, backend="few_rows")
    call.out = out.contiguous()
    call.check(200)
    assert not wide_out[:, :64].any()
    assert not wide_out[:, 64 + 3456 :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_auto_takes_it_from_the_table(key, needs_hopper):
    M, tile = TABLE[key][-1]
    call = Product(M, key, tile)
    if call.is_partial:
        assert choose_partials(M, call.weight) == tile
        return
    call.run()
    for backend in ("auto", "few_rows"):
        if call.is_gated:
            y = gated_linear(call.x, call.weight, call.bias, backend=backend)
        else:
            f = {"activation": call.epilogue or None}
            y = linear(call.x, call.weight, call.bias, backend=backend, **f)
        assert torch.equal(y, call.out)


# as in a tower: each call reads what the one before it wrote


class Chain:
    """Norm, product, parts of a product into the stream, and again, at widths of a tower."""

    def __init__(self, M):
        D, F = 1152, 4304
        self.first = draw(M, D, seed=3)
        self.x = self.first.clone()
        self.live = rows(M)
        self.up, self.down, self.proj = (
            draw(*shape, seed=i, scale=shape[1] ** -0.5)
            for i, shape in enumerate(((F, D), (D, F), (D, D)))
        )
        self.weight, self.bias = draw(D, seed=7), draw(F, seed=8)
        self.hidden = torch.zeros(M, F, dtype=BF16, device="cuda")
        self.parts = {s: torch.empty(s, M, D, device="cuda") for s in (2, 3)}

    def run(self):
        self.x.copy_(self.first)  # an ordinary kernel; nothing writes the live rows
        for _ in range(4):
            y = self._norm(None)
            wide = FewRowsConfig(64, 128, num_stages=8)
            module.launch(
                y, self.up, self.bias, self.hidden, self.live, activation="gelu_tanh", config=wide
            )
            thirds = FewRowsConfig(64, 64, 12, splits=3, producer=True)
            thirds = self._sums(self.hidden, self.down, thirds)
            y = self._norm(thirds)
            self._norm(self._sums(y, self.proj, FewRowsConfig(64, 128, 9, splits=2)))

    def _norm(self, partials):
        return norm(
            self.x, self.weight, None, 1e-6, kind="rms", live_rows=self.live, partials=partials
        )

    def _sums(self, y, weight, config):
        out = self.parts[config.splits]
        return linear_partials(y, weight, config=config, live_rows=self.live, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [64, 224])
def test_a_captured_chain_equals_calls_one_by_one(M, needs_hopper):
    chain = Chain(M)
    graph = torch.cuda.CUDAGraph()
    chain.run()  # compiles
    with kernel_chain():
        chain.run()
        with torch.cuda.graph(graph):
            chain.run()
    for live in (M, M - 33):
        chain.live.fill_(live)
        chain.run()
        want = chain.x.clone()
        assert want[:live].isfinite().all()
        assert not torch.equal(want, chain.first)
        for _ in range(50):
            chain.x.fill_(float("nan"))
            graph.replay()
            assert torch.equal(chain.x, want)


@pytest.mark.gpu
def test_a_captured_chain_reads_the_weights_of_its_replay(needs_hopper):
    """Weights are asked for early, but not before the replay that they were changed for."""
    chain = Chain(224)
    graph = torch.cuda.CUDAGraph()
    chain.run()
    with kernel_chain():
        chain.run()
        with torch.cuda.graph(graph):
            chain.run()
    for seed in range(20, 40):
        for weight in (chain.up, chain.down, chain.proj):
            weight.copy_(draw(*weight.shape, seed=seed, scale=weight.shape[1] ** -0.5))
        graph.replay()
        got = chain.x.clone()
        chain.run()
        assert torch.equal(got, chain.x)
