import pytest
import torch
from vitgraph.kernels.rope import head_norm_ref, rope_, rope_op, rope_ref
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "H", "D"), [(5, 3, 24), (3, 16, 64), (2, 2, 128)])
def test_norm_matches_oracle(T, H, D, dtype, device):
    qkv, cos, sin = arguments(T, H, D, dtype, device)
    # small values, so that eps shows, and weights of q and k that are far apart
    qkv *= 0.02
    weight = torch.randn(2 * D, generator=torch.Generator().manual_seed(D)).to(device, dtype)
    weight[D:] += 3
    v, eps = qkv[:, 2].clone(), 1e-4
    halves = weight.view(2, 1, D)
    # a tower's own steps, each rounded to this dtype
    qk = qkv[:, :2].float()
    normed = (qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + eps)).to(dtype) * halves
    eager = rope_ref(normed.flatten(1, 2), cos, sin)
    exact = torch.stack(
        [
            torch.nn.functional.rms_norm(qkv[:, i].double(), (D,), halves[i, 0].double(), eps)
            for i in (0, 1)
        ],
        1,
    )
    oracle = rope_ref(exact.flatten(1, 2), cos.double(), sin.double())
    got = rope_(qkv, cos, sin, None, weight, eps)
    # fp32: the sum of squares is taken in another order
    factor = 1.5 if dtype == torch.float32 else 1.0
    assert_as_accurate(got[:, :2].flatten(1, 2), eager, oracle, factor=factor)
    assert torch.equal(got[:, 2], v)


def test_norm_of_the_reference_is_in_fp64_for_fp64():
    x, weight = torch.randn(2, 2, 3, 8).double(), torch.randn(16).double()
    got = head_norm_ref(x, weight, 1e-6)
    for i in (0, 1):
        want = torch.nn.functional.rms_norm(x[:, i], (8,), weight[8 * i : 8 * i + 8], 1e-6)
        torch.testing.assert_close(got[:, i], want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 6), (5, 16, 72), (3, 16, 80), (40, 2, 20)])
def test_neighbours_are_halves_in_another_order(T, H, D, dtype, device):
    qkv, cos, sin = arguments(T, H, D, dtype, device)
    order = torch.arange(D).view(2, -1).T.flatten()  # 0, half, 1, half + 1, ...
    mixed = qkv[..., order].contiguous()
    expected = rope_(qkv, cos, sin)
    mixed_v = mixed[:, 2].clone()
    got = rope_(mixed, cos, sin, neighbours=True)
    assert got is mixed
    assert torch.equal(got[:, :2], expected[:, :2, :, order])
    assert torch.equal(got[:, 2], mixed_v)
    oracle = rope_ref(mixed[:, 2].double(), cos.double(), sin.double(), neighbours=True)
    by_halves = rope_ref(mixed[:, 2][..., order.argsort()].double(), cos.double(), sin.double())
    assert torch.equal(oracle, by_halves[..., order])


# of either kernel: halves of 8 elements are loaded by 16 bytes, those of 10 by 8; 40 rows of 40
# units are several programs
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("D", [16, 20])
@pytest.mark.parametrize("live", [None, 7, 11])
def test_angles_repeat(live, D, neighbours, device):
    qkv, cos, sin = arguments(12, 4, D, torch.float32, device)
    cos, sin = cos[:4].contiguous(), sin[:4].contiguous()
    live_rows = None if live is None else torch.tensor([live], dtype=torch.int32, device=device)
    pairs = {"neighbours": neighbours}
    whole = rope_(qkv.clone(), cos.repeat(3, 1), sin.repeat(3, 1), live_rows, **pairs)
    assert torch.equal(rope_(qkv, cos, sin, live_rows, **pairs), whole)


@pytest.mark.parametrize("form", ["halves", "norm", "neighbours"])
@pytest.mark.parametrize("D", [16, 20])
@pytest.mark.parametrize("live", [0, 2, 25, 40, 90])
def test_padding_is_left_alone(live, D, form, device):
    qkv, cos, sin = arguments(40, 4, D, torch.float32, device)
    weight = torch.full((2 * D,), 1.5, device=device) if form == "norm" else None
    before, pairs = qkv.clone(), {"neighbours": form == "neighbours"}
    whole = rope_(qkv.clone(), cos, sin, None, weight, **pairs)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    rope_(qkv, cos, sin, live_rows, weight, **pairs)
    assert torch.equal(qkv[:live], whole[:live])
    assert torch.equal(qkv[live:], before[live:])


@pytest.mark.parametrize("D", [16, 20])
def test_empty(D, device):
    qkv, cos, sin = arguments(1, 2, D, torch.float32, device)
    assert rope_(qkv[:0], cos[:0], sin[:0]).shape == (0, 3, 2, D)


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


def test_bad_weight():
    with pytest.raises(ValueError, match=r"weight must be contiguous \[16\]"):
        rope_(torch.zeros(2, 3, 2, 8), *[torch.zeros(2, 4)] * 2, None, torch.zeros(8))
    with pytest.raises(ValueError, match="a norm comes before the rotation of halves only"):
        rope_(
            torch.zeros(2, 3, 2, 8), *[torch.zeros(2, 4)] * 2, None, torch.zeros(16),
            neighbours=True,
        )  # fmt: skip


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, has_norm, device):
    weight = torch.ones(16, device=device) if has_norm else None
    args = (*arguments(2, 2, 8, torch.float32, device), None, weight)
    torch.library.opcheck(rope_op, args, test_utils=check)
