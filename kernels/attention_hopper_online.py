"""Rows of q whose scores outgrew the maximum that attention_hopper_kernel.py holds, once more.

    p[j] = exp2(s[j] - m)      l = sum_j p[j]      out = sum_j p[j] v[j] / l

for any m, as long as nothing overflows. A running maximum keeps p below 1, and is a quarter of the
instructions of a step. So m is held instead: the maximum of a row over the segment's last keys, as
many as a step has (half of them, and a step of its first keys, where the last step is a short one).
p may then grow, which costs no precision in fp32 and bf16, whose exponents reach 2**127, and a tile
is done when l shows that no p came near. If l outgrew that, or is no number, the group attends
again by itself, with a running maximum and a copy of k and v of its own. That takes several times
as long, and happens only where scores rise by some 44 (in nats) past those of these keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .attention_hopper_steps import (
    load_boxes,
    partial_sums,
    row_max,
    scale_rows,
    start_scores,
    start_values,
    wait_values,
)
from .attention_schedule import barrier

# of l: the sums of p times v, which are fp32 too, overflow only where a v passes 2**63
_MOST = gl.constexpr(2.0**64)


@gluon.jit
def has_outgrown(sums, num_rows):
    """Whether one of the first `num_rows` of the sums [R] is 2**64 or more, or NaN."""
    rows = gl.arange(0, sums.shape[0], layout=sums.type.layout)
    is_kept = (sums < _MOST) | (rows >= num_rows)
    return gl.min(is_kept.to(gl.int32), 0) == 0


@gluon.jit
def attend_online(
    q0, q1, k0, k1, v0, v1, begin, end, head, scale_log2, acc, acc1, sums,
    part0, part1, part_full, S_LAYOUT: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Sums of p times v and of p over rows begin..end of k and v, one step or more of them.

    k and v take turns in the group's place of `part0` and `part1`; `part_full` completes an even
    number of phases.
    """
    BLOCK_N: gl.constexpr = part0.shape[1]
    D0: gl.constexpr = part0.shape[3]
    D1: gl.constexpr = part1.shape[3] if SPLIT else 0
    SUM_LAYOUT: gl.constexpr = sums.type.layout.parent
    M_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    arrived = part_full.index(GROUP)
    cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    acc = gl.zeros_like(acc)
    acc1 = gl.zeros_like(acc1)
    l = gl.zeros([sums.shape[0], 8], gl.float32, SUM_LAYOUT)
    m = gl.full([sums.shape[0]], float("-inf"), gl.float32, M_LAYOUT)
    last = end - BLOCK_N
    for row in range(begin, end, BLOCK_N):
        # the last step ends at the last row, and masks what other steps cover
        start = gl.minimum(row, last)
        mbarrier.expect(arrived, BLOCK_N * (D0 + D1) * 2)
        load_boxes(k0, k1, start, head, arrived, part0, part1, GROUP, SPLIT)
        mbarrier.wait(arrived, 0)
        scores = start_scores(q0, q1, part0, part1, GROUP, S_LAYOUT, BLOCK_N, SPLIT)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        barrier()  # all warps are done with k
        mbarrier.expect(arrived, BLOCK_N * (D0 + D1) * 2)
        load_boxes(v0, v1, start, head, arrived, part0, part1, GROUP, SPLIT)
        scores = gl.where((cols >= row - start)[None, :], scores, float("-inf"))
        m_new = gl.maximum(m, row_max(scores) * scale_log2)
        p = gl.exp2(scores * scale_log2 - m_new[:, None])
        alpha = gl.exp2(m - m_new)
        m = m_new
        l *= gl.convert_layout(alpha, gl.SliceLayout(1, SUM_LAYOUT), assert_trivial=True)[:, None]
        l += partial_sums(p, SUM_LAYOUT)
        acc, acc1 = scale_rows(acc, acc1, alpha, SPLIT)
        mbarrier.wait(arrived, 1)
        p = p.to(part0.dtype)
        acc, acc1, _p0 = start_values(p, part0, part1, GROUP, acc, acc1, BLOCK_N, SPLIT)
        acc, acc1 = wait_values(acc, acc1, SPLIT)
        barrier()  # all warps are done with v
    return acc, acc1, gl.sum(l, 1)
