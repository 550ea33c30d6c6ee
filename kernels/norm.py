"""LayerNorm and RMSNorm of the residual stream, with its deferred bias, padding and row order.

    s = x + offset
    layer:  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
    rms:    y = s / sqrt(mean(s^2) + eps) * weight

Shapes: x and y [T, D], rows contiguous; weight, bias [D]; offset [D] fp32 or None: the sum of the
biases that the residual stream has left out so far. With `partials` [S, T, D] fp32 the stream lacks
the sum of a product as well (gemm_few_rows.py): x += sum(partials), rounded to x's dtype and
written back, comes first. Statistics and arithmetic are fp32 (fp64 for fp64). Rows at or past the
live ones are written as zeros and never read: whatever stale values the stream holds there, what
the next kernels read is finite. With `destination` [T] int32, row r goes to row destination[r] of
y. With `state` [T, D], s is written as well, in its own order, as residual.py does.

Memory-bound: 2*T*D elements moved. https://arxiv.org/abs/1607.06450, https://arxiv.org/abs/1910.07467
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .centred import centred, load_rows, load_vector
from .dispatch import use_reference
from .launch import launch_kernel
from .partials import add_partials_ref, check_partials, num_partials
from .pdl import pdl_options, wait_for_previous
from .residual import residual_ref
from .roofline import Cost

MAX_D = 16384  # one row must fit in the registers of a program


@dataclass(frozen=True)
class NormConfig:
    """Launch parameters: rows a program, its warps, and whether a row is cut in two.

    A row is one block of the next power of two, or a block of the power of two below its width and
    one for the rest.
    """

    rows: int
    num_warps: int
    split: bool = False


def config(T: int, D: int) -> NormConfig:
    """A pure function, by measurement on an H200 at widths of 1024 to 1280.

    From some 2,000 rows on a warp for two rows is fastest: sums stay within the warp, and the split
    leaves few of its lanes idle. Fewer rows are spread over more warps, by the times of captured
    towers (1152 and 1280 columns at 224, 256, 512, 832, 1024 and 1536 rows; 768 at 832), as long as
    a thread has 16 bytes of a row. Norms in fp8 have the same and were not measured so.
    """
    if D <= 2048:
        if T >= 2048 and D >= 32:
            return NormConfig(rows=2, num_warps=1, split=True)
        if T <= 1024 < D:
            return NormConfig(rows=1, num_warps=8)
        return NormConfig(rows=1 if T <= 512 else 2, num_warps=4)
    return NormConfig(rows=1, num_warps=8 if D <= 8192 else 16)


def blocks(D: int, launch: NormConfig) -> tuple[int, int]:
    """Widths of the two blocks of a row; the second is 0 where there is one.

    Below 256 columns a thread of the second would hold less than 16 bytes, and its vectors would
    cost four times as many exchanges between threads as the sums.
    """
    first = triton.next_power_of_2(D)
    if not launch.split or first == D:
        return first, 0
    half = first // 2
    return half, max(triton.next_power_of_2(D - half), min(half, 256))


def norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    destination: torch.Tensor | None = None,
    num_live: int | None = None,
    partials: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `norm`; `num_live` is a Python int here, and x stays as it is."""
    if partials is not None:
        x = add_partials_ref(x, partials, num_live)
    s = x if offset is None else x + offset.to(x.dtype)
    if kind == "layer":
        y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)
    else:
        wide = s if s.dtype == torch.float64 else s.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y = weight * (wide * scale).to(s.dtype)
    if num_live is not None:
        y = torch.cat([y[:num_live], torch.zeros_like(y[num_live:])])
    if destination is not None:
        y = torch.empty_like(y).index_copy_(0, destination.long(), y)
    return y


def cost(T: int, D: int, dtype: torch.dtype) -> Cost:
    """One read and one write of the stream; about 8 FLOP an element."""
    return Cost(flops=8 * T * D, bytes=(2 * T * D + 3 * D) * dtype.itemsize)


