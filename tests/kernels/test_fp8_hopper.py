"""fp8 products of gemm_hopper.py, which has no interpreter: on the GPU or not at all.

Tensor cores keep some 13 bits of a sum of fp8 products between their steps and drop the rest: what
is lost so is the same order of magnitude in the library, and is what tolerances are for here.
"""

import functools

import pytest
import torch
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels import gemm_tuning
from vitgraph.kernels.aligned_rows import aligned_rows
from vitgraph.kernels.bounded_fp8 import bound_norms
from vitgraph.kernels.linear_fp8 import linear_fp8, linear_fp8_ref
from vitgraph.kernels.norm import norm_ref
from vitgraph.kernels.norm_fp8 import norm_fp8
from vitgraph.kernels.pdl import kernel_chain
from vitgraph.kernels.quantize import FP8, Bounds, bound_ref, quantize_ref
from vitgraph.kernels.rows import ceil_div, num_sms
from vitgraph.kernels.testing import rel_rms

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
NAN = float("nan")
ACTIVATIONS = ["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]
ROWS = [1, 17, 128, 129, 300, 3136]

QKV = (3456, 1152)  # (N, K)
UP = (4304, 1152)
DOWN = (1152, 4304)  # rows of K bytes that do not start at lines of the cache
GATE_UP = (2 * 3456, 1280)
SMALL = (96, 160)  # parts of a tile and of a step each way


@pytest.fixture(autouse=True)
def needs_hopper():
    if reason := gemm_module.hopper_reason(CUDA, BF16):
        pytest.skip(reason)


def tiles(is_gated=False):
    shipped = gemm_tuning.shipped_tiles(gemm_tuning.GATED if is_gated else None)
    return [pytest.param(tile, id=f"{tile.block_m}x{tile.block_n}") for tile in shipped]


@pytest.fixture
def with_tile(monkeypatch):
    """`with_tile(tile)`: hopper products take it; the list of those that did."""
    from vitgraph.kernels import gemm_hopper

    launch = gemm_hopper.launch

    def install(tile):
        calls = []

        def launch_tile(x, weight, *operands, **options):
            calls.append(tile)
            count = ceil_div(x.shape[0], tile.block_m) * ceil_div(weight.shape[0], tile.block_n)
            programs = min(num_sms(x.device), count)
            launch(x, weight, *operands, **options | {"config": tile, "programs": programs})

        monkeypatch.setattr(gemm_hopper, "launch", launch_tile)
        return calls

    return install


def draw(*shape, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=g)


@functools.cache
def weights(N, K):
    """(weight, its scales, bias); output channels differ in size by ten."""
    weight = draw(N, K, seed=N + K) * K**-0.5
    weight *= 10 ** (draw(N, seed=K).clamp(-2, 2)[:, None] / 4)
    return *quantize_ref(weight), draw(N, seed=N).to(BF16)


class Call:
    """One product and what it may be followed by; rows of x differ in size by a hundred."""

    def __init__(self, M, shape, transform=None, *, seed=0):
        self.M, (self.N, self.K), self.transform = M, shape, transform
        self.F = self.N // 2 if transform == "swiglu" else self.N
        x = draw(M, self.K, seed=M + seed) * torch.logspace(-1, 1, M, device="cuda")[:, None]
        self.x, self.x_scale = quantize_ref(x)
        self.weight, self.w_scale, self.bias = weights(*shape)
        norms = bound_norms(self.weight, self.w_scale, self.bias)
        self.bound = bound_ref(x, Bounds(self.x_scale, norms))
        self.residual = draw(M, self.N, seed=M + 1).to(BF16)

    def align(self):
        """Rows of both operands at multiples of 128 bytes, and NaN between them."""
        for name in ("x", "weight"):
            rows = getattr(self, name)
            aligned = aligned_rows(rows, *rows.shape, dtype=FP8)
            aligned._base.view(torch.uint8).fill_(0x7F)  # NaN
            aligned.copy_(rows)
            setattr(self, name, aligned)
        return self

    def start(self, kind):
        """What `run` of "bf16", "fp8" or "residual" writes to."""
        if kind == "residual":
            return self.residual.clone()
        return torch.full((self.M, self.F), 7.0, device="cuda").to(FP8 if kind == "fp8" else BF16)

    def run(self, kind, backend="hopper", *, into=None, live_rows=None):
        target = self.start(kind) if into is None else into
        options = {
            "bf16": {"out": target, "bias": self.bias, "transform": self.transform},
            "fp8": {
                "out": target, "bias": self.bias, "transform": self.transform,
                "bound": self.bound,
            },
            "residual": {"residual": target},
        }[kind]  # fmt: skip
        y = linear_fp8(
            self.x, self.x_scale, self.weight, self.w_scale,
            live_rows=live_rows, backend=backend, **options,
        )  # fmt: skip
        assert y is target
        return y

    def exact(self, kind):
        """In fp32, before it is rounded to what is written."""
        operands = self.x, self.x_scale, self.weight, self.w_scale
        if kind == "residual":
            return self.residual.float() + linear_fp8_ref(*operands)
        y = linear_fp8_ref(*operands, self.bias, self.transform)
        if kind == "fp8":
            y = y / self.bound[:, None]
        return y


def bits(y):
    """Contents as integers: NaN equals itself."""
    return y.contiguous().view(torch.uint8 if y.dtype == FP8 else torch.int16)


def worst_rows(got, want):
    """Largest relative RMS error of a row."""
    error = (got.double() - want.double()).square().mean(1).sqrt()
    return (error / want.double().square().mean(1).sqrt()).max().item()


def check_wide(got, by_library, want):
    """bf16: near the definition, and no farther from it than the library."""
    assert got.isfinite().all()
    assert rel_rms(by_library, want) < 2e-2
    assert rel_rms(got, want) < 2e-2
    assert rel_rms(got, want) < 1.5 * max(rel_rms(by_library, want), 2**-9)
    assert worst_rows(got, want) < 1.5 * max(worst_rows(by_library, want), 2**-8)


def half_step(value):
    """Half of the distance between two neighbours of e4m3 about `value`."""
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp(2**-6, 448))) - 4)


