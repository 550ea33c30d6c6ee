"""The attention kernel for compute capability 9.0, on a GPU alone: Gluon has no interpreter."""

import pytest
import torch
from vitgraph.kernels import attention_hopper, attention_triton
from vitgraph.kernels.attention import attention_ref, varlen_attention
from vitgraph.kernels.attention_hopper import (
    ROWS,
    LaunchConfig,
    launch,
    launch_config,
    usable_configs,
    varlen_attention_hopper,
)
from vitgraph.kernels.testing import assert_as_accurate

NAN = float("nan")
BF16 = torch.bfloat16
SMALL = LaunchConfig(groups=1, block_n=128, num_stages=4)
PAIR = LaunchConfig(groups=2, block_n=128, num_stages=3)
# every number of groups, both widths of a step, the least ring, two programs a multiprocessor
CONFIGS = [
    SMALL,
    PAIR,
    LaunchConfig(groups=2, block_n=128, num_stages=4),
    LaunchConfig(groups=1, block_n=128, num_stages=2, programs_per_sm=2),
    LaunchConfig(groups=1, block_n=128, num_stages=3, programs_per_sm=2),
    LaunchConfig(groups=1, block_n=64, num_stages=4, programs_per_sm=2),
    LaunchConfig(groups=1, block_n=64, num_stages=5, programs_per_sm=2),
    LaunchConfig(groups=2, block_n=64, num_stages=3),
    LaunchConfig(groups=2, block_n=64, num_stages=5),
    LaunchConfig(groups=3, block_n=64, num_stages=4),
]


@pytest.fixture(scope="module")
def needs_hopper():
    if reason := attention_hopper.unusable_reason(torch.device("cuda"), 72, BF16):
        pytest.skip(reason)


def make(lengths, H=2, D=72, dtype=BF16, pad=0, tail=0, before=0, seed=0):
    """q, k, v (views of one buffer, NaN outside the segments), out (NaN), cu_seqlens."""
    g = torch.Generator("cuda").manual_seed(seed)
    T = before + sum(lengths)
    qkv = torch.randn(T + pad, 3, H, D, device="cuda", generator=g)
    qkv[:, 2] += 1.0  # a mean in v: the softmax has to sum to one
    qkv = qkv.to(dtype)
    qkv[:before] = NAN
    qkv[T:] = NAN
    offsets = torch.tensor([before, *lengths, *[0] * tail], device="cuda").cumsum(0)
    out = torch.full((T + pad, H, D), NAN, dtype=dtype, device="cuda")
    return *qkv.unbind(1), offsets.int(), out


def check(q, k, v, cu, out, scale):
    begin, end = int(cu[0]), int(cu[-1])
    assert out[:begin].isnan().all(), "a row before the first segment was written"
    assert out[end:].isnan().all(), "a row past the last segment was written"
    if begin == end:
        return
    oracle = attention_ref(q.double(), k.double(), v.double(), cu, scale=scale)
    eager = attention_ref(q, k, v, cu, scale=scale)
    assert_as_accurate(out[begin:end], eager[begin:end], oracle[begin:end])


