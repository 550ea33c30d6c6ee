"""The residual stream of one forward, and what it may still lack.

Some products do not add to the stream: those of few rows are cut along K into parts
(gemm_few_rows.py), whose sums wait in a buffer until the stream is read next, by the kernel of a
norm as a rule, which adds them on the way.
"""

import torch

from ..kernels.aligned_rows import aligned_rows
from ..kernels.deferred_norm import DeferredNorm, ScaledRows, add_linear_scaled
from ..kernels.few_rows_tuning import FewRowsConfig
from ..kernels.gemm_few_rows import choose_partials, linear_partials
from ..kernels.linear import linear
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.norm import norm
from ..kernels.norm_fp8 import norm_fp8
from ..kernels.quantize import FP8, Bounds, quantize_rows
from ..kernels.residual import residual
from ..kernels.rotary_linear import Rotation
from ..kernels.zero_padding import ZeroedPadding
from .fp8 import Fp8Layer, TowerSpec, bounded_mlp, bounds_of

# weight, bias, and the offset that the stream lacks there
NormWeights = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Stream:
    """The stream [T, D] and its readers and writers, in the order of the forward.

    Products may run over all rows; those past the live ones are zero before each, or finite, so
    that they are finite after it.
    """

    def __init__(self, x: torch.Tensor, live_rows: torch.Tensor, *, in_fp8: bool):
        """`x` is updated in place; with `in_fp8`, products are not cut into parts."""
        self._x = x
        self._live = live_rows
        self._in_fp8 = in_fp8
        self._partials: torch.Tensor | None = None  # what is lacking
        self._is_read = False  # by a norm, since it was last written otherwise
        self._buffers: dict[int, torch.Tensor] = {}  # of partial sums, by number of parts
        # of quantised rows, by width and whether a product writes them: those are apart, since it
        # reads others meanwhile. Each is read by the product that follows, then free.
        self._quantized: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        # scales of rows that are fp8 as they are
        self._ones = x.new_ones(len(x) if in_fp8 else 0, dtype=torch.float32)

    def settled(self) -> torch.Tensor:
        """The stream, with nothing lacking."""
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
        state: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Norm of the stream, read as [T / joined, joined * D]; the others as in the kernel."""
        partials = self._take_partials()
        self._is_read = True
        x = self._x.view(len(self._x) // joined, -1)
        if partials is not None:
            partials = partials.view(-1, *x.shape)
        weight, bias, offset = weights
        return norm(
            x, weight, bias, spec.eps, kind=spec.norm, offset=offset, destination=destination,
            live_rows=self._live, live_group=joined, partials=partials, state=state, out=out,
        )  # fmt: skip

    def state(self, offset: torch.Tensor | None, out: torch.Tensor) -> None:
        """`out` = stream + offset, with zeros in the padding rows."""
        partials = self._take_partials()
        residual(self._x, offset, live_rows=self._live, partials=partials, out=out)

    def add_linear(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Stream += rows @ weight.T."""
        x = self.settled()
        self._is_read = False
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

    def add_linear_scaled(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        norm: DeferredNorm,
        offset: torch.Tensor | None,
        config: FewRowsConfig,
        out: ScaledRows,
    ) -> None:
        """Stream += rows @ weight.T, and `out` for the norm that follows.

        The kernel just before must not write the stream (`deferred_norm.add_linear_scaled`). So a
        norm comes between, which completes it, and behind that whatever makes `rows` of the norm.

        Raises:
            RuntimeError: no norm has read the stream since something was added to it.
        """
        if not self._is_read:
            raise RuntimeError(
                "the stream was written and not read since; let a norm read it first"
            )
        self._is_read = False
        add_linear_scaled(
            rows, weight, self._x, norm, offset, out=out, live_rows=self._live, config=config
        )

    def norm_linear_fp8(
        self,
        weights: NormWeights,
        layer: Fp8Layer,
        bias: torch.Tensor | None,
        spec: TowerSpec,
        out: torch.Tensor,
        transform: str | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """`out` = f(layer(norm(stream))); see linear_fp8.py for f and `rotation`."""
        q, scale = self._norm_fp8(weights, spec)
        linear_fp8(
            q, scale, layer.weight, layer.scale, bias,
            transform=transform, rotation=rotation, out=out, live_rows=self._live,
        )  # fmt: skip

    def norm_mlp_fp8(
        self,
        weights: NormWeights,
        up: Fp8Layer,
        bias: torch.Tensor | None,
        down: Fp8Layer,
        spec: TowerSpec,
        activation: str,
    ) -> None:
        """Stream += down(f(up(norm(stream)))), without the bias of `down`."""
        hidden, bound = self._rows(down.weight.shape[1], hidden=True)
        q, scale = self._norm_fp8(weights, spec, bounds_of(up, bound))
        bounded_mlp(
            (q, scale), up, bias, down, activation, self._live, (hidden, bound), residual=self._x
        )

    def add_linear_fp8(self, rows: torch.Tensor, layer: Fp8Layer) -> None:
        """Stream += layer(rows), without a bias; rows that are not fp8 are quantised first."""
        x = self.settled()
        if rows.dtype == FP8:
            q, scale = rows, self._ones
        else:
            q, scale = quantize_rows(rows, self._live, out=self._rows(layer.weight.shape[1]))
        linear_fp8(q, scale, layer.weight, layer.scale, residual=x, live_rows=self._live)

    def _norm_fp8(
        self,
        weights: NormWeights,
        spec: TowerSpec,
        bounds: Bounds | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, (weight, bias, offset) = self.settled(), weights
        return norm_fp8(
            x, weight, bias, spec.eps, kind=spec.norm, offset=offset, live_rows=self._live,
            bounds=bounds, out=self._rows(x.shape[1]),
        )  # fmt: skip

    def _take_partials(self) -> torch.Tensor | None:
        partials, self._partials = self._partials, None
        return partials

    def _rows(self, width: int, *, hidden: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers of quantised rows and their scales."""
        key = width, hidden
        if key not in self._quantized:
            T = len(self._x)
            scale = self._x.new_empty(T, dtype=torch.float32)
            # products leave rows alone past the tiles of live ones; quantisation writes them all
            with ZeroedPadding(self._live if hidden else None) as padding:
                rows = aligned_rows(self._x, T, width, dtype=FP8, padding=padding)
            self._quantized[key] = rows, scale
        return self._quantized[key]
