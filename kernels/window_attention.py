"""Attention within small windows, with the rotary embedding of q and k applied on the way.

    y = x rotated:  y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,   x1 = x[:D/2], x2 = x[D/2:]
    out[i] = sum_j softmax_j(scale * yq[i] . yk[j]) v[j]           over the rows j of i's window

Shapes: q, k, v are [T, H, D] views of the fused [T, 3, H, D] buffer, which is not modified; cos and
sin are fp32 [T, D/2]; cu_window_seqlens is int32 [W + 1] on the device, its tail repeating the last
offset; out is [T, H, D], contiguous. The rotation is fp32, then rounded to the dtype of q before
the product, as Hugging Face does; scores and softmax are fp32.

Memory-bound at 64 rows a window: q, k and v are read once, out is written once. One program takes a
(window, head) of up to 64 rows; larger windows are cut into 64-row tiles of q, each of which reads
all of k and v. Rows outside the windows are not written, and nothing of them reaches the result.
`max_window` must hold for every window, which the host cannot check: of a longer one, rows past it,
rounded up to a power of two from 16 on (or to 64), are ignored as keys and not written.

Windows of up to 64 rows in 16 bits take the kernel of window_attention_hopper.py on compute
capability 9.0, others this one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import window_attention_hopper
from .attention import attention_ref, check_tensors
from .attention import cost as attention_cost
from .attention_triton import (
    DTYPES,
    LOG2E,
    MAX_HEAD_DIM,
    load_rows,
    next_power_of_2,
    split_head_dim,
    store_rows,
    value_block,
)
from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import pdl_options, wait_for_previous
from .roofline import Cost

MAX_WINDOW = 256


def window_attention_ref(
    q, k, v, cos, sin, cu_window_seqlens, *, scale: float, out=None
) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of its inputs (pass fp64 for the oracle)."""
    half = q.shape[-1] // 2
    wide = torch.promote_types(q.dtype, cos.dtype)
    c, s = cos[:, None, :].to(wide), sin[:, None, :].to(wide)

    def rotate(x):
        x1, x2 = x[..., :half].to(wide), x[..., half:].to(wide)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)

    return attention_ref(rotate(q), rotate(k), v, cu_window_seqlens, scale=scale, out=out)


def cost(lengths, H: int, D: int, dtype: torch.dtype) -> Cost:
    """Least work and traffic for windows of `lengths` rows."""
    T = sum(lengths)
    # 3 FLOP an element of q and k; cos and sin, D fp32 together, are read once for all heads
    return attention_cost(lengths, H, D, dtype) + Cost(flops=6 * T * H * D, bytes=4 * T * D)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of q and of k in one program, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int


