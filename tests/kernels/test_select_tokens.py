import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitgraph.kernels.gather_rows import gather_rows
from vitgraph.kernels.select_tokens import (
    Selection,
    config,
    select_tokens,
    select_tokens_op,
    select_tokens_ref,
)
from vitgraph.kernels.token_pruning import retained_tokens, token_scores

NAN, INF = float("nan"), float("inf")
ALL = -1  # a negative keep


def sizes_to_grid(sizes, device, slack=0):
    """Items of the given numbers of tokens: one frame, one row, merge size 1."""
    rows = [(1, 1, n) if n else (0, 0, 0) for n in sizes] + [(0, 0, 0)] * slack
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)


def naive(score, sizes, keep, mask=None):
    """Kept rows, their places in the items, and counts, by sorting Python tuples."""
    values = score.tolist()
    chosen = mask.tolist() if mask is not None else [1] * len(values)
    rows, places, counts, first = [], [], [], 0
    for n, k in zip(sizes, keep, strict=True):

        def rank(p, first=first):
            value = values[first + p]
            return (not math.isnan(value), 0.0 if math.isnan(value) else -value, p)

        if k < 0:
            kept = [p for p in range(n) if chosen[first + p]]
        else:
            kept = sorted(sorted(range(n), key=rank)[:k])
        rows += [first + p for p in kept]
        places += kept
        counts.append(len(kept))
        first += n
    return rows, places, counts


def poisoned(M, items, device):
    return Selection(
        *(torch.full((n,), -7, dtype=torch.int32, device=device) for n in (M, M, items, 1))
    )


def check(score, sizes, keep, mask, device, slack=0):
    M = score.numel()
    out = poisoned(M, len(sizes) + slack, device)
    grid = sizes_to_grid(sizes, device, slack)
    counts = torch.tensor([*keep, *[0] * slack], dtype=torch.int32, device=device)
    mask = None if mask is None else mask.to(device)
    assert select_tokens(score.to(device), grid, counts, mask, merge=1, out=out) is out
    rows, places, per_item = naive(score, sizes, keep, mask)
    tail = [0] * (M - len(rows))
    assert out.kept.tolist() == [len(rows)]
    assert out.kept_per_item.tolist() == [*per_item, *[0] * slack]
    assert out.source.tolist() == rows + tail
    assert out.index_in_item.tolist() == places + tail
    want = select_tokens_ref(score.to(device), grid, counts, mask, merge=1)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def random_scores(M, seed=0):
    return torch.rand(M, generator=torch.Generator().manual_seed(seed)) * 2


CASES = {
    "one": ([1], [1]),
    "half": ([10], [5]),
    "nothing": ([10, 4], [0, 0]),
    "everything": ([10, 4], [10, ALL]),
    "too-many": ([10, 4], [99, 5]),
    "mixed": ([6, 0, 1, 17, 3, 0, 30], [4, 0, 1, 0, ALL, 3, 29]),
    "loops": ([700, 1300, 5], [300, 1299, 2]),
    "many": ([3] * 70, [1, 2, 3, ALL, 0] * 14),
}


@pytest.mark.parametrize("tail", [0, 5, 600])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_sorting(case, tail, device):
    sizes, keep = case
    check(random_scores(sum(sizes) + tail), sizes, keep, None, device, slack=tail % 3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_masks(case, device):
    sizes, keep = case
    M = sum(sizes) + 3
    mask = torch.randint(0, 3, (M,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    check(random_scores(M), sizes, keep, mask, device, slack=2)
    check(random_scores(M), sizes, [ALL] * len(sizes), mask, device)


def test_loops_over_long_items(device):
    """More tokens than the largest block, and more items than are looked at once."""
    sizes = [4500, 1, 9000, *[2] * 66]
    keep = [2000, 1, 7000, *[1] * 66]
    score = (random_scores(sum(sizes)) * 500).round() / 500  # about nine ties a value
    assert config(score.numel()).BLOCK == 4096
    check(score, sizes, keep, None, device)


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 11, 12])
def test_ties_go_to_the_lower_row(keep, device):
    check(torch.ones(24), [12, 12], [keep, 12 - keep], None, device)
    two = torch.tensor([0.5, 1.5] * 12)
    check(two, [12, 12], [keep, 12 - keep], None, device)


def test_ties_across_blocks(device):
    score = torch.ones(1400)
    score[600] = 2
    check(score, [1400], [900], None, device)


@pytest.mark.parametrize("keep", range(9))
def test_unusual_scores(keep, device):
    score = torch.tensor([0.0, -0.0, NAN, INF, -INF, -1.0, 1e-45, -NAN, 4.0])
    check(score, [9], [keep], None, device)
    check(torch.full((9,), NAN), [9], [keep], None, device)
    check(torch.tensor([0.0, -0.0] * 4 + [0.0]), [9], [keep], None, device)


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    total = sum(sizes) + draw(st.integers(0, 9))
    some = st.sampled_from([0.0, -0.0, 0.25, 1.0, 4.0, NAN, -1.0, INF])
    any_float = st.floats(width=32)
    score = draw(st.lists(some | any_float, min_size=total, max_size=total))
    keep = [draw(st.integers(-1, n + 1)) for n in sizes]
    mask = draw(st.none() | st.lists(st.integers(0, 2), min_size=total, max_size=total))
    return score, sizes, keep, mask


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=batches())
def test_any_batch_matches_sorting(batch, device):
    score, sizes, keep, mask = batch
    mask = None if mask is None else torch.tensor(mask, dtype=torch.uint8)
    check(torch.tensor(score), sizes, keep, mask, device)


