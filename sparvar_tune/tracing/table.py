"""Ranges as one table: time, share and % of what the machine can do, by scale and step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparvar_tune.measure.limits import Limits
from sparvar_tune.tracing.ranges import STEPS, Span

if TYPE_CHECKING:
    import pandas

ABOVE = "above 100 %: operands that fit a cache, or a product that suits this machine better than the square one of the limit"
COLUMNS = ["scale", "step", "variant", "calls", "ms", "share", "gflop", "mbytes", "limit_ms", "of_limit"]


def frame(spans: Sequence[Span], limits: Limits) -> pandas.DataFrame:
    """One row a scale and step, in the order of a picture; last what is of no one scale.

    scale: <NA> for that. variant: kinds of its calls, of products the format of 8-bit ones. calls: ranges. ms: their own time,
    without that of the ranges inside. share: of the run, 0..1. gflop, mbytes, limit_ms: what the calls must do, and the
    milliseconds this machine's own rates allow for it; of_limit: limit_ms / ms. NaN where the work of a call is not known, and
    where a product is of 8-bit numbers.
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
    """The table for people: a line a scale, a column a step; milliseconds, then % of limit where work is known."""
    steps = [step for step in STEPS if step in set(table.step)]
    table = table.assign(scale=["-" if missing else str(s) for s, missing in zip(table.scale, table.scale.isna(), strict=True)])
    scales = list(dict.fromkeys(table.scale))
    ms = table.pivot(index="scale", columns="step", values="ms").reindex(index=scales, columns=steps)
    whole = float(table.ms.sum())
    lines = ["ms, by scale and step", _line("scale", [*steps, "all", "share"])]
    for scale in scales:
        own = float(ms.loc[scale].sum())
        lines.append(_line(scale, [*(_number(x) for x in ms.loc[scale]), _number(own), f"{own / whole:.1%}"]))
    lines.append(_line("all", [*(_number(x) for x in ms.sum()), _number(whole), ""]))
    lines.append(_line("share", [*(f"{x / whole:.1%}" for x in ms.sum()), "", ""]))
    known = [step for step in steps if table[table.step == step].of_limit.notna().any()]
    if known:
        limit = table.pivot(index="scale", columns="step", values="of_limit").reindex(index=scales, columns=known)
        lines += ["", "% of limit, where the work of every call is known", _line("scale", known)]
        lines += [_line(scale, [f"{x:.0%}" if x == x else "" for x in limit.loc[scale]])
                  for scale in scales if limit.loc[scale].notna().any()]  # fmt: skip
        if (table.of_limit >= 1.005).any():
            lines.append(ABOVE)
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:>5} {' '.join(f'{cell:>9}' for cell in cells)}".rstrip()


def _number(ms: float) -> str:
    return f"{ms:.2f}" if ms == ms else ""
