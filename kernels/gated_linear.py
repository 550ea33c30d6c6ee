"""The gated half of a SwiGLU MLP: two products with one input, and their gate.

    y = silu(x @ gate.T + bias_gate) * (x @ up.T + bias_up)

x [T, K], weight [2F, K] (gate over up), bias [2F], y [T, F], all of one dtype. In fp32 with one
rounding where it is one kernel ("hopper", that of gemm_hopper.py, or "few_rows", that of
gemm_few_rows.py), which writes F columns instead of writing 2F, reading them and writing F. Else
("library") the products go to `scratch` by `linear` and `swiglu` gates them, with a rounding in
between.

Rows past the live ones: "library" leaves those of y alone; the kernels write live rows rounded up
to the tile's `block_m`. https://arxiv.org/abs/2002.05202
"""

import torch

from .dispatch import use_reference
from .few_rows_tuning import GATED_BLOCKS_N, FewRowsConfig, few_rows_tile
from .gemm import check_arguments, hopper_reason, is_aligned
from .gemm_tuning import GATED, HopperConfig, hopper_tile, tile_by_waves
from .linear import linear, linear_ref
from .roofline import Cost
from .rows import ceil_div, num_sms
from .swiglu import swiglu, swiglu_ref
from .tables import tuning

BACKENDS = ("auto", "library", "hopper", "few_rows")


def gated_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of its inputs."""
    return swiglu_ref(linear_ref(x, weight, bias))


def cost(T: int, F: int, K: int, dtype: torch.dtype) -> Cost:
    """Least work and traffic of one call on T live rows."""
    return Cost(flops=4 * T * F * K, bytes=(T * K + 2 * F * K + T * F) * dtype.itemsize)


def choose_gated_backend(
    M: int, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, HopperConfig | FewRowsConfig | None]:
    """What "auto" stands for: ("library", None), or a kernel and its tile (`choose_backend`).

    `N` is 2F.
    """
    if device.type != "cuda" or N % 16 or K % 8:
        return "library", None
    tables = tuning(device)
    few = few_rows_tile(M, N, K, GATED, tables.few_rows)
    tile = few or hopper_tile(M, N, K, GATED, False, num_sms(device), tables.table)
    if tile is None or hopper_reason(device, dtype) is not None:
        return "library", None
    return ("hopper" if few is None else "few_rows"), tile


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
    config: HopperConfig | FewRowsConfig | None = None,
) -> torch.Tensor:
    """Compute y of the module docstring into `out`, or a new tensor.

    Args:
        x: [T, K]; weight: [2F, K]; bias: [2F] or None.
        out: [T, F] to write; rows of a new tensor that are not written are uninitialised.
        scratch: [T, 2F] that "library" writes; a new tensor if None and needed.
        live_rows: int32 [1] on the device; rows from there on are of no interest.
        backend: "auto", "library", "hopper" or "few_rows".
        config: tile of the kernel that `backend` names; None for the one that is tuned.

    Raises:
        ValueError: shapes disagree, an odd number of rows in `weight`, an unknown backend, a
            `config` for another backend, in parts or without two halves, or a kernel where it
            cannot run.
        TypeError: dtypes or devices disagree.
    """
    if backend not in BACKENDS:
        raise ValueError(f"gated_linear: backend={backend!r} is not one of {BACKENDS}")
    if config is not None:
        owner, widths = "few_rows", GATED_BLOCKS_N
        if isinstance(config, HopperConfig):
            owner, widths = "hopper", (128, 256)
        if backend != owner:
            raise ValueError(
                f"gated_linear: config={config} needs backend={owner!r}, not {backend!r}"
            )
        if config.block_n not in widths:
            raise ValueError(
                f"gated_linear: config={config} has no two halves in whole parts of 64 columns, "
                f"one for the gate; use block_n in {widths}"
            )
    if isinstance(config, FewRowsConfig) and config.splits != 1:
        raise ValueError(
            f"gated_linear: config={config} cuts K into {config.splits} parts, and only whole sums "
            "can be gated; use splits=1"
        )
    if weight.ndim != 2 or weight.shape[0] % 2:
        raise ValueError(
            f"gated_linear: weight must be [2F, K], gate over up, got {tuple(weight.shape)}"
        )
    check_arguments("gated_linear", x, weight, bias, None, None, scratch, live_rows)
    (M, K), N = x.shape, weight.shape[0]
    if out is None:
        out = x.new_empty(M, N // 2)
    if out.shape != (M, N // 2) or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"gated_linear: out must be [{M}, {N // 2}] {x.dtype} on {x.device}, got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}"
        )
    tile = None
    if backend == "auto":
        _, tile = choose_gated_backend(M, N, K, x.dtype, x.device)
        if tile is not None and not is_aligned(x, weight, out):
            tile = None
    elif backend != "library":
        if reason := hopper_reason(x.device, x.dtype):
            raise ValueError(f"gated_linear: backend={backend!r} cannot run here: {reason}")
        if not is_aligned(x, weight, out):
            raise ValueError(
                f"gated_linear: backend={backend!r} needs rows that start at multiples of 16 "
                f"bytes, got strides {x.stride()}, {weight.stride()} and {out.stride()}; use 'auto'"
            )
        tile = config or _tuned_tile(backend, M, N, K, x.device)
    if tile is None or use_reference(x):
        return swiglu(linear(x, weight, bias, out=scratch, live_rows=live_rows), out, live_rows)
    if out.numel() == 0:
        return out
    if isinstance(tile, FewRowsConfig):
        from . import gemm_few_rows

        gemm_few_rows.launch(
            x, weight, bias, out, live_rows, activation="silu", is_gated=True, config=tile
        )
        return out
    from .gemm_hopper import launch

    sms = num_sms(x.device)
    launch(
        x, weight, bias, out, live_rows, activation="silu", is_gated=True, config=tile,
        programs=min(sms, ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n)),
    )  # fmt: skip
    return out


def _tuned_tile(
    backend: str, M: int, N: int, K: int, device: torch.device
) -> HopperConfig | FewRowsConfig:
    tables = tuning(device)
    if backend == "few_rows":
        tile = few_rows_tile(M, N, K, GATED, tables.few_rows)
        return tile or FewRowsConfig(64, 128, num_stages=4)
    sms = num_sms(device)
    tile = hopper_tile(M, N, K, GATED, False, sms, tables.table)
    return tile or tile_by_waves(M, N, K, GATED, sms)


@torch.library.custom_op("vitgraph::gated_linear", mutates_args=())
def gated_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`gated_linear` into a new tensor as a registered operator."""
    return gated_linear(x, weight, bias, live_rows=live_rows, backend=backend)


@gated_linear_op.register_fake
def _(x, weight, bias=None, live_rows=None, backend="auto"):
    return x.new_empty(x.shape[0], weight.shape[0] // 2)
