"""The most novel tokens of each item, in their order: exact top-k over packed items on the device.

    score [M] fp32, grid [I, 3] int32 (t, h, w) in patches, keep [I] int32, mask [M] uint8
      -> source         [M] int32   row of each kept token, items one after the other, ascending
         index_in_item  [M] int32   place of that token among all tokens of its item
         kept_per_item  [I] int32   tokens kept of each item
         kept           [1] int32   their sum: the live entries of source and index_in_item

An item with keep >= 0 keeps that many tokens (all of them if it has fewer), those of the highest
score; ties go to the lower row, NaN counts as the highest score. One with a negative keep keeps the
tokens whose mask is not 0, or all if there is no mask. Entries past the live ones are 0.

Scores compare through a 32-bit key of the same order. One program an item finds the key of its
lowest kept token two bits at a time, by counting, and then writes the rows at or above it. A first
launch counts, because a program must know how much all earlier items keep. Bound by latency: 17
passes over the scores of the longest item, which stay in L1; one if it keeps everything.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost
from .token_pruning import BLOCK_I, check_grid

MAX_M = 2**21 - 1  # tokens are counted in 21 bits


class Selection(NamedTuple):
    """Kept tokens of a packed batch; shapes in the module docstring."""

    source: torch.Tensor
    index_in_item: torch.Tensor
    kept_per_item: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class SelectTokensConfig:
    """Launch parameters: tokens of an item that are looked at once, and warps."""

    BLOCK: int
    num_warps: int


def config(M: int) -> SelectTokensConfig:
    """Eight tokens a thread; an item of up to 4096 tokens is one block. Twice that spills."""
    BLOCK = min(max(triton.next_power_of_2(M), 512), 4096)
    return SelectTokensConfig(BLOCK=BLOCK, num_warps=BLOCK // 256)


def select_tokens_ref(
    score: torch.Tensor,
    grid: torch.Tensor,
    keep: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    merge: int,
) -> Selection:
    """Plain PyTorch definition of `select_tokens`, item by item."""
    rows, places, counts, first = [], [], [], 0
    for (t, h, w), k in zip(grid.tolist(), keep.tolist(), strict=True):
        n = t * h * w // merge**2
        if k >= 0:
            order = score[first : first + n].sort(descending=True, stable=True).indices
            place = order[:k].sort().values
        elif mask is None:
            place = torch.arange(n, device=score.device)
        else:
            place = mask[first : first + n].nonzero().flatten()
        rows.append(place + first)
        places.append(place)
        counts.append(place.numel())
        first += n
    padding = score.new_zeros(score.shape[0] - sum(counts), dtype=torch.long)
    return Selection(
        torch.cat([*rows, padding]).int(),
        torch.cat([*places, padding]).int(),
        torch.tensor(counts, dtype=torch.int32, device=score.device),
        torch.tensor([sum(counts)], dtype=torch.int32, device=score.device),
    )


def cost(M: int, num_items: int) -> Cost:
    """Scores and mask read once, two indices written for each row; grid, keep and counts."""
    return Cost(flops=0, bytes=13 * M + 20 * num_items + 4)


@triton.jit
def _span(item, grid_ptr, num_items, M, AREA: tl.constexpr, BLOCK_I: tl.constexpr):
    """First row and number of tokens of an item, cut to M rows."""
    first = 0
    tokens = 0
    for i0 in range(0, item + 1, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        t = tl.load(grid_ptr + 3 * i, mask=i < num_items, other=0)
        h = tl.load(grid_ptr + 3 * i + 1, mask=i < num_items, other=0)
        w = tl.load(grid_ptr + 3 * i + 2, mask=i < num_items, other=0)
        size = t * h * w // AREA
        first += tl.sum(tl.where(i < item, size, 0), axis=0)
        tokens += tl.sum(tl.where(i == item, size, 0), axis=0)
    return first, tl.minimum(tokens, tl.maximum(M - first, 0))


@triton.jit(do_not_specialize=["M", "num_items"])
def _count_kernel(
    grid_ptr,  # [I, 3]
    keep_ptr,  # [I]
    mask_ptr,  # [M] or None
    count_ptr,  # [I]
    M,
    num_items,
    AREA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    item = tl.program_id(0)
    first, tokens = _span(item, grid_ptr, num_items, M, AREA, BLOCK_I)
    keep = tl.load(keep_ptr + item)
    count = tl.where(keep < 0, tokens, tl.minimum(keep, tokens))
    if mask_ptr is not None and keep < 0:
        count -= tokens
        for p0 in range(0, tokens, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            chosen = tl.load(mask_ptr + first + p, mask=p < tokens, other=0)
            count += tl.sum((chosen != 0).to(tl.int32), axis=0)
    tl.store(count_ptr + item, count)


@triton.jit
def _key(score):
    """A uint32 of the order of the scores: both zeros alike, NaN above all, 0 below all."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    # a negative float grows as its other 31 bits shrink
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(score == score, key, 0xFFFFFFFF)


