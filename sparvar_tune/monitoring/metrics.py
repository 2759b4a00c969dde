"""Every number the monitor tells: to add one, add a row.

Names are written as OpenTelemetry has them; Prometheus sees dots as underscores and a counter with `_total` behind it, which is
also what OpenTelemetry's own way to Prometheus makes of them. So one dashboard and one set of rules serve both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BASE = ("model", "gpu", "preset")  # labels of every number
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
DECIBELS = (20.0, 22.5, 25.0, 27.5, 30.0, 32.5, 35.0, 37.5, 40.0, 45.0, 50.0, 60.0, 80.0, 100.0)
SIMILARITY = (0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 1.0)

Kind = Literal["counter", "histogram", "gauge"]


@dataclass(frozen=True)
class Instrument:
    """labels: beside BASE. buckets: upper bounds, of a histogram."""

    name: str
    kind: Kind
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def prometheus(self) -> str:
        """As prometheus-client is told it; that adds `_total` to a counter itself."""
        return self.name.replace(".", "_")

    @property
    def exposed(self) -> str:
        """As a query names it, a histogram without its `_bucket`, `_sum` or `_count`."""
        return f"{self.prometheus}_total" if self.kind == "counter" else self.prometheus


def _fidelity(metric: str, buckets: tuple[float, ...]) -> tuple[Instrument, ...]:
    """What is told of one metric: the sampled values, their squares for an interval of the mean, and the certificate."""
    name = f"sparvar.sampled.{metric}"
    return (
        Instrument(name, "histogram", "", f"{metric} of sampled pictures against the dense ones", (), buckets),
        Instrument(f"{name}.squares", "counter", "", f"sum of the squares of {metric} of sampled pictures"),
        Instrument(f"sparvar.certified.{metric}", "gauge", "", f"the bound the certificate says the mean {metric} has"),
    )


FIDELITY = {"psnr": "psnr_db", "ssim": "ssim", "ms_ssim": "ms_ssim"}  # metric -> its part of a name
INSTRUMENTS = {row.name: row for row in (
    Instrument("sparvar.generations", "counter", "", "generations begun, each of one batch of pictures"),
    Instrument("sparvar.generation.seconds", "histogram", "s", "time of a generation", (), SECONDS),
    Instrument("sparvar.scale.seconds", "histogram", "s", "time of one scale of a generation, all layers", ("scale",), SECONDS),
    Instrument("sparvar.rows.used", "counter", "", "scales run by a row of the profile", ("scale", "kernel")),
    Instrument("sparvar.dense.fallbacks", "counter", "", "generations, or scales of them, that ran dense all the same",
        ("scale", "reason")),
    Instrument("sparvar.unfused", "counter", "", "generations whose blocks did not run as one, though put on that path"),
    Instrument("sparvar.sampling.every", "gauge", "", "every how manyth generation is drawn dense as well; 0: none"),
    Instrument("sparvar.samples.failed", "counter", "", "sampled generations whose dense twin could not be drawn"),
    *_fidelity("psnr_db", DECIBELS), *_fidelity("ssim", SIMILARITY), *_fidelity("ms_ssim", SIMILARITY),
)}  # fmt: skip
# reason -> what it means, in the words of docs/monitor.md
REASONS = {
    "no profile": "nothing was found for this silicon",
    "demoted": "that scale does not certainly gain, or its meaning changed",
    "schedule": "the image's grids are not the profile's",
    "batch": "batch rows changed between a decision scale and one that lives on it",
    "problem": "a single call of another shape than the profile's",
}
