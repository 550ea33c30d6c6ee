"""Embeddings of many images and videos: decoded by threads while the tower runs."""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .demo import demo_encoder
from .feed import POOLS, Pool, Prepared, feed_of, folder_preprocessor
from .fp8 import Fp8Plan
from .load import AnyEncoder, encoder_of_checkpoint
from .media import MediaError, Video
from .preprocess import preprocess_named
from .pruning import check_rate
from .vision_encoder import VisionEncoder, pick_device

logger = logging.getLogger("vitgraph")

# Rows in one call of the tower, unless a single item has more: bounds the memory that a batch of
# large images takes (65,536 rows of 1,536 values are 200 MB in bf16).
MAX_BATCH_PATCHES = 65536

_POOLS: dict[str, Pool] = {pool: pool for pool in POOLS}

Result = Any  # array or tensor [N, out], or a list of [m_i, out]


@dataclass(frozen=True)
class SkippedInput:
    """An input left out under `on_error="skip"`: its position among the inputs, and why."""

    index: int
    message: str


class LayerResults(NamedTuple):
    """What `encode` returns when layers are asked for.

    Attributes:
        embeddings: What it returns without.
        layers: The same of each block's patches, by block index.
    """

    embeddings: Result
    layers: dict[int, Result]


class Embedder:
    """An encoder with the preprocessing that belongs to it.

    Attributes:
        encoder: The tower.
        preprocessor: Its pixels.
        errors: Inputs that the last `encode` skipped.
    """

    def __init__(self, encoder: AnyEncoder, preprocessor: Any = None):
        """`preprocessor` is by default the one that the tower's family was released with.

        That is a `Preprocessor` for a `VisionEncoder`, a `Siglip2Preprocessor` for a
        `Siglip2Encoder`, a `StepPreprocessor` for a `StepEncoder`, an `InternVLPreprocessor` for
        an `InternVLEncoder`.

        Raises:
            ValueError: the preprocessor makes other pixels than the tower reads, or an
                `InternVLEncoder` without its projector.
        """
        self._feed = feed_of(encoder, preprocessor)
        self.encoder = encoder
        self.preprocessor = self._feed.preprocessor
        self.errors: list[SkippedInput] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        attention: str | None = None,
        precision: str | Fp8Plan = "native",
        graphs: Any = None,
        pruning: bool = False,
    ) -> "Embedder":
        """Load a tower, of the class that `load_encoder` chooses, and its preprocessing.

        Args:
            model: Hub id, folder, or "demo" for a small tower with random weights (a folder of
                that name is "./demo").
            dtype, device, revision, local_files_only, token, cache_dir, attention, precision: As
                in `VisionEncoder.from_pretrained`.
            graphs: True captures CUDA graphs with an automatic ladder, an `EncoderCudaGraphConfig`
                (or a mapping, or JSON) with that one, False none; None captures on a GPU.
            pruning: Capture pruning as well, for `encode` with a `pruning_rate`, which otherwise
                runs without graphs.

        Raises:
            ValueError: as `load_encoder` and `from_folder` of the preprocessor, or pruning of a
                tower without a merger or videos.
            RuntimeError: graphs asked for without a GPU.
        """
        place = pick_device(device)
        if graphs is None:
            graphs = place.type == "cuda"
        if graphs and place.type != "cuda":
            raise RuntimeError(
                f"graphs = {graphs!r}: CUDA graphs need a CUDA device, the tower goes to {place}; "
                "use graphs=False"
            )
        if model == "demo":
            encoder = demo_encoder(place, dtype, attention=attention, precision=precision)
            embedder = cls(encoder)
        else:
            checkpoint = Checkpoint.open(
                model,
                revision=revision,
                local_files_only=local_files_only,
                token=token,
                cache_dir=cache_dir,
            )
            encoder = encoder_of_checkpoint(
                checkpoint, dtype=dtype, device=place, attention=attention, precision=precision
            )
            embedder = cls(encoder, folder_preprocessor(encoder, checkpoint.folder))
        if pruning:
            embedder._feed.check("mean", None, 0.0)
        if graphs is not False:
            options = {"pruning": pruning} if isinstance(encoder, VisionEncoder) else {}
            encoder.capture(
                None if graphs is True else graphs, show_progress=_show_progress(None), **options
            )
        return embedder

    def encode(
        self,
        inputs: Any,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        pool: Pool | None = None,
        normalize_embeddings: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
        layers: Sequence[int] | None = None,
        pruning_rate: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int | None = None,
    ) -> Any:
        """Embed images and videos, in their order.

        An embedding does not depend on the other items of its batch beyond rounding. A batch is
        packed without padding, so inputs are not sorted.

        Args:
            inputs: One item, or an iterable of items (a generator is read as it goes). An item is
                a path, encoded bytes, a PIL image, an array or tensor of pixels (see
                `media.load_image`), a `Video`, or {"frames": ..., "fps": ...}. Towers of Step,
                SigLIP 2 and InternVL take images alone.
            batch_size: Items in one call of the tower; fewer where they have more than 65,536
                patches together.
            show_progress_bar: None shows it when the logger "vitgraph" is at INFO.
            pool: "mean" or "max" over an item's merged tokens, or "tokens" for all of them (of
                SigLIP 2 its patches behind the last norm, of Step the tokens of its crops and then
                of the whole image, of InternVL those of its tiles and then of its thumbnail);
                "head" for what the head of SigLIP 2 makes of an image. None is "head" in a tower
                that has one, else "mean".
            normalize_embeddings: Scale embeddings (with "tokens", each token) to length 1.
            convert_to_numpy: Results in numpy; otherwise a list of tensors.
            convert_to_tensor: Results as tensors on the tower's device; wins over numpy.
            truncate_dim: Keep that many leading values, before normalising.
            layers: Blocks whose patches are pooled as well (negative ones count from the end), for
                "tokens" and "head" all of them in the row order of `pixel_values`. Towers of Step
                and InternVL return none.
            pruning_rate: Fraction of each video's merged tokens to drop before they are pooled, in
                [0, 1): those most like the frame before. Images lose none, `layers` neither.
            on_error: "raise" stops at the first bad input; "skip" leaves bad inputs out of the
                results and lists them in `errors`.
            num_workers: Threads that decode; 0 uses the caller's. None is one a core, up to 8.

        Returns:
            fp32 [N, out]; for "tokens" a list of [m_i, out]. For a single item [out] or [m, out].
            With `layers`, a `LayerResults` of that and {block index: the same with width D}.

        Raises:
            MediaError: an input cannot be used (always for a single item).
            ValueError: an argument has no such value.
        """
        pool, wanted = self.choices(pool, layers, pruning_rate)
        widths = [self._feed.width, *([self.encoder.spec.hidden_size] if layers else [])]
        _check(batch_size, truncate_dim, on_error, num_workers, widths)
        single = _is_item(inputs)
        items: Iterable[Any] = [inputs] if single else inputs
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1)

        self.errors = []
        results: dict[int | None, list[torch.Tensor]] = {key: [] for key in (None, *wanted)}
        total = len(items) if isinstance(items, Sized) else None
        hide = not _show_progress(show_progress_bar)
        with (
            tqdm(total=total, unit="item", desc="encode", disable=hide) as bar,
            closing(self._prepared(items, batch_size, num_workers)) as prepared,
        ):
            for batch in self._batches(prepared, batch_size, single or on_error == "raise"):
                for key, rows in self._feed.encode(batch, pool, wanted, pruning_rate).items():
                    for row in rows:
                        row = row[..., :truncate_dim]
                        if normalize_embeddings:
                            row = torch.nn.functional.normalize(row, dim=-1)
                        results[key].append(row if convert_to_tensor else row.cpu())
                bar.update(len(batch))

        outputs = {}
        for key, rows in results.items():
            # nothing pools the patches of a layer as the head does those of the last
            ragged = pool == "tokens" or (pool == "head" and key is not None)
            width = self._feed.width if key is None else self.encoder.spec.hidden_size
            width = min(width, truncate_dim or width)
            outputs[key] = _collect(
                rows, single, ragged, convert_to_numpy, convert_to_tensor, width
            )
        embeddings = outputs.pop(None)
        return embeddings if layers is None else LayerResults(embeddings, outputs)

    def choices(
        self, pool: str | None, layers: Sequence[int] | None, pruning_rate: float | None = None
    ) -> tuple[Pool, list[int]]:
        """The pooling and the blocks, counted from the start, that such an `encode` gives.

        Raises:
            ValueError: the tower does not give that, or an argument has no such value.
        """
        chosen = self._feed.default_pool if pool is None else _POOLS.get(pool)
        if chosen is None:
            raise ValueError(f"encode: pool = {pool!r} is unknown; choose from {', '.join(POOLS)}")
        check_rate("encode: pruning_rate", pruning_rate)
        self._feed.check(chosen, layers, pruning_rate)
        return chosen, self._feed.layers(layers or ())

    def _prepared(
        self, items: Iterable[Any], batch_size: int, num_workers: int
    ) -> Generator[Prepared | MediaError, None, None]:
        """Pixels of each item in order, or its error; up to a batch ahead of the reader."""
        numbered = enumerate(items)
        if num_workers == 0:
            for index, item in numbered:
                yield self._prepare(item, index)
            return
        pool = ThreadPoolExecutor(num_workers, thread_name_prefix="vitgraph-decode")
        try:
            ahead: deque[Future[Any]] = deque(
                pool.submit(self._prepare, item, index)
                for index, item in islice(numbered, batch_size + num_workers)
            )
            while ahead:
                done = ahead.popleft().result()
                for index, item in islice(numbered, 1):
                    ahead.append(pool.submit(self._prepare, item, index))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, item: Any, index: int) -> Prepared | MediaError:
        try:
            return preprocess_named(self._feed.prepare, item, index)
        except MediaError as error:
            return error

    def _batches(
        self, prepared: Iterator[Prepared | MediaError], batch_size: int, raises: bool
    ) -> Iterator[list[Prepared]]:
        batch: list[Prepared] = []
        num_patches = 0
        for index, item in enumerate(prepared):
            if isinstance(item, MediaError):
                if raises:
                    raise item
                self.errors.append(SkippedInput(index, str(item)))
                logger.info("skipped: %s", item)
                continue
            is_full = len(batch) == batch_size
            if batch and (is_full or num_patches + item.num_patches > MAX_BATCH_PATCHES):
                yield batch
                batch, num_patches = [], 0
            batch.append(item)
            num_patches += item.num_patches
        if batch:
            yield batch


