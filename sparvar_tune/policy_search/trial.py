"""One trial of a search: what it sets, what it leaves behind, how that is read back, and which of many are worth a look."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from sparvar_tune.catalog.metrics import LEAD

LOW_PRICE, HIGH_PRICE = 0.03, 3000.0  # what a unit of relative squared error is worth, in dense times of a head
DEFAULT_TILT = 0.25  # measured on pocketvar, two layers changed at a time: an error comes to a little more near the logits


@dataclass(frozen=True)
class Knobs:
    """What a trial sets. A form other than "priced" is a fixed point (`menu.fixed_points`) and ignores the rest.

    prices: for the last, second-last and third-last scale. tilt: see `assign`. steps: a name of `menu.step_menu`, or none.
    """

    form: str = "priced"
    price_last: float = 30.0
    price_second: float = 30.0
    price_third: float = 30.0
    tilt: float = DEFAULT_TILT
    steps: str = ""

    @property
    def prices(self) -> tuple[float, float, float]:
        return self.price_last, self.price_second, self.price_third


@dataclass(frozen=True)
class Verdict:
    """What the judge found: time over dense time measured beside it, predicted shortfall (dB, <= 0 is good), the mean of every
    metric, and whether every search pair was looked at.
    """

    time_ratio: float
    shortfall_db: float
    means: dict[str, float]
    complete: bool

    @property
    def speedup(self) -> float:
        return 1 / self.time_ratio

    @property
    def lead(self) -> float:
        """The mean that fronts are drawn by (PSNR, dB)."""
        return self.means[LEAD.name]

    def why_not(self) -> str | None:
        numbers = (self.time_ratio, self.shortfall_db, *self.means.values())
        if not all(map(math.isfinite, numbers)) or self.time_ratio <= 0:
            return f"verdict: got time ratio, shortfall, means {numbers}, want finite numbers and a ratio > 0"
        return None


@dataclass(frozen=True)
class FinishedTrial:
    """A finished trial."""

    number: int
    knobs: Knobs
    verdict: Verdict


@dataclass(frozen=True)
class FailedTrial:
    """A trial whose policy raised or drew no picture, and what was said."""

    number: int
    knobs: Knobs
    reason: str


T = TypeVar("T", Knobs, Verdict)


def from_json(kind: type[T], text: str) -> T:
    """The dataclass in the text: exactly its fields, every one of its type. Raises ValueError, KeyError or TypeError."""
    values = json.loads(text)
    if kind is Knobs and isinstance(values, dict):
        values = {"steps": ""} | values  # of trials from before there were steps to choose
    types = {f.name: f.type for f in fields(kind)}
    if set(values) != set(types):
        raise ValueError(f"{kind.__name__.lower()}: got {sorted(values)}, want {sorted(types)}")
    for name, value in values.items():
        if types[name] == "dict[str, float]" and isinstance(value, dict) and LEAD.name in value:
            if all(type(v) in (int, float) and math.isfinite(v) for v in value.values()):
                continue
        number = types[name] == "float" and type(value) in (int, float) and math.isfinite(value)
        if not number and (types[name] == "float" or type(value).__name__ != types[name]):
            raise ValueError(f"{kind.__name__.lower()}.{name}: got {value!r}, want a {types[name]}")
    return kind(**values)


def front(found: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """The Pareto front of fully judged trials: faster first, every next one closer to dense than all before (PSNR)."""
    out: list[FinishedTrial] = []
    for f in sorted(found, key=lambda f: (f.verdict.time_ratio, -f.verdict.lead)):
        if f.verdict.complete and (not out or f.verdict.lead > out[-1].verdict.lead):
            out.append(f)
    return out


def candidates(found: Sequence[FinishedTrial], short_db: float = 0.0) -> list[FinishedTrial]:
    """Fully judged trials that meet the constraint, or miss it by `short_db` at most, fastest first; each set of knobs once."""
    unique = {f.knobs: f for f in found if f.verdict.complete and f.verdict.shortfall_db <= short_db}
    return sorted(unique.values(), key=lambda f: f.verdict.time_ratio)
