"""The weights of a tower of whole images: rules, layer scale folded in, convolutions as matrices.

`tensors` are exact images of the checkpoint's (in Hugging Face's names), so `state_dict` returns
them bit for bit. Derived from them, and computed again when weights are loaded:

- With layer scale, scale * (W x + b) is one linear layer of scale * W and scale * b: multiplied in
  fp32 and rounded once, where the tower itself rounds its product with every activation. That is
  the layer that is quantised where it computes in fp8.
- In pre-norm blocks the biases of both branches stay out of the residual stream, as in
  `weights.py`; their sums so far are fp32 offsets that readers of the stream add.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import internvl, step_rules
from .fp8 import Fp8Plan, Fp8Weights
from .image_spec import ImageTowerSpec
from .weight_map import Rule


def weight_map(s: ImageTowerSpec) -> list[Rule]:
    """Rules for every tensor of the tower and its projector."""
    if s.family in internvl.LAYERS:
        return internvl.weight_map(s)
    return step_rules.step3p7(s) if s.family == "step3p7" else step_rules.step3_vl(s)


@dataclass(frozen=True)
class ImageBlock:
    """One block as the forward reads it.

    `proj_bias` and `down_bias` are None where the stream leaves them out; the offsets are what it
    lacks at either norm, and None in post-norm blocks. An RMSNorm has no bias; `q_norm` and
    `k_norm` are weights, None in a tower without them.
    """

    norm1_weight: torch.Tensor
    norm1_bias: torch.Tensor | None
    norm1_offset: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    norm2_weight: torch.Tensor
    norm2_bias: torch.Tensor | None
    norm2_offset: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None


class ImageTowerWeights:
    """Prepared weights of a tower of whole images.

    Attributes:
        tensors: Images of Hugging Face's tensors, by our names.
        blocks: What the forward reads of each block.
        fp8: Quantised copies of some of the tensors; of none unless `quantize` was called.
        offset: [D], what the stream lacks after the last block; None for post-norm blocks.
    """

    @torch.inference_mode(False)  # tensors born in it could not be loaded into outside
    @torch.no_grad()
    def __init__(
        self,
        spec: ImageTowerSpec,
        source: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Prepare the tensors of `source` (Hugging Face's names, without a leading `model.`).

        Tensors that need no change of layout, device or dtype share memory with `source`.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        self.spec = spec
        self.rules = weight_map(spec)
        self.tensors = {
            rule.name: rule.pack(source).detach().to(device=device, dtype=dtype).contiguous()
            for rule in self.rules
        }
        # sums of many biases: wider than the stream, so that they add no rounding of their own
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        is_deferred = spec.block == "pre_norm"
        rows = 2 * spec.depth + 1 if is_deferred else 0
        self._offsets = torch.zeros(rows, spec.hidden_size, dtype=self.wide, device=device)
        self._scaled = {
            f"blocks.{i}.{name}.weight": torch.empty_like(self.tensors[f"blocks.{i}.{name}.weight"])
            for i in range(spec.depth if spec.layer_scale else 0)
            for name in ("proj", "down")
        }
        self._derive()
        self.offset = self._offsets[-1] if is_deferred else None
        self.blocks = [self._block(i) for i in range(spec.depth)]
        self.quantize(None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantize(self, plan: Fp8Plan | None) -> None:
        """Let the layers of `plan` compute in fp8, beside the tensors, which stay as they are.

        Raises:
            ValueError: a device, dtype or width that fp8 products do not take.
        """
        self.fp8 = Fp8Weights(plan, self.spec, self.tensors | self._scaled)

    def load(self, source: Mapping[str, torch.Tensor]) -> None:
        """Read new values into the same memory, so that captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        packed = {rule.name: rule.pack(source).detach() for rule in self.rules}
        for name, tensor in packed.items():
            if tensor.data_ptr() != self.tensors[name].data_ptr():
                self.tensors[name].copy_(tensor)
        self._derive()
        self.fp8.refresh(self.tensors | self._scaled)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's tensors by Hugging Face's names, without a leading `model.`."""
        state: dict[str, torch.Tensor] = {}
        for rule in self.rules:
            state.update(rule.unpack(self.tensors[rule.name]))
        return state

    def _derive(self) -> None:
        """Fill the scaled weights and the offsets."""
        lacking = torch.zeros(self.spec.hidden_size, dtype=self.wide, device=self._offsets.device)
        for i in range(self.spec.depth):
            for j, name in enumerate(("proj", "down")):
                key = f"blocks.{i}.{name}"
                bias = self.tensors[f"{key}.bias"].to(self.wide)
                if self.spec.layer_scale:
                    scale = self.tensors[f"blocks.{i}.scale{j + 1}"].to(self.wide)
                    weight = self.tensors[f"{key}.weight"].to(self.wide)
                    self._scaled[f"{key}.weight"].copy_(scale[:, None] * weight)
                    bias = scale * bias
                if self.spec.block == "pre_norm":
                    lacking = lacking + bias
                    self._offsets[2 * i + j + 1] = lacking

    def _block(self, i: int) -> ImageBlock:
        def get(name: str) -> torch.Tensor:
            key = f"blocks.{i}.{name}"
            return self._scaled.get(key, self.tensors[key])

        is_deferred = self.spec.block == "pre_norm"
        return ImageBlock(
            norm1_weight=get("norm1.weight"),
            norm1_bias=self.tensors.get(f"blocks.{i}.norm1.bias"),
            norm1_offset=self._offsets[2 * i] if is_deferred else None,
            qkv_weight=get("qkv.weight"),
            qkv_bias=self.tensors.get(f"blocks.{i}.qkv.bias"),
            q_norm=self.tensors.get(f"blocks.{i}.q_norm.weight"),
            k_norm=self.tensors.get(f"blocks.{i}.k_norm.weight"),
            proj_weight=get("proj.weight"),
            proj_bias=None if is_deferred else get("proj.bias"),
            norm2_weight=get("norm2.weight"),
            norm2_bias=self.tensors.get(f"blocks.{i}.norm2.bias"),
            norm2_offset=self._offsets[2 * i + 1] if is_deferred else None,
            up_weight=get("up.weight"),
            up_bias=get("up.bias"),
            down_weight=get("down.weight"),
            down_bias=None if is_deferred else get("down.bias"),
        )