LAYOUTS = [
    pytest.param([784], 0, 0, id="one-image"),
    pytest.param([256, 0, 1, 63, 64, 65, 784, 127, 128, 129, 191, 193, 1000], 100, 7, id="ragged"),
    pytest.param([0, 16, 0, 0, 320, 0], 3, 0, id="empty"),
    pytest.param([1, 1, 30, 1], 0, 3, id="one-row"),
    pytest.param([3, 2, 1], 1, 0, id="few-rows"),
    pytest.param([2], 0, 0, id="two-rows"),
    pytest.param([0, 0], 7, 2, id="no-rows"),
    pytest.param([64] * 300, 0, 0, id="windows"),
    pytest.param([4096], 5, 250, id="long-tail"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [64, 72, 80])
@pytest.mark.parametrize(("lengths", "pad", "tail"), LAYOUTS)
def test_layouts(lengths, pad, tail, D, config, needs_hopper):
    q, k, v, cu, out = make(lengths, 3, D, pad=pad, tail=tail)
    launch(q, k, v, cu, 0.2, out, config)
    check(q, k, v, cu, out, 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("D", range(8, 129, 8))
def test_head_dims(D, dtype, needs_hopper):
    for rows in (1, 90):  # both sides of the rule for small calls of wide heads
        lengths = [70 * rows, 0, 131, 5]
        q, k, v, cu, out = make(lengths, 2, D, dtype, pad=6, tail=2)
        scale = D**-0.5
        varlen_attention(q, k, v, cu, max_seqlen=6300, scale=scale, out=out, backend="hopper")
        check(q, k, v, cu, out, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [8, 16, 24, 32, 40, 48, 56])
def test_narrow_heads(D, config, needs_hopper):
    q, k, v, cu, out = make([300, 1, 777, 128, 0, 65], 2, D, pad=3)
    launch(q, k, v, cu, 0.3, out, config)
    check(q, k, v, cu, out, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("H", [1, 2, 5, 16])
def test_heads(H, config, needs_hopper):
    q, k, v, cu, out = make([300, 17, 777], H, 80, torch.float16)
    launch(q, k, v, cu, 0.1, out, config)
    check(q, k, v, cu, out, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_heads_are_independent(config, needs_hopper):
    """The second column block reaches past the head: what lies there must not count."""
    q, k, v, cu, out = make([137, 400], 3, 72)
    for x in (q, k, v):
        x[:, 1] = NAN
    launch(q, k, v, cu, 0.2, out, config)
    check(q[:, ::2], k[:, ::2], v[:, ::2], cu, out[:, ::2], 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [1, 40, 64, 127, 128, 130, 300])
def test_segments_are_independent(length, config, needs_hopper):
    """NaN in a segment stays there, however short the next one is."""
    q, k, v, cu, out = make([200, length, 200], 2, 72)
    for x in (q, k, v):
        x[:200] = NAN
        x[200 + length :] = NAN
    launch(q, k, v, cu, 0.2, out, config)
    q, k, v, out = (x[200 : 200 + length] for x in (q, k, v, out))
    one = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    check(q, k, v, one, out, 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("D", [64, 72, 96, 128])
def test_ends_of_segments(D, config, needs_hopper):
    """Every kind of last tile and last step: whole, half, one row, and groups without any."""
    if config not in usable_configs(D, CONFIGS):
        config = launch_config(D, 5000, 16, 132)
    rests = (1, 16, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 191)
    lengths = [first + rest for first in (0, 128, 192, 640) for rest in rests]
    q, k, v, cu, out = make(lengths, 2, D, pad=30)
    launch(q, k, v, cu, 0.2, out, config)
    check(q, k, v, cu, out, 0.2)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        one = torch.tensor([begin, end], dtype=torch.int32, device="cuda")
        alone = torch.full_like(out, NAN)
        launch(q, k, v, one, 0.2, alone, config)
        assert torch.equal(alone[begin:end], out[begin:end])
        assert alone[:begin].isnan().all()
        assert alone[end:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_before_the_first_segment(config, needs_hopper):
    q, k, v, cu, out = make([20, 500], 2, 72, before=37, pad=9)
    launch(q, k, v, cu, 0.3, out, config)
    check(q, k, v, cu, out, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_packing_leaves_a_segment_bitwise_unchanged(config, needs_hopper):
    q, k, v, cu, out = make([19, 700, 23, 250], 2, 72)
    launch(q, k, v, cu, 0.2, out, config)
    alone = torch.full_like(out[19:719], NAN)
    one = torch.tensor([0, 700], dtype=torch.int32, device="cuda")
    launch(q[19:719], k[19:719], v[19:719], one, 0.2, alone, config)
    assert torch.equal(alone, out[19:719])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_repeats_bitwise(config, needs_hopper):
    q, k, v, cu, out = make([784] * 8 + [3, 1000], 16, 72)
    launch(q, k, v, cu, 0.1, out, config)
    for _ in range(20):
        again = torch.full_like(out, NAN)
        launch(q, k, v, cu, 0.1, again, config)
        assert torch.equal(again, out)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [64, 72, 80])
@pytest.mark.parametrize(
    "lengths",
    [
        # programs go from a tile of two steps to one of a part of a step, many times
        pytest.param([256, *[168] * 6, 32, *[64] * 3, *[16] * 9], id="steps"),
        # a tile of q is freed while the next one is waited for, beside programs that are slow
        pytest.param([3136, 24, 1200, 260, 484, 120, 168, 1920], id="loads"),
    ],
)
def test_short_segments_after_long_ones(lengths, D, config, needs_hopper):
    if config not in usable_configs(D, CONFIGS):
        config = launch_config(D, 5000, 16, 132)
    q, k, v, cu, out = make(lengths, 16, D)
    launch(q, k, v, cu, 0.2, out, config)
    check(q, k, v, cu, out, 0.2)
    for _ in range(100):
        again = torch.full_like(out, NAN)
        launch(q, k, v, cu, 0.2, again, config)
        assert torch.equal(again, out)


@pytest.mark.gpu
def test_large_scores_do_not_overflow(needs_hopper):
    q, k, v, cu, out = make([400], 1, 64)
    q *= 50  # exp(100) is past fp32
    launch(q, k, v, cu, 1.0, out, PAIR)
    check(q, k, v, cu, out, 1.0)


def make_rising(lengths, D, rise, seed=0):
    """As `make`: scores of a segment's later keys pass those of the first by about `rise`."""
    q, k, v, cu, out = make(lengths, 2, D, pad=5, seed=seed)
    T = int(cu[-1])
    for x in (q, k):
        x[:T] = x[:T].abs()
    row = torch.arange(T, device="cuda")
    segment = torch.bucketize(row, cu[1:], right=True)
    # the last 128 rows of a segment are the first that its programs compute
    is_first = row >= cu[1:][segment] - 128
    mean = D * 2 / torch.pi  # of q . k
    k[:T][~is_first] *= rise / mean
    k[:T][is_first] *= 0.01
    return q, k, v, cu, out


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [64, 72, 80, 128])
@pytest.mark.parametrize("rise", [20, 60, 95, 400])
def test_scores_that_rise(rise, D, config, needs_hopper):
    """Past the first keys: within what is held (20), beyond it (2**86), and beyond fp32."""
    if config not in usable_configs(D, CONFIGS):
        config = launch_config(D, 5000, 16, 132)  # wide heads need their own
    q, k, v, cu, out = make_rising([700, 128, 1000, 200, 129, 60, 641], D, rise)
    launch(q, k, v, cu, 1.0, out, config)
    check(q, k, v, cu, out, 1.0)
    tickets = torch.zeros(2, dtype=torch.int32, device="cuda")
    drawn = torch.full_like(out, NAN)
    launch(q, k, v, cu, 1.0, drawn, config, tickets)
    live = int(cu[-1])
    assert torch.equal(drawn[:live], out[:live])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [320, 784])
@pytest.mark.parametrize("rise", [44, 45, 60])
def test_the_limit_of_a_rise(rise, length, config, needs_hopper):
    """exp(44) is 2**63.5, still held; exp(45) is past 2**64; sums with v of 2**62 are near 2**128.

    Row 160 is in none of the steps that the held maximum is of.
    """
    q, k, v, cu, out = make([length, 30], 2, 72, pad=5)
    q[:], k[:] = 0, 0
    q[:, :, 0] = 1  # scores are what lies in the first column of k, exactly
    k[160, :, 0] = rise
    v *= 2.0**62 / v.nan_to_num().abs().max()
    launch(q, k, v, cu, 1.0, out, config)
    check(q, k, v, cu, out, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_row_that_rises(config, needs_hopper):
    """A group begins again for one of its rows; those of other groups stay bit for bit."""
    q, k, v, cu, out = make([1000], 2, 72)
    k[:, 0, 0] = 1.0
    k[-128:, 0, 0] = -1.0
    launch(q, k, v, cu, 0.2, out, config)
    before = out.clone()
    q[333, 0, 0] = 1000.0
    launch(q, k, v, cu, 0.2, out, config)
    check(q, k, v, cu, out, 0.2)
    assert torch.equal(out[:, 1], before[:, 1])
    first = 333 // ROWS * ROWS
    assert torch.equal(out[:first], before[:first])
    assert torch.equal(out[first + ROWS :], before[first + ROWS :])


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 31, 257, 3000])
def test_segment_counts(S, needs_hopper):
    lengths = [(7 * s) % 4 for s in range(S - 1)] + [3]
    q, k, v, cu, out = make(lengths, 1, 64, pad=2, tail=5)
    launch(q, k, v, cu, 0.3, out, PAIR)
    check(q, k, v, cu, out, 0.3)


@pytest.mark.gpu
def test_agrees_with_triton_on_a_long_segment(needs_hopper):
    q, k, v, cu, out = make([16384], 4, 72)
    varlen_attention_hopper(q, k, v, cu, scale=0.1, out=out)
    other = torch.empty_like(out)
    attention_triton.varlen_attention_triton(q, k, v, cu, scale=0.1, out=other)
    assert (out.float() - other.float()).abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [64, 72, 128])
def test_drawn_tiles(D, config, needs_hopper):
    """Bit for bit those that are given, every one of them, call after call of the same tickets."""
    if config not in usable_configs(D, CONFIGS):
        config = launch_config(D, 5000, 16, 132)  # wide heads need their own
    lengths = [784, 3, 0, 2300, 64, 1, 900, 129, 256, 0, 500]
    q, k, v, cu, out = make(lengths, 16, D, pad=40, tail=5)
    given = torch.empty_like(out)
    launch(q, k, v, cu, 0.1, given, config)
    tickets = torch.zeros(2, dtype=torch.int32, device="cuda")
    for _ in range(4):
        out.fill_(NAN)
        launch(q, k, v, cu, 0.1, out, config, tickets)
        live = int(cu[-1])
        assert torch.equal(out[:live], given[:live])
        assert out[live:].isnan().all()
        assert tickets.tolist() == [0, 0]
    check(q, k, v, cu, out, 0.1)


@pytest.mark.gpu
def test_tickets_of_the_caller(needs_hopper):
    q, k, v, cu, out = make([2000, 16, 3000], 16)
    tickets = torch.zeros(2, dtype=torch.int32, device="cuda")
    varlen_attention(
        q, k, v, cu, max_seqlen=3000, scale=0.1, out=out, backend="hopper", tickets=tickets
    )
    check(q, k, v, cu, out, 0.1)
    assert tickets.tolist() == [0, 0]
    for bad in (torch.zeros(3, dtype=torch.int32, device="cuda"), tickets.long(), tickets.cpu()):
        with pytest.raises(ValueError, match=r"tickets must be int32 \[2\] on cuda"):
            varlen_attention_hopper(q, k, v, cu, scale=0.1, out=out, tickets=bad)


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_replay_with_another_layout(config, drawn, needs_hopper):
    """A graph captured for one layout serves smaller and larger ones, through cu_seqlens alone."""
    T, S = 3000, 12
    q, k, v, cu, out = make([250] * S, 16, 72)
    tickets = torch.zeros(2, dtype=torch.int32, device="cuda") if drawn else None

    def run():
        launch(q, k, v, cu, 0.1, out, config, tickets)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([T], [1, 0, 2000, 7], [100] * S, [0], [T - 1, 1]):
        offsets = torch.tensor([0, *lengths, *[0] * (S - len(lengths))]).cumsum(0)
        cu.copy_(offsets.int())
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        check(q, k, v, cu, out, 0.1)


@pytest.mark.gpu
def test_rows_that_are_not_aligned_are_refused(needs_hopper):
    flat = torch.zeros(4 * 64 + 1, dtype=BF16, device="cuda")
    x = flat[1:].view(4, 1, 64)
    cu = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="rows and heads of q must start at multiples of 16 bytes"):
        varlen_attention_hopper(x, x, x, cu, scale=1.0, out=torch.zeros_like(x))
