"""The configuration of encoder CUDA graphs: checked when given, resolved against an encoder."""

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args

from .budgets import generate_budgets
from .protocol import RungLimits, SupportsEncoderCudaGraph

Modality = Literal["image", "video", "image+video"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

MAX_SLOTS = 8


@dataclass(frozen=True)
class EncoderCudaGraphConfig:
    """Which graphs to capture, and how. Checked at construction; ValueError says what is wrong.

    Attributes:
        token_budgets: budget of every rung in tokens, sorted and without duplicates afterwards;
            None for an automatic ladder over the encoder's range.
        max_vision_items_per_batch: items in one replay, for every rung; None for a number that
            grows with the rung (see `automatic_slots`).
        max_frames_per_batch: frames (attention segments) in one replay, for every rung; None for a
            number that grows with the rung, and is at least that of the items.
        modality: what calls bring. "image" makes frames equal to items, "video" gives more frames
            to fewer items, "image+video" serves both.
        num_slots: sets of static buffers, 1 to 8, each with graphs of its own. With more than one,
            a batch is staged while the one before it replays, and a lease lives for that many
            calls.
        calibrate: measure rungs and eager calls at capture, or read what an earlier capture
            measured, and dispatch by it.
        max_bytes: device memory for graphs and buffers; the largest rungs that would exceed it are
            left out. None for no limit.
        nvtx: mark stages of a call as NVTX ranges.
    """

    token_budgets: tuple[int, ...] | None = None
    max_vision_items_per_batch: int | None = None
    max_frames_per_batch: int | None = None
    modality: Modality = "image+video"
    num_slots: int = 1
    calibrate: bool = False
    max_bytes: int | None = None
    nvtx: bool = False

    def __post_init__(self):
        if self.token_budgets is not None:
            object.__setattr__(self, "token_budgets", _budgets(self.token_budgets))
        for key in ("max_vision_items_per_batch", "max_frames_per_batch", "max_bytes"):
            value = getattr(self, key)
            if value is not None:
                way_out = "None for no limit" if key == "max_bytes" else "None for automatic"
                object.__setattr__(self, key, _positive(key, value, way_out))
        object.__setattr__(self, "num_slots", _num_slots(self.num_slots))
        for key in ("calibrate", "nvtx"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(
                    f"EncoderCudaGraphConfig: {key}={getattr(self, key)!r} is neither True nor "
                    "False; pass one of them"
                )
        if self.modality not in MODALITIES:
            raise ValueError(
                f"EncoderCudaGraphConfig: modality={self.modality!r} is unknown; pass one of "
                f"{', '.join(map(repr, MODALITIES))}"
            )
        self._check_slots()

    def _check_slots(self) -> None:
        budgets, items = self.token_budgets, self.max_vision_items_per_batch
        frames = self.max_frames_per_batch
        if budgets is not None and items is not None and items > budgets[0]:
            raise ValueError(
                f"EncoderCudaGraphConfig: max_vision_items_per_batch={items} exceeds the smallest "
                f"of token_budgets, {budgets[0]}, and an item has at least one token; raise the "
                f"smallest budget to {items} or lower max_vision_items_per_batch to {budgets[0]}"
            )
        if self.modality == "image" and frames not in (None, items):
            raise ValueError(
                f"EncoderCudaGraphConfig: max_frames_per_batch={frames} differs from "
                f"max_vision_items_per_batch={items} under modality='image', and an image has one "
                "frame; leave max_frames_per_batch out or pass modality='image+video'"
            )
        if items is not None and frames is not None and frames < items:
            raise ValueError(
                f"EncoderCudaGraphConfig: max_frames_per_batch={frames} is below "
                f"max_vision_items_per_batch={items}, and an item has at least one frame; raise "
                f"max_frames_per_batch to {items} or lower max_vision_items_per_batch to {frames}"
            )

    @classmethod
    def from_any(
        cls, config: "EncoderCudaGraphConfig | Mapping[str, Any] | str | None"
    ) -> "EncoderCudaGraphConfig":
        """The configuration in any of its forms; a string is a JSON object, None the defaults.

        Raises:
            ValueError: an unknown key, a refused value, or a string that is no JSON object.
            TypeError: any other type.
        """
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            try:
                config = json.loads(config)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"EncoderCudaGraphConfig: not JSON: {config!r} ({error}); "
                    'pass an object such as {"token_budgets": [1024, 2048]}'
                ) from error
            if not isinstance(config, dict):
                raise ValueError(
                    f"EncoderCudaGraphConfig: the JSON value {config!r} is not an object; "
                    'pass one such as {"token_budgets": [1024, 2048]}'
                )
        if not isinstance(config, Mapping):
            raise TypeError(
                f"EncoderCudaGraphConfig: config is a {type(config).__name__}; pass an "
                "EncoderCudaGraphConfig, a mapping, a JSON string or None"
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in config if key not in known)
        if unknown:
            close = [match for key in unknown for match in get_close_matches(key, known, 1)]
            meant = f"did you mean {' and '.join(close)}? " if close else ""
            raise ValueError(
                f"EncoderCudaGraphConfig: unknown key {', '.join(unknown)}; {meant}"
                f"known: {', '.join(known)}"
            )
        return cls(**config)

    def resolve(self, encoder: SupportsEncoderCudaGraph) -> tuple[RungLimits, ...]:
        """The rungs to capture for `encoder`, ascending in every limit.

        Raises:
            ValueError: more items than the encoder's largest automatic budget has tokens, an empty
                or negative budget range, or limits from the encoder that shrink as budgets grow.
        """
        return self.rungs_for(encoder, self._ladder(encoder))

    def rungs_for(
        self, encoder: SupportsEncoderCudaGraph, budgets: Iterable[int]
    ) -> tuple[RungLimits, ...]:
        """The rungs of `budgets`, which ascend, with the slots of this configuration.

        Raises:
            ValueError: limits from the encoder that shrink as budgets grow.
        """
        rungs = tuple(encoder.rung_limits(budget, *self._slots(budget)) for budget in budgets)
        for small, large in pairwise(rungs):
            shrunk = [f.name for f in fields(small) if _limit(large, f) < _limit(small, f)]
            if shrunk:
                raise ValueError(
                    f"EncoderCudaGraphConfig: {type(encoder).__name__}.rung_limits shrinks "
                    f"{', '.join(shrunk)} between {small} and {large}; limits must grow with the "
                    "token budget"
                )
        return rungs

    def _ladder(self, encoder: SupportsEncoderCudaGraph) -> tuple[int, ...]:
        if self.token_budgets is not None:
            return self.token_budgets
        smallest, largest = encoder.budget_range()
        items = self.max_vision_items_per_batch
        if items is None:
            return generate_budgets(smallest, largest)
        if items > largest:
            raise ValueError(
                f"EncoderCudaGraphConfig: max_vision_items_per_batch={items} exceeds the encoder's "
                f"largest automatic token budget, {largest}; lower it to {largest}, or pass "
                f"token_budgets of at least {items}"
            )
        return generate_budgets(max(smallest, items), largest)

    def _slots(self, budget: int) -> tuple[int, int]:
        """(items, frames) of the rung of `budget` tokens."""
        items, frames = self.max_vision_items_per_batch, self.max_frames_per_batch
        automatic_items, automatic_frames = automatic_slots(budget, self.modality)
        if items is None:
            # An item has a frame at least: slots past the frames asked for could never be used.
            items = automatic_items if frames is None else min(automatic_items, frames)
        if self.modality == "image":
            return items, items
        # Nor could slots for more frames than tokens.
        return items, max(items, automatic_frames) if frames is None else min(frames, budget)


def automatic_slots(budget: int, modality: Modality = "image+video") -> tuple[int, int]:
    """(items, frames) of a rung of `budget` tokens where none are asked for.

    An empty frame slot is not free: in every block it costs attention a program per head, as much
    as a tile of up to 128 rows does before it reads anything. So there is one frame for every 32
    tokens (128 rows, an image of 160 x 160 pixels), which at most doubles the programs: 8 to 64
    for images, where a rung rarely holds more, but up to 256 for videos, which have few tokens a
    frame and could not be split over two replays. A slot for an item costs next to nothing but
    needs a frame; for videos there is one for every 4 frames.
    """
    most = 256 if modality == "video" else 64
    frames = min(budget, max(8, min(most, budget // 32)))
    return (max(1, frames // 4) if modality == "video" else frames), frames


def _limit(limits: RungLimits, field: Any) -> int:
    return getattr(limits, field.name)


def _positive(key: str, value: object, way_out: str) -> int:
    number = _whole(value)
    if number is None or number < 1:
        raise ValueError(
            f"EncoderCudaGraphConfig: {key}={value!r} must be a whole number of at least 1; "
            f"pass one, or {way_out}"
        )
    return number


def _num_slots(value: object) -> int:
    number = _whole(value)
    if number is None or not 1 <= number <= MAX_SLOTS:
        raise ValueError(
            f"EncoderCudaGraphConfig: num_slots={value!r} must be a whole number from 1 to "
            f"{MAX_SLOTS}; pass 1 for a single set of buffers, 2 to overlap staging with replays"
        )
    return number


def _whole(value: object) -> int | None:
    # bool is an int to Python; here it is a mistake (True would mean one item).
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _budgets(value: object) -> tuple[int, ...]:
    way_out = "token_budgets=None for an automatic ladder"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(
            f"EncoderCudaGraphConfig: token_budgets={value!r} is not a list of whole numbers; "
            f"pass one such as [1024, 2048], or {way_out}"
        )
    budgets = {_positive("an entry of token_budgets", entry, way_out) for entry in value}
    if not budgets:
        raise ValueError(
            "EncoderCudaGraphConfig: token_budgets is empty, at least 1 budget is needed; "
            f"pass one, or {way_out}"
        )
    return tuple(sorted(budgets))