@triton.jit(do_not_specialize=["M", "num_items"])
def _select_tokens_kernel(
    score_ptr,  # [M]
    grid_ptr,  # [I, 3]
    keep_ptr,  # [I]
    mask_ptr,  # [M] or None
    count_ptr,  # [I]
    source_ptr,  # [M]
    index_ptr,  # [M]
    kept_ptr,  # [1]
    M,
    num_items,
    AREA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    item = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first, tokens = _span(item, grid_ptr, num_items, M, AREA, BLOCK_I)
    keep = tl.load(keep_ptr + item)
    base = 0
    kept_total = 0
    for i0 in range(0, num_items, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        count = tl.load(count_ptr + i, mask=i < num_items, other=0)
        base += tl.sum(tl.where(i < item, count, 0), axis=0)
        kept_total += tl.sum(count, axis=0)
    tl.store(kept_ptr, kept_total)  # the same from every program

    # kept: keys above the threshold (any is above 0), and the first `ties` of those equal to it
    threshold = tl.full((), 0, tl.uint32)
    ties = tl.maximum(keep, 0)
    if (keep >= 0) & (keep < tokens):
        for step in range(16):
            shift = 30 - 2 * step
            # how many of the keys that agree so far have a digit of 1, 2, 3 or more: 21 bits each
            packed = tl.full((), 0, tl.int64)
            for p0 in range(0, tokens, BLOCK):
                p = p0 + lanes
                key = _key(tl.load(score_ptr + first + p, mask=p < tokens, other=0.0))
                # two shifts: one of 32 bits is undefined
                agrees = (((key ^ threshold) >> shift) >> 2 == 0) & (p < tokens)
                bits = 21 * tl.where(agrees, (key >> shift) & 3, 0).to(tl.int64)
                packed += tl.sum(0x40000200001 & ((1 << bits) - 1), axis=0)
            from_1 = (packed & 0x1FFFFF).to(tl.int32)
            from_2 = ((packed >> 21) & 0x1FFFFF).to(tl.int32)
            from_3 = (packed >> 42).to(tl.int32)
            # the highest digit that still leaves enough; with nothing to keep, 3 throughout
            digit = tl.where(from_2 >= ties, tl.where(from_3 >= ties, 3, 2), 1)
            digit = tl.where(from_1 >= ties, digit, 0)
            above = tl.where(digit == 2, from_3, tl.where(digit == 1, from_2, from_1))
            ties -= tl.where(digit == 3, 0, above)
            threshold |= digit.to(tl.uint32) << shift

    for p0 in range(0, tokens, BLOCK):
        p = p0 + lanes
        inside = p < tokens
        key = _key(tl.load(score_ptr + first + p, mask=inside, other=0.0))
        tie = ((key == threshold) & inside).to(tl.int32)
        tie_rank = tl.cumsum(tie, axis=0) - tie
        chosen = inside & ((key > threshold) | ((tie > 0) & (tie_rank < ties)))
        ties -= tl.sum(tie, axis=0)
        if mask_ptr is not None and keep < 0:
            chosen &= tl.load(mask_ptr + first + p, mask=inside, other=0) != 0
        step_up = chosen.to(tl.int32)
        to = base + tl.cumsum(step_up, axis=0) - step_up
        tl.store(source_ptr + to, first + p, mask=chosen)
        tl.store(index_ptr + to, p, mask=chosen)
        base += tl.sum(step_up, axis=0)

    for r0 in range(kept_total + item * BLOCK, M, num_items * BLOCK):  # the tail, shared
        r = r0 + lanes
        tl.store(source_ptr + r, 0, mask=r < M)
        tl.store(index_ptr + r, 0, mask=r < M)


def select_tokens(
    score: torch.Tensor,
    grid: torch.Tensor,
    keep: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    merge: int,
    out: Selection | None = None,
) -> Selection:
    """Choose the kept tokens of every item; see the module docstring.

    Args:
        score: [M] fp32, contiguous.
        grid: [I, 3] int32 contiguous; its tokens must fit in M.
        keep: [I] int32 contiguous: tokens to keep, negative to use `mask`.
        mask: [M] uint8 contiguous, read for items with a negative keep; None keeps all of these.
        merge: patches along a side of a merge block.
        out: int32 tensors to write into; new ones if None.

    Raises:
        ValueError: a shape, layout, dtype or device that is not as above, or M over `MAX_M`.
    """
    check_grid("select_tokens", score, grid, merge)
    M, num_items = score.numel(), grid.shape[0]
    if M > MAX_M:
        raise ValueError(f"select_tokens: {M} scores exceed the limit of {MAX_M}; split the batch")
    _check("score", score, M, torch.float32, score.device)
    _check("keep", keep, num_items, torch.int32, score.device)
    if mask is not None:
        _check("mask", mask, M, torch.uint8, score.device)
    sizes = (M, M, num_items, 1)
    if out is None:
        out = Selection(*(keep.new_empty(size) for size in sizes))
    for name, tensor, size in zip(Selection._fields, out, sizes, strict=True):
        _check(f"out.{name}", tensor, size, torch.int32, score.device)
    if num_items == 0:
        for tensor in out:
            tensor.zero_()
        return out
    if use_reference(score):
        chosen = select_tokens_ref(score, grid, keep, mask, merge=merge)
        for to, value in zip(out, chosen, strict=True):
            to.copy_(value)
        return out
    launch = config(M)
    constants = {"AREA": merge**2, "BLOCK": launch.BLOCK, "BLOCK_I": BLOCK_I}
    launch_kernel(
        _count_kernel,
        (num_items,),
        grid,
        keep,
        mask,
        out.kept_per_item,
        M,
        num_items,
        **constants,
        num_warps=4,
    )
    launch_kernel(
        _select_tokens_kernel, (num_items,),
        score, grid, keep, mask, out.kept_per_item, out.source, out.index_in_item, out.kept,
        M, num_items, **constants, num_warps=launch.num_warps,
    )  # fmt: skip
    return out


def _check(name: str, x: torch.Tensor, size: int, dtype: torch.dtype, on: torch.device) -> None:
    if x.shape != (size,) or x.dtype != dtype or not x.is_contiguous() or x.device != on:
        raise ValueError(
            f"select_tokens: {name} must be contiguous {dtype} [{size}] on {on}, got {x.dtype} "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


@torch.library.custom_op("vitgraph::select_tokens", mutates_args=())
def select_tokens_op(
    score: torch.Tensor,
    grid: torch.Tensor,
    keep: torch.Tensor,
    mask: torch.Tensor | None,
    merge: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`select_tokens` as an operator that torch.compile can trace around."""
    chosen = select_tokens(score, grid, keep, mask, merge=merge)
    return chosen.source, chosen.index_in_item, chosen.kept_per_item, chosen.kept


@select_tokens_op.register_fake
def _(score, grid, keep, mask, merge):
    return tuple(keep.new_empty(size) for size in (len(score), len(score), len(keep), 1))
