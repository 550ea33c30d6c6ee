"""Linear layer with activation or residual, by the vendor's library or by our Triton GEMM.

    y = f(x @ weight.T + bias)              or, in place,
    residual += x @ weight.T

x [T, K], weight [N, K], bias [N], y and residual [T, N], all of one dtype.

`backend="library"` is cuBLAS (library_linear.py): fastest between the ranges of the two kernels
below, with bias and tanh-GELU in its epilogue. It computes all T rows whatever `live_rows` says;
other activations are a second pass, over live rows only. It adds no bias to a residual: leave the
bias out and add the sum of the biases left out to what reads the residual, or use another backend.
`backend="triton"` is `gemm.gemm`: every epilogue, and only live rows are computed.
`backend="hopper"` is the kernel of gemm_hopper.py, for fp16 and bf16 on compute capability 9.0:
every epilogue, only live rows, and faster than the others from some 800 to 33,000 rows on, by layer
(gemm_tuning.py).
`backend="few_rows"` is the kernel of gemm_few_rows.py, for the same types and GPUs: all but the
residual (see `linear_partials` there), live rows only, and faster than the library up to some 256
rows, of some layers 900.
`backend="auto"` is "hopper" or "few_rows" where `choose_backend` finds it the faster (tables.py),
else "library". It takes the epilogues of the library only, so that no call fails for its number of
rows.

**Rows past the live ones**: "library" writes all of them. The others write live rows
rounded up to the tile's `block_m`, from whatever x holds there, and leave later ones untouched, in
a new tensor uninitialised. Whoever multiplies such rows has to have filled them before.

CPU tensors are computed by plain PyTorch operations, except `backend="triton"` under the
interpreter; "hopper" and "few_rows" refuse them.
"""

import torch

from .aligned_rows import aligned_rows
from .few_rows_tuning import FewRowsConfig, few_rows_tile
from .gemm import (
    check_arguments,
    cost,
    gemm,
    gemm_ref,
    hopper_reason,
    is_aligned,
)
from .gemm_tuning import HopperConfig, hopper_tile, tile_by_waves
from .library_linear import choose_algorithm, library_epilogue, library_linear
from .rows import num_sms
from .tables import tuning
from .zero_padding import ZeroedPadding

__all__ = [
    "BACKENDS",
    "choose_backend",
    "cost",
    "empty_output",
    "linear",
    "linear_op",
    "linear_ref",
    "linear_residual_op",
]

BACKENDS = ("auto", "library", "triton", "hopper", "few_rows")

linear_ref = gemm_ref


def choose_backend(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None,
    has_residual: bool,
) -> tuple[str, HopperConfig | FewRowsConfig | None]:
    """What "auto" stands for, ("library", None) or a kernel and its tile, by tables.py.

    In a process it depends on nothing but the arguments, since a user's table is read once; so a
    recorded call and an eager one on the same padded shape are computed alike. `M` counts all rows,
    not the live ones. Operands are taken to be contiguous; `linear` goes to the library where one
    is not aligned to 16 bytes.

    Raises:
        ValueError: the user's table for this GPU is damaged.
    """
    # the cheapest questions first: small calls are made in great number
    if device.type != "cuda" or N % 8 or K % 8:
        return "library", None
    tables = tuning(device)
    few = None if has_residual else few_rows_tile(M, N, K, activation or "", tables.few_rows)
    tile = few or hopper_tile(M, N, K, activation, has_residual, num_sms(device), tables.table)
    if tile is None or hopper_reason(device, dtype) is not None:
        return "library", None
    return ("hopper" if few is None else "few_rows"), tile


def empty_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None = None,
    *,
    padding: ZeroedPadding,
    leaves_padding: bool = False,
    reader: torch.Tensor | None = None,
    at_lines: bool = False,
) -> torch.Tensor:
    """New `out` [T, N] for `linear`, or for a product that `leaves_padding` alone whatever T is.

    Uninitialised, but for rows past the live ones where the product may leave them alone: `padding`
    zeroes them, so that they are finite after it, unless only `linear` with the weight `reader`
    reads the result, and of them reads none. With `at_lines` rows start at lines of the cache
    (aligned_rows.py), except for the library, whose epilogues PyTorch uses for contiguous results
    alone.
    """
    (T, K), N = x.shape, weight.shape[0]
    backend, tile = choose_backend(T, N, K, x.dtype, x.device, activation, has_residual=False)
    if backend == "library" and not leaves_padding:
        return x.new_empty(T, N)
    if isinstance(tile, FewRowsConfig) and reader is not None and is_aligned(x, weight, reader):
        _, reads = choose_backend(T, *reader.shape, x.dtype, x.device, None, has_residual=False)
        # both skip tiles without a live row, and compute all rows of the others
        if isinstance(reads, FewRowsConfig) and tile.block_m % reads.block_m == 0:
            return x.new_empty(T, N)
    if at_lines:
        return aligned_rows(x, T, N, padding=padding)
    return padding.of(x.new_empty(T, N))


