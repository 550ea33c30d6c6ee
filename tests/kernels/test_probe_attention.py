import pytest
import torch
from vitgraph.kernels.probe_attention import (
    BLOCK_N,
    probe_attention,
    probe_attention_op,
    probe_attention_ref,
)
from vitgraph.kernels.testing import assert_as_accurate

LENGTHS = [5, 0, BLOCK_N, 2 * BLOCK_N + 7, 1]  # and an empty tail
ROWS = sum(LENGTHS)


def make(H, D, dtype, device, padding=0):
    """q, k, v and offsets; k and v are views of one buffer that is NaN past the segments."""
    g = torch.Generator().manual_seed(H * D)
    q = 2 * torch.randn(H, D, generator=g).to(device)
    kv = torch.randn(ROWS + padding, 2, H, D, generator=g).to(device, dtype)
    kv[ROWS:] = float("nan")
    offsets = torch.tensor([0, *LENGTHS, 0, 0]).cumsum(0).int().to(device)
    return q, kv[:, 0], kv[:, 1], offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "D"), [(2, 32), (3, 72)])
def test_matches_oracle(H, D, dtype, device):
    q, k, v, offsets = make(H, D, dtype, device, padding=9)
    eager = probe_attention_ref(q, k, v, offsets, scale=D**-0.5)
    oracle = probe_attention_ref(q.double(), k.double(), v.double(), offsets, scale=D**-0.5)
    got = probe_attention(q, k, v, offsets, scale=D**-0.5)
    assert got.shape == (len(LENGTHS) + 2, H, D)
    # fp32: sums in another order, and a softmax in base 2
    factor = 2 if dtype == torch.float32 else 1.05
    assert_as_accurate(got, eager, oracle, factor=factor)
    assert (got[[1, 5, 6]] == 0).all()


def test_large_scores(device):
    q, k, v, offsets = make(2, 32, torch.float32, device)
    got = probe_attention(1e4 * q, k, v, offsets, scale=1.0)
    best = torch.einsum("hd,nhd->hn", q, k[:5]).argmax(1)
    assert torch.equal(got[0], v[best, torch.arange(2, device=device)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 32)}, ValueError, r"must be \[T, 3, 32\]"),
        ({"q": torch.zeros(2, 32).half()}, TypeError, "q torch.float32"),
        ({"q": torch.zeros(32, 2).T}, ValueError, "must be contiguous"),
        ({"k": torch.zeros(2, ROWS, 32).transpose(0, 1)}, ValueError, "rows of k and v must be"),
        ({"cu_seqlens": torch.zeros(0).int()}, ValueError, r"contiguous \[S \+ 1\], got \[0\]"),
        ({"cu_seqlens": torch.zeros(3)}, TypeError, "cu_seqlens int32"),
        ({"k": torch.zeros(ROWS, 2, 32, device="meta")}, ValueError, "on one device"),
    ],
)
def test_bad_arguments(change, error, message):
    names = ("q", "k", "v", "cu_seqlens")
    given = dict(zip(names, make(2, 32, torch.float32, "cpu"), strict=True)) | change
    with pytest.raises(error, match=message):
        probe_attention(**given, scale=1.0)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (*make(2, 16, torch.float32, device), 0.25)
    torch.library.opcheck(probe_attention_op, args, test_utils=check)
