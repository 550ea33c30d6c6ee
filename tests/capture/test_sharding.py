import random

import pytest
from vitgraph.capture import EncoderItemSpec
from vitgraph.capture.sharding import assign, item_cost


def loads(costs, shards):
    return [sum(costs[index] for index in shard) for shard in shards]


@pytest.mark.parametrize("ranks_count", [1, 2, 3, 8])
def test_assignment_is_complete_ascending_and_balanced(ranks_count):
    rng = random.Random(ranks_count)
    for items in (0, 1, 2, 5, 30, 200):
        costs = [rng.choice((1.0, 4.0, rng.uniform(1, 100))) for _ in range(items)]
        shards = assign(costs, ranks_count)
        assert sorted(sum(shards, ())) == list(range(items))
        assert all(list(shard) == sorted(shard) for shard in shards)
        # what largest-first guarantees: all ranks are within one item of each other
        spread = loads(costs, shards)
        assert max(spread) - min(spread) <= max(costs, default=0) + 1e-9
        best = max(sum(costs) / ranks_count, max(costs, default=0))
        assert max(spread) <= (sum(costs) / ranks_count) + max(costs, default=0)
        assert items < 200 or max(spread) < 1.05 * best


def test_largest_first_beats_dealing_in_order():
    costs = [3.0, 3.0, 2.0, 2.0, 2.0]
    assert max(loads(costs, assign(costs, 2))) == 7.0
    costs = [1.0, 1.0, 1.0, 3.0]
    assert assign(costs, 2) == [(3,), (0, 1, 2)]


def test_equal_items_are_neighbours():
    assert assign([1.0] * 10, 4) == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    assert assign([5.0, 1.0, 5.0, 1.0], 2) == [(0, 1), (2, 3)]
    assert assign([0.0] * 4, 2) == [(0, 1), (2, 3)]


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_refuses_costs(cost):
    with pytest.raises(ValueError, match=r"item 1 costs .*finite numbers from 0 up"):
        assign([1.0, cost], 2)
    with pytest.raises(ValueError, match=r"ranks=0 must be at least 1"):
        assign([], 0)


def test_cost_counts_attention():
    frames = [EncoderItemSpec(4096, 1024, 16, 0, 16 * 256**2)] * 2
    image = EncoderItemSpec(4096, 1024, 1, 0, 4096**2)
    assert item_cost(image) > 2 * item_cost(frames[0])
    assert item_cost(EncoderItemSpec(4096, 1024)) == 1024