def _check_library_epilogue(
    backend: str,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> None:
    if residual is None:
        return
    if bias is not None:
        raise ValueError(
            f"linear: backend={backend!r} cannot add a bias to a residual in place; pass bias=None "
            "and add the bias where the residual is read, or use backend='triton'"
        )
    if activation is not None:
        raise ValueError(
            f"linear: backend={backend!r} cannot add activation={activation!r} of a product to a "
            "residual in place; use backend='triton'"
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`activation(x @ weight.T + bias)`, into `out`, or added to `residual` in place.

    Args:
        x: [T, K]; weight: [N, K]; bias: [N] or None.
        activation: "gelu_tanh", "gelu_erf", "quick_gelu", "silu" or None.
        residual: [T, N], updated in place and returned.
        out: [T, N] to write; a new tensor if None.
        live_rows: int32 [1] on the device; rows from there on are of no interest. What they hold
            afterwards depends on the backend (module docstring).
        backend: "auto", "library", "triton", "hopper" or "few_rows".

    Raises:
        ValueError: shapes disagree, elements of a row are not adjacent, an unknown activation or
            backend, both `out` and `residual`, an epilogue that the library does not have ("auto"
            and "library"), a residual for "few_rows", or a kernel where it cannot run.
        TypeError: dtypes or devices disagree.
    """
    if backend not in BACKENDS:
        raise ValueError(f"linear: backend={backend!r} is not one of {BACKENDS}")
    if backend == "triton":
        return gemm(
            x, weight, bias, activation=activation, residual=residual, out=out, live_rows=live_rows
        )
    check_arguments("linear", x, weight, bias, activation, residual, out, live_rows)
    (M, K), N, has_residual = x.shape, weight.shape[0], residual is not None
    tile = None
    if backend in ("hopper", "few_rows") and (reason := hopper_reason(x.device, x.dtype)):
        raise ValueError(f"linear: backend={backend!r} cannot run here: {reason}; use 'auto'")
    if backend == "few_rows":
        if has_residual:
            raise ValueError(
                "linear: backend='few_rows' cannot add to a residual in place; use "
                "gemm_few_rows.linear_partials, or backend='auto'"
            )
        tile = few_rows_tile(M, N, K, activation or "", tuning(x.device).few_rows)
        tile = tile or FewRowsConfig(64, 64, num_stages=6)
    elif backend == "hopper":
        sms = num_sms(x.device)
        tile = hopper_tile(M, N, K, activation, has_residual, sms, tuning(x.device).table)
        tile = tile or tile_by_waves(M, N, K, activation, sms)
    else:
        _check_library_epilogue(backend, bias, activation, residual)
    if backend == "auto":
        _, tile = choose_backend(M, N, K, x.dtype, x.device, activation, has_residual)
        given = (m for m in (x, weight, residual, out) if m is not None)
        if tile is not None and not is_aligned(*given):
            tile = None
    if isinstance(tile, FewRowsConfig):
        from .gemm_few_rows import launch

        y = x.new_empty(M, N) if out is None else out
        if K == 0 or not is_aligned(x, weight, y):
            raise ValueError(
                "linear: backend='few_rows' needs columns to sum over, and rows that start at "
                f"multiples of 16 bytes, got x {tuple(x.shape)} and strides {x.stride()}, "
                f"{weight.stride()} and {y.stride()}; use 'auto'"
            )
        if y.numel():
            launch(x, weight, bias, y, live_rows, activation=activation, config=tile)
        return y
    if tile is not None:
        return gemm(
            x, weight, bias, activation=activation, residual=residual, out=out, live_rows=live_rows,
            config=tile,
        )  # fmt: skip
    epilogue = library_epilogue(activation, bias is not None, has_residual, x.dtype)
    return library_linear(
        x, weight, bias, activation=activation, residual=residual, out=out, live_rows=live_rows,
        algorithm=choose_algorithm(x, weight, epilogue),
    )  # fmt: skip


@torch.library.custom_op("vitgraph::linear", mutates_args=())
def linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`linear` into a new tensor as a registered operator."""
    return linear(x, weight, bias, activation=activation, live_rows=live_rows, backend=backend)


@linear_op.register_fake
def _(x, weight, bias=None, activation=None, live_rows=None, backend="auto"):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("vitgraph::linear_residual_", mutates_args=("residual",))
def linear_residual_op(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`linear` added to `residual` in place as a registered operator."""
    linear(
        x, weight, bias,
        activation=activation, residual=residual, live_rows=live_rows, backend=backend,
    )  # fmt: skip


@linear_residual_op.register_fake
def _(residual, x, weight, bias=None, activation=None, live_rows=None, backend="auto"):
    return None
