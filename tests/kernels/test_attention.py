import math
import sys
from types import SimpleNamespace

import pytest
import torch
from vitgraph.kernels import attention, attention_fa4, attention_triton
from vitgraph.kernels.attention import attention_ref, varlen_attention
from vitgraph.kernels.attention_triton import LaunchConfig
from vitgraph.kernels.testing import assert_as_accurate

NAN = float("nan")
CPU = torch.device("cpu")


def make(lengths, H, D, dtype, device, pad=0, tail=0, seed=0):
    """q, k, v (views of one buffer, NaN past the end), out (NaN) and cu_seqlens with a tail."""
    g = torch.Generator(device).manual_seed(seed)
    T = sum(lengths)
    qkv = torch.randn(T + pad, 3, H, D, device=device, generator=g)
    qkv[:, 2] += 1.0  # a mean in v: the softmax has to sum to one
    qkv = qkv.to(dtype)
    qkv[T:] = NAN
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] + n)
    offsets += [T] * tail
    cu = torch.tensor(offsets, dtype=torch.int32, device=device)
    out = torch.full((T + pad, H, D), NAN, dtype=dtype, device=device)
    return *qkv.unbind(1), cu, out


def check(q, k, v, cu, out, scale, factor=2.0):
    T = int(cu[-1])
    oracle = attention_ref(q.double(), k.double(), v.double(), cu, scale=scale)
    eager = attention_ref(q, k, v, cu, scale=scale)
    assert_as_accurate(out[:T], eager[:T], oracle[:T], factor=factor)


LAYOUTS = [
    pytest.param([5], 0, 0, id="one-short"),
    pytest.param([33, 17, 40], 4, 0, id="ragged"),
    pytest.param([0, 16, 0, 0, 32, 0], 3, 0, id="empty"),
    pytest.param([1, 1, 30, 1], 0, 3, id="one-row"),
    pytest.param([15, 16, 17, 31, 32, 33], 5, 4, id="around-block"),
    pytest.param([20, 9], 50, 9, id="long-tail"),
    pytest.param([0, 0], 7, 2, id="no-rows"),
]


