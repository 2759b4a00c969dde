"""What a report is made from beside a profile, read and checked: trials, measurements, traces, a comparison.

Every reader raises ValueError with one line: the file, what was got, what to do. Nothing is unpickled and no text is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparvar_tune.catalog.metrics import LEAD
from sparvar_tune.launch_search import log
from sparvar_tune.measure.fidelity import class_mean, worst_mean
from sparvar_tune.measure.timing import paired_speedup
from sparvar_tune.policy_search.study import read_journal
from sparvar_tune.profile.schema import Speedup, one_line
from sparvar_tune.ways.trials import trials_frame

if TYPE_CHECKING:
    import pandas

MOST_BYTES = 64 << 20  # of a file of trials, traces or measurements
MOST_POINTS = 5000  # trials in one chart
TRIALS = {"trial", "form", "time_ratio", "shortfall_db", LEAD.name, "complete"}


@dataclass(frozen=True)
class Measurements:
    """A log of launch measurements, counted; `torn` lines were cut short by a kill and are skipped by every reader."""

    binaries: int
    timings: int
    configurations: int
    failures: int
    torn: int
    clocks: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A way to draw whole pictures, on held-out pairs: its speed-up, and PSNR with the one-sided bound of its mean."""

    name: str
    kind: str  # "certified", "preset", "paper" or "other"
    speedup: Speedup
    mean: float
    bound: float | None


@dataclass(frozen=True)
class Trace:
    """Time of one run by scale and step: (scale or None, step) -> ms, in the order of the file."""

    name: str
    ms: dict[tuple[int | None, str], float]


def read_trials(path: Path, model: str) -> pandas.DataFrame:
    """The finished trials of a study's journal, or of a CSV that `sparvar-tune show --trials` printed: see `trials_of`."""
    if path.suffix != ".csv":
        _size(path)
        name, found = read_journal(path)
        if name and name.rpartition("-")[0] != model:
            raise ValueError(f"{path}: trials of {one_line(name.rpartition('-')[0])}, not of {model}; give that model's")
        table = trials_frame({"": found})
    else:
        table = _read_csv(path)
    if not len(table):
        raise ValueError(f"{path}: no finished trial in it; tune first, or leave it out")
    missing = sorted(TRIALS - set(table.columns))
    if missing:
        raise ValueError(f"{path}: no table of trials (no column {', '.join(missing)}); print one with show --trials")
    for name in ("time_ratio", "shortfall_db", LEAD.name):
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in table[name]) or (table["time_ratio"] <= 0).any():
            raise ValueError(f"{path}: column {name}: want finite numbers, time_ratio above 0; print one with show --trials")
    if len(table) > MOST_POINTS:
        raise ValueError(f"{path}: {len(table)} trials, want at most {MOST_POINTS}")
    return table.assign(complete=[str(v) == "True" for v in table["complete"]], form=[str(v) for v in table["form"]])


def read_measurements(path: Path) -> Measurements:
    """What a launch log holds; raises ValueError where it is none."""
    raw = _text(path)
    lines = log.read_log(path)
    if not lines:
        raise ValueError(f"{path}: no measurement of a launch in it; a run keeps them in measurements.jsonl, --log copies them")
    clocks = {one_line(str(c)) for line in lines if line.times and line.times.clocks for c in line.times.clocks.slowed}
    return Measurements(
        sum(line.compiled is not None for line in lines), sum(line.times is not None for line in lines),
        sum(len(line.times.tuned_ms) for line in lines if line.times), sum(line.failure is not None for line in lines),
        sum(bool(text.strip()) for text in raw.splitlines()) - len(lines), tuple(sorted(clocks)),
    )  # fmt: skip


