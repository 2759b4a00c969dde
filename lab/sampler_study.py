"""Replay: samplers run on recorded launch spaces, on a CPU, so that the choice of a sampler rests on data.

    python -m lab.sampler_study FILE... --out docs/samplers.md

A GPU run records the time of every launch configuration of one attention problem (`recorded.File`); a replayed trial is
a look into that table. Beside `search` the only user of Optuna.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import optuna

from lab.recorded_spaces import Point, Space, TriedConfig, numbers, read_space
from sparvar_tune.profile.store import write_atomic

SAMPLERS = ("grid", "random", "tpe", "nsga2", "gp", "screened")
BUDGETS = (5, 10, 20, 40, 80)  # trials
NEAR = 0.03  # close enough to the optimum
MAX_FREE = 10  # proposals in a row that cost nothing; then the trial goes to a random configuration not yet measured
KEPT, PARTS = 8, 5  # "screened": how many are measured again; a screen takes 1 / PARTS of the samples of a measurement
SIGMAS = 2 * 0.8416  # between p20 and p80 of a normal distribution


def why_not_sampler(name: str) -> str | None:
    """Why the sampler cannot run here, or None."""
    if name not in SAMPLERS:
        return f"sampler: got {name!r}, want one of {', '.join(SAMPLERS)}"
    missing = [m for m in ("scipy", "torch") if name == "gp" and importlib.util.find_spec(m) is None]
    return f"gp needs {' and '.join(missing)}: pip install {' '.join(missing)}" if missing else None


def simulate(space: Space, sampler: str, budget: int, seed: int) -> list[float]:
    """p50 of the best configuration after each of `budget` paid trials; infinite until one ran, level when all are known.

    A failure costs a trial. Illegal configurations and repeated ones cost nothing. For "screened" a trial is PARTS
    screens, and the value is the recorded p50 of the configuration it would give out then: it can rise during the screen.
    """
    if why := why_not_sampler(sampler) or (f"budget: got {budget}, want >= 1" if budget < 1 else None):
        raise ValueError(why)
    if sampler == "screened":
        best = _screened(space, seed)[PARTS - 1 :: PARTS][:budget]
    else:
        paid = list(space.rows)[:budget] if sampler == "grid" else _proposed(space, sampler, budget, seed)
        best = list(accumulate((space.rows[point].value for point in paid), min))
    return best + best[-1:] * (budget - len(best))


def _proposed(space: Space, sampler: str, budget: int, seed: int) -> list[Point]:
    """What an Optuna sampler measures, in order; it learns that illegal and failed configurations are pruned."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=10),  # 50 would be chance up to trial 50
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
    }
    study = optuna.create_study(sampler=made[sampler]())
    rng, optimum = random.Random(seed), space.optimum
    paid: dict[Point, None] = {}
    free, best = 0, math.inf
    while len(paid) < budget and best > optimum:  # nothing could change after that
        if free == MAX_FREE:
            study.enqueue_trial(dict(zip(space.choices, rng.choice([p for p in space.rows if p not in paid]), strict=True)))
        trial = study.ask()
        point = tuple(_suggest(trial, name, values) for name, values in space.choices.items())
        row = space.rows.get(point)
        if row is None or row.failure is not None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, row.value)
            best = min(best, row.value)
        free = free + 1 if row is None or point in paid else 0
        paid |= {point: None} if row else {}
    return list(paid)


def _suggest(trial: optuna.trial.Trial, name: str, values: list[Any]) -> int:
    """The index of a value: numbers are in order, by steps of the list; texts and booleans are not."""
    size = len(values)
    return trial.suggest_int(name, 0, size - 1) if numbers(values) else int(trial.suggest_categorical(name, range(size)))


def _screened(space: Space, seed: int) -> list[float]:
    """Successive halving like the tuner's: the recorded p50 of what it would give out after each part of a trial.

    Every legal configuration is screened, in random order, for one part each; the KEPT best are measured for PARTS each.
    """
    rng = random.Random(seed)
    looks = [(_screen(row, rng), row.value) for row in rng.sample(list(space.rows.values()), len(space.rows))]
    parts = [ms for _, ms in accumulate(looks, min)]
    for best in accumulate((ms for look, ms in sorted(looks)[:KEPT] if look < math.inf), min):
        parts += [parts[-1]] * (PARTS - 1) + [best]
    return parts + parts[-1:] * (PARTS - 1)  # the last trial may be begun only


