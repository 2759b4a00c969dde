"""The search over policies: Optuna proposes knobs, a judge times and looks at pictures.

Objective: milliseconds of the part of a generation that attention can change. Constraint: predicted shortfall of the
certified bound, <= 0 when met. Every finished trial is stored before the next begins (a journal file of this run, or a
storage shared by several runs), so Ctrl-C or kill -9 loses at most the trial under way.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sparvar_tune.policy_search.storage import Shared, cut_torn_tail
from sparvar_tune.profile.files import set_aside

LOW_PRICE, HIGH_PRICE = 0.03, 3000.0  # what a unit of relative squared error is worth, in dense times of a head
FIRST_PRICE = 25.0  # where it begins
SLOPE_DB = 4.0  # dB that a decade of price buys, for the first steps: on pocketvar 3 to 5
PRICE_STEPS, CLOSE_ENOUGH = 6, 0.06  # trials, decades
LIE_DB = 2.0  # what a trial of another process is taken to fall short by until it is finished: then two look to both sides
# What an error does to the picture, measured on pocketvar by changing one scale, one pair of layers at a time: it comes to
# 1.65 and 4.3 times as much at the second- and third-last scale as at the last, and to a little more near the logits.
SCALE_WEIGHTS, DEFAULT_TILT = (1.0, 1.65, 4.3), 0.25
CONSTRAINT = "shortfall_db"


@dataclass(frozen=True)
class Knobs:
    """What a trial sets. form "paper" and "drop last scale" are fixed points and ignore the rest.

    prices: for the last, second-last and third-last scale. tilt: see `assign`.
    """

    form: str = "priced"
    price_last: float = 30.0
    price_second: float = 30.0
    price_third: float = 30.0
    tilt: float = DEFAULT_TILT

    @property
    def prices(self) -> tuple[float, float, float]:
        return self.price_last, self.price_second, self.price_third


FORMS = ("priced", "paper", "drop last scale")


@dataclass(frozen=True)
class Verdict:
    """What the judge found: time, predicted shortfall (dB, <= 0 is good), and whether every search pair was looked at."""

    latency_ms: float
    shortfall_db: float
    psnr_db: float
    ssim: float
    complete: bool


@dataclass(frozen=True)
class Found:
    """A finished trial."""

    number: int
    knobs: Knobs
    verdict: Verdict


def open_study(folder: Path, space: str, seed: int, resume: bool) -> optuna.Study:
    """The study of `folder`, continued with `resume`; otherwise an older journal is set aside, not deleted.

    `space` names what trials mean (model, silicon, menu); a journal of another space is never mixed in.
    """
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    journal = folder / "trials.journal"
    if not resume:
        set_aside(journal)
    if journal.exists():
        cut_torn_tail(journal)
    # The caller holds the folder, so a lock still here is a killed run's; the journal would wait half a minute for it.
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0)
    study = optuna.create_study(
        study_name=space, storage=storage, sampler=sampler, direction="minimize", load_if_exists=True
    )  # fmt: skip
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # left by a killed run
    if len(study.get_trials(deepcopy=False)):
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), multivariate=True, n_startup_trials=0)
    return study


def join_study(shared: Shared, space: str) -> optuna.Study:
    """The study of `space` in a shared storage, made if it is not there yet.

    Samplers of runs that share a study must differ and know of one another's trials under way: no seed, a constant liar.
    """
    sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=0, constant_liar=True)
    study = optuna.create_study(
        study_name=space, storage=shared.storage, sampler=sampler, direction="minimize", load_if_exists=True
    )  # fmt: skip
    shared.stale(study)
    return study


@contextmanager
def unbroken() -> Iterator[None]:
    """Puts a Ctrl-C off until the journal is whole again and its lock released; the writes inside take milliseconds."""
    deaf = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # a shell's background job must not hear it
    if deaf or threading.current_thread() is not threading.main_thread():  # and only the main thread gets signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def finished(study: optuna.Study) -> list[Found]:
    """Every finished trial of the study, oldest first."""
    return _finished(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _finished(trials: Sequence[optuna.trial.FrozenTrial]) -> list[Found]:
    out = []
    for t in trials:
        if t.state == TrialState.COMPLETE and "knobs" in t.user_attrs:
            out.append(
                Found(t.number, Knobs(**json.loads(t.user_attrs["knobs"])), Verdict(**json.loads(t.user_attrs["verdict"])))
            )
    return out


def read_trials(folder: Path) -> list[Found]:
    """Finished trials of the newest search kept in `folder`; none if there is no journal."""
    journal = folder / "trials.journal"
    if not journal.exists():
        return []
    optuna.logging.set_verbosity(logging.ERROR)
    studies = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(studies)
    return finished(optuna.load_study(study_name=names[-1], storage=studies)) if names else []


def shared_trials(shared: Shared, model: str) -> dict[str, list[Found]]:
    """Finished trials of a storage's studies of a model, by the study's name (`tune` gives it: model, then a hash)."""
    names = [n for n in optuna.get_all_study_names(shared.storage) if n.rpartition("-")[0] == model]
    return {n: finished(optuna.load_study(study_name=n, storage=shared.storage)) for n in names}


def _suggest(trial: optuna.trial.Trial) -> Knobs:
    form = trial.suggest_categorical("form", FORMS)
    last, second, third = (
        trial.suggest_float(name, LOW_PRICE, HIGH_PRICE, log=True) for name in ("price_last", "price_second", "price_third")
    )
    tilt = trial.suggest_float("tilt", -2.0, 2.0)
    return Knobs(form, last, second, third, tilt) if form == "priced" else Knobs(form=form)


def search(
    study: optuna.Study, judge: Callable[[Knobs], Verdict], until: Callable[[], bool], tell: Callable[[Found], None],
    shared: Shared | None = None,
) -> None:  # fmt: skip
    """Runs trials until `until()`: fixed seeds, then a bisection of one common price, then TPE around what was found.

    Nothing finished is repeated, nor what another process of a `shared` study is at.
    """
    while not until():
        if shared:
            shared.stale(study)
        trials = study.get_trials(deepcopy=False)
        found = _finished(trials)
        with unbroken():
            planned = next_planned(found, _under_way(trials))
            if planned:  # a trial with its knobs from the first moment on, so that nobody takes them for free
                study.enqueue_trial(asdict(planned), user_attrs={"knobs": json.dumps(asdict(planned))})
            trial = study.ask()  # what another process enqueued a moment ago is as good
            knobs = _suggest(trial)
            known = [f.verdict for f in found if f.knobs == knobs]
            if known:  # a fixed point again: do not pay for it again, but let the sampler learn from it
                _tell(study, trial, knobs, known[-1])
                continue
            if _taken(study, trial, knobs):
                study.tell(trial, state=TrialState.FAIL)
                continue
        with shared.hold(study, trial) if shared else nullcontext():
            _judge_trial(study, trial, judge, knobs, tell)


def next_planned(found: Sequence[Found], under_way: Collection[Knobs]) -> Knobs | None:
    """The fixed seeds, then one common price by interpolation; None when all is known or under way."""
    known = {f.knobs for f in found}
    for seed in (Knobs(form="paper"), Knobs(form="drop last scale")):
        if seed not in known and seed not in under_way:
            return seed
    return _next_common_price(found, under_way)


def _common(price: float) -> Knobs:
    """One price, scales in a fixed ratio."""
    last, second, third = (min(price * weight, HIGH_PRICE) for weight in SCALE_WEIGHTS)
    return Knobs("priced", last, second, third, DEFAULT_TILT)


def _next_common_price(found: Sequence[Found], under_way: Collection[Knobs]) -> Knobs | None:
    """Towards the cheapest common price that meets the constraint, by the slope of the shortfall over the price's logarithm."""
    points = {f.knobs: f.verdict.shortfall_db for f in found}
    points |= {knobs: LIE_DB for knobs in under_way if knobs not in points}
    line = {math.log10(k.price_last): short for k, short in points.items() if k == _common(k.price_last)}
    missed = max(((at, short) for at, short in line.items() if short > 0), default=(-math.inf, 0.0))  # the dearest
    met = min(((at, short) for at, short in line.items() if short <= 0), default=(math.inf, 0.0))  # the cheapest
    if not line:
        return _common(FIRST_PRICE)
    if len(line) >= PRICE_STEPS or met[0] - missed[0] < CLOSE_ENOUGH:
        return None
    if math.isinf(missed[0] + met[0]):  # one side is still open: go as far as a typical slope says, a decade at most
        at, short = met if math.isinf(missed[0]) else missed
        at += min(1.0, max(-1.0, short / SLOPE_DB + (0.1 if short > 0 else -0.1)))
    else:
        at = met[0] + min(0.8, max(0.2, met[1] / (met[1] - missed[1]))) * (missed[0] - met[0])
    return _common(10**at) if math.log10(LOW_PRICE) <= at <= math.log10(HIGH_PRICE) else None