@pytest.mark.parametrize(("lengths", "pad", "tail"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(lengths, pad, tail, dtype, device):
    q, k, v, cu, out = make(lengths, 2, 72, dtype, device, pad, tail)
    config = LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    attention_triton.launch(q, k, v, cu, 0.2, out, config)
    T = sum(lengths)
    if T:
        check(q, k, v, cu, out, 0.2)
    assert out[T:].isnan().all(), "a row past the last segment was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [8, 16, 24, 40, 56, 64, 72, 80, 88, 96, 112, 128])
def test_head_dims(D, dtype, device):
    q, k, v, cu, out = make([70, 0, 131], 1, D, dtype, device, pad=6, tail=2)
    scale = D**-0.5
    varlen_attention(q, k, v, cu, max_seqlen=131, scale=scale, out=out, backend="triton")
    check(q, k, v, cu, out, scale)


@pytest.mark.parametrize("S", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("tail", [0, 5])
def test_segment_counts(S, tail, device, monkeypatch):
    """Around the number of offsets that the search for a segment reads at once."""
    lengths = [(7 * s) % 4 for s in range(S - 1)] + [3]
    q, k, v, cu, out = make(lengths, 1, 16, torch.float32, device, pad=2, tail=tail)
    constants = attention_triton.kernel_constants
    monkeypatch.setattr(
        attention_triton, "kernel_constants", lambda *a: constants(*a) | {"BLOCK_S": 32}
    )
    attention_triton.launch(q, k, v, cu, 0.3, out, LaunchConfig(16, 16, 4, 1))
    check(q, k, v, cu, out, 0.3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_segments(backend, device):
    q, k, v, _, out = make([4], 1, 16, torch.float32, device)
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    varlen_attention(q, k, v, cu, max_seqlen=4, scale=1.0, out=out, backend=backend)
    assert out.isnan().all()
    empty = q[:0], k[:0], v[:0]
    cu = torch.zeros(3, dtype=torch.int32, device=device)
    varlen_attention(*empty, cu, max_seqlen=4, scale=1.0, out=out[:0], backend=backend)


def test_offsets_need_not_start_at_zero(device):
    q, k, v, _, out = make([60], 1, 16, torch.float32, device)
    cu = torch.tensor([37, 50, 60], dtype=torch.int32, device=device)
    attention_triton.launch(q, k, v, cu, 0.3, out, LaunchConfig(16, 16, 4, 1))
    assert out[:37].isnan().all()
    expected = attention_ref(q, k, v, cu, scale=0.3)
    torch.testing.assert_close(out[37:], expected[37:], rtol=1e-5, atol=1e-5)


def test_packing_leaves_a_segment_bitwise_unchanged(device):
    q, k, v, cu, out = make([19, 70, 23], 2, 72, torch.bfloat16, device)
    config = LaunchConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    attention_triton.launch(q, k, v, cu, 0.2, out, config)
    alone = torch.full_like(out[19:89], NAN)
    one = torch.tensor([0, 70], dtype=torch.int32, device=device)
    attention_triton.launch(q[19:89], k[19:89], v[19:89], one, 0.2, alone, config)
    assert torch.equal(alone, out[19:89])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter, in head 1
@pytest.mark.parametrize("D", [8, 72])
def test_heads_are_independent(D, device):
    """The last column block reaches into the next head: what it finds there must not count."""
    q, k, v, cu, out = make([37], 3, D, torch.float32, device)
    for x in (q, k, v):
        x[:, 1] = NAN
    attention_triton.launch(q, k, v, cu, 0.2, out, LaunchConfig(16, 16, 4, 1))
    heads = [x[:, ::2] for x in (q, k, v)]
    check(*heads, cu, out[:, ::2], 0.2)


def test_large_scores_do_not_overflow(device):
    q, k, v, cu, out = make([40], 1, 16, torch.bfloat16, device)
    q *= 50  # exp(100) is past fp32
    attention_triton.launch(q, k, v, cu, 1.0, out, LaunchConfig(16, 16, 4, 1))
    check(q, k, v, cu, out, 1.0)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_slots_cover_every_layout(block):
    """The bound on which `find_segment` rests, on random layouts."""
    g = torch.Generator().manual_seed(block)
    for _ in range(200):
        S = int(torch.randint(1, 20, (1,), generator=g))
        lengths = torch.randint(0, 3 * block, (S,), generator=g)
        lengths[torch.rand(S, generator=g) < 0.3] = 0
        cu = [0, *lengths.cumsum(0).tolist()]
        first = [c // block + s for s, c in enumerate(cu)]
        for s in range(S):
            assert first[s + 1] - first[s] >= max(1, math.ceil((cu[s + 1] - cu[s]) / block))
        assert first[S] <= attention_triton.num_slots(cu[-1], S, block)


@pytest.mark.parametrize(
    ("D", "expected"),
    [(8, (16, 0)), (16, (16, 0)), (24, (16, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)),
     (56, (64, 0)), (96, (128, 0)), (112, (128, 0)), (128, (128, 0))],
)  # fmt: skip
def test_split_head_dim(D, expected):
    assert attention_triton.split_head_dim(D) == expected


def test_cost():
    c = attention.cost([3, 0, 5], H=2, D=8, dtype=torch.bfloat16)
    assert c.flops == 4 * 2 * 8 * (9 + 25)
    assert c.bytes == 4 * 8 * 2 * 8 * 2


def bad(**changes):
    a = dict(zip(("q", "k", "v", "cu", "out"), make([4], 1, 16, torch.float32, CPU), strict=True))
    a |= {"scale": 1.0, "backend": "reference", **changes}
    return a


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"k": torch.zeros(3, 1, 16)}, ValueError, "share one shape"),
        ({"out": torch.zeros(4, 1, 16).half()}, TypeError, "share one dtype"),
        ({"cu": torch.zeros(2, dtype=torch.int64)}, TypeError, "int32"),
        ({"cu": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "contiguous"),
        ({"q": torch.zeros(4, 1, 32)[..., ::2]}, ValueError, "last axis of q"),
        ({"out": torch.zeros(4, 2, 16)[:, :1]}, ValueError, "out must be contiguous"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"backend": "fa5"}, ValueError, "unknown backend 'fa5'; choose from reference"),
        (
            {"backend": "fa4"},
            ValueError,
            "needs a CUDA device, this is cpu; usable for .*reference",
        ),
    ],
)
def test_bad_arguments(changes, error, match):
    a = bad(**changes)
    with pytest.raises(error, match=match):
        varlen_attention(
            a["q"], a["k"], a["v"], a["cu"],
            max_seqlen=4, scale=a["scale"], out=a["out"], backend=a["backend"],
        )  # fmt: skip


def test_bad_head_dim(device):
    x = torch.zeros(2, 1, 12)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="head dim 12"):
        varlen_attention(x, x, x, cu, max_seqlen=2, scale=1.0, out=x.clone(), backend="reference")
    with pytest.raises(ValueError, match="multiple of 8 up to 128, not 136"):
        attention.check_backend("triton", torch.bfloat16, torch.device(device), 136)


