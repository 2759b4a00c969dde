"""The search over policies: Optuna proposes knobs, a judge times and looks at pictures.

Objective: time of the part of a generation that attention can change, over the dense time measured beside it. Constraint:
predicted shortfall of the certified bound, <= 0 when met. Every finished trial is stored before the next begins (a journal
file of this run, or a storage shared by several runs), so Ctrl-C or kill -9 loses at most the trial under way. A trial that
raises is kept as failed, with the reason, and never asked for again.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from sparvar_tune.policy_search.planned_trials import FIXED_POINTS, NO_LIMIT, STEPS, next_planned, roomy
from sparvar_tune.policy_search.storage import JournalFile, Shared, cut_torn_tail
from sparvar_tune.policy_search.trial import HIGH_PRICE, LOW_PRICE, FailedTrial, FinishedTrial, Knobs, Verdict, from_json
from sparvar_tune.profile.files import set_aside
from sparvar_tune.profile.schema import one_line

CONSTRAINT = "shortfall_db"
FAILURES_IN_A_ROW = 20  # of one process: then it is not the policies that are broken


def open_study(
    folder: Path, space: str, seed: int, resume: bool, say: Callable[[str], None] = lambda text: None
) -> optuna.Study:  # fmt: skip
    """The study of `folder`, continued with `resume`; otherwise an older journal is set aside, not deleted.

    `space` names what trials mean (model, silicon, menu); a journal of another space is never mixed in. One that cannot be
    read is set aside as well, and `say` gets the line. Raises OSError.
    """
    journal = folder / "trials.journal"
    if not resume:
        set_aside(journal)
    # The caller holds the folder, so a lock still here is a killed run's; the journal would wait half a minute for it.
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    try:
        if journal.exists():
            _why_no_journal(journal)
            cut_torn_tail(journal)
        study = _create(journal, space)
    except DamagedJournal as error:
        set_aside(journal)
        say(f"{error}; it was set aside and the search begins anew")
        study = _create(journal, space)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # left by a killed run
    before = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed + before, multivariate=True, n_startup_trials=0)
    return study


class DamagedJournal(ValueError):
    """A journal of trials that cannot be read: one line, the file and why."""


def _why_no_journal(journal: Path) -> None:
    """Raises DamagedJournal where the file is no journal at all, before anything takes its last line for a torn one."""
    if not journal.is_file():
        raise DamagedJournal(f"{journal}: not a file of trials")
    with journal.open("rb") as file:
        if file.read(2) not in (b"", b"{", b'{"'):
            raise DamagedJournal(f"{journal}: not a journal of Optuna")


@contextmanager
def _reading(journal: Path) -> Iterator[JournalStorage]:
    """The storage of a journal. What Optuna raises for a damaged one, or a later Optuna's, has no common kind."""
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        yield JournalStorage(JournalFile(journal))
    except OSError:
        raise
    except Exception as error:
        raise DamagedJournal(f"{journal}: cannot be read ({_reason(error)})") from None


def _create(journal: Path, space: str) -> optuna.Study:
    """The study, made if it is not there yet. Raises DamagedJournal, also for trials nobody can read."""
    with _reading(journal) as storage:
        study = optuna.create_study(study_name=space, storage=storage, direction="minimize", load_if_exists=True)
        for trial in study.get_trials(deepcopy=False):
            _read(trial)
    return study


def _reason(error: Exception) -> str:
    """One line about what was raised."""
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)[:200]


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


def finished(study: optuna.Study) -> list[FinishedTrial]:
    """Every finished trial of the study, oldest first."""
    return _finished(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def failed(study: optuna.Study) -> list[FailedTrial]:
    """Every trial of the study that failed by itself (not by a kill), oldest first."""
    return _failed(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))


def _finished(trials: Sequence[optuna.trial.FrozenTrial]) -> list[FinishedTrial]:
    return [read for t in trials if isinstance(read := _read_or_none(t), FinishedTrial)]


def _failed(trials: Sequence[optuna.trial.FrozenTrial]) -> list[FailedTrial]:
    return [read for t in trials if isinstance(read := _read_or_none(t), FailedTrial)]


