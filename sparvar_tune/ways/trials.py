"""The trials of searches as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparvar_tune.policy_search.storage import one_line, open_existing, place
from sparvar_tune.policy_search.study import read_trials, shared_trials
from sparvar_tune.policy_search.trial import FinishedTrial, Verdict, front
from sparvar_tune.ways.subject import Subject

if TYPE_CHECKING:
    import pandas


def trials_of(subject: Subject, storage: str | None = None) -> pandas.DataFrame:
    """The finished trials of this user's last search of the subject, or of every study of its model in a shared storage.

    One row a trial; columns `trial`, what it set, what was found (time over dense time beside it, PSNR in dB), and `front`:
    whether it is on the front of time against PSNR; of a storage also `study`. Raises ValueError where there are none.
    """
    if storage:
        with one_line(storage):
            studies: Mapping[str, Sequence[FinishedTrial]] = shared_trials(open_existing(storage), subject.model.slug)
        where = f"in {place(storage)}"
    else:
        studies = {"": read_trials(subject.run_folder())}
        where = f"on {subject.gpu.slug} ({subject.quality})"
    if not any(studies.values()):
        raise ValueError(f"no trials of {subject.model.slug} {where} yet; run sparvar-tune first")
    return trials_frame(studies)


def flat(verdict: Verdict) -> dict[str, Any]:
    """A verdict's values, its means by metric."""
    return {name: value for name, value in vars(verdict).items() if name != "means"} | verdict.means


def trials_frame(studies: Mapping[str, Sequence[FinishedTrial]]) -> pandas.DataFrame:
    """One row a trial, by study where it has a name."""
    import pandas

    rows: list[dict[str, Any]] = []
    for name, found in studies.items():
        best, study = front(found), {"study": name} if name else {}
        rows += [study | {"trial": f.number, **vars(f.knobs), **flat(f.verdict), "front": f in best} for f in found]
    return pandas.DataFrame(rows)
