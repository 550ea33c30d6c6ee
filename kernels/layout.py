"""Everything a packed batch needs to know about its grids, computed on the device in one launch.

    grid [I, 3] int32 (t, h, w) in patches, rows past the live items all zero
      -> cu_seqlens         [S + 1] int32   one segment a frame, or with `clips` an item; the tail
                                            repeats the last offset
         cu_window_seqlens  [W + 1] int32   one segment a window of the tower; same tail
         position           [T, 4] int32    (row, column, grid height, grid width) of each tower row
         source             [T] int32       pixel row that each tower row holds
         cos, sin           [T, D/2] fp32   axial rope: D/4 row angles, then D/4 column angles
         live               [5] int32       live patches, items, segments, windows, tokens
         tickets            [2] int32       zeros, for attention that draws its tiles

I, T, S and W are capacities; what is live is read from the table, so one launch recorded in a graph
serves every batch that fits. Pixel rows come in merge-block order: frame, block row, block column,
then row and column inside a `merge x merge` block. Tower rows have that order too, except with
windows: frame, window row, window column, then merge-block order inside the window; windows of
`window x window` patches are cut at the lower and right edge. Padding rows read as patch (0, 0) of
a 1 x 1 grid, with cos 1, sin 0 and themselves as source.

Each index is decoded in closed form; the item that holds it is found by counting the items that end
at or before it. Bound by latency: a few microseconds. Angles are fp32, as in Hugging Face's towers.
An ordinary launch, since kernels behind the next one read these tensors early (pdl.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import use_reference
from .launch import launch_kernel
from .pdl import first_options, let_next_start
from .roofline import Cost

# The kernel runs once in a forward, from cold caches, so what counts is how little code and work a
# program has: with 64 and 64 it took three times as long as with 32 and 32.
BLOCK = 32  # rows, frames or windows a program
BLOCK_I = 32  # items compared at once


@dataclass(frozen=True)
class Layout:
    """Device tensors that describe one packed batch; shapes in the module docstring."""

    cu_seqlens: torch.Tensor
    cu_window_seqlens: torch.Tensor
    position: torch.Tensor
    source: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    live: torch.Tensor
    tickets: torch.Tensor

    @property
    def live_rows(self) -> torch.Tensor:
        """Number of live patches, int32 [1] on the device."""
        return self.live[:1]

    @property
    def live_tokens(self) -> torch.Tensor:
        """Number of live tokens (merge blocks), int32 [1] on the device."""
        return self.live[4:]


def num_windows(h: int, w: int, window: int) -> int:
    """Windows of one h x w frame (in patches); 0 for a tower without windows."""
    return -(-h // window) * -(-w // window) if window else 0


def layout_ref(
    grid: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    num_rows: int,
    num_frames: int,
    num_windows: int,
    merge: int,
    window: int,
    clips: bool = False,
) -> Layout:
    """Plain PyTorch definition of `layout`, built item by item on the host.

    Angles are computed in the dtype of `inv_freq`, so that fp64 gives the oracle.
    """
    grids = [g for g in grid.tolist() if g[0] > 0]
    segment_sizes: list[int] = []
    window_sizes: list[int] = []
    positions, sources, start = [], [], 0
    for t, h, w in grids:
        frame = torch.arange(h * w).view(h // merge, w // merge, merge, merge).transpose(1, 2)
        pixel_row = frame.reshape(h, w)  # pixel row of each patch of a frame
        tiles = [pixel_row]
        if window:
            tiles = [c for r in pixel_row.split(window) for c in r.split(window, dim=1)]
        order = torch.cat([_merge_block_order(tile, merge) for tile in tiles])
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        place = torch.empty(h * w, 2, dtype=torch.long)
        place[pixel_row.flatten()] = torch.stack([row, column], -1).view(-1, 2)
        for _ in range(t):
            shape = torch.tensor([h, w]).expand(h * w, 2)
            positions.append(torch.cat([place[order], shape], 1))
            sources.append(order + start)
            window_sizes.extend(tile.numel() for tile in tiles if window)
            start += h * w
        segment_sizes += [t * h * w] if clips else [h * w] * t
    padding = num_rows - start
    positions.append(torch.tensor([[0, 0, 1, 1]]).expand(padding, 4))
    sources.append(torch.arange(start, num_rows))
    position = torch.cat(positions).int()
    angle = (position[:, :2, None].to(inv_freq.dtype) * inv_freq.cpu()).flatten(1)
    live = [start, len(grids), len(segment_sizes), len(window_sizes), start // merge**2]
    device = grid.device
    return Layout(
        _offsets(segment_sizes, num_frames).to(device),
        _offsets(window_sizes, num_windows).to(device),
        position.to(device),
        torch.cat(sources).int().to(device),
        angle.cos().to(device),
        angle.sin().to(device),
        torch.tensor(live, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )


def _merge_block_order(tile: torch.Tensor, merge: int) -> torch.Tensor:
    h, w = tile.shape
    return tile.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()


def _offsets(sizes: list[int], capacity: int) -> torch.Tensor:
    padded = torch.tensor([0, *sizes] + [0] * (capacity - len(sizes)))
    return padded.cumsum(0).int()


def cost(num_rows: int, head_dim: int) -> Cost:
    """Bytes written for each row: position, source, cos and sin."""
    return Cost(flops=num_rows * head_dim, bytes=num_rows * (20 + 4 * head_dim))


@triton.jit
def find_item(
    index, grid_ptr, num_items, KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Item that holds each index, its first index, its first row, and how many indices live.

    KIND says what is counted: 0 rows, 1 frames, 2 windows, 3 items, 4 rows of one frame an item.
    """
    item = tl.zeros_like(index)
    first = tl.zeros_like(index)
    first_row = tl.zeros_like(index)
    total = tl.sum(tl.zeros_like(index), axis=0)
    for i0 in range(0, num_items, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        inside = i < num_items
        t = tl.load(grid_ptr + 3 * i, mask=inside, other=0)
        h = tl.load(grid_ptr + 3 * i + 1, mask=inside, other=0)
        w = tl.load(grid_ptr + 3 * i + 2, mask=inside, other=0)
        rows = t * h * w
        if KIND == 0:
            size = rows
        elif KIND == 1:
            size = t
        elif KIND == 3:
            size = (t > 0).to(tl.int32)
        elif KIND == 4:
            size = h * w
        else:
            size = t * ((h + WINDOW - 1) // WINDOW) * ((w + WINDOW - 1) // WINDOW)
        end = total + tl.cumsum(size, axis=0)
        before = (end[None, :] <= index[:, None]) & inside[None, :]
        item += tl.sum(before.to(tl.int32), axis=1)
        first += tl.sum(tl.where(before, size[None, :], 0), axis=1)
        first_row += tl.sum(tl.where(before, rows[None, :], 0), axis=1)
        total += tl.sum(size, axis=0)
    return item, first, first_row, total


@triton.jit
def _load_grid(grid_ptr, item, live):
    # padding reads as a 1 x 1 grid: nothing divides by zero
    h = tl.load(grid_ptr + 3 * item + 1, mask=live, other=1)
    w = tl.load(grid_ptr + 3 * item + 2, mask=live, other=1)
    return h, w


@triton.jit
def _rows(
    r, grid_ptr, inv_freq_ptr, position_ptr, source_ptr, cos_ptr, sin_ptr, num_rows, num_items,
    MERGE: tl.constexpr, WINDOW: tl.constexpr, HALF: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    item, first, _, total = find_item(r, grid_ptr, num_items, 0, WINDOW, BLOCK_I)
    live = r < total
    h, w = _load_grid(grid_ptr, item, live)
    frame = (r - first) // (h * w)
    rest = (r - first) % (h * w)
    # the part of the frame that is laid out in merge-block order: the window, or all of it
    top = tl.zeros_like(r)
    left = tl.zeros_like(r)
    tile_w = w
    if WINDOW > 0:
        top = rest // (WINDOW * w) * WINDOW
        rest -= top * w
        tile_h = tl.minimum(WINDOW, h - top)
        left = rest // (tile_h * WINDOW) * WINDOW
        rest -= left * tile_h
        tile_w = tl.minimum(WINDOW, w - left)
    block = rest // (MERGE * MERGE)
    within = rest % (MERGE * MERGE)
    blocks_w = tl.maximum(tile_w // MERGE, 1)
    row = top + block // blocks_w * MERGE + within // MERGE
    column = left + block % blocks_w * MERGE + within % MERGE
    pixel_block = (row // MERGE) * (w // MERGE) + column // MERGE
    source = first + frame * h * w + pixel_block * (MERGE * MERGE) + within

    mask = r < num_rows
    zero = tl.zeros_like(r)
    row = tl.where(live, row, zero)
    column = tl.where(live, column, zero)
    tl.store(position_ptr + 4 * r, row, mask=mask)
    tl.store(position_ptr + 4 * r + 1, column, mask=mask)
    tl.store(position_ptr + 4 * r + 2, h, mask=mask)
    tl.store(position_ptr + 4 * r + 3, w, mask=mask)
    tl.store(source_ptr + r, tl.where(live, source, r), mask=mask)

    j = tl.arange(0, BLOCK_HALF)
    in_half = j < HALF
    freq = tl.load(inv_freq_ptr + j % (HALF // 2), mask=in_half, other=0.0)
    place = tl.where((j < HALF // 2)[None, :], row[:, None], column[:, None]).to(tl.float32)
    angle = place * freq[None, :]
    offset = r[:, None].to(tl.int64) * HALF + j[None, :]
    mask2 = mask[:, None] & in_half[None, :]
    tl.store(cos_ptr + offset, tl.cos(angle), mask=mask2)
    tl.store(sin_ptr + offset, tl.sin(angle), mask=mask2)


# one compilation for all sizes
@triton.jit(do_not_specialize=["num_items", "num_rows", "num_frames", "num_windows"])
def _layout_kernel(
    grid_ptr,  # [I, 3]
    inv_freq_ptr,  # [HALF / 2]
    cu_seqlens_ptr,  # [S + 1]
    cu_window_seqlens_ptr,  # [W + 1]
    position_ptr,  # [T, 4]
    source_ptr,  # [T]
    cos_ptr,  # [T, HALF]
    sin_ptr,  # [T, HALF]
    live_ptr,  # [5]
    tickets_ptr,  # [2]
    num_items, num_rows, num_frames, num_windows,
    MERGE: tl.constexpr, WINDOW: tl.constexpr, CLIPS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    pid = tl.program_id(0)
    row_programs = tl.cdiv(num_rows, BLOCK)
    frame_programs = tl.cdiv(num_frames + 1, BLOCK)
    lanes = tl.arange(0, BLOCK)
    if pid < row_programs:
        _rows(
            pid * BLOCK + lanes, grid_ptr, inv_freq_ptr, position_ptr, source_ptr, cos_ptr, sin_ptr,
            num_rows, num_items, MERGE, WINDOW, HALF, BLOCK_I, BLOCK_HALF,
        )  # fmt: skip
    elif pid < row_programs + frame_programs:
        s = (pid - row_programs) * BLOCK + lanes
        kind: tl.constexpr = 3 if CLIPS else 1
        item, first, first_row, total = find_item(s, grid_ptr, num_items, kind, WINDOW, BLOCK_I)
        h, w = _load_grid(grid_ptr, item, s < total)
        # past the last segment every item ends before s, so first_row is the number of live rows
        start = tl.where(s < total, first_row + (s - first) * h * w, first_row)
        tl.store(cu_seqlens_ptr + s, start, mask=s <= num_frames)
        if pid == row_programs:
            items = 0
            windows = 0
            rows = 0
            for i0 in range(0, num_items, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I)
                t = tl.load(grid_ptr + 3 * i, mask=i < num_items, other=0)
                h = tl.load(grid_ptr + 3 * i + 1, mask=i < num_items, other=0)
                w = tl.load(grid_ptr + 3 * i + 2, mask=i < num_items, other=0)
                rows += tl.sum(t * h * w, axis=0)
                items += tl.sum((t > 0).to(tl.int32), axis=0)
                if WINDOW > 0:
                    per_frame = ((h + WINDOW - 1) // WINDOW) * ((w + WINDOW - 1) // WINDOW)
                    windows += tl.sum(t * per_frame, axis=0)
            tl.store(live_ptr, rows)
            tl.store(live_ptr + 1, items)
            tl.store(live_ptr + 2, total)
            tl.store(live_ptr + 3, windows)
            tl.store(live_ptr + 4, rows // (MERGE * MERGE))
            tl.store(tickets_ptr, 0)
            tl.store(tickets_ptr + 1, 0)
    else:
        if WINDOW > 0:
            k = (pid - row_programs - frame_programs) * BLOCK + lanes
            item, first, first_row, total = find_item(k, grid_ptr, num_items, 2, WINDOW, BLOCK_I)
            h, w = _load_grid(grid_ptr, item, k < total)
            windows_w = (w + WINDOW - 1) // WINDOW
            per_frame = ((h + WINDOW - 1) // WINDOW) * windows_w
            frame = (k - first) // per_frame
            rest = (k - first) % per_frame
            top = rest // windows_w * WINDOW
            left = rest % windows_w * WINDOW
            start = frame * h * w + top * w + left * tl.minimum(WINDOW, h - top)
            start = tl.where(k < total, first_row + start, first_row)
            tl.store(cu_window_seqlens_ptr + k, start, mask=k <= num_windows)


def layout(
    grid: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    num_rows: int,
    num_frames: int,
    num_windows: int,
    merge: int,
    window: int = 0,
    clips: bool = False,
) -> Layout:
    """Describe the batch in `grid`; see the module docstring.

    Args:
        grid: [I, 3] int32 contiguous. Its totals must fit the capacities below; the caller checks
            that on the host, where the grids come from.
        inv_freq: [D/4] fp32 rope frequencies.
        num_rows, num_frames, num_windows: capacities T, S, W.
        merge: patches along a side of a merge block.
        window: patches along a side of a window, 0 for none; a multiple of `merge`.
        clips: one segment an item instead of one a frame; `num_frames` counts segments.

    Raises:
        ValueError: `grid` is not a contiguous int32 [I, 3], or `window` not a multiple of `merge`.
    """
    if (
        grid.ndim != 2
        or grid.shape[1] != 3
        or grid.dtype != torch.int32
        or not grid.is_contiguous()
    ):
        raise ValueError(
            f"layout: grid must be contiguous int32 [items, 3], got {grid.dtype} "
            f"{tuple(grid.shape)} with strides {grid.stride()}"
        )
    if window % merge:
        raise ValueError(f"layout: window = {window} is not a multiple of merge = {merge}")
    capacities = {"num_rows": num_rows, "num_frames": num_frames, "num_windows": num_windows}
    if use_reference(grid):
        return layout_ref(grid, inv_freq, **capacities, merge=merge, window=window, clips=clips)
    half = 2 * inv_freq.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=grid.device)

    out = Layout(
        empty(num_frames + 1),
        empty(num_windows + 1),
        empty(num_rows, 4),
        empty(num_rows),
        empty(num_rows, half, dtype=torch.float32),
        empty(num_rows, half, dtype=torch.float32),
        empty(5),
        empty(2),
    )
    programs = triton.cdiv(num_rows, BLOCK) + triton.cdiv(num_frames + 1, BLOCK)
    if window:
        programs += triton.cdiv(num_windows + 1, BLOCK)
    constants = {
        "MERGE": merge,
        "WINDOW": window,
        "CLIPS": clips,
        "HALF": half,
        "BLOCK": BLOCK,
        "BLOCK_I": BLOCK_I,
        "BLOCK_HALF": triton.next_power_of_2(half),
        **first_options(out.position),
    }
    launch_kernel(
        _layout_kernel, (programs,),
        grid, inv_freq, out.cu_seqlens, out.cu_window_seqlens, out.position, out.source,
        out.cos, out.sin, out.live, out.tickets, grid.shape[0], num_rows, num_frames, num_windows,
        **constants,
    )  # fmt: skip
    return out
