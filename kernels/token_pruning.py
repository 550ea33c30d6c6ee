"""How new each token of a video is: what token pruning ranks (Efficient Video Sampling).

    score[r] = 1 - cos(tokens[r], tokens[r - frame])    in [0, 2], frame = tokens in a frame
               4  in the first frame of an item: images and first frames come before everything
               3  where the similarity is not a number: before every token that was compared
              -1  at or past the live rows

tokens [M, C], after the merger, rows at any stride, elements of a row adjacent; grid [I, 3] int32
(t, h, w) in patches, rows past the live items all zero; score [M] fp32. The three sums of a cosine
are fp32 and its quotient fp64 (all fp64 for fp64), so that a token equal to its predecessor scores
exactly 0 and equal tokens tie. The cosine with a row of zeros is 0. A score depends on its two rows
alone, not on the batch around them.

`select_tokens` picks from these scores and `gather_rows` moves the rows. Memory-bound: tokens are
read once from memory and once more from L2. https://arxiv.org/abs/2510.14624
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .roofline import Cost
from .rows import ceil_div

FIRST_FRAME = 4.0
NOT_A_NUMBER = 3.0
PADDING = -1.0
BLOCK_I = 64  # items compared at once
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TokenScoresConfig:
    """Launch parameters: rows a program, columns read at once, and warps."""

    ROWS: int
    BLOCK_C: int
    num_warps: int


def config(C: int, dtype: torch.dtype) -> TokenScoresConfig:
    """Four rows against four: up to four 16-byte loads in flight for each thread."""
    wide = 1024 if dtype.itemsize == 2 else 512
    return TokenScoresConfig(ROWS=4, BLOCK_C=min(wide, triton.next_power_of_2(C)), num_warps=4)


def retained_tokens(tokens_per_frame: int, frames: int, rate: float) -> int:
    """Tokens left of a video of `frames` frames after pruning the fraction `rate` of them.

    `int(total * (1 - rate))`, and never less than the first frame: the count that vLLM reserves
    for its `video_pruning_rate`.

    Raises:
        ValueError: `rate` is outside [0, 1), or a size is negative.
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"retained_tokens: rate = {rate} is the fraction to prune and must lie in [0, 1); "
            "0 keeps every token"
        )
    if tokens_per_frame < 0 or frames < 0:
        raise ValueError(
            f"retained_tokens: tokens_per_frame = {tokens_per_frame} and frames = {frames} must "
            "not be negative"
        )
    total = tokens_per_frame * frames
    return max(min(tokens_per_frame, total), int(total * (1 - rate)))


def token_scores_ref(tokens: torch.Tensor, grid: torch.Tensor, *, merge: int) -> torch.Tensor:
    """Plain PyTorch definition of `token_scores`, item by item; fp64 for fp64 tokens."""
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    score = wide.new_full(wide.shape[:1], PADDING)
    first = 0
    for t, h, w in grid.tolist():
        frame = h * w // merge**2
        end = first + t * frame
        now, before = wide[first + frame : end], wide[first : max(end - frame, first)]
        dot, a, b = (
            (p * q).sum(-1).double() for p, q in ((now, before), (now, now), (before, before))
        )
        norm = (a * b).sqrt()
        cos = torch.where(norm == 0, 0.0, dot / norm)
        score[first : min(first + frame, end)] = FIRST_FRAME
        score[first + frame : end] = (1 - cos).clamp(0, 2).nan_to_num(NOT_A_NUMBER).to(score.dtype)
        first = end
    return score


def cost(M: int, C: int, dtype: torch.dtype) -> Cost:
    """Tokens read once, scores written; three products and sums an element."""
    return Cost(flops=6 * M * C, bytes=M * C * dtype.itemsize + 4 * M)


