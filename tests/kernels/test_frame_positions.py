import pytest
import torch
from vitgraph.kernels import frame_positions as home
from vitgraph.kernels.frame_positions import (
    add_frame_positions_,
    add_frame_positions_op,
    add_frame_positions_ref,
    cost,
    frame_table,
)
from vitgraph.kernels.testing import assert_as_accurate

GRIDS = {
    "image": [(1, 4, 6)],
    "clip": [(4, 3, 7)],
    "mixed": [(1, 4, 4), (3, 2, 6), (0, 0, 0), (2, 8, 2), (1, 1, 1), (4, 2, 14)],
    "many": [(1 + i % 4, 1, 2 + i % 2) for i in range(70)],
    "empty": [],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def grid_table(grids, device, slack=2):
    grid = torch.zeros(len(grids) + slack, 3, dtype=torch.int32)
    if grids:
        grid[: len(grids)] = torch.tensor(grids)
    return grid.to(device)


def rows_of(grids):
    return sum(t * h * w for t, h, w in grids)


def stream(grids, D, dtype, device, tail=3):
    g = torch.Generator().manual_seed(rows_of(grids) + D)
    return torch.randn(rows_of(grids) + tail, D, generator=g).to(dtype).to(device)


def naive(x, table, grids):
    """Rows one by one, in fp64."""
    rows = [row.double() for row in x]
    start = 0
    for t, h, w in grids:
        for r in range(t * h * w if t > 1 else 0):
            rows[start + r] = rows[start + r] + table[r // (h * w)].double()
        start += t * h * w
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2, 40, 600])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_matches_naive(grids, D, dtype, device):
    x, table = stream(grids, D, dtype, device), frame_table(4, D).to(device)
    before, live = x.clone(), rows_of(grids)
    grid = grid_table(grids, device)
    oracle = naive(x.cpu(), table.cpu(), grids).to(device)
    eager = add_frame_positions_ref(x, table, grid)
    assert add_frame_positions_(x, table, grid) is x
    assert torch.equal(x[live:], before[live:])
    assert_as_accurate(x, eager, oracle)
    assert_as_accurate(eager, oracle.to(dtype), oracle)


def test_images_are_left_as_they_are(device):
    grids = [(1, 4, 6), (2, 2, 2), (1, 2, 4)]
    x = stream(grids, 40, torch.bfloat16, device)
    before = x.clone()
    add_frame_positions_(x, frame_table(4, 40).to(device), grid_table(grids, device))
    assert torch.equal(x[:24], before[:24])
    assert torch.equal(x[32:], before[32:])
    assert not torch.equal(x[24:28], before[24:28])  # frame 0 has a position too: cosines of 0
    assert not torch.equal(x[28:32], before[28:32])


def test_table_is_that_of_the_definition():
    table = frame_table(5, 64).double()
    frame = torch.arange(5, dtype=torch.float64)[:, None]
    angle = frame * 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (table - torch.cat([angle.sin(), angle.cos()], 1)).abs().max() < 1e-6
    assert table[0].tolist() == [0.0] * 32 + [1.0] * 32


def test_rows_past_the_capacity_are_not_written(device):
    if device == "cpu":
        wide = torch.zeros(40, 8)
        add_frame_positions_(wide[:20], frame_table(4, 8), grid_table([(2, 4, 4)], device))
        assert (wide[:20, 4] == 1).sum() >= 16
        assert (wide[20:] == 0).all()


def test_references_give_the_same(device, monkeypatch):
    grids = GRIDS["mixed"]
    x, table = stream(grids, 40, torch.float32, device), frame_table(4, 40).to(device)
    kernel = add_frame_positions_(x.clone(), table, grid_table(grids, device))
    monkeypatch.setattr(home, "use_reference", lambda _: True)
    assert torch.equal(add_frame_positions_(x, table, grid_table(grids, device)), kernel)


def test_no_rows(device):
    empty = torch.zeros(0, 8, device=device)
    table = frame_table(4, 8).to(device)
    assert add_frame_positions_(empty, table, grid_table([], device)) is empty


def test_operator(device):
    grids = [(2, 2, 4)]
    x, table = stream(grids, 8, torch.float32, device), frame_table(4, 8).to(device)
    grid = grid_table(grids, device)
    expected = add_frame_positions_(x.clone(), table, grid)
    add_frame_positions_op(x, table, grid)
    assert torch.equal(x, expected)
    torch.library.opcheck(
        add_frame_positions_op, (x, table, grid), test_utils=("test_schema", "test_faketensor")
    )


def test_cost():
    assert cost(400, 1152, torch.bfloat16).bytes == 800 * 1152 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4).t()}, r"x must be contiguous \[T, D\], got \(4, 8\)"),
        ({"table": torch.zeros(4, 6)}, r"table must be contiguous \[F, 8\] torch.float32 on cpu"),
        ({"table": torch.zeros(4, 8).half()}, r"got \(4, 8\) torch.float16"),
        ({"grid": torch.zeros(2, 3)}, "grid must be contiguous int32"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(4, 8), "table": torch.zeros(4, 8), "grid": grid_table([], "cpu")}
    with pytest.raises(ValueError, match=f"add_frame_positions_: .*{message}"):
        add_frame_positions_(*(arguments | change).values())
