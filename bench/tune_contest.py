"""Candidates for one launch: checked against the definition, and only then timed.

The timer is an argument, so everything but the times works without a GPU. `time_graphs_us` is the
real one: CUDA graphs of many calls that take turns, medians over rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..kernels.aligned_rows import with_aligned_rows
from ..kernels.attention import attention_ref
from ..kernels.attention_fa4 import usable_tiles, varlen_attention_fa4
from ..kernels.attention_hopper import unusable_reason as hopper_attention_reason
from ..kernels.attention_hopper import usable_configs, varlen_attention_hopper
from ..kernels.attention_triton import varlen_attention_triton
from ..kernels.cublaslt import Algorithm, multiply, product_of
from ..kernels.few_rows_tuning import FewRowsConfig, shipped_few_rows
from ..kernels.gated_linear import gated_linear, gated_linear_ref
from ..kernels.gemm import gemm, gemm_ref, hopper_reason
from ..kernels.gemm_few_rows import launch, linear_partials
from ..kernels.gemm_tuning import GATED, RESIDUAL, ROTATED, HopperConfig, shipped_tiles
from ..kernels.library_linear import library_epilogue, library_linear
from ..kernels.linear import linear
from ..kernels.norm import norm
from ..kernels.pdl import kernel_chain
from ..kernels.rotary_linear import Rotation, rotary_linear, rotary_linear_ref, turns_of
from ..kernels.testing import error_ratio
from .timing import Effort, record_each, time_graphs
from .tune_library import LIBRARY, algorithm_name, fastest, proposed
from .tune_shapes import AttentionShape, LinearShape

TRITON, HOPPER = "triton", "hopper"
MAX_ERR_RATIO = 2.0
MOST_FEW_ROWS = 1024  # up to which tiles of few rows are tried

Work = Callable[[], object]
# microseconds of a call by name, for the calls that each candidate makes in a row
Timer = Callable[[Mapping[str, Sequence[Work]]], Mapping[str, float]]

_EFFORT = Effort(warmup_s=0.005, rounds=9, min_rounds=9)
# from here on a call is longer than what surrounds it, and its x and output leave L2 by themselves
_MANY_ROWS = 16384
_SHORT_ROWS = 2048  # below, a graph of few calls would be short beside its own launch
_SETS = 3  # of x and the output, which the calls of a graph rotate over
_ATTENTION_CALLS = 10
_CHECKED_ROWS = 8192  # at a time: in fp64 all of them would take gigabytes
_HEADS = 16  # of a product that is rotated, whose time does not depend on them
_SIDE = 64  # rows and columns of the places it is rotated by


@dataclass(frozen=True)
class Candidate:
    """One way to compute a launch.

    Attributes:
        check: Runs it and returns its error over that of plain PyTorch in the same dtype.
        works: The calls that are timed, one after the other.
    """

    check: Callable[[], float]
    works: Sequence[Work]


@dataclass(frozen=True)
class Outcome:
    """Microseconds and error ratios by candidate, and why the others have no time."""

    us: Mapping[str, float]
    err_ratio: Mapping[str, float]
    reasons: Mapping[str, str]


def contest(candidates: Mapping[str, Candidate], time: Timer) -> Outcome:
    """Check every candidate and time the accurate ones together."""
    ratios: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, candidate in candidates.items():
        # a table of many goes on when one fails, and its row carries the failure
        try:
            ratios[name] = candidate.check()
        except Exception as error:
            reasons[name] = _line(error)
            continue
        if not ratios[name] <= MAX_ERR_RATIO:  # NaN as well
            reasons[name] = f"error is {ratios[name]:.3g} times plain PyTorch's own"
    sound = {name: c.works for name, c in candidates.items() if name not in reasons}
    us: Mapping[str, float] = {}
    try:
        us = dict(time(sound)) if sound else {}
    except Exception as error:
        reasons.update(dict.fromkeys(sound, _line(error)))
    return Outcome(us, ratios, reasons)


def time_graphs_us(works: Mapping[str, Sequence[Work]]) -> dict[str, float]:
    """The median of nine interleaved rounds, in a CUDA graph for each candidate."""
    graphs = {name: record_each(calls) for name, calls in works.items()}
    return {name: timing.ms * 1e3 for name, timing in time_graphs(graphs, _EFFORT).items()}


def tile_name(tile: HopperConfig | FewRowsConfig) -> str:
    """A tile as rows and reports name it."""
    name = f"{tile.block_m}x{tile.block_n}s{tile.num_stages}"
    if isinstance(tile, HopperConfig):
        return name
    return f"few {name}p{tile.splits}{' fed' if tile.producer else ''}"


@torch.inference_mode()
def contest_linear(
    shape: LinearShape,
    M: int,
    *,
    device: torch.device,
    time: Timer = time_graphs_us,
    dtype: torch.dtype = torch.bfloat16,
) -> Outcome:
    """The library, by its own choice and by its best algorithms, against each shipped tile.

    Those of gemm_few_rows.py are tried up to `MOST_FEW_ROWS`; where they are, every candidate may
    start early, as in a forward. Parts of K are added up by the norm that reads the stream, so each
    product into the stream is timed with that norm there.
    """
    operands = LinearOperands(shape, M, device, dtype)
    is_gated, is_rotated = shape.epilogue == GATED, shape.epilogue == ROTATED
    product = gated_linear if is_gated else rotary_linear if is_rotated else linear
    functions: dict[str, Callable[..., object]] = {LIBRARY: partial(product, backend=LIBRARY)}
    if product is linear:
        functions = {LIBRARY: library_linear}
        for algorithm in operands.algorithms():
            functions[algorithm_name(algorithm)] = partial(library_linear, algorithm=algorithm)
    for tile in shipped_tiles(shape.epilogue):
        if is_rotated:  # which has one tile
            functions[tile_name(tile)] = partial(rotary_linear, backend="hopper")
            continue
        kernel = partial(gated_linear, backend="hopper") if is_gated else gemm
        functions[tile_name(tile)] = partial(kernel, config=tile)
    if M <= MOST_FEW_ROWS and hopper_reason(device, dtype) is None:
        tiles = shipped_few_rows(shape.epilogue, shape.K)
        if shape.epilogue == RESIDUAL:
            scale = torch.ones(shape.N, device=device, dtype=dtype)
            functions = {n: partial(_then_norm, f, scale) for n, f in functions.items()}
            functions |= {tile_name(t): partial(_parts_then_norm, t, scale) for t in tiles}
        elif is_rotated:
            functions |= {tile_name(t): partial(_few_rows_rotated, t) for t in tiles}
        else:
            functions |= {tile_name(t): partial(_few_rows, t, is_gated) for t in tiles}
        functions = {name: partial(_early, function) for name, function in functions.items()}
    return contest(
        {
            name: Candidate(partial(operands.check, function), operands.works(function))
            for name, function in functions.items()
        },
        time,
    )


def _few_rows(
    tile: FewRowsConfig, is_gated: bool, x, weight, bias, *, live_rows, out, activation=None
) -> None:
    """A product with `tile` that is rounded."""
    if is_gated:
        place: dict[str, Any] = {"backend": "few_rows", "config": tile, "live_rows": live_rows}
        gated_linear(x, weight, bias, out=out, **place)
    else:
        launch(x, weight, bias, out, live_rows, activation=activation, config=tile)


def _few_rows_rotated(
    tile: FewRowsConfig, x, weight, bias, rotation: Rotation, *, live_rows, out
) -> None:
    """A product with `tile` that rotates."""
    angles = rotation.position, rotation.turns
    launch(x, weight, bias, out.flatten(1), live_rows, rotation=angles, config=tile)


def _parts_then_norm(
    tile: FewRowsConfig, scale: torch.Tensor, x, weight, bias, *, live_rows, residual, **_: Any
) -> None:
    """A product in parts, which the norm adds to the stream `residual`."""
    parts = linear_partials(x, weight, config=tile, live_rows=live_rows)
    norm(residual, scale, None, 1e-6, kind="rms", live_rows=live_rows, partials=parts)


def _then_norm(
    function: Callable[..., object], scale: torch.Tensor, *args: Any, residual, live_rows,
    **options: Any,
) -> None:  # fmt: skip
    """A product that is added to the stream `residual`, and the norm that reads it."""
    function(*args, residual=residual, live_rows=live_rows, **options)
    norm(residual, scale, None, 1e-6, kind="rms", live_rows=live_rows)


def _early(function: Callable[..., object], *args: Any, **options: Any) -> None:
    """`function` with kernels that may start early: weights and live rows were written before."""
    with kernel_chain():
        function(*args, **options)


class LinearOperands:
    """Several sets of operands of one product, as a tower has them: weights that L2 has dropped."""

    def __init__(self, shape: LinearShape, M: int, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device=device, generator=generator) * scale).to(dtype)

        N, K = shape.N, shape.K
        self.num_calls, num_weights = num_calls_and_weights(M, N * K * dtype.itemsize, device)
        self.has_residual = shape.epilogue == RESIDUAL
        self.is_gated = shape.epilogue == GATED
        self.rotation = self._rotation(M, N, device) if shape.epilogue == ROTATED else None
        plain = self.has_residual or self.is_gated or self.rotation is not None
        self.activation = None if plain else shape.epilogue or None
        self.xs = [draw(M, K) for _ in range(_SETS)]
        self.weights = [draw(N, K, scale=K**-0.5) for _ in range(num_weights)]
        if self.has_residual and dtype.itemsize == 2:  # as towers keep those of `down`
            self.xs = [with_aligned_rows(x) for x in self.xs]
            self.weights = [with_aligned_rows(weight) for weight in self.weights]
        # the library adds no bias to a residual: towers add it where the stream is read
        self.bias = None if self.has_residual else draw(N)
        self.outs = [draw(M, N // 2 if self.is_gated else N) for _ in range(_SETS)]
        self.live = torch.tensor([M], dtype=torch.int32, device=device)

    def _rotation(self, M: int, N: int, device: torch.device) -> Rotation:
        row = torch.arange(M, device=device)
        position = torch.stack([row // _SIDE % _SIDE, row % _SIDE, 0 * row, 0 * row], 1).int()
        count = N // 3 // _HEADS // 4
        inv_freq = 1e4 ** -(torch.arange(count, device=device) / count)
        angle = (position[:, :2, None] * inv_freq).flatten(1)
        return Rotation(position, turns_of(inv_freq, _HEADS), angle.cos(), angle.sin())

    def algorithms(self) -> list[Algorithm]:
        """Those of the library that are worth a careful measurement, if it has a choice."""
        x, weight, out = self.xs[0], self.weights[0], self.outs[0]
        if hopper_reason(x.device, x.dtype) is not None:
            return []
        has_bias = self.bias is not None
        epilogue = library_epilogue(self.activation, has_bias, self.has_residual, x.dtype)
        product = product_of(x, weight, self.bias, out, epilogue)
        if product is None:
            return []

        scratch = torch.zeros_like(out)  # what is added up here must not be checked against

        def calls_of(algorithm: Algorithm) -> list[Callable[[], bool]]:
            return [
                partial(
                    multiply, product, algorithm, self.xs[i % _SETS],
                    self.weights[i % len(self.weights)], self.bias, scratch,
                )
                for i in range(self.num_calls)
            ]  # fmt: skip

        return fastest(proposed(product), calls_of)

    def works(self, function: Callable[..., object]) -> list[Work]:
        """Calls over all sets in turn, every row live."""
        return [
            partial(
                self._call, function, self.xs[i % _SETS], self.weights[i % len(self.weights)],
                self.outs[i % _SETS], self.live,
            )
            for i in range(self.num_calls)
        ]  # fmt: skip

    def _call(self, function: Callable[..., object], x, weight, target, live) -> None:
        options: dict[str, Any] = {"residual" if self.has_residual else "out": target}
        if self.rotation is not None:
            options["out"] = target.view(len(target), 3, _HEADS, -1)
            options["rotation"] = self.rotation
        elif not self.is_gated:
            options["activation"] = self.activation
        function(x, weight, self.bias, live_rows=live, **options)

    def check(self, function: Callable[..., object]) -> float:
        """The worst error ratio, with all rows live and with three in five."""
        M = self.xs[0].shape[0]
        return worst([self._error(function, live) for live in (M, -(-3 * M // 5))])

    def _error(self, function: Callable[..., object], live: int) -> float:
        x, weight, before = self.xs[0], self.weights[0], self.outs[0]
        out = before.clone() if self.has_residual else torch.full_like(before, float("nan"))
        live_rows = torch.full_like(self.live, live)
        if live_rows.is_cuda:
            torch.cuda.synchronize(live_rows.device)  # read early by kernels that start so
        self._call(function, x, weight, out, live_rows)
        ratios = []
        for start in range(0, live, _CHECKED_ROWS):
            rows = slice(start, min(start + _CHECKED_ROWS, live))
            eager, oracle = (
                self.definition(x[rows], weight, before[rows], dtype, rows)
                for dtype in (x.dtype, torch.float64)
            )
            ratios.append(error_ratio(out[rows], eager, oracle))
        return worst(ratios)

    def definition(self, x, weight, before, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """The product of rows `rows` in `dtype`, by plain PyTorch."""
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.is_gated:
            return gated_linear_ref(x, weight, bias)
        if self.rotation is not None:
            cos, sin = self.rotation.cos[rows], self.rotation.sin[rows]
            return rotary_linear_ref(x, weight, bias, cos, sin).flatten(1)
        return gemm_ref(
            x,
            weight,
            bias,
            activation=self.activation,
            residual=before.to(dtype) if self.has_residual else None,
        )


def num_calls_and_weights(M: int, weight_bytes: int, device: torch.device) -> tuple[int, int]:
    """Calls in a graph, and the weights that they rotate over: twice of what L2 holds, if short."""
    if M >= _MANY_ROWS:
        return 10, _SETS + 1
    calls = 48 if M < _SHORT_ROWS else 20
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return calls, min(calls, max(1, -(-2 * l2 // weight_bytes)))


@torch.inference_mode()
def contest_attention(
    shape: AttentionShape,
    *,
    device: torch.device,
    time: Timer = time_graphs_us,
    dtype: torch.dtype = torch.bfloat16,
) -> Outcome:
    """Our kernels, for Hopper in each configuration, against each tile of FlashAttention-4."""
    T, H, D = sum(shape.lengths), shape.heads, shape.head_dim
    generator = torch.Generator(device).manual_seed(0)
    # one buffer for all calls: in a tower too the product before has just written it
    qkv = torch.randn(T, 3, H, D, device=device, generator=generator).to(dtype)
    ends = torch.tensor([0, *shape.lengths], device=device).cumsum(0, dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    out = torch.empty(T, H, D, device=device, dtype=dtype)

    def definition(kind: torch.dtype) -> torch.Tensor:
        # a head at a time: in fp64 the scores of 16 heads and 16,384 rows would take 34 GB
        heads = []
        for h in range(H):
            one = [x[:, h : h + 1].to(kind) for x in (q, k, v)]
            heads.append(attention_ref(one[0], one[1], one[2], ends, scale=D**-0.5))
        return torch.cat(heads, 1)

    eager, oracle = definition(dtype), definition(torch.float64)

    def check(call: Work) -> float:
        out.fill_(float("nan"))
        call()
        return error_ratio(out, eager, oracle)

    given: dict[str, Any] = {"scale": D**-0.5, "out": out}
    calls: dict[str, Work] = {TRITON: partial(varlen_attention_triton, q, k, v, ends, **given)}
    if hopper_attention_reason(device, D, dtype) is None:
        tickets = torch.zeros(2, dtype=torch.int32, device=device)  # as a tower has them
        for config in usable_configs(D):
            calls[f"{HOPPER} {config}"] = partial(
                varlen_attention_hopper, q, k, v, ends, tickets=tickets, config=config, **given
            )
    for tile in usable_tiles(device, D, dtype):
        calls[f"fa4 {tile}"] = partial(
            varlen_attention_fa4, q, k, v, ends, max_seqlen=max(shape.lengths), tile=tile, **given
        )
    return contest(
        {
            name: Candidate(partial(check, call), [call] * _ATTENTION_CALLS)
            for name, call in calls.items()
        },
        time,
    )


def worst(ratios: Sequence[float]) -> float:
    """The largest, or NaN if one is."""
    found = 0.0
    for ratio in ratios:
        if not ratio <= found:
            found = ratio
            if ratio != ratio:
                break
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
