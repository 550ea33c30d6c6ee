"""How much device memory a ladder takes: sampled before capture, and kept under a cap."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv
from statistics import mean, median

import torch

from .captured import capture_ladder, variants_of
from .graph import Recorder
from .ladder import MemoryModel
from .protocol import RungLimits, SupportsEncoderCudaGraph


@dataclass(frozen=True)
class MemoryProfile:
    """Device memory that a capture is expected to take.

    Attributes:
        total_bytes: all of it.
        bytes_per_budget: by token budget; the largest rung carries what all rungs share.
        model: what the estimate is made of, for other ladders.
    """

    total_bytes: int
    bytes_per_budget: dict[int, int]
    model: MemoryModel


def profile_capture(
    encoder: SupportsEncoderCudaGraph,
    rungs: Sequence[RungLimits],
    *,
    recorder: Recorder,
    num_slots: int,
) -> MemoryProfile:
    """Capture a few of `rungs` in pools of their own, weigh them, and drop them again.

    What rungs share is taken to grow in proportion to the largest one, from two ladders: one that
    ends at the largest rung and one that is a single rung of half its place. What a further graph
    adds is the median over samples of the other rungs, and a further rung as many graphs as rungs
    have on average; what one of the samples took above that is shared too, by the smaller rungs
    (workspaces of a stream that large ones do not use).
    """
    graphs = [len(variants_of(encoder, rung)) for rung in rungs]
    sampled = sorted({0, len(rungs) // 2, max(0, len(rungs) - 2), len(rungs) - 1})
    whole = _weigh(encoder, [rungs[i] for i in sampled], recorder, num_slots)
    largest, others = whole[-1], whole[:-1]
    counts = [graphs[i] for i in sampled]
    each = median(map(truediv, others, counts)) if others else 0.0
    shared_by_small = sum(
        max(0.0, weight - each * count) for weight, count in zip(others, counts, strict=False)
    )
    budget = rungs[-1].token_budget
    middle = rungs[len(rungs) // 2]
    if middle is rungs[-1]:
        per_token = (largest - each * counts[-1]) / budget
    else:
        (alone,) = _weigh(encoder, [middle], recorder, num_slots)
        per_token = (largest - alone) / (budget - middle.token_budget)
    per_token = max(0.0, per_token)
    fixed = max(0.0, largest - each * counts[-1] - per_token * budget) + shared_by_small
    model = MemoryModel(per_token, each * mean(graphs), fixed)
    budgets = model.of([rung.token_budget for rung in rungs])
    return MemoryProfile(sum(budgets.values()), budgets, model)


def cap_rungs(
    rungs: Sequence[RungLimits], profile: MemoryProfile, max_bytes: int
) -> tuple[RungLimits, ...]:
    """The smaller ones of `rungs`, as many as `max_bytes` pays for.

    Raises:
        ValueError: not even the smallest rung fits.
    """
    for count in range(len(rungs), 0, -1):
        if profile.model.total([rung.token_budget for rung in rungs[:count]]) <= max_bytes:
            return tuple(rungs[:count])
    least = profile.model.total([rungs[0].token_budget])
    raise ValueError(
        f"capture: max_bytes={max_bytes} is less than the {least} bytes that the smallest rung "
        f"({rungs[0].token_budget} tokens) takes; raise it to {least} or use smaller token_budgets"
    )


def _weigh(
    encoder: SupportsEncoderCudaGraph,
    rungs: Sequence[RungLimits],
    recorder: Recorder,
    num_slots: int,
) -> list[int]:
    """Bytes of each of `rungs` captured as a ladder, which is gone afterwards."""
    ladder = capture_ladder(
        encoder, rungs, recorder=recorder, pool=recorder.new_pool(), num_slots=num_slots
    )
    weights = [rung.bytes for rung in ladder.rungs.values()]
    del ladder
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
        torch.cuda.empty_cache()
    return weights
