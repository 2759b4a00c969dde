"""What each command is told: one frozen dataclass a command, made by parser.py alone. json: answer as one object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparvar_tune.measure.pairs import MOST_PAIRS
from sparvar_tune.ways.settings import Settings, seconds, whole

if TYPE_CHECKING:  # `doctor` runs where torch does not
    from sparvar_tune.ways.subject import Subject

if TYPE_CHECKING:
    from sparvar_tune.report.make import Request


@dataclass(frozen=True)
class TuneOptions:
    """subject: None for everything `load_profile(..., record_miss=True)` did not find on `gpu`."""

    subject: Subject | None
    gpu: str
    settings: Settings
    dry_run: bool


@dataclass(frozen=True)
class GenerateOptions:
    subject: Subject
    label: str | None
    seed: int
    out: Path
    profile: Path | None

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**62 - 1)


@dataclass(frozen=True)
class ShowOptions:
    """One of: gpus and models, the tables; trials, of the subject's last search or of a storage; a profile file; a subject's."""

    subject: Subject | None
    profile: Path | None
    seal: bool
    gpus: bool
    models: bool
    trials: bool
    storage: str | None
    json: bool = False

    def __post_init__(self) -> None:
        if self.gpus or self.models:
            return
        if self.storage and not self.trials:
            raise ValueError("show --storage: want --trials with it")
        if self.trials and self.subject is None:
            raise ValueError("show --trials: want --model M with it")
        if self.seal and self.profile is None:
            raise ValueError("show --seal: want --profile FILE, the edited file")
        if self.subject is None and self.profile is None:
            raise ValueError("show: want --model M, --profile FILE, --gpus or --models")


@dataclass(frozen=True)
class ExplainOptions:
    subject: Subject
    profile: Path | None
    json: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """budget_s: wall time. write: keep the new times as this user's profile."""

    subject: Subject
    profile: Path | None
    pairs: int
    budget_s: float
    write: bool
    json: bool = False

    def __post_init__(self) -> None:
        whole("pairs", self.pairs, 2, MOST_PAIRS)
        seconds(self.budget_s)


@dataclass(frozen=True)
class CompareOptions:
    """lpips: a safetensors file of its weights. out: Markdown; the raw numbers go beside it."""

    subject: Subject
    pairs: int
    lpips: Path | None
    out: Path | None
    json: bool = False

    def __post_init__(self) -> None:
        whole("pairs", self.pairs, 2, MOST_PAIRS)


@dataclass(frozen=True)
class ReportOptions:
    """request: what the report is made from; out: the file it goes to."""

    request: Request
    out: Path


@dataclass(frozen=True)
class CheckOptions:
    gpu: str
    json: bool = False


@dataclass(frozen=True)
class CheckAdapterOptions:
    """model: FILE.py:FUNCTION or an entry point's name. device: where it is opened."""

    model: str
    device: str

    def __post_init__(self) -> None:
        if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ValueError(f"--device: got {self.device[:40]!r}, want cpu or cuda")


@dataclass(frozen=True)
class DoctorOptions:
    json: bool = False
