"""A live Hugging Face tower as capture sees it: its own modules over static buffers.

The forward is that of transformers. What it would compute from the grid on the way is computed on
the host and staged (`hf_metadata`), and its attention is ours (`hf_attention`). Nothing in it then
depends on values, so it can be recorded.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..capture import BufferSpec, EncoderItemSpec, Pruning, RungLimits
from ..capture.staging import PIXELS
from ..kernels.attention import check_backend, choose_backend
from .hf_attention import AttentionSwitch
from .hf_metadata import Grid, TowerRefusedError
from .hf_probe import (
    TowerFacts,
    evaluating,
    hf_forward,
    probe,
    read_outputs,
    trial_grids,
    trial_pixels,
)

MIN_BUDGET = 16
# A quarter of the fused towers': Hugging Face's modules hold several fp32 copies of q and k.
MAX_BUDGET = 4096
GRID = "grid_thw"
NEVER = 2**31  # frames of an item that no rung holds
_STAGED = 16  # layouts whose tables are kept
# Norm of the difference of a row between two computations of it, over the norm of the row. Two in
# half precision may be some 0.2 apart after tens of blocks; a row of another image is 1.4 away.
_SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class _Item:
    """What an item's metadata are."""

    frames: int
    windows: int
    pairs: int
    widths: tuple[tuple[int, ...], ...]


