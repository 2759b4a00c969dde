"""Fits and tests the cost model on recorded launch spaces, and compiles the binaries it predicts with.

    python -m lab.cost_fit binaries                what every predicted launch's binary takes -> cost_binaries.json
    python -m lab.cost_fit fit --out docs/costmodel.md     coefficients -> cost_fit.json, and how good they are

Fitted on the H100's spaces alone. Tested on the H200's, which the fit never saw, and on the H100's with each problem left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from lab.kernel_table import Case, cases
from lab.recorded_spaces import read_space
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import GPUS, Gpu
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.launch_search.choose import legal, space
from sparvar_tune.launch_search.compiling import Binary, binaries, compile_all, compilers
from sparvar_tune.launch_search.cost_model import (
    BINARIES,
    FITTED,
    KEPT,
    Fit,
    LaunchWork,
    Taken,
    binaries_of,
    binary_key,
    dense_ms,
    efficiency_key,
    keep_likely,
    key_of,
    launch_ms,
    load_binaries,
    load_fit,
    scale_ms,
    works,
)
from sparvar_tune.launch_search.layer_call import distinct_layers
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile.machine import version_of
from sparvar_tune.profile.schema import Workload
from sparvar_tune.profile.store import load, shipped_folder, write_atomic

SPACES = {"h100-sxm": Path("reports/spaces-h100"), "h200": Path("reports/spaces-h200")}
FITTED_ON, HELD_OUT = "h100-sxm", "h200"
SHRUNK = 0.5  # a configuration's efficiency is a mean over problems, as if half a problem more had said 1
START = {
    "4 64": 1.0, "4 128": 1.0, "8 64": 0.7, "8 128": 1.0, "l2": 80.0, "3": 1200.0, "5": 700.0, "7": 700.0,
    "power": 0.1, "spill": 3.0, "overhead": 4000.0, "launch": 8.0, "narrow": 1.0, "residual": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class TimedConfig:
    """One recorded configuration of one problem."""

    problem: str
    config: TritonConfig
    work: LaunchWork
    ms: Mapping[str, float]  # by GPU


def recorded_samples() -> Iterator[TimedConfig]:
    """Every configuration of the recorded spaces that ran on both GPUs and that no warps fetch for, with the work it had."""
    for case in cases():
        if not (SPACES[FITTED_ON] / case.file).is_file():
            continue
        spaces = {gpu: read_space(folder / case.file).rows.values() for gpu, folder in SPACES.items()}
        times = {gpu: {TritonConfig(**row.config): row.value for row in rows} for gpu, rows in spaces.items()}
        for config in times[FITTED_ON]:
            ms = {gpu: of[config] for gpu, of in times.items() if config in of}
            if not config.fetchers and len(ms) == len(SPACES) and all(map(math.isfinite, ms.values())):
                (work,) = works(case.policy, _problems(case), 0, case.scale_index, config)
                yield TimedConfig(case.name, config, work, ms)


def _problems(case: Case) -> dict[int, AttentionProblem]:
    return {s: case.problem(s) for s in range(len(case.schedule))}


def fit(samples: Sequence[TimedConfig], taken: Mapping[str, Taken], gpu: Gpu) -> Fit:
    """The coefficients that come nearest in log time, robustly; then the efficiency of every configuration. Needs scipy."""
    from scipy.optimize import least_squares

    start = np.log(np.array(list(START.values())))

    def misses(x: np.ndarray) -> np.ndarray:
        made = _fit_of(dict(zip(START, np.exp(x), strict=True)), gpu.slug, {})
        off = [math.log(_predicted(p, made, taken, gpu) / p.ms[gpu.slug]) for p in samples]
        # a weak pull to the start keeps what the data do not tell from running off
        return np.array([*off, *(0.05 * (x - start))])

    found = least_squares(misses, start, loss="soft_l1", f_scale=0.1, max_nfev=60).x
    plain = _fit_of(dict(zip(START, np.exp(found), strict=True)), gpu.slug, {})
    ratios: dict[str, list[float]] = {}
    for p in samples:
        key = efficiency_key(p.work.head_dim, p.config)
        ratios.setdefault(key, []).append(math.log(p.ms[gpu.slug] / _predicted(p, plain, taken, gpu)))
    return replace(plain, efficiency={k: math.exp(sum(r) / (len(r) + SHRUNK)) for k, r in sorted(ratios.items())})


def _fit_of(c: dict[str, float], gpu: str, efficiency: dict[str, float]) -> Fit:
    share = {k: float(c[k]) for k in ("4 64", "4 128", "8 64", "8 128")}
    latency = {k: float(c[k]) for k in ("3", "5", "7")}
    power, spill, overhead, launch, narrow, residual = (
        float(c[k]) for k in ("power", "spill", "overhead", "launch", "narrow", "residual")
    )
    return Fit(gpu, share, float(c["l2"]), latency, power, spill, overhead, launch, narrow, residual, efficiency, 1.0, 1.0, 1.0)


def _predicted(p: TimedConfig, made: Fit, taken: Mapping[str, Taken], gpu: Gpu) -> float:
    return launch_ms(p.work, p.config, taken[binary_key(p.work, p.config, gpu)], gpu, made)


@dataclass(frozen=True)
class Quality:
    """How good predictions of one problem's space are.

    regret: measured time of the predicted pick over the best, less 1. rank: Spearman. error: median |log ratio|.
    kept: share of configurations left by `keep_likely`; lost: the best of those over the best, less 1.
    """

    problem: str
    regret: float
    rank: float
    error: float
    kept: float
    lost: float


def quality(samples: Sequence[TimedConfig], made: Fit, taken: Mapping[str, Taken], gpu: Gpu) -> list[Quality]:
    """One row per problem. Needs scipy."""
    from scipy.stats import spearmanr

    out = []
    for name in dict.fromkeys(p.problem for p in samples):
        mine = [p for p in samples if p.problem == name]
        real = {p.config: p.ms[gpu.slug] for p in mine}
        guess = {p.config: _predicted(p, made, taken, gpu) for p in mine}
        best, pick, left = min(real.values()), min(guess, key=lambda c: guess[c]), keep_likely(guess)
        out.append(Quality(
            name, real[pick] / best - 1, float(spearmanr(list(real.values()), list(guess.values()))[0]),
            median(abs(math.log(guess[c] / real[c])) for c in real), len(left) / len(real), min(real[c] for c in left) / best - 1,
        ))  # fmt: skip
    return out


def left_out(samples: Sequence[TimedConfig], taken: Mapping[str, Taken], gpu: Gpu) -> list[Quality]:
    """Every problem judged by a fit on the others of the same GPU."""
    out = []
    for name in dict.fromkeys(p.problem for p in samples):
        made = fit([p for p in samples if p.problem != name], taken, gpu)
        out += quality([p for p in samples if p.problem == name], made, taken, gpu)
    return out


def wanted_binaries() -> dict[str, Binary]:
    """Every binary that a recorded point, or a prediction for a model of the table, needs, by `binary_key`."""
    found: dict[str, Binary] = {}
    recorded = GPUS[FITTED_ON]
    for case in cases():
        if (SPACES[FITTED_ON] / case.file).is_file():
            problem = case.problem(case.scale_index)
            configs = legal(problem, recorded.capability)
            _note(found, case.policy, _problems(case), 0, case.scale_index, configs, recorded)
    for gpu in {g.capability: g for g in GPUS.values() if g.capability}.values():
        for policy, w in _predicted_policies():
            problems = w.problems()
            for s in sorted({r.scale_index for r in policy.rules}):
                for layer in distinct_layers(policy, s):
                    _note(found, policy, problems, layer, s, space(problems[s], gpu.capability), gpu)
    return found


def _predicted_policies() -> Iterator[tuple[Policy, Workload]]:
    """The paper's policy on every model at every default aspect, and every shipped policy that was searched."""
    for model in MODELS.values():
        for aspect in model.resolutions[model.default_resolution]:
            w = Workload.of(model, model.default_resolution, aspect)
            yield paper_policy(w.schedule, model.layers, model.heads), w
    for profile in map(load, sorted(shipped_folder().glob("*/*.json"))):
        if profile.policy_state == "measured":
            yield profile.policy, profile.workload