@triton.jit
def _store(y, y_ptr, row_start, live, in_rows, d, D: tl.constexpr):
    """Write columns d of rows, and zeros past the live ones."""
    y = tl.where(live, y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row_start + d[None, :], y, mask=in_rows & (d < D)[None, :])


@triton.jit
def _norm_rows(
    x_ptr, partials_ptr, weight_ptr, bias_ptr, offset_ptr, destination_ptr, state_ptr, y_ptr,
    offset, weight, bias,  # columns of the first block; the latter two only with PDL
    r, live, in_rows, T, eps,
    D: tl.constexpr, IS_RMS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalise rows r [ROWS]; of masks that are constants, nothing is left."""
    d = tl.arange(0, BLOCK_D)
    # int64 before the multiply: T * D passes 2**31 at 1.9M rows of width 1152
    start = r[:, None].to(tl.int64) * D
    rest_d = BLOCK_D + tl.arange(0, REST if REST > 0 else BLOCK_D)
    x, rest = load_rows(
        x_ptr, partials_ptr, offset, offset_ptr, start, live, T.to(tl.int64) * D, D,
        SPLITS, BLOCK_D, REST,
    )  # fmt: skip
    if state_ptr is not None:
        _store(x, state_ptr, start, live, in_rows, d, D)
        if REST > 0:
            _store(rest, state_ptr, start, live, in_rows, rest_d, D)
    x, rest, squares = centred(x, rest, D, IS_RMS, BLOCK_D, REST)
    if not PDL:  # many rows: registers hold more of them meanwhile
        weight = load_vector(weight_ptr, d, D)
        bias = load_vector(bias_ptr, d, D)
    scale = (1.0 / tl.sqrt(squares / D + eps))[:, None]
    if destination_ptr is not None:
        row = tl.load(destination_ptr + r, mask=r < T, other=0)
        start = row[:, None].to(tl.int64) * D
    _store(x * scale * weight + bias, y_ptr, start, live, in_rows, d, D)
    if REST > 0:
        rest_weight = load_vector(weight_ptr, rest_d, D)
        rest_bias = load_vector(bias_ptr, rest_d, D)
        _store(rest * scale * rest_weight + rest_bias, y_ptr, start, live, in_rows, rest_d, D)


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _norm_kernel(
    x_ptr,  # [T, D]
    partials_ptr,  # [SPLITS, T, D] fp32 or None
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    offset_ptr,  # [D] fp32 or None
    destination_ptr,  # [T] or None
    live_ptr,  # [1] or None, in units of 1 / LIVE_GROUP rows
    state_ptr,  # [T, D] or None
    y_ptr,  # [T, D]
    T,
    eps,
    D: tl.constexpr,
    IS_RMS: tl.constexpr,
    LIVE_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,  # width of the second block of a row, or 0
    PDL: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    offset = load_vector(offset_ptr, d, D)
    weight = offset  # read below, or behind the sums
    bias = offset
    if PDL:
        weight = load_vector(weight_ptr, d, D)
        bias = load_vector(bias_ptr, d, D)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr) // LIVE_GROUP
    num_live = tl.minimum(num_live, T)
    wait_for_previous(PDL)
    # nearly all programs have live rows alone: without masks they take a third less instructions
    if (tl.program_id(0) + 1) * ROWS <= num_live:
        whole = tl.full([ROWS, 1], 1, tl.int1)
        _norm_rows(
            x_ptr, partials_ptr, weight_ptr, bias_ptr, offset_ptr, destination_ptr, state_ptr,
            y_ptr, offset, weight, bias, r, whole, whole, T, eps,
            D, IS_RMS, SPLITS, BLOCK_D, REST, PDL,
        )  # fmt: skip
    else:
        _norm_rows(
            x_ptr, partials_ptr, weight_ptr, bias_ptr, offset_ptr, destination_ptr, state_ptr,
            y_ptr, offset, weight, bias, r, (r < num_live)[:, None], (r < T)[:, None], T, eps,
            D, IS_RMS, SPLITS, BLOCK_D, REST, PDL,
        )  # fmt: skip


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: str,
    offset: torch.Tensor | None = None,
    destination: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    live_group: int = 1,
    partials: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise the rows of `x`; see the module docstring.

    Args:
        x: [T, D], contiguous.
        weight, bias: [D]; `bias` is None for RMSNorm.
        kind: "layer" or "rms".
        offset: [D] fp32 (fp64 for fp64), added to every row first.
        destination: [T] int32 permutation of the rows; the result is written in its order.
        live_rows: int32 [1]; rows from `live_rows // live_group` on are written as zeros.
        live_group: patches in a row of `x` (4 where 2 x 2 patches were joined to a row).
        partials: [S, T, D] fp32 sums that live rows of `x` lack; added to it in place, first.
        state: [T, D] to write s into, with zeros past the live rows.
        out: [T, D] to write into; a new tensor if None.

    Raises:
        ValueError: a shape, layout or `kind` that is not as above, or D over `MAX_D`.
    """
    T, D = x.shape
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm: kind = {kind!r}; use 'layer' or 'rms'")
    for name, vector in (("weight", weight), ("bias", bias), ("offset", offset)):
        if vector is not None and (vector.shape != (D,) or not vector.is_contiguous()):
            raise ValueError(
                f"norm: {name} {tuple(vector.shape)} must be [{D}], the width of x, contiguous"
            )
    if D > MAX_D:
        raise ValueError(f"norm: D = {D} is over the limit of {MAX_D}")
    if not x.is_contiguous():
        raise ValueError(f"norm: x must be contiguous, its strides are {x.stride()}")
    for name, rows in (("state", state), ("out", out)):
        if rows is not None and (rows.shape != x.shape or not rows.is_contiguous()):
            raise ValueError(
                f"norm: {name} must be contiguous {list(x.shape)}, got {list(rows.shape)} with "
                f"strides {rows.stride()}"
            )
    check_partials("norm", x, partials)
    if use_reference(x):
        num_live = None if live_rows is None else int(live_rows) // live_group
        if partials is not None:
            x.copy_(add_partials_ref(x, partials, num_live))
        if state is not None:
            state.copy_(residual_ref(x, offset, num_live))
        y = norm_ref(
            x, weight, bias, eps,
            kind=kind, offset=offset, destination=destination, num_live=num_live,
        )  # fmt: skip
        return y if out is None else out.copy_(y)
    y = torch.empty_like(x) if out is None else out
    if T == 0:
        return y
    launch = config(T, D)
    block_d, rest = blocks(D, launch)
    launch_kernel(
        _norm_kernel, (triton.cdiv(T, launch.rows),),
        x, partials, weight, bias, offset, destination, live_rows, state, y, T, eps,
        D=D, IS_RMS=kind == "rms", LIVE_GROUP=live_group, SPLITS=num_partials(partials),
        ROWS=launch.rows, BLOCK_D=block_d, REST=rest, num_warps=launch.num_warps, **pdl_options(x),
    )  # fmt: skip
    return y


@torch.library.custom_op("vitgraph::norm", mutates_args=())
def norm_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    offset: torch.Tensor | None,
    destination: torch.Tensor | None,
    live_rows: torch.Tensor | None,
    live_group: int,
) -> torch.Tensor:
    """`norm` as an operator that torch.compile can trace around."""
    return norm(
        x, weight, bias, eps, kind=kind, offset=offset, destination=destination,
        live_rows=live_rows, live_group=live_group,
    )  # fmt: skip


@norm_op.register_fake
def _(x, weight, bias, eps, kind, offset, destination, live_rows, live_group):
    return torch.empty_like(x)
