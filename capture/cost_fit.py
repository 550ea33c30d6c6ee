"""Costs from measurements: least squares on relative errors, no coefficient negative."""

from collections.abc import Sequence

import numpy as np

from .cost import CostSample, EagerCurve, MeasuredCosts, Terms
from .protocol import RungLimits

# Weight, in relative error, of the wish that a coefficient the samples say nothing about be zero.
_WISH = 1e-2
# The same for what the samples should insist on: chosen on made-up and on measured times.
_STRONG_WISH = 0.3
# Knots of the eager curve lie at least this far apart: closer ones would fit noise.
_KNOT_RATIO = 1.15


def fit_costs(samples: Sequence[CostSample], rungs: Sequence[RungLimits]) -> MeasuredCosts:
    """The costs that explain `samples` best.

    Args:
        samples: calls on some of `rungs` and eager ones, each rung with several loads: full and
            partly filled, in few large and many small frames.
        rungs: the ladder that was measured; rungs without samples are interpolated.

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
    replays = tuple((budget, _fit_rung(by_rung[budget])) for budget in sorted(by_rung))
    return MeasuredCosts(replays, _fit_eager(eager))


def _fit_rung(samples: Sequence[CostSample]) -> Terms:
    columns = [(1, sample.load.tokens, sample.load.pairs) for sample in samples]
    return Terms(*_fit(np.array(columns, float), samples, (0.0, _WISH, _WISH)).tolist())


def _fit_eager(samples: Sequence[CostSample]) -> EagerCurve:
    """Try every division into calls bound by the host and by the GPU; keep the best."""
    ordered = sorted(samples, key=lambda sample: sample.us)
    times = np.array([sample.us for sample in ordered])
    curves = []
    for host_bound in range(len(ordered)):
        weights = 1 / times[:host_bound]
        # no call is taken to cost less than the fastest that was measured
        floor = float(weights.sum() / (weights**2).sum()) if host_bound else float(times[0])
        curves.append(_fit_curve(floor, ordered[host_bound:]))

    def error(curve: EagerCurve) -> float:
        return sum((curve.of(sample.load) / sample.us - 1) ** 2 for sample in ordered)

    return min(curves, key=error)


def _fit_curve(floor: float, samples: Sequence[CostSample]) -> EagerCurve:
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
    return EagerCurve(floor, knots, us, per_pair, (added[0], *added))


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