def _planned(trial: optuna.trial.FrozenTrial) -> Knobs | None:
    """Knobs written on a trial, None on the sampler's own until it is finished."""
    return Knobs(**json.loads(trial.user_attrs["knobs"])) if "knobs" in trial.user_attrs else None


def _under_way(trials: Sequence[optuna.trial.FrozenTrial]) -> set[Knobs]:
    return {knobs for t in trials if not t.state.is_finished() and (knobs := _planned(t))}


def _taken(study: optuna.Study, trial: optuna.trial.Trial, knobs: Knobs) -> bool:
    """True if someone else is at these knobs: of processes that chose the same at once, the lowest number keeps them.

    Numbers are given in the order in which trials become visible, knobs and all, so one of them always sees the other.
    """
    planned = "knobs" in trial.user_attrs
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING, TrialState.COMPLETE))
    return any(_planned(t) == knobs and (t.number < trial.number or not planned) for t in trials if t.number != trial.number)


def _judge_trial(
    study: optuna.Study, trial: optuna.trial.Trial, judge: Callable[[Knobs], Verdict], knobs: Knobs,
    tell: Callable[[Found], None],
) -> None:  # fmt: skip
    try:
        verdict = judge(knobs)
    except BaseException:
        with unbroken(), suppress(ValueError, UpdateFinishedTrialError):  # failed by another process
            # the constraint first: a trial without one would count as feasible
            trial.set_constraint(CONSTRAINT, 1e3)
            study.tell(trial, state=TrialState.FAIL)
        raise
    tell(Found(_tell(study, trial, knobs, verdict), knobs, verdict))


