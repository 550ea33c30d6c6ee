"""Product for q, k and v with the rotation of q and k in its epilogue.

    y[t] = rope(x[t] @ weight.T + bias)    q and k turned by the place of patch t, v as it is

x [T, K], weight [3 H D, K] with the rows of q, k and v, y [T, 3, H, D]; fp32, fp16 or bf16, all of
one dtype. The rows of q and k lie so that the two elements of a pair are neighbours: scores do not
depend on the order of a head's elements, and a tile of the product always holds whole pairs.

`backend="hopper"` is one kernel (gemm_hopper.py): it computes the angles from the places of the
patches (gluon_rope.py) and rounds once; from 6,272 rows on it takes a fifth less than product and
pass over q and k. `backend="few_rows"` is that of gemm_few_rows.py, likewise.
`backend="library"` is `linear` with a pass of rope.py behind it. `backend="auto"` takes the second
or the first by the measurements of few_rows_tuning.py and gemm_tuning.py under `ROTATED`, or else
`linear` with that pass. Rows past the live ones: as `linear` leaves them.

CPU tensors are computed by plain PyTorch operations.
"""

from dataclasses import dataclass

import torch

from .few_rows_tuning import FewRowsConfig, few_rows_tile
from .gemm import check_arguments, hopper_reason, is_aligned
from .gemm import cost as gemm_cost
from .gemm_tuning import ROTATED, SQUARE, HopperConfig, hopper_tile
from .linear import linear, linear_ref
from .roofline import Cost
from .rope import rope_, rope_ref
from .rows import ceil_div, num_sms
from .tables import tuning

BACKENDS = ("auto", "library", "hopper", "few_rows")


