"""A norm between two products of few rows that takes no kernel: it is divided between them.

    stream += x @ w1.T                           first, in place, rounded to the stream's dtype
    s = stream + offset,  z = s * gain           its second output, and the moments of s
    y = f((z @ w2.T - mean(s) * sums) / deviation(s) + bias)

where sums = w2 @ gain, bias = w2 @ shift + that of the layer, and deviation(s) is
sqrt(var(s) + eps): y is that of the layer behind a norm with weight `gain` and bias `shift`. For
RMSNorm mean and shift are absent, and the deviation is the root of the mean square plus eps.

In a tower of 256 rows the kernel of a norm is 2 to 3 us of waiting for its neighbours. Here a tile
of the first product, which has the stream in its registers, leaves sum and squares of each 64
columns, and the programs of the second add up those of their rows when they have multiplied.

How exact: z is rounded once, as the output of a norm is, but in proportion to s, not to s - mean.
A stream that holds its biases, as Hugging Face's does, has been rounded in proportion to s before,
so a mean far above the deviation costs no more than it has cost there. Moments are those of centred
groups, in fp32, and are added up without a difference of large numbers. In fp16 z could overflow
where the norm does not: bf16 alone.

Shapes: x [T, F], w1 [D, F], stream, z [T, D]; w2 [N, D] (gated, gate over up as in
gated_linear.py); gain, shift [D]; offset [D] fp32 or None; sums, bias [N] fp32; y [T, N] ([T, N/2]
when gated). Rows past the live ones: tiles without a live row are left alone, of others z is zero.

Two launches of the kernel of gemm_few_rows.py, which has no interpreter. CPU tensors are computed
by plain PyTorch.
"""

from dataclasses import dataclass

import torch

from .activation import activation_ref
from .few_rows_tuning import GATED_BLOCKS_N, DeferredTiles, FewRowsConfig, deferred_tiles
from .gemm import check_arguments, hopper_reason, is_aligned
from .gemm_few_rows import GROUP, MOST_GROUPS, launch
from .swiglu import swiglu_ref
from .tables import tuning


@dataclass(frozen=True)
class ScaledRows:
    """z, and the moments of s.

    Attributes:
        rows: [T, D].
        moments: [T, 2, MOST_GROUPS] fp32: sums of groups of `GROUP` columns, then the squares
            around their means; what is past D / GROUP groups is of no interest.
    """

    rows: torch.Tensor
    moments: torch.Tensor

    @classmethod
    def over(cls, rows: torch.Tensor) -> "ScaledRows":
        """In the memory of `rows` [T, D], with uninitialised moments."""
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return cls(rows, rows.new_empty(len(rows), 2, MOST_GROUPS, dtype=wide))


@dataclass(frozen=True)
class DeferredNorm:
    """A norm in front of a linear layer as the second product takes it.

    Attributes:
        kind: "layer" or "rms".
        eps: Added to the variance, or to the mean square.
        gain: [D], the norm's weight, for the first product.
        sums: [N] fp32 (fp64 for fp64); None for "rms".
        bias: [N] fp32 (fp64 for fp64), or None where neither norm nor layer has one.
    """

    kind: str
    eps: float
    gain: torch.Tensor
    sums: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls,
        kind: str,
        eps: float,
        gain: torch.Tensor,
        shift: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> "DeferredNorm":
        """That of the norm (`gain`, `shift`) before the layer (`weight` [N, D], `bias` [N])."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.to(wide)
        total = None if bias is None else bias.to(wide)
        # towers are built and reloaded under autocast too, which would round both products
        with torch.autocast(weight.device.type, enabled=False):
            if shift is not None:
                total = matrix @ shift.to(wide) + (0 if total is None else total)
            sums = None if kind == "rms" else matrix @ gain.to(wide)
        return cls(kind, eps, gain, sums, total)

    def refresh(self, source: "DeferredNorm") -> None:
        """Take the values of `source` into the same memory, so that captured graphs see them."""
        for mine, new in ((self.sums, source.sums), (self.bias, source.bias)):
            if mine is not None and new is not None:
                mine.copy_(new)


def can_defer(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the kernels of both products can run with w1 and w2."""
    width = second.shape[1]
    return (
        second.is_cuda
        and second.dtype == torch.bfloat16
        and width % GROUP == 0
        and width <= GROUP * MOST_GROUPS
        and is_aligned(first, second)
        and hopper_reason(second.device, second.dtype) is None
    )