def check_fp8(got, want, *, loss):
    """fp8: roundings of sums that lack `loss` times the RMS of their row at most."""
    rms = want.square().mean(1, keepdim=True).sqrt()
    assert got.float().isfinite().all()
    distance = (got.float() - want).abs()
    assert (distance <= (half_step(want.abs() + loss * rms) + loss * rms) * 1.001).all()
    reference = want.clamp(-448, 448).to(FP8)
    steps = (bits(got).int() & 127) - (bits(reference).int() & 127)
    # values of no size may be lost in the sums that they come from
    sizable = want.abs() > 0.5 * rms
    assert steps[sizable].abs().max() <= 1
    assert ((bits(got) >> 7) == (bits(reference) >> 7))[sizable].all()
    assert (steps[sizable] != 0).double().mean() < 0.1


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "contiguous"])
@pytest.mark.parametrize("shape", [QKV, UP, DOWN, SMALL], ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_bias(M, shape, is_aligned, tile, with_tile):
    call = Call(M, shape)
    call = call.align() if is_aligned else call
    launched = with_tile(tile)
    check_wide(call.run("bf16"), call.run("bf16", "library"), call.exact("bf16"))
    assert launched == [tile]


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "contiguous"])
@pytest.mark.parametrize("shape", [DOWN, (1152, 1152), SMALL], ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_residual(M, shape, is_aligned, tile, with_tile):
    call = Call(M, shape)
    call = call.align() if is_aligned else call
    launched = with_tile(tile)
    got = call.run("residual")
    assert launched == [tile]
    check_wide(got, call.run("residual", "library"), call.exact("residual"))


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("transform", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", [UP, SMALL], ids=str)
@pytest.mark.parametrize("M", [1, 300, 3136])
def test_activations(M, shape, transform, kind, tile, with_tile):
    call = Call(M, shape, transform).align()
    launched = with_tile(tile)
    got, want = call.run(kind), call.exact(kind)
    assert launched == [tile]
    if kind == "fp8":
        check_fp8(got, want, loss=0.02)
    else:
        check_wide(got, call.run(kind, "library"), want)


@pytest.mark.parametrize("tile", tiles(is_gated=True))
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "contiguous"])
@pytest.mark.parametrize("shape", [GATE_UP, (2 * 4304, 1152), (2 * 48, 160)], ids=str)
@pytest.mark.parametrize("M", [1, 129, 300, 3136])
def test_gated(M, shape, is_aligned, tile, with_tile):
    call = Call(M, shape, "swiglu")
    call = call.align() if is_aligned else call
    launched = with_tile(tile)
    got, want = call.run("bf16"), call.exact("bf16")
    assert launched == [tile]
    check_wide(got, call.run("bf16", "library"), want)


@pytest.mark.parametrize("transform", [None, "gelu_tanh"])
def test_passes_after_the_library_quantise_alike(transform):
    """Of sums that it rounds to bf16: by some steps more than the one kernel."""
    call, loss = Call(300, UP, transform), 0.02
    got = call.run("fp8", "library")
    rms = call.exact("fp8").square().mean(1, keepdim=True).sqrt()
    want = call.exact("fp8")
    # bf16 keeps 2**-8 of a sum
    slack = loss * rms + want.abs() * 2**-6
    assert ((got.float() - want).abs() <= (half_step(want.abs() + slack) + slack) * 1.001).all()


