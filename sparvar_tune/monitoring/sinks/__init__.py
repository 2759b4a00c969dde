"""Where numbers go: a file for each library, chosen by what is given or installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol, cast

SINKS = {"prometheus": ("prometheus_client", "sparvar_tune.monitoring.sinks.prometheus"),
         "opentelemetry": ("opentelemetry", "sparvar_tune.monitoring.sinks.opentelemetry")}  # fmt: skip


class Sink(Protocol):
    """name: of `metrics.INSTRUMENTS`. labels: all of that row's. May be called from any thread."""

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """To a counter."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """In a histogram."""

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """A gauge."""


def open_sink(to: Any = None) -> Sink:
    """to: "prometheus" or "opentelemetry", a CollectorRegistry or MeterProvider of them, a `Sink`, or None for what is installed.

    Raises ValueError, in one line, where it is none of these or its package is missing.
    """
    if to is None:
        to = next((name for name, (package, _) in SINKS.items() if _here(package)), None)
        if to is None:
            raise ValueError("monitor: neither prometheus-client nor opentelemetry-api is installed: pip install "
                             "'sparvar-tune[monitor]'")  # fmt: skip
    if isinstance(to, str):
        if to not in SINKS:
            raise ValueError(f"monitor: to={to[:40]!r}, want one of {', '.join(SINKS)}")
        package, module = SINKS[to]
        if not _here(package):
            raise ValueError(f"monitor: to={to!r} needs {package}: pip install 'sparvar-tune[monitor]'")
        return cast("Sink", importlib.import_module(module).open_sink(None))
    for package, module in SINKS.values():
        if type(to).__module__.split(".")[0] == package:
            return cast("Sink", importlib.import_module(module).open_sink(to))
    if all(callable(getattr(to, name, None)) for name in ("add", "record", "set")):
        return cast("Sink", to)
    raise ValueError(f"monitor: to={type(to).__name__}, want a CollectorRegistry, a MeterProvider or a Sink")


def _here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
