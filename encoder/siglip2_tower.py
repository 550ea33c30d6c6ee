"""A SigLIP 2 tower as capture sees it: one token a patch, and one pooled row an image."""

from collections.abc import Mapping, Sequence

import torch

from ..capture import BufferSpec, EncoderItemSpec, Pruning, RungLimits
from .forward import Batch, tower_forward
from .grids import Grid
from .recordable import RecordableTower
from .siglip2_head import ProbeHead
from .spec import EncoderSpec
from .weights import TowerWeights


class Siglip2Tower(RecordableTower):
    """The forward of a SigLIP 2 tower, eager or to be recorded.

    Outputs are "last_hidden_state" [T, D] behind the last norm and, in a tower with a head,
    "pooler_output" [items, D].

    Attributes: those of `VisionEncoder` that a tower has, and
        head: What pools the patches of an image; None if the tower has no head.
    """

    def __init__(self, spec: EncoderSpec, weights: TowerWeights, attention: str | None):
        super().__init__(spec, weights, attention)
        self.head = ProbeHead(spec, weights.tensors) if "head.probe" in weights.tensors else None

    def item_specs(self, grid_thw: Sequence[Grid]) -> list[EncoderItemSpec]:
        """What each image takes of a rung.

        Raises:
            ValueError: a grid of several frames.
        """
        for index, grid in enumerate(grid_thw):
            if grid[0] != 1:
                raise ValueError(
                    f"grid_thw[{index}] = {tuple(grid)}: SigLIP 2 takes images; pass every frame "
                    f"as an item of its own, (1, {grid[1]}, {grid[2]})"
                )
        return super().item_specs(grid_thw)

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        """Capacities of a rung; an image is one frame."""
        items = min(max_items, max_frames)
        return RungLimits(token_budget, token_budget, items, items, 0)

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static outputs of a rung."""
        specs = super().output_specs(limits)
        if self.head is not None:
            pooled = (limits.max_items, self.spec.hidden_size)
            specs["pooler_output"] = BufferSpec(pooled, self.dtype, "items")
        return specs

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """The work that a graph records."""
        batch = Batch(inputs["pixel_values"], inputs["grid"], limits, limits.max_patches)
        self._run(batch, outputs)

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[Grid],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        """The same kernels on exactly these images, into new tensors.

        Raises:
            ValueError: `pruning` is given: tokens of images are not pruned.
        """
        if pruning is not None:
            raise ValueError("pruning: the images of SigLIP 2 lose no tokens; leave it out")
        return self._eager_images(pixel_values, grid_thw, (), {})

    def fingerprint(self) -> str:
        """What this tower's speed depends on, its head too."""
        return f"{super().fingerprint()} head={self.head is not None}"

    def _eager_images(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[Grid],
        layers: Sequence[int],
        states: dict[int, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The outputs of exactly these images; `states` takes those of blocks `layers`."""
        pixels = pixel_values.to(device=self.device, dtype=self.dtype).contiguous()
        width = self.spec.hidden_size
        outputs = {"last_hidden_state": pixels.new_empty(len(pixels), width)}
        if self.head is not None:
            outputs["pooler_output"] = pixels.new_empty(len(grid_thw), width)
        states.update({i: pixels.new_empty(len(pixels), width) for i in layers})
        if len(grid_thw):
            table = torch.tensor(grid_thw, dtype=torch.int32).to(self.device, non_blocking=True)
            longest = max(h * w for _, h, w in grid_thw)
            batch = Batch(pixels, table, self._exact_limits(grid_thw), longest)
            self._run(batch, outputs, states)
        return outputs

    def _run(
        self,
        batch: Batch,
        outputs: Mapping[str, torch.Tensor],
        states: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        tower_forward(self.weights, batch, outputs, attention=self.attention, states=states)
        if self.head is not None:
            self.head(outputs["last_hidden_state"], batch.grid, outputs["pooler_output"])
