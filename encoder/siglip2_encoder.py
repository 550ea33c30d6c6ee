"""SigLIP 2 with native aspect ratio (NaFlex) as an object: padded or packed images to features."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..capture import EncoderCudaGraphConfig, EncoderCudaGraphManager
from .capturable import check_capturable
from .checkpoint import Checkpoint
from .forward import check_layers
from .fp8 import Fp8Plan, pick_plan
from .grids import PIXEL_DTYPES, Grid
from .holds_graphs import HoldsGraphs
from .siglip2 import (
    PLACES,
    PREFIXES,
    TOWER_CLASS,
    has_head,
    spec,
    tower_key,
    vision_config,
    weight_map,
)
from .siglip2_tower import Siglip2Tower
from .spec import EncoderSpec
from .vision_encoder import pick_device, pick_dtype, place_of_live
from .weights import TowerWeights


@dataclass
class Siglip2Output:
    """Features of images, in the caller's order.

    Attributes:
        last_hidden_state: [T, D] patches of all images behind the last norm, without padding.
        pooler_output: [images, D] what the head makes of each image, not normalised, as
            transformers returns it; None for a tower without a head.
        patches_per_image: Rows of `last_hidden_state` of each image.
        hidden_states: [T, D] after each block asked for, by block index.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    patches_per_image: tuple[int, ...]
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)


