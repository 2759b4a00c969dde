"""From what was asked for to the report's text: finds profile, trials and logs, draws pictures, renders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparvar_tune.catalog.inputs import end_of
from sparvar_tune.catalog.names import DEFAULT_PRESET, PRESETS
from sparvar_tune.profile import store
from sparvar_tune.profile.schema import Profile, ProfileError
from sparvar_tune.report import pictures, sources
from sparvar_tune.report.cost import Load
from sparvar_tune.report.facts import Facts
from sparvar_tune.report.render import need_libraries, to_html, to_markdown
from sparvar_tune.runtime.demote import demotions
from sparvar_tune.ways.subject import Subject

if TYPE_CHECKING:
    import pandas

FORMATS = {"html": (".html", ".htm"), "md": (".md", ".markdown")}  # what a report can be, and how its file's name may end


@dataclass(frozen=True)
class ReportRequest:
    """subject: what is looked up where no file is named. profiles: files, the first is the report's own, the others stand
    beside it. trials: a journal or CSV; log: of launch measurements; None for what this machine's last search left.
    traces, compared: files of `trace` and `compare`. pictures: how many pairs.
    """

    subject: Subject | None = None
    profiles: tuple[Path, ...] = ()
    format: str = "html"
    trials: Path | None = None
    log: Path | None = None
    traces: tuple[Path, ...] = ()
    compared: Path | None = None
    pictures: int = 2
    load: Load = field(default_factory=Load)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"--format: got {self.format[:20]!r}, want one of {', '.join(FORMATS)}")
        if not 0 <= self.pictures <= pictures.MOST:
            raise ValueError(f"--pictures: got {self.pictures}, want 0..{pictures.MOST}")
        if self.subject is None and not self.profiles:
            raise ValueError("report: want --model M or --profile FILE")


def format_for(out: Path | None, asked: str | None = None) -> str:
    """The format of a report that goes to `out`: that of the name's end, else what was asked for, else HTML.

    Raises ValueError for a name that ends as none of them, or as another than was asked for.
    """
    formats = {end: name for name, ends in FORMATS.items() if asked in (None, name) for end in ends}
    end = end_of("--out", out, formats) if out is not None else ""
    return formats[end] if end else asked or "html"


def make(request: ReportRequest, status: Callable[[str], None] = lambda text: None) -> str:
    """The report's text. Raises ValueError, one line, for everything that is missing, damaged or of another model."""
    need_libraries(request.format)
    facts = gather(request, status)
    return to_html(facts) if request.format == "html" else to_markdown(facts)


def gather(request: ReportRequest, status: Callable[[str], None] = lambda text: None) -> Facts:
    """Everything a report is made from. Raises ValueError as `make` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say stands in the report
        own, others, path, here, demoted = _files(request) if request.profiles else _found(request)
        subject = request.subject or _subject_of(own)
        drawn, why = pictures.draw(subject, own, path, request.pictures if request.format == "html" else 0, status)
    trials, trials_from = _trials(request, own)
    measurements = _measurements(request)
    gpu, model = own.silicon.gpu, own.workload.model
    return Facts(
        own, f"{path.parent.name}/{path.name}", demoted, request.load, here, others, trials, trials_from, measurements,
        sources.read_traces(request.traces, {gpu, subject.gpu.slug if subject else gpu}, model),
        tuple(sources.read_comparison(request.compared, gpu, model)) if request.compared else (), drawn, why,
    )  # fmt: skip


_Found = tuple[Profile, tuple[Profile, ...], Path, tuple[str, ...], dict[int, str]]


def _files(request: ReportRequest) -> _Found:
    """The named files: all of one model, size and GPU."""
    loaded = [store.load(path) for path in request.profiles]
    own, wanted = loaded[0], request.subject
    if wanted is not None and wanted.model.slug != own.workload.model:
        got = f"{request.profiles[0]}: for model {own.workload.model}, not {wanted.model.slug}"
        raise ProfileError(f"{got}; give that model or another file")
    for path, profile in zip(request.profiles[1:], loaded[1:], strict=True):
        if _kind(profile) != _kind(own):
            got = f"{path}: for {' '.join(_kind(profile))}, the report is of {' '.join(_kind(own))}"
            raise ProfileError(f"{got}; make one for each")
    return own, tuple(loaded[1:]), request.profiles[0], (), demotions(own, None, own.silicon.capability)


def _kind(profile: Profile) -> tuple[str, ...]:
    w = profile.workload
    return w.model, w.resolution, w.aspect, f"batch {w.batch}", f"on {profile.silicon.gpu}"


def _found(request: ReportRequest) -> _Found:
    """What `load_profile` finds for the subject, and the other presets' profiles of the same silicon."""
    subject = request.subject
    assert subject is not None
    tuned = subject.load()
    if tuned.profile is None or tuned.path is None:
        todo = f"run sparvar-tune --gpu {subject.gpu.slug} --model {subject.model.slug}"
        raise ValueError(f"nothing to report: {'; '.join(tuned.reasons)}; {todo}")
    others = []
    for quality in PRESETS:
        other = subject.load(quality=quality).profile if quality != subject.quality else None
        if other is not None and _kind(other) == _kind(tuned.profile):
            others.append(other)
    here = tuple(reason for reason in tuned.reasons if not reason.startswith("from "))
    return tuned.profile, tuple(others), tuned.path, here, tuned.demoted


def _subject_of(profile: Profile) -> Subject | None:
    """What a file is of, None where the catalogue does not know it."""
    w, quality = profile.workload, profile.preset if profile.preset in PRESETS else DEFAULT_PRESET
    try:
        return Subject.of(w.model, profile.silicon.gpu, quality, w.resolution, w.aspect)
    except ValueError:
        return None


def _trials(request: ReportRequest, own: Profile) -> tuple[pandas.DataFrame | None, str]:
    """The trials and whose they are; of what nobody named, a file that cannot be read is said and left out."""
    if request.trials is not None:
        return sources.read_trials(request.trials, own.workload.model), f"those of {request.trials.name}"
    journal = _left_by_the_last_run(request, "trials.journal")
    if journal is None:
        return None, ""
    try:
        return sources.read_trials(journal, own.workload.model), "those of the last search on this machine"
    except ValueError as error:
        return None, f"none; {error}"


def _measurements(request: ReportRequest) -> sources.Measurements | None:
    if request.log is not None:
        return sources.read_measurements(request.log)
    found = _left_by_the_last_run(request, "measurements.jsonl")
    return sources.read_measurements(found) if found else None


def _left_by_the_last_run(request: ReportRequest, name: str) -> Path | None:
    if request.subject is None or request.profiles:
        return None  # a named file is perhaps another machine's
    path = request.subject.run_folder() / name
    return path if path.is_file() else None
