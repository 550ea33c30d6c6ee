"""Token pruning of a tower's outputs: the same whether in a graph, eagerly, or by hand."""

import gc
from fractions import Fraction

import numpy as np
import pytest
import torch
import vitgraph.bench.towers_config as towers
from vitgraph.encoder import VisionEncoder

GRIDS = [(1, 4, 6), (4, 4, 8), (3, 2, 4), (1, 8, 8)]
TOKENS = [6, 32, 6, 16]


@pytest.fixture(scope="module")
def encoder():
    hf = towers.empty_tower(towers.tower_config("tiny-qwen3-vl"), device="cpu", dtype=torch.float32)
    return VisionEncoder.from_hf(towers.boost_(hf, seed=0))


def pixels_of(grids, device="cpu", seed=0):
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, 1536, generator=torch.Generator().manual_seed(seed)).to(device)


def kept_by_hand(pooled, grids, rates):
    """Places kept in each item: the first frame, then what differs most from the frame before."""
    places, start = [], 0
    for (t, h, w), rate in zip(grids, rates, strict=True):
        frame, total = h * w // 4, t * h * w // 4
        rows = pooled[start : start + total].double()
        cosine = torch.nn.functional.cosine_similarity(rows[frame:], rows[:-frame], dim=-1)
        change = torch.cat([torch.full((frame,), 9.0), 1 - cosine.cpu()]).tolist()
        count = max(frame, int(total * (1 - rate)))
        order = sorted(range(total), key=lambda i: (-change[i], i))
        places.append(sorted(order[:count]))
        start += total
    return places


def assert_pruned(out, whole, places):
    starts = [sum(TOKENS[:i]) for i in range(len(TOKENS))]
    rows = torch.tensor([s + i for s, item in zip(starts, places, strict=True) for i in item])
    rows = rows.to(whole.pooler_output.device)
    assert out.tokens_per_item == tuple(map(len, places))
    assert out.kept_index.tolist() == [i for item in places for i in item]
    assert torch.equal(out.pooler_output, whole.pooler_output[rows])
    for got, want in zip(out.deepstack_features, whole.deepstack_features, strict=True):
        assert torch.equal(got, want[rows])
    assert torch.equal(out.last_hidden_state, whole.last_hidden_state)


@pytest.mark.parametrize("rates", [0, 0.0, 0.3, 0.75, [None, 0.5, 0.9, None]])
def test_rates(encoder, rates):
    pixels = pixels_of(GRIDS)
    whole = encoder(pixels, GRIDS)
    each = [rates] * 4 if isinstance(rates, int | float) else [rate or 0.0 for rate in rates]
    out = encoder(pixels, GRIDS, pruning_rate=rates)
    assert_pruned(out, whole, kept_by_hand(whole.pooler_output, GRIDS, each))
    assert whole.kept_index is None
    assert whole.tokens_per_item == tuple(TOKENS)


@pytest.mark.parametrize(
    "rate",
    [Fraction(1, 2), np.float32(0.5), torch.tensor(0.5), torch.full((4,), 0.5)],
    ids=["fraction", "numpy", "tensor", "tensor of each"],
)
def test_one_rate_of_another_type_of_number(encoder, rate):
    pixels = pixels_of(GRIDS)
    want = encoder(pixels, GRIDS, pruning_rate=0.5).tokens_per_item
    assert encoder(pixels, GRIDS, pruning_rate=rate).tokens_per_item == want


@pytest.mark.parametrize(
    "kept", [torch.tensor(True), torch.tensor([1, 255], dtype=torch.uint8)], ids=["bool", "uint8"]
)
def test_masks_beside_rates(encoder, kept):
    pixels = pixels_of(GRIDS)
    whole = encoder(pixels, GRIDS)
    mask = torch.zeros(6, dtype=kept.dtype)
    mask[[1, 4]] = kept
    out = encoder(
        pixels, GRIDS, pruning_rate=[None, 0.5, None, None], keep_mask=[None, None, mask, None]
    )
    places = kept_by_hand(whole.pooler_output, GRIDS, [0, 0.5, 0, 0])
    assert_pruned(out, whole, [places[0], places[1], [1, 4], places[3]])


