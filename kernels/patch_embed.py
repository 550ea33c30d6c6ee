"""Patch embedding: gather of pixel rows, GEMM, bias and interpolated position embedding.

    x[r] = pixels[source[r]] @ W^T + b + sum_k weight_k(r) * table[tap_k(r)]      r live
    x[r] = 0                                                                      r padding

Shapes: pixels [T, P] (P = channels * temporal * side^2 of a patch, rows contiguous), W [D, P],
b [D], table [G*G, D], x [T, D]. With `source` [T] int32 row r takes another pixel row (towers with
windows). `position` [T, 4] int32 holds (row, column, grid height, grid width) of each row, where
the table is resampled as positions.py says. A convolution whose stride is its kernel is this GEMM.
Products accumulate in fp32. Padding is finite whatever stale pixel rows hold.

`backend="triton"` is one kernel. `backend="library"` is cuBLAS and
a pass: with a table it leaves the products in fp32, and the pass adds bias and positions; else the
pass zeroes padding. Both round once. (Positions behind rounded products raised the error of whole
towers of Qwen3-VL-8B by a tenth.) The library does not take `source`.
`backend="auto"` is "library" where it can be, in 16 bits with rows at multiples of 16 bytes, from
`MIN_LIBRARY_ROWS` on: on an H200 0.4 to 0.6 of the time from 784 to 65,536 rows of 1176 values.
At 196 it was nine tenths of what this kernel took before it had more warps there.

In a chain of kernels the one starts early (pdl.py): unless there is a `source`, it multiplies while
the layout is computed, and adds positions then. The library's are ordinary launches. Compute-bound:
2*T*P*D FLOP, under 1 % of a tower.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .linear import linear
from .pdl import pdl_options, wait_for_previous
from .positions import check_table, sample_table, sample_table_ref
from .roofline import Cost
from .zero_padding import zero_padding_

BACKENDS = ("auto", "library", "triton")
MIN_LIBRARY_ROWS = 512
MOST_FEW = 512  # rows of which most programs are alone on their multiprocessor
ADD_T, ADD_D = 16, 128  # tile of the pass that adds positions
MAX_ADDED_ROWS = 65535 * ADD_T  # of that pass: CUDA starts no more programs along its second axis


@dataclass(frozen=True)
class PatchEmbedConfig:
    """Launch parameters: one BLOCK_T x BLOCK_D tile of the output a program."""

    BLOCK_T: int
    BLOCK_D: int
    BLOCK_P: int
    num_warps: int
    num_stages: int


def config(T: int, dtype: torch.dtype, sampling: str = "bilinear_corners") -> PatchEmbedConfig:
    """Small tiles while a few of them must fill the chip; fp32 takes half the depth.

    Also for positions of many taps: those of a large tile do not fit into registers. Up to
    `MOST_FEW` rows twice the warps, and more loads on their way.
    """
    depth = 64 if dtype.itemsize == 2 else 32
    if T <= MOST_FEW:
        return PatchEmbedConfig(64, 64, depth, num_warps=8, num_stages=6)
    if T <= 2048 or sampling in ("bicubic", "bilinear_antialias"):
        return PatchEmbedConfig(64, 64, depth, num_warps=4, num_stages=4)
    return PatchEmbedConfig(128, 128, depth, num_warps=8, num_stages=3)


def choose_backend(
    T: int,
    P: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_source: bool,
    has_table: bool,
) -> str:
    """What "auto" stands for; a pure function of what a captured graph fixes."""
    is_library = (
        device.type == "cuda" and dtype.itemsize == 2 and not has_source
        and not (has_table and T > MAX_ADDED_ROWS)
        and T >= MIN_LIBRARY_ROWS and P % 8 == 0 and D % 8 == 0
    )  # fmt: skip
    return "library" if is_library else "triton"


def patch_embed_ref(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    source: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    sampling: str = "bilinear_corners",
    num_live: int | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `patch_embed`; `num_live` is a Python int here."""
    n = pixels.shape[0] if num_live is None else num_live
    rows = pixels[:n] if source is None else pixels[source[:n].long()]
    x = torch.nn.functional.linear(rows, weight, bias)
    if table is not None:
        assert position is not None
        x = x + sample_table_ref(table, position[:n], sampling).to(x.dtype)
    return torch.cat([x, x.new_zeros(pixels.shape[0] - n, x.shape[1])])


