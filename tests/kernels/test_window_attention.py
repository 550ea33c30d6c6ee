import pytest
import torch
from vitgraph.kernels import window_attention_hopper as hopper
from vitgraph.kernels.attention import attention_ref
from vitgraph.kernels.pdl import kernel_chain
from vitgraph.kernels.testing import assert_as_accurate
from vitgraph.kernels.window_attention import (
    cost,
    launch_config,
    window_attention,
    window_attention_op,
    window_attention_ref,
)

NAN = float("nan")


def make(lengths, H, D, dtype, device, pad=0, tail=0):
    """q, k, v (views of one buffer), cos, sin, offsets, out; everything past the end is NaN."""
    g = torch.Generator(device).manual_seed(0)
    T = sum(lengths)
    qkv = torch.randn(T + pad, 3, H, D, device=device, generator=g)
    qkv[:, 2] += 1.0
    angles = 6.3 * torch.rand(T + pad, D // 2, device=device, generator=g)
    cos, sin = angles.cos(), angles.sin()
    for x in (qkv, cos, sin):
        x[T:] = NAN
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] + n)
    cu = torch.tensor(offsets + [T] * tail, dtype=torch.int32, device=device)
    out = torch.full((T + pad, H, D), NAN, dtype=dtype, device=device)
    return *qkv.to(dtype).unbind(1), cos, sin, cu, out


def check(q, k, v, cos, sin, cu, out, scale):
    T = int(cu[-1])
    doubles = [x.double() for x in (q, k, v, cos, sin)]
    oracle = window_attention_ref(*doubles, cu, scale=scale)
    eager = window_attention_ref(q, k, v, cos, sin, cu, scale=scale)
    assert_as_accurate(out[:T], eager[:T], oracle[:T])
    assert out[T:].isnan().all(), "a row past the last window was written"


LAYOUTS = [
    pytest.param([64], 0, 0, 64, id="one"),
    pytest.param([64, 32, 0, 16, 64, 1], 6, 3, 64, id="edges"),
    pytest.param([0, 0, 9, 0], 3, 0, 16, id="empty"),
    pytest.param([13, 16], 40, 5, 16, id="small"),
    pytest.param([100, 128, 63], 4, 1, 128, id="two-tiles"),
    pytest.param([0], 5, 2, 64, id="no-rows"),
]


@pytest.mark.parametrize(("lengths", "pad", "tail", "max_window"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(lengths, pad, tail, max_window, dtype, device):
    q, k, v, cos, sin, cu, out = make(lengths, 2, 80, dtype, device, pad, tail)
    before = q.clone(), k.clone()
    window_attention(q, k, v, cos, sin, cu, scale=0.2, out=out, max_window=max_window)
    T = sum(lengths)
    if T:
        check(q, k, v, cos, sin, cu, out, 0.2)
    else:
        assert out.isnan().all()
    for x, old in zip((q, k), before, strict=True):
        assert torch.equal(x[:T], old[:T]), "the fused buffer was modified"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 64, 72, 80, 96, 128])
def test_head_dims(D, dtype, device):
    q, k, v, cos, sin, cu, out = make([40, 0, 25], 1, D, dtype, device, pad=2)
    window_attention(q, k, v, cos, sin, cu, scale=D**-0.5, out=out, max_window=40)
    check(q, k, v, cos, sin, cu, out, D**-0.5)


def test_largest_window(device):
    q, k, v, cos, sin, cu, out = make([201, 5], 1, 80, torch.float32, device)
    window_attention(q, k, v, cos, sin, cu, scale=0.1, out=out, max_window=256)
    check(q, k, v, cos, sin, cu, out, 0.1)


