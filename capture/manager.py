"""Capture of one graph per rung, and the dispatch of items to them."""

import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from .config import EncoderCudaGraphConfig
from .graph import (
    BudgetGraphMetadata,
    CudaGraphRecorder,
    GraphPool,
    Recorder,
    full_item,
    paused_gc,
)
from .packing import pack
from .protocol import EncoderItemSpec, Rows, RungLimits, SupportsEncoderCudaGraph
from .staging import (
    GRID,
    PIXELS,
    Grid,
    RowOffsets,
    Run,
    allocate,
    check_pixels,
    clone_live,
    empty_results,
    gather_pixels,
    grid_rows,
    leading_slices,
    runs_of,
    scatter_rows,
    stage_grid,
    stage_pixels,
)


class EncoderCudaGraphManager:
    """Captures an encoder's forward once per rung and replays it for any mix of items.

    Args:
        encoder: what to capture.
        config: which rungs; a dataclass, mapping, JSON string or None for the automatic ladder.
        recorder: how a rung is recorded; None for CUDA graphs on the encoder's device.

    Attributes:
        rungs: the limits of every rung, ascending.
        graph_pool: the memory pool of the graphs; None when nothing is captured.
    """

    def __init__(
        self,
        encoder: SupportsEncoderCudaGraph,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        recorder: Recorder | None = None,
    ):
        self.config = EncoderCudaGraphConfig.from_any(config)
        self.rungs: tuple[RungLimits, ...] = self.config.resolve(encoder)
        self.graph_pool: GraphPool | None = None
        self._encoder = encoder
        self._recorder = recorder
        self._graphs: dict[RungLimits, BudgetGraphMetadata] = {}
        self._input_specs = encoder.input_specs(self.rungs[-1])
        self._output_specs = encoder.output_specs(self.rungs[-1])
        if self._input_specs.keys() != {PIXELS, GRID}:
            raise ValueError(
                f"EncoderCudaGraphManager: {type(encoder).__name__}.input_specs names "
                f"{sorted(self._input_specs)}; it must name exactly {GRID} and {PIXELS}"
            )
        self._row_kinds: set[Rows] = {"patches", *(s.rows for s in self._output_specs.values())}
        self._last_stream: torch.cuda.Stream | None = None
        # Static buffers serve one call at a time.
        self._lock = threading.Lock()
        self._reset_stats()

    def get_num_graphs_to_capture(self) -> int:
        """Graphs that `capture` records: one per rung."""
        return len(self.rungs)

    def capture(self, graph_pool: GraphPool | None = None, show_progress: bool = False) -> None:
        """Allocate the static buffers and record every rung, the largest first.

        Graphs captured earlier are dropped first. If a rung fails, everything is dropped and its
        error is raised with a note that names the rung.

        Args:
            graph_pool: pool from `torch.cuda.graph_pool_handle()`, to share with graphs that never
                run at the same time as these; None for a new one.
            show_progress: draw a progress bar on stderr.

        Raises:
            RuntimeError: the encoder is not on a CUDA device (and no recorder was given).
        """
        device = self._encoder.device
        recorder = self._recorder
        if recorder is None:
            if device.type != "cuda":
                raise RuntimeError(
                    f"capture: the encoder is on {device}, and CUDA graphs need a CUDA device; "
                    "move the encoder there, or call it without capture"
                )
            recorder = CudaGraphRecorder(device)
        self.clear()
        with self._lock, self._on_device(), torch.inference_mode(), paused_gc():
            self.graph_pool = recorder.new_pool() if graph_pool is None else graph_pool
            bar = tqdm(self.rungs[::-1], "capture", file=sys.stderr, disable=not show_progress)
            limits = self.rungs[-1]
            try:
                inputs = allocate(self._input_specs, device)
                outputs = allocate(self._output_specs, device)
                for limits in bar:
                    if show_progress:
                        bar.set_postfix_str(self._progress(limits))
                    self._graphs[limits] = self._record(recorder, limits, inputs, outputs)
                stage_grid(inputs[GRID], [])
            except BaseException as error:
                error.add_note(f"while capturing the rung of {limits.token_budget} tokens")
                self._drop()
                raise
            finally:
                bar.close()
            if device.type == "cuda":
                self._last_stream = torch.cuda.current_stream(device)

    def clear(self) -> None:
        """Drop all graphs and static buffers, after the device is done with them."""
        with self._lock:
            if self._graphs and self._encoder.device.type == "cuda":
                torch.cuda.synchronize(self._encoder.device)
            self._drop()
            self._reset_stats()

    def execute(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor | Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        """Encode items, replaying graphs where rungs hold them and eagerly where none does.

        Everything is enqueued on the current stream, without waiting for the device. Pinned
        `pixel_values` are read by that stream: do not overwrite them before it is done.

        Args:
            pixel_values: [T, width], on the encoder's device or the CPU, any floating-point dtype.
            grid_thw: [N, 3] sizes in patches; a tensor on the GPU costs a synchronisation.

        Returns:
            The encoder's outputs by name, rows in the order of the items, owned by the caller.

        Raises:
            RuntimeError: nothing is captured, or a static buffer has moved since.
            TypeError: integer pixels, or a grid that is not of integers.
            ValueError: shapes that do not belong together, or a grid that the encoder refuses.
        """
        if not self._graphs:
            raise RuntimeError("execute: nothing is captured; call capture() first")
        grid = grid_rows(grid_thw)
        items = self._encoder.item_specs(grid)
        offsets = RowOffsets.of(self._row_kinds, items)
        check_pixels(pixel_values, self._input_specs[PIXELS], offsets.total("patches"))
        batches = pack(items, self.rungs)
        with self._lock, self._on_device(), torch.no_grad():
            self._follow_last_stream()
            if len(batches) == 1:
                rung = batches[0].rung
                if rung is None:
                    self._misses += len(items)
                    return self._encoder.eager_forward(pixel_values, grid)
                packed = self._replay(rung, [(0, len(items))], pixel_values, grid, items, offsets)
                return clone_live(packed, self._output_specs, offsets)
            results = empty_results(self._output_specs, offsets, self._encoder.device)
            for batch in batches:
                runs = runs_of(batch.indices)
                if batch.rung is None:
                    self._misses += len(batch.indices)
                    packed = self._encoder.eager_forward(
                        gather_pixels(pixel_values, offsets, runs),
                        [grid[index] for index in batch.indices],
                    )
                else:
                    packed = self._replay(batch.rung, runs, pixel_values, grid, items, offsets)
                scatter_rows(results, packed, self._output_specs, offsets, runs)
            return results

    def stats(self) -> dict[str, int]:
        """Counters since the capture.

        `hits` and `misses` in items (replayed, computed eagerly); `replays`; `live_tokens`, the
        tokens of the hits; `padded_tokens`, the budgets of the rungs replayed for them.
        """
        return {
            "hits": self._hits,
            "misses": self._misses,
            "replays": self._replays,
            "live_tokens": self._live_tokens,
            "padded_tokens": self._padded_tokens,
        }

    def _record(
        self,
        recorder: Recorder,
        limits: RungLimits,
        all_inputs: Mapping[str, torch.Tensor],
        all_outputs: Mapping[str, torch.Tensor],
    ) -> BudgetGraphMetadata:
        inputs = leading_slices(all_inputs, self._encoder.input_specs(limits))
        outputs = leading_slices(all_outputs, self._encoder.output_specs(limits))
        stage_grid(inputs[GRID], [full_item(self._encoder, limits)])

        def work() -> None:
            # Copies: an encoder that pops names must not empty the dictionaries kept here.
            self._encoder.graph_forward(dict(inputs), dict(outputs), limits)

        recording = recorder.record(work, self.graph_pool)
        return BudgetGraphMetadata(limits, recording, inputs, outputs)

    def _replay(
        self,
        rung: RungLimits,
        runs: Sequence[Run],
        pixel_values: torch.Tensor,
        grid: Sequence[Grid],
        items: Sequence[EncoderItemSpec],
        offsets: RowOffsets,
    ) -> dict[str, torch.Tensor]:
        """Stage the items of `runs` and replay; the static outputs, valid until the next replay."""
        graph = self._graphs[rung]
        graph.check_addresses()
        stage_grid(graph.inputs[GRID], [row for run in runs for row in grid[slice(*run)]])
        stage_pixels(graph.inputs[PIXELS], pixel_values, offsets, runs)
        graph.recording.replay()
        tokens = [item.output_tokens for run in runs for item in items[slice(*run)]]
        self._replays += 1
        self._hits += len(tokens)
        self._live_tokens += sum(tokens)
        self._padded_tokens += rung.token_budget
        return graph.outputs

    def _follow_last_stream(self) -> None:
        """Order this call after the previous one, which may have run on another stream."""
        if self._encoder.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._encoder.device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _on_device(self) -> AbstractContextManager[Any]:
        device = self._encoder.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _progress(self, limits: RungLimits) -> str:
        text = f"{limits.token_budget} tokens"
        if self._encoder.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._encoder.device)
            text += f", {free / 2**30:.1f} GiB free"
        return text

    def _drop(self) -> None:
        self._graphs.clear()
        self.graph_pool = None
        self._last_stream = None

    def _reset_stats(self) -> None:
        self._hits = 0
        self._misses = 0
        self._replays = 0
        self._live_tokens = 0
        self._padded_tokens = 0