def _note(
    found: dict[str, Binary], policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, s: int,
    configs: Sequence[TritonConfig], gpu: Gpu,
) -> None:  # fmt: skip
    """Adds what the launches of these configurations need, those the model knows."""
    assert gpu.capability
    for config in (c for c in configs if not c.fetchers):
        made = {binary_key(w, config, gpu): w for w in works(policy, problems, layer, s, config)}
        if made.keys() <= found.keys():
            continue
        for binary in binaries(policy, problems, layer, s, config, gpu.capability):
            key = key_of(binary.build.kernel, dict(binary.build.constants), problems[s].dtype, config, gpu.capability)
            if key in made:
                found.setdefault(key, binary)


def compile_table(say: Callable[[str], None]) -> str:
    """cost_binaries.json: registers, shared bytes and spilled bytes by `binary_key`; those that this Triton made stay."""
    wanted, here = wanted_binaries(), str(version_of("triton"))
    known = load_binaries() if BINARIES.is_file() and binaries_of() == here else {}
    missing = {key: b for key, b in wanted.items() if key not in known}
    say(f"{len(wanted)} binaries, {len(missing)} to compile")
    with compilers(os.cpu_count() or 2) as pool:
        made = compile_all(missing.values(), pool, lambda text: print(text, end="\r", file=sys.stderr))
    table = {key: list(asdict(known[key]).values()) for key in wanted if key in known}
    for key, b in missing.items():
        m = made[b]
        if m.failure:
            say(f"{key}: {m.failure}")
        else:
            table[key] = [m.registers, m.shared_bytes, m.spill_bytes]
    rows = ",\n".join(f' "{key}": {json.dumps(table[key])}' for key in sorted(table))
    return f'{{"triton": "{here}", "taken": {{\n{rows}\n}}}}\n'


