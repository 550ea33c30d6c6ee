"""The attention of window_attention.py for compute capability 9.0, in windows of up to 64 rows.

A program takes one head of one window, and is one chain: loads, rotation, scores, softmax, values,
store. So all of its rows of q, k and v are asked for at once, by TMA, and wait in shared memory for
their turn instead of in registers; that leaves room for four or five programs on a multiprocessor.
Angles, which the layout wrote, are asked for before the kernel in front has ended (pdl.py). Half a
head comes in one or two blocks of columns (40 is 32 + 16, of which TMA reads the next half or
zeros, and angles of zero remove all that is finite), so that the halves that a rotation joins lie
in the same registers. k is rotated in place, q on its way into the registers that the product
reads.

Programs that start early fill the multiprocessors that the kernel in front leaves idle, as many on
each as it holds, though all others are about to be free. So where two on each are enough for all,
a program takes so much shared memory (`room`) that no third one fits beside it: with 64 programs
behind a product of 120 that is 7 per cent of the whole tower (Qwen2.5-VL at 256 rows).

Written in Gluon (window_attention_hopper_kernel.py), which has no interpreter.
"""

from typing import Any

import torch

from .attention_hopper import LOG2E, SHARED_BYTES, box, split_head_dim, unusable_reason
from .launch import launch_kernel
from .pdl import starts_early
from .rows import num_sms

MAX_WINDOW = 64  # rows of q that a group of four warps multiplies
_SPREAD = 2  # programs on a multiprocessor, where that is enough for all


def room(head_dim: int) -> int:
    """KiB of shared memory beside its own that leave room for `_SPREAD` programs."""
    halves, whole = split_head_dim(head_dim // 2), split_head_dim(head_dim)
    used = MAX_WINDOW * (2 * 2 * sum(halves) + sum(whole)) * 2
    return max(0, (SHARED_BYTES // (_SPREAD + 1) - used >> 10) + 1)


def can_run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_window: int) -> bool:
    """Whether `launch` can run there; rows, heads and their halves start at multiples of 16 bytes.

    TMA stops with an illegal instruction where a box does not (heads of 72, whose halves are 36).
    """
    if max_window > MAX_WINDOW or q.shape[2] % 16:
        return False
    if unusable_reason(q.device, q.shape[2], q.dtype):
        return False
    return not any(x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8 for x in (q, k, v))


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_window_seqlens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Launch on operands that `window_attention` has checked and `can_run` accepts."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .window_attention_hopper_kernel import window_attention_hopper_kernel

    num_heads, head_dim = q.shape[1:]

    def boxes(x: torch.Tensor, widths: tuple[int, int]) -> list[Any]:
        return [TensorDescriptor.from_tensor(x, *box(MAX_WINDOW, w)) if w else None for w in widths]

    halves = split_head_dim(head_dim // 2)
    programs = (cu_window_seqlens.shape[0] - 1) * num_heads
    spreads = starts_early(q) and programs <= _SPREAD * num_sms(q.device)
    launch_kernel(
        window_attention_hopper_kernel,
        (programs,),
        *boxes(q, halves), *boxes(k, halves), *boxes(v, split_head_dim(head_dim)),
        cos, sin, out, cu_window_seqlens, scale * LOG2E,
        D=head_dim, HEADS=num_heads, ROOM=room(head_dim) if spreads else 0,
        num_warps=4, launch_pdl=starts_early(q),
    )  # fmt: skip
