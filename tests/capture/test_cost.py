import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitgraph.capture.cost import (
    AssumedCosts,
    CostSample,
    EagerCurve,
    Load,
    MeasuredCosts,
    Terms,
)
from vitgraph.capture.cost_fit import fit_costs, nonnegative_least_squares
from vitgraph.capture.protocol import RungLimits

COSTS = MeasuredCosts(
    replays=((64, Terms(1500.0, 0.5, 2e-4)), (256, Terms(3500.0, 0.25, 1e-4))),
    eager_curve=EagerCurve(8000.0, (0, 1000, 4000), (1000.0, 11000.0, 38000.0), 2e-4),
)
STEPS = EagerCurve(800.0, (0, 100), (0.0, 100.0), 0.0, (), ((50, 900.0), (70, 950.0)))


def rung(budget):
    return RungLimits(budget, 4 * budget, 8, 8, 0)


def load(tokens, pairs=0):
    return Load(tokens, 4 * tokens, 1, 1, 0, pairs)


def test_replay_is_affine_in_live_tokens_and_pairs():
    assert COSTS.replay(rung(64), load(40, 10_000)) == 1500 + 20 + 2


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (16, Terms(1500.0, 0.5, 2e-4)),
        (64, Terms(1500.0, 0.5, 2e-4)),
        (160, Terms(2500.0, 0.375, 1.5e-4)),
        (256, Terms(3500.0, 0.25, 1e-4)),
        (512, Terms(7000.0, 0.25, 1e-4)),
    ],
)
def test_rungs_that_were_not_measured_are_interpolated(budget, expected):
    for _ in range(2):  # the second answer is the remembered one
        assert COSTS.terms(rung(budget)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "pairs", "us"),
    [
        (1, 0, 8000),
        (700, 0, 8000),
        (1000, 0, 11000),
        (1000, 5_000_000, 12000),
        (2500, 0, 24500),
        (6000, 0, 38000 + 2000 * 9.5),  # 9 a token at the end, but 9.5 on average
    ],
)
def test_eager_is_a_floor_and_then_a_curve(tokens, pairs, us):
    assert COSTS.eager(load(tokens, pairs)) == pytest.approx(us)


@pytest.mark.parametrize(
    ("tokens", "us"), [(1, 800), (49, 800), (50, 900), (69, 900), (70, 950), (2000, 2000)]
)
def test_the_floor_rises_by_steps(tokens, us):
    assert STEPS.of(load(tokens)) == us


def test_assumed_costs_prefer_any_number_of_replays_to_eager():
    costs = AssumedCosts()
    assert costs.replay(rung(64), load(3)) == costs.replay(rung(64), load(64)) == 64 + 128
    assert costs.eager(load(1)) > 1000 * costs.replay(rung(256), load(256))
    assert costs.eager(load(2)) < 2 * costs.eager(load(1))


def test_json_round_trip():
    text = json.dumps(COSTS.to_json())
    assert MeasuredCosts.from_json(json.loads(text)) == COSTS
    for budget in (64, None):
        sample = CostSample(budget, load(40, 7), 12.5)
        assert CostSample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


