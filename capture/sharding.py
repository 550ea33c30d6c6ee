"""Which rank computes which items: plain Python on item sizes, the same on every rank."""

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence

from .protocol import EncoderItemSpec

# A block of width D does about 24 D^2 FLOPs a patch in GEMMs (MLP width 4 D) and 4 D a query-key
# pair in attention, at about half the rate of a GEMM: 4 patches cost as much as 12 D pairs, which
# is 12,288 to 15,360 for the usual widths of 1,024 to 1,280.
_PAIRS_PER_TOKEN = 14_000


def item_cost(item: EncoderItemSpec) -> float:
    """Relative time of an item: its tokens, and the tokens whose GEMMs cost what its pairs do.

    Meant for towers with full attention in most blocks. Where most blocks have windows, pass
    `lambda item: item.output_tokens`.
    """
    return item.output_tokens + item.attention_pairs / _PAIRS_PER_TOKEN


def assign(costs: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """Items of each rank, ascending: the costliest item first, to the rank with the least so far.

    The largest load is at most 4/3 of the best possible. Items of equal cost are then dealt out
    again in order, which changes no load: equal images make one run of neighbours a rank, whose
    rows move by one copy.

    Raises:
        ValueError: a cost that is negative or not finite, or fewer than 1 rank.
    """
    if ranks < 1:
        raise ValueError(f"assign: ranks={ranks} must be at least 1")
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(
                f"assign: item {index} costs {cost}; costs must return finite numbers from 0 up"
            )
    # (load, items, rank): items without cost go round, and ties to the first rank.
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    alike: dict[float, list[int]] = defaultdict(list)
    owners: dict[float, list[int]] = defaultdict(list)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, count, rank = heap[0]
        heapq.heapreplace(heap, (load + costs[index], count + 1, rank))
        alike[costs[index]].append(index)
        owners[costs[index]].append(rank)
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for cost, indices in alike.items():
        for index, rank in zip(indices, sorted(owners[cost]), strict=True):
            shards[rank].append(index)
    return [tuple(sorted(shard)) for shard in shards]
