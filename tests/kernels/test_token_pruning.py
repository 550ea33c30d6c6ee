import math

import pytest
import torch
from vitgraph.kernels import gather_rows, select_tokens, token_pruning
from vitgraph.kernels.testing import rel_rms
from vitgraph.kernels.token_pruning import (
    config,
    retained_tokens,
    token_scores,
    token_scores_op,
    token_scores_ref,
)

NAN = float("nan")
GRIDS = {  # in patches, merge size 2
    "image": [(1, 4, 6)],
    "video": [(5, 4, 6)],
    "mixed": [(1, 4, 4), (3, 2, 6), (0, 0, 0), (2, 8, 2), (1, 2, 2), (4, 2, 2)],
    "many": [(1 + i % 3, 2, 2 + 2 * (i % 2)) for i in range(140)],
    "empty": [],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(grids, device, slack=2):
    grid = torch.zeros(len(grids) + slack, 3, dtype=torch.int32)
    if grids:
        grid[: len(grids)] = torch.tensor(grids)
    return grid.to(device)


def num_tokens(grids, merge=2):
    return sum(t * h * w // merge**2 for t, h, w in grids)


def embeddings(rows, C, dtype, device, tail=3):
    """Rows in a wider buffer whose other elements are NaN, and NaN rows at the end."""
    g = torch.Generator().manual_seed(rows * C)
    wide = torch.full((rows + tail, C + 8), NAN, dtype=dtype)
    wide[:rows, :C] = torch.randn(rows, C, generator=g) + 0.5
    return wide.to(device)[:, :C]


def naive(tokens, grids, merge=2):
    """Scores in Python floats; None for rows that no item holds."""
    rows = tokens.double().tolist()
    scores = []
    for t, h, w in grids:
        frame = h * w // merge**2
        start = len(scores)
        for p in range(t * frame):
            if p < frame:
                scores.append(4.0)
                continue
            x, y = rows[start + p], rows[start + p - frame]
            norm = math.sqrt(math.fsum(v * v for v in x)) * math.sqrt(math.fsum(v * v for v in y))
            dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
            cos = dot / norm if norm else 0.0
            scores.append(3.0 if math.isnan(cos) else min(max(1 - cos, 0.0), 2.0))
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 40, 1024, 1300])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_matches_naive(grids, C, dtype, device):
    if C > 100 and len(grids) > 6:
        grids = grids[:9]
    live = num_tokens(grids)
    tokens = embeddings(live, C, dtype, device)
    score = token_scores(tokens, table(grids, device), merge=2)
    assert score.shape == (live + 3,)
    assert (score[live:] == -1).all()
    want = torch.tensor(naive(tokens[:live], grids), device=device)
    # a cosine of about 0.2 is the sum of C rounded products
    assert ((score[:live] - want).abs() < 1e-6).all()
    assert torch.equal(score[:live] == 4, want == 4)


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_reference_is_the_definition(merge, device):
    grids = [(2, 4, 8), (1, 4, 4), (0, 0, 0), (3, 8, 4)]
    live = num_tokens(grids, merge)
    tokens = embeddings(live, 24, torch.float64, "cpu")
    oracle = token_scores_ref(tokens, table(grids, "cpu"), merge=merge)
    assert oracle.dtype == torch.float64
    want = torch.tensor(naive(tokens[:live], grids, merge), dtype=torch.float64)
    assert (oracle[:live] - want).abs().max() < 1e-14
    assert (oracle[live:] == -1).all()
    narrow = tokens.float().to(device)
    score = token_scores(narrow, table(grids, device), merge=merge)
    eager = token_scores_ref(narrow, table(grids, device), merge=merge)
    assert eager.dtype == torch.float32
    for got in (score, eager):
        assert rel_rms(got[:live].cpu(), oracle[:live]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_zero_and_nan_rows(dtype, device):
    grids = [(3, 2, 8)]
    tokens = embeddings(12, 1100, dtype, device, tail=0)
    tokens[4] = tokens[0]  # equal to its predecessor
    tokens[5] = -tokens[1]
    tokens[6] = 0  # zero after a value; row 10 is a value after zero
    tokens[7, 3] = NAN  # and row 11 follows it
    tokens[8] = tokens[4]
    for scores in (token_scores, token_scores_ref):
        got = scores(tokens, table(grids, device), merge=2).tolist()
        assert got[:9] == [4, 4, 4, 4, 0, 2, 1, 3, 0]
        assert got[10:] == [1, 3]
        assert 0 < got[9] < 2


def test_does_not_overflow(device):
    """Norms whose product is far outside fp32."""
    tokens = torch.full((4, 64), 1e17, device=device)
    tokens[2:] = 1e-18
    score = token_scores(tokens, table([(4, 2, 2)], device), merge=2)
    assert score[0] == 4
    assert (score[1:] < 1e-6).all()


def test_scores_do_not_depend_on_the_batch(device):
    grids = GRIDS["mixed"]
    tokens = embeddings(num_tokens(grids), 1300, torch.bfloat16, device)
    whole = token_scores(tokens, table(grids, device), merge=2)
    first = 0
    for grid in grids:
        n = num_tokens([grid])
        alone = token_scores(tokens[first : first + n], table([grid], device), merge=2)
        assert torch.equal(alone, whole[first : first + n])
        first += n


def test_references_give_the_same_rows(device, monkeypatch):
    """The way of a CPU tensor without the interpreter, through all three operators."""
    grids = [(1, 4, 4), (4, 4, 6), (2, 2, 4)]
    tokens = embeddings(num_tokens(grids), 40, torch.float32, device)
    grid = table(grids, device)
    keep = torch.tensor([-1, retained_tokens(6, 4, 0.5), 3, 0, 0], dtype=torch.int32, device=device)

    def prune():
        score = token_scores(tokens, grid, merge=2)
        chosen = select_tokens.select_tokens(score, grid, keep, merge=2)
        out = torch.full_like(tokens, -7)
        return *chosen, gather_rows.gather_rows(tokens, chosen.source, chosen.kept, out)

    kernels = prune()
    for module in (token_pruning, select_tokens, gather_rows):
        monkeypatch.setattr(module, "use_reference", lambda _: True)
    for kernel, reference in zip(kernels, prune(), strict=True):
        assert torch.equal(kernel, reference)
    assert kernels[3].tolist() == [4 + 12 + 3]


def test_no_rows(device):
    tokens = torch.zeros(0, 8, device=device)
    assert token_scores(tokens, table([], device), merge=2).shape == (0,)


def test_no_items(device):
    score = token_scores(torch.zeros(3, 8, device=device), table([], device, 0), merge=2)
    assert (score == -1).all()


def test_launch_parameters():
    for dtype in DTYPES:
        for C in (1, 24, 3584, 5120):
            launch = config(C, dtype)
            assert launch.BLOCK_C & (launch.BLOCK_C - 1) == 0
            assert launch.BLOCK_C * dtype.itemsize <= 2048


@pytest.mark.parametrize(
    ("tokens_per_frame", "frames", "rate", "want"),
    [
        (4, 2, 0.0, 8),
        (4, 2, 0.9, 4),  # never less than the first frame
        (5, 2, 0.25, 7),  # rounded down
        (16, 1, 0.99, 16),
        (100, 4, 0.75, 100),
        (0, 3, 0.5, 0),
        (7, 0, 0.5, 0),
    ],
)
def test_retained_tokens(tokens_per_frame, frames, rate, want):
    assert retained_tokens(tokens_per_frame, frames, rate) == want


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 2, NAN, float("inf")])
def test_retained_tokens_refuses_a_rate(rate):
    with pytest.raises(ValueError, match=rf"rate = {rate} .* must lie in \[0, 1\)"):
        retained_tokens(4, 2, rate)


