"""Costs from measurements: least squares on relative errors, no coefficient negative."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .cost import CostSample, EagerCurve, Load, MeasuredCosts, Terms, interpolated
from .packing import room_of, within
from .protocol import RungLimits

# Weight, in relative error, of the wish that a coefficient the samples say nothing about be zero.
_WISH = 1e-2
# The same for what the samples should insist on: chosen on made-up and on measured times.
_STRONG_WISH = 0.3
# Times this close are one plateau, which tells of the host if its tokens differ by more than that.
_PLATEAU = 1.1
_PLATEAU_RATIO = 1.25
# The GPU time of a load is that of a replay which it fills so far; an eager call that takes more
# than so many times that waits for the host.
_FILLED = 0.8
_WAITS = 1.05
# Knots of the eager curve lie at least this far apart: closer ones would fit noise.
_KNOT_RATIO = 1.1


def fit_costs(samples: Sequence[CostSample], rungs: Sequence[RungLimits]) -> MeasuredCosts:
    """The costs that explain `samples` best.

    Args:
        samples: calls on some of `rungs` and eager ones, each rung with several loads: full and
            partly filled, in few large and many small frames.
        rungs: the ladder that was measured; rungs without samples are interpolated, and those with
            one are interpolated and scaled.

    Raises:
        ValueError: a sample of another rung or of no time, or none of a replay or an eager call.
    """
    budgets = {rung.token_budget for rung in rungs}
    by_rung: dict[int, list[CostSample]] = {}
    eager = []
    for sample in samples:
        if not sample.us > 0 or not np.isfinite(sample.us):
            raise ValueError(f"fit_costs: {sample} has no positive time; measure it again")
        if sample.token_budget is None:
            eager.append(sample)
        elif sample.token_budget in budgets:
            by_rung.setdefault(sample.token_budget, []).append(sample)
        else:
            raise ValueError(
                f"fit_costs: {sample} is of a rung of {sample.token_budget} tokens, which is not "
                f"among the {len(budgets)} of the ladder; pass the ladder that was measured"
            )
    if not by_rung or not eager:
        raise ValueError(
            f"fit_costs: {len(by_rung)} rungs and {len(eager)} eager calls are measured; "
            "at least 1 of each is needed"
        )
    by_budget = _fit_replays(by_rung)
    terms = dict(by_budget)
    replays = [(rung, terms[rung.token_budget]) for rung in rungs if rung.token_budget in terms]
    replays.sort(key=lambda entry: entry[0].token_budget)
    return MeasuredCosts(by_budget, _fit_eager(eager, replays))


def _fit_replays(by_rung: Mapping[int, Sequence[CostSample]]) -> tuple[tuple[int, Terms], ...]:
    """Terms of each rung: fitted to its samples or, if it has one, its neighbours' scaled to it."""
    fitted = {
        budget: _fit_rung(samples) for budget, samples in by_rung.items() if len(samples) > 1
    } or {budget: _fit_rung(samples) for budget, samples in by_rung.items()}
    between = tuple(sorted(fitted.items()))
    for budget in by_rung.keys() - fitted.keys():
        (sample,) = by_rung[budget]
        near = interpolated(between, budget)
        ratio = sample.us / near.of(sample.load)
        fitted[budget] = Terms(*(ratio * term for term in near))
    return tuple(sorted(fitted.items()))


def _fit_rung(samples: Sequence[CostSample]) -> Terms:
    columns = [(1, sample.load.tokens, sample.load.pairs) for sample in samples]
    return Terms(*_fit(np.array(columns, float), samples, (0.0, _WISH, _WISH)).tolist())


def _fit_eager(
    samples: Sequence[CostSample], replays: Sequence[tuple[RungLimits, Terms]]
) -> EagerCurve:
    replayed = [_replayed(sample.load, replays) for sample in samples]
    waits = [
        gpu is None or sample.us > _WAITS * gpu
        for sample, gpu in zip(samples, replayed, strict=True)
    ]
    floors = _floors(samples, waits)
    bound_by_gpu = []
    for sample, gpu in zip(samples, replayed, strict=True):
        host = max(us for first, us in floors if first <= sample.load.tokens)
        waited = sample.us <= _PLATEAU * host or (gpu is not None and sample.us > _WAITS * gpu)
        if not waited:
            bound_by_gpu.append(sample)
        elif gpu is not None:
            bound_by_gpu.append(replace(sample, us=min(sample.us, gpu)))
    slowest = max(samples, key=lambda sample: sample.us)
    return _fit_curve(floors, bound_by_gpu or [slowest])


