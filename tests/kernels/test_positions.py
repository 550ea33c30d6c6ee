import pytest
import torch
import torch.nn.functional as F
from vitgraph.kernels.layout import layout_ref
from vitgraph.kernels.positions import (
    add_positions_,
    add_positions_op,
    add_positions_ref,
    sample_table_ref,
)
from vitgraph.kernels.testing import assert_as_accurate

SAMPLINGS = ["bilinear_corners", "bilinear", "bicubic", "bilinear_antialias"]
# larger and smaller than the table along either side, and a single token
GRIDS = torch.tensor([[1, 4, 6], [2, 2, 20], [1, 2, 2], [1, 18, 4]], dtype=torch.int32)
ROWS = 24 + 80 + 4 + 72


def position_of(padding=0):
    return layout_ref(
        GRIDS, torch.ones(1), num_rows=ROWS + padding, num_frames=5, num_windows=0, merge=2,
        window=0,
    ).position  # fmt: skip


def arguments(D, side, dtype, device, padding=0):
    g = torch.Generator().manual_seed(D + side)
    make = lambda *s: torch.randn(*s, generator=g).to(device, dtype)  # noqa: E731
    return make(ROWS + padding, D), make(side**2, D), position_of(padding).to(device)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("side", [1, 7])
def test_samples_are_those_of_interpolate(side, sampling):
    table = torch.randn(side**2, 5, generator=torch.Generator().manual_seed(0)).double()
    position = position_of()
    got = sample_table_ref(table, position, sampling)
    for row, (h, w, height, width) in enumerate(position.tolist()):
        # a single row or column sits on the first table entry, as transformers has it
        resized = F.interpolate(
            table.T.reshape(1, 5, side, side),
            (height, width),
            mode="bicubic" if sampling == "bicubic" else "bilinear",
            align_corners=sampling == "bilinear_corners",
            antialias=sampling == "bilinear_antialias",
        )
        torch.testing.assert_close(got[row], resized[0, :, h, w], rtol=0, atol=1e-12)


@pytest.mark.parametrize("height", [1, 3, 6, 40])
def test_a_grid_of_one_column(height):
    """`interpolate` with antialias errs there on a CPU (torch 2.13), so it is that of one row."""
    table = torch.randn(6, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    row = F.interpolate(
        table.permute(2, 1, 0)[None], (1, height), mode="bilinear", antialias=True
    )[0, :, 0].T  # fmt: skip
    position = torch.tensor([[i, 0, height, 1] for i in range(height)])
    got = sample_table_ref(table.flatten(0, 1), position, "bilinear_antialias")
    torch.testing.assert_close(got, row, rtol=0, atol=1e-7)  # its weights are fp32


@pytest.mark.parametrize("sampling", ["bilinear", "bicubic"])
def test_samples_are_those_of_grid_sample(sampling):
    table = torch.randn(36, 5, generator=torch.Generator().manual_seed(0)).double()
    position = position_of()
    place = 2 * (position[:, :2] + 0.5).double() / position[:, 2:] - 1
    sampled = F.grid_sample(
        table.T.reshape(1, 5, 6, 6), place.flip(1)[None, :, None], mode=sampling,
        padding_mode="border", align_corners=False,
    )  # fmt: skip
    got = sample_table_ref(table, position, sampling)
    torch.testing.assert_close(got, sampled[0, :, :, 0].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "side"), [(16, 7), (136, 4), (8, 1)])
def test_matches_oracle(D, side, dtype, sampling, device):
    x, table, position = arguments(D, side, dtype, device)
    eager = add_positions_ref(x, table, position, sampling)
    oracle = add_positions_ref(x.double(), table.double(), position, sampling)
    got = add_positions_(x, table, position, sampling)
    assert got is x
    # fp32: the same sums, whose products are fused with the additions
    factor = 1.5 if dtype == torch.float32 else 1.01
    assert_as_accurate(got, eager, oracle, factor=factor)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("live", [0, 1, 24, ROWS])
def test_padding_is_left_alone(live, sampling, device):
    x, table, position = arguments(16, 4, torch.float32, device, padding=12)
    before = x.clone()
    whole = add_positions_(x.clone(), table, position, sampling)
    position[live:] = -(2**30)
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    add_positions_(x, table, position, sampling, live_rows)
    assert torch.equal(x[:live], whole[:live])
    assert torch.equal(x[live:], before[live:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(8, 16)}, "square grid"),
        ({"table": torch.zeros(9, 8)}, r"table must be contiguous \[9, 16\]"),
        ({"position": torch.zeros(ROWS, 3, dtype=torch.int32)}, r"position must be contiguous"),
        ({"x": torch.zeros(16, ROWS).T}, "x must be contiguous"),
        ({"sampling": "nearest"}, "'nearest' is not one of"),
    ],
)
def test_bad_arguments(change, message):
    x, table, position = arguments(16, 3, torch.float32, "cpu")
    given = {"x": x, "table": table, "position": position, "sampling": "bilinear"} | change
    with pytest.raises(ValueError, match=message):
        add_positions_(**given)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (*arguments(8, 3, torch.float32, device), "bicubic", None)
    torch.library.opcheck(add_positions_op, args, test_utils=check)