def read_traces(paths: Sequence[Path], gpus: Collection[str], model: str) -> tuple[Trace, ...]:
    """Tables of `sparvar-tune trace`, named by what of their files' names they do not share ("dense", "tuned").

    gpus: of which one is as good as the other: the profile's, and the one that it is lent to. Raises ValueError: no such
    table, another model's or GPU's, a whole picture beside one layer.
    """
    words = [path.stem.split("-") for path in paths]
    while len(words) > 1 and min(map(len, words)) > 1 and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    tables = [_read_csv(path) for path in paths]
    seen = dict[str, Path]()
    for path, table in zip(paths, tables, strict=True):
        for column, want in (("model", {model}), ("gpu", gpus)):
            if column in table.columns and len(table) and (other := str(table[column].iloc[0])) not in want:
                raise ValueError(f"{path}: a trace of {one_line(other)}, not of {' or '.join(sorted(want))}; trace that {column}")
        if "layer" in table.columns and len(table):
            layer = table["layer"].iloc[0]
            layer = int(layer) if isinstance(layer, float) and layer.is_integer() else layer
            seen.setdefault("a whole picture" if layer != layer else f"layer {one_line(str(layer))}'s attention", path)
    if len(seen) > 1:
        (first, one), (second, other_path) = list(seen.items())[:2]
        raise ValueError(f"{one}: of {first}, but {other_path} is of {second}; trace both with the same --layer, or without")
    return tuple(
        _read_trace(path, table, one_line("-".join(w))) for path, table, w in zip(paths, tables, words, strict=True)
    )  # fmt: skip


def _read_trace(path: Path, table: pandas.DataFrame, name: str) -> Trace:
    """A table of `sparvar-tune trace`: columns scale (empty: of no one scale), step and ms."""
    if not {"scale", "step", "ms"} <= set(table.columns) or not len(table):
        raise ValueError(f"{path}: no table of a trace (want columns scale, step, ms); sparvar-tune trace writes one")
    if "share" in table.columns and not 0.99 < table["share"].sum() < 1.01:
        raise ValueError(f"{path}: cut short, its shares add up to {table['share'].sum():.0%}; trace again")
    found: dict[tuple[int | None, str], float] = {}
    for scale, step, ms in zip(table["scale"], table["step"], table["ms"], strict=True):
        number = None if scale != scale else scale
        if not isinstance(ms, int | float) or not math.isfinite(ms) or ms < 0 or not (number is None or 0 <= number < 64):
            raise ValueError(f"{path}: scale {one_line(str(scale))}, ms {one_line(str(ms))}: want a scale 0..63, ms >= 0")
        key = (None if number is None else int(number), one_line(str(step))[:40])
        found[key] = found.get(key, 0.0) + float(ms)
    return Trace(name, found)


def read_comparison(path: Path, gpu: str, model: str) -> list[Point]:
    """Whole pictures every way, from the raw numbers that `sparvar-tune compare --out` writes beside its table."""
    raw = _json(path)
    try:
        machine, asked = raw["machine"]["gpu"], raw.get("model", model)
        pairs, outcomes = raw["pairs"], raw["outcomes"]
        labels = [int(label) for label, _seed in pairs]
        dense = [float(o["ms"]) for o in outcomes["dense"]]
        points = []
        for name, found in outcomes.items():
            ms, close = [float(o["ms"]) for o in found], [float(o["fidelity"][LEAD.name]) for o in found]
            if min(ms) <= 0 or not all(map(math.isfinite, (*ms, *close))) or len(ms) < 2:
                raise ValueError("times and metrics must be finite numbers")
            if name != "dense":
                kind = "paper" if name == "paper's fixed setting" else "preset" if name.startswith("tuned, ") else "other"
                points.append(Point(one_line(name), kind, paired_speedup(dense, ms), class_mean(close, labels),
                                    worst_mean(LEAD, close, labels)))  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: no raw numbers of a comparison ({one_line(str(error))}); compare --out writes them") from None
    if (machine, asked) != (gpu, model):
        raise ValueError(f"{path}: of {one_line(str(asked))} on {one_line(str(machine))}, not of {model} on {gpu}; compare there")
    return points


def _read_csv(path: Path) -> pandas.DataFrame:
    import io

    import pandas

    try:
        return pandas.read_csv(io.StringIO(_text(path)))
    except (ValueError, pandas.errors.ParserError) as error:
        raise ValueError(f"{path}: no table ({one_line(str(error))[:120]})") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(str(error))[:120]})") from None


def _size(path: Path) -> None:
    """Raises ValueError where the file is none, or larger than any of ours."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: over {MOST_BYTES >> 20} MiB, none of ours is")


def _text(path: Path) -> str:
    _size(path)
    return path.read_bytes().decode("utf-8", "replace")
