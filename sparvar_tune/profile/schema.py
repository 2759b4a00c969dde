"""What a tuned profile holds, field by field, and its text form; see profiles.py for the files.

A profile has two halves: the `policy` (which head does what at which scale, GPU-independent, with its evidence) and the
`rows` (how that runs on one GPU, with times). It is plain JSON with sorted keys; every field is checked when read, what is
not known is refused, and nothing in it is ever executed. A checksum of all values tells a damaged digit from a measured one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparvar_kernels.backends.registry import KERNELS
from sparvar_kernels.backends.registry import why_not as why_not_launch
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import Variant, variant_to_dict
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.metrics import known_metric
from sparvar_tune.catalog.models import Model
from sparvar_tune.catalog.names import CUSTOM, PRESETS, shown
from sparvar_tune.profile.identity import used_by
from sparvar_tune.profile.older import as_today
from sparvar_tune.profile.reader import Reader, ReadError, sealed_text, to_plain, unique_keys, why_not_sealed

if TYPE_CHECKING:
    import pandas

SCHEMA = 3  # 2: without meanings, binaries and the evidence's own date, which are taken from what there is
MAX_MESSAGE = 400  # characters of a reason; a damaged file may hold a megabyte of text in one field
MODES = ("eager", "graph")
MAX_NUMBER = 1 << 20  # no window, tile side or stride of a policy is larger


class ProfileError(ValueError):
    """A profile file that cannot be used or written: one line that says what, where and what to do."""


@dataclass(frozen=True)
class Timing:
    """Quantiles of n repetitions, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    n: int

    def why_not(self) -> str | None:
        if not 0 < self.p20_ms <= self.p50_ms <= self.p80_ms < 1e9:
            return f"got p20 {self.p20_ms}, p50 {self.p50_ms}, p80 {self.p80_ms} ms; want 0 < p20 <= p50 <= p80"
        return None if self.n >= 1 else f"n: got {self.n}, want >= 1"


@dataclass(frozen=True)
class Speedup:
    """Median of dense / tuned over n pairs timed side by side, with a 95 % interval."""

    median: float
    low: float
    high: float
    n: int

    def why_not(self) -> str | None:
        if not 0 < self.low <= self.median <= self.high < 1e6:
            return f"got low {self.low}, median {self.median}, high {self.high}; want 0 < low <= median <= high"
        return None if self.n >= 1 else f"n: got {self.n}, want >= 1"


@dataclass(frozen=True)
class Yardstick:
    """A known damage to the dense picture: mean PSNR (dB) and SSIM."""

    name: str
    psnr_db: float
    ssim: float

    def why_not(self) -> str | None:
        if not 0 <= self.psnr_db <= 200 or not -1 <= self.ssim <= 1:
            return f"got PSNR {self.psnr_db} dB and SSIM {self.ssim}; want 0..200 and -1..1"
        return None


@dataclass(frozen=True)
class Measured:
    """One metric over the pairs: its mean, the one-sided confidence bound of the mean on the side away from dense (None: not
    taken), and what that bound had to reach (None: nothing).
    """

    mean: float
    bound: float | None
    required: float | None


def _why_not_measured(name: str, m: Measured) -> str | None:
    """Why these numbers are none of the metric, or None; of a metric that only its tuner knows, the order must fit."""
    known = known_metric(name)
    sign = known.sign if known else 1 if m.bound is None or m.bound <= m.mean else -1
    if known and not known.least <= m.mean <= known.high:
        return f"mean: got {m.mean}, want {known.least:g}..{known.high:g}"
    if m.bound is not None and sign * (m.mean - m.bound) < 0:
        return f"bound: got {m.bound}, which is closer to dense than the mean, {m.mean}"
    if m.required is None:
        return None
    if known and (reason := known.why_not_bound(m.required)):
        return f"required: {reason}"
    if m.bound is None or sign * (m.bound - m.required) < 0:
        return f"required: the bound, {m.bound}, does not reach {m.required}"
    return None


