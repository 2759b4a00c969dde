"""OpenTelemetry: instruments of a meter; the process that serves says where its MeterProvider sends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.metrics import get_meter

from sparvar_tune.monitoring.metrics import INSTRUMENTS
from sparvar_tune.profile.machine import version_of


class OpenTelemetrySink:
    """Instruments of the meter "sparvar_tune"; a provider gives the same ones again."""

    def __init__(self, provider: Any = None) -> None:
        meter = (get_meter if provider is None else provider.get_meter)("sparvar_tune", version_of("sparvar-tune") or "")
        self.found: dict[str, Any] = {}
        for name, row in INSTRUMENTS.items():
            if row.kind == "counter":
                self.found[name] = meter.create_counter(name, row.unit, row.text)
            elif row.kind == "gauge":
                self.found[name] = meter.create_gauge(name, row.unit, row.text)
            else:
                self.found[name] = meter.create_histogram(
                    name, row.unit, row.text, explicit_bucket_boundaries_advisory=list(row.buckets)
                )

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].add(value, dict(labels))

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].record(value, dict(labels))

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.found[name].set(value, dict(labels))


def open_sink(provider: Any) -> OpenTelemetrySink:
    """provider: None for the process' own."""
    return OpenTelemetrySink(provider)