def cost(T: int, P: int, D: int, dtype: torch.dtype, table_rows: int = 0) -> Cost:
    """One GEMM; pixels, weight and table are read once, x is written once."""
    elements = T * P + D * P + T * D + table_rows * D
    return Cost(flops=2 * T * P * D, bytes=elements * dtype.itemsize)


@triton.jit
def _add_products(
    acc, pixels_ptr, weight_ptr, row, d, is_row, in_d, P: tl.constexpr, BLOCK_P: tl.constexpr
):
    # int64 before the multiply: T * P passes 2**31 at 1.4M patches of 1536 values
    pixels = pixels_ptr + row[:, None].to(tl.int64) * P
    weight = weight_ptr + d[:, None] * P
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        in_p = p < P
        a = tl.load(pixels + p[None, :], mask=is_row[:, None] & in_p[None, :], other=0.0)
        b = tl.load(weight + p[None, :], mask=in_d[:, None] & in_p[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _patch_embed_kernel(
    pixels_ptr,  # [T, P]
    weight_ptr,  # [D, P]
    bias_ptr,  # [D] or None
    source_ptr,  # [T] or None
    table_ptr,  # [SIDE * SIDE, D] or None
    position_ptr,  # [T, 4] or None
    live_ptr,  # [1] or None
    x_ptr,  # [T, D]
    T,
    D,
    P: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    # neighbouring programs share the pixel rows and walk the weight, which stays in L2
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    MULTIPLIES_FIRST: tl.constexpr = FEW and source_ptr is None
    if MULTIPLIES_FIRST:
        # stale rows too: how many live the layout says, which may not be there yet
        acc = _add_products(acc, pixels_ptr, weight_ptr, t, d, t < T, in_d, P, BLOCK_P)
    wait_for_previous(PDL)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    live = t < num_live
    if table_ptr is not None:
        # else in front of the products, which start to load meanwhile
        mask = live[:, None] & in_d[None, :]
        acc += sample_table(table_ptr, position_ptr, t, d, D, live, mask, SIDE, SAMPLING)
    if not MULTIPLIES_FIRST:
        row = t
        if source_ptr is not None:
            row = tl.load(source_ptr + t, mask=live, other=0)
        if tl.program_id(1) * BLOCK_T < num_live:
            acc = _add_products(acc, pixels_ptr, weight_ptr, row, d, live, in_d, P, BLOCK_P)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(live[:, None], acc, 0.0)
    to = x_ptr + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(to, acc.to(x_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["T"])  # one compilation for all row counts
def _add_rows_kernel(
    products_ptr,  # [T, D] fp32
    bias_ptr,  # [D] or None
    table_ptr,  # [SIDE * SIDE, D]
    position_ptr,  # [T, 4]
    live_ptr,  # [1] or None
    x_ptr,  # [T, D]
    T,
    D,
    SIDE: tl.constexpr,
    SAMPLING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    live = t < num_live
    in_d = d < D
    mask = live[:, None] & in_d[None, :]
    # int64 before the multiply: T * D passes 2**31 at a million rows of width 2200
    offsets = t[:, None].to(tl.int64) * D + d[None, :]
    x = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    if tl.program_id(1) * BLOCK_T < num_live:
        x = tl.load(products_ptr + offsets, mask=mask, other=0.0)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        x += sample_table(table_ptr, position_ptr, t, d, D, live, mask, SIDE, SAMPLING)
        x = tl.where(live[:, None], x, 0.0)
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


def _products(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """pixels @ weight^T in fp32, by the library."""
    if pixels.is_cuda and pixels.dtype.itemsize == 2:
        return torch.mm(pixels, weight.T, out_dtype=torch.float32)
    return torch.mm(pixels.float(), weight.float().T)


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    source: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    sampling: str = "bilinear_corners",
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Embed packed pixel rows into the residual stream [T, D]; see the module docstring.

    Args:
        pixels: [T, P], contiguous, in the dtype of `weight`.
        weight, bias: [D, P] contiguous and [D].
        source: [T] int32, the pixel row of each row of the result; None for the same order.
        table: [G*G, D] learned positions of a square grid; needs `position` [T, 4] int32.
        sampling: "bilinear_corners", "bilinear", "bicubic" or "bilinear_antialias".
        live_rows: int32 [1]; rows from there on are zeros.
        backend: "auto", "library" or "triton".

    Raises:
        ValueError: a shape, layout, `sampling` or `backend` that is not as above, or `source`, or
            a table and more than `MAX_ADDED_ROWS` rows, with "library".
    """
    T, P = pixels.shape
    D = weight.shape[0]
    if backend not in BACKENDS:
        raise ValueError(f"patch_embed: backend={backend!r} is not one of {BACKENDS}")
    if backend == "library" and source is not None:
        raise ValueError(
            "patch_embed: backend='library' takes rows in the order of the pixels; use 'triton' "
            "with source"
        )
    if backend == "library" and table is not None and T > MAX_ADDED_ROWS:
        raise ValueError(
            f"patch_embed: backend='library' adds positions to at most {MAX_ADDED_ROWS} rows, not "
            f"{T}; use 'triton'"
        )
    if weight.shape != (D, P) or not (pixels.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"patch_embed: pixels [T, P] = {tuple(pixels.shape)} needs a weight [D, {P}], got "
            f"{tuple(weight.shape)}; both must be contiguous"
        )
    if table is not None:
        check_table("patch_embed", table, position, sampling)
    if use_reference(pixels):
        num_live = None if live_rows is None else int(live_rows)
        return patch_embed_ref(
            pixels, weight, bias, source=source, table=table, position=position,
            sampling=sampling, num_live=num_live,
        )  # fmt: skip
    if backend == "auto":
        backend = choose_backend(
            T, P, D, weight.dtype, pixels.device,
            has_source=source is not None, has_table=table is not None,
        )  # fmt: skip
    if backend == "library" and table is None:
        return zero_padding_(linear(pixels, weight, bias, backend="library"), live_rows)
    x = torch.empty(T, D, dtype=weight.dtype, device=pixels.device)
    if T == 0:
        return x
    side = 0 if table is None else int(table.shape[0] ** 0.5)
    if backend == "library":
        launch_kernel(
            _add_rows_kernel, (triton.cdiv(D, ADD_D), triton.cdiv(T, ADD_T)),
            _products(pixels, weight), bias, table, position, live_rows, x, T, D,
            SIDE=side, SAMPLING=sampling, BLOCK_T=ADD_T, BLOCK_D=ADD_D,
        )  # fmt: skip
        return x
    launch = config(T, weight.dtype, sampling)
    launch_kernel(
        _patch_embed_kernel, (triton.cdiv(D, launch.BLOCK_D), triton.cdiv(T, launch.BLOCK_T)),
        pixels, weight, bias, source, table, position, live_rows, x, T, D, P=P,
        SIDE=side, SAMPLING=sampling,
        BLOCK_T=launch.BLOCK_T, BLOCK_D=launch.BLOCK_D, BLOCK_P=launch.BLOCK_P,
        FEW=T <= MOST_FEW, num_warps=launch.num_warps, num_stages=launch.num_stages,
        **pdl_options(pixels),
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::patch_embed", mutates_args=())
def patch_embed_op(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    source: torch.Tensor | None,
    table: torch.Tensor | None,
    position: torch.Tensor | None,
    live_rows: torch.Tensor | None,
    sampling: str = "bilinear_corners",
) -> torch.Tensor:
    """`patch_embed` as an operator that torch.compile can trace around."""
    return patch_embed(
        pixels, weight, bias, source=source, table=table, position=position, sampling=sampling,
        live_rows=live_rows,
    )  # fmt: skip


@patch_embed_op.register_fake
def _(pixels, weight, bias, source, table, position, live_rows, sampling="bilinear_corners"):
    return weight.new_empty(pixels.shape[0], weight.shape[0])