@dataclass(frozen=True)
class Evidence:
    """Fidelity of the tuned pictures against dense ones over n held-out (class, seed) pairs the search never saw.

    metrics: by name, those of `catalog/metrics.py`; bounds hold with `confidence`.
    measured: the date; weights_sha256, meaning: of the model and of the variants the pictures were drawn with. Evidence that
    is carried on keeps all three.
    """

    n: int
    confidence: float
    metrics: tuple[tuple[str, Measured], ...]
    data_hash: str
    yardsticks: tuple[Yardstick, ...]
    measured: str
    weights_sha256: str | None
    meaning: tuple[tuple[str, int], ...]

    def of(self, metric: str) -> Measured:
        """What was measured of it; raises ValueError where nothing was."""
        for name, measured in self.metrics:
            if name == metric:
                return measured
        raise ValueError(f"{metric}: the evidence has {', '.join(name for name, _ in self.metrics) or 'nothing'}")

    def certified(self) -> dict[str, float]:
        """The bounds it says the means have, by metric: of those that were asked for."""
        return {name: m.bound for name, m in self.metrics if m.bound is not None and m.required is not None}

    def why_not(self) -> str | None:
        if self.n < 2:
            return f"n: got {self.n}, want >= 2"
        if not 0.5 <= self.confidence < 1:
            return f"confidence: got {self.confidence}, want 0.5..1"
        for name, measured in self.metrics:
            if reason := _why_not_measured(name, measured):
                return f"metrics.{name}: {reason}"
        if all(measured.required is None for _, measured in self.metrics):
            return "metrics: want one at least that had to reach something"
        if not is_date(self.measured):
            return f'measured: got {self.measured!r}, want a date such as "2026-11-23"'
        if self.weights_sha256 is not None and (reason := why_not_sha256("weights_sha256", self.weights_sha256)):
            return reason
        return why_not_sha256("data_hash", self.data_hash)


@dataclass(frozen=True)
class MachineCode:
    """What a row's launch compiled to: by which Triton, for which target ("sm_90"), and the hash of all its instructions."""

    triton: str
    target: str
    code: str

    def why_not(self) -> str | None:
        return why_not_sha256("code", self.code)


@dataclass(frozen=True)
class Row:
    """How the key lists of one sparse scale are run, and how long one layer's attention takes, planning included.

    state "measured": tuned, dense and speedup are times on this silicon; "predicted": the two *_predicted_ms come from
    a roofline model.
    mode: how the calls were launched while timed, "eager" or "graph" (a replayed CUDA graph); a gain in one is none in the other.
    binary: the machine code that was timed; None on a CPU, in predictions and in files of schema 2.
    """

    scale_index: int
    kernel: str
    config: tuple[tuple[str, int], ...]
    state: str
    dense_name: str
    tuned: Timing | None = None
    dense: Timing | None = None
    speedup: Speedup | None = None
    tuned_predicted_ms: float | None = None
    dense_predicted_ms: float | None = None
    mode: str = "eager"
    binary: MachineCode | None = None

    def why_not(self) -> str | None:
        if self.mode not in MODES:
            return f"mode: got {self.mode!r}, want one of {', '.join(MODES)}"
        if self.kernel not in KERNELS:
            return f"kernel: got {self.kernel!r}, want one of {', '.join(KERNELS)}"
        known, added = KERNELS[self.kernel].fields, set(KERNELS[self.kernel].added)
        if {name for name, _ in self.config} | added != set(known):
            return f"config: got {sorted(n for n, _ in self.config)}, want exactly {sorted(known)}"
        if any(not 0 <= value <= 1 << 30 for _, value in self.config):
            return f"config: got {dict(self.config)}, want values 0..2**30"
        measured = (self.tuned, self.dense, self.speedup)
        predicted = (self.tuned_predicted_ms, self.dense_predicted_ms)
        if self.state == "measured":
            if None in measured or predicted != (None, None):
                return "state measured: want tuned, dense and speedup, and no predicted times"
        elif self.state == "predicted":
            if measured != (None, None, None) or None in predicted:
                return "state predicted: want the two predicted times and no measured ones"
            if any(not 0 < ms < 1e9 for ms in predicted if ms is not None):
                return f"predicted times: got {predicted}, want > 0 ms"
        else:
            return f'state: got {self.state!r}, want "measured" or "predicted"'
        return None


@dataclass(frozen=True)
class WholePicture:
    """One whole picture, dense and tuned in alternation: everything from class to pixels."""

    dense_name: str
    dense: Timing
    tuned: Timing
    speedup: Speedup


