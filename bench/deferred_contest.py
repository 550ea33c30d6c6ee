"""Products before and behind a norm that takes no kernel, against the definition of all three."""

import torch

from ..kernels.deferred_norm import DeferredNorm, ScaledRows, add_linear_scaled, linear_of_scaled
from ..kernels.few_rows_tuning import DeferredTiles
from ..kernels.gemm import gemm_ref
from ..kernels.norm import norm_ref
from ..kernels.testing import error_ratio
from .tune_contest import LinearOperands, worst


class DeferredOperands:
    """The operands of `proj` and `up`, and of the norm between them, whose stream has an offset."""

    def __init__(self, first: LinearOperands, second: LinearOperands, kind: str, eps: float):
        """`kind` and `eps` are those of norm.py."""
        self._first, self._second = first, second
        x, weight = first.xs[0], second.weights[0]
        generator = torch.Generator(x.device).manual_seed(1)

        def draw(mean: float) -> torch.Tensor:
            noise = torch.randn(weight.shape[1], device=x.device, generator=generator)
            return (mean + 0.1 * noise).to(x.dtype)

        self._gain, self._offset = draw(1.0), draw(0.0).float()
        self._shift = draw(0.0) if kind == "layer" else None
        self._norm = DeferredNorm.of(kind, eps, self._gain, self._shift, weight, second.bias)

    def check(self, tiles: DeferredTiles) -> float:
        """The worst error ratio of stream and output, all rows live and three in five."""
        M = len(self._first.xs[0])
        return worst([self._error(tiles, live) for live in (M, -(-3 * M // 5))])

    def _error(self, tiles: DeferredTiles, live: int) -> float:
        first, second = self._first, self._second
        x, w1, w2 = first.xs[0], first.weights[0], second.weights[0]
        live_rows = torch.full_like(first.live, live)
        stream, out = first.outs[0].clone(), torch.full_like(second.outs[0], float("nan"))
        scaled = ScaledRows.over(torch.full_like(stream, float("nan")))
        add_linear_scaled(
            x, w1, stream, self._norm, self._offset,
            out=scaled, live_rows=live_rows, config=tiles[0],
        )  # fmt: skip
        linear_of_scaled(
            scaled, w2, self._norm,
            activation=second.activation, is_gated=second.is_gated,
            out=out, live_rows=live_rows, config=tiles[1],
        )  # fmt: skip
        eager, oracle = (self._definition(kind, live) for kind in (x.dtype, torch.float64))
        found = stream[:live], out[:live]
        return worst([error_ratio(*three) for three in zip(found, eager, oracle, strict=True)])

    def _definition(self, dtype: torch.dtype, live: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self._first, self._second
        x, before, w1 = (t.to(dtype) for t in (first.xs[0], first.outs[0], first.weights[0]))
        stream = gemm_ref(x[:live], w1, residual=before[:live])
        shift = None if self._shift is None else self._shift.to(dtype)
        normed = norm_ref(
            stream, self._gain.to(dtype), shift, self._norm.eps,
            kind=self._norm.kind, offset=self._offset.to(dtype),
        )  # fmt: skip
        weight = second.weights[0]
        return stream, second.definition(normed, weight, second.outs[0], dtype, slice(0, live))
