"""Products that run beside other kernels, on few multiprocessors and for long.

A product whose result nobody waits for, such as a deepstack merger's, can run under kernels that
leave multiprocessors idle. Spread over all of them it is over sooner, but until then each of those
kernels finds some of its places taken. With few programs, which walk over the tiles one after
another, it stays on the multiprocessors that the others leave. That pays up to 256 rows of patches,
where the kernels of a block (of Qwen3-VL-8B) have no more than 108 programs: where they have one
for nearly every multiprocessor, a place that is taken costs each of them a second wave.

The kernel is that of gemm_hopper.py, and its results do not depend on the number of programs.

The tile, and the number of programs out of 10 to 24, are those of one NVIDIA H200 with Triton
3.6.0, 2026-11-23, by captured towers of Qwen3-VL-2B, 4B and 8B at 128, 224 and 256 rows of patches.
"""

import torch

from .gemm import hopper_reason, is_aligned
from .gemm_tuning import HopperConfig

MOST_ROWS = 64  # of x, each of four patches
TILE = HopperConfig(64, 64, num_stages=9)
PROGRAMS = 20


def suits_background(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether products of x [T, K] with `weights` [N, K] should run so if they run beside others.

    It depends on T, the dtype, the device and the alignment of rows alone.
    """
    if len(x) > MOST_ROWS or hopper_reason(x.device, x.dtype) or not is_aligned(x, *weights):
        return False
    return all(len(weight) % 8 == 0 for weight in weights)  # rows of an output are aligned as well
