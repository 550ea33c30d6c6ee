import pytest
import torch
from vitgraph.kernels.residual import residual, residual_op, residual_ref
from vitgraph.kernels.testing import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "D"), [(1, 8), (7, 127), (5, 1280)])
def test_matches_oracle(T, D, dtype, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=g).to(device, dtype)
    offset = torch.randn(D, generator=g).to(device)
    eager = x + offset.to(dtype)
    assert_as_accurate(residual(x, offset), eager, x.double() + offset.double(), factor=1.0)


@pytest.mark.parametrize("live", [0, 3, 6])
def test_padding_is_zero(live, device):
    x = torch.ones(6, 16, device=device)
    x[live:] = float("nan")
    out = torch.full_like(x, float("nan"))
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    assert residual(x, torch.ones(16, device=device), live_rows=live_rows, out=out) is out
    assert torch.equal(out, residual_ref(torch.ones(6, 16, device=device), out.new_ones(16), live))


def test_without_offset(device):
    x = torch.randn(5, 24, device=device).bfloat16()
    live = torch.tensor([3], dtype=torch.int32, device=device)
    state = residual(x, None, live_rows=live)
    assert torch.equal(state[:3], x[:3])
    assert (state[3:] == 0).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"offset \(3,\) must be \[4\]"):
        residual(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"out must be contiguous \[2, 4\], got \[1, 4\]"):
        residual(torch.zeros(2, 4), torch.zeros(4), out=torch.zeros(1, 4))


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (torch.ones(2, 8, device=device), torch.ones(8, device=device), None)
    torch.library.opcheck(residual_op, args, test_utils=check)
