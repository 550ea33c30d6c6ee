"""Linear layers in fp8: which of a tower's, and their quantised weights.

Weights are quantised once, each output channel with a scale; activations in every forward, each row
with a scale, on the device, so that a captured graph scales each batch anew: by the kernel of the
norm; between `up` and `down`, where no gate is, by the product that writes it, within bounds that
the kernel of the norm has left (bounded_fp8.py); by a pass of its own for what a gate has written.
What attention writes needs no scales behind a norm: v is made to fit there (`Fp8Block.fits`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.aligned_rows import aligned_rows
from ..kernels.bounded_fp8 import bound_norms, value_factors
from ..kernels.linear_fp8 import MULTIPLE, fp8_reason, linear_fp8
from ..kernels.quantize import FP8, Bounds, quantize_rows
from ..kernels.zero_padding import ZeroedPadding
from .image_spec import ImageTowerSpec
from .spec import EncoderSpec

LAYERS = ("qkv", "proj", "up", "down")
PRECISIONS = ("native", "fp8")
TowerSpec = EncoderSpec | ImageTowerSpec

# Blocks at either end that stay in the tower's dtype. An error made in the first ones is carried
# through all others: in towers whose outlier channels meet plain norms, single tokens lose most
# there. What the last one gets wrong is not averaged with anything behind it.
SKIPPED_FIRST = 3  # at most, and a quarter of a shallow tower
SKIPPED_LAST = 1


@dataclass(frozen=True)
class Fp8Plan:
    """Which linear layers compute in fp8; all others, and the patch embedding, never do.

    Attributes:
        skip_first, skip_last: Blocks at either end that keep the tower's dtype; `skip_first` None
            is a quarter of them, but one to `SKIPPED_FIRST`.
        layers: Layers of the other blocks, of `LAYERS`.
        mergers: Whether the two layers of each merger do as well.
    """

    skip_first: int | None = None
    skip_last: int = SKIPPED_LAST
    layers: tuple[str, ...] = LAYERS
    mergers: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise ValueError(
                f"Fp8Plan: layers = {self.layers!r} must be a tuple of names, such as ('qkv', 'up')"
            )
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown:
            raise ValueError(f"Fp8Plan: layers holds {unknown}, choose from {', '.join(LAYERS)}")
        if min(self.skip_first or 0, self.skip_last) < 0:
            raise ValueError(
                f"Fp8Plan: skip_first = {self.skip_first} and skip_last = {self.skip_last} must "
                "be 0 or more"
            )

    def of_block(self, block: int, depth: int) -> tuple[str, ...]:
        """The fp8 layers of a block."""
        first = self.skip_first
        if first is None:
            first = min(SKIPPED_FIRST, max(1, depth // 4))
        inside = first <= block < depth - self.skip_last
        return self.layers if inside else ()

    def names(self, spec: TowerSpec) -> list[str]:
        """Our names of all fp8 layers of a tower, without ".weight"."""
        names = [
            f"blocks.{i}.{layer}"
            for i in range(spec.depth)
            for layer in self.of_block(i, spec.depth)
        ]
        if self.mergers:
            mergers = ["merger", *(f"deepstack.{j}" for j in range(len(spec.deepstack_layers)))]
            names += [f"{merger}.{layer}" for merger in mergers for layer in ("fc1", "fc2")]
        return names


def pick_plan(precision: str | Fp8Plan) -> Fp8Plan | None:
    """The plan asked for; None for a tower wholly in its dtype.

    Raises:
        ValueError: no such precision.
    """
    if isinstance(precision, Fp8Plan):
        return precision
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision = {precision!r} is not known: use {', '.join(map(repr, PRECISIONS))}, or "
            "an Fp8Plan"
        )
    return Fp8Plan() if precision == "fp8" else None


def check_place(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device or dtype that fp8 layers cannot be computed for.

    Raises:
        ValueError: as said.
    """
    if reason := fp8_reason(device):
        raise ValueError(f"precision = 'fp8': {reason}; use precision='native'")
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError(
            f"precision = 'fp8': the tower is {dtype}, and fp8 products with row scales give "
            "bfloat16 only; use dtype='bfloat16' or precision='native'"
        )


