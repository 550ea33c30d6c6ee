"""Encoders with several paths, such as a global image and its local crops: a ladder for each."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, TypeVar

import torch

from .config import EncoderCudaGraphConfig
from .graph import CudaGraphRecorder, GraphPool, Recorder
from .manager import EncoderCudaGraphManager
from .protocol import Pruning, SupportsEncoderCudaGraph
from .slots import Lease

_SUMMED = (
    "items",
    "hits",
    "misses",
    "replays",
    "live_tokens",
    "padded_tokens",
    "live_patches",
    "padded_patches",
    "capture_seconds",
    "bytes",
)

PathInput = tuple[torch.Tensor, torch.Tensor | Sequence[Sequence[int]]]
Result = TypeVar("Result")


class PathLeases(dict[str, Lease]):
    """A lease by path. As a context manager it releases all of them at the end."""

    def release(self) -> None:
        """Release the lease of every path, on the stream that reads the results."""
        for lease in self.values():
            lease.release()

    def __enter__(self) -> "PathLeases":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class MultiPathManager:
    """Captures every path of an encoder on its own ladder, and replays those that have items.

    A path is an encoder of its own: other sizes, other limits, other outputs. Its items are its
    own too: an untiled image is one item of the global path and none of the local one. Graphs of
    all paths share one memory pool, which is safe because paths run one after the other.

    Args:
        encoders: the paths by name, all on one device.
        configs: which rungs each path gets, in any form that `EncoderCudaGraphManager` takes; a
            path that is not named gets the automatic ladder.
        recorder: how rungs are recorded; None for CUDA graphs on the encoders' device.

    Attributes:
        managers: the manager of each path, in the order of `encoders`. Their `capture`, `clear`,
            `execute`, `replay_known` and `lease` are for this class alone: nothing orders direct
            calls on other streams.
        graph_pool: the memory pool of all graphs; None when nothing is captured.

    Raises:
        ValueError: no path, paths on several devices, or a configuration for an unknown path or
            that is refused.
    """

    def __init__(
        self,
        encoders: Mapping[str, SupportsEncoderCudaGraph],
        configs: Mapping[str, EncoderCudaGraphConfig | Mapping[str, Any] | str | None]
        | None = None,
        *,
        recorder: Recorder | None = None,
    ):
        if not encoders:
            raise ValueError("MultiPathManager: encoders is empty; pass at least one path")
        devices = {path: encoder.device for path, encoder in encoders.items()}
        if len(set(devices.values())) > 1:
            places = ", ".join(f"{path}: {device}" for path, device in devices.items())
            raise ValueError(
                f"MultiPathManager: the paths are on several devices ({places}), and their graphs "
                "share one memory pool; move them to one device"
            )
        configs = {} if configs is None else configs
        _check_paths("MultiPathManager: configs names", configs, encoders)
        self._device = next(iter(devices.values()))
        if recorder is None and self._device.type == "cuda":
            # One for all paths: pool memory is only reused on the stream that it was allocated on.
            recorder = CudaGraphRecorder(self._device)
        self._encoders = dict(encoders)
        self.managers = {
            path: EncoderCudaGraphManager(encoder, configs.get(path), recorder=recorder)
            for path, encoder in encoders.items()
        }
        self.graph_pool: GraphPool | None = None
        self._last_stream: torch.cuda.Stream | None = None
        # Reentrant: a failing capture clears.
        self._lock = threading.RLock()

    def get_num_graphs_to_capture(self) -> int:
        """Graphs that `capture` records, of all paths."""
        return sum(manager.get_num_graphs_to_capture() for manager in self.managers.values())

    def capture(self, graph_pool: GraphPool | None = None, show_progress: bool = False) -> None:
        """Record every rung of every path, the path with the largest buffers first.

        Graphs captured earlier are dropped first. If a path fails, all paths are dropped and its
        error is raised with a note that names the path.

        Args:
            graph_pool: pool from `torch.cuda.graph_pool_handle()`, to share with graphs that never
                run at the same time as these; None for a new one.
            show_progress: draw a progress bar for each path on stderr.

        Raises:
            RuntimeError: the encoders are not on a CUDA device (and no recorder was given).
        """
        with self._lock:
            self.clear()
            path = ""
            try:
                # Large first, so that the blocks of the pool suit everything that follows.
                for path in sorted(self.managers, key=self._buffer_bytes, reverse=True):
                    manager = self.managers[path]
                    manager.capture(graph_pool, show_progress)
                    graph_pool = manager.graph_pool
            except BaseException as error:
                error.add_note(f"while capturing the path {path}")
                self.clear()
                raise
            self.graph_pool = graph_pool
            if self._device.type == "cuda":
                self._last_stream = torch.cuda.current_stream(self._device)

    def execute(
        self,
        inputs: Mapping[str, PathInput],
        *,
        pruning: Mapping[str, Pruning] | None = None,
        out: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        names: Mapping[str, Collection[str]] | None = None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Encode the items of each path, as `EncoderCudaGraphManager.execute` does.

        Args:
            inputs: (pixel_values [T, width], grid_thw [N, 3]) by path. Paths may be left out, and
                N may be 0.
            pruning: by path, which tokens its items keep; all in paths left out.
            out: by path, tensors to write instead of new ones; only the outputs that a path's own
                mapping names are copied.
            names: by path, the outputs wanted; all, or those of `out`, in paths left out.

        Returns:
            For every path its outputs by name, owned by the caller; without rows where there were
            no items.

        Raises:
            RuntimeError: nothing is captured.
            ValueError: an unknown path, and what a path refuses.
            TypeError: what a path refuses.
        """
        pruning, out, names = pruning or {}, out or {}, names or {}
        _check_paths("execute: out names", out, self.managers)
        _check_paths("execute: names names", names, self.managers)

        def run(path: str, given: PathInput) -> dict[str, torch.Tensor]:
            return self.managers[path].execute(
                *given, pruning=pruning.get(path), out=out.get(path), names=names.get(path)
            )

        return self._on_each_path("execute", inputs, pruning, run)

    def lease(
        self, inputs: Mapping[str, PathInput], *, pruning: Mapping[str, Pruning] | None = None
    ) -> PathLeases:
        """`execute` without copying results out: a lease for each path, by its name.

        Paths have slots of their own, so that a lease is overtaken by later calls with items of its
        path alone; with `num_slots` = n in the path's configuration it outlives n - 1 of these.

        Args:
            inputs, pruning: as in `execute`.

        Raises:
            As `execute`; no path is leased then. Reading a lease whose slot was taken again raises
            RuntimeError.
        """
        pruning = pruning or {}
        with ExitStack() as undo:

            def run(path: str, given: PathInput) -> Lease:
                lease = self.managers[path].lease(*given, pruning=pruning.get(path))
                undo.callback(lease.release)
                return lease

            leases = PathLeases(self._on_each_path("lease", inputs, pruning, run))
            undo.pop_all()  # every path is leased: nothing to undo
        return leases

    def clear(self) -> None:
        """Drop the graphs and buffers of all paths, after the device is done with them."""
        with self._lock:
            for manager in self.managers.values():
                manager.clear()
            self.graph_pool = None
            self._last_stream = None

    def stats(self) -> dict[str, dict[str, Any]]:
        """`paths`: the statistics of each path's manager; `total`: the sums of their counters.

        An item belongs to one path, so in each path and in total `hits + misses` is the number of
        items. Rungs, histograms and refits are a path's own and have no total.
        """
        paths = {path: manager.stats() for path, manager in self.managers.items()}
        total: dict[str, Any] = {
            name: sum(counters[name] for counters in paths.values()) for name in _SUMMED
        }
        reasons: Counter[str] = Counter()
        for counters in paths.values():
            reasons.update(counters["eager_reasons"])
        return {"paths": paths, "total": total | {"eager_reasons": dict(reasons)}}

    def _on_each_path(
        self,
        operation: str,
        inputs: Mapping[str, PathInput],
        pruning: Mapping[str, Pruning],
        run: Callable[[str, PathInput], Result],
    ) -> dict[str, Result]:
        """What `run` makes of each path's input, one path after the other; errors name the path."""
        _check_paths(f"{operation}: inputs names", inputs, self.managers)
        _check_paths(f"{operation}: pruning names", pruning, self.managers)
        nothing: PathInput = (torch.empty(0), [])
        results: dict[str, Result] = {}
        with self._lock:
            self._follow_last_stream()
            for path in self.managers:
                try:
                    results[path] = run(path, inputs.get(path, nothing))
                except Exception as error:
                    error.add_note(f"in the path {path}")
                    raise
        return results

    def _follow_last_stream(self) -> None:
        """Order this call after the previous one: another path's graphs use the same memory."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _buffer_bytes(self, path: str) -> int:
        """Bytes of a path's static buffers, by which its intermediates are judged as well."""
        encoder, limits = self._encoders[path], self.managers[path].rungs[-1]
        specs = [*encoder.input_specs(limits).values(), *encoder.output_specs(limits).values()]
        return sum(prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def _check_paths(what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(str(path) for path in given if path not in known)
    if unknown:
        raise ValueError(
            f"{what} unknown path {', '.join(unknown)}; the paths are {', '.join(known)}"
        )
