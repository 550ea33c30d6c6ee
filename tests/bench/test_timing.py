from collections import Counter
from itertools import pairwise

import pytest
from vitgraph.bench.timing import Effort, TimeBudget, summarise, time_calls


def test_summary_of_samples():
    timing = summarise([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert (timing.ms, timing.p20, timing.p80, timing.samples) == (2.5, 1.0, 4.0, 6)
    assert summarise([7.0]).p80 == 7.0
    with pytest.raises(ValueError, match="no sample"):
        summarise([])


def test_contenders_take_turns_between_synchronisations():
    events = []
    calls = {name: lambda n=name: events.append(n) for name in "abc"}
    effort = Effort(warmup_s=0.0, rounds=30)
    timings = time_calls(calls, lambda: events.append("|"), effort)
    assert events[::3] == events[2::3] == ["|"] * (3 + 3 * 30)
    warm_up, measured = events[1:9:3], events[10::3]
    assert warm_up == list("abc")
    turns = ["".join(measured[i : i + 3]) for i in range(0, len(measured), 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert {t.samples for t in timings.values()} == {30}


@pytest.mark.parametrize("count", range(1, 10))
def test_each_contender_follows_each_other_one_equally_often(count):
    names = "abcdefghi"[:count]
    rounds = 2 * count
    order = []
    calls = {name: lambda n=name: order.append(n) for name in names}
    time_calls(calls, lambda: None, Effort(warmup_s=0.0, rounds=rounds))
    turns = [order[i : i + count] for i in range(count, len(order), count)]
    assert all(sorted(turn) == list(names) for turn in turns)
    pairs = Counter(pair for turn in turns for pair in pairwise(turn))
    assert pairs == {(a, b): 2 for a in names for b in names if a != b}
    places = Counter((place, name) for turn in turns for place, name in enumerate(turn))
    assert set(places.values()) == {2}


def test_nobody_to_time():
    assert time_calls({}, lambda: None, Effort(warmup_s=0.0)) == {}


def test_time_limit_keeps_the_least_rounds():
    effort = Effort(warmup_s=0.0, rounds=100, min_rounds=4, limit_s=0.0)
    assert time_calls({"a": lambda: None}, lambda: None, effort)["a"].samples == 4


def test_time_budget(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vitgraph.bench.timing.time.perf_counter", lambda: now[0])
    budget, endless = TimeBudget(10.0), TimeBudget()
    now[0] = 109.9
    assert budget.allows("a")
    assert budget.note() == ""
    now[0] = 110.0
    assert [budget.allows(label) for label in "bc"] == [False, False]
    assert budget.to_json() == {"budget_s": 10.0, "not_run": ["b", "c"]}
    assert budget.note() == "time was over after 10 s; not run: b, c"
    now[0] = 1e9
    assert endless.allows("a")
    assert endless.to_json() == {"budget_s": None, "not_run": []}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_time_budget_refuses(seconds):
    with pytest.raises(ValueError, match="must be more than 0"):
        TimeBudget(seconds)
