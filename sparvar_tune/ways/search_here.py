"""One tuning run from end to end: measure options, search policies, tune launches, certify, make the profile.

capture -> tables -> search (search pairs) -> launches -> certify (held-out pairs) -> profile
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter
from sparvar_tune.catalog.gpus import GPUS, Gpu, nearest_first
from sparvar_tune.catalog.metrics import LEAD
from sparvar_tune.catalog.models import Model
from sparvar_tune.catalog.names import PRESETS
from sparvar_tune.generation import why_not_steps
from sparvar_tune.launch_search.choose import ChosenLaunches, combinations
from sparvar_tune.measure.capture import Recorder
from sparvar_tune.measure.fidelity import Constraint, mean_of, worst_class
from sparvar_tune.measure.pairs import held_out_pairs, search_pairs
from sparvar_tune.measure.timing import CLOCK, Clock, quantile
from sparvar_tune.policy_search.certify import (
    SHARES,
    Comparison,
    compare_on,
    confidence_of,
    decision_cost,
    evidence,
    generation,
    measured_rows,
)
from sparvar_tune.policy_search.foresight import Foresight
from sparvar_tune.policy_search.judge import (
    MARGIN_DB,
    Judge,
    first_touched,
    make_attention,
    points_of,
    steps_named,
    steps_of,
    without_slow_steps,
)
from sparvar_tune.policy_search.menu import OptionTable, menu
from sparvar_tune.policy_search.option_table import dense_pass, measure_table
from sparvar_tune.policy_search.planned_trials import roomy
from sparvar_tune.policy_search.storage import one_line, open_shared
from sparvar_tune.policy_search.study import failed, finished, join_study, open_study, search
from sparvar_tune.policy_search.trial import FinishedTrial, Knobs, candidates, front
from sparvar_tune.profile import schema, store
from sparvar_tune.profile.describe import describe, describe_evidence
from sparvar_tune.profile.files import exclusive
from sparvar_tune.profile.identity import every_meaning, stamp
from sparvar_tune.profile.machine import silicon, versions
from sparvar_tune.runtime.tuned import launch_of

SEARCH_PAIRS = 10  # every class of pocketvar once; with eight, predictions were 0.4 dB off
FEWEST_TRIALS = 3  # judged whatever the budget, where no policy is shipped to begin with; else that one alone
# in dense rests, measured on 2 cores: certifying a pair, tuning the launches, timing finalists again
PAIR_COST, LAUNCH_COST, FINAL_COST = 1.75, 5.0, 8.0
FINALISTS, CLOSE = 4, 1.15  # trials at most this much slower than the best are timed again: a machine moves by 15 %
SEARCHED = "searched on this machine under a picture-level constraint"  # a profile's policy_source: others may take it over
MEANING = "time over dense beside it"  # of a trial's objective: trials of another meaning are of another space


class NothingMeetsTheBound(ValueError):
    """No configuration reaches the constraint faster than dense; the message says the best that was reached."""


@dataclass(frozen=True)
class Request:
    """What to tune. `scratch` keeps the trials, or `storage` (a URL) does.

    budget_s: wall time (s) the whole run is to take. Only the search is cut to meet it: what must come before (options, dense
    pictures, the first trials) and after it (certification on all `pairs`) is done on a slow machine too.
    """

    model: Model
    resolution: str
    aspect: str
    gpu: Gpu
    preset: str
    constraint: Constraint
    budget_s: float
    pairs: int
    seed: int
    resume: bool
    scratch: Path
    storage: str | None = field(default=None, repr=False)  # may hold a password


def tune(
    request: Request, adapter: Adapter, say: Callable[[str], None], status: Callable[[str], None], clock: Clock = CLOCK,
    time_launches: Callable[[Policy], ChosenLaunches] | None = None, shipped: Mapping[str, Policy] | None = None,
    attempts: int = 0,
) -> schema.Profile:  # fmt: skip
    """The certified profile. `say` prints a line to keep, `status` one to overwrite; all times are `clock`'s.

    time_launches: finds the launches of a policy (on a GPU: `timed.time_launches`); None: by running it on a capture.
    shipped: policies to begin with, by form; None: those that came with the package for this model.
    attempts: at certification that came before, of a policy taken over: they share one error probability.

    Raises NothingMeetsTheBound, ValueError (folder busy or unwritable), KeyboardInterrupt (finished trials are kept).
    """
    begun = clock()

    def left() -> float:
        return request.budget_s - (clock() - begun)

    def note(text: str) -> None:
        say(f"[{clock() - begun:4.0f} s] {text}")

    shared = open_shared(request.storage) if request.storage else None
    with one_line(request.storage) if request.storage else exclusive(request.scratch):
        model = adapter.model
        known = shipped_policies(request, adapter, note) if shipped is None else shipped
        points = points_of(adapter, known)
        table = measure_options(adapter, status, clock)
        note(f"measured {sum(map(len, table.error.values()))} options on {model.layers} x {model.heads} heads")
        pairs = search_pairs(adapter.num_classes, SEARCH_PAIRS)
        judge = Judge(adapter, pairs, request.constraint, request.pairs, table, status, clock, points)
        if busy := judge.stopwatch.load():
            note(busy)
        # per held-out pair the shared start, the dense and the tuned rest, in terms of the dense rest; and launches
        reserve = (request.pairs * PAIR_COST + LAUNCH_COST + FINAL_COST) * judge.dense_ms / 1e3
        space = _space(request, adapter, points)
        study = join_study(shared, space) if shared else open_study(request.scratch, space, request.seed, request.resume, note)
        fewest = len(known) or FEWEST_TRIALS
        if finished(study):
            note(f"going on after {len(finished(study))} finished trials")
        elif left() < reserve:
            note(f"no time for a search: certifying on {request.pairs} pairs takes about {reserve:.0f} s here; "
                 f"that and {fewest} trial{'s' * (fewest > 1)} are done all the same")  # fmt: skip

        def enough() -> bool:
            return left() < reserve and len(finished(study)) + len(failed(study)) >= fewest

        search(
            study, judge, enough, lambda trial: note(trial_line(trial, judge, left() - reserve)), shared,
            points=judge.forms, steps=judge.steps, saves=judge.saves, foresee=Foresight(table, steps_named(adapter)),
            tell_failed=lambda trial: note(f"trial {trial.number:3d}  failed: {trial.reason} ({knobs_line(trial.knobs)})"),
        )  # fmt: skip
        if not busy and (load := judge.stopwatch.load()):
            note(load)
        done = finished(study)
        shown = ", ".join(f"{f.verdict.speedup:.2f}x {f.verdict.lead:.1f} {LEAD.unit}" for f in front(done))
        note(f"time against {LEAD.title}, the front of {len(done)} trials: {shown or 'none complete'}")
        for line in fruitless(done, judge):
            note(line)
        # where no trial has the prediction's margin to spare, pairs that nobody searched on decide about those that lack no more
        short_db = 0.0 if candidates(done) else MARGIN_DB
        attempt, needed = attempts, -short_db
        looked_at = set[Policy]()
        for candidate in in_turn(candidates(done, short_db), judge, note):
            policy = judge.policy(candidate.knobs)
            nothing = not policy.rules and not policy.steps  # dense everywhere is no result
            if candidate.verdict.shortfall_db > -needed or nothing or policy in looked_at:
                continue
            if attempt == len(SHARES):
                break
            looked_at.add(policy)
            note(f"certifying trial {candidate.number}: {describe(policy)}")
            found = time_launches(policy) if time_launches else None
            launches = (
                {r.scale_index: launch_of(r) for r in found.rows} if found else tune_launches(adapter, policy, judge, status)
            )
            confidence, drawn = confidence_of(attempt), held_out_pairs(adapter.num_classes, request.pairs, attempt)
            attempt += 1
            seen = compare_on(adapter, policy, launches, drawn, status, judge.doomed, clock, request.constraint.more)
            if len(seen.pairs) < request.pairs:
                means = {name: fmean(f[name] for f in seen.found) for name in seen.found[0]}
                note(f"given up after {len(seen.pairs)} held-out pairs: {request.constraint.say(means)}")
                needed = max(needed, 0.2) - min(0.0, candidate.verdict.shortfall_db)
                continue
            proof, shortfall = evidence(seen, adapter, policy, request.constraint, confidence)
            gain = generation(seen, adapter).speedup
            note(f"worst class: {worst_class_of(seen, adapter)}")
            note(f"{describe_evidence(proof)}; {gain.median:.2f}x ({gain.low:.2f}..{gain.high:.2f})")
            if shortfall <= 0 and gain.low > 1:
                return make_profile(request, adapter, policy, SEARCHED, seen, proof, launches, found, len(done))
            if shortfall > 0:
                needed = max(needed, shortfall) - candidate.verdict.shortfall_db
        raise NothingMeetsTheBound(_best_reachable(study, request, attempt > attempts))


def shipped_policies(request: Request, adapter: Adapter, say: Callable[[str], None]) -> dict[str, Policy]:
    """Form -> policy that was certified on these very weights and came with the package, for the preset or all of them.

    A first search on a slow machine begins with what one elsewhere found; its pictures and times are looked at here anew.
    """
    model, found = request.model, dict[str, Policy]()
    default = (model.default_resolution, model.default_aspect)
    for preset in (request.preset,) if request.preset in PRESETS else PRESETS:
        name = store.profile_name(model.slug, preset, request.resolution, request.aspect, default)
        for gpu in (request.gpu, *nearest_first(request.gpu, (g for g in GPUS.values() if g.slug != request.gpu.slug))):
            path = store.shipped_folder() / gpu.slug / name
            if not path.is_file():
                continue
            try:
                profile = store.load(path)
            except schema.ProfileError as error:
                say(f"not begun with: {error}")
                continue
            w, policy = profile.workload, without_slow_steps(profile.policy, adapter)
            fits = (w.weights_sha256, w.schedule) == (adapter.weights_sha256, adapter.schedule)
            fits = fits and why_not_steps(policy.steps, steps_of(adapter), "it") is None
            if fits and profile.policy_state == "measured" and policy not in found.values():
                found[f"shipped {preset}"] = policy
                break
    return found


def in_turn(found: list[FinishedTrial], judge: Judge, note: Callable[[str], None]) -> list[FinishedTrial]:
    """Candidates, the fastest first: those close to the best are timed again, one after the other."""
    close = [f for f in found[:FINALISTS] if f.verdict.time_ratio <= CLOSE * found[0].verdict.time_ratio]
    if len(close) < 2:
        return found
    ratios = judge.timed_again([f.knobs for f in close])
    order = sorted(range(len(close)), key=lambda at: ratios[at])
    note("timed again in turn: " + ", ".join(f"trial {close[at].number} {1 / ratios[at]:.2f}x" for at in order))
    return [*(close[at] for at in order), *(f for f in found if f not in close)]


def fruitless(done: Sequence[FinishedTrial], judge: Judge) -> list[str]:
    """Generation steps that were looked at alone and not gone on with, and why: a line each."""
    alone, saves, out = {f.knobs.form: f.verdict for f in done}, judge.saves, list[str]()
    room = roomy(done, judge.steps, saves)
    best = max((f.verdict.speedup for f in done if f.verdict.shortfall_db <= 0), default=1.0)
    for name in (name for name in judge.steps if name in alone and name not in room):
        v = alone[name]
        why = f"misses the bound by {v.shortfall_db:.1f} dB alone"
        if v.shortfall_db <= 0:
            limit = 1 / max(v.time_ratio - saves[name], 1e-9)
            why = f"{v.speedup:.2f}x alone, {limit:.2f}x at most with attention on top; the best is {best:.2f}x"
        out.append(f"not taken: {name} ({why})")
    return out


def worst_class_of(seen: Comparison, adapter: Adapter) -> str:
    """Such as "rocket, PSNR 33.06 dB": the class whose mean is farthest from dense."""
    values, labels = [f[LEAD.name] for f in seen.found], [label for label, _ in seen.pairs]
    at = worst_class(LEAD, values, labels)
    return f"{adapter.classes()[at][:60]}, {LEAD.title} {LEAD.say(mean_of(LEAD.of_worst_class(), values, labels))}"


def trial_line(found: FinishedTrial, judge: Judge, search_left: float) -> str:
    """One trial, the best so far, and how long the search goes on."""
    v = found.verdict
    mark = "meets the bound" if v.shortfall_db <= 0 else f"{v.shortfall_db:.1f} dB short"
    mark += "" if v.complete else ", given up early"
    best = f"best {1 / judge.best_ratio:.2f}x" if judge.best_ratio else "none meets it yet"
    return (
        f"trial {found.number:3d}  {v.speedup:5.2f}x  {judge.constraint.say(v.means)}  {mark} ({knobs_line(found.knobs)});"
        f" {best}; {max(0, search_left):.0f} s of search left"
    )


def knobs_line(k: Knobs) -> str:
    if k.form != "priced":
        return k.form
    return f"prices {' '.join(f'{p:.3g}' for p in k.prices)}, tilt {k.tilt:+.1f}" + (f", {k.steps}" if k.steps else "")


def measure_options(adapter: Adapter, status: Callable[[str], None], clock: Clock = CLOCK) -> OptionTable:
    """The table of every option, on one captured generation."""
    scales = range(first_touched(adapter), len(adapter.schedule))
    capture = Recorder(adapter.dense, tuple(scales))
    adapter.finish(adapter.start(search_pairs(adapter.num_classes, 1)[0], scales[0]), capture)
    outputs, dense_ms = dense_pass(capture, adapter.dense, scales, adapter.device, clock)
    return measure_table(
        capture, outputs, dense_ms, adapter.schedule, device=adapter.device, softmax_scale=adapter.softmax_scale,
        logit_bound=adapter.logit_bound, progress=lambda name: status(f"measuring options: {name}"), clock=clock,
    )  # fmt: skip


def tune_launches(adapter: Adapter, policy: Policy, judge: Judge, status: Callable[[str], None]) -> dict[int, Launch]:
    """The fastest launch configuration per sparse scale, by running the policy over one captured generation."""
    kernel = KERNELS[kernel_for(adapter.device.split(":")[0])]
    scales = sorted({r.scale_index for r in policy.rules})
    if not scales:
        return {}
    first = first_touched(adapter)
    capture = Recorder(adapter.dense, tuple(range(first, len(adapter.schedule))))
    adapter.finish(judge.references[0].state, capture)
    choices = combinations(kernel.config.space())
    spent: dict[tuple[int, int], list[float]] = {}
    layers = range(0, adapter.model.layers, max(1, adapter.model.layers // 4))
    for _round in range(2):
        for c, values in enumerate(choices):
            launch = Launch(kernel.name, kernel.config(**values))
            attend = make_attention(adapter, policy, dict.fromkeys(range(len(adapter.schedule)), launch))
            for layer in layers:
                for s in range(first, len(adapter.schedule)):
                    ms = judge.stopwatch(lambda: attend(*capture.calls[layer, s], layer, s))  # noqa: B023
                    spent.setdefault((s, c), []).append(ms)
            status(f"launch configurations: {c + 1}/{len(choices)}")
    best = {s: choices[min(range(len(choices)), key=lambda c: quantile(spent[s, c], 0.5))] for s in scales}
    return {s: Launch(kernel.name, kernel.config(**best[s])) for s in scales}


def _space(request: Request, adapter: Adapter, points: Mapping[str, Policy] | None = None) -> str:
    """Names everything a trial's numbers depend on; trials of another space, or of other silicon, are never mixed in."""
    here = silicon(request.gpu, True)
    parts = (request.model.slug, request.gpu.slug, here.name, here.threads, adapter.schedule.grids, repr(request.constraint),
             request.pairs, adapter.weights_sha256, every_meaning(), versions().torch,
             repr(menu(adapter.schedule, len(adapter.schedule) - 1)), MEANING, repr(points))  # fmt: skip
    return f"{request.model.slug}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _best_reachable(study: Any, request: Request, certified: bool) -> str:
    done, broken = finished(study), failed(study)
    if not done:
        why = f"all {len(broken)} trials failed, the last with: {broken[-1].reason}" if broken else "no trial finished"
        return f"{why}; nothing written"
    faster = [f for f in done if f.verdict.speedup > 1.05] or done
    best = max(faster, key=lambda f: (-f.verdict.shortfall_db, f.verdict.lead))
    v = best.verdict
    short = "but not so on the held-out pairs" if certified else "no faster than dense"
    todo = "Give more --budget, or more --pairs: of few, chance decides"
    if v.shortfall_db > 0:
        short = f"the confidence bound of that mean is {v.shortfall_db:.2f} dB short"
        bounds = request.constraint.bounds  # a worst class has no mean there
        enough = bounds.keys() <= v.means.keys() and request.constraint.shortfall(v.means) <= 0
        todo = "Ask for less with --min NAME=VALUE, or give more " + (
            "--pairs: of few, a bound is wide" if enough else "--budget"
        )
    return (
        f"no configuration faster than dense certifies {request.constraint}; the best reached {request.constraint.say(v.means)} "
        f"at {v.speedup:.2f}x ({short}); nothing written. {todo}"
    )


