"""What a manager has done, for Prometheus: its `stats()` as metrics `vitgraph_encoder_*`.

Needs the package prometheus_client, imported on first use.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.metrics_core import HistogramMetricFamily, Metric

Stats = Mapping[str, Any]

_PREFIX = "vitgraph_encoder_"

# Upper bounds in tokens: fixed, or Prometheus could not add histograms of two moments or machines.
BUCKETS = tuple(1 << power for power in range(4, 18))


class _Field(NamedTuple):
    """One value of the stats: its key, kind and name as a metric, and what it counts."""

    key: str
    kind: str
    name: str
    help: str


_FIELDS = (
    _Field("items", "counter", "items", "Images and videos encoded."),
    _Field("hits", "counter", "hits", "Items replayed from a graph."),
    _Field("misses", "counter", "misses", "Items computed eagerly."),
    _Field("replays", "counter", "replays", "Graphs replayed."),
    _Field("live_tokens", "counter", "live_tokens", "Tokens of the items replayed."),
    _Field("padded_tokens", "counter", "padded_tokens", "Token budgets of the graphs replayed."),
    _Field("live_patches", "counter", "live_patches", "Patches of the items replayed."),
    _Field("padded_patches", "counter", "padded_patches", "Patch rows of the graphs replayed."),
    _Field("refits", "counter", "refits", "Ladders fitted to traffic and published."),
    _Field("capture_seconds", "gauge", "capture_seconds", "Time that the graphs took to capture."),
    _Field("bytes", "gauge", "graph_bytes", "Device memory of the graphs and their buffers."),
    _Field("ladder_generation", "gauge", "ladder_generation", "Number of the present ladder."),
)
_RUNG_FIELDS = (
    _Field("replays", "counter", "rung_replays", "Replays of one rung."),
    _Field("items", "counter", "rung_items", "Items replayed by one rung."),
    _Field("live_tokens", "counter", "rung_live_tokens", "Tokens of the items of one rung."),
    _Field("bytes", "gauge", "rung_graph_bytes", "Device memory of one rung."),
    _Field(
        "capture_seconds", "gauge", "rung_capture_seconds", "Time that one rung took to capture."
    ),
)
_REASONS = _Field("eager_reasons", "counter", "eager_items", "Items computed eagerly, by reason.")
_TOKENS = _Field("histogram", "histogram", "call_tokens", "Tokens of a call.")


class StatsCollector:
    """A collector for a prometheus_client registry, which reads the counters at each scrape.

    `REGISTRY.register(StatsCollector(encoder.graphs.stats))` is all that is needed. A registry
    takes one of them: names are the same for every manager.

    Args:
        stats: returns what `EncoderCudaGraphManager.stats` returns.

    Raises:
        ImportError: prometheus_client is not installed.
    """

    def __init__(self, stats: Callable[[], Stats]):
        _prometheus("StatsCollector")
        self._stats = stats

    def collect(self) -> "Iterable[Metric]":
        """The metrics at this moment; ValueError if the stats lack a value."""
        stats = self._stats()
        return _families(stats)

    def describe(self) -> "Iterable[Metric]":
        """The names alone, by which a registry refuses two collectors of the same metrics."""
        return [_family(field) for field in (*_FIELDS, *_RUNG_FIELDS, _REASONS, _TOKENS)]


def prometheus_text(stats: Stats) -> str:
    """The text that a Prometheus server scrapes, from `EncoderCudaGraphManager.stats()`.

    Raises:
        ImportError: prometheus_client is not installed.
        ValueError: `stats` lacks a value.
    """
    prometheus = _prometheus("prometheus_text")
    registry = prometheus.CollectorRegistry()
    registry.register(StatsCollector(lambda: stats))  # pyright: ignore[reportArgumentType]
    return prometheus.generate_latest(registry).decode()


def _families(stats: Stats) -> "list[Metric]":
    families = []
    for field in _FIELDS:
        family = _family(field)
        family.add_metric([], _value(stats, field.key))
        families.append(family)
    for field in _RUNG_FIELDS:
        family = _family(field, "token_budget")
        for rung in _value(stats, "rungs"):
            family.add_metric([str(_value(rung, "token_budget"))], _value(rung, field.key))
        families.append(family)
    reasons = _family(_REASONS, "reason")
    for reason, items in _value(stats, _REASONS.key).items():
        reasons.add_metric([reason], items)
    tokens = _family(_TOKENS)
    _add_histogram(tokens, _value(stats, _TOKENS.key))
    return [*families, reasons, tokens]


def _add_histogram(family: "HistogramMetricFamily", calls: Mapping[int, int]) -> None:
    counts = [
        (str(bound), sum(count for tokens, count in calls.items() if tokens <= bound))
        for bound in BUCKETS
    ]
    counts.append(("+Inf", sum(calls.values())))
    family.add_metric([], counts, sum(tokens * count for tokens, count in calls.items()))


def _family(field: _Field, *labels: str) -> Any:
    from prometheus_client import metrics_core

    families = {
        "counter": metrics_core.CounterMetricFamily,
        "gauge": metrics_core.GaugeMetricFamily,
        "histogram": metrics_core.HistogramMetricFamily,
    }
    return families[field.kind](_PREFIX + field.name, field.help, labels=labels)


def _value(stats: Stats, key: str) -> Any:
    try:
        return stats[key]
    except KeyError:
        raise ValueError(
            f"prometheus_text: the stats lack {key!r}, they have {', '.join(stats)}; pass what "
            "EncoderCudaGraphManager.stats() returns"
        ) from None


def _prometheus(operation: str) -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError(
            f"{operation}: prometheus_client is not installed; pip install 'vitgraph[metrics]'"
        ) from error
    return prometheus_client