def test_merge_size(device):
    grid = torch.tensor([[2, 4, 6], [1, 8, 4], [0, 0, 0]], dtype=torch.int32, device=device)
    keep = torch.tensor([7, ALL, 0], dtype=torch.int32, device=device)
    chosen = select_tokens(random_scores(24).to(device), grid, keep, merge=2)
    assert chosen.kept_per_item.tolist() == [7, 8, 0]
    assert chosen.source.tolist()[7:15] == list(range(12, 20))


def test_first_frame_survives_a_nan(device):
    """Keeping one frame of a video keeps the first, whatever the tokens hold."""
    tokens = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).to(device)
    tokens[5] = NAN
    tokens[9] = 0
    grid = torch.tensor([[3, 4, 4]], dtype=torch.int32, device=device)
    score = token_scores(tokens, grid, merge=2)
    for rate, extra in ((0.9, []), (0.5, [5, 9])):
        keep = torch.tensor([retained_tokens(4, 3, rate)], dtype=torch.int32, device=device)
        chosen = select_tokens(score, grid, keep, merge=2)
        assert chosen.kept.item() == keep.item()
        assert chosen.source.tolist()[:4] == [0, 1, 2, 3]
        assert set(chosen.source.tolist()) >= set(extra)


def test_a_grid_past_the_rows_stays_inside(device):
    """A table that breaks its promise must not write outside the buffers."""
    room = torch.full((64,), -7, dtype=torch.int32, device=device)
    out = Selection(room[:8], room[16:24], room[32:34], room[48:49])
    grid = sizes_to_grid([6, 90], device)
    keep = torch.tensor([3, 90], dtype=torch.int32, device=device)
    score = random_scores(90).to(device)[:8]
    select_tokens(score, grid, keep, merge=1, out=out)
    assert out.kept_per_item.tolist() == [3, 2]
    assert out.source[3:].tolist() == [6, 7, 0, 0, 0]
    assert (room == -7).sum() == 64 - 8 - 8 - 2 - 1


@pytest.mark.parametrize(("M", "items"), [(0, 0), (0, 2), (5, 0), (5, 2)])
def test_nothing_live(M, items, device):
    check(torch.ones(M), [0] * items, [0] * items, None, device)
    check(torch.ones(M), [0] * items, [ALL] * items, torch.ones(M, dtype=torch.uint8), device)


