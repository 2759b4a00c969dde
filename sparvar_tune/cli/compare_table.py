"""Tables for people, from raw numbers that are kept beside them."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence

import pandas

from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.catalog.metrics import METRICS, Metric
from sparvar_tune.measure.fidelity import class_mean, worst_mean
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.policy_search.certify import Outcome
from sparvar_tune.profile.schema import Silicon, Versions

TIME_COLUMNS = ("picture, s", "speed-up", "last scale's attention, ms a layer", "its speed-up")


def pair_frame(outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], layers: int, last: int) -> pandas.DataFrame:
    """One row a way and pair: `way`, `label` and `seed`, `ms` of the picture, `last_ms` of the last scale's attention a layer,
    and how close it is to the dense picture, a column a metric.
    """
    return pandas.DataFrame([
        {"way": way, "label": label, "seed": seed, "ms": o.ms, "last_ms": o.scales_ms[last] / layers, **o.fidelity}
        for way, found in outcomes.items() for (label, seed), o in zip(pairs, found, strict=True)
    ])  # fmt: skip


def way_frame(pairs: pandas.DataFrame, metrics: Sequence[Metric]) -> pandas.DataFrame:
    """One row a way, in words; ratios are against the way "dense", pair by pair."""
    ways = {way: found for way, found in pairs.groupby("way", sort=False)}
    cells = {way: _cells(found, ways["dense"], metrics, way == "dense") for way, found in ways.items()}
    columns = [f"{m.title}{', ' + m.unit if m.unit else ''} (bound)" for m in metrics]
    return pandas.DataFrame.from_dict(cells, orient="index", columns=[*TIME_COLUMNS, *columns])


def _cells(found: pandas.DataFrame, dense: pandas.DataFrame, metrics: Sequence[Metric], is_dense: bool) -> list[str]:
    whole, late = timing(list(found.ms)), timing(list(found.last_ms))
    ratio, gain = (paired_speedup(list(dense[name]), list(found[name])) for name in ("ms", "last_ms"))
    out = [
        f"{whole.p50_ms / 1e3:.2f} ({whole.p20_ms / 1e3:.2f}..{whole.p80_ms / 1e3:.2f})",
        f"{ratio.median:.2f}x ({ratio.low:.2f}..{ratio.high:.2f})",
        f"{late.p50_ms:.1f} ({late.p20_ms:.1f}..{late.p80_ms:.1f})", f"{gain.median:.2f}x ({gain.low:.2f}..{gain.high:.2f})",
    ]  # fmt: skip
    for m in metrics:
        values, labels = list(found[m.name]), list(found.label)
        bound = f"{worst_mean(m, values, labels):.{m.digits}f}"
        out.append("same" if is_dense else f"{class_mean(values, labels):.{m.digits}f} ({bound})")
    return out


def comparison(
    outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], adapter: Adapter, more: Sequence[Metric], machine: Silicon,
    versions: Versions,
) -> tuple[str, str]:  # fmt: skip
    """Markdown table of every way against dense, and the raw numbers as JSON. more: metrics beside those of the table."""
    metrics = (*METRICS.values(), *more)
    table = way_frame(pair_frame(outcomes, pairs, adapter.model.layers, len(adapter.schedule) - 1), metrics)
    threads = f", {machine.threads} threads" if machine.threads else ""
    lines = [
        f"# {adapter.model.slug} on {machine.gpu}",
        "",
        f"{machine.name}{threads}; torch {versions.torch}; {adapter.model.dtype}; "
        f"{datetime.date.today().isoformat()}. {len(pairs)} held-out (class, seed) pairs, every way in rotating order in one "
        f"run, dense: {adapter.dense_name}. Times are p50 (p20..p80); ratios are medians of paired ratios with a 95 % bootstrap "
        "interval; the metrics are against the dense picture with the same noise, with the one-sided 95 % bound of the mean, "
        "stratified by class. Key lists, ranking and residuals are inside the times.",
        "",
        f"| | {' | '.join(table.columns)} |",
        "|---" * (len(table.columns) + 1) + "|",
        *(f"| {' | '.join((str(way), *cells))} |" for way, *cells in table.itertuples()),
    ]
    for name, psnr_db, similarity in adapter.yardsticks():
        known = {"psnr": f"{psnr_db:.2f} ", "ssim": f"{similarity:.4f} "}
        lines.append(f"| *yardstick: {name}* | | | | | {'| '.join(known.get(m.name, '') for m in metrics)}|")
    raw = {
        "machine": dataclasses.asdict(machine), "versions": dataclasses.asdict(versions), "pairs": list(pairs),
        "outcomes": {name: [dataclasses.asdict(o) for o in found] for name, found in outcomes.items()},
    }  # fmt: skip
    return "\n".join(lines) + "\n", json.dumps(raw, indent=1, sort_keys=True) + "\n"