def test_reference_turns_pairs_half_a_head_apart():
    """Against complex multiplication, column i with column i + D / 2."""
    q, k, v, cos, sin, cu, _ = make([7, 5], 2, 16, torch.float64, "cpu")
    turn = torch.complex(cos.double(), sin.double())[:, None, :]

    def rotate(x):
        y = torch.complex(x[..., :8], x[..., 8:]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    expected = attention_ref(rotate(q), rotate(k), v, cu, scale=0.3)
    actual = window_attention_ref(q, k, v, cos.double(), sin.double(), cu, scale=0.3)
    torch.testing.assert_close(actual, expected)


def test_packing_leaves_a_window_bitwise_unchanged(device):
    q, k, v, cos, sin, cu, out = make([10, 16, 3], 2, 80, torch.bfloat16, device)
    window_attention(q, k, v, cos, sin, cu, scale=0.2, out=out, max_window=16)
    rows = slice(10, 26)
    alone = torch.full_like(out[rows], NAN)
    one = torch.tensor([0, 16], dtype=torch.int32, device=device)
    views = [x[rows] for x in (q, k, v, cos, sin)]
    window_attention(*views, one, scale=0.2, out=alone, max_window=16)
    assert torch.equal(alone, out[rows])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter, in head 1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_independent(dtype, device):
    q, k, v, cos, sin, cu, out = make([30], 3, 80, dtype, device)
    for x in (q, k, v):
        x[:, 1] = NAN
    window_attention(q, k, v, cos, sin, cu, scale=0.2, out=out)
    heads = [x[:, ::2] for x in (q, k, v)]
    check(*heads, cos, sin, cu, out[:, ::2], 0.2)


def test_nothing_to_do(device):
    q, k, v, cos, sin, _, out = make([3], 1, 16, torch.float32, device)
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    window_attention(q, k, v, cos, sin, cu, scale=1.0, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("max_window", "block_m", "block_n"), [(1, 16, 16), (64, 64, 64), (65, 64, 128), (256, 64, 256)]
)
def test_launch_config(max_window, block_m, block_n):
    config = launch_config(max_window, 80, torch.bfloat16)
    assert (config.block_m, config.block_n) == (block_m, block_n)


def test_cost():
    c = cost([4, 2], H=2, D=8, dtype=torch.bfloat16)
    assert c.flops == 4 * 2 * 8 * (16 + 4) + 6 * 6 * 2 * 8
    assert c.bytes == 4 * 6 * 2 * 8 * 2 + 2 * 6 * 4 * 4


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("cos", torch.zeros(3, 9), r"cos must be contiguous \[3, 8\]"),
        ("sin", torch.zeros(3, 16)[:, ::2], "sin must be contiguous"),
        ("max_window", 257, "max_window = 257 is outside 1..256"),
        ("max_window", 0, "max_window = 0"),
        ("scale", -1.0, "scale must be positive"),
    ],
)
def test_bad_arguments(name, value, match):
    q, k, v, cos, sin, cu, out = make([3], 1, 16, torch.float32, "cpu")
    a = {"cos": cos, "sin": sin, "scale": 1.0, "max_window": 64, name: value}
    with pytest.raises(ValueError, match=match):
        window_attention(
            q, k, v, a["cos"], a["sin"], cu,
            scale=a["scale"], out=out, max_window=a["max_window"],
        )  # fmt: skip


def test_bad_dtype(device):
    q, k, v, cos, sin, cu, out = make([3], 1, 16, torch.float32, device)
    with pytest.raises(TypeError, match=r"cos and sin torch.float32; got .* torch.float64"):
        window_attention(q, k, v, cos.double(), sin, cu, scale=1.0, out=out)


@pytest.mark.parametrize("check_name", ["test_schema", "test_faketensor"])
def test_opcheck(check_name, device):
    q, k, v, cos, sin, cu, out = make([9, 4], 1, 16, torch.float32, device)
    torch.library.opcheck(
        window_attention_op, (q, k, v, cos, sin, cu, out.zero_(), 0.5, 16), test_utils=check_name
    )


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 72, 80])
@pytest.mark.parametrize(
    ("lengths", "max_window"),
    [
        pytest.param([64] * 100 + [32, 16, 1, 48], 64, id="qwen2.5-vl"),
        pytest.param([256, 100, 0, 129] * 5, 256, id="large"),
    ],
)
def test_on_gpu(lengths, max_window, D, device):
    q, k, v, cos, sin, cu, out = make(lengths, 16, D, torch.bfloat16, device, pad=70, tail=20)
    window_attention(q, k, v, cos, sin, cu, scale=D**-0.5, out=out, max_window=max_window)
    check(q, k, v, cos, sin, cu, out, D**-0.5)


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({}, True),
        ({"max_window": 65}, False),
        ({"D": 72}, False),  # halves of 36
        ({"D": 88}, False),
        ({"reason": "needs a CUDA device"}, False),
        ({"skip": 1}, False),  # rows start anywhere
    ],
)
def test_the_hopper_kernel_runs_where_it_can(change, runs, monkeypatch):
    a = {"D": 80, "max_window": 64, "reason": None, "skip": 0, **change}
    monkeypatch.setattr(hopper, "unusable_reason", lambda *_: a["reason"])
    q, k, v, *_ = make([9], 2, a["D"], torch.bfloat16, "cpu")
    flat = torch.zeros(k.numel() + 8, dtype=k.dtype)
    k = flat[a["skip"] :][: k.numel()].view(k.shape)
    assert hopper.can_run(q, k, v, a["max_window"]) == runs


