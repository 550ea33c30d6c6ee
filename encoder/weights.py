"""A tower's weights on one device, prepared for the kernels, and convertible back.

Two kinds of tensors: `tensors`, exact images of Hugging Face's by the family's rules; and vectors
derived from them: those of deferred norms (deferred_norm.py), and offsets. The residual stream is
updated in place by library GEMMs that can add either a bias or the stream, not both, so the biases
of `proj` and `down` are left out of it, and every reader of the stream adds the sum left out so far
(an offset, fp32 [D]). A tower without them has no offsets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.aligned_rows import with_aligned_rows
from ..kernels.deferred_norm import DeferredNorm, can_defer
from ..kernels.frame_positions import frame_table
from ..kernels.gemm_tuning import GATED
from ..kernels.rotary_linear import turns_of
from .fp8 import Fp8Plan, Fp8Weights
from .glm_merger import GlmMergerWeights
from .spec import EncoderSpec
from .stream import NormWeights
from .weight_map import Rule, neighbour_rule


@dataclass(frozen=True)
class BlockWeights:
    """One block; of its norms weight, bias and offset, what the stream lacks there.

    `qk_norm_weight` [2 * head_dim] is that of q, then that of k. `deferred` is norm2 in front of
    `up` for a forward of few rows; None where that cannot run.
    """

    norm1: NormWeights
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm_weight: torch.Tensor | None
    proj_weight: torch.Tensor
    norm2: NormWeights
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    down_weight: torch.Tensor
    deferred: DeferredNorm | None


@dataclass(frozen=True)
class MergerWeights:
    """One merger; the vectors of its norm have the width of the rows that it reads."""

    norm: NormWeights
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


def up_epilogue(spec: EncoderSpec) -> str:
    """What the product `up` of a block ends with, as launch tables name it."""
    if spec.mlp == "plain":
        return spec.activation
    return GATED if spec.gate_limit is None else ""


class TowerWeights:
    """Prepared weights of a tower.

    Attributes:
        tensors: Prepared tensors by our names.
        blocks, merger, deepstack: The same tensors, grouped as the forward reads them. `merger` is
            that of a tower with merger "mlp", `glm_merger` that of one with merger "glm".
        final_norm: The norm behind the last block of a tower with merger "none" or "mean".
        frame_table: [frames, D] fixed positions of frames, fp32 or wider; None for none.
        offsets: [depth + 1, D]: what the stream lacks before block i, and after the last; None if
            nothing ever.
        inv_freq: [head_dim / 4] fp32 rope frequencies; of no use in a tower without rope.
        turns: The same as `rotary_linear.turns_of` has them; None unless
            `spec.rotates_neighbours`.
        fp8: Quantised copies of some of the tensors; of none unless `quantize` was called.
    """

    @torch.inference_mode(False)  # tensors born in it could not be loaded into outside
    @torch.no_grad()
    def __init__(
        self,
        spec: EncoderSpec,
        rules: list[Rule],
        source: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Prepare the tensors of `source` (Hugging Face's names, no prefix).

        Tensors that need no change of layout, device or dtype share memory with `source`.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self.spec = spec
        if spec.rotates_neighbours:
            rules = [
                neighbour_rule(rule, spec.num_heads) if ".qkv." in rule.name else rule
                for rule in rules
            ]
        self.rules = rules
        self.tensors = {
            rule.name: rule.pack(source).detach().to(device=device, dtype=dtype).contiguous()
            for rule in self.rules
        }
        if device.type == "cuda" and dtype.itemsize == 2:
            for i in range(spec.depth):
                down = f"blocks.{i}.down.weight"
                self.tensors[down] = with_aligned_rows(self.tensors[down])
        # sums of many biases: wider than the stream, so that they add no rounding of their own
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        D, depth = spec.hidden_size, spec.depth
        joined = D * spec.patches_per_token

        def zeros(rows: int, width: int) -> torch.Tensor | None:
            return (
                torch.zeros(rows, width, dtype=wide, device=device) if spec.defers_biases else None
            )

        self.offsets = zeros(depth + 1, D)
        self._middle = zeros(depth, D)
        self._joined = zeros(len(spec.deepstack_layers), joined)
        self._fill_offsets()
        # fp32 on the CPU, as transformers computes it
        exponent = torch.arange(0, spec.head_dim // 2, 2, dtype=torch.float32) / (
            spec.head_dim // 2
        )
        self.inv_freq = (1.0 / (spec.rope_theta or 1.0) ** exponent).to(device)
        self.turns = turns_of(self.inv_freq, spec.num_heads) if spec.rotates_neighbours else None

        self.frame_table = None
        if spec.frame_positions:
            self.frame_table = frame_table(spec.frame_positions, D).to(device=device, dtype=wide)

        self.blocks = [self._block(i) for i in range(depth)]
        self.fp8 = Fp8Weights(None, spec, self.tensors)
        last = self.offset_after(depth - 1)
        self.merger = self._merger("merger", last) if spec.merger == "mlp" else None
        self.glm_merger = GlmMergerWeights.of(self.tensors, last) if spec.merger == "glm" else None
        self.final_norm = self._norm("final_norm", last) if spec.has_final_norm else None
        self.deepstack = [
            self._merger(f"deepstack.{j}", _row(self._joined, j))
            for j in range(len(spec.deepstack_layers))
        ]

    def offset_after(self, block: int) -> torch.Tensor | None:
        """What the stream lacks after `block`; None for nothing."""
        return _row(self.offsets, block + 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantize(self, plan: Fp8Plan | None) -> None:
        """Let the layers of `plan` compute in fp8, beside the tensors, which stay as they are.

        Raises:
            ValueError: a device, dtype or width that fp8 products do not take.
        """
        self.fp8 = Fp8Weights(plan, self.spec, self.tensors)

    def load(self, source: Mapping[str, torch.Tensor]) -> None:
        """Read new values into the same memory, so that captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        packed = {rule.name: rule.pack(source).detach() for rule in self.rules}
        for name, tensor in packed.items():
            if tensor.data_ptr() != self.tensors[name].data_ptr():
                self.tensors[name].copy_(tensor)
        self._fill_offsets()
        for i, block in enumerate(self.blocks):
            if block.deferred is not None:
                block.deferred.refresh(self._deferred_norm(i))
        self.fp8.refresh(self.tensors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's tensors by Hugging Face's names, without the tower's prefix."""
        state = {}
        for rule in self.rules:
            state.update(rule.unpack(self.tensors[rule.name]))
        return state

    def _fill_offsets(self) -> None:
        if self.offsets is None or self._middle is None or self._joined is None:
            return
        lacking = torch.zeros_like(self.offsets[0])
        for i in range(self.spec.depth):
            self.offsets[i] = lacking
            lacking = lacking + self.tensors.get(f"blocks.{i}.proj.bias", 0)
            self._middle[i] = lacking
            lacking = lacking + self.tensors.get(f"blocks.{i}.down.bias", 0)
        self.offsets[-1] = lacking
        for j, layer in enumerate(self.spec.deepstack_layers):
            self._joined[j] = self.offsets[layer + 1].repeat(self.spec.patches_per_token)

    def _norm(self, name: str, offset: torch.Tensor | None) -> NormWeights:
        return self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), offset

    def _deferred(self, i: int) -> DeferredNorm | None:
        proj, up = (self.tensors[f"blocks.{i}.{name}.weight"] for name in ("proj", "up"))
        return self._deferred_norm(i) if can_defer(proj, up) else None

    def _deferred_norm(self, i: int) -> DeferredNorm:
        get, name = self.tensors.get, f"blocks.{i}"
        return DeferredNorm.of(
            self.spec.norm, self.spec.eps,
            self.tensors[f"{name}.norm2.weight"], get(f"{name}.norm2.bias"),
            self.tensors[f"{name}.up.weight"], get(f"{name}.up.bias"),
        )  # fmt: skip

    def _block(self, i: int) -> BlockWeights:
        get, name = self.tensors.get, f"blocks.{i}"
        return BlockWeights(
            norm1=self._norm(f"{name}.norm1", _row(self.offsets, i)),
            qkv_weight=self.tensors[f"{name}.qkv.weight"],
            qkv_bias=get(f"{name}.qkv.bias"),
            qk_norm_weight=get(f"{name}.qk_norm.weight"),
            proj_weight=self.tensors[f"{name}.proj.weight"],
            norm2=self._norm(f"{name}.norm2", _row(self._middle, i)),
            up_weight=self.tensors[f"{name}.up.weight"],
            up_bias=get(f"{name}.up.bias"),
            down_weight=self.tensors[f"{name}.down.weight"],
            deferred=self._deferred(i),
        )

    def _merger(self, name: str, offset: torch.Tensor | None) -> MergerWeights:
        return MergerWeights(
            norm=self._norm(f"{name}.norm", offset),
            fc1_weight=self.tensors[f"{name}.fc1.weight"],
            fc1_bias=self.tensors[f"{name}.fc1.bias"],
            fc2_weight=self.tensors[f"{name}.fc2.weight"],
            fc2_bias=self.tensors[f"{name}.fc2.bias"],
        )


def _row(offsets: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if offsets is None else offsets[index]