def _read(trial: optuna.trial.FrozenTrial) -> FinishedTrial | FailedTrial | Knobs | None:
    """What a trial says: how it ended or, until then, what it is at; None where it has said nothing. Raises ValueError."""
    attrs = trial.user_attrs
    if "knobs" not in attrs:
        return None
    try:
        knobs = from_json(Knobs, attrs["knobs"])
        if trial.state == TrialState.COMPLETE:
            return FinishedTrial(trial.number, knobs, from_json(Verdict, attrs["verdict"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"trial {trial.number} cannot be read ({_reason(error)})") from None
    if trial.state == TrialState.FAIL:  # without a reason a process was killed at it: someone may try again
        return FailedTrial(trial.number, knobs, str(attrs["failure"])) if "failure" in attrs else None
    return knobs


def _read_or_none(trial: optuna.trial.FrozenTrial) -> FinishedTrial | FailedTrial | Knobs | None:
    """`_read`, where one trial of a shared storage that is damaged must not end everybody's search."""
    try:
        return _read(trial)
    except ValueError:
        return None


def read_trials(folder: Path) -> list[FinishedTrial]:
    """Finished trials of the newest search kept in `folder`; none if there is no journal. Raises DamagedJournal."""
    journal = folder / "trials.journal"
    return read_journal(journal)[1] if journal.exists() else []


def read_journal(journal: Path) -> tuple[str, list[FinishedTrial]]:
    """The newest study's name (`tune` gives it: model, then a hash; "" where there is none) and its finished trials.

    Nothing is written, so the folder may be read-only; a last line that a kill cut short is not counted. Raises DamagedJournal.
    """
    _why_no_journal(journal)
    with _reading(journal) as studies:
        names = optuna.get_all_study_names(studies)
        trials = optuna.load_study(study_name=names[-1], storage=studies).get_trials(deepcopy=False) if names else []
        return names[-1] if names else "", [read for t in trials if isinstance(read := _read(t), FinishedTrial)]


def shared_trials(shared: Shared, model: str) -> dict[str, list[FinishedTrial]]:
    """Finished trials of a storage's studies of a model, by the study's name (`tune` gives it: model, then a hash)."""
    names = [n for n in optuna.get_all_study_names(shared.storage) if n.rpartition("-")[0] == model]
    return {n: finished(optuna.load_study(study_name=n, storage=shared.storage)) for n in names}


def _suggest(
    trial: optuna.trial.Trial, points: Sequence[str], steps: Mapping[str, tuple[str, ...]], within: Sequence[str],
    room: Sequence[str],
) -> Knobs:  # fmt: skip
    """within: steps that keep the bound (`roomy`), without which no stronger ones are taken. room: those to put attention on."""
    form = trial.suggest_categorical("form", ("priced", *points))
    form = form if set(steps.get(form, ())) <= set(within) else "priced"
    last, second, third = (
        trial.suggest_float(name, LOW_PRICE, HIGH_PRICE, log=True) for name in ("price_last", "price_second", "price_third")
    )
    tilt = trial.suggest_float("tilt", -2.0, 2.0)
    chosen = trial.suggest_categorical("steps", ("", *steps)) if within else ""
    chosen = chosen if chosen in room else ""
    return Knobs(form, last, second, third, tilt, chosen) if form == "priced" else Knobs(form=form)


def search(
    study: optuna.Study, judge: Callable[[Knobs], Verdict], until: Callable[[], bool], tell: Callable[[FinishedTrial], None],
    shared: Shared | None = None, *, points: Sequence[str] = FIXED_POINTS, steps: Mapping[str, tuple[str, ...]] = STEPS,
    saves: Mapping[str, float] = NO_LIMIT, tell_failed: Callable[[FailedTrial], None] = lambda trial: None,
    foresee: Callable[[Sequence[FinishedTrial], str], Knobs | None] = lambda found, name: None,
) -> None:  # fmt: skip
    """Runs trials until `until()`: the fixed `points`, then a bisection of one common price, then what `foresee` makes of these
    (given the trials and the name of steps, or ""), then TPE around what was found.

    steps: those of the points that are generation steps alone, each with the weaker ones it comes after. The picture's error
    budget is one: where steps alone keep within the bound, prices for attention are looked for on top of them as well, unless all
    that attention may save there (`saves`, by steps, of the dense time) would leave them slower than the best.

    Nothing finished or failed is repeated, nor what another process of a `shared` study is at. What `judge` raises ends its
    trial alone; after FAILURES_IN_A_ROW of them the search ends. Raises what the storage raises, and KeyboardInterrupt.
    """
    in_a_row = 0
    while not until() and in_a_row < FAILURES_IN_A_ROW:
        if shared:
            shared.stale(study)
        trials = study.get_trials(deepcopy=False)
        found, broken = _finished(trials), {f.knobs for f in _failed(trials)}
        planned = next_planned(found, _under_way(trials) | broken, points, steps, saves, foresee)
        with unbroken():
            if planned:  # a trial with its knobs from the first moment on, so that nobody takes them for free
                study.enqueue_trial(asdict(planned), user_attrs={"knobs": json.dumps(asdict(planned))})
            trial = study.ask()  # what another process enqueued a moment ago is as good
            knobs = _suggest(trial, points, steps, roomy(found, steps), roomy(found, steps, saves))
            known = [f.verdict for f in found if f.knobs == knobs]
            if known:  # a fixed point again: do not pay for it again, but let the sampler learn from it
                _tell(study, trial, knobs, known[-1])
                continue
            if knobs in broken or _taken(study, trial, knobs):
                trial.set_constraint(CONSTRAINT, 1e3)  # one without would count as feasible
                study.tell(trial, state=TrialState.FAIL)
                continue
        with shared.hold(study, trial) if shared else nullcontext():
            ended = _judge_trial(study, trial, judge, knobs)
        in_a_row = in_a_row + 1 if isinstance(ended, FailedTrial) else 0
        if isinstance(ended, FailedTrial):
            tell_failed(ended)
        else:
            tell(ended)


def _planned(trial: optuna.trial.FrozenTrial) -> Knobs | None:
    """Knobs written on a trial, None on the sampler's own until it is finished."""
    read = _read_or_none(trial)
    return read.knobs if isinstance(read, FinishedTrial | FailedTrial) else read


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
    study: optuna.Study, trial: optuna.trial.Trial, judge: Callable[[Knobs], Verdict], knobs: Knobs
) -> FinishedTrial | FailedTrial:  # fmt: skip
    """Judges and stores. Raises only what is not the policy's fault: an interrupt, or a storage that cannot be written."""
    try:
        verdict = judge(knobs)
        if why := verdict.why_not():
            raise ValueError(why)
    except Exception as error:
        reason = _reason(error)
        return FailedTrial(_tell_failed(study, trial, knobs, reason), knobs, reason)
    except BaseException:
        with unbroken(), suppress(ValueError, UpdateFinishedTrialError):  # failed by another process
            trial.set_constraint(CONSTRAINT, 1e3)
            study.tell(trial, state=TrialState.FAIL)
        raise
    return FinishedTrial(_tell(study, trial, knobs, verdict), knobs, verdict)


def _tell_failed(study: optuna.Study, trial: optuna.trial.Trial, knobs: Knobs, reason: str) -> int:
    """Stores a failure as `_tell` stores a verdict; its number."""
    attrs = {"knobs": json.dumps(asdict(knobs)), "failure": reason}
    with unbroken():
        try:
            trial.set_constraint(CONSTRAINT, 1e3)  # first: a trial without one would count as feasible
            for name, text in attrs.items():
                trial.set_user_attr(name, text)
            study.tell(trial, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            study.add_trial(optuna.create_trial(
                state=TrialState.FAIL, params=trial.params, distributions=trial.distributions, user_attrs=attrs,
                constraints={CONSTRAINT: 1e3},
            ))  # fmt: skip
            return max(f.number for f in failed(study) if f.knobs == knobs)
        return trial.number


def _tell(study: optuna.Study, trial: optuna.trial.Trial, knobs: Knobs, verdict: Verdict) -> int:
    """Stores a verdict; its number, a new one if another process took this one for dead meanwhile."""
    attrs = {"knobs": json.dumps(asdict(knobs)), "verdict": json.dumps(asdict(verdict))}
    with unbroken():
        try:
            trial.set_constraint(CONSTRAINT, verdict.shortfall_db)
            for name, text in attrs.items():
                trial.set_user_attr(name, text)
            study.tell(trial, verdict.time_ratio)
            return trial.number
        except (ValueError, UpdateFinishedTrialError):  # this machine slept, say, and nothing finished may be lost
            study.add_trial(optuna.create_trial(
                value=verdict.time_ratio, params=trial.params, distributions=trial.distributions, user_attrs=attrs,
                constraints={CONSTRAINT: verdict.shortfall_db},
            ))  # fmt: skip
            return max(f.number for f in finished(study) if f.knobs == knobs)