HOST_MS = 0.1  # a dense layer below this is as long as the host takes to launch it


@dataclass(frozen=True)
class FittedLayer:
    """A row of a shipped, measured profile: predicted over measured time, of the tuned layer and of dense attention.

    small: its time is mostly the host's.
    """

    gpu: str
    small: bool
    tuned: float
    dense: float


def layers() -> list[FittedLayer]:
    """Every half-precision row that was measured on a GPU, of a configuration the model knows, predicted for that."""
    out = []
    for path in sorted(shipped_folder().glob("*/*.json")):
        made = load(path)
        gpu = GPUS[made.silicon.gpu]
        problems = made.workload.problems()
        known = made.state == "measured" and gpu.capability and made.workload.dtype != "fp32"
        for row in made.rows if known else ():
            assert row.tuned and row.dense
            config = TritonConfig(**dict(row.config))
            if config.fetchers:  # of these the model knows nothing
                continue
            kinds = distinct_layers(made.policy, row.scale_index)
            guess = scale_ms(made.policy, problems, kinds, row.scale_index, config, gpu, load_binaries())
            dense = dense_ms(problems[row.scale_index], gpu, made.workload.heads)
            small = row.dense.p50_ms < HOST_MS
            out.append(FittedLayer(gpu.slug, small, guess / row.tuned.p50_ms, dense / row.dense.p50_ms))
    return out


def layer_lines(found: Sequence[FittedLayer]) -> list[str]:
    """The report's table of layers, by GPU and size."""
    lines = ["| GPU | rows | tuned, predicted / measured (least..most) | dense |", "|---|---|---|---|"]
    for gpu, small in sorted({(x.gpu, x.small) for x in found}):
        mine = [x for x in found if (x.gpu, x.small) == (gpu, small)]
        cells = []
        for ratios in ([x.tuned for x in mine], [x.dense for x in mine]):
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        lines.append(f"| {gpu}, {f'dense below {HOST_MS:g} ms' if small else 'others'} | {len(mine)} | {cells[0]} | {cells[1]} |")
    return lines


