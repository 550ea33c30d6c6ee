"""SigLIP 2 (NaFlex) with its pooled head, beside Hugging Face's tower on padded batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..encoder.siglip2_encoder import Siglip2Encoder, Siglip2Output
from .image_contest import Parts
from .towers_config import boost_

SIGLIP2_TOWERS: dict[str, dict[str, int]] = {
    "siglip2-base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "siglip2-so400m": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
}  # fmt: skip
# rows and columns of patches of each image; the processor pads to 256 by default
_MIX = ((16, 16), (12, 21), (21, 12), (14, 18), (10, 25), (19, 13), (8, 32), (16, 15))
WORKLOADS: dict[str, tuple[tuple[int, int], ...]] = {
    "1image": _MIX[:1],
    "16images": 2 * _MIX,
    "64images": 8 * _MIX,
    "8images+1024": (
        (32, 32),
        (24, 42),
        (42, 24),
        (28, 36),
        (16, 16),
        (20, 50),
        (38, 26),
        (32, 31),
    ),
}


class Siglip2Inputs(NamedTuple):
    """The arguments of Hugging Face's tower."""

    pixel_values: torch.Tensor
    pixel_attention_mask: torch.Tensor
    spatial_shapes: torch.Tensor


class Siglip2Contest:
    """Hugging Face's tower in the dtype and in fp32, and ours, on one device."""

    def __init__(self, sizes: dict[str, int], device: torch.device, dtype: torch.dtype, seed: int):
        self.tower = boost_(_hf_tower(sizes, device, dtype), seed)
        self.exact = _hf_tower(sizes, device, torch.float32)
        self.exact.load_state_dict(self.tower.state_dict())
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.encoder = Siglip2Encoder.from_hf(self.tower)

    def inputs(self, workload: Sequence[tuple[int, int]]) -> Siglip2Inputs:
        """Images padded as Hugging Face's processor pads them."""
        counts = [h * w for h, w in workload]
        longest = 256 if max(counts) <= 256 else 1024
        shape = len(counts), longest, self.encoder.spec.patch_values
        pixels = torch.randn(shape, device=self.device, generator=self.generator)
        mask = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
        return Siglip2Inputs(
            (pixels * mask.to(self.device)[..., None]).to(self.dtype),
            mask.to(self.device, torch.int32),
            torch.tensor(workload),  # on the CPU, where both sides read it
        )

    def patches(self, inputs: Siglip2Inputs) -> int:
        """Patches of all images, without padding."""
        return int(inputs.spatial_shapes.prod(1).sum())

    def theirs(self, inputs: Siglip2Inputs, *, exact: bool = False) -> Parts:
        """Patches without padding, and one pooled row an image."""
        output = (self.exact if exact else self.tower)(**inputs._asdict())
        return self.recorded_parts([output.last_hidden_state, output.pooler_output], inputs)

    def theirs_without_host(self, inputs: Siglip2Inputs) -> Callable[[], Parts]:
        """With positions and masks computed beforehand."""
        tower: Any = self.tower
        embed, head = tower.embeddings, tower.head
        count, length = inputs.pixel_values.shape[:2]
        side = embed.position_embedding_size
        positions = embed.resize_positional_embeddings(
            embed.position_embedding.weight.reshape(side, side, -1), inputs.spatial_shapes, length
        )
        keys = inputs.pixel_attention_mask.bool()[:, None, None]
        mask = keys.expand(count, 1, length, length)
        probe_mask = torch.zeros(count, 1, 1, length, dtype=self.dtype, device=self.device)
        probe_mask.masked_fill_(~keys, torch.finfo(self.dtype).min)
        probe_mask = probe_mask.expand(-1, head.num_heads, -1, -1).reshape(-1, 1, length)

        def run() -> Parts:
            x = embed.patch_embedding(inputs.pixel_values) + positions
            for layer in tower.encoder.layers:
                x = layer(x, mask)
            x = tower.post_layernorm(x)
            probe = head.probe.repeat(count, 1, 1)
            pooled = head.attention(probe, x, x, attn_mask=probe_mask, need_weights=False)[0]
            return [x, (pooled + head.mlp(head.layernorm(pooled)))[:, 0]]

        return run

    def recorded_parts(self, output: Parts, inputs: Siglip2Inputs) -> Parts:
        """Hugging Face's without the rows of padding, which selecting reads on the host."""
        states, pooled = output
        return [states[inputs.pixel_attention_mask.bool()], pooled]

    def ours(self, inputs: Siglip2Inputs) -> Siglip2Output:
        """The same arguments; the mask says nothing that the shapes do not."""
        return self.encoder(inputs.pixel_values, inputs.spatial_shapes, check_finite=False)

    def parts(self, output: Siglip2Output, inputs: Siglip2Inputs) -> Parts:
        """Packed patches and pooled rows."""
        assert output.pooler_output is not None  # the tower has its head
        return [output.last_hidden_state, output.pooler_output]


def _hf_tower(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    from transformers.initialization import no_init_weights
    from transformers.models.siglip2 import modeling_siglip2

    cls: Any = modeling_siglip2.Siglip2VisionModel
    with torch.device(device), no_init_weights():
        tower = cls._from_config(cls.config_class(**sizes), dtype=dtype, attn_implementation="sdpa")
    return tower.eval().requires_grad_(False)
