import sys
from copy import deepcopy

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vitgraph.capture.metrics import StatsCollector, prometheus_text

RUNGS = [
    {
        "token_budget": 64,
        "replays": 3,
        "items": 5,
        "live_tokens": 150,
        "bytes": 2000,
        "capture_seconds": 0.25,
    },
    {
        "token_budget": 1024,
        "replays": 1,
        "items": 2,
        "live_tokens": 900,
        "bytes": 1 << 40,
        "capture_seconds": 1.5,
    },
]
STATS = {
    "items": 10,
    "hits": 7,
    "misses": 3,
    "eager_reasons": {"tokens": 2, "cheaper": 1},
    "replays": 4,
    "live_tokens": 1050,
    "padded_tokens": 1216,
    "live_patches": 4200,
    "padded_patches": 4864,
    "capture_seconds": 1.75,
    "bytes": (1 << 40) + 2000,
    "rungs": RUNGS,
    "histogram": {1: 1, 16: 2, 17: 4, 900: 8, 200_000: 16},
    "refits": 1,
    "ladder_generation": 2,
}
EMPTY = dict.fromkeys(STATS, 0) | {"eager_reasons": {}, "rungs": [], "histogram": {}}


def parse(text):
    """{sample name: {labels: value}} and {family name: type}."""
    samples, types = {}, {}
    for family in text_string_to_metric_families(text):
        types[family.name] = family.type
        assert family.documentation
        for sample in family.samples:
            labels = tuple(sample.labels.values())
            assert labels not in samples.setdefault(sample.name, {})
            samples[sample.name][labels] = sample.value
    return samples, types


def test_every_value_of_the_stats_is_there():
    samples, _ = parse(prometheus_text(STATS))
    plain = {name: values[()] for name, values in samples.items() if () in values}
    assert {name.removeprefix("vitgraph_encoder_"): value for name, value in plain.items()} == {
        "items_total": 10,
        "hits_total": 7,
        "misses_total": 3,
        "replays_total": 4,
        "live_tokens_total": 1050,
        "padded_tokens_total": 1216,
        "live_patches_total": 4200,
        "padded_patches_total": 4864,
        "refits_total": 1,
        "capture_seconds": 1.75,
        "graph_bytes": (1 << 40) + 2000,
        "ladder_generation": 2,
        "call_tokens_count": 31,
        "call_tokens_sum": 1 + 32 + 68 + 7200 + 3_200_000,
    }
    assert samples["vitgraph_encoder_eager_items_total"] == {("tokens",): 2, ("cheaper",): 1}
    for key, name in [
        ("replays", "rung_replays_total"),
        ("items", "rung_items_total"),
        ("live_tokens", "rung_live_tokens_total"),
        ("bytes", "rung_graph_bytes"),
        ("capture_seconds", "rung_capture_seconds"),
    ]:
        by_rung = {("64",): RUNGS[0][key], ("1024",): RUNGS[1][key]}
        assert samples[f"vitgraph_encoder_{name}"] == by_rung


def test_types_and_labels():
    text = prometheus_text(STATS)
    _, types = parse(text)
    gauges = {"capture_seconds", "graph_bytes", "ladder_generation"}
    gauges |= {"rung_graph_bytes", "rung_capture_seconds"}
    for name, kind in types.items():
        short = name.removeprefix("vitgraph_encoder_")
        assert short != name
        histogram = short == "call_tokens"
        assert kind == ("gauge" if short in gauges else "histogram" if histogram else "counter")
    assert 'eager_items_total{reason="cheaper"} 1.0' in text
    assert 'rung_items_total{token_budget="64"} 5.0' in text


def test_buckets_are_cumulative_powers_of_two():
    samples, _ = parse(prometheus_text(STATS))
    buckets = samples["vitgraph_encoder_call_tokens_bucket"]
    bounds = [float(bound) for (bound,) in buckets]
    assert bounds == [*(2.0**power for power in range(4, 18)), float("inf")]
    counts = dict(zip(bounds, buckets.values(), strict=True))
    assert [counts[b] for b in (16, 32, 512, 1024, 131_072, float("inf"))] == [3, 7, 7, 15, 15, 31]


def test_before_the_first_call():
    samples, types = parse(prometheus_text(EMPTY))
    assert samples["vitgraph_encoder_items_total"] == {(): 0}
    assert samples["vitgraph_encoder_call_tokens_count"] == {(): 0}
    assert "vitgraph_encoder_eager_items" in types


def test_a_registry_reads_the_stats_at_each_scrape():
    stats, registry, asked = deepcopy(STATS), CollectorRegistry(auto_describe=True), []
    registry.register(StatsCollector(lambda: (asked.append(1), stats)[1]))
    assert asked == []
    assert registry.get_sample_value("vitgraph_encoder_hits_total") == 7
    stats["hits"] = 8
    assert registry.get_sample_value("vitgraph_encoder_hits_total") == 8
    assert generate_latest(registry).decode() == prometheus_text(stats)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(StatsCollector(lambda: stats))


@pytest.mark.parametrize("key", STATS)
def test_refuses_stats_that_lack_a_value(key):
    stats = {name: value for name, value in STATS.items() if name != key}
    with pytest.raises(ValueError, match=f"the stats lack '{key}', they have .*; pass what"):
        prometheus_text(stats)


@pytest.mark.parametrize("key", RUNGS[0])
def test_refuses_rungs_that_lack_a_value(key):
    rung = {name: value for name, value in RUNGS[0].items() if name != key}
    with pytest.raises(ValueError, match=f"the stats lack '{key}'"):
        prometheus_text({**STATS, "rungs": [rung]})


def test_without_prometheus_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"prometheus_text: .*pip install 'vitgraph\[metrics\]'"):
        prometheus_text(STATS)
    with pytest.raises(ImportError, match=r"StatsCollector: .*pip install 'vitgraph\[metrics\]'"):
        StatsCollector(lambda: STATS)
