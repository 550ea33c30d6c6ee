"""What attention writes and `proj` reads: in the tower's dtype, or in fp8 where a block fits it."""

from collections.abc import Sequence

import torch

from ..kernels.quantize import FP8, FP8_MAX
from ..kernels.zero_padding import ZeroedPadding
from .fp8 import Fp8Block


class Attended:
    """Buffers [T, H, D] of one forward, shared by all blocks.

    Attention writes live rows only, and products read further, so `padding` zeroes the others.
    """

    def __init__(
        self,
        x: torch.Tensor,
        shape: tuple[int, int, int],
        blocks: Sequence[Fp8Block],
        padding: ZeroedPadding,
    ):
        """Buffers of `shape` on the device of x, in its dtype and as `blocks` need them."""
        self._wide = padding.of(x.new_empty(shape))
        fits = any(block.fits for block in blocks)
        self._fp8 = padding.of(x.new_empty(shape if fits else 0, dtype=FP8))

    def target(self, in_fp8: Fp8Block, *, casts: bool) -> torch.Tensor:
        """What the attention of this block has to write, which `casts` to fp8 by itself or not."""
        return self._fp8 if in_fp8.fits and casts else self._wide

    def rows(self, in_fp8: Fp8Block, *, casts: bool) -> torch.Tensor:
        """[T, H * D], what `proj` of this block reads, once `target` is written."""
        if in_fp8.fits and not casts:
            # not every release of PyTorch saturates, as our kernels do
            self._fp8.copy_(self._wide.clamp_(-FP8_MAX, FP8_MAX))
        return (self._fp8 if in_fp8.fits else self._wide).flatten(1)