INTRODUCTION = """# The cost model, against what it never saw

Predicted times of launch configurations against recorded ones: six problems, of each the 48 configurations whose warps do
all. Fitted on the H100's spaces (`reports/spaces-h100`) alone. Pick: measured time of the configuration predicted fastest,
above the fastest measured.
Rank: Spearman correlation over the space. Error: median of |log(predicted / measured)|. Pruning keeps what is predicted
within {kept:g}x of the best: share kept, and what the best of those is above the best of all.

No Ampere, Ada or Blackwell GPU was ever measured: there the model stands on the same formula with that target's compiled
registers, shared memory and spills and the data sheet's rates, and its error is larger and unknown. Pruning is used on
Hopper only.

It knows launches whose warps do all, and nothing of those whose warps fetch or multiply (Hopper): these are always timed.

Regenerate: `python -m lab.cost_fit fit --out docs/costmodel.md`.
"""


LAYERS = """
## Whole layers of measured profiles

Rows of the shipped profiles, none of them in the fit: the paper's policy, several launches and dense heads a layer. Small layers
(VAR, small pictures) are mostly host time of an eager call, which the model knows nothing of; nor does it of launches whose
warps fetch or multiply, so those rows are not here. `error_layers` below is of the 51 larger rows measured on an H200 on
2026-11-24, before there were such launches.
"""


def report(other: Sequence[Quality], out: Sequence[Quality], made: Fit) -> str:
    """docs/costmodel.md."""
    lines = [INTRODUCTION.format(kept=KEPT).rstrip()]
    head = ["| problem | pick above the best | rank | error | kept | lost by pruning |", "|---|---|---|---|---|---|"]
    for title, rows in (("H200, the whole GPU held out", other), ("H100, each problem left out of the fit", out)):
        lines += ["", f"## {title}", "", *head]
        lines += [f"| {q.problem} | {q.regret:.1%} | {q.rank:.3f} | {q.error:.1%} | {q.kept:.0%} | {q.lost:.1%} |" for q in rows]
    lines += [LAYERS.rstrip(), "", *layer_lines(layers())]
    shown = {k: v for k, v in asdict(made).items() if k != "efficiency"}
    spread = f"{min(made.efficiency.values()):.2f}..{max(made.efficiency.values()):.2f}"
    lines += ["", "## Coefficients", "", *(f"- {k}: {_shown(v)}" for k, v in shown.items())]
    lines += [f"- efficiency: {len(made.efficiency)} configurations, {spread}"]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v:.4g}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.cost_fit", description="fits and tests the cost model")
    parser.add_argument("what", choices=("binaries", "fit"))
    parser.add_argument("--out", type=Path, default=Path("docs/costmodel.md"), help="the report of a fit")
    given = parser.parse_args(arguments)
    if given.what == "binaries":
        write_atomic(BINARIES, compile_table(print).encode())
        return 0
    known, all_points, before = load_binaries(), list(recorded_samples()), load_fit()
    made = fit(all_points, known, GPUS[FITTED_ON])
    other, out = quality(all_points, made, known, GPUS[HELD_OUT]), left_out(all_points, known, GPUS[FITTED_ON])
    _keep(made)
    whole = [abs(math.log(x.tuned)) for x in layers() if x.gpu == HELD_OUT and not x.small]
    made = replace(
        made, error_other_gpu=median(q.error for q in other), error_other_problem=median(q.error for q in out),
        error_layers=median(whole) if whole else before.error_layers,  # of the profiles that were there
    )  # fmt: skip
    _keep(made)
    write_atomic(given.out, report(other, out, load_fit()).encode())
    print(report(other, out, load_fit()))
    return 0


def _keep(made: Fit) -> None:
    rounded = json.loads(json.dumps(asdict(made)), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomic(FITTED, (json.dumps(rounded, indent=1, sort_keys=True) + "\n").encode())
    load_fit.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
