"""The head of SigLIP 2: attention of one learned probe over the patches of an image, and an MLP.

The query is the same for every image, so it is computed when weights are loaded.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ..kernels.linear import linear
from ..kernels.norm import norm
from ..kernels.probe_attention import probe_attention
from .spec import EncoderSpec


class ProbeHead:
    """Pools the normalised patches of images to a row each.

    Attributes:
        query: [H, head_dim] fp32 (fp64 for fp64), what the probe asks for.
    """

    @torch.inference_mode(False)  # tensors born in it could not be loaded into outside
    @torch.no_grad()
    def __init__(self, spec: EncoderSpec, tensors: Mapping[str, torch.Tensor]):
        """`tensors` by the names of `siglip2.weight_map`; they are used where they are."""
        self._spec = spec
        self._tensors = tensors
        probe = tensors["head.probe"]
        wide = torch.float64 if probe.dtype == torch.float64 else torch.float32
        self.query = torch.empty(
            spec.num_heads, spec.head_dim, dtype=wide, device=probe.device
        )  # fmt: skip
        self.derive()

    def derive(self) -> None:
        """Compute the query from the tensors, in place."""
        D, wide = self._spec.hidden_size, self.query.dtype
        weight, bias = (self._tensors[f"head.qkv.{part}"][:D] for part in ("weight", "bias"))
        probe = self._tensors["head.probe"].to(wide)
        query = torch.nn.functional.linear(probe, weight.to(wide), bias.to(wide))
        self.query.copy_(query.view_as(self.query))

    def __call__(self, patches: torch.Tensor, grid: torch.Tensor, out: torch.Tensor) -> None:
        """Write the pooled rows.

        Args:
            patches: [T, D], those of all images behind the last norm.
            grid: [items, 3] int32 (1, h, w), zero past the live items.
            out: [items, D]; rows past the live items are finite.
        """
        device = patches.device
        # as in `forward.tower_forward`
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, torch.autocast(device.type, enabled=False):
            self._pool(patches, grid, out)

    def _pool(self, patches: torch.Tensor, grid: torch.Tensor, out: torch.Tensor) -> None:
        spec, tensors = self._spec, self._tensors
        D, sizes = spec.hidden_size, grid.prod(1, dtype=torch.int32)
        offsets = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        live = offsets[-1:]
        kv = patches.new_empty(len(patches), 2, spec.num_heads, spec.head_dim)
        # of the fused projection, what keys and values need
        weight, bias = tensors["head.qkv.weight"][D:], tensors["head.qkv.bias"][D:]
        linear(patches, weight, bias, out=kv.flatten(1), live_rows=live)
        k, v = kv.unbind(1)
        attended = probe_attention(self.query, k, v, offsets, scale=spec.head_dim**-0.5)
        linear(attended.flatten(1), tensors["head.proj.weight"], tensors["head.proj.bias"], out=out)
        normed = norm(
            out, tensors["head.norm.weight"], tensors["head.norm.bias"], spec.eps, kind="layer"
        )
        up = linear(
            normed, tensors["head.up.weight"], tensors["head.up.bias"], activation=spec.activation
        )
        linear(up, tensors["head.down.weight"], residual=out)
        out.add_(tensors["head.down.bias"])
