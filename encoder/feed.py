"""How an `Embedder` feeds each kind of encoder, and what it makes of the outputs.

A feed turns one input into what the encoder takes, in threads, and a batch of those into rows of
each item: its embedding (key None), and the states of the blocks asked for (by index).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch

from .families import FAMILIES
from .forward import check_layers
from .internvl_encoder import TILES, InternVLEncoder
from .internvl_preprocess import InternVLPreprocessor
from .load import AnyEncoder
from .media import refuse_video
from .preprocess import Grid
from .pruning import check_prunable
from .siglip2_encoder import Siglip2Encoder
from .siglip2_preprocess import Siglip2Preprocessor
from .step_encoder import StepEncoder
from .step_preprocess import StepPreprocessor
from .step_spec import GLOBAL, LOCAL
from .vision_encoder import VisionEncoder

Pool = Literal["mean", "max", "tokens", "head"]
POOLS: tuple[Pool, ...] = ("mean", "max", "tokens", "head")

PatchEncoder = TypeVar("PatchEncoder", VisionEncoder, Siglip2Encoder)
ImageEncoder = TypeVar("ImageEncoder", StepEncoder, InternVLEncoder)
Rows = dict[int | None, list[torch.Tensor]]


class Prepared(NamedTuple):
    """One input, ready for the tower: pixels in its dtype, patches, and the grid of packed ones."""

    pixels: tuple[torch.Tensor, ...]
    num_patches: int
    grid: Grid = (0, 0, 0)


class Feed(Protocol):
    """What an `Embedder` needs to know of a kind of encoder.

    Attributes:
        preprocessor: What makes pixels of inputs; called from several threads at once.
        default_pool: The pooling of callers who ask for none.
        width: Of an embedding.
    """

    preprocessor: Any
    default_pool: Pool
    width: int

    def check(self, pool: Pool, layers: Sequence[int] | None, pruning_rate: float | None) -> None:
        """Refuse what this encoder cannot give.

        Raises:
            ValueError: as said.
        """
        ...

    def layers(self, layers: Sequence[int]) -> list[int]:
        """Indices of blocks, counted from the start.

        Raises:
            ValueError: a block outside the tower.
        """
        ...

    def prepare(self, source: Any) -> Prepared:
        """One input, ready for the tower.

        Raises:
            MediaError: it cannot be used.
        """
        ...

    def encode(
        self,
        batch: Sequence[Prepared],
        pool: Pool,
        layers: list[int],
        pruning_rate: float | None,
    ) -> Rows:
        """fp32 rows of each item, pooled."""
        ...


def feed_of(encoder: AnyEncoder, preprocessor: Any = None) -> Feed:
    """The feed of an encoder; `preprocessor` None is the one that its models were released with.

    Raises:
        ValueError: the preprocessor makes other pixels than the tower reads, or an encoder that
            has no feed.
    """
    if isinstance(encoder, InternVLEncoder):
        return InternVLFeed(encoder, preprocessor)
    if isinstance(encoder, StepEncoder):
        return StepFeed(encoder, preprocessor)
    if isinstance(encoder, Siglip2Encoder):
        return Siglip2Feed(encoder, preprocessor)
    if isinstance(encoder, VisionEncoder):
        return PackedFeed(encoder, preprocessor)
    raise _no_feed_of(encoder)


def folder_preprocessor(encoder: AnyEncoder, folder: Any) -> Any:
    """The preprocessor that a model folder describes.

    Raises:
        ValueError: it asks for what is not supported.
    """
    if isinstance(encoder, InternVLEncoder):
        return InternVLPreprocessor.from_folder(folder, encoder.paths[TILES].size.height)
    if isinstance(encoder, StepEncoder):
        return StepPreprocessor.from_folder(folder)
    if isinstance(encoder, Siglip2Encoder):
        return Siglip2Preprocessor.from_folder(folder)
    if not isinstance(encoder, VisionEncoder):
        raise _no_feed_of(encoder)
    return _packed_preprocessor(encoder).from_folder(folder, encoder.spec)


class _PatchFeed(Generic[PatchEncoder]):
    """What feeds of packed patches share."""

    encoder: PatchEncoder
    preprocessor: Any

    def layers(self, layers: Sequence[int]) -> list[int]:
        """As in `Feed`."""
        return check_layers(self.encoder.spec, layers)

    def prepare(self, source: Any) -> Prepared:
        """As in `Feed`."""
        rows, grid = self.preprocessor(source)
        return Prepared((torch.from_numpy(rows).to(self.encoder.dtype),), len(rows), grid)


class PackedFeed(_PatchFeed[VisionEncoder]):
    """Images and videos of a `VisionEncoder`: packed patches and their grids."""

    default_pool: Pool = "mean"

    def __init__(self, encoder: VisionEncoder, preprocessor: Any = None):
        self.encoder = encoder
        self.preprocessor = preprocessor or _packed_preprocessor(encoder).for_family(encoder.spec)
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            _check_geometry(self.preprocessor, key, getattr(encoder.spec, key))
        self.width = encoder.spec.out_size

    def check(self, pool: Pool, layers: Sequence[int] | None, pruning_rate: float | None) -> None:
        """Refuse a head, and pruning in towers without a merger."""
        if pool == "head":
            raise _no_head(self.encoder)
        if pruning_rate is not None:
            check_prunable(self.encoder.spec)

    def encode(
        self,
        batch: Sequence[Prepared],
        pool: Pool,
        layers: list[int],
        pruning_rate: float | None,
    ) -> Rows:
        """As in `Feed`."""
        # a video may be several items: those of Kimi are clips of a few frames
        clips = [self.encoder.spec.clips(*item.grid) for item in batch]
        grids = [grid for item in clips for grid in item]
        pixels = _packed([item.pixels[0] for item in batch], self.encoder)
        output = self.encoder(pixels, grids, layers=layers, pruning_rate=pruning_rate)
        per_clip = iter(output.tokens_per_item)
        tokens = [sum(islice(per_clip, len(item))) for item in clips]
        results: Rows = {None: _pooled(output.pooler_output, tokens, pool)}
        order = self.encoder.row_order(grids) if layers else None
        for layer in layers:
            states = output.hidden_states[layer]
            if order is not None:
                states = states[order.to(states.device)]
            results[layer] = _pooled(states, [item.num_patches for item in batch], pool)
        return results


class Siglip2Feed(_PatchFeed[Siglip2Encoder]):
    """Images of a `Siglip2Encoder`: packed patches and the sizes of the images."""

    def __init__(self, encoder: Siglip2Encoder, preprocessor: Siglip2Preprocessor | None = None):
        self.encoder = encoder
        size = encoder.spec.patch_size
        self.preprocessor = preprocessor or Siglip2Preprocessor(patch_size=size)
        _check_geometry(self.preprocessor, "patch_size", size)
        self.default_pool: Pool = "mean" if encoder.head is None else "head"
        self.width = encoder.spec.hidden_size

    def check(self, pool: Pool, layers: Sequence[int] | None, pruning_rate: float | None) -> None:
        """Refuse the head of a tower without one, and pruning."""
        if pool == "head" and self.encoder.head is None:
            raise _no_head(self.encoder)
        _check_no_pruning(self.encoder, pruning_rate)

    def encode(
        self,
        batch: Sequence[Prepared],
        pool: Pool,
        layers: list[int],
        pruning_rate: float | None,
    ) -> Rows:
        """As in `Feed`."""
        pixels = _packed([item.pixels[0] for item in batch], self.encoder)
        output = self.encoder(pixels, [item.grid[1:] for item in batch], layers=layers)
        counts = output.patches_per_image
        states = {None: output.last_hidden_state, **output.hidden_states}
        results: Rows = {key: _pooled(rows, counts, pool) for key, rows in states.items()}
        if pool == "head" and output.pooler_output is not None:
            results[None] = _each_pooled(output.pooler_output.unbind(), pool)
        return results


class _ImageFeed(Generic[ImageEncoder]):
    """What feeds of batches of equal images share: they give pooled tokens and nothing else."""

    encoder: ImageEncoder
    default_pool: Pool = "mean"

    def check(self, pool: Pool, layers: Sequence[int] | None, pruning_rate: float | None) -> None:
        """Refuse a head, layers and pruning."""
        if pool == "head":
            raise _no_head(self.encoder)
        if layers is not None:
            raise ValueError(
                f"encode: layers = {list(layers)}: this tower ({self.encoder.spec.family}) returns "
                "the states of no blocks; leave layers out, or take hidden_states of Hugging "
                "Face's tower"
            )
        _check_no_pruning(self.encoder, pruning_rate)

    def layers(self, layers: Sequence[int]) -> list[int]:
        """None, as `check` has seen to."""
        return []


class StepFeed(_ImageFeed[StepEncoder]):
    """Images of a `StepEncoder`: the whole view of each and its crops."""

    def __init__(self, encoder: StepEncoder, preprocessor: StepPreprocessor | None = None):
        self.encoder = encoder
        whole, crop = (encoder.paths[name].size for name in (GLOBAL, LOCAL))
        self.preprocessor = preprocessor or StepPreprocessor(whole.height, crop.height)
        _check_geometry(self.preprocessor, "image_size", whole.height)
        _check_geometry(self.preprocessor, "crop_size", crop.height)
        self.width = encoder.spec.out_size
        self._patches = whole.patches, crop.patches

    def prepare(self, source: Any) -> Prepared:
        """As in `Feed`."""
        refuse_video(source)
        whole, crops, plan = self.preprocessor.image(source)
        dtype = self.encoder.dtype
        count = self._patches[0] + plan.count * self._patches[1]
        return Prepared((whole[None].to(dtype), crops.to(dtype)), count)

    def encode(
        self,
        batch: Sequence[Prepared],
        pool: Pool,
        layers: list[int],
        pruning_rate: float | None,
    ) -> Rows:
        """As in `Feed`."""
        wholes, crops = ([item.pixels[i] for item in batch] for i in (0, 1))
        output = self.encoder(
            _packed(wholes, self.encoder),
            _packed(crops, self.encoder),
            [len(part) for part in crops],
        )
        return {None: _each_pooled(output.pooler_output, pool)}


class InternVLFeed(_ImageFeed[InternVLEncoder]):
    """Images of an `InternVLEncoder`: the tiles of each."""

    def __init__(self, encoder: InternVLEncoder, preprocessor: InternVLPreprocessor | None = None):
        if not encoder.spec.out_size:
            raise ValueError(
                f"Embedder: this tower ({encoder.spec.family}) came without its projector, which "
                "makes the tokens; pass InternVLEncoder.from_hf the whole model"
            )
        self.encoder = encoder
        tile = encoder.paths[TILES].size
        self.preprocessor = preprocessor or InternVLPreprocessor(tile.height)
        _check_geometry(self.preprocessor, "tile_size", tile.height)
        self.width = encoder.spec.out_size
        self._patches = tile.patches

    def prepare(self, source: Any) -> Prepared:
        """As in `Feed`."""
        tiles = self.preprocessor(source).to(self.encoder.dtype)
        return Prepared((tiles,), len(tiles) * self._patches)

    def encode(
        self,
        batch: Sequence[Prepared],
        pool: Pool,
        layers: list[int],
        pruning_rate: float | None,
    ) -> Rows:
        """As in `Feed`."""
        tiles = [item.pixels[0] for item in batch]
        # nobody reads the states of the tower, which a replay need not copy then
        name = "pooler_output"
        tokens = self.encoder.features(_packed(tiles, self.encoder), (name,))[name]
        images = tokens.split([len(part) for part in tiles])
        return {None: _each_pooled([image.flatten(0, 1) for image in images], pool)}


def _no_feed_of(encoder: object) -> ValueError:
    # the tower of a swap, a generic encoder, or what is no encoder at all
    return ValueError(
        f"Embedder: a {type(encoder).__name__} cannot be fed with images; load a VisionEncoder, "
        "Siglip2Encoder, StepEncoder or InternVLEncoder (vitgraph.encoder.load_encoder picks the "
        "class for a model folder), or call the tower with pixel_values"
    )


def _packed_preprocessor(encoder: VisionEncoder) -> Any:
    return FAMILIES[encoder.spec.family].preprocessor_class()


def _check_geometry(preprocessor: Any, key: str, expected: int) -> None:
    if getattr(preprocessor, key) != expected:
        raise ValueError(
            f"Embedder: the preprocessor has {key} = {getattr(preprocessor, key)}, the tower "
            f"{expected}; use that of the tower's family"
        )


def _no_head(encoder: AnyEncoder) -> ValueError:
    return ValueError(
        f"encode: pool = 'head': this tower ({encoder.spec.family}) has no pooling head; choose "
        "'mean', 'max' or 'tokens'"
    )


def _check_no_pruning(encoder: AnyEncoder, pruning_rate: float | None) -> None:
    if pruning_rate is not None:
        raise ValueError(
            f"pruning: drops tokens of videos, and {encoder.spec.family} reads images; leave "
            "pruning_rate out"
        )


def _packed(parts: Sequence[torch.Tensor], encoder: AnyEncoder) -> torch.Tensor:
    """The parts one after the other, in pinned memory where that speeds up the copy."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    packed = torch.empty(shape, dtype=encoder.dtype, pin_memory=encoder.device.type == "cuda")
    return torch.cat(list(parts), out=packed)


def _pooled(rows: torch.Tensor, counts: Sequence[int], pool: Pool) -> list[torch.Tensor]:
    return _each_pooled(rows.split(list(counts)), pool)


def _each_pooled(items: Sequence[torch.Tensor], pool: Pool) -> list[torch.Tensor]:
    """fp32 rows of each item, all of them unless `pool` is "mean" or "max"."""
    parts = [item.float() for item in items]
    if pool in ("tokens", "head"):
        # not a view of the batch: an item that the caller keeps would keep all of them
        return [part.clone() for part in parts]
    return [part.mean(0) if pool == "mean" else part.amax(0) for part in parts]
