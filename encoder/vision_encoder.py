"""A vision tower as an object: loaded or taken from a live model, called, captured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..capture import (
    BufferSpec,
    EncoderCudaGraphConfig,
    EncoderCudaGraphManager,
    EncoderItemSpec,
    Pruning,
    RungLimits,
)
from ..capture.protocol import Rows
from ..capture.staging import leading_slices
from ..kernels.attention import LONG_SEGMENT, check_backend, choose_backend
from ..kernels.gemm_tuning import tuning
from ..kernels.launch import compiling
from ..kernels.layout import layout_ref, num_windows
from .checkpoint import Checkpoint
from .families import family_of_tower
from .forward import Batch, check_layers, output_shapes, tower_forward
from .fp8 import Fp8Plan, pick_plan
from .grids import Grid, check_pixels, parse_grids
from .pruning import KEPT_INDEX, plan_pruning, prune
from .spec import EncoderSpec
from .weights import TowerWeights

MIN_BUDGET, MAX_BUDGET = 16, 16384  # tokens: of an automatic ladder
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class VisionOutput:
    """Features of a packed batch; rows follow the items in the caller's order.

    Attributes:
        last_hidden_state: [T, D] patches before the merger, in Hugging Face's row order (that of
            the windows in a tower with windows; see `VisionEncoder.row_order`).
        pooler_output: [M, out] merged tokens.
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


