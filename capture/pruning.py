"""Staging of token pruning: which tokens the items of a replay keep."""

from collections.abc import Mapping, Sequence

import torch

from .protocol import EncoderItemSpec, Pruning
from .rows import RowOffsets, Run
from .staging import stage_table

KEEP = "keep"
KEEP_MASK = "keep_mask"


def check_pruning(pruning: Pruning, items: Sequence[EncoderItemSpec]) -> None:
    """Refuse a pruning that does not belong to these items.

    Raises:
        ValueError: other numbers of items or tokens, or an item that would keep too many.
    """
    if len(pruning.keep) != len(items) or len(pruning.masked) != len(items):
        raise ValueError(
            f"execute: pruning speaks of {len(pruning.keep)} items, grid_thw has {len(items)}; "
            "pass one number of tokens to keep for each item"
        )
    for index, (keep, item) in enumerate(zip(pruning.keep, items, strict=True)):
        if not 0 <= keep <= item.output_tokens:
            raise ValueError(
                f"execute: pruning keeps {keep} tokens of item {index}, which has "
                f"{item.output_tokens}; pass 0 to {item.output_tokens}"
            )
    if any(pruning.masked):
        tokens = sum(item.output_tokens for item in items)
        mask = pruning.mask
        if mask is None or mask.shape != (tokens,) or mask.is_cuda or mask.dtype != torch.uint8:
            given = None if mask is None else (mask.dtype, list(mask.shape), str(mask.device))
            raise ValueError(
                f"execute: pruning.mask is {given}; pass uint8 [{tokens}] on the CPU, one entry "
                "for each token of all items"
            )


def stage_pruning(
    inputs: Mapping[str, torch.Tensor],
    pruning: Pruning | None,
    offsets: RowOffsets,
    runs: Sequence[Run],
) -> None:
    """Write the keep table of the items of `runs`, and their part of the mask if one is used.

    Without a pruning every item keeps all of its tokens.
    """
    indices = [index for run in runs for index in range(*run)]
    if pruning is None:
        stage_table(inputs[KEEP], [offsets.span("tokens", (i, i + 1))[1] for i in indices])
        return
    stage_table(inputs[KEEP], [-1 if pruning.masked[i] else pruning.keep[i] for i in indices])
    if pruning.mask is not None and any(pruning.masked[i] for i in indices):
        spans = [offsets.span("tokens", run) for run in runs]
        pieces = [pruning.mask[first : first + count] for first, count in spans]
        stage_table(inputs[KEEP_MASK], torch.cat(pieces))


def select_pruning(
    pruning: Pruning | None, offsets: RowOffsets, runs: Sequence[Run]
) -> Pruning | None:
    """The pruning of the items of `runs` alone."""
    if pruning is None:
        return None
    indices = [index for run in runs for index in range(*run)]
    mask = pruning.mask
    if mask is not None:
        spans = [offsets.span("tokens", run) for run in runs]
        mask = torch.cat([mask[first : first + count] for first, count in spans])
    return Pruning(
        tuple(pruning.keep[i] for i in indices), tuple(pruning.masked[i] for i in indices), mask
    )