def choose_deferred(
    M: int, first: torch.Tensor, second: torch.Tensor, epilogue: str
) -> DeferredTiles | None:
    """Tiles for the products of M rows with w1 and w2; None where the norm is better a kernel.

    `epilogue` of the second: an activation or `GATED`. It depends on the shapes, dtypes, device and
    alignment of the weights alone.

    Raises:
        ValueError: the user's table for this GPU is damaged.
    """
    if not can_defer(first, second):
        return None
    return deferred_tiles(M, *second.shape, epilogue, tuning(second.device).deferred)


def add_linear_scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    stream: torch.Tensor,
    norm: DeferredNorm,
    offset: torch.Tensor | None,
    *,
    out: ScaledRows,
    live_rows: torch.Tensor | None = None,
    config: FewRowsConfig,
) -> ScaledRows:
    """The first product of the module docstring, into `stream` and `out`.

    In a chain (pdl.py) the kernel launched just before must not write the stream, which is read
    before that one has ended.

    Raises:
        ValueError: shapes disagree, D is not a multiple of `GROUP` or over `GROUP * MOST_GROUPS`,
            a tensor is not contiguous or aligned, K is in parts, or the kernel cannot run.
        TypeError: dtypes or devices disagree, or are not bf16 on a GPU.
    """
    name = "add_linear_scaled"
    check_arguments(name, x, weight, None, None, stream, None, live_rows)
    T, D = stream.shape
    _check_scaled(name, out, stream)
    _check_vectors(name, stream, D, gain=norm.gain)
    _check_vectors(name, out.moments, D, offset=offset)
    if not x.is_cuda:
        num_live = T if live_rows is None else min(T, int(live_rows))
        live, wide = stream[:num_live], out.moments.dtype
        live.copy_(live.to(wide) + x[:num_live].to(wide) @ weight.to(wide).t())
        rows, moments = scaled_ref(live, norm.gain, offset)
        out.rows[:num_live] = rows
        out.moments[:num_live, :, : D // GROUP] = moments
        return out
    _check_kernel(name, config, x, weight, stream, out.rows)
    if T:
        launch(
            x, weight, None, out.rows, live_rows,
            added=(stream, norm.gain, offset, out.moments), config=config,
        )  # fmt: skip
    return out


def scaled_ref(
    stream: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of z and its moments [T, 2, D / GROUP], fp32 (fp64 for fp64)."""
    s = stream.to(torch.float64 if stream.dtype == torch.float64 else torch.float32)
    if offset is not None:
        s = s + offset
    groups = s.unflatten(1, (-1, GROUP))
    centred = groups - groups.mean(2, keepdim=True)
    return (s * gain).to(stream.dtype), torch.stack([groups.sum(2), centred.square().sum(2)], 1)


def linear_of_scaled_ref(
    rows: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor,
    norm: DeferredNorm,
    *,
    activation: str | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """Plain PyTorch definition of y from what `scaled_ref` returns, rounded once."""
    (totals, squares), D = moments.unbind(1), rows.shape[1]
    wide = moments.dtype
    y = rows.to(wide) @ weight.to(wide).t()
    means = totals / GROUP
    if norm.sums is not None:
        mean = totals.sum(1, keepdim=True) / D
        y = y - mean * norm.sums
        means = means - mean
    spread = (squares + GROUP * means.square()).sum(1, keepdim=True) / D
    y = y * torch.rsqrt(spread + norm.eps)
    if norm.bias is not None:
        y = y + norm.bias
    if is_gated:
        y = swiglu_ref(y)
    elif activation is not None:
        y = activation_ref(y, activation)
    return y.to(rows.dtype)


def linear_of_scaled(
    scaled: ScaledRows,
    weight: torch.Tensor,
    norm: DeferredNorm,
    *,
    activation: str | None = None,
    is_gated: bool = False,
    out: torch.Tensor,
    live_rows: torch.Tensor | None = None,
    config: FewRowsConfig,
) -> torch.Tensor:
    """The second product of the module docstring, into `out`; f = silu(gate) * up if `is_gated`.

    Raises:
        ValueError: as `add_linear_scaled`, or both an activation and a gate.
        TypeError: dtypes or devices disagree, or are not bf16 on a GPU.
    """
    name = "linear_of_scaled"
    x = scaled.rows
    (T, D), N = x.shape, len(weight)
    if is_gated and (activation is not None or N % 2):
        raise ValueError(
            f"{name}: a gate needs weight [2F, D] and no activation but its own silu, got "
            f"{tuple(weight.shape)} and activation={activation!r}"
        )
    if is_gated and config.block_n not in GATED_BLOCKS_N:
        raise ValueError(
            f"{name}: config={config} has no two halves in whole parts of 64 columns, one for the "
            f"gate; use block_n in {GATED_BLOCKS_N}"
        )
    check_arguments(name, x, weight, None, activation, None, None, live_rows)
    width = N // 2 if is_gated else N
    if out.shape != (T, width) or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"{name}: out must be [{T}, {width}] {x.dtype} on {x.device}, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}"
        )
    _check_scaled(name, scaled, x)
    _check_vectors(name, scaled.moments, N, sums=norm.sums, bias=norm.bias)
    if not x.is_cuda:
        num_live = T if live_rows is None else min(T, int(live_rows))
        moments = scaled.moments[:num_live, :, : D // GROUP]
        out[:num_live] = linear_of_scaled_ref(
            x[:num_live], moments, weight, norm, activation=activation, is_gated=is_gated
        )
        return out
    _check_kernel(name, config, x, weight, out)
    if out.numel():
        launch(
            x, weight, norm.bias, out, live_rows,
            activation="silu" if is_gated else activation, is_gated=is_gated,
            scaled=(scaled.moments, norm.sums, norm.eps), config=config,
        )  # fmt: skip
    return out


def _check_scaled(name: str, scaled: ScaledRows, stream: torch.Tensor) -> None:
    T, D = stream.shape
    if D % GROUP or D > GROUP * MOST_GROUPS:
        raise ValueError(
            f"{name}: D = {D} must be a multiple of {GROUP} of at most {GROUP * MOST_GROUPS}; use "
            "a norm and a product"
        )
    wide = torch.float64 if stream.dtype == torch.float64 else torch.float32
    for field, tensor, shape, dtype in (
        ("rows", scaled.rows, (T, D), stream.dtype),
        ("moments", scaled.moments, (T, 2, MOST_GROUPS), wide),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {field} of the scaled rows must be contiguous {list(shape)} {dtype}, got "
                f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )


def _check_vectors(
    name: str, like: torch.Tensor, length: int, **vectors: torch.Tensor | None
) -> None:
    for field, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (length,) or not vector.is_contiguous():
            raise ValueError(
                f"{name}: {field} {tuple(vector.shape)} must be [{length}], contiguous"
            )
        if vector.dtype != like.dtype or vector.device != like.device:
            raise TypeError(
                f"{name}: {field} must be {like.dtype} on {like.device}, got {vector.dtype} on "
                f"{vector.device}"
            )


def _check_kernel(name: str, config: FewRowsConfig, x: torch.Tensor, *others: torch.Tensor) -> None:
    if reason := hopper_reason(x.device, x.dtype):
        raise ValueError(f"{name} cannot run here: {reason}; use a norm and a product")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{name}: rows in {x.dtype} can overflow; use bfloat16")
    if config.splits != 1:
        raise ValueError(f"{name}: config={config} cuts K into parts; use splits=1")
    if x.shape[1] == 0 or not is_aligned(x, *others):
        raise ValueError(
            f"{name}: there must be columns to sum over, and rows that start at multiples of 16 "
            f"bytes, got strides {[m.stride() for m in (x, *others)]}; use a norm and a product"
        )
