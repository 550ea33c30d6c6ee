"""Token pruning of a tower's outputs: which tokens each item keeps, and the rows that are left.

Efficient Video Sampling, https://arxiv.org/abs/2510.14624: tokens of a video that hardly differ
from the token at the same place in the frame before are dropped, so that the language model reads
fewer of them. It runs after the mergers, on the device, inside the graph if it was captured so.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import torch

from ..capture import Pruning
from ..kernels.gather_rows import gather_rows
from ..kernels.select_tokens import Selection, select_tokens
from ..kernels.token_pruning import retained_tokens, token_scores
from .grids import Grid
from .spec import EncoderSpec

KEPT_INDEX = "kept_index"


def check_rate(name: str, rate: float | None) -> None:
    """Refuse a rate, named `name`, that is no fraction in [0, 1); None asks for no pruning.

    Raises:
        ValueError: any other value.
    """
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate < 1:
        raise ValueError(
            f"{name}={rate!r} is not a fraction of tokens to drop; give one number of at least 0 "
            "and less than 1, or leave it out to keep every token"
        )


def check_prunable(spec: EncoderSpec) -> None:
    """Refuse towers without videos, and those whose tokens are read in whole blocks behind them.

    Raises:
        ValueError: the tower reads images alone, or has no merger of its own.
    """
    if spec.images_only:
        raise ValueError(
            f"pruning: drops tokens of videos, and a tower of {spec.family} reads images; leave "
            "pruning_rate, keep_mask and pruning out"
        )
    if spec.merger == "mean":
        raise ValueError(
            f"pruning: a tower of {spec.family} averages the frames of a clip, so no token repeats "
            "one of the frame before; leave pruning_rate, keep_mask and pruning out"
        )
    if spec.merger == "none":
        raise ValueError(
            f"pruning: a tower of {spec.family} has no merger, and what merges its patches behind "
            "it needs all of them; leave pruning_rate, keep_mask and pruning out"
        )


def plan_pruning(
    spec: EncoderSpec,
    grids: Sequence[Grid],
    rates: float | Sequence[float | None] | None,
    masks: Sequence[torch.Tensor | None] | None,
) -> Pruning | None:
    """What `grids` keep under a rate, or a mask, for each item; None if nothing was asked for.

    Args:
        spec: The tower.
        grids: (t, h, w) of each item in patches.
        rates: Fraction of tokens to drop, in [0, 1), for all items or each; None keeps all of an
            item. The first frame is always kept whole, so images are.
        masks: [tokens] bool or uint8 for each item, true where a token is kept; None leaves the
            item to its rate.

    Raises:
        ValueError: another number of rates or masks than items, a rate outside [0, 1), a mask of
            another size, or both for one item; or a tower without a merger.
        TypeError: a mask of another dtype.
    """
    if rates is None and masks is None:
        return None
    check_prunable(spec)
    if isinstance(rates, torch.Tensor):
        rates = rates.tolist()  # a number or a list
    each = list(rates) if isinstance(rates, Iterable) else [rates] * len(grids)
    chosen = [None] * len(grids) if masks is None else list(masks)
    for name, given in (("pruning_rate", each), ("keep_mask", chosen)):
        if len(given) != len(grids):
            raise ValueError(
                f"{name}: {len(given)} entries for {len(grids)} items; pass one for each item, "
                "None where it does not apply"
            )
    sizes = [t * h * w // spec.patches_per_token for t, h, w in grids]
    keep, pieces = [], []
    for item, ((frames, _, _), size, rate, mask) in enumerate(
        zip(grids, sizes, each, chosen, strict=True)
    ):
        if mask is None:
            keep.append(retained_tokens(size // frames, frames, rate or 0.0))
            pieces.append(torch.zeros(size, dtype=torch.uint8))
            continue
        if rate is not None:
            raise ValueError(
                f"pruning_rate[{item}]={rate} and keep_mask[{item}] are both given; pass one of "
                "them for an item and None for the other"
            )
        pieces.append(_checked(mask, item, size))
        keep.append(int(pieces[-1].sum()))
    masked = tuple(mask is not None for mask in chosen)
    return Pruning(tuple(keep), masked, torch.cat(pieces) if any(masked) else None)


def _checked(mask: torch.Tensor, item: int, size: int) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.dtype not in (torch.bool, torch.uint8):
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"keep_mask[{item}] is {kind}; pass a tensor of bool or uint8")
    if mask.shape != (size,):
        raise ValueError(
            f"keep_mask[{item}] is {list(mask.shape)}; the item has {size} tokens, pass [{size}]"
        )
    return (mask != 0).to("cpu", torch.uint8)


def prune(
    spec: EncoderSpec,
    grid: torch.Tensor,
    keep: torch.Tensor,
    mask: torch.Tensor | None,
    whole: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
) -> None:
    """Write the kept rows of `whole` and their places to `outputs`, without waiting.

    Args:
        spec: The tower.
        grid: [items, 3] int32, zero past the live items.
        keep: [items] int32, tokens to keep, or -1 for those of the mask.
        mask: [M] uint8, or None if no item uses one.
        whole: "pooler_output" and the deepstack features, [M, out].
        outputs: The same names, [K, out], and "kept_index" [K] int32, which takes the place of
            each kept token within its item. K may be less than M if that is enough.
    """
    pooled = whole["pooler_output"]
    scores = token_scores(pooled, grid, merge=spec.merge_size)
    chosen: Selection = select_tokens(scores, grid, keep, mask, merge=spec.merge_size)
    places = outputs[KEPT_INDEX]
    places.copy_(chosen.index_in_item[: len(places)])
    source = chosen.source[: len(places)]
    for name, rows in whole.items():
        gather_rows(rows, source, chosen.kept, outputs[name])
