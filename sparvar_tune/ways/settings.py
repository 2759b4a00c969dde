"""How to tune, checked once where it comes in: from the command line or from Python. Imports nothing heavy, `--help` needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparvar_tune.catalog.inputs import whole, yes_or_no
from sparvar_tune.catalog.metrics import METRICS, Metric, find_metric
from sparvar_tune.catalog.names import shown, unknown_name
from sparvar_tune.measure.pairs import MOST_PAIRS

BUDGET_S, VERIFY_BUDGET_S = 290.0, 55.0
# Pairs of pictures. Of 32 a certificate's bound is 0.05 dB higher than of 24, which end within the budget on two slow cores.
PAIRS, COMPARE_PAIRS, VERIFY_PAIRS = 24, 32, 8
MOST_SECONDS, MOST_WORKERS = 30 * 86400.0, 1024
MODES = ("eager", "graph")


def seconds(time: float | str) -> float:
    """Seconds of 90, "90", "90s", "3m" or "1h". Raises ValueError: no such time, not above 0, over 30 days."""
    units = {"": 1, "s": 1, "m": 60, "h": 3600}
    number = isinstance(time, int | float) and not isinstance(time, bool)
    text = f"{time:.3f}" if number else time.strip() if isinstance(time, str) else ""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text)
    value = float(found[1]) * units[found[2]] if found else 0.0
    if not 0 < value <= MOST_SECONDS:
        raise ValueError(f'{shown(time, 40)!r}: want a time such as "90s", "3m" or "1h", at most 30 days')
    return value


def check_weights(given: Mapping[str, Path]) -> dict[str, Path]:
    """`given` by the metrics' names in files. Raises ValueError for a metric that needs none."""
    out = {}
    for name, path in given.items():
        metric = find_metric(name)
        if not metric.loader or metric.worst_class:
            needing = ", ".join(m.name for m in METRICS.values() if m.loader)
            raise ValueError(f"metric_weights: {metric.name} needs none; want one of {needing}")
        out[metric.name] = Path(path)
    return out


def loaded(weights: Mapping[str, Path]) -> tuple[Metric, ...]:
    """These metrics, able to compare. Raises ValueError, in one line, for weights that are not there."""
    return tuple(find_metric(name).with_weights(path) for name, path in weights.items())


@dataclass(frozen=True)
class Settings:
    """How to tune; what is not used on a way says so there. Raises ValueError for a value out of range.

    bounds: by metric ("psnr" in dB, "ssim", "psnr_worst_class"; `catalog/metrics.py`), what the confidence bound of the mean must
    reach instead of the quality's own; hyphens are as good as underscores. metric_weights: by metric, where its weights are.
    budget_s: wall time; only the search is cut to meet it. pairs: held-out (class, seed) pairs. out: folder that gets
    <gpu>/<model>.json, None for this user's.
    resume: go on after the finished trials of the last run. search: search even where other silicon's policy can be taken
    over. workers, mode, merge, log: of launches timed on a GPU. storage: URL where runs share trials.
    """

    bounds: Mapping[str, float] = field(default_factory=dict)
    budget_s: float = BUDGET_S
    pairs: int = PAIRS
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    search: bool = False
    workers: int | None = None
    mode: str = "eager"
    merge: tuple[Path, ...] = ()
    log: Path | None = None
    storage: str | None = field(default=None, repr=False)  # may hold a password
    metric_weights: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.bounds.items():
            if reason := find_metric(name).why_not_bound(value):
                raise ValueError(reason)
        object.__setattr__(self, "bounds", {find_metric(name).name: value for name, value in self.bounds.items()})
        object.__setattr__(self, "metric_weights", check_weights(self.metric_weights))
        seconds(self.budget_s)
        yes_or_no("resume", self.resume)
        yes_or_no("search", self.search)
        whole("pairs", self.pairs, 2, MOST_PAIRS)
        whole("seed", self.seed, 0, 2**31 - 1)
        if self.workers is not None:
            whole("workers", self.workers, 1, MOST_WORKERS)
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, MODES)