@pytest.mark.parametrize("kind", ["bf16", "fp8", "residual"])
@pytest.mark.parametrize("shape", [UP, DOWN], ids=str)
def test_alignment_changes_no_bit(shape, kind):
    call = Call(300, shape)
    contiguous = call.run(kind)
    call.align()
    assert torch.equal(bits(call.run(kind)), bits(contiguous))


@pytest.mark.parametrize("backend", ["hopper", "library"])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "residual"])
def test_into_wider_rows(kind, backend):
    call = Call(300, UP, None if kind == "residual" else "gelu_tanh")
    want = call.run(kind, backend)
    first = call.start(kind)
    wide = torch.full((300, call.F + 128), 7.0, device="cuda").to(first.dtype)
    into = wide[:, 64 : 64 + call.F]
    into.copy_(first)
    call.run(kind, backend, into=into)
    assert torch.equal(bits(into), bits(want))
    assert (wide[:, :64].float() == 7).all()
    assert (wide[:, 64 + call.F :].float() == 7).all()


@pytest.mark.parametrize("tile", tiles())
def test_a_row_does_not_depend_on_the_others(tile, with_tile):
    with_tile(tile)
    call = Call(1000, UP, "gelu_tanh")
    whole = call.run("fp8")
    for name in ("x", "x_scale", "bound"):
        setattr(call, name, getattr(call, name)[300:417])
    call.M = 117
    assert torch.equal(bits(call.run("fp8")), bits(whole[300:417]))


CASES = [
    pytest.param("bf16", QKV, None, id="bias"),
    pytest.param("fp8", UP, "gelu_tanh", id="gelu-fp8"),
    pytest.param("residual", DOWN, None, id="residual"),
    pytest.param("bf16", GATE_UP, "swiglu", id="gated"),
]


def cases_and_tiles(function):
    """`function` with every case of `CASES` and each tile that runs it."""
    pairs = [
        pytest.param(*case.values, *tile.values, id=f"{case.id}-{tile.id}")
        for case in CASES
        for tile in tiles(is_gated=case.values[2] == "swiglu")
    ]
    return pytest.mark.parametrize(("kind", "shape", "transform", "tile"), pairs)(function)


@cases_and_tiles
@pytest.mark.parametrize("live", [0, 1, 127, 128, 129, 500, 700, 100_000])
def test_live_rows(live, kind, shape, transform, tile, with_tile):
    M = 700
    call = Call(M, shape, transform).align()
    with_tile(tile)
    want = call.run(kind)
    n = min(live, M)
    call.x[n:].view(torch.uint8).fill_(0x7F)
    call.x_scale[n:], call.bound[n:] = NAN, NAN
    before = call.start(kind)
    got = call.run(kind, live_rows=torch.tensor([live], dtype=torch.int32, device="cuda"))
    assert torch.equal(bits(got[:n]), bits(want[:n]))
    written = min(M, ceil_div(n, tile.block_m) * tile.block_m)
    assert torch.equal(bits(got[written:]), bits(before[written:]))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "residual"])
def test_a_row_that_is_nan_stays_alone(kind):
    call = Call(200, UP)
    want = call.run(kind)
    call.x_scale[77], call.bound[77] = NAN, NAN
    got = call.run(kind)
    rest = [t for t in range(200) if t != 77]
    assert torch.equal(bits(got)[rest], bits(want)[rest])
    assert got[77].float().isnan().all()


def test_padding_between_is_finite():
    """Zero rows with the scale of zeros, as quantisation leaves padding."""
    call = Call(200, UP, "gelu_tanh")
    q, scale = quantize_ref(torch.zeros(72, call.K, device="cuda"))
    call.x[128:], call.x_scale[128:], call.bound[128:] = q, scale, 1.0
    got = call.run("fp8", live_rows=torch.tensor([130], dtype=torch.int32, device="cuda"))
    check_fp8(got[128:], call.exact("fp8")[128:], loss=1e-4)  # f of the bias


