"""q, k and v with the rotation in the epilogue, against product and pass, and when it is taken."""

from dataclasses import replace

import pytest
import torch
from vitgraph.kernels import gemm as gemm_module
from vitgraph.kernels import linear as linear_module
from vitgraph.kernels import rotary_linear as module
from vitgraph.kernels.few_rows_tuning import TABLE as FEW_ROWS
from vitgraph.kernels.few_rows_tuning import FewRowsConfig
from vitgraph.kernels.gemm_tuning import ROTATED, SQUARE, TABLE
from vitgraph.kernels.linear import linear_ref
from vitgraph.kernels.pdl import kernel_chain
from vitgraph.kernels.rope import rope_ref
from vitgraph.kernels.rotary_linear import (
    Rotation,
    rotary_linear,
    rotary_linear_op,
    rotary_linear_ref,
    rotating_tile,
    turns_of,
)
from vitgraph.kernels.testing import assert_as_accurate, rel_rms

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
NAN = float("nan")


def operands(T, H, D, K, dtype, device, *, side=40):
    """x, weight and bias, and a rotation by places of a grid of `side` columns."""
    g = torch.Generator().manual_seed(T + H * D)
    drawn = (
        torch.randn(T, K, generator=g),
        torch.randn(3 * H * D, K, generator=g) * K**-0.5,
        torch.randn(3 * H * D, generator=g),
    )
    index = torch.arange(T)
    rest = torch.full((T,), 7)
    position = torch.stack([index // side, index % side, rest, rest], 1).int()
    inv_freq = 1e4 ** -(torch.arange(D // 4) / (D // 4))
    angle = (position[:, :2, None] * inv_freq).flatten(1)
    rotation = Rotation(position, turns_of(inv_freq, H), angle.cos(), angle.sin())
    moved = Rotation(*(t.to(device) for t in vars(rotation).values()))
    return [t.to(device, dtype) for t in drawn], moved


def empty(T, H, D, dtype, device):
    return torch.full((T, 3, H, D), NAN, dtype=dtype, device=device)


def oracle_of(x, weight, bias, rotation):
    """fp64, by angles computed in fp64."""
    turns = rotation.turns.double().view(2, 3, -1)
    D = 2 * rotation.cos.shape[1]
    place = rotation.position[:, :2].double()
    angle = (place @ turns[:, 0, : D // 2]) * 2 * torch.pi
    bias = None if bias is None else bias.double()
    return rotary_linear_ref(x.double(), weight.double(), bias, angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_is_product_and_rotation(dtype, has_bias):
    (x, weight, bias), rotation = operands(21, 2, 16, 24, dtype, "cpu")
    bias = bias if has_bias else None
    out = empty(21, 2, 16, dtype, "cpu")
    assert rotary_linear(x, weight, bias, rotation, out=out) is out
    qkv = linear_ref(x.double(), weight.double(), None if bias is None else bias.double())
    qkv = qkv.view(21, 3, 2, 16)
    pairs = qkv[:, :2].unflatten(-1, (8, 2))  # of a row or a column of the place
    angle = torch.cat(
        [rotation.position[:, i, None] * 1e4 ** -(torch.arange(4) / 4) for i in (0, 1)], 1
    )
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(21, 1, 1, 8).double(), angle[:, None, None].double()
    )
    exact = torch.cat([torch.view_as_real(turned).flatten(-2), qkv[:, 2:]], 1)
    assert rel_rms(out, exact) < (1e-2 if dtype == BF16 else 1e-6)
    ref = rotary_linear_ref(x, weight, bias, rotation.cos, rotation.sin)
    torch.testing.assert_close(out, ref)


def test_turns_are_the_angles_of_a_row_and_a_column():
    inv_freq = torch.tensor([1.0, 0.25])
    turns = turns_of(inv_freq, 3)
    assert turns.shape == (2, 3 * 3 * 4)
    heads = (2 * torch.pi * turns).view(2, 3, 3, 4)
    assert torch.equal(heads[:, 2], torch.zeros(2, 3, 4))  # v
    for part in (0, 1):
        for head in range(3):
            torch.testing.assert_close(heads[0, part, head], torch.tensor([1.0, 0.25, 0, 0]))
            torch.testing.assert_close(heads[1, part, head], torch.tensor([0, 0, 1.0, 0.25]))


def test_padding_is_left_unrotated():
    (x, weight, bias), rotation = operands(9, 2, 8, 16, torch.float32, "cpu", side=3)
    live = torch.tensor([4], dtype=torch.int32)
    out = empty(9, 2, 8, torch.float32, "cpu")
    rotary_linear(x, weight, bias, rotation, out=out, live_rows=live)
    whole = rotary_linear(x, weight, bias, rotation, out=torch.empty_like(out))
    assert torch.equal(out[:4], whole[:4])
    assert torch.equal(out[4:], linear_ref(x, weight, bias).view_as(out)[4:])


@pytest.fixture
def h200(monkeypatch):
    """Let the chooser find an H200 with everything it needs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for place in (linear_module, module):
        monkeypatch.setattr(place, "num_sms", lambda device: 132)
    monkeypatch.setattr(gemm_module, "_gluon_reason", lambda: None)


def test_when_it_is_taken(h200, monkeypatch):
    key = (3456, 1152, "rope")
    monkeypatch.setitem(TABLE, key, ((1000, SQUARE), (2000, None), (3000, SQUARE)))
    monkeypatch.setitem(FEW_ROWS, key, ())

    def tile(M, N=3456, K=1152, dtype=BF16, device=CUDA):
        return rotating_tile(M, N, K, dtype, device)

    assert [tile(M) for M in (999, 1000, 2000, 3000)] == [None, SQUARE, None, SQUARE]
    assert tile(3000, dtype=torch.float32) is None
    assert tile(3000, device=torch.device("cpu")) is None
    # no entry: by the rule for many rows, and by no wide tile, which would spill
    assert tile(16383, 5376, 1792) is None
    assert tile(16384, 5376, 1792) == SQUARE
    # a product of few rows goes first, whatever the table says, if it is one that rotates
    few = FewRowsConfig(64, 64, num_stages=6)
    monkeypatch.setitem(FEW_ROWS, (3456, 1152, ""), ((1000, few),))
    assert tile(1000) == SQUARE
    monkeypatch.setitem(FEW_ROWS, key, ((999, None), (1000, few)))
    assert [tile(M) for M in (999, 1000, 1001)] == [None, few, SQUARE]
    assert tile(1000, dtype=torch.float32) is None


def test_other_gpus_take_two_kernels(h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert rotating_tile(65536, 3456, 1152, BF16, CUDA) is None


SMALL = operands(4, 2, 8, 16, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.zeros(4, 2, 2, 8)}, ValueError, r"out must be contiguous \[T, 3, H, D\]"),
        ({"out": torch.zeros(4, 3, 2, 6)}, ValueError, "with D a multiple of 4"),
        ({"out": torch.zeros(4, 3, 8, 2).mT}, ValueError, "contiguous"),
        ({"out": torch.zeros(5, 3, 2, 8)}, ValueError, r"position must be contiguous \[5, 4\]"),
        ({"out": torch.zeros(4, 3, 2, 8).double()}, TypeError, "out is torch.float64"),
        ({"position": torch.zeros(4, 4)}, TypeError, "position must be torch.int32 on cpu"),
        ({"turns": torch.zeros(2, 20)}, ValueError, r"turns must be contiguous \[2, 24\]"),
        ({"turns": torch.zeros(2, 24).double()}, TypeError, "turns must be torch.float32"),
        ({"cos": torch.zeros(4, 3)}, ValueError, "cos must be contiguous"),
        ({"x": torch.zeros(4, 17)}, ValueError, "must share K"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[48\]"),
        ({"live_rows": torch.ones(1)}, ValueError, "live_rows must be one int32"),
        ({"backend": "cublas"}, ValueError, "backend='cublas' is not one of"),
        ({"backend": "hopper"}, ValueError, "cannot run here: .* device is cpu"),
        ({"backend": "few_rows"}, ValueError, "'few_rows' cannot run here"),
    ],
)
def test_bad_arguments(change, error, message):
    (x, weight, bias), rotation = SMALL
    good = {"x": x, "weight": weight, "bias": bias, "out": torch.zeros(4, 3, 2, 8)}
    rotation = Rotation(**{name: change.get(name, t) for name, t in vars(rotation).items()})
    change = {name: value for name, value in change.items() if name not in vars(rotation)}
    with pytest.raises(error, match=message):
        rotary_linear(**good | {"rotation": rotation} | change)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    (x, weight, bias), rotation = operands(4, 2, 8, 16, torch.float32, device)
    args = (x, weight, bias, *vars(rotation).values())
    torch.library.opcheck(rotary_linear_op, args, test_utils=check)


# the kernel


@pytest.fixture
def hopper():
    if reason := gemm_module.hopper_reason(CUDA, BF16):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("T", "H", "D", "K"),
    [
        (1, 16, 72, 1152),
        (129, 16, 80, 1280),
        (1500, 12, 128, 1536),
        (3136, 16, 64, 1024),
        (70, 1, 8, 24),
    ],
)
@pytest.mark.parametrize("backend", ["hopper", "few_rows"])
def test_kernel(T, H, D, K, has_bias, dtype, backend, hopper):
    (x, weight, bias), rotation = operands(T, H, D, K, dtype, CUDA, side=56)
    bias = bias if has_bias else None
    out = empty(T, H, D, dtype, CUDA)
    rotary_linear(x, weight, bias, rotation, out=out, backend=backend)
    two = rotary_linear(x, weight, bias, rotation, out=torch.empty_like(out), backend="library")
    oracle = oracle_of(x, weight, bias, rotation)
    # one rounding instead of two, and angles that are as good
    for part in range(3):
        assert_as_accurate(out[:, part], two[:, part], oracle[:, part], factor=1.02)
    if T > 1:  # the first patch is not turned
        ours, theirs = (rel_rms(y[1:, :2], oracle[1:, :2]) for y in (out, two))
        assert ours < 0.9 * theirs


@pytest.mark.gpu
def test_kernel_far_from_the_origin(hopper):
    """Turns lose bits with distance as angles do: no more than by a table in fp32."""
    (x, weight, bias), rotation = operands(256, 16, 72, 1152, BF16, CUDA)
    rotation.position[:, :2] += 3000
    angle = rotation.position[:, :2, None] * (
        2 * torch.pi * rotation.turns.view(2, 3, 16, 2, 18)[0, 0, 0, 0]
    )
    rotation.cos.copy_(angle.flatten(1).cos())
    rotation.sin.copy_(angle.flatten(1).sin())
    out, two = (empty(256, 16, 72, BF16, CUDA) for _ in range(2))
    rotary_linear(x, weight, bias, rotation, out=out, backend="hopper")
    rotary_linear(x, weight, bias, rotation, out=two, backend="library")
    oracle = oracle_of(x, weight, bias, rotation)
    assert_as_accurate(out, two, oracle, factor=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "block"), [("hopper", SQUARE.block_m), ("few_rows", 64)])
@pytest.mark.parametrize("live", [0, 1, 128, 129, 700, 900])
def test_kernel_with_live_rows(live, backend, block, hopper):
    (x, weight, bias), rotation = operands(800, 4, 72, 96, BF16, CUDA)
    live_rows = torch.tensor([live], dtype=torch.int32, device=CUDA)
    x[min(live, 800) :] = 0
    out = empty(800, 4, 72, BF16, CUDA)
    rotary_linear(x, weight, bias, rotation, out=out, live_rows=live_rows, backend=backend)
    whole = rotary_linear(x, weight, bias, rotation, out=torch.empty_like(out), backend=backend)
    written = min(-(-live // block) * block, 800)
    assert torch.equal(out[:written], whole[:written])
    assert out[written:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "few_rows"])
def test_kernel_starts_early_and_is_replayed(backend, hopper):
    (x, weight, bias), rotation = operands(300, 16, 72, 1152, BF16, CUDA)
    out = empty(300, 16, 72, BF16, CUDA)
    eager = rotary_linear(x, weight, bias, rotation, out=out, backend=backend).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernel_chain():
        rotary_linear(x, weight, bias, rotation, out=out, backend=backend)
    for _ in range(3):
        out.fill_(NAN)
        graph.replay()
        assert torch.equal(out, eager)


TILES_OF_FEW_ROWS = [
    (N, K, last, tile)
    for (N, K, epilogue), classes in sorted(FEW_ROWS.items())
    for last, tile in classes
    if epilogue == ROTATED and tile is not None
]


def test_some_tiles_of_few_rows_rotate():
    assert TILES_OF_FEW_ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("producer", [False, True])
@pytest.mark.parametrize(("N", "K", "M", "tile"), TILES_OF_FEW_ROWS, ids=str)
def test_tiles_of_few_rows(N, K, M, tile, producer, hopper, monkeypatch):
    H, live = 16, M - M // 9
    (x, weight, bias), rotation = operands(M, H, N // 3 // H, K, BF16, CUDA, side=28)
    out = empty(M, H, N // 3 // H, BF16, CUDA)
    two = rotary_linear(x, weight, bias, rotation, out=torch.empty_like(out), backend="library")
    oracle = oracle_of(x, weight, bias, rotation)
    assert rotating_tile(M, N, K, BF16, CUDA) == tile
    tile = replace(tile, producer=producer)
    monkeypatch.setattr(module, "few_rows_tile", lambda *_: tile)
    monkeypatch.setattr(module, "linear", None)  # one kernel
    live_rows = torch.tensor([live], dtype=torch.int32, device=CUDA)
    x[live:] = NAN
    rotary_linear(x, weight, bias, rotation, out=out, live_rows=live_rows)
    for part in range(3):
        ours = out[:live, part]
        assert_as_accurate(ours, two[:live, part], oracle[:live, part], factor=1.02)
    assert out[-(-live // tile.block_m) * tile.block_m :].isnan().all()


@pytest.mark.gpu
def test_auto_takes_the_kernel_where_the_table_says(hopper, monkeypatch):
    (x, weight, bias), rotation = operands(3136, 16, 72, 1152, BF16, CUDA)
    out = empty(3136, 16, 72, BF16, CUDA)
    calls = []
    monkeypatch.setattr(module, "rope_", lambda *args, **options: calls.append(1))
    rotary_linear(x, weight, bias, rotation, out=out)
    assert calls == []
    by_kernel = rotary_linear(
        x, weight, bias, rotation, out=torch.empty_like(out), backend="hopper"
    )
    assert torch.equal(out, by_kernel)
    # a row that does not start at 16 bytes: two kernels
    crooked = torch.empty(3136, 1153, dtype=BF16, device=CUDA)[:, :1152].copy_(x)
    rotary_linear(crooked, weight, bias, rotation, out=out)
    assert calls == [1]
    with pytest.raises(ValueError, match="rows that start at multiples of 16 bytes"):
        rotary_linear(crooked, weight, bias, rotation, out=out, backend="hopper")
    # what it computes without the pass is the plain product
    assert rel_rms(out.flatten(1), linear_ref(x, weight, bias)) < 1e-2
    assert (
        rel_rms(
            by_kernel[:, :2],
            rope_ref(out[:, :2].flatten(1, 2), rotation.cos, rotation.sin, neighbours=True).view_as(
                out[:, :2]
            ),
        )
        < 1e-2
    )
