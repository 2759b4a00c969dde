"""One tuning run from end to end: measure options, search policies, tune launches, certify, make the profile.

capture -> tables -> search (search pairs) -> launches -> certify (held-out pairs) -> profile
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.models import Model
from sparvar_tune.launch_search.choose import Found as Timed
from sparvar_tune.launch_search.choose import points
from sparvar_tune.measure.capture import Recorder
from sparvar_tune.measure.fidelity import CONFIDENCE, Constraint
from sparvar_tune.measure.pairs import held_out_pairs, search_pairs
from sparvar_tune.measure.timing import CLOCK, Clock, quantile
from sparvar_tune.policy_search.certify import Trial, compare_on, decision_cost, evidence, generation, measured_rows
from sparvar_tune.policy_search.judge import Judge, build_policy, first_touched, make_attention
from sparvar_tune.policy_search.menu import Table, menu
from sparvar_tune.policy_search.option_table import dense_pass, measure_table
from sparvar_tune.policy_search.storage import one_line, open_shared
from sparvar_tune.policy_search.study import Found, candidates, finished, front, join_study, open_study, search
from sparvar_tune.profile import schema
from sparvar_tune.profile.describe import describe
from sparvar_tune.profile.files import exclusive
from sparvar_tune.profile.identity import every_meaning, stamp
from sparvar_tune.profile.machine import silicon, versions
from sparvar_tune.runtime.tuned import launch_of

SEARCH_PAIRS, FEWEST_PAIRS = 10, 12  # ten: every class of pocketvar once; with eight, predictions were 0.4 dB off
PAIR_COST, LAUNCH_COST = 1.75, 5.0  # in dense rests, measured on 2 cores: certifying a pair, tuning the launches
SEARCHED = "searched on this machine under a picture-level constraint"  # a profile's policy_source: others may take it over
ATTEMPTS = 3  # candidates that may be certified; attempt j spends 2**-j of the error probability


class NothingMeetsTheBound(ValueError):
    """No configuration reaches the constraint faster than dense; the message says the best that was reached."""


@dataclass(frozen=True)
class Request:
    """What to tune. `budget_s` is wall time from here to the profile; `scratch` keeps the trials, or `storage` (a URL) does."""

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
    time_launches: Callable[[Policy], Timed] | None = None,
) -> schema.Profile:  # fmt: skip
    """The certified profile. `say` prints a line to keep, `status` one to overwrite; all times are `clock`'s.

    time_launches: finds the launches of a policy (on a GPU: `timed.time_launches`); None: by running it on a capture.

    Raises NothingMeetsTheBound, ValueError (folder busy or unwritable), KeyboardInterrupt (finished trials are kept).
    """
    begun = clock()

    def left() -> float:
        return request.budget_s - (clock() - begun)

    shared = open_shared(request.storage) if request.storage else None
    with one_line(request.storage) if request.storage else exclusive(request.scratch):
        table = measure_options(adapter, status, clock)
        say(f"[{clock() - begun:4.0f} s] measured {sum(map(len, table.error.values()))} options "
            f"on {adapter.model.layers} x {adapter.model.heads} heads")  # fmt: skip
        pairs = search_pairs(adapter.num_classes, SEARCH_PAIRS)
        judge = Judge(adapter, pairs, request.constraint, request.pairs, table, status, clock)
        # per held-out pair the shared start, the dense and the tuned rest, in terms of the dense rest; and launches
        reserve = (request.pairs * PAIR_COST + LAUNCH_COST) * judge.dense_ms / 1e3
        held_out = request.pairs
        if reserve > 0.8 * left():
            held_out = max(FEWEST_PAIRS, int(request.pairs * 0.7 * max(0.0, left()) / reserve))
            reserve = (held_out * PAIR_COST + LAUNCH_COST) * judge.dense_ms / 1e3
            say(f"[{clock() - begun:4.0f} s] the budget allows {held_out} held-out pairs instead of {request.pairs}")
            judge.held_out = held_out
        space = _space(request, adapter)
        study = join_study(shared, space) if shared else open_study(request.scratch, space, request.seed, request.resume)
        if finished(study):
            say(f"[{clock() - begun:4.0f} s] going on after {len(finished(study))} finished trials")

        def tell(found: Found) -> None:
            say(f"[{clock() - begun:4.0f} s] {trial_line(found, judge, left() - reserve)}")

        search(study, judge, lambda: left() < reserve, tell, shared)
        done = finished(study)
        points = ", ".join(f"{judge.dense_ms / f.verdict.latency_ms:.2f}x {f.verdict.psnr_db:.1f} dB" for f in front(done))
        say(f"[{clock() - begun:4.0f} s] time against PSNR, the front of {len(done)} trials: {points or 'none complete'}")
        ranked = candidates(done)
        attempt, needed = 0, 0.0
        for candidate in ranked:
            policy = build_policy(candidate.knobs, adapter, table)
            nothing = not policy.rules and not policy.skip_scales  # dense everywhere is no result
            if candidate.verdict.shortfall_db > -needed or attempt == ATTEMPTS or nothing:
                continue
            attempt += 1
            say(f"[{clock() - begun:4.0f} s] certifying trial {candidate.number}: {describe(policy)}")
            found = time_launches(policy) if time_launches else None
            launches = (
                {r.scale_index: launch_of(r) for r in found.rows} if found else tune_launches(adapter, policy, judge, status)
            )
            trial = compare_on(
                adapter, policy, launches, held_out_pairs(adapter.num_classes, held_out), status, judge.doomed, clock
            )
            if len(trial.pairs) < held_out:
                mean = fmean(f.psnr_db for f in trial.found)
                say(f"[{clock() - begun:4.0f} s] given up after {len(trial.pairs)} held-out pairs: PSNR {mean:.2f} dB")
                needed = max(needed, 0.2) - min(0.0, candidate.verdict.shortfall_db)
                continue
            confidence = 1 - (1 - CONFIDENCE) * 2.0**-attempt if attempt > 1 else CONFIDENCE
            proof, shortfall = evidence(trial, adapter, policy, request.constraint, confidence)
            gain = generation(trial, adapter).speedup
            say(f"[{clock() - begun:4.0f} s] {held_out} held-out pairs: PSNR {proof.psnr_mean_db:.2f} dB, lower bound "
                f"{proof.psnr_lower_db:.2f} (wanted {request.constraint.psnr_db:.2f}); SSIM {proof.ssim_mean:.4f}, lower bound "
                f"{proof.ssim_lower:.4f} (wanted {request.constraint.ssim:g}); {gain.median:.2f}x")  # fmt: skip
            if shortfall <= 0 and gain.low > 1:
                return make_profile(request, adapter, policy, SEARCHED, trial, proof, launches, found, len(done))
            needed = max(needed, shortfall) - candidate.verdict.shortfall_db
        raise NothingMeetsTheBound(_best_reachable(done, request, judge))


def trial_line(found: Found, judge: Judge, search_left: float) -> str:
    """One trial, the best so far, and how long the search goes on."""
    v = found.verdict
    k = found.knobs
    what = k.form if k.form != "priced" else f"prices {' '.join(f'{p:.3g}' for p in k.prices)}, tilt {k.tilt:+.1f}"
    mark = "meets the bound" if v.shortfall_db <= 0 else f"{v.shortfall_db:.1f} dB short"
    mark += "" if v.complete else ", given up early"
    best = f"best {judge.dense_ms / judge.best_ms:.2f}x" if judge.best_ms else "none meets it yet"
    return (
        f"trial {found.number:3d}  {judge.dense_ms / v.latency_ms:5.2f}x  {v.psnr_db:5.2f} dB  {v.ssim:.4f}  {mark} ({what});"
        f" {best}; {max(0, search_left):.0f} s of search left"
    )


def measure_options(adapter: Adapter, status: Callable[[str], None], clock: Clock = CLOCK) -> Table:
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
    choices = points(kernel.config.space())
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


def _space(request: Request, adapter: Adapter) -> str:
    """Names everything a trial's numbers depend on; trials of another space, or of other silicon, are never mixed in."""
    here = silicon(request.gpu, True)
    parts = (request.model.slug, request.gpu.slug, here.name, here.threads, adapter.schedule.grids, repr(request.constraint),
             request.pairs, adapter.weights_sha256, every_meaning(), versions().torch,
             repr(menu(adapter.schedule, len(adapter.schedule) - 1)))  # fmt: skip
    return f"{request.model.slug}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _best_reachable(done: list[Found], request: Request, judge: Judge) -> str:
    wanted = f"PSNR >= {request.constraint.psnr_db:g} dB and SSIM >= {request.constraint.ssim:g}"
    if not done:
        return f"no trial finished within the budget of {request.budget_s:.0f} s; give more with --budget"
    faster = [f for f in done if judge.dense_ms / f.verdict.latency_ms > 1.05] or done
    best = max(faster, key=lambda f: (-f.verdict.shortfall_db, f.verdict.psnr_db))
    v = best.verdict
    return (
        f"no configuration faster than dense certifies {wanted}; the best reached {v.psnr_db:.2f} dB and SSIM {v.ssim:.4f} "
        f"at {judge.dense_ms / v.latency_ms:.2f}x ({max(0.0, v.shortfall_db):.2f} dB short); nothing written. "
        "Ask for less with --min-psnr / --min-ssim, or give more --budget"
    )