@dataclass(frozen=True)
class Fp8Layer:
    """One quantised weight.

    Attributes:
        weight, scale: [N, K] float8_e4m3fn and [N] fp32.
        norms: [2] fp32, of the bounds (`bound_norms`) of what an `up` without a gate or an `fc1`
            writes for a `down` or `fc2` in fp8; None for others.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    norms: torch.Tensor | None = None


@dataclass(frozen=True)
class Fp8Block:
    """The fp8 layers of one block or merger; None for a layer that stays in the tower's dtype.

    Attributes:
        qkv, proj, up, down, fc1, fc2: The layers.
        fits: Whether `qkv` gives v times `value_factors`, whose averages are fp8 without scales,
            and `proj` reads such.
        qkv_bias: The bias of such a `qkv`; None if the tower has none, or without `fits`.
    """

    qkv: Fp8Layer | None = None
    proj: Fp8Layer | None = None
    up: Fp8Layer | None = None
    down: Fp8Layer | None = None
    fc1: Fp8Layer | None = None
    fc2: Fp8Layer | None = None
    fits: bool = False
    qkv_bias: torch.Tensor | None = None


class Fp8Weights:
    """Quantised copies beside the tower's weights, which they do not replace; maybe none.

    The originals stay where they are: `state_dict` returns them bit for bit, reloading reads them
    again, and those of a live tower are its own memory anyway. So fp8 takes more memory, not less.

    Attributes:
        plan: Which layers; None for none of them.
        blocks, merger, deepstack: Their weights, grouped as the forward reads them.
    """

    def __init__(self, plan: Fp8Plan | None, spec: TowerSpec, tensors: Mapping[str, torch.Tensor]):
        """Quantise the weights in `tensors` (our names) that `plan` names.

        Raises:
            ValueError: a device, dtype or width that fp8 products do not take, or nothing to do.
        """
        self.plan = plan
        self._layers: dict[str, Fp8Layer] = {}
        names = [] if plan is None else _names(plan, spec, tensors["patch.weight"])
        for name in names:
            weight = tensors[f"{name}.weight"]
            if any(size % MULTIPLE for size in weight.shape):
                raise ValueError(
                    f"precision = 'fp8': {name} is {list(weight.shape)}, and fp8 products need "
                    f"multiples of {MULTIPLE}; leave {name.rpartition('.')[2]!r} out of "
                    "Fp8Plan(layers=...), or use precision='native'"
                )
            is_gate = name.endswith(".up") and isinstance(spec, EncoderSpec) and spec.mlp == "gated"
            is_bounded = _reader(name) in names and not is_gate
            self._layers[name] = Fp8Layer(
                aligned_rows(weight, *weight.shape, dtype=FP8),
                weight.new_empty(weight.shape[0], dtype=torch.float32),
                weight.new_empty(2, dtype=torch.float32) if is_bounded else None,
            )
        # by block: the bias of a `qkv` whose v is made to fit
        self._fitted: dict[str, torch.Tensor | None] = {}
        for i in range(spec.depth if _has_norms_in_front(spec) else 0):
            if {f"blocks.{i}.qkv", f"blocks.{i}.proj"} <= self._layers.keys():
                bias = tensors.get(f"blocks.{i}.qkv.bias")
                self._fitted[f"blocks.{i}"] = None if bias is None else torch.empty_like(bias)
        self.refresh(tensors)
        self.blocks = [self._block(f"blocks.{i}") for i in range(spec.depth)]
        self.merger = self._block("merger")
        self.deepstack = [self._block(f"deepstack.{j}") for j in range(len(spec.deepstack_layers))]

    def refresh(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Quantise again into the same memory, so that captured graphs see new weights."""
        # Triton launches on the current device
        with torch.cuda.device_of(tensors["patch.weight"]):
            for name, layer in self._layers.items():
                quantize_rows(tensors[f"{name}.weight"], out=(layer.weight, layer.scale))
                if layer.norms is not None:
                    bias = tensors.get(f"{name}.bias")
                    layer.norms.copy_(bound_norms(layer.weight, layer.scale, bias))
            for block in self._fitted:
                self._fit(block, tensors)

    def _fit(self, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Multiply the v of `block` by `value_factors`, and divide what reads its averages."""
        qkv, proj = self._layers[f"{block}.qkv"], self._layers[f"{block}.proj"]
        bias, fitted = tensors.get(f"{block}.qkv.bias"), self._fitted[block]
        v = slice(len(qkv.weight) // 3 * 2, None)
        factors = value_factors(
            qkv.weight[v], qkv.scale[v], None if bias is None else bias[v],
            tensors[f"{block}.norm1.weight"], tensors.get(f"{block}.norm1.bias"),
        )  # fmt: skip
        qkv.scale[v] *= factors
        if bias is not None and fitted is not None:
            fitted.copy_(bias)
            # powers of two, which round nothing, but may be more than fp16 holds
            fitted[v] = (bias[v].float() * factors).to(bias.dtype)
        weight = tensors[f"{block}.proj.weight"].float() / factors
        quantize_rows(weight, out=(proj.weight, proj.scale))

    def _block(self, name: str) -> Fp8Block:
        layers = {layer: self._layers.get(f"{name}.{layer}") for layer in (*LAYERS, "fc1", "fc2")}
        return Fp8Block(**layers, fits=name in self._fitted, qkv_bias=self._fitted.get(name))


def _has_norms_in_front(spec: TowerSpec) -> bool:
    """Whether norms stand in front of the products of a block."""
    return isinstance(spec, EncoderSpec) or spec.block == "pre_norm"


# which layer reads what another writes, with an activation or a gate between them
_READERS = {"up": "down", "fc1": "fc2"}


def _reader(name: str) -> str:
    """The layer that reads what layer `name` writes; "" where there is none."""
    owner, _, layer = name.rpartition(".")
    return f"{owner}.{_READERS[layer]}" if layer in _READERS else ""


def _names(plan: Fp8Plan, spec: TowerSpec, parameter: torch.Tensor) -> list[str]:
    """`plan.names`, once they are known to be some, and computable where `parameter` is."""
    check_place(parameter.device, parameter.dtype)
    if plan.mergers and spec.merger != "mlp":
        glm = f"the merger of {spec.family} has no fp8 layers"
        what = glm if spec.merger == "glm" else f"{spec.family} has no merger"
        raise ValueError(f"precision = {plan}: {what}; use Fp8Plan(mergers=False)")
    if isinstance(spec, ImageTowerSpec) and spec.qk_norm and "qkv" in plan.layers:
        rest = tuple(layer for layer in plan.layers if layer != "qkv")
        way_out = f"Fp8Plan(layers={rest})" if rest else "precision='native'"
        raise ValueError(
            f"precision = {plan}: norms of q and k over all heads stand behind 'qkv' of this "
            f"{spec.family} tower, which is three products there, and none in fp8; use {way_out}"
        )
    names = plan.names(spec)
    if not names:
        raise ValueError(
            f"precision = {plan}: no layer of a tower with {spec.depth} blocks is left; skip "
            "fewer blocks, or use precision='native'"
        )
    return names


def linear_of_rows(
    rows: torch.Tensor,
    layer: Fp8Layer,
    bias: torch.Tensor | None,
    live_rows: torch.Tensor,
    out: torch.Tensor,
    transform: str | None = None,
) -> None:
    """`out` = f(layer(rows) + bias), for rows in the tower's dtype; see linear_fp8.py for f."""
    q, scale = quantize_rows(rows, live_rows)
    linear_fp8(
        q, scale, layer.weight, layer.scale, bias,
        transform=transform, out=out, live_rows=live_rows,
    )  # fmt: skip


def mlp_of_rows(
    rows: torch.Tensor,
    up: Fp8Layer,
    up_bias: torch.Tensor | None,
    down: Fp8Layer,
    down_bias: torch.Tensor | None,
    activation: str,
    live_rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out` = down(f(up(rows))), for rows in the tower's dtype."""
    T = len(rows)
    # products leave rows alone past the tiles of live ones
    with ZeroedPadding(live_rows) as padding:
        between = aligned_rows(rows, T, down.weight.shape[1], dtype=FP8, padding=padding)
    hidden = between, rows.new_empty(T, dtype=torch.float32)
    quantized = quantize_rows(rows, live_rows, bounds=bounds_of(up, hidden[1]))
    bounded_mlp(
        quantized, up, up_bias, down, activation, live_rows, hidden, down_bias=down_bias, out=out
    )


def bounds_of(up: Fp8Layer, out: torch.Tensor) -> Bounds:
    """Those of what `up` makes of rows, to be written to `out`."""
    assert up.norms is not None  # since its reader is in fp8
    return Bounds(out, up.norms)


def bounded_mlp(
    rows: tuple[torch.Tensor, torch.Tensor],
    up: Fp8Layer,
    up_bias: torch.Tensor | None,
    down: Fp8Layer,
    activation: str,
    live_rows: torch.Tensor,
    hidden: tuple[torch.Tensor, torch.Tensor],
    *,
    residual: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """`residual` += down(f(up(rows))), or `out` = that + `down_bias`.

    Args:
        rows: Quantised rows and their scales.
        hidden: What `down` reads: [T, K] fp8, written, and the bounds that came with the rows.
    """
    between, bound = hidden
    linear_fp8(
        *rows, up.weight, up.scale, up_bias,
        transform=activation, bound=bound, out=between, live_rows=live_rows,
    )  # fmt: skip
    linear_fp8(
        between, bound, down.weight, down.scale, down_bias,
        residual=residual, out=out, live_rows=live_rows,
    )  # fmt: skip