def _collect(
    rows: list[torch.Tensor], single: bool, ragged: bool, numpy: bool, tensor: bool, width: int
) -> Result:
    if not tensor and not numpy:
        return rows[0] if single else rows
    if ragged or single:
        parts = rows if tensor else [row.numpy() for row in rows]
        return parts[0] if single else parts
    matrix = torch.stack(rows) if rows else torch.empty(0, width)
    return matrix if tensor else matrix.numpy()


def _is_item(inputs: Any) -> bool:
    kinds = (str, Path, bytes, bytearray, memoryview, PIL.Image.Image, Video, Mapping)
    if isinstance(inputs, (*kinds, np.ndarray, torch.Tensor)):
        return True
    if not isinstance(inputs, Iterable):
        raise ValueError(
            f"encode: inputs of type {type(inputs).__name__} are neither an item (path, bytes, "
            "image, array, Video) nor an iterable of items"
        )
    return False


def _check(
    batch_size: int,
    truncate_dim: int | None,
    on_error: str,
    num_workers: int | None,
    widths: list[int],
) -> None:
    if batch_size < 1:
        raise ValueError(f"encode: batch_size = {batch_size} must be at least 1")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"encode: on_error = {on_error!r} is unknown; choose 'raise' or 'skip'")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"encode: num_workers = {num_workers} must be 0 (no threads) or more")
    if truncate_dim is not None and not 1 <= truncate_dim <= min(widths):
        raise ValueError(
            f"encode: truncate_dim = {truncate_dim} must be from 1 to the width {min(widths)}"
        )


def _show_progress(show: bool | None) -> bool:
    if show is not None:
        return show
    return logger.isEnabledFor(logging.INFO) and not are_progress_bars_disabled()
