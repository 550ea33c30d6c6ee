"""One path of a tower of whole images, images of one size, as capture sees it."""

from collections.abc import Mapping, Sequence

import torch

from ..capture import BufferSpec, EncoderItemSpec, Pruning, RungLimits
from ..kernels.attention import check_backend, choose_backend
from ..kernels.tables import tuning
from .capturable import compile_by_halves
from .grids import Grid
from .image_forward import ImageBatch, ImageSize, image_forward
from .image_weights import ImageTowerWeights

MAX_PATCHES = 65536  # of the largest rung of an automatic ladder


class TowerPath:
    """The forward for images of one size: `capture.SupportsEncoderCudaGraph`.

    An item is one image. Its grid (`fixed_grid`) is always (1, rows, columns) of its patches, and
    its pixel rows are the image as it lies in memory, cut into as many pieces as it has patches.

    Attributes:
        size: Of the images.
        device, dtype: Of the weights.
        attention: Backend of the attention.
    """

    def __init__(self, weights: ImageTowerWeights, size: ImageSize, attention: str | None):
        parameter = weights.tensors["patch.weight"]
        head_dim = weights.spec.head_dim
        self.size = size
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        if attention is None:
            attention = choose_backend(self.device, self.dtype, head_dim)
        else:
            check_backend(attention, self.dtype, self.device, head_dim)
        self.attention = attention
        self._weights = weights

    @property
    def fixed_grid(self) -> Grid:
        """The grid of every item."""
        return (1, *self.size.stages[0])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows of an image, width) of each output."""
        spec, size = self._weights.spec, self.size
        shapes = {"last_hidden_state": (size.state_rows, spec.state_size)}
        return shapes | ({"pooler_output": (size.tokens, spec.out_size)} if spec.out_size else {})

    def pixel_rows(self, images: torch.Tensor) -> torch.Tensor:
        """[N * patches, P] of images [N, C, H, W]; a view where they are contiguous."""
        values = self._weights.spec.patch_values
        return images.contiguous().view(len(images) * self.size.patches, values)

    def budget_range(self) -> tuple[int, int]:
        """Smallest and largest rung of an automatic ladder, in tokens."""
        return self.size.tokens, self.image_counts()[-1] * self.size.tokens

    def image_counts(self, most: int | None = None) -> list[int]:
        """Images of the rungs of an automatic ladder: above 8 at most an eighth apart.

        Args:
            most: Images of the largest rung; None for as many as have `MAX_PATCHES` patches.
        """
        most = max(1, MAX_PATCHES // self.size.patches) if most is None else most
        counts = [1]
        while counts[-1] < most:
            octave = 1 << (counts[-1].bit_length() - 1)
            counts.append(min(most, counts[-1] + max(1, octave // 8)))
        return counts

    def item_specs(self, grid_thw: Sequence[Grid]) -> list[EncoderItemSpec]:
        """What each image takes of a rung.

        Raises:
            ValueError: a grid that is not this path's.
        """
        for grid in grid_thw:
            if tuple(grid) != self.fixed_grid:
                raise ValueError(
                    f"grid {tuple(grid)}: every image of this path has {self.size.height} x "
                    f"{self.size.width} pixels and the grid {self.fixed_grid}"
                )
        size = self.size
        pairs = size.rows**2
        item = EncoderItemSpec(size.patches, size.tokens, attention_pairs=pairs)
        return [item] * len(grid_thw)

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        """Capacities of a rung.

        Raises:
            ValueError: the budget is not that of whole images.
        """
        images, rest = divmod(token_budget, self.size.tokens)
        if rest or not images:
            raise ValueError(
                f"token budget {token_budget}: an image of {self.size.height} x {self.size.width} "
                f"pixels has {self.size.tokens} tokens; use multiples of that"
            )
        items = min(images, max_items, max_frames)
        return RungLimits(token_budget, images * self.size.patches, items, items, 0)

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static inputs of a rung."""
        pixels = (limits.max_patches, self._weights.spec.patch_values)
        return {
            "pixel_values": BufferSpec(pixels, self.dtype, "patches"),
            "grid": BufferSpec((limits.max_items, 3), torch.int32, "items"),
        }

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static outputs of a rung."""
        specs = {}
        for name, (rows, width) in self.shapes.items():
            if rows == self.size.tokens:
                specs[name] = BufferSpec((limits.token_budget, width), self.dtype, "tokens")
            else:
                # rows that are neither patches nor tokens are counted by images
                shape = (limits.max_items, rows * width)
                specs[name] = BufferSpec(shape, self.dtype, "items")
        return specs

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """The work that a graph records."""
        items = limits.max_items  # fewer than tokens would allow, where the configuration says so
        batch = ImageBatch(
            inputs["pixel_values"][: items * self.size.patches], inputs["grid"], self.size
        )
        used = {
            name: outputs[name].view(-1, width)[: items * rows]
            for name, (rows, width) in self.shapes.items()
        }
        image_forward(self._weights, batch, used, self.attention)

    def compile_kernels(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        rungs: Sequence[RungLimits],
    ) -> None:
        """Compile the kernels of some of `rungs`, several at a time."""
        compile_by_halves(self, inputs, outputs, rungs)

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
            raise ValueError("pruning: images of one size lose no tokens; leave it out")
        pixels = pixel_values.to(device=self.device, dtype=self.dtype).contiguous()
        images = len(grid_thw)
        outputs = {
            name: pixels.new_empty(images * rows, width)
            for name, (rows, width) in self.shapes.items()
        }
        if images:
            table = torch.tensor(grid_thw, dtype=torch.int32).to(self.device, non_blocking=True)
            batch = ImageBatch(pixels, table, self.size)
            image_forward(self._weights, batch, outputs, self.attention)
        return {
            name: outputs[name]
            if rows == self.size.tokens
            else outputs[name].view(images, rows * width)
            for name, (rows, width) in self.shapes.items()
        }

    def fingerprint(self) -> str:
        """What this path's speed depends on."""
        tables = tuning(self.device).fingerprint()
        size = f"{self.size.height}x{self.size.width}"
        plan = self._weights.fp8.plan
        tower = f"{self._weights.spec} {size} {self.dtype} {self.attention} {tables}"
        return tower + ("" if plan is None else f" {plan}")