@pytest.mark.parametrize(
    ("windows", "early", "spreads"),
    [(1, True, True), (132, True, True), (133, True, False), (1, False, False)],
)
def test_programs_spread_where_two_a_multiprocessor_are_enough(
    windows, early, spreads, monkeypatch
):
    pytest.importorskip("vitgraph.kernels.window_attention_hopper_kernel")
    calls = []
    monkeypatch.setattr(hopper, "launch_kernel", lambda *args, **named: calls.append((args, named)))
    monkeypatch.setattr(hopper, "starts_early", lambda rows: early)
    monkeypatch.setattr(hopper, "num_sms", lambda device: 132)
    q, k, v, cos, sin, cu, out = make([2] * windows, 2, 80, torch.bfloat16, "cpu")
    hopper.launch(q, k, v, cos, sin, cu, out, 0.1)
    [((_, grid, *_), named)] = calls
    assert grid == (2 * windows,)
    assert named["ROOM"] == (hopper.room(80) if spreads else 0)
    assert named["launch_pdl"] == early


EDGES = [64, 32, 0, 16, 64, 1, 63]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [16, 48, 64, 80, 96, 112, 128])
def test_both_kernels_on_a_hopper_gpu(D, dtype, device, monkeypatch):
    q, k, v, cos, sin, cu, out = make(EDGES, 3, D, dtype, device, pad=9, tail=2)
    if not hopper.can_run(q, k, v, 64):
        pytest.skip("needs compute capability 9.0")
    for can_run in (hopper.can_run, lambda *_: False):
        monkeypatch.setattr(hopper, "can_run", can_run)
        out.fill_(NAN)
        window_attention(q, k, v, cos, sin, cu, scale=D**-0.5, out=out)
        check(q, k, v, cos, sin, cu, out, D**-0.5)


@pytest.mark.gpu
def test_values_past_a_window_do_not_reach_it(device):
    """Rows that a box brings along belong to the next window, or to nobody."""
    q, k, v, cos, sin, cu, out = make([20, 30], 2, 80, torch.bfloat16, device, pad=40)
    for x in (q, k, v):
        x[20:] = NAN
    window_attention(q, k, v, cos, sin, cu, scale=0.2, out=out)
    first = window_attention_ref(*(x[:20] for x in (q, k, v, cos, sin)), cu[:2], scale=0.2)
    assert out[20:].isnan().all()
    oracle = [x[:20].double() for x in (q, k, v, cos, sin)]
    assert_as_accurate(out[:20], first, window_attention_ref(*oracle, cu[:2], scale=0.2))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [4, 30], ids=["spread", "many"])
def test_calls_that_start_early_wait_for_the_one_before(count, device):
    """Each takes for q what the one before wrote; only few programs leave no room to a third."""
    q, k, v, cos, sin, cu, first = make([64] * count, 16, 80, torch.bfloat16, device, tail=3)
    results = first, torch.empty_like(first)

    def calls():
        x = q
        for i in range(5):
            y = results[i % 2]
            window_attention(x, k, v, cos, sin, cu, scale=0.1, out=y)
            x = y

    calls()
    want = [y.clone() for y in results]
    assert not any(y.isnan().any() for y in want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernel_chain():
        for y in results:
            y.fill_(NAN)  # the first two have to be ordinary kernels
        calls()
    for _ in range(10):
        graph.replay()
        assert all(torch.equal(got, y) for got, y in zip(results, want, strict=True))


@pytest.mark.gpu
def test_replay_with_another_layout(device):
    q, k, v, cos, sin, cu, out = make([64] * 20, 16, 80, torch.bfloat16, device)

    def run():
        window_attention(q, k, v, cos, sin, cu, scale=0.1, out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([64] * 3, [1, 0, 63, 16], [0], [64] * 20):
        offsets = torch.tensor([0, *lengths, *[0] * (20 - len(lengths))]).cumsum(0)
        cu.copy_(offsets.int())
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        if sum(lengths):
            check(q, k, v, cos, sin, cu, out, 0.1)
        assert out[sum(lengths) :].isnan().all()
