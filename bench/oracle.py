"""What contenders are held against: the fp32 tower, and what Hugging Face's own loses to it.

The ratio is taken item by item and feature by feature, and the worst one counts: an error in one
small image of a batch must not drown in the others.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..kernels.testing import error_ratio
from .provider import Builder, Job, features_of
from .towers_config import hf_grid, hf_pixels


class Reference:
    """The oracle's features and those of Hugging Face's eager tower, and the items' token rows."""

    def __init__(
        self, oracle: list[torch.Tensor], eager: list[torch.Tensor], tokens: Sequence[int]
    ):
        self._oracle = oracle
        self._eager = eager
        self._tokens = list(tokens)

    def worst_ratio(self, features: Sequence[torch.Tensor]) -> float:
        """Largest error ratio over features and items; NaN if any is NaN.

        Raises:
            ValueError: another number of features, or other shapes.
        """
        shapes = [tuple(x.shape) for x in features]
        expected = [tuple(x.shape) for x in self._oracle]
        if shapes != expected:
            raise ValueError(f"features have shapes {shapes} instead of {expected}")
        ratios = [
            error_ratio(a, e, o)
            for actual, eager, oracle in zip(features, self._eager, self._oracle, strict=True)
            for a, e, o in zip(
                *(x.split(self._tokens) for x in (actual, eager, oracle)), strict=True
            )
        ]
        return math.nan if any(math.isnan(r) for r in ratios) else max(ratios)


def reference_of(oracle: Any, eager: Builder, job: Job, merge: int) -> Reference:
    """Run the fp32 `oracle`, with TF32 off, and the contender that loses what is allowed.

    Args:
        oracle: Hugging Face's tower in fp32.
        eager: Builder of its tower in the dtype of the contenders.
        job: What they encode.
        merge: Patches in a token.
    """
    with without_tf32(), torch.inference_mode():
        grid_thw = hf_grid(oracle, job.grid_thw)
        pixels = hf_pixels(oracle, job.pixel_values.float())
        exact = features_of(oracle(pixels, grid_thw=grid_thw))
    tokens = [t * h * w // merge for t, h, w in job.grids]
    return Reference(exact, eager(job).features(), tokens)


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 stays fp32 meanwhile; by default torch rounds the operands of convolutions to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
