import numpy as np
import pytest
import torch
from vitgraph.capture import BufferSpec, EncoderItemSpec, rows, staging

SPECS = {
    "rows": BufferSpec((8, 2), torch.float32, "patches"),
    "grid": BufferSpec((4, 3), torch.int32, "items"),
}
ITEMS = [EncoderItemSpec(8, 2, 2), EncoderItemSpec(4, 1), EncoderItemSpec(12, 3, 3)]
OFFSETS = rows.RowOffsets.of({"patches", "tokens", "items", "frames"}, ITEMS)


def test_buffers_are_zero_and_slices_share_their_memory():
    buffers = staging.allocate(SPECS, torch.device("cpu"))
    assert all(not buffer.any() for buffer in buffers.values())
    half = {"rows": BufferSpec((4, 2), torch.float32, "patches"), "grid": SPECS["grid"]}
    slices = staging.leading_slices(buffers, half)
    assert slices["rows"].shape == (4, 2)
    assert slices["rows"].data_ptr() == buffers["rows"].data_ptr()


def test_buffers_allocated_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        buffers = staging.allocate(SPECS, torch.device("cpu"))
        slices = staging.leading_slices(buffers, SPECS)
    staging.stage_table(slices["grid"], [(1, 2, 2)])
    assert slices["grid"].sum() == 5


@pytest.mark.parametrize(
    "spec",
    [
        BufferSpec((9, 2), torch.float32, "patches"),
        BufferSpec((4, 3), torch.float32, "patches"),
        BufferSpec((4, 2), torch.float64, "patches"),
    ],
    ids=["rows", "width", "dtype"],
)
def test_refuses_slices_that_are_none(spec):
    buffers = staging.allocate(SPECS, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rows is .*only the leading axis"):
        staging.leading_slices(buffers, {**SPECS, "rows": spec})


def test_refuses_other_names():
    buffers = staging.allocate(SPECS, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\['rows'\], the largest rung \['grid', 'rows'\]"):
        staging.leading_slices(buffers, {"rows": SPECS["rows"]})


@pytest.mark.parametrize(
    "grid",
    [
        torch.tensor([[1, 4, 6], [2, 2, 2]]),
        torch.tensor([[1, 4, 6], [2, 2, 2]], dtype=torch.int32),
        [(1, 4, 6), (2, 2, 2)],
        [[1, 4, 6], [2, 2, 2]],
        [(True, 4, 6), (np.int64(2), 2, 2)],
        np.array([[1, 4, 6], [2, 2, 2]]),
    ],
)
def test_grid_rows(grid):
    rows_found = staging.grid_rows(grid)
    assert rows_found == ((1, 4, 6), (2, 2, 2))
    assert {type(size) for row in rows_found for size in row} == {int}
    assert staging.grid_rows(rows_found) is rows_found


@pytest.mark.parametrize("grid", [torch.empty(0, 3), torch.empty(0, dtype=torch.int64), []])
def test_grid_rows_of_nothing(grid):
    assert staging.grid_rows(grid) == ()


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (torch.tensor([1, 4, 6]), ValueError, r"grid_thw is \[3\]"),
        (torch.ones(2, 2, dtype=torch.int64), ValueError, r"grid_thw is \[2, 2\]"),
        ([(1, 4)], ValueError, r"grid_thw\[0\]=\(1, 4\) is not"),
        ([(1, 4, 4), (1, 0, 4)], ValueError, r"grid_thw\[1\]=\(1, 0, 4\) must be at least 1"),
        (torch.ones(1, 3), TypeError, "whole numbers"),
        ((1, 4, 6), ValueError, r"grid_thw\[0\]=1 is not \(t, h, w\)"),
        ([(1, 2.5, 4)], TypeError, "whole numbers"),
        ([(1, 4.0, 4)], TypeError, "whole numbers"),
        ([(1, 4, 4), (-1, 4, 4)], ValueError, r"grid_thw\[1\]=\(-1, 4, 4\) must be at least 1"),
    ],
)
def test_refuses_grid(grid, error, message):
    with pytest.raises(error, match=message):
        staging.grid_rows(grid)


def test_runs():
    assert rows.runs_of([]) == []
    assert rows.runs_of([0, 1, 2]) == [(0, 3)]
    assert rows.runs_of([0, 2, 3, 7]) == [(0, 1), (2, 4), (7, 8)]


