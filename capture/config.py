"""The configuration of encoder CUDA graphs: checked when given, resolved against an encoder."""

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from .budgets import generate_budgets
from .protocol import RungLimits, SupportsEncoderCudaGraph


@dataclass(frozen=True)
class EncoderCudaGraphConfig:
    """Which graphs to capture. Checked at construction; ValueError says what is wrong.

    Attributes:
        token_budgets: budget of every rung in tokens, sorted and without duplicates afterwards;
            None for an automatic ladder over the encoder's range.
        max_vision_items_per_batch: items in one replay, for every rung; None for 8 to 64,
            rung by rung (see `automatic_slots`).
        max_frames_per_batch: frames (attention segments) in one replay, for every rung; None for
            the same numbers, and at least as many as items.
    """

    token_budgets: tuple[int, ...] | None = None
    max_vision_items_per_batch: int | None = None
    max_frames_per_batch: int | None = None

    def __post_init__(self):
        if self.token_budgets is not None:
            object.__setattr__(self, "token_budgets", _budgets(self.token_budgets))
        for key in ("max_vision_items_per_batch", "max_frames_per_batch"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, _positive(key, value, "None for automatic"))
        budgets, items = self.token_budgets, self.max_vision_items_per_batch
        frames = self.max_frames_per_batch
        if budgets is not None and items is not None and items > budgets[0]:
            raise ValueError(
                f"EncoderCudaGraphConfig: max_vision_items_per_batch={items} exceeds the smallest "
                f"of token_budgets, {budgets[0]}, and an item has at least one token; raise the "
                f"smallest budget to {items} or lower max_vision_items_per_batch to {budgets[0]}"
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
            raise ValueError(
                f"EncoderCudaGraphConfig: unknown key {', '.join(unknown)}; "
                f"known: {', '.join(known)}"
            )
        return cls(**config)

    def resolve(self, encoder: SupportsEncoderCudaGraph) -> tuple[RungLimits, ...]:
        """The rungs to capture for `encoder`, ascending in every limit.

        Raises:
            ValueError: more items than the encoder's largest automatic budget has tokens, an empty
                or negative budget range, or limits from the encoder that shrink as budgets grow.
        """
        rungs = tuple(
            encoder.rung_limits(budget, *self._slots(budget)) for budget in self._ladder(encoder)
        )
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
        automatic = automatic_slots(budget)
        if items is None:
            # An item has a frame at least: slots past the frames asked for could never be used.
            items = automatic if frames is None else min(automatic, frames)
        return items, max(items, automatic) if frames is None else frames


def automatic_slots(budget: int) -> int:
    """Items, and frames, of a rung of `budget` tokens where none are asked for.

    One for every 32 tokens (an image of 160 x 160 pixels), but 8 to 64. An empty slot is not free:
    it costs attention a program per head and tile in every block.
    """
    return min(budget, max(8, min(64, budget // 32)))


def _limit(limits: RungLimits, field: Any) -> int:
    return getattr(limits, field.name)


def _positive(key: str, value: object, way_out: str) -> int:
    # bool is an int to Python; here it is a mistake (True would mean one item).
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = 0
        if number > 0:
            return number
    raise ValueError(
        f"EncoderCudaGraphConfig: {key}={value!r} must be a whole number of at least 1; "
        f"pass one, or {way_out}"
    )


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