def test_reports_on_a_cpu():
    report = attention.backend_report("cpu")
    assert list(report) == list(attention.BACKENDS)
    assert report["reference"] is None
    for name in ("torch", "fa2", "fa3", "fa4"):
        assert "needs a CUDA device" in str(report[name])
        assert "\n" not in str(report[name])
    assert attention.choose_backend("cpu", torch.bfloat16, 72) == "reference"


@pytest.mark.parametrize("check_name", ["test_schema", "test_faketensor"])
def test_opcheck(check_name, device):
    q, k, v, cu, out = make([9, 4], 1, 16, torch.float32, device)
    torch.library.opcheck(
        attention_triton.varlen_attention_triton_op,
        (q, k, v, cu, out.zero_(), 0.5),
        test_utils=check_name,
    )


@pytest.mark.parametrize(
    ("max_seqlen", "rows", "expected"),
    [
        (196, 196, "64x112_rs"),
        (256, 64 * 256, "128x128_rs"),
        (784, 784, "128x112_rs"),
        (784, 8 * 784, "192x144"),
        (4096, 4096, "192x144"),
    ],
)
def test_fa4_tile(max_seqlen, rows, expected):
    assert str(attention_fa4.choose_tile(max_seqlen, rows)) == expected


def test_fa4_tile_falls_back():
    only = {attention_fa4.Tile(128, 176, True)}
    assert str(attention_fa4.choose_tile(100, 100, only)) == "128x176_rs"
    with pytest.raises(ValueError, match="none of the tiles"):
        attention_fa4.choose_tile(100, 100, set())


def test_fa4_objects_by_name(tmp_path, monkeypatch):
    for name in ("fa4_sm90_d72_192x144.so", "fa4_sm90_d72_64x112_rs.so", "fa4_sm90_d72_x.so"):
        (tmp_path / name).touch()
    monkeypatch.setenv("VITGRAPH_FA4_DIR", str(tmp_path))
    assert attention_fa4.object_folder() == tmp_path
    found = attention_fa4._objects(tmp_path)
    assert {str(t) for t in found[72]} == {"192x144", "64x112_rs"}
    reason = attention_fa4._object_reason
    assert "compute capability 9.0, this is 10.0" in reason(tmp_path, (10, 0), 72, torch.bfloat16)
    assert "head dim 80" in reason(tmp_path, (9, 0), 80, torch.bfloat16)
    assert "bfloat16" in reason(tmp_path, (9, 0), 72, torch.float16)
    assert "no prebuilt object" in reason(tmp_path / "none", (9, 0), 72, torch.bfloat16)


