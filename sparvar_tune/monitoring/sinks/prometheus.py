"""prometheus-client: numbers of a registry, which the process that serves shows under /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sparvar_tune.monitoring.metrics import BASE, INSTRUMENTS

_OF: WeakKeyDictionary[CollectorRegistry, PrometheusSink] = WeakKeyDictionary()


class PrometheusSink:
    """One a registry: a name may be registered once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self.found: dict[str, Any] = {}
        for name, row in INSTRUMENTS.items():
            more = {"buckets": row.buckets} if row.kind == "histogram" else {}
            self.found[name] = kinds[row.kind](row.prometheus, row.text, (*BASE, *row.labels), registry=registry, **more)

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].labels(**labels).inc(value)

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].labels(**labels).observe(value)

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].labels(**labels).set(value)


def open_sink(registry: CollectorRegistry | None) -> PrometheusSink:
    """registry: None for the process' own."""
    registry = registry or REGISTRY
    if registry not in _OF:
        _OF[registry] = PrometheusSink(registry)
    return _OF[registry]