class Siglip2Encoder(Siglip2Tower, HoldsGraphs[EncoderCudaGraphManager]):
    """The vision tower of SigLIP 2 (NaFlex) with fused kernels, eager until `capture` is called.

    Attributes: those of `Siglip2Tower`, and
        precision: "fp8" if some linear layers of the blocks compute in it, else "native".
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
    ) -> "Siglip2Encoder":
        """Load only the vision tower of a model folder or Hub repository.

        Args:
            path_or_id: Folder of a SigLIP 2 (NaFlex) model or tower, or of LFM2-VL; or a Hub id.
            dtype: Type of the weights; None or "auto" is the checkpoint's own on a GPU and fp32 on
                the CPU.
            device: None is the current GPU if there is one, else the CPU.
            revision, token, cache_dir, local_files_only: As in transformers.
            attention: Attention backend; None chooses (see `vitgraph info`).
            precision: As in `VisionEncoder.from_pretrained`; the head has no fp8 layers.

        Raises:
            ValueError: the model cannot be found or read, is no SigLIP 2 with native aspect ratio,
                or a tensor is missing or misshapen; or an argument has no such value.
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
    ) -> "Siglip2Encoder":
        """`from_pretrained` for a checkpoint that has been opened."""
        place = pick_device(device)
        pick_plan(precision)  # an unknown name is refused before the weights are read
        config = vision_config(checkpoint.raw_config())
        tensors = checkpoint.named_tensors(tower_key, PREFIXES, place)
        kind = pick_dtype(dtype, place, next(iter(tensors.values())).dtype)
        tower = spec(config)
        weights = TowerWeights(tower, weight_map(tower, has_head(config)), tensors, place, kind)
        return cls(
            tower, weights, attention=attention, precision=precision, source=checkpoint.name,
            revision=checkpoint.revision,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls,
        model: torch.nn.Module,
        *,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
    ) -> "Siglip2Encoder":
        """Take a live tower, on its device and in its dtype.

        Weights whose layout does not change share memory with it; `load_weights` reads all of them
        again after it was changed.

        Args:
            model: A `Siglip2VisionModel`, or a model that has one at `vision_model` or
                `vision_tower`.
            attention, precision: As in `from_pretrained`.

        Raises:
            ValueError: another model, or one that is spread over devices or holds no data.
        """
        tower = find_tower(model)
        parameters = dict(tower.named_parameters())
        shape = spec(tower.config)
        rules = weight_map(shape, hasattr(tower, "head"))
        weights = TowerWeights(shape, rules, parameters, *place_of_live(parameters))
        return cls(shape, weights, attention=attention, precision=precision)

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Read every weight of a model again, into the same memory; captured graphs see them.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        self.weights.load(dict(find_tower(tower).named_parameters()))
        if self.head is not None:
            self.head.derive()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Hugging Face's names inside the tower and values, bit for bit in this dtype."""
        return self.weights.state_dict()

    def __call__(
        self,
        pixel_values: torch.Tensor,
        spatial_shapes: torch.Tensor | Sequence[Sequence[int]],
        pixel_attention_mask: torch.Tensor | None = None,
        *,
        layers: Sequence[int] = (),
        check_finite: bool | None = None,
    ) -> Siglip2Output:
        """Encode images.

        Args:
            pixel_values: Normalised patches, each a row of P values in the order of Hugging Face's
                image processor (row, column, channel): padded to [images, patches, P], as that
                returns them, or packed, [T, P] of all images one after the other. Any float dtype
                and device; what padding holds does not matter.
            spatial_shapes: [images, 2] rows and columns of patches of each image; keep it on the
                CPU, reading it from a GPU waits.
            pixel_attention_mask: [images, patches], 1 for the patches of an image. It says nothing
                new: it is compared with `spatial_shapes`, which waits for a GPU that holds it.
            layers: Blocks whose output is wanted as well; such calls run eagerly.
            check_finite: Refuse NaN and infinity. None does so for pixels on the CPU; True also
                for those on a GPU, which waits for the device; False never.

        Raises:
            TypeError: pixels or shapes of another type.
            ValueError: shapes that do not belong together, pixels that are not finite, or a layer
                outside the tower.
        """
        sizes = image_sizes(spatial_shapes)
        rows = self._pixel_rows(pixel_values, sizes, pixel_attention_mask, check_finite)
        grids: list[Grid] = [(1, h, w) for h, w in sizes]
        wanted = [] if layers == () else check_layers(self.spec, layers)
        states: dict[int, torch.Tensor] = {}
        graphs = self.graphs  # another thread may release them meanwhile
        with torch.no_grad():
            if graphs is not None and not wanted:
                outputs = graphs.execute(rows, grids)
            else:
                outputs = self._eager_images(rows, grids, wanted, states)
        return Siglip2Output(
            outputs["last_hidden_state"],
            outputs.get("pooler_output"),
            tuple(h * w for h, w in sizes),
            states,
        )

    def capture(
        self,
        config: EncoderCudaGraphConfig | Mapping[str, Any] | str | None = None,
        *,
        graph_pool: Any = None,
        show_progress: bool = False,
    ) -> EncoderCudaGraphManager:
        """Record one CUDA graph per token budget; later calls replay them where that is fastest.

        Args:
            config: Which graphs; a token is a patch. None for the automatic ladder.
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
        self.graphs = manager
        return manager

    def _pixel_rows(
        self,
        pixels: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
        mask: torch.Tensor | None,
        check_finite: bool | None,
    ) -> torch.Tensor:
        """[T, P]: the patches of all images, without padding."""
        if not isinstance(pixels, torch.Tensor) or pixels.dtype not in PIXEL_DTYPES:
            kind = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels)
            raise TypeError(
                f"pixel_values: {kind} must be a floating-point tensor of normalised patches (the "
                "image processor's output, not raw uint8)"
            )
        values, counts = self.spec.patch_values, [h * w for h, w in sizes]
        is_padded = pixels.ndim == 3
        if is_padded:
            fits = pixels.shape[0] == len(sizes) and max(counts, default=0) <= pixels.shape[1]
        else:
            fits = pixels.ndim == 2 and pixels.shape[0] == sum(counts)
        if not fits or pixels.shape[-1] != values:
            raise ValueError(
                f"pixel_values: shape {list(pixels.shape)} does not hold {len(sizes)} images of "
                f"{counts} patches (spatial_shapes) of {values} values; pass [images, patches, "
                f"{values}] padded to the largest or more, or all patches packed: "
                f"[{sum(counts)}, {values}]"
            )
        if mask is not None and not (is_padded and mask_agrees(mask, sizes, pixels.shape[1])):
            what = f"{list(mask.shape)} does not mark the first h * w patches of each image"
            raise ValueError(
                f"pixel_attention_mask: {what if is_padded else 'packed patches have none'}; "
                "leave it out, spatial_shapes says which patches there are"
            )
        rows = pixels
        if is_padded:
            pieces = [image[:n] for image, n in zip(pixels, counts, strict=True)]
            rows = torch.cat(pieces) if pieces else pixels.new_empty(0, values)
        if check_finite is None:
            check_finite = rows.is_cpu
        if check_finite and not bool(torch.isfinite(rows).all()):
            row = int((~torch.isfinite(rows).all(1)).nonzero()[0])
            raise ValueError(
                f"pixel_values: NaN or infinity in patch {row} of those without padding; check "
                "the image and its normalisation"
            )
        return rows


def image_sizes(shapes: torch.Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(rows, columns) of patches of each image.

    Raises:
        TypeError: no table, or sizes that are not integers.
        ValueError: not two of them for each image, or one below 1.
    """
    if isinstance(shapes, torch.Tensor) and shapes.is_floating_point():
        raise TypeError(f"spatial_shapes: {shapes.dtype} must be integers, sizes in patches")
    table: Any = shapes.tolist() if isinstance(shapes, torch.Tensor) else shapes
    try:
        rows = list(table)
    except TypeError as error:
        raise TypeError(
            f"spatial_shapes = {shapes!r}: must be the rows and columns of patches of each image; "
            "pass [images, 2]"
        ) from error
    sizes = []
    for index, row in enumerate(rows):
        if not hasattr(row, "__len__") or len(row) != 2:
            raise ValueError(
                f"spatial_shapes[{index}] = {row}: must be the rows and columns of patches of an "
                "image; pass [images, 2]"
            )
        try:
            h, w = map(operator.index, row)  # numpy's integers too
        except TypeError as error:
            raise TypeError(
                f"spatial_shapes[{index}] = {row}: must be integers, sizes in patches"
            ) from error
        if h < 1 or w < 1:
            raise ValueError(
                f"spatial_shapes[{index}] = {row}: must be at least 1; drop the empty image"
            )
        sizes.append((h, w))
    return sizes


def mask_agrees(mask: torch.Tensor, sizes: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether `mask` marks the first h * w of `length` patches of each image, and no others."""
    if mask.shape != (len(sizes), length):
        return False
    counts = torch.tensor([h * w for h, w in sizes], device=mask.device)
    expected = torch.arange(length, device=mask.device) < counts[:, None]
    return torch.equal(mask.bool(), expected)


def find_tower(model: torch.nn.Module) -> Any:
    """The `Siglip2VisionModel` that `model` is or has.

    Raises:
        ValueError: there is none.
    """
    holders = (model, getattr(model, "model", None))
    places = (getattr(holder, place, None) for holder in holders for place in PLACES)
    for tower in (model, *places):
        if type(tower).__name__ == TOWER_CLASS:
            return tower
    raise ValueError(
        f"from_hf: a {type(model).__name__} is no {TOWER_CLASS} and has none at "
        f"{' or '.join(map(repr, PLACES))}; pass one, or a Siglip2Model"
    )
