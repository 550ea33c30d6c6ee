"""A vision tower as an object: loaded or taken from a live model, called, captured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..capture import EncoderCudaGraphConfig, EncoderCudaGraphManager, Pruning
from ..kernels.layout import layout_ref
from .capturable import check_capturable
from .checkpoint import Checkpoint
from .families import family_of_tower
from .forward import check_layers
from .fp8 import Fp8Plan, pick_plan
from .grids import Grid, GridParser, check_pixels, pixel_rows
from .holds_graphs import HoldsGraphs
from .pruning import KEPT_INDEX, check_prunable, plan_pruning
from .recordable import RecordableTower
from .spec import EncoderSpec
from .weights import TowerWeights

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class VisionOutput:
    """Features of a packed batch; rows follow the items in the caller's order.

    Attributes:
        last_hidden_state: [T, D] patches before the merger, in Hugging Face's row order (that of
            the windows in a tower with windows; see `VisionEncoder.row_order`). In towers of GLM
            [M, out], the tokens that their merger begins with, which is what transformers returns.
            In towers that end in a norm (merger "none" or "mean"), behind it.
        pooler_output: [M, out] merged tokens; the last hidden state in towers without a merger. In
            towers of Kimi the patches of a token side by side, averaged over the frames of a clip.
        deepstack_features: [M, out] for each deepstack merger; None for towers without them.
        hidden_states: [T, D] after each block asked for, by block index.
        kept_index: [M] int32, the place within its item of each token left by pruning; None if
            none was asked for. `pooler_output` and `deepstack_features` then hold these tokens.
        tokens_per_item: how many rows of `pooler_output` each item has.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    deepstack_features: list[torch.Tensor] | None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    kept_index: torch.Tensor | None = None
    tokens_per_item: tuple[int, ...] = ()