def changed(data, path, value):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["replays"], KeyError, "replays is 'missing'"),
        (["replays"], [], r"replays is \[\]"),
        (["replays"], 3, "replays is 3"),
        (["replays", 0], 3, r"replays\[0\].token_budget"),
        (["replays", 1, "token_budget"], 64, r"replays\[1\].token_budget is 64, not above"),
        (["replays", 1, "token_budget"], 2.5, r"replays\[1\].token_budget"),
        (["replays", 0, "token_budget"], 0, r"replays\[0\].token_budget is 0, not at least 1"),
        (["replays", 0, "base"], -1.0, r"replays\[0\].base"),
        (["replays", 0, "per_pair"], KeyError, r"replays\[0\].per_pair"),
        (["replays", 0, "per_token"], float("nan"), r"replays\[0\].per_token"),
        (["eager"], None, "eager is None"),
        (["eager", "floor"], "8", "eager.floor is '8'"),
        (["eager", "per_pair"], True, "eager.per_pair is True"),
        (["eager", "tokens"], [0], "eager.tokens"),
        (["eager", "tokens"], [1, 1000, 4000], "eager.tokens"),
        (["eager", "tokens"], [0, 1000, 1000], "eager.tokens"),
        (["eager", "tokens", 1], 1.5, r"eager.tokens\[1\]"),
        (["eager", "us"], [1.0, 2.0], "eager.us"),
        (["eager", "us"], [1.0, 3.0, 2.0], "eager.us"),
        (["eager", "us", 2], None, r"eager.us\[2\]"),
        (["eager", "floor_steps"], KeyError, "eager.floor_steps is 'missing'"),
        (["eager", "floor_steps"], [[9, 9000.0]], r"eager.floor_steps\[0\].tokens"),
        (["eager", "floor_steps"], [{"tokens": 9, "us": 8000.0}], r"eager.floor_steps\[0\] is"),
        (["eager", "floor_steps"], [{"tokens": 0, "us": 9000.0}], r"eager.floor_steps\[0\] is"),
        (["eager", "floor_steps"], [{"tokens": 9, "us": "9"}], r"eager.floor_steps\[0\].us"),
    ],
)
def test_malformed_costs_are_refused_by_name(path, value, named):
    with pytest.raises(ValueError, match=named):
        MeasuredCosts.from_json(changed(COSTS.to_json(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["token_budget"], KeyError, "token_budget"),
        (["token_budget"], 0, "token_budget is 0"),
        (["token_budget"], "64", "token_budget"),
        (["load"], [], "load"),
        (["load", "pairs"], KeyError, "load.pairs"),
        (["load", "tokens"], 1.5, "load.tokens"),
        (["us"], 0.0, "us is 0"),
        (["us"], float("inf"), "us is inf"),
    ],
)
def test_malformed_samples_are_refused_by_name(path, value, named):
    with pytest.raises(ValueError, match=named):
        CostSample.from_json(changed(CostSample(64, load(40), 9.0).to_json(), path, value))


def test_not_an_object_is_refused():
    for data in (None, [], "{}"):
        with pytest.raises(ValueError, match="replays"):
            MeasuredCosts.from_json(data)


def samples_of(costs, budgets):
    for budget in budgets:
        for tokens, pairs in ((1.0, 16.0), (1.0, 2.0), (0.6, 3.0), (0.3, 1.0)):
            tokens = int(budget * tokens)
            at = load(tokens, int(pairs * tokens * tokens))
            if budget <= 256:
                yield CostSample(budget, at, costs.replay(rung(budget), at))
            yield CostSample(None, at, costs.eager(at))