def _tell(study: optuna.Study, trial: optuna.trial.Trial, knobs: Knobs, verdict: Verdict) -> int:
    """Stores a verdict; its number, a new one if another process took this one for dead meanwhile."""
    attrs = {"knobs": json.dumps(asdict(knobs)), "verdict": json.dumps(asdict(verdict))}
    with unbroken():
        try:
            trial.set_constraint(CONSTRAINT, verdict.shortfall_db)
            for name, text in attrs.items():
                trial.set_user_attr(name, text)
            study.tell(trial, verdict.latency_ms)
            return trial.number
        except (ValueError, UpdateFinishedTrialError):  # this machine slept, say, and nothing finished may be lost
            study.add_trial(optuna.create_trial(
                value=verdict.latency_ms, params=trial.params, distributions=trial.distributions, user_attrs=attrs,
                constraints={CONSTRAINT: verdict.shortfall_db},
            ))  # fmt: skip
            return max(f.number for f in finished(study) if f.knobs == knobs)


def front(found: Sequence[Found]) -> list[Found]:
    """The Pareto front of fully judged trials: faster first, every next one closer to dense than all before (PSNR)."""
    out: list[Found] = []
    for f in sorted(found, key=lambda f: (f.verdict.latency_ms, -f.verdict.psnr_db)):
        if f.verdict.complete and (not out or f.verdict.psnr_db > out[-1].verdict.psnr_db):
            out.append(f)
    return out


def candidates(found: Sequence[Found]) -> list[Found]:
    """Fully judged trials that meet the constraint, fastest first; each set of knobs once."""
    unique = {f.knobs: f for f in found if f.verdict.complete and f.verdict.shortfall_db <= 0}
    return sorted(unique.values(), key=lambda f: f.verdict.latency_ms)
