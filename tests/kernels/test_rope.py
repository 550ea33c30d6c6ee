import pytest
import torch
from vitgraph.kernels.rope import rope_, rope_op, rope_ref
from vitgraph.kernels.testing import assert_as_accurate


def arguments(T, H, D, dtype, device):
    g = torch.Generator().manual_seed(T + H + D)
    angle = torch.rand(T, D // 2, generator=g) * 60
    qkv = torch.randn(T, 3, H, D, generator=g).to(device, dtype)
    return qkv, angle.cos().to(device), angle.sin().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "H", "D"), [(1, 1, 8), (5, 16, 72), (3, 16, 80), (4, 16, 64), (2, 3, 96)]
)
def test_matches_oracle(T, H, D, dtype, device):
    qkv, cos, sin = arguments(T, H, D, dtype, device)
    qk = qkv[:, :2].flatten(1, 2)
    # the definition upcasts by itself, so eager in this dtype keeps the arithmetic in it
    x1, x2 = qk.chunk(2, -1)
    c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
    eager = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    oracle = rope_ref(qk.double(), cos.double(), sin.double())
    v = qkv[:, 2].clone()
    got = rope_(qkv, cos, sin)
    assert got is qkv
    assert_as_accurate(got[:, :2].flatten(1, 2), eager, oracle, factor=1.0)
    assert torch.equal(got[:, 2], v)


@pytest.mark.parametrize("live", [0, 2, 5])
def test_padding_is_left_alone(live, device):
    qkv, cos, sin = arguments(5, 2, 16, torch.float32, device)
    before = qkv.clone()
    whole = rope_(qkv.clone(), cos, sin)
    rope_(qkv, cos, sin, torch.tensor([live], dtype=torch.int32, device=device))
    assert torch.equal(qkv[:live], whole[:live])
    assert torch.equal(qkv[live:], before[live:])


def test_empty(device):
    qkv, cos, sin = arguments(1, 2, 16, torch.float32, device)
    assert rope_(qkv[:0], cos[:0], sin[:0]).shape == (0, 3, 2, 16)


@pytest.mark.parametrize(
    ("qkv", "rows", "message"),
    [
        (torch.zeros(2, 2, 2, 8), 2, r"\[T, 3, H, D\]"),
        (torch.zeros(2, 3, 2, 7), 2, "D even"),
        (torch.zeros(2, 3, 8, 2).transpose(2, 3), 2, "contiguous"),
        (torch.zeros(2, 3, 2, 8), 3, r"cos must be contiguous \[2, 4\]"),
    ],
)
def test_bad_arguments(qkv, rows, message):
    table = torch.zeros(rows, 4)
    with pytest.raises(ValueError, match=message):
        rope_(qkv, table, table)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (*arguments(2, 2, 8, torch.float32, device), None)
    torch.library.opcheck(rope_op, args, test_utils=check)