@dataclass(frozen=True)
class Rotation:
    """How far q and k of each patch turn, in the two forms that kernels read.

    Attributes:
        position: [T, 4] int32: row, column and two more of each patch, as `layout` writes them.
        turns: [2, 3 H D / 2] fp32 of `turns_of`.
        cos, sin: [T, D / 2] fp32 (fp64 in fp64) of the same angles.
    """

    position: torch.Tensor
    turns: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def turns_of(inv_freq: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Turns of each pair of q, k and v for one row, and for one column: [2, 3 H D / 2] fp32.

    Of a head's D / 2 pairs the first half goes by rows, the other by columns, with the frequencies
    `inv_freq` [D / 4] in radians; those of v do not turn.
    """
    count = len(inv_freq)
    turns = torch.zeros(2, 3, num_heads, 2, count, dtype=torch.float64, device=inv_freq.device)
    for axis in (0, 1):
        turns[axis, :2, :, axis] = inv_freq.double() / (2 * torch.pi)
    return turns.view(2, -1).float()


def rotary_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of x; a new tensor [T, 3, H, D]."""
    D = 2 * cos.shape[1]
    qkv = linear_ref(x, weight, bias).view(len(x), 3, -1, D)
    qk = rope_ref(qkv[:, :2].flatten(1, 2), cos, sin, neighbours=True)
    return torch.cat([qk.view_as(qkv[:, :2]), qkv[:, 2:]], 1)


def cost(T: int, H: int, D: int, K: int, dtype: torch.dtype) -> Cost:
    """That of the product, and the rotations."""
    product = gemm_cost(T, 3 * H * D, K, dtype)
    return Cost(flops=product.flops + 6 * T * H * D, bytes=product.bytes)


def rotating_tile(
    M: int, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> HopperConfig | FewRowsConfig | None:
    """The tile by which "auto" rotates in the epilogue; None where it takes two kernels.

    Raises:
        ValueError: the user's table for this GPU is damaged.
    """
    if device.type != "cuda":
        return None
    tables = tuning(device)
    tile = few_rows_tile(M, N, K, ROTATED, tables.few_rows)
    tile = tile or hopper_tile(M, N, K, ROTATED, False, num_sms(device), tables.table)
    return None if tile is None or hopper_reason(device, dtype) is not None else tile


def rotary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: Rotation,
    *,
    out: torch.Tensor,
    live_rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Write the product of the module docstring to `out` and return it.

    Args:
        x: [T, K]; weight: [3 H D, K]; bias: [3 H D] or None.
        rotation: of T patches.
        out: [T, 3, H, D], contiguous.
        live_rows: int32 [1] on the device; rows from there on are of no interest.
        backend: "auto", "library", "hopper" or "few_rows".

    Raises:
        ValueError: shapes disagree, a tensor is not contiguous, an unknown backend, or a kernel
            where it cannot run.
        TypeError: dtypes or devices disagree.
    """
    if backend not in BACKENDS:
        raise ValueError(f"rotary_linear: backend={backend!r} is not one of {BACKENDS}")
    check_rotation("rotary_linear", rotation, out)
    flat = out.view(len(out), -1)
    check_arguments("rotary_linear", x, weight, bias, None, None, flat, live_rows)
    (M, K), N = x.shape, len(weight)
    tile = None
    if backend in ("hopper", "few_rows"):
        if reason := hopper_reason(x.device, x.dtype):
            raise ValueError(f"rotary_linear: backend={backend!r} cannot run here: {reason}")
        if K == 0 or not is_aligned(x, weight, flat):
            raise ValueError(
                f"rotary_linear: backend={backend!r} needs columns to sum over, and rows that "
                f"start at multiples of 16 bytes, got x {tuple(x.shape)} and strides "
                f"{x.stride()}, {weight.stride()} and {flat.stride()}; use 'auto'"
            )
        tile = SQUARE if backend == "hopper" else FewRowsConfig(64, 128, num_stages=8)
    elif backend == "auto" and is_aligned(x, weight, flat):
        tile = rotating_tile(M, N, K, x.dtype, x.device)
    if tile is None:
        product = "auto" if backend == "auto" else "library"
        linear(x, weight, bias, out=flat, live_rows=live_rows, backend=product)
        return rope_(out, rotation.cos, rotation.sin, live_rows, neighbours=True)
    if M == 0:
        return out
    angles = rotation.position, rotation.turns
    if isinstance(tile, FewRowsConfig):
        from . import gemm_few_rows

        gemm_few_rows.launch(x, weight, bias, flat, live_rows, rotation=angles, config=tile)
        return out
    from .gemm_hopper import launch

    tiles = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n)
    launch(
        x, weight, bias, flat, live_rows,
        activation=None, rotation=angles, config=tile, programs=min(num_sms(x.device), tiles),
    )  # fmt: skip
    return out


def check_rotation(name: str, rotation: Rotation, out: torch.Tensor) -> None:
    """Raise ValueError or TypeError unless `rotation` is that of `out` [T, 3, H, D]."""
    if out.ndim != 4 or out.shape[1] != 3 or out.shape[3] % 4 or not out.is_contiguous():
        raise ValueError(
            f"{name}: out must be contiguous [T, 3, H, D] with D a multiple of 4, got "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    T, _, H, D = out.shape
    for field, shape, dtype in (
        ("position", (T, 4), torch.int32),
        ("turns", (2, 3 * H * D // 2), torch.float32),
    ):
        tensor = getattr(rotation, field)
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: rotation.{field} must be contiguous {list(shape)}, got "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
        if tensor.dtype != dtype or tensor.device != out.device:
            raise TypeError(
                f"{name}: rotation.{field} must be {dtype} on {out.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )


@torch.library.custom_op("vitgraph::rotary_linear", mutates_args=())
def rotary_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position: torch.Tensor,
    turns: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """`rotary_linear` into a new tensor as a registered operator."""
    D = 2 * cos.shape[1]
    out = x.new_empty(len(x), 3, len(weight) // (3 * D), D)
    return rotary_linear(x, weight, bias, Rotation(position, turns, cos, sin), out=out)


@rotary_linear_op.register_fake
def _(x, weight, bias, position, turns, cos, sin):
    D = 2 * cos.shape[1]
    return x.new_empty(len(x), 3, len(weight) // (3 * D), D)