def test_retained_tokens_refuses_a_size():
    with pytest.raises(ValueError, match="frames = -1 must not be negative"):
        retained_tokens(4, -1, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(8)}, r"tokens must be \[M, C\] .* shape \(8,\)"),
        ({"tokens": torch.zeros(8, 4).T}, r"adjacent elements .* strides \(1, 4\)"),
        ({"tokens": torch.zeros(4, 8, dtype=torch.int32)}, "tokens are torch.int32; cast to"),
        ({"grid": torch.zeros(2, 3)}, r"grid must be contiguous int32 \[items, 3\]"),
        ({"grid": torch.zeros(2, 4, dtype=torch.int32)}, r"got torch.int32 \(2, 4\)"),
        ({"grid": torch.zeros(3, 2, dtype=torch.int32).T}, r"strides \(1, 2\)"),
        ({"merge": 0}, "merge = 0 must be 1 or more"),
    ],
)
def test_bad_arguments(change, message):
    args = {"tokens": torch.zeros(4, 8), "grid": table([], "cpu"), "merge": 2} | change
    with pytest.raises(ValueError, match=f"token_scores: .*{message}"):
        token_scores(args["tokens"], args["grid"], merge=args["merge"])


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = (embeddings(4, 8, torch.bfloat16, device), table([(1, 4, 4)], device), 2)
    torch.library.opcheck(token_scores_op, args, test_utils=check)


@pytest.mark.gpu
@pytest.mark.parametrize("C", [2048, 3584, 4096])
def test_on_gpu(C, device):
    grids = [(1, 48, 64), (8, 32, 46), (1, 2, 2), (20, 20, 30)]
    tokens = embeddings(num_tokens(grids), C, torch.bfloat16, device, tail=1000)
    score = token_scores(tokens, table(grids, device, 60), merge=2)
    oracle = token_scores_ref(tokens.double(), table(grids, device), merge=2)
    # three fp32 sums of C products, each a tree over at most a few thousand
    assert (score - oracle).abs().max() < 1e-6