GPU_LAYOUTS = [
    pytest.param([784], 784, id="one-image"),
    pytest.param([256, 0, 1, 63, 64, 65, 784, 127, 129, 2048], 2048, id="ragged"),
    pytest.param([64] * 300, 64, id="windows"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 72, 80])
@pytest.mark.parametrize(("lengths", "max_seqlen"), GPU_LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "torch", "fa2", "fa3", "fa4"])
def test_backends_on_gpu(backend, lengths, max_seqlen, D, device):
    try:
        attention.check_backend(backend, torch.bfloat16, device, D)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, cu, out = make(lengths, 16, D, torch.bfloat16, device, pad=100, tail=7)
    if backend in ("fa3", "fa4"):  # these need finite rows past the end
        for x in (q, k, v):
            x[sum(lengths) :] = 0
    scale = D**-0.5
    varlen_attention(q, k, v, cu, max_seqlen=max_seqlen, scale=scale, out=out, backend=backend)
    check(q, k, v, cu, out, scale)
    assert out[sum(lengths) :].isnan().all(), "a row past the last segment was written"


@pytest.mark.gpu
@pytest.mark.parametrize("D", [72, 80])
@pytest.mark.parametrize("tile", attention_fa4.TILES, ids=str)
def test_fa4_tiles_on_gpu(tile, D, device):
    where = torch.device(device, torch.cuda.current_device())
    if reason := attention_fa4.unusable_reason(where, D, torch.bfloat16):
        pytest.skip(reason)
    q, k, v, cu, out = make([256, 0, 1, 63, 784, 127, 129], 16, D, torch.bfloat16, device, tail=3)
    attention_fa4.varlen_attention_fa4(q, k, v, cu, max_seqlen=784, scale=0.1, out=out, tile=tile)
    check(q, k, v, cu, out, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch", "fa2", "fa3", "fa4"])
def test_replay_with_another_layout(backend, device):
    """A graph captured for one layout serves smaller and larger ones, through cu_seqlens alone."""
    try:
        attention.check_backend(backend, torch.bfloat16, device, 72)
    except ValueError as error:
        pytest.skip(str(error))
    T, S = 3000, 12
    q, k, v, cu, out = make([250] * S, 16, 72, torch.bfloat16, device)

    def run():
        varlen_attention(q, k, v, cu, max_seqlen=T, scale=0.1, out=out, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([3000], [1, 0, 2000, 7], [100] * S, [0], [2999, 1]):
        offsets = torch.tensor(lengths).cumsum(0).tolist()
        offsets = [0, *offsets, *[offsets[-1]] * (S - len(lengths))]
        cu.copy_(torch.tensor(offsets, dtype=torch.int32))
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        if sum(lengths):
            check(q, k, v, cu, out, 0.1)
        assert out[sum(lengths) :].isnan().all()


@pytest.mark.parametrize(("name", "pair"), [("fa2", False), ("fa3", False), ("fa3", True)])
def test_how_the_packages_are_called(name, pair, monkeypatch):
    """With stand-ins of their documented signature: the packages are seldom installed."""
    q, k, v, cu, out = make([5, 0, 3], 2, 16, torch.float32, "cpu", pad=2, tail=1)
    want = attention.attention_ref(q, k, v, cu, scale=0.5, out=out.clone())

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale
    ):
        assert cu_seqlens_q is cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == (5, 5)
        result = torch.full((len(q), 2, 16), float("nan"))  # rows past the end: anything
        attention.attention_ref(q, k, v, cu_seqlens_q, scale=softmax_scale, out=result)
        return (result, None) if pair else result

    module = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}[name]
    stand_in = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, module, stand_in)
    out.fill_(7.0)
    attention._implementation(name)(q, k, v, cu, max_seqlen=5, scale=0.5, out=out)
    assert torch.equal(out[:8], want[:8])
    assert (out[8:] == 7.0).all()