def test_nothing(encoder):
    out = encoder(torch.zeros(0, 1536), [], pruning_rate=0.5)
    assert out.kept_index.shape == (0,)
    assert out.tokens_per_item == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pruning_rate": 1.0}, ValueError, "1.0"),
        ({"pruning_rate": -0.1}, ValueError, "-0.1"),
        ({"pruning_rate": [0.5]}, ValueError, "pruning_rate: 1 entries for 4 items"),
        ({"keep_mask": [None] * 3}, ValueError, "keep_mask: 3 entries for 4 items"),
        ({"keep_mask": [torch.ones(5, dtype=torch.bool)] + [None] * 3}, ValueError, r"pass \[6\]"),
        ({"keep_mask": [torch.ones(6)] + [None] * 3}, TypeError, "float32; pass a tensor of bool"),
        ({"keep_mask": [[True] * 6, None, None, None]}, TypeError, r"keep_mask\[0\] is list; pass"),
        (
            {"keep_mask": [torch.ones(6, dtype=torch.bool)] + [None] * 3, "pruning_rate": 0.5},
            ValueError,
            "are both given",
        ),
    ],
)
def test_refusals(encoder, options, error, message):
    with pytest.raises(error, match=message):
        encoder(pixels_of(GRIDS), GRIDS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen2.5-vl-7b"])
def test_in_graphs(name):
    tower = towers.build_tower(name, device="cuda", dtype=torch.bfloat16)
    encoder = VisionEncoder.from_hf(tower)
    width = encoder.spec.patch_values
    grids = [(1, 16, 16), (6, 12, 14), (1, 4, 8), (3, 8, 8), (9, 4, 4)]
    torch.manual_seed(0)
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), width, device="cuda").bfloat16()
    mask = torch.rand(3 * 16) < 0.5
    calls = [
        {},
        {"pruning_rate": 0.5},
        {"pruning_rate": [None, 0.9, None, None, 0.2], "keep_mask": [None] * 3 + [mask, None]},
        {"pruning_rate": 0.99},
    ]
    encoder.capture({"token_budgets": [1024]}, pruning=True)
    manager = encoder.graphs
    (graph,) = manager.ladder.rungs[manager.rungs[0]].graphs
    for options in [*calls, *calls[::-1]]:
        for buffer in graph.outputs.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else -7)
        replayed = encoder(pixels, grids, **options)
        whole = encoder(pixels, grids)
        assert manager.stats()["misses"] == 0
        if options:
            starts, row = [], 0
            for t, h, w in grids:
                starts.append(row)
                row += t * h * w // 4
            counts = replayed.tokens_per_item
            owners = torch.repeat_interleave(torch.tensor(starts), torch.tensor(counts)).cuda()
            rows = owners + replayed.kept_index
            assert torch.equal(replayed.pooler_output, whole.pooler_output[rows])
            want = kept_by_rate_or_mask(whole.pooler_output, grids, options, mask)
            assert replayed.kept_index.tolist() == want
    encoder.release_graphs()
    encoder.capture({"token_budgets": [1024]})
    unrecorded = encoder(pixels, grids, pruning_rate=0.5)
    assert encoder.graphs.stats()["eager_reasons"] == {"pruning": len(grids)}
    assert unrecorded.tokens_per_item == encoder(pixels, grids, pruning_rate=0.5).tokens_per_item
    encoder.release_graphs()
    del encoder, tower
    gc.collect()
    torch.cuda.empty_cache()


def kept_by_rate_or_mask(pooled, grids, options, mask):
    rates = options["pruning_rate"]
    each = [rates] * len(grids) if isinstance(rates, float) else [rate or 0.0 for rate in rates]
    places = kept_by_hand(pooled, grids, each)
    if "keep_mask" in options:
        places[3] = mask.nonzero().flatten().tolist()
    return [i for item in places for i in item]