def _replayed(load: Load, replays: Sequence[tuple[RungLimits, Terms]]) -> float | None:
    """Time of a replay that `load` fills, which is its GPU time; None if there is none."""
    for rung, terms in replays:
        if within(load, room_of(rung)):
            return terms.of(load) if load.tokens >= _FILLED * rung.token_budget else None
    return None


def _floors(samples: Sequence[CostSample], waits: Sequence[bool]) -> list[tuple[int, float]]:
    """(tokens, us), ascending in both: what the host needs from so many tokens on.

    Where more tokens take no longer, calls wait for the host. The first is from 0 on: no call is
    taken to cost less than the fastest that was measured. `waits` says which calls may have waited.
    """
    pairs = zip(samples, waits, strict=True)
    ordered = sorted(pairs, key=lambda pair: pair[0].load.tokens)
    # the least time of a call of at least so many tokens: it rises by steps and by slopes
    least = np.minimum.accumulate([sample.us for sample, _ in ordered][::-1])[::-1]
    floors = [(0, float(least[0]))]
    start = 0
    while start < len(ordered):
        most = _PLATEAU * least[start]
        level = [sample for sample, may_wait in ordered[start:] if may_wait and sample.us <= most]
        tokens = [sample.load.tokens for sample in level]
        if level and (start == 0 or tokens[-1] >= _PLATEAU_RATIO * tokens[0]):
            step = tokens[0], float(np.median([sample.us for sample in level]))
            floors = [(0, step[1])] if start == 0 else [*floors, step]
        start = int(np.searchsorted(least, most, side="right"))
    return floors


def _fit_curve(floors: Sequence[tuple[int, float]], samples: Sequence[CostSample]) -> EagerCurve:
    knots = _knots([sample.load.tokens for sample in samples])
    tokens = np.array([[sample.load.tokens] for sample in samples], float)
    low, high = np.array(knots[:-1], float), np.array(knots[1:], float)
    # The curve is a start and the rise of each segment: not negative means that it never falls.
    rises = ((tokens - low) / (high - low)).clip(0, 1)
    pairs = np.array([[sample.load.pairs] for sample in samples], float)
    # What a pair takes depends on how attention tiles the frames, so each knot may add to it; the
    # first knot, no tokens, shares what the second adds.
    hats = np.stack([np.interp(tokens[:, 0], knots, row) for row in np.eye(len(knots))], axis=1)
    hats[:, 1] += hats[:, 0]
    columns = [np.ones_like(pairs), rises, pairs, pairs * hats[:, 1:]]
    wishes = (_WISH, *(0.0 for _ in low), _WISH, *(_STRONG_WISH for _ in low))
    found = _fit(np.concatenate(columns, axis=1), samples, wishes).tolist()
    start_and_rises, per_pair, added = found[: len(knots)], found[len(knots)], found[-len(low) :]
    us = tuple(np.cumsum(start_and_rises).tolist())
    (_, floor), *steps = floors
    return EagerCurve(floor, knots, us, per_pair, (added[0], *added), tuple(steps))


def _knots(tokens: Sequence[int]) -> tuple[int, ...]:
    """0 and some of `tokens`, the smallest left out: the first segment is extrapolated from it."""
    distinct = sorted({max(1, count) for count in tokens})
    knots = [distinct[-1]]
    for count in reversed(distinct[1:-1]):
        if count * _KNOT_RATIO <= knots[-1]:
            knots.append(count)
    return (0, *reversed(knots))


def _fit(columns: np.ndarray, samples: Sequence[CostSample], wishes: Sequence[float]) -> np.ndarray:
    """x >= 0 that makes `columns @ x / us` closest to 1; `wishes` pulls entries to 0."""
    rows = columns / np.array([[sample.us] for sample in samples])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    wish = np.diag(np.array(wishes))
    target = np.concatenate([np.ones(len(rows)), np.zeros(len(wish))])
    return nonnegative_least_squares(np.concatenate([rows / scale, wish]), target) / scale


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with the least `|matrix @ x - target|` (Lawson and Hanson's active sets)."""
    x = np.zeros(matrix.shape[1])
    free = np.zeros(len(x), bool)
    for _ in range(3 * len(x)):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = 0.0
        if gradient.max(initial=0.0) <= 1e-12:
            break
        free[gradient.argmax()] = True
        while True:
            step = np.zeros_like(x)
            step[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            negative = free & (step <= 0)
            if not negative.any():
                x = step
                break
            # Go towards the free optimum until the first coefficients reach zero; hold them there.
            ratios = np.where(negative, 0.0, np.inf)
            np.divide(x, x - step, out=ratios, where=negative & (x > 0))
            x = x + ratios.min() * (step - x)
            free &= (ratios > ratios.min()) & (x > 0)
            x[~free] = 0.0
    return x
