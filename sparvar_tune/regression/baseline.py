"""Facts in a file, and which of today's are worse: what, was, is, bound.

A fact holds under something: versions for counts, a machine for ratios. One that was measured under something else is not
compared, and that is said: it is no failure and no pass.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparvar_tune.profile.reader import Reader, ReadError, unique_keys
from sparvar_tune.profile.schema import ProfileError, is_date, one_line
from sparvar_tune.profile.store import read_bytes, write_atomic

SCHEMA = 1
RATIO_SLACK = 0.08  # of a ratio's interval: what differs between two processes on one machine (docs/benchmarks.md)
SIGNS = {"lower": 1, "higher": -1}


@dataclass(frozen=True)
class Fact:
    """One number. name: what of what, such as "csla 8x8, launches". better: "lower" or "higher".

    low, high: the interval it lies in; a count is its own. slack: by which share of the bound it may be worse. under: what it
    holds for, such as "torch 2.13.0". of: which run measures it, such as "cpu/pocketvar.json"; one run knows nothing of others'.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    better: str
    slack: float
    under: str
    of: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.of, self.name, self.under

    def why_not(self) -> str | None:
        if self.better not in SIGNS:
            return f"better: got {self.better!r}, want lower or higher"
        if not self.low <= self.value <= self.high:
            return f"got low {self.low}, value {self.value}, high {self.high}; want low <= value <= high"
        return None if 0 <= self.slack < 1 else f"slack: got {self.slack}, want 0..1"

    @property
    def plain(self) -> dict[str, Any]:
        """JSON values; a count keeps every digit."""
        values = dataclasses.asdict(self)
        for name in ("value", "low", "high"):
            values[name] = int(values[name]) if float(values[name]).is_integer() else float(f"{values[name]:.6g}")
        return values

    @property
    def bound(self) -> float:
        """What today's interval must reach."""
        return self.high * (1 + self.slack) if self.better == "lower" else self.low * (1 - self.slack)

    def worse_than(self, was: Fact) -> bool:
        """Whether all of its interval lies beyond the bound of what was."""
        return self.low > was.bound if was.better == "lower" else self.high < was.bound

    def better_than(self, was: Fact) -> bool:
        """Whether the intervals are apart, to the good side."""
        return self.high < was.low if was.better == "lower" else self.low > was.high

    @property
    def words(self) -> str:
        interval = f" ({self.low:.4g}..{self.high:.4g})" if self.low < self.high else ""
        return f"{say(self.value)}{self.unit}{interval}"


def say(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def count(name: str, value: float, under: str, unit: str = "") -> Fact:
    """Something that is counted: no more of it than before."""
    return Fact(name, float(value), float(value), float(value), unit, "lower", 0.0, under)


@dataclass(frozen=True)
class Baseline:
    """The facts of one day."""

    schema: int
    created: str
    facts: tuple[Fact, ...]

    def why_not(self) -> str | None:
        if self.schema != SCHEMA:
            return f"schema: got {self.schema}, want {SCHEMA}; write the baseline again"
        if not is_date(self.created):
            return f'created: got {self.created!r}, want a date such as "2026-11-23"'
        names = [fact.key for fact in self.facts]
        return None if len(set(names)) == len(names) else "facts: a name stands twice"


@dataclass(frozen=True)
class Change:
    """A fact that is not as it was. verdict: "worse", "gone" (nothing measured it today), "better"."""

    verdict: str
    what: str
    was: str
    now: str | None
    bound: str

    @property
    def words(self) -> str:
        now = f"is {self.now}" if self.now is not None else "was not measured"
        return f"{self.verdict:6} {self.what}: was {self.was}, {now}, bound {self.bound}"


@dataclass(frozen=True)
class Compared:
    """changes: worst first. same: how many facts are within their bounds. new: names that the baseline does not have.

    elsewhere: what the baseline's facts hold for that today's do not (another machine or version), with how many there are.
    """

    changes: tuple[Change, ...]
    same: int
    new: tuple[str, ...]
    elsewhere: tuple[tuple[str, int], ...]

    @property
    def good(self) -> bool:
        return not any(change.verdict in ("worse", "gone") for change in self.changes)

    @property
    def lines(self) -> list[str]:
        """What people read; the last line sums up."""
        out = [change.words for change in self.changes]
        out += [f"not compared: {n} facts under {under}; today's hold for something else" for under, n in self.elsewhere]
        if self.new:
            out.append(f"new: {len(self.new)} facts, {', '.join(self.new[:3])}{', ...' if len(self.new) > 3 else ''}")
        worse = sum(change.verdict in ("worse", "gone") for change in self.changes)
        better = sum(change.verdict == "better" for change in self.changes)
        found = f"{worse} of {worse + better + self.same} facts became worse"
        return [*out, found + (f", {better} better: write the baseline again to keep that" if better else "")]


def compare(was: Sequence[Fact], now: Sequence[Fact]) -> Compared:
    """A run's facts against a baseline's of the same run. A fact that holds under what nothing of today does is left out; one
    that is missing is gone.
    """
    today, unders, runs = {f.key: f for f in now}, {f.under for f in now}, {f.of for f in now}
    changes, same, elsewhere = [], 0, dict[str, int]()
    for old in (fact for fact in was if fact.of in runs):
        if old.under not in unders:
            elsewhere[old.under] = elsewhere.get(old.under, 0) + 1
            continue
        new, bound = today.get(old.key), f"{say(old.bound)}{old.unit}"
        if new is None:
            changes.append(Change("gone", old.name, old.words, None, bound))
        elif new.worse_than(old):
            changes.append(Change("worse", old.name, old.words, new.words, bound))
        elif new.better_than(old):
            changes.append(Change("better", old.name, old.words, new.words, bound))
        else:
            same += 1
    known = {f.key for f in was}
    changes.sort(key=lambda change: ("worse", "gone", "better").index(change.verdict))
    return Compared(tuple(changes), same, tuple(f.name for f in now if f.key not in known), tuple(elsewhere.items()))


def load(path: Path) -> Baseline:
    """Raises ProfileError: no such file, not one of ours."""
    try:
        data = json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=unique_keys)
        return Reader().read(Baseline, data, "")
    except (ReadError, ValueError, RecursionError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path}: no baseline: {one_line(str(error))}; restore it, or write it again") from None


def save(facts: Iterable[Fact], path: Path) -> None:
    """Writes a run's facts over its earlier ones; those of other runs, and what holds for other machines and versions, is kept.

    One fact a line, sorted, so that a change of the file is read as what changed.
    """
    now = list(facts)
    told = {(fact.of, fact.under) for fact in now}
    kept = [fact for fact in load(path).facts if (fact.of, fact.under) not in told] if path.exists() else []
    rows = sorted((fact.plain for fact in (*kept, *now)), key=lambda row: (row["of"], row["under"], row["name"]))
    Reader().read(Baseline, _file(rows), "")
    head = json.dumps(_file([]))[:-2]
    write_atomic(path, (head + "\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]}\n").encode())


def _file(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": SCHEMA, "created": datetime.date.today().isoformat(), "facts": rows}
