"""What each command is told: one frozen dataclass a command, made by parser.py alone. json: answer as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparvar_tune.catalog.inputs import end_of, whole
from sparvar_tune.measure.pairs import MOST_PAIRS
from sparvar_tune.ways.settings import Settings, check_weights, seconds

if TYPE_CHECKING:  # `doctor` runs where torch does not
    from sparvar_tune.ways.subject import Subject

if TYPE_CHECKING:
    from sparvar_tune.report.make import ReportRequest


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
        end_of("--out", self.out, (".png",))


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
    """metric_weights: of metrics to take as well, where the weights are. out: Markdown; the raw numbers go beside it."""

    subject: Subject
    pairs: int
    metric_weights: Mapping[str, Path]
    out: Path | None
    json: bool = False

    def __post_init__(self) -> None:
        whole("pairs", self.pairs, 2, MOST_PAIRS)
        if self.out is not None:
            end_of("--out", self.out, (".md", ".markdown"))
        check_weights(self.metric_weights)


@dataclass(frozen=True)
class ReportOptions:
    """request: what the report is made from; out: the file it goes to."""

    request: ReportRequest
    out: Path


@dataclass(frozen=True)
class TraceOptions:
    """asked: the model as it was typed. tell: who hears of the ranges, of TRACERS. way: of WAYS. layer: one layer on random
    inputs, None for a picture where the model can be run. label: None for the first class. graph: captured in CUDA graphs
    and replayed. cold: the first run, planning included.
    """

    subject: Subject
    asked: str
    profile: Path | None
    tell: str
    way: str
    layer: int | None
    label: str | None
    seed: int
    graph: bool
    cold: bool
    out: Path
    json: bool

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**62 - 1)
        if self.layer is not None:
            whole("layer", self.layer, 0, self.subject.model.layers - 1)
        if self.graph and self.subject.gpu.slug == "cpu":
            raise ValueError("trace --mode graph: want a CUDA GPU; a CPU has no CUDA graphs")
        if self.graph and self.is_picture:
            raise ValueError("trace --mode graph: want --layer N; a whole picture is not captured")
        if self.is_picture and (reason := self.subject.why_not_images()):
            raise ValueError(reason)
        if self.profile is not None and self.way != "tuned":
            raise ValueError(f"trace --profile: runs with --way tuned, got --way {self.way}")

    @property
    def is_picture(self) -> bool:
        """A whole picture is drawn; else it is one layer."""
        return self.layer is None and self.subject.open is not None

    @property
    def words(self) -> list[str]:
        """The command line that traces the same with NVTX ranges, for a tool to run under itself."""
        s = self.subject
        given = {"--model": self.asked, "--gpu": s.asked, "--quality": s.quality, "--resolution": s.resolution,
                 "--aspect": s.aspect, "--images": s.images, "--profile": self.profile, "--way": self.way, "--layer": self.layer,
                 "--class": self.label, "--seed": self.seed, "--mode": "graph" if self.graph else "eager", "--out": self.out,
                 "--with": "nvtx"}  # fmt: skip
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        return ["trace", *words, *["--cold"] * self.cold]


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
        from sparvar_tune.catalog.gpus import check_device  # not before `doctor`, which runs where torch does not

        check_device(self.device)


@dataclass(frozen=True)
class BenchOptions:
    """baseline: the file to compare with, or with `write` to write; None only measures."""

    subject: Subject
    profile: Path | None
    baseline: Path | None
    write: bool
    json: bool = False

    def __post_init__(self) -> None:
        if self.write and self.baseline is None:
            raise ValueError("bench --write: want --baseline FILE, the file to write")


@dataclass(frozen=True)
class DoctorOptions:
    json: bool = False


@dataclass(frozen=True)
class CaptureOptions:
    """scales: those recorded, () for the last two. out: a safetensors file."""

    subject: Subject
    label: str | None
    seed: int
    scales: tuple[int, ...]
    out: Path
    dry_run: bool

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**62 - 1)
        end_of("--out", self.out, (".safetensors",))