def launch_config(max_window: int, head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Pick the tile for windows of up to `max_window` rows.

    In 16 bits nothing spills on sm_90, except at head dims over 96 in windows over 128 rows.
    """
    block_n = max(16, next_power_of_2(max_window))
    if dtype == torch.float32:  # no tensor cores at full fp32 precision: small tiles
        return LaunchConfig(block_m=16, block_n=block_n, num_warps=8)
    block_m = 16 if head_dim > 96 and block_n > 128 else min(block_n, 64)
    return LaunchConfig(block_m=block_m, block_n=block_n, num_warps=4 if block_n <= 64 else 8)


@triton.jit
def _load_angles(
    cos_base,
    sin_base,
    rows,
    num_rows,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """cos and sin of columns FIRST.., each [R, WIDTH], 0 past HALF and past `num_rows`."""
    c = load_rows(cos_base, rows, num_rows, HALF, FIRST, WIDTH, HALF, True)
    s = load_rows(sin_base, rows, num_rows, HALF, FIRST, WIDTH, HALF, True)
    return c, s


@triton.jit
def _load_rotated(
    base,
    c,
    s,
    rows,
    num_rows,
    STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Columns FIRST.. of both rotated halves, as wide as the angles c and s."""
    WIDTH: tl.constexpr = c.shape[1]
    x1 = load_rows(base, rows, num_rows, STRIDE, FIRST, WIDTH, HALF, True)
    x2 = load_rows(base + HALF, rows, num_rows, STRIDE, FIRST, WIDTH, HALF, True)
    f1 = x1.to(tl.float32)
    f2 = x2.to(tl.float32)
    return (f1 * c - f2 * s).to(x1.dtype), (f2 * c + f1 * s).to(x1.dtype)


@triton.jit
def _load_rotated_pair(
    q_base, k_base, cos_q, sin_q, cos_k, sin_k, rows_m, rows_n, left, length,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Both halves of q and of k; a program that holds a whole window reads the angles once."""
    ck, sk = _load_angles(cos_k, sin_k, rows_n, length, HALF, FIRST, WIDTH)
    k1, k2 = _load_rotated(k_base, ck, sk, rows_n, length, STRIDE_KT, HALF, FIRST)
    if TILES > 1:
        ck, sk = _load_angles(cos_q, sin_q, rows_m, left, HALF, FIRST, WIDTH)
    q1, q2 = _load_rotated(q_base, ck, sk, rows_m, left, STRIDE_QT, HALF, FIRST)
    return q1, q2, k1, k2


@triton.jit
def _window_attention_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    cos_ptr,  # [T, D / 2]
    sin_ptr,  # [T, D / 2]
    out_ptr,  # [T, H, D], contiguous
    cu_ptr,  # [W + 1]
    scale_log2,
    STRIDE_QT: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    H0: tl.constexpr,  # column blocks of half a head
    H1: tl.constexpr,
    D0: tl.constexpr,  # column blocks of a head
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = BLOCK_N // BLOCK_M
    # heads innermost: they share the rows of cos and sin, and the lines of the fused buffer
    pid = tl.program_id(0)
    head = pid % H
    tile = (pid // H) % TILES
    window = pid // (H * TILES)
    begin = tl.load(cu_ptr + window)
    length = tl.minimum(tl.load(cu_ptr + window + 1) - begin, BLOCK_N)
    wait_for_previous(PDL)
    if tile * BLOCK_M >= length:
        return
    # int64 before the multiply: T * stride passes 2**31 at 560,000 rows of 3 * 16 * 80
    row = begin.to(tl.int64)
    row_q = row + tile * BLOCK_M
    q_base = q_ptr + row_q * STRIDE_QT + head * STRIDE_QH
    k_base = k_ptr + row * STRIDE_KT + head * STRIDE_KH
    v_base = v_ptr + row * STRIDE_VT + head * STRIDE_VH
    out_base = out_ptr + row_q * (H * D) + head * D
    cos_q = cos_ptr + row_q * HALF
    sin_q = sin_ptr + row_q * HALF
    cos_k = cos_ptr + row * HALF
    sin_k = sin_ptr + row * HALF
    rows_m = tl.arange(0, BLOCK_M)
    rows_n = tl.arange(0, BLOCK_N)
    left = length - tile * BLOCK_M

    # a score does not depend on the order of the columns: the halves are multiplied apart, and
    # never have to be joined
    q1, q2, k1, k2 = _load_rotated_pair(
        q_base, k_base, cos_q, sin_q, cos_k, sin_k, rows_m, rows_n, left, length,
        STRIDE_QT, STRIDE_KT, HALF, 0, H0, TILES,
    )  # fmt: skip
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    if H1 > 0:
        q1, q2, k1, k2 = _load_rotated_pair(
            q_base, k_base, cos_q, sin_q, cos_k, sin_k, rows_m, rows_n, left, length,
            STRIDE_QT, STRIDE_KT, HALF, H0, H1, TILES,
        )  # fmt: skip
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")

    scores = tl.where((rows_n < length)[None, :], scores * scale_log2, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    inv = 1.0 / tl.sum(p, axis=1)
    p = p.to(v_ptr.dtype.element_ty)
    v0 = load_rows(v_base, rows_n, length, STRIDE_VT, 0, D0, D, True)
    o0 = tl.dot(p, v0, input_precision="ieee") * inv[:, None]
    store_rows(out_base, rows_m, left, o0, H * D, 0, D)
    if D1 > 0:
        v1 = load_rows(v_base, rows_n, length, STRIDE_VT, D0, D1, D, True)
        o1 = tl.dot(p, v1, input_precision="ieee") * inv[:, None]
        store_rows(out_base, rows_m, left, o1, H * D, D0, D)


def kernel_constants(q, k, v, config: LaunchConfig) -> dict[str, int]:
    """Compile-time arguments of the kernel for these operands."""
    H, D = q.shape[1:]
    H0, H1 = split_head_dim(D // 2)
    D0, D1 = split_head_dim(D)
    return {
        "STRIDE_QT": q.stride(0),
        "STRIDE_QH": q.stride(1),
        "STRIDE_KT": k.stride(0),
        "STRIDE_KH": k.stride(1),
        "STRIDE_VT": v.stride(0),
        "STRIDE_VH": v.stride(1),
        "H": H,
        "D": D,
        "H0": H0,
        "H1": H1,
        "D0": D0,
        "D1": value_block(D1),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_window_seqlens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    max_window: int = 64,
) -> None:
    """Rotate q and k, attend within each window, write to `out`; see the module docstring.

    On a CPU without Triton's interpreter this is `window_attention_ref`.

    Args:
        q, k, v: [T, H, D] views, last axis contiguous; D a multiple of 8 up to 128.
        cos, sin: fp32 [T, D/2], contiguous.
        cu_window_seqlens: int32 [W + 1] on the same device. Windows may be empty.
        scale: factor of the scores, positive.
        out: [T, H, D], contiguous, in the dtype of q or float8_e4m3fn. Rows from
            `cu_window_seqlens[-1]` on are left as they are.
        max_window: rows of the largest window, at most 256.

    Raises:
        ValueError: shapes, strides, the head dim or `max_window` are not as above.
        TypeError: a dtype is not as above.
    """
    check_tensors("window_attention", q, k, v, cu_window_seqlens, scale, out)
    T, H, D = q.shape
    if not 1 <= max_window <= MAX_WINDOW:
        raise ValueError(
            f"window_attention: max_window = {max_window} is outside 1..{MAX_WINDOW}; "
            "for longer segments rotate q and k, then use varlen_attention"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (T, D // 2) or not table.is_contiguous() or table.device != q.device:
            raise ValueError(
                f"window_attention: {name} must be contiguous [{T}, {D // 2}] on {q.device}; got "
                f"{tuple(table.shape)}, strides {table.stride()}, on {table.device}"
            )
    if use_reference(q):
        window_attention_ref(q, k, v, cos, sin, cu_window_seqlens, scale=scale, out=out)
        return
    if D > MAX_HEAD_DIM:
        raise ValueError(f"window_attention: head dim {D} is over the limit of {MAX_HEAD_DIM}")
    if q.dtype not in DTYPES or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(
            f"window_attention: q, k, v must be one of {', '.join(map(str, DTYPES))}, cos and sin "
            f"torch.float32; got {q.dtype}, {cos.dtype}, {sin.dtype}"
        )
    num_windows = cu_window_seqlens.shape[0] - 1
    if q.numel() == 0 or num_windows == 0:
        return
    if window_attention_hopper.can_run(q, k, v, max_window):
        window_attention_hopper.launch(q, k, v, cos, sin, cu_window_seqlens, out, scale)
        return
    config = launch_config(max_window, D, q.dtype)
    grid = (num_windows * (config.block_n // config.block_m) * H,)
    launch_kernel(
        _window_attention_kernel,
        grid,
        q,
        k,
        v,
        cos,
        sin,
        out,
        cu_window_seqlens,
        scale * LOG2E,
        **kernel_constants(q, k, v, config),
        **pdl_options(q),
        num_warps=config.num_warps,
    )


@torch.library.custom_op("vitgraph::window_attention", mutates_args=("out",))
def window_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_window_seqlens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_window: int,
) -> None:
    """`window_attention` as an operator that torch.compile can trace."""
    window_attention(
        q, k, v, cos, sin, cu_window_seqlens, scale=scale, out=out, max_window=max_window
    )


@window_attention_op.register_fake
def _(q, k, v, cos, sin, cu_window_seqlens, out, scale, max_window) -> None:
    return None
