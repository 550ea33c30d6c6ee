import pytest
import torch
from vitgraph.kernels.add_norm import add_norm_, add_norm_op, add_norm_ref
from vitgraph.kernels.testing import assert_as_accurate


def arguments(T, D, dtype, device):
    g = torch.Generator().manual_seed(T * D)
    make = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    # an offset row mean catches one-pass variance
    tensors = make(T, D), make(T, D) + 3, make(D) + 1, make(D)
    return *(x.to(device, dtype) for x in tensors), 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "D"), [(1, 1792), (3, 127), (5, 64), (2, 4608)])
def test_matches_oracle(T, D, dtype, device):
    args = arguments(T, D, dtype, device)
    eager = add_norm_ref(*args)
    oracle = add_norm_ref(*(a.double() for a in args[:4]), args[4])
    y = args[1].clone()
    got = add_norm_(*args)
    assert got is args[0]
    # fp32: two plain sums, where eager's mean and variance come from one running update
    assert_as_accurate(got, eager, oracle, factor=3.0 if dtype == torch.float32 else 2.0)
    assert torch.equal(args[1], y)


@pytest.mark.parametrize("live", [0, 1, 4, 7])
def test_padding_is_left_alone_and_never_read(live, device):
    x, y, *rest = arguments(7, 96, torch.float32, device)
    before, clean = x.clone(), add_norm_(x.clone(), y, *rest)
    y[live:] = float("nan")
    add_norm_(x, y, *rest, torch.tensor([live], dtype=torch.int32, device=device))
    assert torch.equal(x[:live], clean[:live])
    assert torch.equal(x[live:], before[live:])


def test_no_rows(device):
    assert add_norm_(*arguments(0, 16, torch.float32, device)).shape == (0, 16)


@pytest.mark.parametrize(
    ("x", "y", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), "one shape and dtype"),
        (torch.zeros(2, 8), torch.zeros(2, 8).half(), torch.zeros(8), "one shape and dtype"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(7), r"weight \(7,\) must be \[8\]"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), torch.zeros(8), "x must be contiguous"),
        (torch.zeros(1, 16385), torch.zeros(1, 16385), torch.zeros(8), "limit of 16384"),
    ],
)
def test_bad_arguments(x, y, weight, message):
    with pytest.raises(ValueError, match=message):
        add_norm_(x, y, weight, torch.zeros(8), 1e-6)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (*arguments(3, 16, torch.float32, device), None)
    torch.library.opcheck(add_norm_op, args, test_utils=check)
