"""What a call costs, replayed or eager: the numbers that dispatch weighs.

A replay runs the library GEMMs of its whole rung and attention over the live segments, so it costs
`base + per_token * tokens + per_pair * pairs` with coefficients of the rung. An eager call costs
what the GPU needs for the live rows, but never less than the host needs to launch it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import le
from typing import Any, NamedTuple, Protocol

from .cost_json import entry, number, refused
from .protocol import EncoderItemSpec, RungLimits

# A replay reads every weight and launches every kernel, however few rows it has: on an H200 a tower
# of 0.6 G weights takes as long for no tokens as a large rung takes for about 100 more.
REPLAY_OVERHEAD_TOKENS = 128
# Of eager tokens where nothing is measured: above any number of replays.
_NEVER = 1e6
# Below this a split is not worth its planning, if costs were exact. Measured ones are not: several
# predictions add up, between rungs that were not all measured, and are off by a few per cent each.
_EXACT_MARGIN = 0.01
_MEASURED_MARGIN = 0.1
# Of a replay and an eager call that are predicted to take about as long the replay is taken: it
# leaves the host free, and large eager calls that promised half a per cent were seen to lose two.
_EAGER_MARGIN = 0.01


class Load(NamedTuple):
    """What a batch holds; `pairs` are query-key pairs of a full-attention layer."""

    tokens: int
    patches: int
    items: int
    frames: int
    windows: int
    pairs: int

    @classmethod
    def of(cls, item: EncoderItemSpec) -> "Load":
        """The load of one item."""
        return cls(
            item.output_tokens,
            item.input_size,
            1,
            item.num_frames,
            item.num_windows,
            item.attention_pairs,
        )

    def plus(self, other: "Load") -> "Load":
        """Both loads in one batch."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return Load(a + u, b + v, c + w, d + x, e + y, f + z)

    def minus(self, other: "Load") -> "Load":
        """This load without a part of it."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return Load(a - u, b - v, c - w, d - x, e - y, f - z)


class Terms(NamedTuple):
    """Microseconds of a replay: `base + per_token * tokens + per_pair * pairs`, none negative."""

    base: float
    per_token: float
    per_pair: float

    def of(self, load: Load) -> float:
        """Microseconds of a replay that carries `load`."""
        return self.base + self.per_token * load.tokens + self.per_pair * load.pairs


@dataclass(frozen=True)
class EagerCurve:
    """Microseconds of an eager call: the larger of the time of the host and a GPU time.

    Attributes:
        floor: time in which the host launches everything, at least.
        tokens, us: knots of the GPU time without attention pairs, the first at 0 tokens, linear
            between them, not falling.
        per_pair: GPU time of an attention pair, at least.
        pair_rise: what a pair takes above that at each knot, linear between them; () for nothing.
        floor_steps: (tokens, us), ascending in both: from so many tokens on the floor is `us`. More
            rows take other kernels, and some of them keep the host longer.
    """

    floor: float
    tokens: tuple[int, ...]
    us: tuple[float, ...]
    per_pair: float
    pair_rise: tuple[float, ...] = ()
    floor_steps: tuple[tuple[int, float], ...] = ()
    end_slope: float = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        # Past the last knot: never below the average rate, or a flat end would make tokens free.
        (t0, t1), (u0, u1) = self.tokens[-2:], self.us[-2:]
        object.__setattr__(self, "end_slope", max((u1 - u0) / (t1 - t0), u1 / t1))

    def of(self, load: Load) -> float:
        """Microseconds of `load`."""
        return max(self.host(load.tokens), self.gpu(load))

    def with_margin(self, margin: float) -> "EagerCurve":
        """The curve that reaches the cost of replays where eager calls save `margin` of it."""
        share = 1 - margin
        return replace(
            self,
            floor=self.floor / share,
            us=tuple(us / share for us in self.us),
            per_pair=self.per_pair / share,
            pair_rise=tuple(rise / share for rise in self.pair_rise),
            floor_steps=tuple((tokens, us / share) for tokens, us in self.floor_steps),
        )

    def host(self, tokens: int) -> float:
        """Time in which the host launches what `tokens` take."""
        floor = self.floor
        for first, us in self.floor_steps:
            if tokens < first:
                break
            floor = us
        return floor

    def gpu(self, load: Load) -> float:
        """GPU time of `load`."""
        tokens, per_pair = load.tokens, self.per_pair
        if self.pair_rise:
            per_pair += self._between(self.pair_rise, tokens, self.pair_rise[-1])
        past = self.us[-1] + (tokens - self.tokens[-1]) * self.end_slope
        return self._between(self.us, tokens, past) + per_pair * load.pairs

    def _between(self, values: tuple[float, ...], tokens: int, past: float) -> float:
        """`values` at the knots, interpolated at `tokens`; `past` from the last knot on."""
        knots = self.tokens
        if tokens >= knots[-1]:
            return past
        at = bisect_right(knots, tokens)
        low, high = knots[at - 1], knots[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (tokens - low) / (high - low)


class Costs(Protocol):
    """Wall times of whole calls, comparable with each other."""

    @property
    def eager_curve(self) -> EagerCurve:
        """The cost of eager calls."""
        ...

    @property
    def split_margin(self) -> float:
        """The part of the cost of a single call that a split has to promise to save."""
        ...

    @property
    def eager_margin(self) -> float:
        """The part of the cost of a replay that an eager call has to promise to save."""
        ...

    def terms(self, rung: RungLimits) -> Terms:
        """The cost of replays of `rung`."""
        ...

    def replay(self, rung: RungLimits, load: Load) -> float:
        """Microseconds of a call that is one replay of `rung` with `load`."""
        ...

    def eager(self, load: Load) -> float:
        """Microseconds of `load` computed eagerly."""
        ...


@dataclass(frozen=True)
class AssumedCosts:
    """Costs before anything is measured, in tokens of a large rung instead of microseconds.

    A replay costs the tokens of its rung and `replay_overhead` more. An eager token costs more than
    any replay, so only items that no rung holds are computed eagerly.
    """

    replay_overhead: int = REPLAY_OVERHEAD_TOKENS

    @property
    def eager_curve(self) -> EagerCurve:
        """Proportional to tokens, out of reach of any replay."""
        return _ASSUMED_EAGER

    @property
    def split_margin(self) -> float:
        """Small: an assumption is taken at its word."""
        return _EXACT_MARGIN

    @property
    def eager_margin(self) -> float:
        """None: eager calls are out of reach anyway."""
        return 0.0

    def terms(self, rung: RungLimits) -> Terms:
        """The budget and the overhead, whatever the load."""
        return Terms(float(rung.token_budget + self.replay_overhead), 0.0, 0.0)

    def replay(self, rung: RungLimits, load: Load) -> float:
        """Cost of one replay of `rung`."""
        return self.terms(rung).of(load)

    def eager(self, load: Load) -> float:
        """Cost of `load` computed eagerly."""
        return _ASSUMED_EAGER.of(load)


# One call costs less than two.
_ASSUMED_EAGER = EagerCurve(_NEVER, (0, 1 << 20), (_NEVER, _NEVER * (1 + (1 << 20))), 0.0)


def interpolated(replays: Sequence[tuple[int, Terms]], budget: int) -> Terms:
    """Terms of a rung of `budget` tokens between those of `replays`, which ascend."""
    above = bisect_left(replays, budget, key=lambda entry: entry[0])
    if above == 0:
        return replays[0][1]
    low, low_terms = replays[above - 1]
    if above == len(replays):
        return low_terms._replace(base=low_terms.base * budget / low)
    high, high_terms = replays[above]
    share = (budget - low) / (high - low)
    return Terms(*(a + share * (b - a) for a, b in zip(low_terms, high_terms, strict=True)))


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs fitted to measurements (see `fit_costs`).

    Attributes:
        replays: (token budget, terms) of each measured rung, ascending. Between two of them the
            terms are interpolated over the budget. Below the first they are its own; above the last
            `base` grows in proportion.
        eager_curve: the cost of eager calls.
    """

    replays: tuple[tuple[int, Terms], ...]
    eager_curve: EagerCurve
    _known: dict[int, Terms] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_known", dict(self.replays))

    @property
    def split_margin(self) -> float:
        """More than the errors of several predictions together."""
        return _MEASURED_MARGIN

    @property
    def eager_margin(self) -> float:
        """About the error of a prediction."""
        return _EAGER_MARGIN

    def terms(self, rung: RungLimits) -> Terms:
        """The terms of `rung`, interpolated where it was not measured."""
        known = self._known.get(rung.token_budget)
        if known is None:
            known = self._known[rung.token_budget] = interpolated(self.replays, rung.token_budget)
        return known

    def replay(self, rung: RungLimits, load: Load) -> float:
        """Microseconds of a call that is one replay of `rung` with `load`."""
        return self.terms(rung).of(load)

    def eager(self, load: Load) -> float:
        """Microseconds of `load` computed eagerly."""
        return self.eager_curve.of(load)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        curve = self.eager_curve
        return {
            "replays": [{"token_budget": budget, **t._asdict()} for budget, t in self.replays],
            "eager": {
                "floor": curve.floor,
                "tokens": list(curve.tokens),
                "us": list(curve.us),
                "per_pair": curve.per_pair,
                "pair_rise": list(curve.pair_rise),
                "floor_steps": [{"tokens": first, "us": us} for first, us in curve.floor_steps],
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> "MeasuredCosts":
        """The costs that `to_json` wrote.

        Raises:
            ValueError: a key is missing or holds what no costs have; names it.
        """
        rows = entry(data, "replays", list)
        replays = []
        for place, row in enumerate(rows):
            where = f"replays[{place}]."
            budget = number(row, "token_budget", int, where, least=1)
            if replays and budget <= replays[-1][0]:
                raise refused(f"{where}token_budget", budget, "above the one before it")
            replays.append((budget, Terms(*(number(row, k, float, where) for k in Terms._fields))))
        if not replays:
            raise refused("replays", rows, "a list of at least one rung")
        eager = entry(data, "eager", Mapping)
        tokens, us, rise = (entry(eager, k, list, "eager.") for k in ("tokens", "us", "pair_rise"))
        for key, values, kind in (
            ("tokens", tokens, int),
            ("us", us, float),
            ("pair_rise", rise, float),
        ):
            for place in range(len(values)):
                number(values, place, kind, f"eager.{key}")
        if len(tokens) < 2 or tokens[0] != 0 or any(map(le, tokens[1:], tokens)):
            raise refused("eager.tokens", tokens, "two or more numbers ascending from 0")
        if len(us) != len(tokens) or sorted(us) != us:
            raise refused("eager.us", us, f"{len(tokens)} numbers that do not fall")
        floor, per_pair = (number(eager, k, float, "eager.") for k in ("floor", "per_pair"))
        if len(rise) not in (0, len(tokens)):
            raise refused("eager.pair_rise", rise, f"{len(tokens)} numbers, or none")
        steps = [(0, floor)]
        for place, row in enumerate(entry(eager, "floor_steps", list, "eager.")):
            where = f"eager.floor_steps[{place}]."
            step = number(row, "tokens", int, where), number(row, "us", float, where)
            if step[0] <= steps[-1][0] or step[1] <= steps[-1][1]:
                raise refused(where[:-1], row, f"above {steps[-1]} in both")
            steps.append(step)
        curve = EagerCurve(
            floor,
            tuple(tokens),
            tuple(map(float, us)),
            per_pair,
            tuple(map(float, rise)),
            tuple(steps[1:]),
        )
        return cls(tuple(replays), curve)


@dataclass(frozen=True)
class CostSample:
    """One measurement: `us` microseconds for a call of `load`, on a rung or (None) eagerly."""

    token_budget: int | None
    load: Load
    us: float

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {"token_budget": self.token_budget, "load": self.load._asdict(), "us": self.us}

    @classmethod
    def from_json(cls, data: Any) -> "CostSample":
        """The sample that `to_json` wrote; ValueError names a key that is missing or wrong."""
        budget = entry(data, "token_budget", (int, type(None)))
        if budget is not None:
            number(data, "token_budget", int, least=1)
        row = entry(data, "load", Mapping)
        load = Load(*(number(row, key, int, "load.") for key in Load._fields))
        us = number(data, "us", float)
        if us == 0:
            raise refused("us", us, "positive")
        return cls(budget, load, us)
