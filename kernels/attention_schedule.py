"""Which tile a program of attention_hopper_kernel.py computes next.

The tiles of all segments are one list, (segment, head, rows of q), that every program walks along
by itself. Which of them are its own is known beforehand, or drawn from a counter in global memory:
then the warp that loads draws, and posts each number to the groups of warps that compute.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_tiles import barrier


@gluon.jit
def walk(cu_ptr, tile, segment, first, begin, end, last, HEADS: gl.constexpr, ROWS_Q: gl.constexpr):
    """Go on to the segment that owns `tile`.

    `first` is the number of tiles before `segment`, whose rows are begin..end. Past the last tile
    the walk ends where only empty segments are left, and `tile` is not below first + count.
    """
    count = gl.cdiv(end - begin, ROWS_Q) * HEADS
    while (tile >= first + count) & (end < last):
        first += count
        segment += 1
        begin = end
        end = gl.load(cu_ptr + segment + 1)
        count = gl.cdiv(end - begin, ROWS_Q) * HEADS
    return segment, first, begin, end, count


@gluon.jit
def next_tile(tile, lap, tickets_ptr, mail, mail_empty, mail_full):
    """The producer's next tile, which it posts to the groups where tiles are drawn."""
    following = tile + gl.num_programs(0)
    if tickets_ptr is not None:
        following = gl.num_programs(0) + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
        slot = lap % 2
        mbarrier.wait(mail_empty.index(slot), ((lap // 2) & 1) ^ 1)
        MAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        mail.index(slot).store(gl.full([1], following, gl.int32, MAIL_LAYOUT))
        mbarrier.arrive(mail_full.index(slot))
    return following


@gluon.jit
def posted_tile(tile, lap, tickets_ptr, mail, mail_empty, mail_full, NUM_WARPS: gl.constexpr):
    """What `next_tile` gave the producer, read by a group."""
    following = tile + gl.num_programs(0)
    if tickets_ptr is not None:
        slot = lap % 2
        mbarrier.wait(mail_full.index(slot), (lap // 2) & 1)
        MAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        following = gl.max(mail.index(slot).load(MAIL_LAYOUT), 0)
        barrier()  # all warps of the group have read
        mbarrier.arrive(mail_empty.index(slot))
    return following


@gluon.jit
def return_tickets(tickets_ptr):
    """The last program to have drawn all its tiles leaves the tickets as it found them."""
    if tickets_ptr is not None:
        ended = gl.atomic_add(tickets_ptr + 1, 1)
        if ended == gl.num_programs(0) - 1:
            gl.store(tickets_ptr, 0)
            gl.store(tickets_ptr + 1, 0)