def _screen(row: TriedConfig, rng: random.Random) -> float:
    """A p50 of 1 / PARTS of the row's samples, drawn log-normal with the spread it has."""
    if not row.p20 or not row.p80 or not row.n:
        return math.inf
    sigma = math.log(row.p80 / row.p20) / SIGMAS
    return row.value * math.exp(median(rng.gauss(0.0, sigma) for _ in range(max(1, row.n // PARTS))))


@dataclass(frozen=True)
class Regret:
    """Over many seeds: best / optimum - 1 after each trial (10 %, median, 90 %), median trials until NEAR for good."""

    sampler: str
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    near: float  # infinite: the median run never is


def regret(space: Space, samplers: Sequence[str], budget: int, seeds: int = 30) -> tuple[Regret, ...]:
    """One row per sampler, each run with seeds 0, 1, ..."""
    optimum = space.optimum
    runs = {s: [[best / optimum - 1 for best in simulate(space, s, budget, seed)] for seed in range(seeds)] for s in samplers}
    return tuple(_summary(s, runs[s]) for s in samplers)


def _summary(sampler: str, runs: list[list[float]]) -> Regret:
    ranks = [round(q * (len(runs) - 1)) for q in (0.1, 0.5, 0.9)]  # no interpolation: some are infinite
    low, middle, high = (tuple(sorted(at)[r] for at in zip(*runs, strict=True)) for r in ranks)
    arrivals = [max((t for t, loss in enumerate(run, 1) if loss > NEAR), default=0) + 1 for run in runs]
    near = sorted(a if a <= len(runs[0]) else math.inf for a in arrivals)[ranks[1]]
    return Regret(sampler, low, middle, high, near)


def markdown(spaces: Sequence[Space], tables: Sequence[Sequence[Regret]], seeds: int, plot: str) -> str:
    """The report: per space what it is like and, per sampler, the regret at BUDGETS."""
    lines = [
        "# Samplers on recorded launch spaces", "",
        "How far the best configuration found is above the best recorded, after so many trials (measured configurations): "
        f"median of {seeds} seeds and, in brackets, 10 % and 90 %. Times are replayed without noise; compiling costs nothing. "
        "Illegal and repeated configurations are free, failed ones are not; after "
        f"{MAX_FREE} free proposals in a row a random one is measured. *screened* looks at every configuration for 1/{PARTS} "
        f"trial, with the noise recorded within a row, and measures the best {KEPT} again; until then its best look counts.",
        "", f"![regret over trials]({plot})",
    ]  # fmt: skip
    for space, table in zip(spaces, tables, strict=True):
        values = [row.value for row in space.rows.values()]
        size = math.prod(len(v) for v in space.choices.values())
        spreads = [row.p80 / row.p20 - 1 for row in space.rows.values() if row.p20 and row.p80]
        lines += [
            "", f"## {space.problem} ({space.gpu})", "",
            f"{size} configurations, {len(values)} legal, {len(values) - len(spreads)} of them failed. "
            f"Best {space.optimum:.4g} ms; {sum(v <= (1 + NEAR) * space.optimum for v in values)} within {NEAR:.0%}. "
            f"Median of p80 / p20 - 1: {median(spreads):.1%}.",
            "", f"| sampler | {' | '.join(f'{b} trials' for b in BUDGETS)} | trials to {NEAR:.0%} |",
            "|---" * (len(BUDGETS) + 2) + "|",
        ]  # fmt: skip
        for row in table:
            cells = [f"{row.middle[b - 1]:.1%} ({row.low[b - 1]:.1%}..{row.high[b - 1]:.1%})" for b in BUDGETS]
            near = f"{row.near:.0f}" if row.near < math.inf else f"over {BUDGETS[-1]}"
            lines.append(f"| {row.sampler} | {' | '.join(cells).replace('inf%', 'none ran')} | {near} |")
    return "\n".join(lines) + "\n"


def draw(spaces: Sequence[Space], tables: Sequence[Sequence[Regret]]) -> bytes:
    """An SVG, a panel per space: medians, and bands from 10 % to 90 % of the seeds. The same input gives the same bytes."""
    from matplotlib import figure, rc_context

    with rc_context({"svg.hashsalt": "sparvar-tune", "svg.fonttype": "none"}):
        page = figure.Figure(figsize=(7, 3.5 * len(spaces)), layout="constrained")
        for axes, space, table in zip(page.subplots(len(spaces), squeeze=False)[:, 0], spaces, tables, strict=True):
            for row in table:
                low, middle, high = ([100 * v if v < math.inf else math.nan for v in c] for c in (row.low, row.middle, row.high))
                axes.plot(range(1, len(low) + 1), middle, label=row.sampler)
                axes.fill_between(range(1, len(low) + 1), low, high, alpha=0.12)
            axes.set(title=f"{space.problem} ({space.gpu})", xlabel="trials", ylabel="% above the best", xlim=(1, BUDGETS[-1]))
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
            axes.legend()
        out = io.BytesIO()
        page.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.sampler_study", description="compares samplers on recorded spaces")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recorded spaces (JSON)")
    parser.add_argument("--out", type=Path, default=Path("docs/samplers.md"), help="the report; the plot goes beside it")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS, help="which (gp is the slow one)")
    parser.add_argument("--seeds", type=int, default=30)
    given = parser.parse_args(arguments)
    samplers = [name for name in given.samplers if not why_not_sampler(name)]
    for name in set(given.samplers) - set(samplers):  # gp or nothing
        print(f"sampler_study: skipped: {why_not_sampler(name)}", file=sys.stderr)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the plot needs matplotlib: pip install 'sparvar-tune[report]'")
        if given.seeds < 1 or not samplers:
            raise ValueError("want at least one seed and one sampler")
        spaces = [read_space(path) for path in given.files]
        tables = [regret(space, samplers, BUDGETS[-1], given.seeds) for space in spaces]
        plot = given.out.with_suffix(".svg")
        write_atomic(plot, draw(spaces, tables))
        write_atomic(given.out, markdown(spaces, tables, given.seeds, plot.name).encode())
    except ValueError as error:
        print(f"sampler_study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
