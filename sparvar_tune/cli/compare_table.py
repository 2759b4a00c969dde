"""Tables for people, from raw numbers that are kept beside them."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas

from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.catalog.metrics import Metric, always
from sparvar_tune.measure.fidelity import class_mean, worst_mean
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.policy_search.certify import Outcome
from sparvar_tune.profile.schema import Measured, Silicon, Speedup, Timing, Versions

TIME_COLUMNS = ("picture, s", "speed-up", "last scale's attention, ms a layer", "its speed-up")


def pair_frame(outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], layers: int, last: int) -> pandas.DataFrame:
    """One row a way and pair: `way`, `label` and `seed`, `ms` of the picture, `last_ms` of the last scale's attention a layer
    (NaN where that was not timed), and how close it is to the dense picture, a column a metric.
    """
    return pandas.DataFrame([
        {"way": way, "label": label, "seed": seed, "ms": o.ms, "last_ms": o.scales_ms[last] / layers if o.scales_ms else None,
         **o.fidelity}
        for way, found in outcomes.items() for (label, seed), o in zip(pairs, found, strict=True)
    ])  # fmt: skip


def last_common(outcomes: Mapping[str, Sequence[Outcome]]) -> int:
    """The last scale at which every way attends: one may leave out the schedule's last."""
    return min(max(o.scales_ms) for found in outcomes.values() for o in found if o.scales_ms)


@dataclass(frozen=True)
class WayResult:
    """One way to draw a picture, against the way "dense", pair by pair.

    picture: of a whole one; last_scale: of attention a layer at the last scale that every way has; each with its
    speed-up. metrics: how close it is to the dense picture, the mean and its bound; none for "dense".
    """

    name: str
    picture: Timing
    speedup: Speedup
    last_scale: Timing
    last_scale_speedup: Speedup
    metrics: tuple[tuple[str, Measured], ...]


def way_results(pairs: pandas.DataFrame, metrics: Sequence[Metric]) -> tuple[WayResult, ...]:
    """Every way of a `pair_frame`, in its order."""
    ways = {str(way): found for way, found in pairs.groupby("way", sort=False)}
    return tuple(_way(name, found, ways["dense"], metrics) for name, found in ways.items())


def _way(name: str, found: pandas.DataFrame, dense: pandas.DataFrame, metrics: Sequence[Metric]) -> WayResult:
    late, dense_late = (list(side.last_ms.dropna()) for side in (found, dense))
    ratio, gain = paired_speedup(list(dense.ms), list(found.ms)), paired_speedup(dense_late, late)
    labels, close = list(found.label), list[tuple[str, Measured]]()
    for m in metrics if name != "dense" else ():
        values = list(found[m.name])
        close.append((m.name, Measured(class_mean(values, labels), worst_mean(m, values, labels), None)))
    return WayResult(name, timing(list(found.ms)), ratio, timing(late), gain, tuple(close))


def _cells(way: WayResult, metrics: Sequence[Metric]) -> list[str]:
    whole, late, ratio, gain = way.picture, way.last_scale, way.speedup, way.last_scale_speedup
    out = [
        f"{whole.p50_ms / 1e3:.2f} ({whole.p20_ms / 1e3:.2f}..{whole.p80_ms / 1e3:.2f})",
        f"{ratio.median:.2f}x ({ratio.low:.2f}..{ratio.high:.2f})",
        f"{late.p50_ms:.1f} ({late.p20_ms:.1f}..{late.p80_ms:.1f})", f"{gain.median:.2f}x ({gain.low:.2f}..{gain.high:.2f})",
    ]  # fmt: skip
    for m in metrics:
        found = dict(way.metrics).get(m.name)
        out.append(f"{found.mean:.{m.digits}f} ({found.bound:.{m.digits}f})" if found else "same")
    return out


def _which_last(outcomes: Mapping[str, Sequence[Outcome]], adapter: Adapter) -> str:
    last, grids = last_common(outcomes), adapter.schedule.grids
    why = ", the last that every way draws" if last < len(grids) - 1 else ""
    return f"The last scale is {last}, {grids[last][0]}x{grids[last][1]}{why}."


def results(
    outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], adapter: Adapter, more: Sequence[Metric]
) -> tuple[WayResult, ...]:
    """Every way against dense, what the table says in words. more: metrics beside those of the table."""
    frame = pair_frame(outcomes, pairs, adapter.model.layers, last_common(outcomes))
    return way_results(frame, (*always(), *more))


def comparison(
    outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], adapter: Adapter, more: Sequence[Metric], machine: Silicon,
    versions: Versions,
) -> tuple[str, str]:  # fmt: skip
    """Markdown table of every way against dense, and the raw numbers as JSON. more: metrics beside those of the table."""
    metrics = (*always(), *more)
    ways = results(outcomes, pairs, adapter, more)
    columns = [*TIME_COLUMNS, *(f"{m.title}{', ' + m.unit if m.unit else ''} (bound)" for m in metrics)]
    threads = f", {machine.threads} threads" if machine.threads else ""
    lines = [
        f"# {adapter.model.slug} on {machine.gpu}",
        "",
        f"{machine.name}{threads}; torch {versions.torch}; {adapter.model.dtype}; "
        f"{datetime.date.today().isoformat()}. {len(pairs)} held-out (class, seed) pairs, every way in rotating order in one "
        f"run, dense: {adapter.dense_name}. Times are p50 (p20..p80); ratios are medians of paired ratios with a 95 % bootstrap "
        "interval; the metrics are against the dense picture with the same noise, with the one-sided 95 % bound of the mean, "
        f"stratified by class. Key lists, ranking and residuals are inside the times. {_which_last(outcomes, adapter)}",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {' | '.join((way.name, *_cells(way, metrics)))} |" for way in ways),
    ]
    for name, psnr_db, similarity in adapter.yardsticks():
        known = {"psnr": f"{psnr_db:.2f} ", "ssim": f"{similarity:.4f} "}
        lines.append(f"| *yardstick: {name}* | | | | | {'| '.join(known.get(m.name, '') for m in metrics)}|")
    raw = {
        "model": adapter.model.slug, "machine": dataclasses.asdict(machine), "versions": dataclasses.asdict(versions),
        "pairs": list(pairs),
        "outcomes": {name: [dataclasses.asdict(o) for o in found] for name, found in outcomes.items()},
    }  # fmt: skip
    return "\n".join(lines) + "\n", json.dumps(raw, indent=1, sort_keys=True) + "\n"