def test_offsets_of_every_kind():
    assert OFFSETS.offsets["patches"] == [0, 8, 12, 24]
    assert OFFSETS.offsets["tokens"] == [0, 2, 3, 6]
    assert OFFSETS.offsets["items"] == [0, 1, 2, 3]
    assert OFFSETS.offsets["frames"] == [0, 2, 3, 6]
    assert OFFSETS.span("patches", (1, 3)) == (8, 16)


def test_grid_table_is_written_whole():
    table = torch.full((4, 3), 7, dtype=torch.int32)
    staging.stage_table(table, [(1, 2, 4), (3, 2, 2)])
    assert table.tolist() == [[1, 2, 4], [3, 2, 2], [0, 0, 0], [0, 0, 0]]
    staging.stage_table(table, [])
    assert not table.any()


@pytest.mark.parametrize(
    ("shape", "rows", "expected"),
    [
        ((3, 2), [(1, 2), (3, 4)], [[1, 2], [3, 4], [0, 0]]),
        ((4,), [5, 6], [5, 6, 0, 0]),
        ((4,), torch.tensor([5, 6], dtype=torch.uint8), [5, 6, 0, 0]),
        ((2, 1), [], [[0], [0]]),
        ((2, 1), torch.empty(0, 1), [[0], [0]]),
    ],
    ids=["rows", "numbers", "tensor", "nothing", "empty tensor"],
)
def test_tables_are_whole_and_leave_their_destination_alone(shape, rows, expected):
    destination = torch.full(shape, 7, dtype=torch.int32)
    table = staging.table_for(destination, rows)
    assert table.tolist() == expected
    assert table.dtype == torch.int32
    assert (destination == 7).all()


@pytest.mark.parametrize("at_once", [True, False])
def test_copies_of_views(at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(staging, "_MANY_BYTES", 0)
    static = {"a": torch.randn(4, 3), "b": torch.randn(4, 2).half(), "c": torch.arange(4)}
    views = {name: buffer[:2] for name, buffer in static.items()}
    before = {name: view.clone() for name, view in views.items()}
    wide = {name: torch.zeros(2, 8, dtype=view.dtype) for name, view in views.items()}
    # strided: every other column of something wider
    out = {"c": wide["c"][:, 0], "a": wide["a"][:, :6:2], "b": wide["b"][:, :4:2]}
    fresh, written = staging.copy_views(views), staging.copy_views(views, out)
    for name in views:
        assert torch.equal(views[name], before[name])
        assert written[name] is out[name]
    for buffer in static.values():
        buffer.zero_()
    for copies in (fresh, written):
        assert list(copies) == list(views)
        assert all(torch.equal(copies[name], before[name]) for name in views)
    assert staging.copy_views({}) == staging.copy_views({}, {}) == {}


def test_pixels_are_packed_cast_and_later_rows_left():
    source = torch.arange(48, dtype=torch.float64).view(24, 2)
    buffer = torch.full((32, 2), -1.0)
    staging.stage_pixels(staging.pixel_copies(buffer, OFFSETS, [(0, 1), (2, 3)]), source)
    assert torch.equal(buffer[:8], source[:8].float())
    assert torch.equal(buffer[8:20], source[12:].float())
    assert (buffer[20:] == -1).all()
    gathered = staging.gather_pixels(source, OFFSETS, [(0, 1), (2, 3)])
    assert torch.equal(gathered.float(), buffer[:20])
    # all rows are taken as they are, and from whatever mode they are written in
    with torch.inference_mode():
        copies = staging.pixel_copies(buffer, OFFSETS, [(0, 3)])
    assert [rows for _, rows in copies] == [None]
    staging.stage_pixels(copies, source)
    assert torch.equal(buffer[:24], source.float())
    assert not copies[0][0].is_inference()


def test_scattered_rows_go_home():
    specs = {
        "patch": BufferSpec((32, 2), torch.float32, "patches"),
        "token": BufferSpec((8, 1), torch.float32, "tokens"),
    }
    shapes = staging.result_rows(specs, specs, OFFSETS)
    assert shapes == {"patch": (24, 2), "token": (6, 1)}
    results = {name: torch.empty(shape) for name, shape in shapes.items()}
    whole = {"patch": torch.randn(24, 2), "token": torch.randn(6, 1)}
    for runs in ([(1, 2)], [(0, 1), (2, 3)]):
        packed = {
            name: torch.cat(
                [
                    whole[name][first : first + count]
                    for first, count in (OFFSETS.span(spec.rows, run) for run in runs)
                ]
            )
            for name, spec in specs.items()
        }
        staging.scatter_rows(results, packed, specs, OFFSETS, runs)
    assert all(torch.equal(results[name], whole[name]) for name in specs)