class VisionEncoder:
    """A tower with fused kernels, eager until `capture` is called.

    Attributes:
        spec: What the tower is.
        device, dtype: Where its weights are, and their type.
        attention: Backend of the blocks that attend over whole frames, if none was asked for that
            of most calls (`attention_for`).
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
        parameter = weights.tensors["patch.weight"]
        self.spec = spec
        self.weights = weights
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self._chooses_attention = attention is None
        if attention is None:
            attention = choose_backend(self.device, self.dtype, spec.head_dim)
        else:
            check_backend(attention, self.dtype, self.device, spec.head_dim)
        self.attention = attention
        plan = pick_plan(precision)
        weights.quantize(plan)
        self.precision = "native" if plan is None else "fp8"
        self.source = source
        self.revision = revision
        self.graphs: EncoderCudaGraphManager | None = None
        self._records_pruning = False

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
        tensors = checkpoint.tower_tensors(place)
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
        parameter = next(iter(state.values()))
        devices = {p.device for p in state.values()}
        if len(devices) > 1 or parameter.device.type == "meta":
            raise ValueError(
                f"from_hf: the tower's parameters are on {sorted(map(str, devices))}; move the "
                "whole tower to one device first (no device_map that splits or offloads it)"
            )
        kind = pick_dtype(parameter.dtype, parameter.device, parameter.dtype)
        weights = TowerWeights(spec, family.weight_map(spec), state, parameter.device, kind)
        return cls(spec, weights, attention=attention, precision=precision)

    def attention_for(self, max_seqlen: int) -> str:
        """Backend of a call or rung whose frames may have so many patches."""
        if not self._chooses_attention:
            return self.attention
        return choose_backend(self.device, self.dtype, self.spec.head_dim, max_seqlen)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight from `tower` into the same memory; captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        self.weights.load(dict(tower.named_parameters()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's names (without `visual.`) and values, bit for bit in this dtype."""
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
                values are rounded to the tower's dtype.
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
        grids = parse_grids(grid_thw, self.spec)
        check_pixels(pixel_values, grids, self.spec, check_finite)
        wanted = check_layers(self.spec, layers)
        pruning = plan_pruning(self.spec, grids, pruning_rate, keep_mask)
        states: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            if self.graphs is not None and not wanted:
                outputs = self.graphs.execute(pixel_values, grids, pruning=pruning)
            else:
                outputs = self._eager(pixel_values, grids, wanted, states, pruning)
        num_deepstack = len(self.spec.deepstack_layers)
        per_token = self.spec.patches_per_token
        return VisionOutput(
            outputs["last_hidden_state"],
            outputs["pooler_output"],
            [outputs[f"deepstack_{j}"] for j in range(num_deepstack)] if num_deepstack else None,
            states,
            outputs[KEPT_INDEX] if pruning is not None else None,
            tuple(t * h * w // per_token for t, h, w in grids) if pruning is None else pruning.keep,
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
            ValueError: the configuration is invalid, or the attention backend is "reference".
            RuntimeError: the tower is not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise RuntimeError(
                f"capture: CUDA graphs need a CUDA device, this tower is on {self.device}; "
                "load it with device='cuda' or call it without capture"
            )
        if self.attention == "reference":
            raise ValueError(
                "capture: attention = 'reference' reads offsets on the host, which a graph cannot; "
                "choose another backend (see `vitgraph info`) or call the encoder without capture"
            )
        self.release_graphs()  # room for the new ones
        self._records_pruning = pruning
        manager = EncoderCudaGraphManager(self, config)
        manager.capture(graph_pool=graph_pool, show_progress=show_progress)
        self.graphs = manager
        return manager

    def release_graphs(self) -> None:
        """Free the captured graphs and their buffers; calls run eagerly again."""
        if self.graphs is not None:
            self.graphs.clear()
            self.graphs = None

    def row_order(self, grid_thw: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Index [T] (CPU) that brings patch rows of an output to the order of the pixel rows.

        None for towers whose outputs have that order already.
        """
        if not self.spec.window_size:
            return None
        grids = parse_grids(grid_thw, self.spec)
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

    # What capture asks of an encoder: `capture.SupportsEncoderCudaGraph`.

    def budget_range(self) -> tuple[int, int]:
        """Smallest and largest rung of an automatic ladder, in tokens."""
        return MIN_BUDGET, MAX_BUDGET

    def item_specs(self, grid_thw: Sequence[Grid]) -> list[EncoderItemSpec]:
        """What each item takes of a rung."""
        window, per_token = self.spec.window_size, self.spec.patches_per_token
        return [
            EncoderItemSpec(
                input_size=t * h * w,
                output_tokens=t * h * w // per_token,
                num_frames=t,
                num_windows=t * num_windows(h, w, window),
                attention_pairs=t * (h * w) ** 2,
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
        specs = {
            name: BufferSpec(
                shape, self.dtype, "patches" if name == "last_hidden_state" else merged
            )
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
        attention = self.attention_for(limits.max_patches)
        if not self._records_pruning:
            tower_forward(self.weights, batch, outputs, attention=attention)
            return
        whole = self._before_pruning(outputs, limits.max_patches)
        tower_forward(self.weights, batch, {**outputs, **whole}, attention=attention)
        prune(self.spec, inputs["grid"], inputs["keep"], inputs["keep_mask"], whole, outputs)

    def compile_kernels(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        rungs: Sequence[RungLimits],
    ) -> None:
        """Compile the kernels of some of `rungs`, several at a time.

        Kernels differ by thresholds of rows, so the rungs are taken by halves; what only one of the
        others launches is compiled when that is warmed up.
        """
        with compiling():
            patches = 2 * rungs[-1].max_patches
            for limits in reversed(rungs):
                if 2 * limits.max_patches <= patches:
                    patches = limits.max_patches
                    self.graph_forward(
                        leading_slices(inputs, self.input_specs(limits)),
                        leading_slices(outputs, self.output_specs(limits)),
                        limits,
                    )

    def eager_forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: Sequence[Grid],
        pruning: Pruning | None = None,
    ) -> dict[str, torch.Tensor]:
        """The same kernels on exactly this layout, into new tensors."""
        if pruning is None and self._records_pruning:
            pruning = plan_pruning(self.spec, grid_thw, 0.0, None)
        return self._eager(pixel_values, list(grid_thw), [], {}, pruning)

    def fingerprint(self) -> str:
        """What this tower's speed depends on."""
        table = tuning(self.device).digest
        attention = f"{self.attention} {self.attention_for(LONG_SEGMENT)}"
        tower = f"{self.spec} {self.dtype} {attention} pruning={self._records_pruning}"
        plan = self.weights.fp8.plan
        return f"{tower} gemm={table}" + ("" if plan is None else f" {plan}")

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
        grids: list[Grid],
        layers: list[int],
        states: dict[int, torch.Tensor],
        pruning: Pruning | None,
    ) -> dict[str, torch.Tensor]:
        pixels = pixel_values.to(device=self.device, dtype=self.dtype).contiguous()
        outputs = {
            name: pixels.new_empty(shape)
            for name, shape in output_shapes(self.spec, pixels.shape[0]).items()
        }
        states.update({i: pixels.new_empty(len(pixels), self.spec.hidden_size) for i in layers})
        if grids:
            table = torch.tensor(grids, dtype=torch.int32).to(self.device, non_blocking=True)
            longest = max(h * w for _, h, w in grids)
            batch = Batch(pixels, table, self._exact_limits(grids), longest)
            attention = self.attention_for(longest)
            tower_forward(self.weights, batch, outputs, attention=attention, states=states)
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
