"""What a manager has done since it captured: counted in items, rows and replays."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .cost import Load
from .protocol import RungLimits

# Sizes counted apart before they are merged into coarser steps, so that counting is bounded.
_EXACT_UP_TO = 4096


@dataclass
class RungStats:
    """Replays of one rung, and what they carried."""

    replays: int = 0
    items: int = 0
    live_tokens: int = 0


@dataclass
class CallStats:
    """Counters of replayed and eagerly computed items.

    `hits + misses` is the number of items served, and the eager reasons sum to the misses: an item
    is counted once, where its batch is launched.
    """

    hits: int = 0
    replays: int = 0
    live_tokens: int = 0
    padded_tokens: int = 0
    live_patches: int = 0
    padded_patches: int = 0
    eager_reasons: Counter[str] = field(default_factory=Counter)
    rungs: dict[int, RungStats] = field(default_factory=dict)
    histogram: Counter[int] = field(default_factory=Counter)

    def count_call(self, tokens: int) -> None:
        """A call of `tokens` tokens, for the histogram that a ladder is fitted to."""
        step = 1 if tokens <= _EXACT_UP_TO else 64
        self.histogram[-(-tokens // step) * step] += 1

    def count_replay(self, rung: RungLimits, load: Load) -> None:
        """A replay of `rung` that carried `load`."""
        self.hits += load.items
        self.replays += 1
        self.live_tokens += load.tokens
        self.padded_tokens += rung.token_budget
        self.live_patches += load.patches
        self.padded_patches += rung.max_patches
        own = self.rungs.get(rung.token_budget)
        if own is None:
            own = self.rungs[rung.token_budget] = RungStats()
        own.replays += 1
        own.items += load.items
        own.live_tokens += load.tokens

    def count_eager(self, reasons: Counter[str]) -> None:
        """Items computed without a graph, by reason."""
        self.eager_reasons.update(reasons)

    def of_rung(self, token_budget: int) -> dict[str, int]:
        """The counters of one rung."""
        return asdict(self.rungs.get(token_budget, RungStats()))

    def report(self) -> dict[str, Any]:
        """The counters as plain values."""
        misses = sum(self.eager_reasons.values())
        return {
            "items": self.hits + misses,
            "hits": self.hits,
            "misses": misses,
            "eager_reasons": dict(self.eager_reasons),
            "replays": self.replays,
            "live_tokens": self.live_tokens,
            "padded_tokens": self.padded_tokens,
            "live_patches": self.live_patches,
            "padded_patches": self.padded_patches,
            "histogram": dict(sorted(self.histogram.items())),
        }
