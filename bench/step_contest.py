"""Step towers and projectors on whole images and crops: Step-3.7 beside Hugging Face's.

Step3 is not in transformers: beside ours runs the tower of `step3_plain`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..encoder.image_spec import ImageTowerSpec
from ..encoder.image_tower import live_tensors, live_weights
from ..encoder.step_encoder import StepEncoder
from ..encoder.step_spec import LOCAL_SIZE
from ..encoder.step_swap import rope_axes_of
from .image_contest import Parts
from .step3_plain import boost_step3_, plain_tower
from .towers_config import boost_

# crops of each image
WORKLOADS: dict[str, tuple[int, ...]] = {
    "1whole": (0,),
    "1whole+6": (6,),
    "4whole": (0, 0, 0, 0),
    "4whole+10": (6, 0, 4, 0),
    "8whole+24": (6, 0, 4, 0, 8, 2, 4, 0),
}
# without the largest: a patch costs three times what it does in Step-3.7, in the fp32 oracle too
STEP3_WORKLOADS = {name: crops for name, crops in WORKLOADS.items() if name != "8whole+24"}


class StepInputs(NamedTuple):
    """Whole images, crops (None for none), and how many crops each image has."""

    wholes: torch.Tensor
    crops: torch.Tensor | None
    counts: tuple[int, ...]

    def batches(self) -> list[torch.Tensor]:
        """What the tower runs on."""
        return [images for images in (self.wholes, self.crops) if images is not None]


class _OursOnStep:
    """Our encoder, with weights that a peer shares, and what is drawn for both."""

    def __init__(self, spec: ImageTowerSpec, tensors: dict[str, torch.Tensor], seed: int):
        local_size = min(LOCAL_SIZE, spec.image_size)
        self.encoder = StepEncoder(spec, live_weights(spec, tensors), local_size=local_size)
        self.spec, self.device, self.dtype = spec, self.encoder.device, self.encoder.dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def inputs(self, workload: Sequence[int]) -> StepInputs:
        """Whole images with so many crops each, in the dtype."""

        def draw(count: int, path: str) -> torch.Tensor:
            size = self.encoder.paths[path].size
            shape = count, self.spec.in_channels, size.height, size.width
            pixels = torch.randn(shape, device=self.device, generator=self.generator)
            return pixels.to(self.dtype)

        crops = sum(workload)
        return StepInputs(
            draw(len(workload), "global"), draw(crops, "local") if crops else None, tuple(workload)
        )

    def patches(self, inputs: StepInputs) -> int:
        """Patches of all images and crops."""
        paths = self.encoder.paths
        whole, crop = (p.size.patches for p in (paths["global"], paths["local"]))
        return len(inputs.counts) * whole + sum(inputs.counts) * crop

    def recorded_parts(self, output: Parts, inputs: StepInputs) -> Parts:
        """They are those of `theirs` already."""
        return output

    def ours(self, inputs: StepInputs) -> list[torch.Tensor]:
        """Features by image."""
        return self.encoder(*inputs, check_finite=False).pooler_output

    def parts(self, output: Sequence[torch.Tensor], inputs: StepInputs) -> Parts:
        """Of whole images and of crops, which each image has in front."""
        per_crop, counts = self.encoder.paths["local"].size.tokens, inputs.counts
        pairs = list(zip(output, counts, strict=True))
        wholes = torch.stack([features[n * per_crop :] for features, n in pairs])
        if inputs.crops is None:
            return [wholes]
        crops = torch.cat([features[: n * per_crop] for features, n in pairs])
        return [wholes, crops.view(sum(counts), per_crop, -1)]


class StepContest(_OursOnStep):
    """Hugging Face's tower in the dtype and in fp32, and ours, on one device."""

    def __init__(self, spec: ImageTowerSpec, device: torch.device, dtype: torch.dtype, seed: int):
        self.tower, self.projector = _hf_modules(spec, device, dtype)
        # compared with what transformers computes, so its order of axes counts
        spec = replace(spec, rope_axes=rope_axes_of(self.tower))
        boost_(self.tower, seed)
        boost_(self.projector, seed + 1)
        self.exact = _hf_modules(spec, device, torch.float32)
        for wide, half in zip(self.exact, (self.tower, self.projector), strict=True):
            wide.load_state_dict(half.state_dict())
        super().__init__(spec, live_tensors(self.tower, self.projector), seed)

    def theirs(self, inputs: StepInputs, *, exact: bool = False) -> Parts:
        """Projected tokens of the whole images, and of the crops if there are any."""
        tower, projector = self.exact if exact else (self.tower, self.projector)
        batches = [x.to(projector.weight.dtype) for x in inputs.batches()]
        return [projector(tower(x).last_hidden_state) for x in batches]

    def theirs_without_host(self, inputs: StepInputs) -> Callable[[], Parts]:
        """With angles computed beforehand: the tower's forward reads the grid on the host."""
        tower, batches = self.tower, inputs.batches()
        grids = [tuple(side // self.spec.patch_size for side in x.shape[2:]) for x in batches]
        places = [torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids]
        angles = [tower.rotary_emb(batches[0], p.to(self.device)) for p in places]

        def run() -> Parts:
            features = []
            for images, grid, angle in zip(batches, grids, angles, strict=True):
                x = tower.embeddings(images, interpolate_pos_encoding=True)
                x = tower.pre_layernorm(x)
                for layer in tower.layers:
                    x = layer(x, position_embeddings=angle)
                x = x.mT.reshape(len(x), -1, *grid)
                x = tower.downsampler2(tower.downsampler1(x)).flatten(2).mT
                features.append(self.projector(x))
            return features

        return run


class Step3Contest(_OursOnStep):
    """The tower of plain modules in the dtype and in fp32, and ours, on one device."""

    def __init__(self, spec: ImageTowerSpec, device: torch.device, dtype: torch.dtype, seed: int):
        self.tower = boost_step3_(plain_tower(spec, device, dtype), seed)
        self.exact = plain_tower(spec, device, torch.float32)
        self.exact.load_state_dict(self.tower.state_dict())
        super().__init__(spec, dict(self.tower.named_parameters()), seed)

    def theirs(self, inputs: StepInputs, *, exact: bool = False) -> Parts:
        """Projected tokens of the whole images, and of the crops if there are any."""
        tower = self.exact if exact else self.tower
        dtype = torch.float32 if exact else self.dtype
        return [tower(images.to(dtype)) for images in inputs.batches()]

    def theirs_without_host(self, inputs: StepInputs) -> Callable[[], Parts]:
        """The same: it reads nothing on the host."""
        return lambda: self.theirs(inputs)


def _hf_modules(spec: ImageTowerSpec, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tower and projector of transformers, their parameters not yet written, as released."""
    from transformers.initialization import no_init_weights
    from transformers.models.step3p7 import modeling_step3p7

    cls: Any = modeling_step3p7.Step3p7VisionModel
    config = cls.config_class(
        hidden_size=spec.hidden_size, num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads, image_size=spec.image_size,
        mlp_ratio=spec.mlp_size / spec.hidden_size,
    )  # fmt: skip
    with torch.device(device), no_init_weights():
        tower = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
        projector = torch.nn.Linear(spec.state_size, spec.out_size, bias=False, dtype=dtype)
    return tower.eval().requires_grad_(False), projector.requires_grad_(False)