def make_profile(
    request: Request, adapter: Adapter, policy: Policy, source: str, trial: Trial, proof: schema.Evidence,
    launches: dict[int, Launch], timed: Timed | None, trials: int,
) -> schema.Profile:  # fmt: skip
    """The profile of a certified policy. timed: its launches' own times where there are some, else those of `trial`."""
    rows, notes = (timed.rows, timed.notes) if timed else (measured_rows(trial, adapter, policy, launches), ())
    return schema.Profile(
        schema=schema.SCHEMA, created=datetime.date.today().isoformat(), preset=request.preset, state="measured",
        policy=policy, policy_state="measured", policy_source=source,
        evidence=proof, workload=workload(request, adapter), silicon=silicon(request.gpu, True), versions=versions(),
        **stamp(policy, rows, request.gpu), generation=generation(trial, adapter), rows=rows, seed=request.seed,
        trials=trials, notes=(*decision_cost(trial, adapter, policy), *notes),
    )  # fmt: skip


def workload(request: Request, adapter: Adapter) -> schema.Workload:
    model = request.model
    return schema.Workload(
        model.slug, request.resolution, request.aspect, adapter.schedule.grids, adapter.schedule.prefix,
        model.layers, model.heads, model.head_dim, model.dtype, model.guidance_batch, adapter.softmax_scale,
        adapter.logit_bound, adapter.weights_sha256,
    )  # fmt: skip
