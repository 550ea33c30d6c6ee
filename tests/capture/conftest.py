"""A tiny encoder whose outputs betray every mistake of layout, and a recorder without CUDA."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vitgraph.capture import (
    BufferSpec,
    EncoderCudaGraphManager,
    EncoderItemSpec,
    Pruning,
    RungLimits,
)

WIDTH = 6
MERGE = 4
LONGEST_SIDE = 64


class FakeEncoder:
    """Every frame is a segment; everything is computed from the grid table, on its device.

    `last_hidden_state` is a patch plus the sum of its frame, `pooler_output` the sum of 4 patches
    plus the item's (h, w). Padding rows of both are NaN. Pixels that are whole numbers make all
    sums exact, so results can be compared bitwise.
    """

    def __init__(self, device: str = "cpu", budget_range: tuple[int, int] = (16, 128)):
        self.device = torch.device(device)
        self.range = budget_range
        self.fail_at: int | None = None
        self.recorded_grids: list[list[list[int]]] = []

    def budget_range(self) -> tuple[int, int]:
        return self.range

    def item_specs(self, grid_thw: Sequence[tuple[int, int, int]]) -> list[EncoderItemSpec]:
        specs = []
        for t, h, w in grid_thw:
            if h % 2 or w % 2 or max(h, w) > LONGEST_SIDE:
                raise ValueError(f"item_specs: grid {(t, h, w)} is odd or over {LONGEST_SIDE}")
            pairs = t * (h * w) ** 2
            specs.append(EncoderItemSpec(t * h * w, t * h * w // MERGE, t, 0, pairs))
        return specs

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        # Rounded up as an aligned GEMM would want it.
        max_patches = -(-token_budget * MERGE // 128) * 128
        return RungLimits(token_budget, max_patches, max_items, max_frames, 0)

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        return {
            "pixel_values": BufferSpec((limits.max_patches, WIDTH), torch.float32, "patches"),
            "grid": BufferSpec((limits.max_items, 3), torch.int32, "items"),
        }

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        return {
            "last_hidden_state": BufferSpec((limits.max_patches, WIDTH), torch.float32, "patches"),
            "pooler_output": BufferSpec((limits.token_budget, WIDTH), torch.float32, "tokens"),
        }

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        if limits.token_budget == self.fail_at:
            raise FloatingPointError("kernel went wrong")
        if self.device.type != "cuda":
            self.recorded_grids.append(inputs["grid"].tolist())
        self._forward(inputs["pixel_values"], inputs["grid"], outputs, limits.max_frames)

    def fingerprint(self) -> str:
        return "fake"

    def compile_kernels(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        rungs: Sequence[RungLimits],
    ) -> None:
        pass

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        patches = sum(t * h * w for t, h, w in grid_thw)
        outputs = {
            "last_hidden_state": torch.empty(patches, WIDTH, device=self.device),
            "pooler_output": torch.empty(patches // MERGE, WIDTH, device=self.device),
        }
        grid = torch.tensor(grid_thw, dtype=torch.int32, device=self.device)
        pixels = pixel_values.to(self.device, torch.float32)
        self._forward(pixels, grid, outputs, sum(t for t, _, _ in grid_thw))
        return outputs

    def _forward(
        self,
        pixels: torch.Tensor,
        grid: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        frames: int,
    ) -> None:
        t, h, w = grid.long().unbind(1)
        item_ends = (t * h * w).cumsum(0)
        frame_ends = t.cumsum(0)
        row = torch.arange(len(pixels), device=self.device)
        live = row < item_ends[-1]
        item = torch.searchsorted(item_ends, row, right=True).clamp(max=len(grid) - 1)
        inside = row - (item_ends - t * h * w)[item]
        frame = (frame_ends - t)[item] + inside // (h * w)[item].clamp(min=1)
        frame = torch.where(live, frame, frames)
        pixels = torch.where(live[:, None], pixels, 0)
        sums = torch.zeros(frames + 1, WIDTH, device=self.device).index_add_(0, frame, pixels)
        hidden = torch.where(live[:, None], pixels + sums[frame], torch.nan)
        outputs["last_hidden_state"].copy_(hidden)
        tokens = len(outputs["pooler_output"])
        merged = pixels[: tokens * MERGE].view(tokens, MERGE, WIDTH).sum(1)
        first = slice(None, tokens * MERGE, MERGE)
        size = (1000 * h + w)[item[first]]
        pooled = torch.where(live[first][:, None], merged + size[:, None], torch.nan)
        outputs["pooler_output"].copy_(pooled)


class PruningEncoder(FakeEncoder):
    """On the CPU, with pruning: an item keeps its last tokens, or those of its mask.

    `announces` is what a captured tower does; without it pruning is in no graph.
    """

    def __init__(self, device: str = "cpu", announces: bool = True):
        super().__init__(device)
        self.announces = announces

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        specs = super().input_specs(limits)
        if self.announces:
            specs["keep"] = BufferSpec((limits.max_items,), torch.int32, "items")
            specs["keep_mask"] = BufferSpec((limits.token_budget,), torch.uint8, "tokens")
        return specs

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        specs = super().output_specs(limits)
        if self.announces:
            specs["pooler_output"] = BufferSpec(specs["pooler_output"].shape, torch.float32, "kept")
            specs["kept_index"] = BufferSpec((limits.token_budget,), torch.int32, "kept")
        return specs

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        whole = dict(outputs)
        if self.announces:
            whole["pooler_output"] = torch.empty(limits.token_budget, WIDTH)
        super().graph_forward(inputs, whole, limits)
        if self.announces:
            grid, keep, mask = (inputs[name] for name in ("grid", "keep", "keep_mask"))
            self._prune(grid.tolist(), keep.tolist(), mask, whole["pooler_output"], outputs)

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        outputs = super().eager_forward(pixel_values, grid_thw)
        if pruning is None:
            if not self.announces:
                return outputs
            sizes = [item.output_tokens for item in self.item_specs(grid_thw)]
            pruning = Pruning(tuple(sizes), (False,) * len(sizes))
        rows = sum(pruning.keep)
        short = {
            "pooler_output": torch.empty(rows, WIDTH),
            "kept_index": torch.empty(rows, dtype=torch.int32),
        }
        mask = torch.empty(0) if pruning.mask is None else pruning.mask
        keep = [-1 if m else k for k, m in zip(pruning.keep, pruning.masked, strict=True)]
        self._prune(grid_thw, keep, mask, outputs["pooler_output"], short)
        return outputs | short

    def _prune(
        self,
        grid: Sequence[Sequence[int]],
        keep: Sequence[int],
        mask: torch.Tensor,
        pooled: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
    ) -> None:
        places, rows, first = [], [], 0
        for (t, h, w), count in zip(grid, keep, strict=True):
            size = t * h * w // MERGE
            chosen = list(range(size - count, size))
            if count < 0:
                chosen = mask[first : first + size].nonzero().flatten().tolist()
            places += chosen
            rows += [first + place for place in chosen]
            first += size
        outputs["pooler_output"].fill_(torch.nan)[: len(rows)] = pooled[rows]
        outputs["kept_index"].fill_(-1)[: len(rows)] = torch.tensor(places, dtype=torch.int32)


def pruning_of(grid: Sequence[tuple[int, int, int]], seed: int = 0) -> Pruning:
    """Whole items, none of an item, some of it, and masks, in turn."""
    generator = torch.Generator().manual_seed(seed)
    keep, pieces = [], []
    for index, (t, h, w) in enumerate(grid):
        size = t * h * w // MERGE
        pieces.append(torch.randint(2, (size,), generator=generator, dtype=torch.uint8))
        some = int(torch.randint(size + 1, (1,), generator=generator))
        keep.append((some, int(pieces[-1].sum()), size, 0)[(index + seed) % 4])
    masked = tuple((index + seed) % 4 == 1 for index in range(len(grid)))
    return Pruning(tuple(keep), masked, torch.cat(pieces) if any(masked) else None)


@pytest.fixture
def fake_encoder() -> type[FakeEncoder]:
    return FakeEncoder


@pytest.fixture
def encoder(fake_encoder: type[FakeEncoder]) -> FakeEncoder:
    """On the CPU."""
    return fake_encoder()


@pytest.fixture
def pruning_encoder() -> type[PruningEncoder]:
    return PruningEncoder


@pytest.fixture
def pruning_for() -> Callable[..., Pruning]:
    return pruning_of


@pytest.fixture
def pixels_for() -> Callable[..., torch.Tensor]:
    """Whole-number pixel rows for a grid."""

    def make(grid: Sequence[tuple[int, int, int]], seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        patches = sum(t * h * w for t, h, w in grid)
        return torch.randint(-8, 9, (patches, WIDTH), generator=generator).float()

    return make


# of managers that `make` builds
CONFIG: dict[str, Any] = {
    "token_budgets": [16, 64, 128],
    "max_vision_items_per_batch": 8,
    "max_frames_per_batch": 32,
}


@pytest.fixture
def make(
    encoder: FakeEncoder, rerun_recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EncoderCudaGraphManager]:
    """`make(**config)`: a captured manager of rungs of 16, 64 and 128 tokens, its cache empty."""
    monkeypatch.setenv("VITGRAPH_CACHE", str(tmp_path))

    def make(**config: Any) -> EncoderCudaGraphManager:
        manager = EncoderCudaGraphManager(encoder, {**CONFIG, **config}, recorder=rerun_recorder)
        manager.capture()
        return manager

    return make


@pytest.fixture
def manager(make: Callable[..., EncoderCudaGraphManager]) -> EncoderCudaGraphManager:
    """What `make` builds without arguments."""
    return make()
