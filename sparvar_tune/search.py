"""The search over policies: Optuna proposes knobs, a judge times and looks at pictures. Beside `replay` its only user.

Objective: milliseconds of the part of a generation that attention can change. Constraint: predicted shortfall of the
certified bound, <= 0 when met. Every finished trial is on disk before the next begins (Optuna's journal file), so
Ctrl-C or kill -9 loses at most the trial under way.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

LOW_PRICE, HIGH_PRICE = 0.03, 3000.0  # what a unit of relative squared error is worth, in dense times of a head
FIRST_PRICE = 25.0  # where it begins
SLOPE_DB = 4.0  # dB that a decade of price buys, for the first steps: on pocketvar 3 to 5
PRICE_STEPS, CLOSE_ENOUGH = 6, 0.06  # trials, decades
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
    if journal.exists() and not resume:
        journal.replace(folder / f"trials-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}.journal")
    if journal.exists():
        cut_torn_tail(journal)
    # The caller holds the folder, so a lock still here is a killed run's; the journal would wait half a minute for it.
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0)
    study = optuna.create_study(
        study_name=space, storage=storage, sampler=sampler, direction="minimize", load_if_exists=True
    )  # fmt: skip
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # left by a killed run
    if len(study.get_trials(deepcopy=False)):
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), multivariate=True, n_startup_trials=0)
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


def cut_torn_tail(journal: Path) -> None:
    """Removes a last line that a kill cut short; new lines would otherwise be glued onto it."""
    raw = journal.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end != len(raw):
        with journal.open("r+b") as file:
            file.truncate(end)


def finished(study: optuna.Study) -> list[Found]:
    """Every finished trial of the study, oldest first."""
    out = []
    for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        if "knobs" in t.user_attrs:
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


def _suggest(trial: optuna.trial.Trial) -> Knobs:
    form = trial.suggest_categorical("form", FORMS)
    last, second, third = (
        trial.suggest_float(name, LOW_PRICE, HIGH_PRICE, log=True) for name in ("price_last", "price_second", "price_third")
    )
    return Knobs(form, last, second, third, trial.suggest_float("tilt", -2.0, 2.0))


def search(
    study: optuna.Study, judge: Callable[[Knobs], Verdict], until: Callable[[], bool], tell: Callable[[Found], None]
) -> None:
    """Runs trials until `until()`: fixed seeds, then a bisection of one common price, then TPE around what was found.

    Seeds already finished (a resumed study) are not repeated.
    """
    for form in ("paper", "drop last scale"):
        if not any(f.knobs.form == form for f in finished(study)):
            if until():
                return
            _run(study, judge, Knobs(form=form), tell)
    _common_price(study, judge, until, tell)
    seen = {f.knobs for f in finished(study)}
    while not until():
        with unbroken():
            trial = study.ask()
            knobs = _suggest(trial)
        if knobs.form != "priced" or knobs in seen:  # the fixed points are known; do not pay for them again
            known = [f for f in finished(study) if f.knobs.form == knobs.form and (knobs.form != "priced" or f.knobs == knobs)]
            _tell(study, trial, knobs, known[-1].verdict)
            continue
        seen.add(knobs)
        _judge_trial(study, trial, judge, knobs, tell)


def _common_price(
    study: optuna.Study, judge: Callable[[Knobs], Verdict], until: Callable[[], bool], tell: Callable[[Found], None]
) -> None:
    """Finds the cheapest price that meets the constraint, scales in a fixed ratio, by the slope over the price's logarithm."""
    missed, met = (-math.inf, 0.0), (math.inf, 0.0)  # (log10 price, shortfall): the dearest that missed, the cheapest that met
    at = math.log10(FIRST_PRICE)
    for _ in range(PRICE_STEPS):
        price = min(max(10**at, LOW_PRICE), HIGH_PRICE)
        last, second, third = (min(price * weight, HIGH_PRICE) for weight in SCALE_WEIGHTS)
        knobs = Knobs("priced", last, second, third, DEFAULT_TILT)
        known = [f for f in finished(study) if f.knobs == knobs]
        if not known and until():
            return
        short = (known[0].verdict if known else _run(study, judge, knobs, tell)).shortfall_db
        missed, met = (missed, (at, short)) if short <= 0 else ((at, short), met)
        if math.isinf(missed[0] + met[0]):  # one side is still open: go as far as a typical slope says, a decade at most
            at += min(1.0, max(-1.0, short / SLOPE_DB + (0.1 if short > 0 else -0.1)))
        else:
            share = min(0.8, max(0.2, met[1] / (met[1] - missed[1])))
            at = met[0] + share * (missed[0] - met[0])
        if met[0] - missed[0] < CLOSE_ENOUGH or not math.log10(LOW_PRICE) <= at <= math.log10(HIGH_PRICE):
            return


def _run(study: optuna.Study, judge: Callable[[Knobs], Verdict], knobs: Knobs, tell: Callable[[Found], None]) -> Verdict:
    with unbroken():
        study.enqueue_trial(asdict(knobs))
        trial = study.ask()
        assert _suggest(trial) == knobs, "an enqueued trial came back changed"
    return _judge_trial(study, trial, judge, knobs, tell)


def _judge_trial(
    study: optuna.Study, trial: optuna.trial.Trial, judge: Callable[[Knobs], Verdict], knobs: Knobs,
    tell: Callable[[Found], None],
) -> Verdict:  # fmt: skip
    try:
        verdict = judge(knobs)
    except BaseException:
        with unbroken():
            # the constraint first: a trial without one would count as feasible
            trial.set_constraint(CONSTRAINT, 1e3)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    _tell(study, trial, knobs, verdict)
    tell(Found(trial.number, knobs, verdict))
    return verdict


def _tell(study: optuna.Study, trial: optuna.trial.Trial, knobs: Knobs, verdict: Verdict) -> None:
    with unbroken():
        trial.set_constraint(CONSTRAINT, verdict.shortfall_db)
        trial.set_user_attr("knobs", json.dumps(asdict(knobs)))
        trial.set_user_attr("verdict", json.dumps(asdict(verdict)))
        study.tell(trial, verdict.latency_ms)


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
