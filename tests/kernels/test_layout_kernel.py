import pytest
import torch
from vitgraph.kernels.layout import layout, layout_ref, num_windows

GRIDS = {
    "one": [(1, 2, 2)],
    "image": [(1, 8, 12)],
    "video": [(3, 10, 18)],
    "mixed": [(1, 8, 12), (2, 4, 6), (1, 2, 34), (3, 10, 18), (1, 16, 16), (1, 34, 2)],
    "many": [(1, 2, 4)] * 70,
    "empty": [],
}


def capacities(grids, window, slack):
    return {
        "num_rows": sum(t * h * w for t, h, w in grids) + 4 * slack,
        "num_frames": sum(t for t, _, _ in grids) + slack,
        "num_windows": sum(t * num_windows(h, w, window) for t, h, w in grids) + slack,
    }


def inputs(grids, device, slack):
    table = torch.zeros(len(grids) + slack, 3, dtype=torch.int32)
    if grids:
        table[: len(grids)] = torch.tensor(grids)
    exponent = torch.arange(0, 36, 2, dtype=torch.float32) / 36
    return table.to(device), (10000.0**-exponent).to(device)


@pytest.mark.parametrize("slack", [0, 1, 33])
@pytest.mark.parametrize("window", [0, 4, 8])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_matches_definition(grids, window, slack, device):
    slack = slack if grids else slack + 1
    table, inv_freq = inputs(grids, device, slack)
    sizes = capacities(grids, window, slack)
    got = layout(table, inv_freq, **sizes, merge=2, window=window)
    want = layout_ref(table, inv_freq.double(), **sizes, merge=2, window=window)
    names = ["cu_seqlens", "position", "source", "live", "tickets"]
    for name in [*names, "cu_window_seqlens"] if window else names:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("cos", "sin"):
        # angles up to 34 rad, rounded once in fp32
        error = (getattr(got, name).double() - getattr(want, name)).abs().max()
        assert error < 34 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("slack", [0, 33])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_segments_of_whole_items(grids, slack, device):
    slack = slack if grids else slack + 1
    table, inv_freq = inputs(grids, device, slack)
    sizes = capacities(grids, 0, slack) | {"num_frames": len(grids) + slack}
    got = layout(table, inv_freq, **sizes, merge=1, clips=True)
    want = layout_ref(table, inv_freq, **sizes, merge=1, window=0, clips=True)
    for name in ("cu_seqlens", "position", "source", "live", "tickets"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    sizes = torch.tensor([0] + [t * h * w for t, h, w in grids] + [0] * slack)
    assert got.cu_seqlens.tolist() == sizes.cumsum(0).tolist()
    assert got.live[2] == len(grids)


def test_blocks_of_one_patch_are_row_by_row(device):
    grids = [(1, 5, 7), (2, 3, 4), (1, 1, 1)]
    table, inv_freq = inputs(grids, device, 2)
    sizes = {"num_rows": 70, "num_frames": 6, "num_windows": 0}
    got = layout(table, inv_freq, **sizes, merge=1)
    want = layout_ref(table, inv_freq, **sizes, merge=1, window=0)
    for name in ("cu_seqlens", "position", "source", "live", "tickets"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.position[7:9].tolist() == [[1, 0, 5, 7], [1, 1, 5, 7]]
    assert got.live_tokens.tolist() == got.live_rows.tolist() == [60]


def test_definition_by_hand():
    # 4 x 6 patches, windows of 4: the second window is 4 x 2
    table, inv_freq = torch.tensor([[1, 4, 6]], dtype=torch.int32), torch.ones(1)
    sizes = {"num_rows": 24, "num_frames": 2, "num_windows": 3}
    plain = layout_ref(table, inv_freq, **sizes, merge=2, window=0)
    assert plain.cu_seqlens.tolist() == [0, 24, 24]
    assert plain.position[:6].tolist() == [
        [0, 0, 4, 6], [0, 1, 4, 6], [1, 0, 4, 6], [1, 1, 4, 6], [0, 2, 4, 6], [0, 3, 4, 6],
    ]  # fmt: skip
    assert plain.source.tolist() == list(range(24))
    windows = layout_ref(table, inv_freq, **sizes, merge=2, window=4)
    assert windows.cu_window_seqlens.tolist() == [0, 16, 24, 24]
    assert windows.source.tolist() == [*range(8), *range(12, 20), *range(8, 12), *range(20, 24)]
    assert windows.position[16].tolist() == [0, 4, 4, 6]
    assert windows.live.tolist() == [24, 1, 1, 2, 6]
    assert windows.live_tokens.tolist() == [6]


def test_tails_are_monotone(device):
    table, inv_freq = inputs(GRIDS["mixed"], device, 40)
    sizes = capacities(GRIDS["mixed"], 8, 64)
    plan = layout(table, inv_freq, **sizes, merge=2, window=8)
    rows = plan.live_rows.item()
    for offsets in (plan.cu_seqlens, plan.cu_window_seqlens):
        assert offsets[0] == 0
        assert (offsets.diff() >= 0).all()
        assert (offsets[-64:] == rows).all()


@pytest.mark.parametrize(
    ("grid", "window", "message"),
    [
        (torch.zeros(2, 3), 0, "int32"),
        (torch.zeros(2, 4, dtype=torch.int32), 0, r"\[items, 3\]"),
        (torch.zeros(3, 2, dtype=torch.int32).T, 0, "contiguous"),
        (torch.zeros(2, 3, dtype=torch.int32), 3, "multiple of merge"),
    ],
)
def test_bad_arguments(grid, window, message):
    with pytest.raises(ValueError, match=message):
        layout(grid, torch.ones(1), num_rows=4, num_frames=1, num_windows=1, merge=2, window=window)
