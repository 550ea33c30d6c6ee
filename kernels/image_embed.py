"""Patch embedding of whole images of one size, with class rows and a position for every row.

    x[i*R + c]     = table[c]                                   c < C, the class rows of image i
    x[i*R + C + p] = patch p of image i @ W^T + b + table[C + p]
    x[r]           = 0                                          r past the live rows

Shapes: images [I, channels, H, W] contiguous, H and W multiples of the patch side S; W [D,
channels*S*S]; b [D]; table [R, D] fp32 (fp64 for fp64), R = C + (H/S)*(W/S); x [I*R, D]. Patches
are numbered row by row. The images are read where they lie: a convolution whose stride is its
kernel needs no rearranged copy. All of it accumulates in fp32 and is rounded once. Stale images are
not read, so padding is finite whatever they hold.

Compute-bound: 2*I*R*D*channels*S*S FLOP, about 1 % of a tower.
"""

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .patch_embed import config
from .roofline import Cost
from .rows import check_live_rows


def image_embed_ref(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    patch: int,
    num_live: int | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `image_embed`; `num_live` is a Python int here."""
    (count, channels, _, _), (R, D) = images.shape, table.shape
    n = count * R if num_live is None else num_live
    images = images[: -(-n // R)]
    kernel = weight.view(D, channels, patch, patch)
    patches = torch.nn.functional.conv2d(images, kernel, bias, stride=patch).flatten(2).mT
    rows = table.expand(len(images), R, D).clone()
    rows[:, R - patches.shape[1] :] += patches
    rows = rows.flatten(0, 1)[:n].to(weight.dtype)
    return torch.cat([rows, rows.new_zeros(count * R - n, D)])


def cost(count: int, pixels: int, R: int, D: int, K: int, dtype: torch.dtype) -> Cost:
    """One GEMM; `pixels` values of an image, weight and table are read once, x is written once."""
    elements = count * (pixels + R * D) + D * K
    return Cost(flops=2 * count * R * D * K, bytes=elements * dtype.itemsize + 4 * R * D)


@triton.jit(do_not_specialize=["T"])  # one compilation for all numbers of images
def _image_embed_kernel(
    images_ptr,  # [I, K / SIDE^2, H, W]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    table_ptr,  # [R, D] fp32
    live_ptr,  # [1] or None
    x_ptr,  # [T, D], T = I * R
    T,
    D,
    R: tl.constexpr,
    CLASS_ROWS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # neighbouring programs share the pixels and walk the weight, which stays in L2
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_live = T
    if live_ptr is not None:
        num_live = tl.load(live_ptr)
    live = t < num_live
    in_d = d < D
    r = t % R
    patch = r - CLASS_ROWS
    has_pixels = live & (patch >= 0)
    corner = (patch // (W // SIDE)) * (SIDE * W) + (patch % (W // SIDE)) * SIDE
    # int64 before the multiply: 1,360 images of 728 x 728 pass 2**31 values
    image = (t // R).to(tl.int64) * (K // (SIDE * SIDE) * H * W)
    pixels = images_ptr + (image + corner)[:, None]
    weight = weight_ptr + d[:, None] * K
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    if tl.program_id(1) * BLOCK_T < num_live:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_k = k < K
            within = k % (SIDE * SIDE)
            at = (k // (SIDE * SIDE)) * (H * W) + (within // SIDE) * W + within % SIDE
            a = tl.load(pixels + at[None, :], mask=has_pixels[:, None] & in_k[None, :], other=0.0)
            b = tl.load(weight + k[None, :], mask=in_d[:, None] & in_k[None, :], other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
        acc += tl.where(has_pixels[:, None], bias[None, :], 0.0)
    mask = live[:, None] & in_d[None, :]
    acc += tl.load(table_ptr + r[:, None] * D + d[None, :], mask=mask, other=0.0)
    to = x_ptr + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(to, acc.to(x_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


def image_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    *,
    patch: int,
    live_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embed whole images into rows [I*R, D]; see the module docstring.

    Args:
        images: [I, channels, H, W], contiguous, in the dtype of `weight`.
        weight, bias: [D, channels*patch*patch] contiguous, and [D] or None.
        table: [R, D] fp32 (fp64 for fp64): class rows, then what is added to each patch.
        patch: side of a patch in pixels.
        live_rows: int32 [1]; rows from there on are zeros.

    Raises:
        ValueError: a shape or layout that is not as above.
    """
    if images.ndim != 4 or not images.is_contiguous():
        raise ValueError(
            "image_embed: images must be contiguous [I, channels, H, W], got "
            f"{tuple(images.shape)} with strides {images.stride()}"
        )
    count, channels, H, W = images.shape
    R, D = table.shape
    K = channels * patch * patch
    if H % patch or W % patch:
        raise ValueError(f"image_embed: {H} x {W} pixels are not whole patches of side {patch}")
    num_patches = (H // patch) * (W // patch)
    if weight.shape != (D, K) or not weight.is_contiguous():
        raise ValueError(
            f"image_embed: weight must be contiguous [{D}, {K}], got {tuple(weight.shape)}"
        )
    if num_patches > R or not table.is_contiguous():
        raise ValueError(
            f"image_embed: table must be contiguous with a row for each of {num_patches} patches, "
            f"got {tuple(table.shape)}"
        )
    check_live_rows("image_embed", images, live_rows)
    if use_reference(images):
        num_live = None if live_rows is None else int(live_rows)
        return image_embed_ref(images, weight, bias, table, patch, num_live)
    T = count * R
    x = torch.empty(T, D, dtype=weight.dtype, device=images.device)
    if T == 0:
        return x
    launch = config(T, weight.dtype)
    launch_kernel(
        _image_embed_kernel, (triton.cdiv(D, launch.BLOCK_D), triton.cdiv(T, launch.BLOCK_T)),
        images, weight, bias, table, live_rows, x, T, D,
        R=R, CLASS_ROWS=R - num_patches, H=H, W=W, SIDE=patch, K=K,
        BLOCK_T=launch.BLOCK_T, BLOCK_D=launch.BLOCK_D, BLOCK_K=launch.BLOCK_P,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return x


@torch.library.custom_op("vitgraph::image_embed", mutates_args=())
def image_embed_op(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    patch: int,
    live_rows: torch.Tensor | None,
) -> torch.Tensor:
    """`image_embed` as an operator that torch.compile can trace around."""
    return image_embed(images, weight, bias, table, patch=patch, live_rows=live_rows)


@image_embed_op.register_fake
def _(images, weight, bias, table, patch, live_rows):
    return weight.new_empty(images.shape[0] * table.shape[0], weight.shape[0])
