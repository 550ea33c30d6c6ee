"""Plans under costs fitted to a machine's times, judged by those times."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path

import pytest
from vitgraph.capture.budgets import generate_budgets
from vitgraph.capture.config import automatic_slots
from vitgraph.capture.cost import CostSample, Load
from vitgraph.capture.cost_fit import fit_costs
from vitgraph.capture.dispatch import Dispatcher
from vitgraph.capture.packing import room_of, within
from vitgraph.capture.protocol import EncoderItemSpec, RungLimits

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def image(tokens, frames=1):
    patches = 4 * tokens
    return EncoderItemSpec(patches, tokens, frames, 0, patches * patches // frames)


def load_of(items):
    return Load._make(map(sum, zip(*map(Load.of, items), strict=True)))


def best_single(items, rungs, times):
    load = load_of(items)
    replays = [times.replay(rung, load) for rung in rungs if within(load, room_of(rung))]
    return min([*replays, times.eager(load)])


def spread(*budgets):
    """Rungs with the slots of an automatic ladder."""
    return tuple(RungLimits(b, 4 * b, *automatic_slots(b), 0) for b in budgets)


def automatic(largest=16384):
    return spread(*generate_budgets(16, largest))


class TrueTimes:
    """A machine whose times follow no model of ours: steps of tiles, waves and segment lengths."""

    width, depth, mlp, sms = 1152, 27, 4304, 132

    def __init__(self, host_us, noise=0.0):
        self._host_us, self._noise, self._random = host_us, noise, random.Random(1)

    def _gemm(self, rows, columns, inner):
        tiles = math.ceil(rows / 128) * math.ceil(columns / 256)
        wave = 0.25 + 128 * 256 * inner * 2 / (990e12 * 0.8 / self.sms) * 1e6
        # A last wave that is not full runs somewhat faster.
        full, part = divmod(tiles, self.sms)
        weights = columns * inner * 2 / 4.8e12 * 1e6
        return max((full + (part > 0) * (0.55 + 0.45 * part / self.sms)) * wave, weights)

    def _gpu(self, rows, load):
        d, f = self.width, self.mlp
        gemms = sum(self._gemm(rows, *s) for s in ((3 * d, d), (d, d), (f, d), (d, f)))
        passes = 9 * rows * d * 2 / 3.8e12 * 1e6
        length = load.pairs / load.patches
        padded = math.ceil(length / 128) * 128 * load.patches
        attention = padded * 4 * d / (650e12 * length / (length + 200)) * 1e6
        return self.depth * (gemms + passes + attention + 9 * 1.1)

    def _measured(self, us):
        return us * (1 + self._noise * self._random.uniform(-1, 1))

    def replay(self, rung, load):
        staging = load.patches * 1536 * 6 / 3.8e12 * 1e6
        return self._measured(90 + staging + self._gpu(rung.max_patches, load))

    def eager(self, load):
        # from so many rows on some kernels are others, which take longer to launch
        host_us = self._host_us * (1.4 if load.patches >= 3136 else 1) + 5 * load.items
        return self._measured(max(host_us, 120 + self._gpu(load.patches, load)))


def calibrated(truth, rungs, count=12):
    """Samples as calibration takes them: each rung with few large and many small images.

    Replays of all small rungs and of some of the others; eager calls of some of both.
    """
    small = [rung for rung in rungs if rung.token_budget <= 2048]
    some_large = some_of(rungs[len(small) :], count)
    some = [*some_of(small, 2 * count), *some_large]
    samples = []
    for rung in dict.fromkeys([*small, *some]):
        for share, images in ((1.0, 1), (1.0, rung.max_items), (0.6, 4), (0.3, 2)):
            tokens = max(1, int(rung.token_budget * share) // images)
            load = load_of([image(tokens)] * images)
            samples.append(CostSample(rung.token_budget, load, truth.replay(rung, load)))
            if rung in some:
                samples.append(CostSample(None, load, truth.eager(load)))
    for rung in rungs[len(small) :]:
        load = load_of([image(rung.token_budget // 8)] * 8)
        samples.append(CostSample(rung.token_budget, load, truth.replay(rung, load)))
        samples.append(CostSample(None, load, truth.eager(load)))
    # Eager calls also serve what no rung holds.
    for share, images in ((2, 8), (2, 32), (4, 16), (4, 64)):
        load = load_of([image(rungs[-1].token_budget * share // images)] * images)
        samples.append(CostSample(None, load, truth.eager(load)))
    return samples


def some_of(rungs, count):
    last = len(rungs) - 1
    if last < count:
        return list(rungs)
    return [rungs[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]


def random_layout(rng, largest):
    """Items log-uniform in number and size, some of them videos."""
    count = round(math.exp(rng.uniform(0, math.log(40))))
    low, high = sorted(math.exp(rng.uniform(math.log(16), math.log(largest))) for _ in range(2))
    items = []
    for _ in range(count):
        tokens = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        frames = rng.choice((1, 1, 1, 2, 4, 8))
        items.append(image(max(1, tokens // frames) * frames, frames))
    return items


def regrets(truth, costs, rungs, layouts):
    """True time of each plan over that of the best single choice, both without noise."""
    dispatcher = Dispatcher(rungs, costs)
    found = []
    for items in layouts:
        loads = [
            (batch.rung, load_of([items[i] for i in batch.indices]))
            for batch in dispatcher.plan(items)
        ]
        time = sum(truth.eager(load) if r is None else truth.replay(r, load) for r, load in loads)
        found.append(time / best_single(items, rungs, truth))
    return found


class MeasuredTimes:
    """The measured points themselves, and between them the fit bent to pass through each."""

    def __init__(self, samples, costs):
        self._costs = costs
        self._ratios = {}
        for sample in samples:
            fitted = self._fitted(sample.token_budget, sample.load)
            near = self._ratios.setdefault(sample.token_budget, [])
            near.append((sample.load, sample.us / fitted))
        self._budgets = sorted(budget for budget in self._ratios if budget is not None)

    def _fitted(self, budget, load):
        if budget is None:
            return self._costs.eager(load)
        return self._costs.replay(RungLimits(budget, 4 * budget, 1, 1, 0), load)

    def _ratio(self, budget, load):
        """Mean of the measured ratios, weighted by nearness in tokens and pairs."""
        weights = [
            1
            / (1e-9 + sum(math.log((a + 1) / (b + 1)) ** 2 for a, b in zip(point, at, strict=True)))
            for point, at in (
                ((other.tokens, other.pairs), (load.tokens, load.pairs))
                for other, _ in self._ratios[budget]
            )
        ]
        ratios = [ratio for _, ratio in self._ratios[budget]]
        return sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)

    def replay(self, rung, load):
        nearest = min(self._budgets, key=lambda b: abs(math.log(b / rung.token_budget)))
        return self._costs.replay(rung, load) * self._ratio(nearest, load)

    def eager(self, load):
        return self._costs.eager(load) * self._ratio(None, load)


def thousand_layouts(largest):
    rng = random.Random(5)
    return [random_layout(rng, largest) for _ in range(1000)]


@pytest.mark.parametrize("noise", [0.0, 0.01], ids=["exact", "noisy"])
@pytest.mark.parametrize(
    ("rungs", "host_us", "splits"),
    [
        (automatic(), 8_300, False),  # eager wins before a split does
        (automatic(4096), 40_000, True),  # the ladder ends before eager pays
        (spread(64, 256, 1024, 4096, 16384), 20_000, True),
    ],
    ids=["dense", "short", "coarse"],
)
def test_never_three_percent_slower_than_the_best_single_choice(rungs, host_us, splits, noise):
    costs = fit_costs(calibrated(TrueTimes(host_us, noise), rungs), rungs)
    found = regrets(TrueTimes(host_us), costs, rungs, thousand_layouts(12000))
    assert max(found) <= 1.03
    assert sum(found) / len(found) <= 1.001
    assert (min(found) < 0.9) == splits


@pytest.mark.parametrize(
    "path",
    [None, *sorted(RESULTS.glob("*/calibration*.json"))],
    ids=lambda path: "made-up" if path is None else f"{path.parent.name}-{path.stem}",
)
def test_never_three_percent_slower_on_measured_times(path):
    if path is None:
        samples = calibrated(TrueTimes(8_300, noise=0.01), automatic())
    else:
        samples = [CostSample.from_json(row) for row in json.loads(path.read_text())["samples"]]
    measured = {s.token_budget for s in samples if s.token_budget is not None}
    rungs = spread(*sorted(measured | set(generate_budgets(min(measured), max(measured)))))
    costs = fit_costs(samples, rungs)
    truth = MeasuredTimes(samples, costs)
    measured_us = defaultdict(list)  # equal loads may be measured twice
    for sample in samples:
        measured_us[sample.token_budget, sample.load].append(sample.us)
    for (budget, load), us in measured_us.items():
        rung = next((r for r in rungs if r.token_budget == budget), None)
        found = truth.replay(rung, load) if rung else truth.eager(load)
        assert found == pytest.approx(sum(us) / len(us), rel=1e-6)
    assert max(regrets(truth, costs, rungs, thousand_layouts(max(measured)))) <= 1.03