def make_profile(
    request: Request, adapter: Adapter, policy: Policy, source: str, seen: Comparison, proof: schema.Evidence,
    launches: dict[int, Launch], chosen: ChosenLaunches | None, trials: int,
) -> schema.Profile:  # fmt: skip
    """The profile of a certified policy. chosen: its launches' own times where there are some, else those of `seen`."""
    rows, notes = (chosen.rows, chosen.notes) if chosen else (measured_rows(seen, adapter, policy, launches), ())
    return schema.Profile(
        schema=schema.SCHEMA, created=datetime.date.today().isoformat(), preset=request.preset, state="measured",
        policy=policy, policy_state="measured", policy_source=source,
        evidence=proof, workload=workload(request, adapter), silicon=silicon(request.gpu, True), versions=versions(),
        **stamp(policy, rows, request.gpu), generation=generation(seen, adapter), rows=rows, seed=request.seed,
        trials=trials, notes=(*decision_cost(seen, adapter, policy), *notes),
    )  # fmt: skip


def workload(request: Request, adapter: Adapter) -> schema.Workload:
    model = request.model
    return schema.Workload(
        model.slug, request.resolution, request.aspect, adapter.schedule.grids, adapter.schedule.prefix,
        model.layers, model.heads, model.head_dim, model.dtype, model.guidance_batch, adapter.softmax_scale,
        adapter.logit_bound, adapter.weights_sha256,
    )  # fmt: skip