def test_fit_recovers_costs_of_its_own_form():
    samples = list(samples_of(COSTS, (64, 256, 500, 1000, 2000, 4000, 8000)))
    fitted = fit_costs(samples, [rung(64), rung(128), rung(256)])
    for budget in (64, 128, 256):
        for at in (load(budget, 16 * budget**2), load(budget // 2, budget**2)):
            assert fitted.replay(rung(budget), at) == pytest.approx(
                COSTS.replay(rung(budget), at), rel=2e-3
            )
    assert fitted.eager_curve.floor == pytest.approx(8000)
    assert fitted.eager_curve.per_pair == pytest.approx(2e-4, rel=0.05)
    for tokens in (10, 500, 1500, 3000, 7000):
        assert fitted.eager(load(tokens)) == pytest.approx(COSTS.eager(load(tokens)), rel=0.02)


@given(st.lists(st.floats(-0.03, 0.03), min_size=64, max_size=64))
def test_fit_of_noisy_times_stays_near_them_and_is_valid(noise):
    exact = list(samples_of(COSTS, (64, 256, 500, 1000, 2000, 4000, 8000)))
    samples = [
        CostSample(s.token_budget, s.load, s.us * (1 + e))
        for s, e in zip(exact, noise, strict=False)
    ]
    fitted = fit_costs(samples, [rung(64), rung(256)])
    assert MeasuredCosts.from_json(fitted.to_json()) == fitted
    for sample in exact:
        budget = sample.token_budget
        fit = fitted.eager(sample.load) if budget is None else 0.0
        if budget is not None:
            fit = fitted.replay(rung(budget), sample.load)
        assert fit == pytest.approx(sample.us, rel=0.1)


def test_no_eager_call_is_taken_to_cost_less_than_the_fastest_measured():
    eager = [CostSample(None, load(tokens), 10.0 * tokens) for tokens in (100, 200, 400, 800)]
    fitted = fit_costs([CostSample(64, load(64), 500.0), *eager], [rung(64)])
    assert fitted.eager(load(1)) == pytest.approx(1000)
    assert fitted.eager(load(300)) == pytest.approx(3000, rel=0.02)


def test_one_sample_of_each_is_enough_for_a_rough_fit():
    fitted = fit_costs(
        [CostSample(64, load(64, 9), 1500.0), CostSample(None, load(64, 9), 8000.0)], [rung(64)]
    )
    # With nothing to tell them apart, a replay costs its base. The eager call waited for the host;
    # the GPU takes for it what it takes in the replay, and that in proportion to tokens.
    assert fitted.replay(rung(64), load(1)) == pytest.approx(1500, rel=1e-3)
    assert fitted.eager(load(128)) == pytest.approx(8000)
    assert fitted.eager(load(640)) == pytest.approx(15000, rel=1e-3)


def test_a_rung_of_one_sample_is_its_neighbours_scaled():
    samples = list(samples_of(COSTS, (64, 256, 1000)))
    at = load(150, 90_000)
    between = fit_costs(samples, [rung(64), rung(160), rung(256)])
    slower = CostSample(160, at, 1.05 * between.replay(rung(160), at))
    fitted = fit_costs([*samples, slower], [rung(64), rung(160), rung(256)])
    assert fitted.replay(rung(160), at) == pytest.approx(slower.us)
    assert fitted.terms(rung(160)) == pytest.approx([1.05 * t for t in between.terms(rung(160))])
    assert fitted.terms(rung(256)) == between.terms(rung(256))


@pytest.mark.parametrize("eager_us", [20_000.0, 22_000.0])
def test_a_call_that_its_replay_outruns_waited_for_the_host(eager_us):
    replays = [CostSample(64, load(64), 17_900.0), CostSample(64, load(32), 17_900.0)]
    eager = [CostSample(None, load(tokens), 18_800.0) for tokens in (8, 16, 32)]
    eager.append(CostSample(None, load(64), eager_us))  # above the floor, and not for its GPU time
    curve = fit_costs([*replays, *eager], [rung(64)]).eager_curve
    assert curve.gpu(load(64)) == pytest.approx(17_900, rel=0.01)


def test_fit_finds_where_the_host_needs_longer():
    curve = EagerCurve(
        8000.0, (0, 1000, 8000), (500.0, 8000.0, 64000.0), 2e-4, (), ((800, 12000.0),)
    )
    replays = tuple((b, Terms(300 + 7.0 * b, 0.5, 2e-4)) for b in (64, 256, 512, 768, 1024))
    costs = MeasuredCosts(replays, curve)
    rungs = [rung(budget) for budget, _ in replays]
    samples = []
    for budget in (64, 128, 256, 400, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 4096):
        for at in (load(budget, 16 * budget**2), load(budget, budget**2)):
            samples.append(CostSample(None, at, costs.eager(at)))
            if budget in dict(replays):
                samples.append(CostSample(budget, at, costs.replay(rung(budget), at)))
    fitted = fit_costs(samples, rungs)
    assert fitted.eager_curve.floor == pytest.approx(8000)
    ((first, us),) = fitted.eager_curve.floor_steps
    assert (first, us) == (896, pytest.approx(12000))
    assert MeasuredCosts.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    for sample in samples:
        if sample.token_budget is None:
            # of a call that waited, the GPU time is known only from a replay that pads
            rel = 0.02 if sample.us > 13_000 else 0.07
            assert fitted.eager(sample.load) == pytest.approx(sample.us, rel=rel)


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([CostSample(64, load(9), 1.0)], "1 rungs and 0 eager"),
        ([CostSample(None, load(9), 1.0)], "0 rungs and 1 eager"),
        ([CostSample(32, load(9), 1.0)], "rung of 32 tokens"),
        ([CostSample(64, load(9), 0.0)], "no positive time"),
        ([CostSample(64, load(9), float("nan"))], "no positive time"),
    ],
)
def test_fit_refuses(samples, match):
    with pytest.raises(ValueError, match=match):
        fit_costs(samples, [rung(64)])


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 6))
def test_nonnegative_least_squares_meets_the_conditions_of_its_optimum(seed, columns, extra):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(columns + extra, columns))
    target = generator.normal(size=columns + extra)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert gradient.max() <= 1e-8
    assert abs(x @ gradient) <= 1e-8
