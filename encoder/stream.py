"""The residual stream of one forward, and what it may still lack.

Some products do not add to the stream: those in fp8 cannot, and those of few rows are cut along K
into parts (gemm_few_rows.py). Their results wait in buffers until the stream is read next, by the
kernel of a norm as a rule, which adds them on the way.
"""

import torch

from ..kernels.gemm_few_rows import choose_partials, linear_partials
from ..kernels.linear import linear
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.norm import norm
from ..kernels.norm_fp8 import norm_fp8
from ..kernels.quantize import FP8, quantize_rows
from ..kernels.residual import residual
from .fp8 import Fp8Layer, TowerSpec

# weight, bias, and the offset that the stream lacks there
NormWeights = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Stream:
    """The stream [T, D] and its readers and writers, in the order of the forward.

    Products run over all rows; those past the live ones are zero before each, or finite, so that
    they are finite after it.
    """

    def __init__(self, x: torch.Tensor, live_rows: torch.Tensor, *, in_fp8: bool):
        """`x` is updated in place; with `in_fp8`, some products and norms are those in fp8."""
        self._x = x
        self._live = live_rows
        self._in_fp8 = in_fp8
        # what is lacking: the product in fp8, or the sums of parts; never both
        self._product: torch.Tensor | None = None
        self._is_pending = False
        self._partials: torch.Tensor | None = None
        self._buffers: dict[int, torch.Tensor] = {}  # of partial sums, by number of parts
        self._quantized: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def settled(self) -> torch.Tensor:
        """The stream, with nothing lacking."""
        if self._is_pending and self._product is not None:
            self._x.add_(self._product)
            self._is_pending = False
        if self._partials is not None:
            partials = self._take_partials()
            residual(self._x, None, live_rows=self._live, partials=partials, out=self._x)
        return self._x

    def norm(
        self,
        weights: NormWeights,
        spec: TowerSpec,
        *,
        joined: int = 1,
        destination: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Norm of the stream, read as [T / joined, joined * D]; `destination` as in the kernel."""
        if self._is_pending:
            self.settled()
        partials = self._take_partials()
        x = self._x.view(len(self._x) // joined, -1)
        if partials is not None:
            partials = partials.view(-1, *x.shape)
        weight, bias, offset = weights
        return norm(
            x, weight, bias, spec.eps, kind=spec.norm, offset=offset, destination=destination,
            live_rows=self._live, live_group=joined, partials=partials, out=out,
        )  # fmt: skip

    def state(self, offset: torch.Tensor | None, out: torch.Tensor) -> None:
        """`out` = stream + offset, with zeros in the padding rows."""
        if self._is_pending:
            self.settled()
        partials = self._take_partials()
        residual(self._x, offset, live_rows=self._live, partials=partials, out=out)

    def add_linear(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Stream += rows @ weight.T."""
        x = self.settled()
        config = None
        if not self._in_fp8:
            config = choose_partials(len(rows), weight)
        if config is None:
            linear(rows, weight, residual=x, live_rows=self._live)
            return
        shape = config.splits, *x.shape
        if config.splits not in self._buffers:
            self._buffers[config.splits] = x.new_empty(shape, dtype=torch.float32)
        self._partials = linear_partials(
            rows, weight, config=config, live_rows=self._live, out=self._buffers[config.splits]
        )

    def norm_linear_fp8(
        self,
        weights: NormWeights,
        layer: Fp8Layer,
        bias: torch.Tensor | None,
        spec: TowerSpec,
        out: torch.Tensor,
    ) -> None:
        """`out` = layer(norm(stream))."""
        weight, norm_bias, offset = weights
        q, scale = norm_fp8(
            self._x, self._product if self._is_pending else None, weight, norm_bias, spec.eps,
            kind=spec.norm, offset=offset, live_rows=self._live, out=self._rows(self._x.shape[1]),
        )  # fmt: skip
        self._is_pending = False
        linear_fp8(q, scale, layer.weight, layer.scale, bias, out=out)

    def add_linear_fp8(
        self, rows: torch.Tensor, layer: Fp8Layer, transform: str | None = None
    ) -> None:
        """Stream += layer(f(rows)), without a bias; see `quantize_rows` for f."""
        x = self.settled()
        if self._product is None:
            self._product = torch.empty_like(x)
        buffer = self._rows(layer.weight.shape[1])
        q, scale = quantize_rows(rows, transform, self._live, out=buffer)
        linear_fp8(q, scale, layer.weight, layer.scale, out=self._product)
        self._is_pending = True

    def _take_partials(self) -> torch.Tensor | None:
        partials, self._partials = self._partials, None
        return partials

    def _rows(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantised rows of one width; each is read by the product that follows, then free."""
        if width not in self._quantized:
            rows = self._x.shape[0]
            self._quantized[width] = (
                self._x.new_empty((rows, width), dtype=FP8),
                self._x.new_empty(rows, dtype=torch.float32),
            )
        return self._quantized[width]