@triton.jit(do_not_specialize=["M", "num_items"])  # one compilation for all sizes
def _token_scores_kernel(
    tokens_ptr,  # [M, C]
    grid_ptr,  # [I, 3]
    score_ptr,  # [M] fp32
    M,
    C,
    stride_m,
    num_items,
    AREA: tl.constexpr,  # patches in a token
    FIRST_FRAME: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # first row and tokens in a frame of the item that holds each row; no frame: a padding row
    first = tl.zeros_like(r)
    frame = tl.zeros_like(r)
    total = 0
    for i0 in range(0, num_items, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        t = tl.load(grid_ptr + 3 * i, mask=i < num_items, other=0)
        h = tl.load(grid_ptr + 3 * i + 1, mask=i < num_items, other=0)
        w = tl.load(grid_ptr + 3 * i + 2, mask=i < num_items, other=0)
        tokens = h * w // AREA
        end = total + tl.cumsum(t * tokens, axis=0)
        begin = end - t * tokens
        holds = (begin[None, :] <= r[:, None]) & (r[:, None] < end[None, :])
        first += tl.sum(tl.where(holds, begin[None, :], 0), axis=1)
        frame += tl.sum(tl.where(holds, tokens[None, :], 0), axis=1)
        total += tl.sum(t * tokens, axis=0)
    live = (frame > 0) & (r < M)
    compared = live & (r - first >= frame)

    now = tokens_ptr + r[:, None].to(tl.int64) * stride_m
    before = tokens_ptr + (r - frame)[:, None].to(tl.int64) * stride_m
    dot = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    a = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    b = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = (c0 + tl.arange(0, BLOCK_C))[None, :]
        mask = compared[:, None] & (c < C)
        x = tl.load(now + c, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(before + c, mask=mask, other=0.0).to(tl.float32)
        dot += x * y
        a += x * x
        b += y * y
    # fp64: the root of a square is exact, so equal rows have a cosine of exactly 1
    norm = tl.sqrt(tl.sum(a, axis=1).to(tl.float64) * tl.sum(b, axis=1).to(tl.float64))
    cos = tl.where(norm == 0, 0.0, tl.sum(dot, axis=1).to(tl.float64) / norm)
    score = tl.minimum(tl.maximum((1 - cos).to(tl.float32), 0.0), 2.0)
    score = tl.where(cos == cos, score, NOT_A_NUMBER)
    score = tl.where(compared, score, tl.where(live, FIRST_FRAME, PADDING))
    tl.store(score_ptr + r, score, mask=r < M)


def token_scores(tokens: torch.Tensor, grid: torch.Tensor, *, merge: int) -> torch.Tensor:
    """Score the tokens of a packed batch, [M] fp32; see the module docstring.

    Args:
        tokens: [M, C] fp32, fp16 or bf16, elements of a row adjacent.
        grid: [I, 3] int32 contiguous. Its tokens must fit in M; the caller checks that on the
            host, where the grids come from.
        merge: patches along a side of a merge block.

    Raises:
        ValueError: a shape, layout or dtype that is not as above.
    """
    if tokens.ndim != 2 or (tokens.shape[1] > 1 and tokens.stride(1) != 1):
        raise ValueError(
            "token_scores: tokens must be [M, C] with adjacent elements in a row, got shape "
            f"{tuple(tokens.shape)} and strides {tokens.stride()}"
        )
    check_grid("token_scores", tokens, grid, merge)
    if use_reference(tokens):
        return token_scores_ref(tokens, grid, merge=merge)
    if tokens.dtype not in DTYPES:
        raise ValueError(f"token_scores: tokens are {tokens.dtype}; cast to one of {DTYPES}")
    M, C = tokens.shape
    score = torch.empty(M, dtype=torch.float32, device=tokens.device)
    if M == 0:
        return score
    launch = config(C, tokens.dtype)
    launch_kernel(
        _token_scores_kernel, (ceil_div(M, launch.ROWS),),
        tokens, grid, score, M, C, tokens.stride(0), grid.shape[0], AREA=merge**2,
        FIRST_FRAME=FIRST_FRAME, NOT_A_NUMBER=NOT_A_NUMBER, PADDING=PADDING,
        ROWS=launch.ROWS, BLOCK_C=launch.BLOCK_C, BLOCK_I=BLOCK_I, num_warps=launch.num_warps,
    )  # fmt: skip
    return score


def check_grid(operation: str, x: torch.Tensor, grid: torch.Tensor, merge: int) -> None:
    """Raise ValueError unless `grid` is a table of patch grids on the device of `x`."""
    if (
        grid.ndim != 2
        or grid.shape[1] != 3
        or grid.dtype != torch.int32
        or not grid.is_contiguous()
        or grid.device != x.device
    ):
        raise ValueError(
            f"{operation}: grid must be contiguous int32 [items, 3] on {x.device}, got "
            f"{grid.dtype} {tuple(grid.shape)} with strides {grid.stride()} on {grid.device}"
        )
    if merge < 1:
        raise ValueError(f"{operation}: merge = {merge} must be 1 or more")


@torch.library.custom_op("vitgraph::token_scores", mutates_args=())
def token_scores_op(tokens: torch.Tensor, grid: torch.Tensor, merge: int) -> torch.Tensor:
    """`token_scores` as an operator that torch.compile can trace around."""
    return token_scores(tokens, grid, merge=merge)


@token_scores_op.register_fake
def _(tokens, grid, merge):
    wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return tokens.new_empty(tokens.shape[0], dtype=wide)
