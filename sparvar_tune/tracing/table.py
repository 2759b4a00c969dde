"""Ranges as one table: time, share and % of what the machine can do, by scale and step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparvar_tune.measure.limits import Limits
from sparvar_tune.tracing.ranges import STEPS, Span

if TYPE_CHECKING:
    import pandas

COLUMNS = ["scale", "step", "variant", "calls", "ms", "share", "gflop", "mbytes", "limit_ms", "of_limit"]


def frame(spans: Sequence[Span], limits: Limits) -> pandas.DataFrame:
    """One row a scale and step, in the order of a picture; last what is of no one scale.

    scale: <NA> for that. variant: kinds of its calls. calls: ranges. ms: their own time, without that of the ranges inside.
    share: of the run, 0..1. gflop, mbytes, limit_ms: what the calls must do, and the milliseconds this machine's own rates
    allow for it; of_limit: limit_ms / ms. NaN where the work of a call is not known.
    """
    import pandas

    nan = float("nan")
    rows = [
        (span.label.scale, span.label.step if span.label.step in STEPS else "rest", span.label.variant, span.own_ms,
         *((w.flops / 1e9, w.moved / 1e6, limits.ms(w.flops, w.moved)) if (w := span.work) else (nan,) * 3))
        for span in spans
    ]  # fmt: skip
    seen = pandas.DataFrame(rows, columns=["scale", "step", "variant", "ms", "gflop", "mbytes", "limit_ms"])
    seen = seen.astype({"scale": "Int64", "step": pandas.CategoricalDtype(list(STEPS), ordered=True)})
    known = {name: (name, _all_known) for name in ("gflop", "mbytes", "limit_ms")}
    table = seen.groupby(["scale", "step"], dropna=False, observed=True).agg(
        variant=("variant", _kinds), calls=("ms", "size"), ms=("ms", "sum"), **known
    )
    table = table.reset_index()
    table["step"] = table["step"].astype(str)
    table["share"] = table.ms / table.ms.sum()
    table["of_limit"] = table.limit_ms / table.ms
    return table[COLUMNS]


def _all_known(values: pandas.Series) -> float:
    return float(values.sum(skipna=False))


def _kinds(variants: Iterable[str]) -> str:
    return "+".join(sorted({kind for variant in variants for kind in variant.split("+") if kind}))


def text(table: pandas.DataFrame) -> str:
    """The table for people, and under it the same by step alone."""
    lines = [f"{'scale':>5}  {'step':10} {'variant':12} {'calls':>6} {'ms':>10} {'share':>7} {'% of limit':>10}"]
    for scale, step, variant, calls, ms, share, of_limit in table.drop(columns=["gflop", "mbytes", "limit_ms"]).values.tolist():
        limit = f"{of_limit:.0%}" if of_limit == of_limit else ""
        which = f"{scale:5}" if isinstance(scale, int) else f"{'-':>5}"
        lines.append(f"{which}  {step:10} {variant:12} {calls:6} {ms:10.3f} {share:7.1%} {limit:>10}")
    steps = table.groupby("step", sort=False)[["calls", "ms", "share"]].sum().sort_values("ms", ascending=False)
    lines += ["", *(f"{'all':>5}  {step:10} {'':12} {int(calls):6} {ms:10.3f} {share:7.1%}" for step, calls, ms, share in
                    steps.itertuples())]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
