"""A tower of whole images as an object: weights, a path for each size of images, their graphs."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ..capture import EncoderCudaGraphConfig
from ..capture.multi_path import MultiPathManager
from .capturable import check_capturable
from .fp8 import Fp8Plan, pick_plan
from .grids import PIXEL_DTYPES
from .holds_graphs import HoldsGraphs
from .image_forward import ImageSize
from .image_spec import ImageTowerSpec
from .image_weights import ImageTowerWeights
from .stream_order import Written
from .tower_path import TowerPath
from .vision_encoder import place_of_live

MAX_OTHER_SIZES = 8  # sizes beside those of the paths whose constants are kept


class ImageTower(HoldsGraphs[MultiPathManager]):
    """A tower of whole images with fused kernels, eager until `capture` is called.

    It has a path for each size of images that it expects, with CUDA graphs of its own: a Step tower
    has "global" for whole images and "local" for crops. Images of other sizes are encoded eagerly.

    Attributes:
        spec: What the tower is.
        weights: Its weights, shared by the paths.
        paths: The paths by name.
        device, dtype: Where the weights are, and their type.
        precision: "fp8" if some linear layers of the blocks compute in it, else "native".
        graphs: The capture manager, None while not captured.
    """

    def __init__(
        self,
        spec: ImageTowerSpec,
        weights: ImageTowerWeights,
        sizes: Mapping[str, int],
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ):
        """A tower with paths of these names for square images of so many pixels along a side.

        Raises:
            ValueError: sides that the tower cannot cut, an attention backend that cannot be used,
                or a precision that cannot be had.
        """
        plan = pick_plan(precision)
        weights.quantize(plan)
        self.precision = "native" if plan is None else "fp8"
        self.spec = spec
        self.weights = weights
        self._attention = attention
        self.paths = {name: self._new_path(side, side) for name, side in sizes.items()}
        self._others: dict[tuple[int, int], tuple[TowerPath, Written]] = {}
        self._others_lock = threading.Lock()
        first = next(iter(self.paths.values()))
        self.device, self.dtype = first.device, first.dtype

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, rows, state_size] of images [N, C, H, W] of any size that can be cut into patches.

        Raises:
            TypeError: pixels that are no floats.
            ValueError: another number of axes or channels, or sides that the tower cannot cut.
        """
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.dtype not in PIXEL_DTYPES:
            raise TypeError(
                f"encode: {getattr(pixel_values, 'dtype', type(pixel_values))} must be a "
                "floating-point tensor of normalised pixels (not raw uint8)"
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.spec.in_channels:
            raise ValueError(
                f"encode: pixel_values {list(pixel_values.shape)} must be [images, "
                f"{self.spec.in_channels}, height, width]"
            )
        return self.features(pixel_values, ("last_hidden_state",))["last_hidden_state"]

    def features(self, pixel_values: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The outputs `names` [N, rows, width] of images as `encode` takes them.

        Raises:
            ValueError: sides that the tower cannot cut.
        """
        height, width = pixel_values.shape[2:]
        with torch.no_grad():
            for name, path in self.paths.items():
                if (path.size.height, path.size.width) == (height, width):
                    outputs = self.run({name: pixel_values}, {name: names})[name]
                    break
            else:
                path = self._other_path(height, width)
                outputs = self._eager(path, pixel_values)
        images, shapes = len(pixel_values), path.shapes
        return {name: outputs[name].view(images, *shapes[name]) for name in names}

    def run(
        self, images: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]] | None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Outputs of the paths whose images [N, C, H, W] are given, replayed if captured.

        Replays give a path that `names` names those outputs alone.
        """
        graphs = self.graphs  # another thread may release them meanwhile
        if graphs is None:
            return {name: self._eager(self.paths[name], pixels) for name, pixels in images.items()}
        inputs = {
            name: (self.paths[name].pixel_rows(pixels), [self.paths[name].fixed_grid] * len(pixels))
            for name, pixels in images.items()
        }
        return graphs.execute(inputs, names=names)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight from `tower` into the same memory; captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        self._load(live_tensors(tower, None))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's names inside the model and values, bit for bit in this dtype."""
        return self.weights.state_dict()

    def capture(
        self,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        graph_pool: Any = None,
        show_progress: bool = False,
    ) -> MultiPathManager:
        """Record CUDA graphs for every path; later calls replay them where that is fastest.

        Args:
            config: Which graphs: one configuration for all paths, or one by the name of each.
                Token budgets are multiples of the tokens of an image; without any, a path gets
                rungs of 1 image up to some 65,000 patches.
            graph_pool: Memory pool to share with other graphs.
            show_progress: Draw a progress bar for each path on stderr.

        Raises:
            ValueError: the configuration is invalid, or the attention backend is "reference".
            RuntimeError: the tower is not on a CUDA device.
        """
        check_capturable(self.device, [path.attention for path in self.paths.values()])
        return self._capture_with(None, config, graph_pool, show_progress)

    def _capture_with(
        self, recorder: Any, config: Any, graph_pool: Any = None, show_progress: bool = False
    ) -> MultiPathManager:
        """`capture` by any recorder."""
        configs = path_configs(self.paths, config)
        # before the old graphs go: a refused configuration leaves them at work
        manager = MultiPathManager(self.paths, configs, recorder=recorder)
        self.release_graphs()  # room for the new ones
        manager.capture(graph_pool, show_progress)
        self.graphs = manager
        return manager

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with self._others_lock:  # a path made meanwhile would keep the old positions
            self.weights.load(tensors)
            others = (path for path, _ in self._others.values())
            for path in (*self.paths.values(), *others):
                path.size.read_positions(self.weights)

    def _eager(self, path: TowerPath, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return path.eager_forward(path.pixel_rows(images), [path.fixed_grid] * len(images))

    def _new_path(self, height: int, width: int) -> TowerPath:
        # tables born in inference mode could not be written when weights are loaded outside of it
        with torch.inference_mode(False), torch.no_grad():
            return TowerPath(self.weights, ImageSize(self.weights, height, width), self._attention)

    def _other_path(self, height: int, width: int) -> TowerPath:
        """The path of another size, kept until `MAX_OTHER_SIZES` newer ones have come."""
        with self._others_lock:
            kept = self._others.pop((height, width), None)
            if kept is None:
                path = self._new_path(height, width)
                kept = path, Written(path.device, path.size.constants())
            else:
                # made by a call that may have run on another stream
                kept[1].order_reads()
            self._others[height, width] = kept
            if len(self._others) > MAX_OTHER_SIZES:
                del self._others[next(iter(self._others))]
        return kept[0]


def live_tensors(
    tower: torch.nn.Module, projector: torch.nn.Module | None, place: str = "vision_model"
) -> dict[str, torch.Tensor]:
    """Parameters of a live tower and projector by their names inside a model with it at `place`."""
    named: dict[str, torch.Tensor] = {f"{place}.{n}": p for n, p in tower.named_parameters()}
    if projector is not None:
        named |= {f"multi_modal_projector.{name}": p for name, p in projector.named_parameters()}
    return named


def live_weights(spec: ImageTowerSpec, tensors: Mapping[str, torch.Tensor]) -> ImageTowerWeights:
    """Weights of the live parameters `tensors`, where they are.

    Raises:
        ValueError: they are on several devices, or hold no data.
    """
    return ImageTowerWeights(spec, tensors, *place_of_live(tensors, "tower and its projector"))


def path_configs(paths: Mapping[str, TowerPath], config: Any) -> dict[str, EncoderCudaGraphConfig]:
    """The configuration of each path, with token budgets of whole images.

    Args:
        paths: The paths by name.
        config: One configuration for all of them in any form, or a mapping by path.

    Raises:
        ValueError: a refused configuration, or one for a path that does not exist.
    """
    keys = {field.name for field in fields(EncoderCudaGraphConfig)}
    by_path: Mapping[str, Any] | None = None
    if isinstance(config, Mapping) and config and not set(config) & keys:
        by_path = config
        if unknown := sorted(set(config) - set(paths)):
            raise ValueError(
                f"capture: unknown path or key {', '.join(map(str, unknown))}; the paths are "
                f"{', '.join(paths)}, the keys of a configuration {', '.join(sorted(keys))}"
            )
    resolved = {}
    for name, path in paths.items():
        given = config if by_path is None else by_path.get(name)
        chosen = EncoderCudaGraphConfig.from_any(given)
        if chosen.token_budgets is None:
            most = path.image_counts()[-1]
            if chosen.max_vision_items_per_batch is not None:
                most = min(most, chosen.max_vision_items_per_batch)
            budgets = tuple(n * path.size.tokens for n in path.image_counts(most))
            chosen = replace(chosen, token_budgets=budgets)
        resolved[name] = chosen
    return resolved