def test_launch_parameters():
    for M in (0, 1, 700, 4096, 100_000):
        launch = config(M)
        assert 512 <= launch.BLOCK <= 4096
        assert launch.num_warps * 256 == launch.BLOCK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(8, dtype=torch.float64)}, r"score must .*float32 \[8\]"),
        ({"score": torch.zeros(16)[::2]}, r"score must be contiguous .* strides \(2,\)"),
        ({"grid": torch.zeros(2, 3)}, "grid must be contiguous int32"),
        ({"keep": torch.zeros(3, dtype=torch.int32)}, r"keep must .* \[2\] on cpu, got .* \(3,\)"),
        ({"keep": torch.zeros(2, dtype=torch.int64)}, "keep must .*int32"),
        ({"mask": torch.zeros(8, dtype=torch.bool)}, "mask must .*uint8 .* got torch.bool"),
        ({"mask": torch.zeros(7, dtype=torch.uint8)}, r"mask must .* \[8\]"),
        ({"out": poisoned(7, 2, "cpu")}, r"out.source must .* \[8\]"),
        ({"out": poisoned(8, 3, "cpu")}, r"out.kept_per_item must .* \[2\]"),
        ({"merge": -1}, "merge = -1"),
        ({"score": torch.zeros(1).expand(1 << 21)}, "2097152 scores exceed the limit of 2097151"),
    ],
)
def test_bad_arguments(change, message):
    args = {
        "score": torch.zeros(8),
        "grid": torch.zeros(2, 3, dtype=torch.int32),
        "keep": torch.zeros(2, dtype=torch.int32),
        "merge": 2,
    } | change
    with pytest.raises(ValueError, match=f"select_tokens: .*{message}"):
        select_tokens(**args)


@pytest.mark.parametrize("check_name", ["test_schema", "test_faketensor"])
def test_opcheck(check_name, device):
    keep = torch.tensor([2, ALL], dtype=torch.int32, device=device)
    mask = torch.ones(8, dtype=torch.uint8, device=device)
    score, grid = random_scores(8).to(device), sizes_to_grid([5, 3], device)
    for args in ((score, grid, keep, None, 1), (score, grid, keep, mask, 1)):
        torch.library.opcheck(select_tokens_op, args, test_utils=check_name)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 513, 16384, 70_000])
def test_on_gpu(M, device):
    sizes = [M // 2, 0, M // 4, 1 if M > 1 else 0, M // 8]
    score = (random_scores(M) * 1000).round() / 1000
    mask = (random_scores(M, 1) > 1).to(torch.uint8)
    check(score, sizes, [n // 3 for n in sizes], None, device, slack=59)
    check(score, sizes, [ALL, 0, M // 5, ALL, M // 9], mask, device)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["rate", "mask"])
def test_replay_with_another_layout(masked, device):
    """Score, selection and gather in one graph serve other grids, counts, masks and tokens."""
    M, C, items = 4096, 256, 12
    tokens = torch.zeros(M, C, dtype=torch.bfloat16, device=device)
    grid = torch.zeros(items, 3, dtype=torch.int32, device=device)
    keep = torch.zeros(items, dtype=torch.int32, device=device)
    mask = torch.zeros(M, dtype=torch.uint8, device=device) if masked else None
    out = torch.empty_like(tokens)
    static = poisoned(M, items, device)

    def run(chosen, out):
        score = token_scores(tokens, grid, merge=2)
        select_tokens(score, grid, keep, mask, merge=2, out=chosen)
        gather_rows(tokens, chosen.source, chosen.kept, out)

    run(static, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, out)
    layouts = [
        [(16, 32, 32)],
        [(1, 4, 4), (3, 20, 30), (0, 0, 0), (2, 8, 2)],
        [],
        [(1, 2, 2)] * 12,
        [(7, 16, 16), (1, 32, 32), (4, 24, 24)],
    ]
    for seed, grids in enumerate(layouts):
        g = torch.Generator().manual_seed(seed)
        # few distinct values: some tokens equal their predecessors, and scores tie
        tokens.copy_(torch.randint(-1, 2, (M, 1), generator=g) * torch.randn(C, generator=g))
        grid.zero_()
        keep.zero_()
        for i, (t, h, w) in enumerate(grids):
            grid[i] = torch.tensor((t, h, w), dtype=torch.int32)
            keep[i] = ALL if masked and i % 2 else retained_tokens(h * w // 4, t, 0.25 * (i % 4))
        if mask is not None:
            mask.copy_(torch.randint(0, 2, (M,), generator=g))
        out.fill_(NAN)
        eager, eager_out = poisoned(M, items, device), torch.full_like(out, NAN)
        run(eager, eager_out)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(static, eager, strict=True))
        assert torch.equal(out.view(torch.int16), eager_out.view(torch.int16))
        live = int(static.kept)
        want = select_tokens_ref(token_scores(tokens, grid, merge=2), grid, keep, mask, merge=2)
        assert all(torch.equal(a, b) for a, b in zip(static, want, strict=True))
        assert torch.equal(out[:live], tokens[want.source[:live].long()])
        assert out[live:].isnan().all()