@dataclass(frozen=True)
class Workload:
    """What was tuned: a model at one resolution and aspect.

    batch: rows of q, k and v, which is images at once times the model's guidance_batch.
    """

    model: str
    resolution: str
    aspect: str
    grids: tuple[tuple[int, int], ...]
    prefix: int
    layers: int
    heads: int
    head_dim: int
    dtype: str
    batch: int
    softmax_scale: float
    logit_bound: float | None
    weights_sha256: str | None

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids, self.prefix)

    @classmethod
    def of(cls, model: Model, resolution: str, aspect: str) -> Workload:
        """One image of a model, by its table row alone: no weights are at hand."""
        schedule = model.schedule(resolution, aspect)
        return cls(
            model.slug, resolution, aspect, schedule.grids, schedule.prefix, model.layers, model.heads, model.head_dim,
            model.dtype, model.guidance_batch, model.softmax_scale, model.logit_bound, None,
        )  # fmt: skip

    def problem(self, scale_index: int) -> AttentionProblem:
        """The attention call of every layer at one scale."""
        return AttentionProblem(
            self.schedule, scale_index, self.batch, self.heads, self.head_dim, self.dtype, self.softmax_scale, self.logit_bound
        )

    def problems(self) -> dict[int, AttentionProblem]:
        """`problem` of every scale."""
        return {s: self.problem(s) for s in range(len(self.grids))}

    def why_not(self) -> str | None:
        if not self.grids or len(self.grids) > 64 or any(not 1 <= side <= 4096 for grid in self.grids for side in grid):
            return "grids: want 1..64 pairs of sides 1..4096"
        for name, most in (("layers", 512), ("heads", 512), ("head_dim", 1024), ("batch", 65536)):
            if not 1 <= getattr(self, name) <= most:
                return f"{name}: got {getattr(self, name)}, want 1..{most}"
        if not 0 <= self.prefix <= 1 << 20:
            return f"prefix: got {self.prefix}, want 0..2**20"
        if self.dtype not in ("fp32", "bf16", "fp16"):
            return f"dtype: got {self.dtype!r}, want fp32, bf16 or fp16"
        if not 0 < self.softmax_scale < 1e6 or not (self.logit_bound is None or 0 < self.logit_bound < 1e6):
            return "softmax_scale and logit_bound: want > 0"
        return None if self.weights_sha256 is None else why_not_sha256("weights_sha256", self.weights_sha256)


@dataclass(frozen=True)
class Silicon:
    """The machine it was tuned on; `name` as the driver or the processor gives it."""

    gpu: str
    family: str
    name: str
    capability: tuple[int, int] | None
    sms: int | None
    memory_bytes: int | None
    threads: int | None

    def why_not(self) -> str | None:
        if self.gpu in GPUS and self.family != GPUS[self.gpu].family:
            return f"family: got {self.family!r}, want {GPUS[self.gpu].family!r} for {self.gpu}"
        if self.capability is not None and min(self.capability) < 0:
            return f"capability: got {list(self.capability)}, want [major, minor], both >= 0"
        for name in ("sms", "memory_bytes", "threads"):
            got = getattr(self, name)
            if got is not None and got < 1:
                return f"{name}: got {got}, want >= 1 or null"
        return None


@dataclass(frozen=True)
class Versions:
    sparvar_tune: str
    python: str
    torch: str
    triton: str | None