class VisionEncoder(RecordableTower, HoldsGraphs[EncoderCudaGraphManager]):
    """A tower with fused kernels, eager until `capture` is called.

    Attributes:
        spec: What the tower is.
        device, dtype: Where its weights are, and their type.
        attention: Backend of the blocks that attend over whole frames.
        precision: "fp8" if some linear layers compute in it (`weights.fp8.plan` says which), else
            "native".
        source: Name of the checkpoint, None for a live module.
        revision: Commit of the checkpoint on the Hub.
        graphs: The capture manager, None while not captured.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: TowerWeights,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
        source: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(spec, weights, attention)
        plan = pick_plan(precision)
        weights.quantize(plan)
        self.precision = "native" if plan is None else "fp8"
        self.source = source
        self.revision = revision
        self._parse_grids = GridParser(spec)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "VisionEncoder":
        """Load only the vision tower of a model folder or Hub repository.

        Args:
            path_or_id: Folder written by `save_pretrained`, or a Hub id.
            dtype: Type of the weights; None or "auto" is the checkpoint's own on a GPU and fp32 on
                the CPU.
            device: None is the current GPU if there is one, else the CPU.
            revision, token, cache_dir, local_files_only: As in transformers.
            attention: Backend for whole-frame attention; None chooses (see `vitgraph info`).
            precision: "native" computes in `dtype`, "fp8" most linear layers in fp8, an
                `Fp8Plan` those that it names. On a GPU, fp8 takes a tower in bf16 and
                compute capability 8.9.

        Raises:
            ValueError: the model cannot be found or read, has no supported tower, or a tensor is
                missing or misshapen; or an argument has no such value.
        """
        place = pick_device(device)
        checkpoint = Checkpoint.open(
            path_or_id,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, device=place, attention=attention, precision=precision
        )

    @classmethod
    @torch.inference_mode(False)  # tensors made of the checkpoint's are weights
    @torch.no_grad()
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "VisionEncoder":
        """`from_pretrained` for a checkpoint that has been opened."""
        place = pick_device(device)
        pick_plan(precision)  # an unknown name is refused before the weights are read
        family, config = checkpoint.family_and_config()
        spec = family.spec(config)
        tensors = family.hf_tensors(checkpoint.tower_tensors(family, place), spec)
        stored = next(iter(tensors.values())).dtype
        kind = pick_dtype(dtype, place, stored)
        weights = TowerWeights(spec, family.weight_map(spec), tensors, place, kind)
        return cls(
            spec, weights, attention=attention, precision=precision, source=checkpoint.name,
            revision=checkpoint.revision,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls,
        tower: torch.nn.Module,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "VisionEncoder":
        """Take a live Hugging Face tower, on its device and in its dtype.

        Weights whose layout does not change share memory with the tower; `load_weights` re-reads
        all of them after the tower was changed.

        Raises:
            ValueError: the class of the tower is not supported, it holds no data (meta device), or
                it cannot compute in the precision asked for.
        """
        family = family_of_tower(tower)
        spec = family.spec(tower.config)
        state = dict(tower.named_parameters())
        weights = TowerWeights(spec, family.weight_map(spec), state, *place_of_live(state))
        return cls(spec, weights, attention=attention, precision=precision)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight from `tower` into the same memory; captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        self.weights.load(dict(tower.named_parameters()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's names (without `visual.`) and values, bit for bit in this dtype.

        Contiguous tensors that share no element, views of our memory where they can be.
        """
        return self.weights.state_dict()

    def __call__(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
        *,
        layers: Sequence[int] = (),
        check_finite: bool | None = None,
        pruning_rate: float | Sequence[float | None] | None = None,
        keep_mask: Sequence[torch.Tensor | None] | None = None,
    ) -> VisionOutput:
        """Encode packed images and videos.

        Args:
            pixel_values: [T, P] normalised pixel rows of all items, any float dtype and device;
                values are rounded to the tower's dtype. Patches of one frame may also come as
                [T, C, side, side] or [1, T, C, side, side].
            grid_thw: [N, 3] (t, h, w) in patches; keep it on the CPU, reading it from a GPU waits.
            layers: Blocks whose output is wanted as well; such calls run eagerly.
            check_finite: Refuse NaN and infinity. None does so for pixels on the CPU; True also
                for those on a GPU, which waits for the device; False never.
            pruning_rate: Fraction of the tokens of videos to drop, in [0, 1), for all items or
                each: those most like the frame before (`encoder.pruning`). Images lose none.
            keep_mask: For each item None, or [tokens] bool of the tokens to keep.

        Raises:
            TypeError, ValueError: what `grids.parse_grids`, `grids.check_pixels` and
                `pruning.plan_pruning` refuse, or a layer outside the tower.
        """
        grids = self._parse_grids(grid_thw)
        graphs = self.graphs  # another thread may release them meanwhile
        if (
            graphs is not None
            and isinstance(pixel_values, torch.Tensor)
            and not (pixel_values.is_cpu if check_finite is None else check_finite)
            and layers == ()
            and pruning_rate is None
            and keep_mask is None
        ):
            outputs = graphs.replay_known(pixel_values, grids)
            if outputs is not None:
                return self._output(outputs, grids, {}, None)
        pixel_values = pixel_rows(pixel_values, self.spec)
        check_pixels(pixel_values, grids, self.spec, check_finite)
        wanted = [] if layers == () else check_layers(self.spec, layers)
        pruning = plan_pruning(self.spec, grids, pruning_rate, keep_mask)
        states: dict[int, torch.Tensor] = {}
        graphs = self.graphs  # the checks above take their time
        if graphs is not None and not wanted:
            outputs = graphs.execute(pixel_values, grids, pruning=pruning)
        else:
            with torch.no_grad():
                outputs = self._eager(pixel_values, grids, wanted, states, pruning)
        return self._output(outputs, grids, states, pruning)

    def _output(
        self,
        outputs: Mapping[str, torch.Tensor],
        grids: Sequence[Grid],
        states: dict[int, torch.Tensor],
        pruning: Pruning | None,
    ) -> VisionOutput:
        num_deepstack = len(self.spec.deepstack_layers)
        return VisionOutput(
            outputs["last_hidden_state"],
            outputs["last_hidden_state" if self.spec.merger == "none" else "pooler_output"],
            [outputs[f"deepstack_{j}"] for j in range(num_deepstack)] if num_deepstack else None,
            states,
            outputs[KEPT_INDEX] if pruning is not None else None,
            tuple([self.spec.num_tokens(*grid) for grid in grids])
            if pruning is None
            else pruning.keep,
        )

    def capture(
        self,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        graph_pool: Any = None,
        show_progress: bool = False,
        pruning: bool = False,
    ) -> EncoderCudaGraphManager:
        """Record one CUDA graph per token budget; later calls replay them where that is fastest.

        Args:
            config: Which graphs; None for the automatic ladder.
            graph_pool: Memory pool to share with other graphs.
            show_progress: Draw a progress bar on stderr.
            pruning: Record token pruning as well. Otherwise calls that ask for it run eagerly.

        Raises:
            ValueError: the configuration is invalid, the attention backend is "reference", or
                pruning is asked of a tower without a merger.
            RuntimeError: the tower is not on a CUDA device.
        """
        check_capturable(self.device, [self.attention])
        if pruning:
            check_prunable(self.spec)
        config = EncoderCudaGraphConfig.from_any(config)
        config.resolve(self)  # a refused configuration leaves the old graphs at work
        self.release_graphs()  # room for the new ones
        self._records_pruning = pruning
        manager = EncoderCudaGraphManager(self, config)
        manager.capture(graph_pool=graph_pool, show_progress=show_progress)
        self.graphs = manager
        return manager

    def row_order(self, grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Index [T] (CPU) that brings patch rows of an output to the order of the pixel rows.

        None for towers whose outputs have that order already.
        """
        if not self.spec.window_size:
            return None
        grids = self._parse_grids(grid_thw)
        limits = self._exact_limits(grids)
        plan = layout_ref(
            torch.tensor(grids, dtype=torch.int32).view(-1, 3),
            torch.zeros(1),
            num_rows=limits.max_patches,
            num_frames=limits.max_frames,
            num_windows=limits.max_windows,
            merge=self.spec.merge_size,
            window=self.spec.window_size,
        )
        return plan.source.long().argsort()


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; None is the current GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device = {device!r} is not a device: use 'cuda', 'cuda:0' or 'cpu'"
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r} is not supported: use 'cuda' or 'cpu'")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device = {device!r}: no CUDA device is available; use device='cpu'")
        place = torch.device(
            "cuda", torch.cuda.current_device() if place.index is None else place.index
        )
    return place


def place_of_live(
    tensors: Mapping[str, torch.Tensor], what: str = "tower"
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the parameters of a live model; `what` they are, for messages.

    Raises:
        ValueError: they are on several devices, hold no data, or have a dtype that is not
            supported.
    """
    parameter = next(iter(tensors.values()))
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or parameter.device.type == "meta":
        raise ValueError(
            f"from_hf: the tower's parameters are on {sorted(map(str, devices))}; move the whole "
            f"{what} to one device first (no device_map that splits or offloads it)"
        )
    return parameter.device, pick_dtype(parameter.dtype, parameter.device, parameter.dtype)


def pick_dtype(
    dtype: torch.dtype | str | None, device: torch.device, stored: torch.dtype
) -> torch.dtype:
    """The dtype asked for; None or "auto" is `stored` on a GPU and fp32 on the CPU.

    Raises:
        ValueError: not one of the supported dtypes on this device.
    """
    if dtype is None or dtype == "auto":
        return stored if device.type == "cuda" else torch.float32
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in DTYPES or (kind == torch.float64 and device.type == "cuda"):
        raise ValueError(
            f"dtype = {dtype!r} is not supported on {device.type}: use 'bfloat16', 'float16' or "
            "'float32' ('float64' on the CPU only)"
        )
    return kind
