"""A tower as capture sees it: what items take, its static buffers, and the work of a graph."""

from collections.abc import Mapping, Sequence

import torch

from ..capture import BufferSpec, EncoderItemSpec, Pruning, RungLimits
from ..capture.protocol import Rows
from ..kernels.attention import check_backend, choose_backend
from ..kernels.layout import num_windows
from ..kernels.tables import tuning
from .capturable import compile_by_halves
from .forward import Batch, output_shapes, tower_forward
from .grids import Grid
from .pruning import KEPT_INDEX, check_prunable, plan_pruning, prune
from .spec import EncoderSpec
from .weights import TowerWeights

MIN_PATCHES, MAX_PATCHES = 64, 65536  # of an automatic ladder


class RecordableTower:
    """The forward of a tower, eager or to be recorded: a `capture.SupportsEncoderCudaGraph`.

    Attributes: see `VisionEncoder`.
    """

    def __init__(self, spec: EncoderSpec, weights: TowerWeights, attention: str | None):
        parameter = weights.tensors["patch.weight"]
        self.spec = spec
        self.weights = weights
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        if attention is None:
            attention = choose_backend(self.device, self.dtype, spec.head_dim)
        else:
            check_backend(attention, self.dtype, self.device, spec.head_dim)
        self.attention = attention
        self._records_pruning = False

    def budget_range(self) -> tuple[int, int]:
        """Smallest and largest rung of an automatic ladder, in tokens."""
        per_token = self.spec.patches_per_token
        return MIN_PATCHES // per_token, MAX_PATCHES // per_token

    def item_specs(self, grid_thw: Sequence[Grid]) -> list[EncoderItemSpec]:
        """What each item takes of a rung."""
        spec = self.spec
        return [
            EncoderItemSpec(
                input_size=t * h * w,
                output_tokens=spec.num_tokens(t, h, w),
                num_frames=spec.num_segments(t),
                num_windows=t * num_windows(h, w, spec.window_size),
                attention_pairs=spec.num_segments(t) * spec.segment_size(t, h, w) ** 2,
            )
            for t, h, w in grid_thw
        ]

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        """Capacities of a rung.

        Windows of 16 tokens tile a frame but for its lower and right edge; twice as many and one a
        frame are room for all but the thinnest grids, which run eagerly.
        """
        full = (self.spec.window_size // self.spec.merge_size) ** 2
        windows = -(-2 * token_budget // full) + max_frames if full else 0
        patches = token_budget * self.spec.patches_per_token
        return RungLimits(token_budget, patches, max_items, max_frames, windows)

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static inputs of a rung."""
        pixels = (limits.max_patches, self.spec.patch_values)
        specs = {
            "pixel_values": BufferSpec(pixels, self.dtype, "patches"),
            "grid": BufferSpec((limits.max_items, 3), torch.int32, "items"),
        }
        if self._records_pruning:
            specs["keep"] = BufferSpec((limits.max_items,), torch.int32, "items")
            specs["keep_mask"] = BufferSpec((limits.token_budget,), torch.uint8, "tokens")
        return specs

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static outputs of a rung."""
        merged: Rows = "kept" if self._records_pruning else "tokens"
        last: Rows = "tokens" if self.spec.merger == "glm" else "patches"
        specs = {
            name: BufferSpec(shape, self.dtype, last if name == "last_hidden_state" else merged)
            for name, shape in output_shapes(self.spec, limits.max_patches).items()
        }
        if self._records_pruning:
            specs[KEPT_INDEX] = BufferSpec((limits.token_budget,), torch.int32, "kept")
        return specs

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """The work that a graph records."""
        batch = Batch(inputs["pixel_values"], inputs["grid"], limits, limits.max_patches)
        if not self._records_pruning:
            tower_forward(self.weights, batch, outputs, attention=self.attention)
            return
        whole = self._before_pruning(outputs, limits.max_patches)
        tower_forward(self.weights, batch, {**outputs, **whole}, attention=self.attention)
        prune(self.spec, inputs["grid"], inputs["keep"], inputs["keep_mask"], whole, outputs)

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
        """The same kernels on exactly this layout, into new tensors."""
        if pruning is None and self._records_pruning:
            pruning = plan_pruning(self.spec, grid_thw, 0.0, None)
        return self._eager(pixel_values, grid_thw, [], {}, pruning)

    def fingerprint(self) -> str:
        """What this tower's speed depends on."""
        tables = tuning(self.device).fingerprint()
        tower = f"{self.spec} {self.dtype} {self.attention} pruning={self._records_pruning}"
        plan = self.weights.fp8.plan
        return f"{tower} {tables}" + ("" if plan is None else f" {plan}")

    def _before_pruning(
        self, outputs: Mapping[str, torch.Tensor], num_patches: int
    ) -> dict[str, torch.Tensor]:
        """Tensors for the outputs that pruning shortens."""
        return {
            name: outputs[name].new_empty(shape)
            for name, shape in output_shapes(self.spec, num_patches).items()
            if name != "last_hidden_state"
        }

    def _eager(
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[Grid],
        layers: list[int],
        states: dict[int, torch.Tensor],
        pruning: Pruning | None,
    ) -> dict[str, torch.Tensor]:
        if pruning is not None:
            check_prunable(self.spec)
        pixels = pixel_values.to(device=self.device, dtype=self.dtype).contiguous()
        tokens = sum(self.spec.num_tokens(*grid) for grid in grids)
        outputs = {
            name: pixels.new_empty(shape)
            for name, shape in output_shapes(self.spec, pixels.shape[0], tokens).items()
        }
        states.update({i: pixels.new_empty(len(pixels), self.spec.hidden_size) for i in layers})
        if grids:
            table = torch.tensor(grids, dtype=torch.int32).to(self.device, non_blocking=True)
            longest = max(self.spec.segment_size(*grid) for grid in grids)
            batch = Batch(pixels, table, self._exact_limits(grids), longest)
            tower_forward(self.weights, batch, outputs, attention=self.attention, states=states)
            if pruning is not None:
                return self._pruned(table, outputs, pruning)
        elif pruning is not None:
            outputs[KEPT_INDEX] = pixels.new_empty(0, dtype=torch.int32)
        return outputs

    def _pruned(
        self, table: torch.Tensor, outputs: dict[str, torch.Tensor], pruning: Pruning
    ) -> dict[str, torch.Tensor]:
        """The outputs of exactly one layout, shortened to the tokens that it keeps."""
        pairs = zip(pruning.keep, pruning.masked, strict=True)
        keep = torch.tensor([-1 if masked else count for count, masked in pairs], dtype=torch.int32)
        mask = None if pruning.mask is None else pruning.mask.to(self.device, non_blocking=True)
        whole = {name: rows for name, rows in outputs.items() if name != "last_hidden_state"}
        rows, width = sum(pruning.keep), self.spec.out_size
        short = {name: tensor.new_empty(rows, width) for name, tensor in whole.items()}
        short[KEPT_INDEX] = table.new_empty(rows)
        prune(self.spec, table, keep.to(self.device, non_blocking=True), mask, whole, short)
        return {"last_hidden_state": outputs["last_hidden_state"], **short}

    def _exact_limits(self, grids: Sequence[Grid]) -> RungLimits:
        items = self.item_specs(grids)
        return RungLimits(
            token_budget=sum(i.output_tokens for i in items),
            max_patches=sum(i.input_size for i in items),
            max_items=len(items),
            max_frames=sum(i.num_frames for i in items),
            max_windows=sum(i.num_windows for i in items),
        )
