"""How much padding packing leaves on the mixes W1 to W9, against a bound and a common policy.

Nothing runs: tokens are counted, so the figures are the same on every machine. Costs are those
assumed before calibration, in which a replay is worth `REPLAY_OVERHEAD_TOKENS` tokens.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..capture.budgets import generate_budgets
from ..capture.cost import REPLAY_OVERHEAD_TOKENS, AssumedCosts, Load
from ..capture.dispatch import Dispatcher
from ..capture.packing import room_of, total_of, within
from ..capture.protocol import EncoderItemSpec, RungLimits
from .mixes import FAMILIES, Call, mixes
from .report import table

SMALLEST_BUDGET, LARGEST_BUDGET = 16, 16384

# vLLM's defaults: powers of two, and as many items as the smallest budget has tokens. Its
# documentation gives others for the calls of W1 and W2.
_POWERS = tuple(64 << octave for octave in range(8))
_DOCUMENTED = (512, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4864)
_THEIR_LADDERS = {"W1": (_DOCUMENTED, 8), "W2": (_DOCUMENTED, 8)}

Row = dict[str, Any]


@dataclass
class Tally:
    """Tokens of some calls as a policy serves them; eager items are neither live nor padded."""

    live: int = 0
    padded: int = 0
    replays: int = 0
    eager: int = 0

    def add(self, items: Sequence[EncoderItemSpec], budget: int | None) -> None:
        """Count one batch; `budget` None is eager."""
        if budget is None:
            self.eager += len(items)
            return
        self.live += sum(item.output_tokens for item in items)
        self.padded += budget
        self.replays += 1

    @property
    def waste(self) -> float:
        """Padding over live tokens."""
        return self.padded / self.live - 1 if self.live else 0.0

    @property
    def cost(self) -> int:
        """Padded tokens with the overhead of every replay."""
        return self.padded + REPLAY_OVERHEAD_TOKENS * self.replays


def waste_rows() -> list[Row]:
    """A row for each family and mix: waste of ours, of the bound, and of the common policy."""
    rows = []
    for family in FAMILIES.values():
        rungs = [family.rung(b) for b in generate_budgets(SMALLEST_BUDGET, LARGEST_BUDGET)]
        dispatcher = Dispatcher(rungs, AssumedCosts())
        for mix, calls in mixes(family).items():
            ours, bound, theirs = Tally(), Tally(), Tally()
            for call in calls:
                items = [family.item(grid) for grid in call]
                for batch in dispatcher.plan(items):
                    budget = None if batch.rung is None else batch.rung.token_budget
                    ours.add([items[index] for index in batch.indices], budget)
                least_padding(items, rungs, bound)
                next_fit(call, items, *_THEIR_LADDERS.get(mix, (_POWERS, _POWERS[0])), theirs)
            rows.append(_row(family.name, mix, len(calls), ours, bound, theirs))
    return rows


def _row(family: str, mix: str, calls: int, ours: Tally, bound: Tally, theirs: Tally) -> Row:
    return {
        "family": family,
        "mix": mix,
        "calls": calls,
        "live_tokens": ours.live,
        "padded_tokens": ours.padded,
        "replays": ours.replays,
        "eager_items": ours.eager,
        "waste": ours.waste,
        "bound_waste": bound.waste,
        "cost_over_bound": ours.cost / bound.cost,
        "vllm_padded_tokens": theirs.padded,
        "vllm_replays": theirs.replays,
        "vllm_eager_items": theirs.eager,
        "vllm_waste": theirs.waste,
    }


def least_padding(
    items: Sequence[EncoderItemSpec], rungs: Sequence[RungLimits], tally: Tally
) -> None:
    """Add to `tally` fewer padded tokens and replays than any packing of `items` gets by with.

    Padded tokens are at least those of the smallest rung that holds the largest item, the live
    tokens rounded up to what sums of budgets reach, and for each limit its need at the budget for
    which it is cheapest. Items that no rung holds are left out.
    """
    loads = [Load.of(item) for item in items]
    rooms = [room_of(rung) for rung in rungs]
    held = [load for load in loads if within(load, rooms[-1])]
    tally.eager += len(loads) - len(held)
    if not held:
        return
    need = total_of(held)
    step = math.gcd(*(room[0] for room in rooms))
    one = max(next(room[0] for room in rooms if within(load, room)) for load in held)
    prices = [
        used * min(room[0] / room[kind] for room in rooms if room[kind])
        for kind, used in enumerate(need[: len(rooms[0])])
        if used
    ]
    tally.live += need.tokens
    tally.padded += max(one, math.ceil(max(prices) / step - 1e-9) * step)
    tally.replays += max(
        -(-used // limit) for used, limit in zip(need, rooms[-1], strict=False) if limit
    )


def next_fit(
    call: Call,
    items: Sequence[EncoderItemSpec],
    budgets: Sequence[int],
    most_items: int,
    tally: Tally,
) -> None:
    """Add to `tally` what vLLM 0.33 does with a call: next-fit over items in ascending order.

    Images and videos apart; a batch is closed by the item for which it has no room, or which is
    cheaper in a batch of its own.
    """

    def budget(tokens: int) -> int | None:
        at = bisect_left(budgets, tokens)
        return budgets[at] if at < len(budgets) else None

    def deferred(tokens: int, more: int) -> bool:
        now, alone, both = budget(tokens), budget(more), budget(tokens + more)
        if now is None or alone is None or both is None:
            return False
        return now + alone < both and alone >= now

    for is_video in (False, True):
        chosen = [item for (t, _, _), item in zip(call, items, strict=True) if (t > 1) == is_video]
        batch: list[EncoderItemSpec] = []
        tokens = 0
        for item in sorted(chosen, key=lambda item: item.output_tokens):
            more = item.output_tokens
            full = len(batch) == most_items or tokens + more > budgets[-1]
            if batch and (full or deferred(tokens, more)):
                tally.add(batch, budget(tokens))
                batch, tokens = [], 0
            batch.append(item)
            tokens += more
        if batch:
            tally.add(batch, budget(tokens))


def summary(rows: Sequence[Row]) -> str:
    """The rows as a table; waste is padding in per cent of live tokens."""
    header = (
        "family", "mix", "calls", "live", "replays", "eager", "waste %", "bound %", "cost/bound",
        "vllm replays", "vllm eager", "vllm waste %",
    )  # fmt: skip
    return table(
        header,
        [
            (
                row["family"], row["mix"], row["calls"], row["live_tokens"], row["replays"],
                row["eager_items"], f"{100 * row['waste']:.1f}", f"{100 * row['bound_waste']:.1f}",
                f"{row['cost_over_bound']:.3f}", row["vllm_replays"], row["vllm_eager_items"],
                f"{100 * row['vllm_waste']:.1f}",
            )
            for row in rows
        ],
    )  # fmt: skip