@dataclass(frozen=True)
class Profile:
    """A tuned policy and how to run it. state and policy_state say what was measured and what was not.

    meaning, rows[].binary, kernel_hash: the three identities of identity.py.
    """

    schema: int
    created: str
    preset: str
    state: str
    policy: Policy
    policy_state: str
    policy_source: str
    evidence: Evidence | None
    workload: Workload
    silicon: Silicon
    versions: Versions
    meaning: tuple[tuple[str, int], ...]
    kernel_hash: str
    generation: WholePicture | None
    rows: tuple[Row, ...]
    seed: int
    trials: int
    notes: tuple[str, ...]

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a table: by `scale` kernel, configuration, mode and state; p50 of a layer's attention dense and tuned
        (`dense_ms`, `tuned_ms`; predicted where `state` says so), their `speedup` and its 95 % interval `low`..`high` over n.
        """
        from sparvar_tune.profile.table import to_frame

        return to_frame(self)

    def why_not(self) -> str | None:
        """Why these parts do not make a profile, or None."""
        if self.preset not in (*PRESETS, CUSTOM):
            return f"preset: got {self.preset!r}, want one of {', '.join((*PRESETS, CUSTOM))}"
        if self.state not in ("measured", "predicted"):
            return f'state: got {self.state!r}, want "measured" or "predicted"'
        if self.policy_state not in ("measured", "unverified"):
            return f'policy_state: got {self.policy_state!r}, want "measured" or "unverified"'
        if (self.policy_state == "measured") != (self.evidence is not None):
            return "evidence: want it exactly when policy_state is measured"
        if (self.state == self.policy_state == "measured") != (self.generation is not None):
            return "generation: want it exactly when state and policy_state are measured"
        if not is_date(self.created):
            return f'created: got {self.created!r}, want a date such as "2026-11-23"'
        if self.trials < 0:
            return f"trials: got {self.trials}, want >= 0"
        reason = why_not_sha256("kernel_hash", self.kernel_hash)
        if reason:
            return reason
        used = used_by(self.policy) | {row.kernel for row in self.rows}
        if not used <= {name for name, _ in self.meaning} or any(n < 1 for _, n in self.meaning):
            return f"meaning: got {dict(self.meaning)}, want numbers >= 1, one for each of {', '.join(sorted(used)) or 'nothing'}"
        w = self.workload
        reason = self.policy.why_not(w.schedule, w.layers, w.heads)
        if reason:
            return f"policy.{reason}"
        for i, rule in enumerate(self.policy.rules):
            if any(abs(n) > MAX_NUMBER for n in _integers(rule.variant)):
                return f"policy.rules[{i}].variant: want numbers of at most 2**20"
        want = sorted({r.scale_index for r in self.policy.rules})
        if [r.scale_index for r in self.rows] != want:
            return f"rows: got scales {[r.scale_index for r in self.rows]}, want {want} (those the policy has rules for)"
        if any(r.state != self.state for r in self.rows):
            return f"rows: every row must be {self.state!r} like the profile"
        for i, row in enumerate(self.rows):
            reason = row.why_not()
            if not reason:
                config = KERNELS[row.kernel].config.from_row(row.config)
                reason = why_not_launch(w.problem(row.scale_index), row.kernel, config, self.silicon.capability)
            if reason:
                return f"rows[{i}]: {reason}"
        return None


def why_not_sha256(name: str, got: str) -> str | None:
    """Why `got` is no sha256 in hexadecimal, or None."""
    return None if re.fullmatch("[0-9a-f]{64}", got) else f"{name}: got {got!r}, want the 64 hexadecimal digits of a sha256"


def is_date(text: str) -> bool:
    """Whether it is a date as profiles have it, 2026-11-23."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _integers(variant: Variant) -> list[int]:
    parts = dataclasses.astuple(variant)
    return [n for part in parts for n in (part if isinstance(part, tuple) else (part,)) if isinstance(n, int)]


def to_json(profile: Profile) -> str:
    """The file's text with its checksum: sorted keys, one value a line, measured floats to 6 digits. ValueError on NaN."""
    return sealed_text(plain(profile))


def plain(profile: Profile) -> dict[str, Any]:
    """JSON values. What decides results keeps every digit: the runtime must do what was certified, on the shape it was."""
    data: dict[str, Any] = to_plain(profile)
    for name in ("softmax_scale", "logit_bound"):
        data["workload"][name] = getattr(profile.workload, name)
    for plain, rule in zip(data["policy"]["rules"], profile.policy.rules, strict=True):
        plain["variant"] = variant_to_dict(rule.variant)
    return data


def from_json(text: str, where: str, *, check_seal: bool = True) -> Profile:
    """The profile in `text`; raises ProfileError naming `where` and the field.

    check_seal: False takes an edited text whose checksum is wrong or missing; everything else is checked all the same.
    """
    try:
        data = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProfileError(f"{where}: not a profile: {one_line(reason)}; tune again or restore the file") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and not isinstance(schema, bool) and schema not in (2, SCHEMA):
        todo = "upgrade sparvar-tune" if schema > SCHEMA else "it is an older one's, tune again (sparvar-tune --gpu G --model M)"
        raise ProfileError(f"{where}: {one_line(f'schema {schema}')}, this sparvar-tune reads {SCHEMA}: {todo}")
    try:
        # fields first: what is wrong with one says more than that the sum is off
        fields = {k: v for k, v in data.items() if k != "checksum"} if isinstance(data, dict) else data
        profile = read(as_today(fields, SCHEMA))
    except ReadError as error:
        raise ProfileError(f"{where}: {one_line(str(error))}; tune again or restore the file") from None
    edited = why_not_sealed(data) if check_seal else None
    if edited:
        todo = "to keep a hand edit run `sparvar-tune show --profile FILE --seal`"
        raise ProfileError(f"{where}: edited or damaged: {one_line(edited)}; {todo}")
    return profile


def read(data: Any) -> Profile:
    profile = Reader().read(Profile, data, "")
    if profile.schema != SCHEMA:
        raise ReadError(f"schema: got {profile.schema}, want {SCHEMA}")
    return profile


def one_line(text: str) -> str:
    """Printable and short, whatever a damaged file put into it."""
    return shown(text, MAX_MESSAGE)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number a profile may hold")
