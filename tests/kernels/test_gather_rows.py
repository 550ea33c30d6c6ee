import pytest
import torch
from vitgraph.kernels.gather_rows import config, gather_rows, gather_rows_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]


def make(M, C, dtype, device, pad=0):
    g = torch.Generator().manual_seed(M * C + 1)
    values = torch.randint(0, 200, (M, C + pad), generator=g).to(dtype)
    return values.to(device)[:, :C]


def indices(K, M, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, M, (K,), generator=g, dtype=torch.int32).to(device)


def count(n, device):
    return torch.tensor([n], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "C", "pad"),
    [(1, 1, 1, 0), (7, 7, 33, 0), (50, 20, 512, 8), (40, 90, 1300, 3), (300, 300, 8, 0)],
)
def test_matches_indexing(M, K, C, pad, dtype, device):
    x, source = make(M, C, dtype, device, pad), indices(K, M, device)
    assert torch.equal(gather_rows(x, source), x[source.long()])


@pytest.mark.parametrize("live", [0, 1, 16, 17, 39, 40, 99])
def test_rows_past_the_live_ones_are_left_alone(live, device):
    x, source = make(30, 40, torch.float32, device), indices(40, 30, device)
    n = min(live, 40)
    x[29] = float("nan")
    source[n:] = 1 << 30  # never read: it would be far outside
    source[:n].clamp_(max=28)
    wide = torch.full((40, 48), -7.0, device=device)
    out = wide[:, 4:44]
    assert gather_rows(x, source, count(live, device), out) is out
    assert torch.equal(out[:n], x[source[:n].long()])
    assert (out[n:] == -7).all()
    assert (wide[:, :4] == -7).all()
    assert (wide[:, 44:] == -7).all()


def test_moves_bits(device):
    """NaN payloads and negative zeros arrive as they are."""
    bits = torch.tensor([[0x7FC1, -1, -0x8000, 0x7F81]], dtype=torch.int16, device=device)
    x = bits.repeat(3, 5).view(torch.bfloat16)
    y = gather_rows(x, indices(6, 3, device))
    assert torch.equal(y.view(torch.int16), bits.repeat(6, 5))


def test_empty(device):
    assert gather_rows(torch.zeros(4, 8, device=device), indices(0, 4, device)).shape == (0, 8)
    none = torch.zeros(0, 8, device=device)
    assert gather_rows(none, indices(0, 1, device)).shape == (0, 8)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("C", [1, 24, 1152, 3584, 5120])
def test_launch_parameters(C, itemsize):
    launch = config(C, itemsize)
    assert 1 <= launch.BLOCK_R <= 64
    assert launch.BLOCK_R & (launch.BLOCK_R - 1) == 0
    assert launch.BLOCK_R * launch.BLOCK_C * itemsize <= 16384


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x must be \[M, C\]"),
        ({"x": torch.zeros(8, 4).T}, r"adjacent elements in a row, got .* strides \(1, 4\)"),
        ({"source": torch.zeros(4, dtype=torch.int64)}, "source must be contiguous int32"),
        ({"source": torch.zeros(8, dtype=torch.int32)[::2]}, r"strides \(2,\)"),
        ({"live_rows": torch.zeros(1)}, "live_rows must be one int32"),
        ({"out": torch.zeros(5, 8)}, r"out must be \[4, 8\] torch.float32 .* got \(5, 8\)"),
        ({"out": torch.zeros(4, 8).half()}, "out must be .* torch.float16"),
        ({"out": torch.zeros(8, 4).T}, "out must be .* adjacent"),
        ({"out": X}, "out is x itself"),
    ],
)
def test_bad_arguments(change, message):
    args = {"x": X, "source": torch.zeros(4, dtype=torch.int32)} | change
    with pytest.raises(ValueError, match=f"gather_rows: .*{message}"):
        gather_rows(**args)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x = make(4, 8, torch.float32, device)
    args = (x, indices(3, 4, device), count(2, device), torch.zeros(3, 8, device=device))
    torch.library.opcheck(gather_rows_op, args, test_utils=check)


@pytest.mark.gpu
@pytest.mark.parametrize("C", [2048, 3584, 5120])
def test_on_gpu(C, device):
    x, source = make(20_000, C, torch.bfloat16, device), indices(16_384, 20_000, device)
    out = torch.full((16_384, C), float("nan"), dtype=torch.bfloat16, device=device)
    gather_rows(x, source, count(9_001, device), out)
    assert torch.equal(out[:9_001], x[source[:9_001].long()])
    assert out[9_001:].isnan().all()
