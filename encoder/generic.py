"""The generic encoder: a live Hugging Face tower, replayed as CUDA graphs or called as it is."""

import inspect
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..capture import EncoderCudaGraphConfig, EncoderCudaGraphManager
from ..capture.staging import grid_rows
from .capturable import check_capturable
from .generic_tower import GenericTower
from .hf_probe import pack_outputs
from .holds_graphs import HoldsGraphs
from .tower_contents import TowerContents


class GenericEncoder(GenericTower, HoldsGraphs[EncoderCudaGraphManager]):
    """A tower that runs with its own modules, our attention and our graphs.

    For towers that have no fused kernels here. `towers.encoder_for` chooses.

    Attributes: those of `GenericTower`, and
        graphs: The capture manager, None while not captured.
        precision: "native": the tower computes as it is.
    """

    precision = "native"

    def __init__(self, tower: torch.nn.Module, *, attention: str | None = None):
        super().__init__(tower, attention)
        self._captured: TowerContents | None = None
        arguments = list(inspect.signature(type(tower).forward).parameters.values())
        self._other_arguments = tuple(
            p.name
            for p in arguments[2:]  # after self and the pixels
            if p.name != "grid_thw" and p.kind is not inspect.Parameter.VAR_KEYWORD
        )

    def __call__(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        check_finite: bool | None = None,
    ) -> ModelOutput:
        """Encode packed images and videos.

        Args:
            pixel_values: The patches of all items, of any shape with these values in this order;
                any float dtype and device.
            grid_thw: [N, 3] (t, h, w) in patches; keep it on the CPU, reading it from a GPU waits.
            check_finite: Refuse NaN and infinity. None does so for pixels on the CPU; True also
                for those on a GPU, which waits for the device; False never.

        Returns:
            The tower's own kind of output, with tensors of its own.

        Raises:
            TypeError, ValueError: pixels that are no floats, do not belong to the grids, or are not
                finite; grids that are no integers, or that the tower does not take.
            RuntimeError: parameters of the tower have moved since they were captured.
        """
        grids = grid_rows(grid_thw)
        pixels = self._pixel_rows(pixel_values, grids, check_finite)
        graphs = self.graphs  # another thread may release them meanwhile
        with torch.no_grad():
            if graphs is not None:
                self._check_captured()
                tensors = graphs.execute(pixels, grids)
            else:
                self.item_specs(grids)  # refuses grids
                tensors = self.eager_forward(pixels, grids)
        return pack_outputs(self.facts, tensors)

    def capture(
        self,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        graph_pool: Any = None,
        show_progress: bool = False,
    ) -> EncoderCudaGraphManager:
        """Record one CUDA graph per token budget; later calls replay them where that is fastest.

        Args:
            config: Which graphs; None for the automatic ladder, up to 4,096 tokens.
            graph_pool: Memory pool to share with other graphs.
            show_progress: Draw a progress bar on stderr.

        Raises:
            ValueError: the configuration is invalid, or the attention backend is "reference".
            RuntimeError: the tower is not on a CUDA device.
        """
        check_capturable(self.device, [self.attention])
        manager = EncoderCudaGraphManager(self, config)  # a refused one leaves the old graphs
        self.release_graphs()  # room for the new ones
        manager.capture(graph_pool=graph_pool, show_progress=show_progress)
        self.graphs, self._captured = manager, TowerContents(self.tower)
        return manager

    def _check_captured(self) -> None:
        """Refuse to replay graphs that hold addresses which the tower has left."""
        change = None if self._captured is None else self._captured.change()
        if change in ("storage", "modules"):
            raise RuntimeError(
                f"{type(self.tower).__name__}: its {change} changed after capture() (moved, cast, "
                "or replaced), and the graphs read the old one; call release_graphs(), and capture "
                "an encoder made anew"
            )

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Nothing for the own tower, whose weights are used where they are, by graphs too.

        Raises:
            ValueError: it is another tower.
        """
        if tower is not self.tower:
            raise ValueError(
                "load_weights: a generic encoder uses the weights of its own tower; load the "
                "values there, or make an encoder of the other tower"
            )

    def unserved_argument(self, kwargs: Mapping[str, Any]) -> str | None:
        """The first argument of a call that only the tower's own forward heeds."""
        return next((n for n in self._other_arguments if kwargs.get(n) is not None), None)

    def _pixel_rows(
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[tuple[int, int, int]],
        check_finite: bool | None,
    ) -> torch.Tensor:
        """The pixels, a row for each patch."""
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values))
            raise TypeError(
                f"pixel_values: {kind} must be a floating-point tensor of normalised pixels "
                "(the image processor's output, not raw uint8)"
            )
        shape = self.facts.pixel_shape
        patches = sum(t * h * w for t, h, w in grids)
        if pixel_values.numel() != patches * prod(shape):
            raise ValueError(
                f"pixel_values: shape {list(pixel_values.shape)} must hold {patches} patches, as "
                f"grid_thw says, of {prod(shape)} values: {list(shape)}"
            )
        pixels = pixel_values.reshape(patches, *shape)
        if check_finite is None:
            check_finite = pixels.is_cpu
        if check_finite and not bool(torch.isfinite(pixels).all()):
            row = int((~torch.isfinite(pixels.flatten(1)).all(1)).nonzero()[0])
            raise ValueError(
                f"pixel_values: NaN or infinity in patch {row}; check the image and its "
                "normalisation"
            )
        return pixels