@cases_and_tiles
def test_replay_equals_eager(kind, shape, transform, tile, with_tile):
    M = 1500
    call = Call(M, shape, transform).align()
    with_tile(tile)
    live_rows = torch.tensor([M], dtype=torch.int32, device="cuda")
    into = call.start(kind)
    call.run(kind, into=into, live_rows=live_rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(kind, into=into, live_rows=live_rows)
    for live in (M, 100, 0, 1300):
        other = Call(M, shape, transform, seed=live + 1)
        for name in ("x", "x_scale", "bound"):
            getattr(call, name).copy_(getattr(other, name))
        live_rows.fill_(live)
        eager = call.run(kind, live_rows=live_rows)
        into.copy_(call.start(kind))
        graph.replay()
        assert torch.equal(bits(into), bits(eager))


class Mlp:
    """stream += down(f(up(norm(stream)))), as a block in fp8 computes it."""

    def __init__(self, T, D, F, transform):
        self.transform = transform
        self.stream = (draw(T, D, seed=1) * 2).to(BF16)
        self.norm = (1 + 0.1 * draw(D, seed=2)).to(BF16), (0.1 * draw(D, seed=3)).to(BF16)
        # rows of unlike norms, one far over the others
        spread = torch.exp(0.5 * draw(F, seed=7)).index_fill(0, torch.tensor([3], device="cuda"), 8)
        self.up = draw(F, D, seed=4) * D**-0.5 * spread[:, None]
        self.bias = draw(F, seed=5).to(BF16)
        self.down = draw(D, F, seed=6) * F**-0.5
        self.up_q = quantize_ref(self.up)
        self.down_q = quantize_ref(self.down)
        self.hidden = aligned_rows(self.stream, T, F, dtype=FP8)
        self.bound = torch.empty(T, device="cuda")
        self.bounds = Bounds(self.bound, bound_norms(*self.up_q, self.bias))

    def run(self, backend):
        x = self.stream.clone()
        q, scale = norm_fp8(x, *self.norm, 1e-6, kind="layer", bounds=self.bounds)
        linear_fp8(
            q, scale, *self.up_q, self.bias, transform=self.transform, backend=backend,
            bound=self.bound, out=self.hidden,
        )  # fmt: skip
        return linear_fp8(self.hidden, self.bound, *self.down_q, residual=x, backend=backend)

    def hidden_rows(self):
        """Hidden rows in fp32 from operands as quantised, without rounding in between."""
        rows = norm_ref(self.stream.float(), *(v.float() for v in self.norm), 1e-6, kind="layer")
        return linear_fp8_ref(*quantize_ref(rows), *self.up_q, self.bias, self.transform)


@pytest.mark.parametrize("T", [200, 2500])  # with rows of the norm in one block, and in two
@pytest.mark.parametrize("transform", ACTIVATIONS)
def test_two_products_err_as_with_scales_of_the_largest_values(transform, T):
    mlp = Mlp(T, 1152, 4304, transform)
    hidden, stream = mlp.hidden_rows(), mlp.stream.float()
    want = hidden @ mlp.down.t()
    by_largest = linear_fp8_ref(*quantize_ref(hidden), *quantize_ref(mlp.down))
    for backend in ("hopper", "library"):
        got = mlp.run(backend).float() - stream
        # the stream is bf16, and rounds both
        rounded = (by_largest + stream).to(BF16).float() - stream
        assert rel_rms(got, want) < 1.3 * rel_rms(rounded, want)


def test_chained_early_starts_change_no_bit():
    mlp = Mlp(700, 1152, 4304, "gelu_tanh")
    want = mlp.run("hopper")
    for _ in range(20):
        mlp.hidden.view(torch.uint8).fill_(0x7F)
        mlp.bound.fill_(NAN)
        with kernel_chain():
            got = mlp.run("hopper")
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "residual"])
def test_auto_is_hopper(kind):
    call = Call(300, UP)
    assert torch.equal(bits(call.run(kind, "auto")), bits(call.run(kind, "hopper")))


def test_dtypes_of_a_gpu():
    call = Call(16, SMALL)
    operands = call.x, call.x_scale, call.weight, call.w_scale
    with pytest.raises(TypeError, match=r"out is torch.float32, expected torch.bfloat16"):
        linear_fp8(*operands, out=torch.empty(16, 96, device="cuda"))
    with pytest.raises(TypeError, match=r"residual is torch.float32, expected torch.bfloat16"):
        linear_fp8(*operands, residual=torch.empty(16, 96, device="cuda"))
    with pytest.raises(TypeError, match=r"bias is torch.float32, expected torch.bfloat16"):
        linear_fp8(*operands, call.bias.float(), out=call.start("bf16"))


def test_no_rows():
    call = Call(4, SMALL)
    out = torch.empty(0, 96, dtype=BF16, device="cuda")
    got = linear_fp8(
        call.x[:0], call.x_scale[:0], call.weight, call.w_scale, call.bias, out=out,
        backend="hopper",
    )  # fmt: skip
    assert got is out
