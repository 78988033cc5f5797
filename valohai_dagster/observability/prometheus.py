"""Metrics in Prometheus's text form: what was told through `telemetry`, and gauges that are read at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from valohai_dagster.telemetry import Count, Seconds
from valohai_dagster.version import __version__

PREFIX = "valohai_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EXTRA = "valohai-dagster[observability]"

HELP: Mapping[Count | Seconds, str] = {
    Count.reports: "Reports of agents that were applied to the records.",
    Count.ended: "Executions that have ended.",
    Count.swept: "Uploads that nobody reported and that were removed from their store.",
    Count.outages: "Times that something waited because Redis or a database was away.",
    Seconds.report_to_event: "From an agent's report to the event in Dagster's log.",
    Seconds.lane: "From handing events of a run over to their lane until they are stored.",
    Seconds.phase: "Time that ended executions have spent in a phase (last attempt).",
}
_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SLOW = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
_BUCKETS: Mapping[Seconds, tuple[float, ...]] = {Seconds.phase: _SLOW}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One value as it is at this moment. A `counter` only ever rises while the process lives."""

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    counter: bool = False


class Metrics:
    """A `telemetry.Sink`. Its own registry: nothing of other libraries in the process is shown.

    Raises ImportError without the extra.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        self._readings: list[Reading] = []
        ProcessCollector(registry=self.registry)  # memory, CPU, open files
        info = Gauge(f"{PREFIX}build_info", "The release.", ["version"], registry=self.registry)
        info.labels(version=__version__).set(1)
        self._counters = {
            what: Counter(PREFIX + what.value, HELP[what], what.labels, registry=self.registry)
            for what in Count
        }
        self._histograms = {
            what: Histogram(
                PREFIX + what.value,
                HELP[what],
                what.labels,
                registry=self.registry,
                buckets=_BUCKETS.get(what, _FAST),
            )
            for what in Seconds
        }
        self.registry.register(self)

    def count(self, what: Count, amount: float, labels: Mapping[str, str]) -> None:
        metric = self._counters[what]
        (metric.labels(**labels) if labels else metric).inc(amount)

    def observe(self, what: Seconds, seconds: float, labels: Mapping[str, str]) -> None:
        metric = self._histograms[what]
        (metric.labels(**labels) if labels else metric).observe(seconds)

    def render(self, readings: Iterable[Reading]) -> bytes:
        from prometheus_client import generate_latest

        self._readings = list(readings)
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """The readings, as the registry asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for one in self._readings:
            if one.name not in families:
                family = CounterMetricFamily if one.counter else GaugeMetricFamily
                families[one.name] = family(PREFIX + one.name, one.help, labels=list(one.labels))
            families[one.name].add_metric(list(one.labels.values()), one.value)
        yield from families.values()
