import pytest
import torch
from vitgraph.kernels.conv_rows import conv_rows, conv_rows_op, out_size

SAME3 = {"kernel": 3, "stride": 2, "padding": 1}
PLAIN2 = {"kernel": 2, "stride": 2, "padding": 0}


def make(items, grid, skip, D, dtype, device):
    g = torch.Generator().manual_seed(D + skip)
    x = torch.randn(items * (skip + grid[0] * grid[1]), D, generator=g)
    return x.to(device, dtype), torch.randn(D, generator=g).to(device)


def convolution(x, grid, skip, weight, offset, conv):
    """What the rows are for: [items * places, N] by torch's own convolution."""
    (h, w), D = grid, x.shape[1]
    rows = x.view(-1, skip + h * w, D)[:, skip:] + (0 if offset is None else offset)
    image = rows.mT.reshape(-1, D, h, w)
    stride, padding = conv["stride"], conv["padding"]
    y = torch.nn.functional.conv2d(image, weight, stride=stride, padding=padding)
    return y.flatten(2).mT.flatten(0, 1)


@pytest.mark.parametrize("conv", [SAME3, PLAIN2, {"kernel": 3, "stride": 1, "padding": 0}])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize(
    ("items", "grid", "skip", "D"), [(2, (4, 6), 0, 8), (3, (5, 3), 4, 33), (1, (6, 6), 1, 600)]
)
def test_is_a_convolution(items, grid, skip, D, has_offset, conv, device):
    x, offset = make(items, grid, skip, D, torch.float64, "cpu")
    offset = offset.double() if has_offset else None
    k = conv["kernel"]
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(5, D, k, k, generator=g, dtype=torch.float64)
    want = convolution(x, grid, skip, weight, offset, conv)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    offset32 = None if offset is None else offset.float().to(device)
    rows = conv_rows(x.float().to(device), grid, skip=skip, offset=offset32, **conv)
    assert rows.shape == (len(want), k * k * D)
    # values are rounded to fp32, twice with an offset; the product sums k * k * D such errors
    got = rows.cpu().double() @ matrix.T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * (k * k * D) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moves_rows_as_they_are(dtype, device):
    x, offset = make(2, (4, 4), 1, 40, dtype, device)
    rows = conv_rows(x, (4, 4), skip=1, **PLAIN2).view(2, 2, 2, 2, 2, 40)
    blocks = x.view(2, 17, 40)[:, 1:].reshape(2, 2, 2, 2, 2, 40).transpose(2, 3)
    assert torch.equal(rows, blocks)
    shifted = conv_rows(x, (4, 4), skip=1, offset=offset, **PLAIN2).view_as(rows)
    assert torch.equal(shifted, (blocks.float() + offset).to(dtype))


@pytest.mark.parametrize("live", [0, 3, 4, 7, 8])
def test_padding_is_zero_and_never_read(live, device):
    x, offset = make(2, (4, 4), 1, 24, torch.float32, device)
    clean = conv_rows(x, (4, 4), skip=1, offset=offset, **SAME3)
    x.view(2, 17, 24)[-(-live // 4) :] = float("nan")
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    rows = conv_rows(x, (4, 4), skip=1, offset=offset, live_rows=live_rows, **SAME3)
    assert torch.equal(rows[:live], clean[:live])
    assert (rows[live:] == 0).all()


def test_skipped_rows_are_not_read(device):
    x, _ = make(2, (4, 4), 3, 8, torch.float32, device)
    x.view(2, 19, 8)[:, :3] = float("nan")
    assert conv_rows(x, (4, 4), skip=3, **SAME3).isfinite().all()


def test_no_items(device):
    assert conv_rows(torch.zeros(0, 8, device=device), (4, 4), **SAME3).shape == (0, 72)


def test_sizes():
    sizes = [out_size(n, 3, 2, 1) for n in (52, 26, 36, 18, 5, 1)]
    assert sizes == [26, 13, 18, 9, 3, 1]
    assert out_size(52, 2, 2, 0) == 26


@pytest.mark.parametrize(
    ("x", "grid", "conv", "message"),
    [
        (torch.zeros(17, 8), (4, 4), SAME3, "whole items of 16 rows"),
        (torch.zeros(8, 16).T, (4, 4), SAME3, "contiguous"),
        (torch.zeros(1, 8), (1, 1), PLAIN2, "does not fit a grid of 1 x 1"),
        (torch.zeros(16, 8), (4, 4), {"kernel": 2, "stride": 2, "padding": 2}, "padding = 2"),
    ],
)
def test_bad_arguments(x, grid, conv, message):
    with pytest.raises(ValueError, match=message):
        conv_rows(x, grid, **conv)


def test_bad_offset():
    with pytest.raises(ValueError, match=r"offset \(9,\) must be contiguous \[8\]"):
        conv_rows(torch.zeros(16, 8), (4, 4), offset=torch.zeros(9), **SAME3)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    x, offset = make(2, (4, 4), 1, 16, torch.float32, device)
    torch.library.opcheck(conv_rows_op, (x, 4, 4, 1, 3, 2, 1, offset, None), test_utils=check)