class GenericTower:
    """The forward of a Hugging Face tower, eager or to be recorded.

    It is `capture.SupportsEncoderCudaGraph`, and stages its own inputs (`capture.StagesInputs`).

    Args:
        tower: The live tower; its weights are used where they are.
        attention: Backend; None chooses.

    Attributes:
        tower: The tower.
        device, dtype: Of its weights.
        facts: How it runs.
        attention: Backend of most calls.
        switch: What gives it our attention for the time of a call.

    Raises:
        TowerRefusedError: the tower cannot run over static buffers, or what it gives there is not
            what its own forward gives; the message says why.
        ValueError: the attention backend cannot be used.
    """

    def __init__(self, tower: torch.nn.Module, attention: str | None = None):
        parameter = _check_parameters(tower)
        self.tower = tower
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self.switch = AttentionSwitch(tower)
        with self.switch.held():
            self.facts: TowerFacts = probe(tower, self.switch)
        if attention is None:
            attention = choose_backend(self.device, self.dtype, self.facts.head_dim)
        else:
            check_backend(attention, self.dtype, self.device, self.facts.head_dim)
        self.attention = attention
        self._any_grid = torch.ones(1, 3, dtype=torch.int64, device=self.device)
        self._staged: OrderedDict[object, dict[str, torch.Tensor]] = OrderedDict()
        self._item = lru_cache(4096)(self._describe)
        self._window_tokens = 0.0  # in a large image; 0 without windows
        if self.facts.metadata.window_offsets is not None:
            large = (1, 64 * self.facts.merge, 64 * self.facts.merge)
            self._window_tokens = self.facts.tokens(large) / self._item(large).windows
        self._prove()

    def budget_range(self) -> tuple[int, int]:
        """Smallest and largest rung of an automatic ladder, in tokens."""
        return MIN_BUDGET, MAX_BUDGET

    def item_specs(self, grid_thw: Sequence[Grid]) -> list[EncoderItemSpec]:
        """What each item takes of a rung.

        Raises:
            ValueError: a grid of no whole number of tokens, or of more frames than the tower takes.
        """
        name, merge = type(self.tower).__name__, self.facts.merge
        most = self.facts.max_frames_per_item
        specs = []
        for index, grid in enumerate(grid_thw):
            t, h, w = grid
            if h % merge or w % merge:
                raise ValueError(
                    f"{name}: grid_thw[{index}] = ({t}, {h}, {w}): height and width must be "
                    f"multiples of the merge size {merge}; resize the image"
                )
            if most is not None and t > most:
                raise ValueError(
                    f"{name}: grid_thw[{index}] = ({t}, {h}, {w}) has {t} frames, and the tower "
                    f"takes {most}; pass every frame as an item of its own, (1, {h}, {w})"
                )
            item = self._item(grid)
            fits = item.widths == self._widths
            specs.append(
                EncoderItemSpec(
                    input_size=t * h * w,
                    output_tokens=self.facts.tokens(grid),
                    num_frames=item.frames if fits else NEVER,
                    num_windows=item.windows,
                    attention_pairs=item.pairs,
                )
            )
        return specs

    def rung_limits(self, token_budget: int, max_items: int, max_frames: int) -> RungLimits:
        """Capacities of a rung: room for twice as many windows as a large image has, and one more
        for each frame."""
        patches = token_budget * self.facts.merge**2
        windows = 0
        if self._window_tokens:
            windows = int(2 * token_budget / self._window_tokens) + 1 + max_frames
        return RungLimits(token_budget, patches, max_items, max_frames, windows)

    def input_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static inputs of a rung."""
        pixels = (limits.max_patches, *self.facts.pixel_shape)
        specs = {PIXELS: BufferSpec(pixels, self.dtype, "patches")}
        for name, spec in self.facts.metadata.inputs.items():
            specs[name] = BufferSpec((spec.num_rows(limits), *spec.width), spec.dtype, spec.rows)
        if self.facts.reads_grid:  # a row for each segment, and one for what is in none
            specs[GRID] = BufferSpec((limits.max_frames + 1, 3), torch.int64, "frames")
        return specs

    def output_specs(self, limits: RungLimits) -> dict[str, BufferSpec]:
        """Static outputs of a rung."""
        rows = {"patches": limits.max_patches, "tokens": limits.token_budget}
        return {
            out.name: BufferSpec((rows[out.rows], *out.width), out.dtype, out.rows)
            for out in self.facts.outputs
        }

    def stage(self, grid_thw: Sequence[Grid], limits: RungLimits) -> Mapping[str, torch.Tensor]:
        """The inputs of a rung beside its pixels, on the host; kept for layouts that come again."""
        key = (tuple(grid_thw), limits)
        tables = self._staged.get(key)
        if tables is None:
            tables = self._staged[key] = self._tables(grid_thw, limits)
            while len(self._staged) > _STAGED:
                self._staged.popitem(last=False)
        self._staged.move_to_end(key)
        return tables

    def graph_forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        limits: RungLimits,
    ) -> None:
        """The work that a graph records."""
        pixels, metadata = inputs[PIXELS], self.facts.metadata
        live = torch.arange(len(pixels), device=self.device) < inputs[metadata.frame_offsets][-1]
        # whatever an earlier batch left is not to be multiplied
        pixels = pixels.masked_fill(~live.view(-1, *[1] * (pixels.ndim - 1)), 0)
        given: dict[str, Any] = {name: inputs[name] for name in metadata.inputs}
        given |= dict.fromkeys(metadata.lengths, limits.max_patches)
        # no side is zero, that a row could be divided by
        grid = inputs[GRID].clamp(min=1) if self.facts.reads_grid else self._any_grid
        tensors = self._run(pixels, grid, given)
        for name, tensor in tensors.items():
            outputs[name].copy_(tensor)

    def compile_kernels(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        rungs: Sequence[RungLimits],
    ) -> None:
        """Nothing: of our kernels only attention runs, and warming up compiles it."""

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[Grid],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        """The same forward on exactly this layout, into new tensors.

        Items whose metadata differ in shape, such as videos of other lengths in a tower that
        averages frames, are computed one group after the other.
        """
        if pruning is not None:
            raise ValueError(
                f"{type(self.tower).__name__}: only fused towers prune tokens (see `vitgraph info`)"
            )
        grids = list(grid_thw)
        pixels = pixel_values.to(device=self.device, dtype=self.dtype)
        pixels = pixels.reshape(-1, *self.facts.pixel_shape)
        groups: dict[object, list[int]] = {}
        for index, grid in enumerate(grids):
            groups.setdefault(self._item(grid).widths, []).append(index)
        if len(groups) == 1:
            return self._exactly(pixels, grids)
        if not groups:
            return {
                out.name: pixels.new_empty((0, *out.width), dtype=out.dtype)
                for out in self.facts.outputs
            }
        return self._by_groups(pixels, grids, list(groups.values()))

    def fingerprint(self) -> str:
        """What this tower's speed depends on."""
        config: Any = self.tower.config
        name = type(self.tower).__name__
        return f"{name} {config.to_json_string()} {self.dtype} {self.attention}"

    @property
    def _widths(self) -> tuple[tuple[int, ...], ...]:
        return tuple(spec.width for spec in self.facts.metadata.inputs.values())

    def _describe(self, grid: Grid) -> _Item:
        metadata = self.facts.metadata
        values = metadata.compute([grid])
        offsets = values[metadata.frame_offsets].tolist()
        windows = metadata.window_offsets
        return _Item(
            frames=len(offsets) - 1,
            windows=0 if windows is None else len(values[windows]) - 1,
            pairs=sum((b - a) ** 2 for a, b in pairwise(offsets)),
            widths=tuple(tuple(value.shape[1:]) for value in values.values()),
        )

    def _tables(self, grids: Sequence[Grid], limits: RungLimits) -> dict[str, torch.Tensor]:
        metadata, pin = self.facts.metadata, self.device.type == "cuda"
        values = metadata.compute(grids)
        tables = {
            name: spec.padded(values[name], spec.num_rows(limits), pin)
            for name, spec in metadata.inputs.items()
        }
        if self.facts.reads_grid:
            table = torch.ones(limits.max_frames + 1, 3, dtype=torch.int64, pin_memory=pin)
            table[: len(grids)] = torch.tensor(grids)
            tables[GRID] = table
        return tables

    def _run(
        self, pixels: torch.Tensor, grid: torch.Tensor, given: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The tower's forward with everything handed in."""
        if self.facts.batched:
            pixels = pixels[None]
        with self.switch.using(self.attention), evaluating(self.tower):
            output = hf_forward(self.tower)(pixels, grid_thw=grid, **given)
        return read_outputs(output, self.facts.outputs)

    def _exactly(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        metadata = self.facts.metadata
        values = metadata.compute(grids)
        given: dict[str, Any] = {name: self._to_device(value) for name, value in values.items()}
        given |= metadata.longest(values)
        grid = self._to_device(torch.tensor(grids)) if self.facts.reads_grid else self._any_grid
        return self._run(pixels, grid, given)

    def _by_groups(
        self, pixels: torch.Tensor, grids: Sequence[Grid], groups: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        sizes = {
            "patches": [t * h * w for t, h, w in grids],
            "tokens": [self.facts.tokens(grid) for grid in grids],
        }
        ends = [0, *accumulate(sizes["patches"])]
        parts: dict[str, list[torch.Tensor]] = {
            out.name: [pixels] * len(grids) for out in self.facts.outputs
        }
        for group in groups:
            rows = torch.cat([pixels[ends[i] : ends[i + 1]] for i in group])
            results = self._exactly(rows, [grids[i] for i in group])
            for out in self.facts.outputs:
                pieces = results[out.name].split([sizes[out.rows][i] for i in group])
                for index, piece in zip(group, pieces, strict=True):
                    parts[out.name][index] = piece
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    def _to_device(self, value: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)

    def _prove(self) -> None:
        """Hold static buffers with poisoned padding against the tower's own forward.

        Raises:
            TowerRefusedError: the results differ.
        """
        merge = self.facts.merge
        grids = trial_grids(merge)
        if self.facts.max_frames_per_item is None and not self.facts.pools_frames:
            grids.append((2, 2 * merge, 2 * merge))
        items = self.item_specs(grids)
        budget = 2 * sum(item.output_tokens for item in items)
        limits = self.rung_limits(budget, 8, 8)
        like = next(self.tower.parameters())
        with torch.inference_mode(False), torch.no_grad():
            pixels = trial_pixels(self.facts.pixel_shape, grids, like, self.facts.batched)
            with self.switch.split(), evaluating(self.tower):
                table = torch.tensor(grids, device=self.device)
                own = hf_forward(self.tower)(pixels, grid_thw=table)
            expected = read_outputs(own, self.facts.outputs)
            inputs = {
                name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                for name, spec in self.input_specs(limits).items()
            }
            for name, value in self._tables(grids, limits).items():
                inputs[name].copy_(value)
            inputs[PIXELS].fill_(torch.nan)
            pixels = pixels[0] if self.facts.batched else pixels
            inputs[PIXELS][: len(pixels)] = pixels
            outputs = {
                name: torch.full(spec.shape, torch.nan, dtype=spec.dtype, device=self.device)
                for name, spec in self.output_specs(limits).items()
            }
            self.graph_forward(inputs, outputs, limits)
            for name, value in expected.items():
                if not bool(value.isfinite().all()):
                    raise TowerRefusedError(f"the {name} of its own forward is not finite")
                rows = value.flatten(1).double()
                off = outputs[name][: len(value)].flatten(1).double() - rows
                error = float((off.norm(dim=1) / rows.norm(dim=1)).max())
                if not error <= _SAME[self.dtype]:
                    raise TowerRefusedError(
                        f"a row of its {name} over static buffers is {error:.2g} times its norm "
                        f"away from that of its own forward, more than {_SAME[self.dtype]}"
                    )


def _check_parameters(tower: torch.nn.Module) -> torch.Tensor:
    """The first parameter of a tower that is in one place and one dtype.

    Raises:
        ValueError: it is not.
    """
    parameters = list(tower.parameters())
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters}
    if len(devices) != 1 or parameters[0].device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{type(tower).__name__}: its parameters are on {sorted(map(str, devices))}; move the "
            "whole tower to one device first (no device_map that splits or offloads it)"
        )
    if len(dtypes) != 1 or parameters[0].dtype not in _SAME:
        raise ValueError(
            f"{type(tower).__name__}: its parameters are {sorted(map(str, dtypes))}; cast the "
            "whole tower to one floating-point type first, such as bfloat16"
        )
    return parameters[0]
