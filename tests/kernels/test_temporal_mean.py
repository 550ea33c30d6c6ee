import pytest
import torch
from vitgraph.kernels import temporal_mean as home
from vitgraph.kernels.temporal_mean import (
    cost,
    temporal_mean,
    temporal_mean_op,
    temporal_mean_ref,
)
from vitgraph.kernels.testing import assert_as_accurate

NAN = float("nan")
GRIDS = {  # in patches, merge size 2
    "image": [(1, 4, 6)],
    "clip": [(4, 4, 6)],
    "mixed": [(1, 4, 4), (3, 2, 6), (2, 8, 2), (1, 2, 2), (4, 2, 14)],
    "holes": [(2, 2, 4), (0, 0, 0), (1, 4, 2)],
    "many": [(1 + i % 4, 2, 2 + 2 * (i % 2)) for i in range(70)],
    "empty": [],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(grids, device, slack=2):
    grid = torch.zeros(len(grids) + slack, 3, dtype=torch.int32)
    if grids:
        grid[: len(grids)] = torch.tensor(grids)
    return grid.to(device)


def rows_of(grids):
    return sum(t * h * w for t, h, w in grids)


def means_of(grids):
    return sum(h * w for _, h, w in grids)


def inputs(grids, D, dtype, device, tail=3):
    """Rows of x with NaN behind the live ones, and `out` full of -7."""
    g = torch.Generator().manual_seed(rows_of(grids) + D)
    x = torch.full((rows_of(grids) + tail, D), NAN)
    x[: rows_of(grids)] = torch.randn(rows_of(grids), D, generator=g)
    out = torch.full((means_of(grids) + tail, D), -7.0)
    return x.to(dtype).to(device), out.to(dtype).to(device)


def naive(x, grids, merge=2):
    """Means patch by patch, in merge-block order, in fp64."""
    means, start = [], 0
    for t, h, w in grids:
        for block_row in range(h // merge):
            for block_column in range(w // merge):
                for i in range(merge):
                    for j in range(merge):
                        patch = (merge * block_row + i) * w + merge * block_column + j
                        frames = [x[start + f * h * w + patch].double() for f in range(t)]
                        means.append(torch.stack(frames).mean(0))
        start += t * h * w
    return torch.stack(means) if means else x[:0].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 40, 300])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_matches_naive(grids, D, dtype, device):
    x, out = inputs(grids, D, dtype, device)
    live = means_of(grids)
    got = temporal_mean(x, table(grids, device), merge=2, out=out)
    assert got is out
    assert (out[live:] == -7).all()
    if not live:
        return
    oracle = naive(x.cpu(), grids).to(device)
    eager = temporal_mean_ref(x, table(grids, device), merge=2)
    assert_as_accurate(out[:live], eager, oracle)
    assert_as_accurate(eager, oracle.to(dtype), oracle)


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_sides_of_a_block(merge, device):
    grids = [(2, 4, 8), (1, 8, 4), (3, 4, 4)]
    x, out = inputs(grids, 24, torch.float32, device)
    temporal_mean(x, table(grids, device), merge=merge, out=out)
    oracle = naive(x.cpu(), grids, merge).to(device)
    assert_as_accurate(out[: means_of(grids)], oracle.float(), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_frame_is_moved_as_it_is(dtype, device):
    grids = [(1, 4, 6), (3, 2, 2), (1, 2, 4)]
    x, out = inputs(grids, 40, dtype, device)
    temporal_mean(x, table(grids, device), merge=2, out=out)
    assert torch.equal(out[:24].double(), naive(x.cpu(), grids)[:24].to(device))
    assert torch.equal(out[28:36].double(), naive(x.cpu(), grids)[28:].to(device))


def test_means_do_not_depend_on_the_batch(device):
    grids = GRIDS["mixed"]
    x, out = inputs(grids, 40, torch.bfloat16, device)
    temporal_mean(x, table(grids, device), merge=2, out=out)
    row = mean = 0
    for t, h, w in grids:
        alone = torch.zeros(h * w, 40, dtype=x.dtype, device=device)
        temporal_mean(x[row : row + t * h * w], table([(t, h, w)], device), merge=2, out=alone)
        assert torch.equal(alone, out[mean : mean + h * w])
        row, mean = row + t * h * w, mean + h * w


def test_what_does_not_fit_is_not_written(device):
    """More items than a buffer holds: the host checks that, and memory behind it stays as it is."""
    grids = [(1, 4, 4), (2, 4, 4)]
    x, _ = inputs(grids, 8, torch.float32, device)
    wide = torch.full((40, 8), -7.0, device=device)
    if device == "cpu":
        temporal_mean(x, table(grids, device), merge=2, out=wide[:20])
        assert (wide[:20] != -7).all()
        assert (wide[20:] == -7).all()


def test_references_give_the_same(device, monkeypatch):
    grids = GRIDS["mixed"]
    x, out = inputs(grids, 40, torch.float32, device)
    kernel = temporal_mean(x, table(grids, device), merge=2, out=out.clone())
    monkeypatch.setattr(home, "use_reference", lambda _: True)
    reference = temporal_mean(x, table(grids, device), merge=2, out=out)
    assert (kernel - reference).abs().max() < 1e-6
    assert torch.equal(kernel[means_of(grids) :], reference[means_of(grids) :])


def test_nothing_to_write(device):
    empty = torch.zeros(0, 8, device=device)
    assert temporal_mean(empty, table([], device), merge=2, out=empty) is empty


def test_operator(device):
    x, out = inputs([(2, 2, 4)], 8, torch.float32, device)
    grid = table([(2, 2, 4)], device)
    expected = temporal_mean(x, grid, merge=2, out=out.clone())
    temporal_mean_op(x, grid, 2, out)
    assert torch.equal(out, expected)
    torch.library.opcheck(
        temporal_mean_op, (x[:16], grid, 2, out), test_utils=("test_schema", "test_faketensor")
    )


def test_cost():
    assert cost(400, 100, 1152, torch.bfloat16).bytes == 500 * 1152 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4).t()}, r"x must be contiguous \[T, D\], got \(4, 8\)"),
        ({"x": torch.zeros(8)}, r"x must be contiguous \[T, D\], got \(8,\)"),
        ({"out": torch.zeros(4, 5)}, r"out must be contiguous \[Q, 8\] torch.float32 on cpu"),
        ({"out": torch.zeros(4, 8).half()}, r"got \(4, 8\) torch.float16"),
        ({"grid": torch.zeros(2, 3)}, "grid must be contiguous int32"),
        ({"merge": 0}, "merge = 0 must be 1 or more"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(4, 8), "grid": table([], "cpu"), "merge": 2}
    arguments |= {"out": torch.zeros(4, 8)} | change
    with pytest.raises(ValueError, match=f"temporal_mean: .*{message}"):
        temporal_mean(arguments.pop("x"), arguments.pop("grid"), **arguments)
