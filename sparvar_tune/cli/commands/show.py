"""The command `show`: a profile in words, the tables of GPUs and models, the trials of a search as CSV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparvar_tune.catalog import gpus, models
from sparvar_tune.cli.console import note, print_profile, say
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import print_answer
from sparvar_tune.cli.options import ShowOptions
from sparvar_tune.profile import store
from sparvar_tune.profile.schema import Profile, ProfileError, plain


@dataclass(frozen=True)
class GpuRow:
    """Of the GPU table; numbers are None for the CPU."""

    slug: str
    name: str
    family: str
    capability: tuple[int, int] | None
    sms: int | None
    memory_gbps: float | None
    bf16_tflops: float | None

    @property
    def words(self) -> str:
        rates = "measured, not predicted"
        if self.sms:
            rates = f"{self.sms} SMs, {self.memory_gbps:g} GB/s, {self.bf16_tflops:g} TFLOP/s bf16"
        return f"{self.slug:12} {self.name:28} {rates}"


@dataclass(frozen=True)
class ModelRow:
    """Of the model table. aspects: by resolution."""

    slug: str
    layers: int
    heads: int
    head_dim: int
    dtype: str
    aspects: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def words(self) -> str:
        sizes = ", ".join(r if len(names) == 1 else f"{r} ({len(names)} aspects)" for r, names in self.aspects)
        return f"{self.slug:15} {self.layers} layers, {self.heads} x {self.head_dim} heads, {self.dtype}; {sizes}"


@dataclass(frozen=True)
class ShowAnswer:
    """One of the four, the others None: a profile's file and what it holds, the tables, the trials (their columns by name)."""

    path: str | None = None
    profile: dict[str, Any] | None = None
    gpus: tuple[GpuRow, ...] | None = None
    models: tuple[ModelRow, ...] | None = None
    trials: tuple[dict[str, Any], ...] | None = None


def run(options: ShowOptions) -> ExitCode:
    if options.gpus or options.models:
        _show_tables(options)
    elif options.trials:
        _show_trials(options)
    else:
        profile, path = _profile_of(options)
        if options.json:
            print_answer("show", ExitCode.DONE, ShowAnswer(str(path)), {"profile": plain(profile)})  # every digit of the file
        else:
            print_profile(profile, path)
    return ExitCode.DONE


def _profile_of(options: ShowOptions) -> tuple[Profile, Path]:
    if options.profile:
        if options.seal:
            _seal(options.profile)
            text = f"{options.profile}: sealed: it has the checksum of what it now says, for which nobody measured anything"
            (note if options.json else say)(text)
        return store.load(options.profile), options.profile
    subject = options.subject
    assert subject
    tuned = subject.load()
    if tuned.profile is None or tuned.path is None:
        todo = f"run sparvar-tune --gpu {subject.gpu.slug} --model {subject.model.slug}"
        raise ValueError(f"nothing to show: {'; '.join(tuned.reasons)}; {todo}")
    return tuned.profile, tuned.path


def _seal(path: Path) -> None:
    """Seals an edited file. Raises ValueError for one that nobody edited: what was measured is not called unmeasured."""
    try:
        store.load(path)
    except ProfileError:
        store.seal(path)
    else:
        raise ValueError(f"{path}: nothing to seal: its checksum is that of its values")


def _show_trials(options: ShowOptions) -> None:
    from sparvar_tune.ways.trials import trials_of

    assert options.subject
    frame = trials_of(options.subject, options.storage)
    if options.json:
        print_answer("show", ExitCode.DONE, ShowAnswer(trials=tuple(json.loads(frame.to_json(orient="records")))))
    else:
        say(frame.to_csv(index=False, float_format="%.5g").rstrip())


def _show_tables(options: ShowOptions) -> None:
    silicon = tuple(
        GpuRow(g.slug, g.name, g.family, g.capability, g.sms, g.memory_gbps, g.bf16_tflops) for g in gpus.GPUS.values()
    ) if options.gpus else None  # fmt: skip
    known = tuple(
        ModelRow(m.slug, m.layers, m.heads, m.head_dim, m.dtype, tuple((r, tuple(a)) for r, a in m.resolutions.items()))
        for m in models.MODELS.values()
    ) if options.models else None  # fmt: skip
    if options.json:
        print_answer("show", ExitCode.DONE, ShowAnswer(gpus=silicon, models=known))
        return
    for line in (*(row.words for row in silicon or ()), *(row.words for row in known or ())):
        say(line)
