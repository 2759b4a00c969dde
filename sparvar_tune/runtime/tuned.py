"""Using a profile: find it, check it against this machine, run attention by it. Imports neither optuna nor pandas.

    tuned = sparvar_tune.load_profile("pocketvar")     # exact silicon -> near silicon -> dense, and it says which
    sparvar_tune.apply(model, tuned)                   # the model samples with it from now on; .undo() takes it back
    attend = tuned.attention(problem)                  # or one call at a time: attend(q, k, v, layer=17)

Never slower on purpose: a scale whose measured win is not certain, a decision scale that costs more than the scales after it
save, other kernel sources or another shape mean dense, and `explain()` gives the reason. What `sparvar-tune verify` measured
on this machine (overlay.py) goes before what the file says.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.backends.dense import dense_attention
from sparvar_kernels.backends.registry import KERNELS
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_tune import adapters
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.models import MAX_IMAGES, find_model
from sparvar_tune.catalog.names import DEFAULT_PRESET
from sparvar_tune.profile import identity, overlay
from sparvar_tune.profile.describe import describe
from sparvar_tune.profile.machine import choose_gpu, device_name, is_here, silicon, versions
from sparvar_tune.profile.misses import Missed, record
from sparvar_tune.profile.overlay import DEMOTED, Overlay, Verified
from sparvar_tune.profile.schema import Profile, ProfileError, Row
from sparvar_tune.profile.store import (
    Match,
    find,
    mismatch,
    near,
    parse,
    profile_name,
    read_bytes,
    shipped_folder,
    user_folder,
)

IMAGES_APART = 4  # a profile for n images at once serves n / 4 to 4 n


@dataclass
class Tuned:
    """A profile made ready for this machine, or the reason there is none (then everything is dense).

    reasons: how the profile was found and what differs here. demoted: scale -> why it runs dense all the same.
    sha256: of the profile file's bytes. overlay: what verify found here for exactly that file, if it did.
    One object serves one image stream; it keeps what decision scales left for later ones.
    """

    gpu: Gpu
    profile: Profile | None
    path: Path | None
    reasons: tuple[str, ...]
    demoted: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None
    overlay: Overlay | None = None
    _attend: SparseAttention | None = None

    def policy(self) -> Policy | None:
        """The policy as it will run: demoted scales have lost their rules, and a demoted profile leaves out no scale."""
        if self.profile is None:
            return None
        full = self.profile.policy
        if self.overlay is not None and self.overlay.verdict == DEMOTED:
            return Policy(full.heads, ())
        return Policy(full.heads, tuple(r for r in full.rules if r.scale_index not in self.demoted), full.skip_scales)

    def sparse_attention(self) -> SparseAttention:
        """A fresh attention object for one image stream. Raises ValueError when there is no usable profile."""
        policy = self.policy()
        if self.profile is None or policy is None:
            raise ValueError(f"no profile to apply: {'; '.join(self.reasons)}")
        w = self.profile.workload
        return SparseAttention(
            policy, w.schedule, softmax_scale=w.softmax_scale, logit_bound=w.logit_bound,
            launches={row.scale_index: launch_of(row) for row in self.profile.rows},
        )  # fmt: skip

    def attention(self, problem: AttentionProblem) -> Callable[..., Tensor]:
        """`attend(q, k, v, layer=...)` for this problem; dense when the profile is not for its shape."""
        if self.profile is None or self._why_not(problem):
            return lambda q, k, v, layer: dense_attention(q, k, v, problem)
        if self._attend is None:
            self._attend = self.sparse_attention()
        attend = self._attend
        return lambda q, k, v, layer: attend(q, k, v, layer, problem.scale_index)

    def _why_not(self, problem: AttentionProblem) -> str | None:
        assert self.profile is not None
        w = self.profile.workload
        pairs = (
            ("schedule", problem.schedule, w.schedule), ("heads", problem.heads, w.heads),
            ("head_dim", problem.head_dim, w.head_dim), ("softmax_scale", problem.softmax_scale, w.softmax_scale),
        )  # fmt: skip
        for name, got, want in pairs:
            if got != want:
                return f"dense: {name} is {got}, the profile is for {want}"
        return None

    def explain(self, problem: AttentionProblem | None = None) -> str:
        """What runs here and why, in a few lines; for one problem if given."""
        lines = [f"silicon: {self.gpu.slug} ({self.gpu.name})", *(f"- {reason}" for reason in self.reasons)]
        policy = self.policy()
        if self.profile is None or policy is None:
            return "\n".join([*lines, "everything runs dense"])
        if problem is not None:
            lines.append(self._why_not(problem) or self._explain_scale(problem.scale_index))
            if problem.batch != self.profile.workload.batch:
                lines.append(f"batch is {problem.batch}, tuned for {self.profile.workload.batch}: its gain was not measured")
            return "\n".join(lines)
        lines.append(f"policy ({self.profile.policy_state}; {self.profile.policy_source}): {describe(policy)}")
        lines += [self._explain_scale(row.scale_index) for row in self.profile.rows]
        return "\n".join(lines)

    def _explain_scale(self, scale_index: int) -> str:
        assert self.profile is not None
        if scale_index in self.demoted:
            return f"scale {scale_index}: dense, because {self.demoted[scale_index]}"
        row = next((r for r in self.profile.rows if r.scale_index == scale_index), None)
        if row is None:
            return f"scale {scale_index}: dense, because the policy has no rule for it"
        config = ", ".join(f"{k}={v}" for k, v in row.config)
        local = next((v.speedup for v in self.overlay.rows if v.scale_index == scale_index), None) if self.overlay else None
        s = local or row.speedup
        if s is None:
            cost = f"{row.tuned_predicted_ms:.3g} ms predicted against {row.dense_predicted_ms:.3g} dense"
        else:
            when = f" here by verify on {self.overlay.created}" if local and self.overlay else ""
            cost = f"{s.median:.2f}x measured{when} (95 % interval {s.low:.2f}..{s.high:.2f}, n={s.n}) against {row.dense_name}"
            cost += "; its time holds the ranking that later scales live on" if s.low <= 1 else ""
        return f"scale {scale_index}: kernel {row.kernel} ({config}), {cost}"


def launch_of(row: Row) -> Launch:
    """The row's kernel and configuration as the kernels take it."""
    return Launch(row.kernel, KERNELS[row.kernel].config(**dict(row.config)))


def load_profile(
    model: str, *, gpu: str = "auto", preset: str = DEFAULT_PRESET, resolution: str | None = None, aspect: str | None = None,
    images: int = 1, path: Path | None = None, folders: tuple[Path, ...] | None = None, record_miss: bool = False,
) -> Tuned:  # fmt: skip
    """The profile of `model` for this machine; never raises for a missing one (everything is then dense).

    images: how many at once; where that number has no profile, the nearest within a factor of four lends its own. path: that
    file and no other; it must be for this model and silicon. record_miss: where there is none, keep a note in this user's
    folder for `sparvar-tune --from-misses`. Raises ValueError for an unknown model or GPU or a number of images out of
    range, and ProfileError for a damaged or foreign file.
    """
    row, silicon_row = find_model(model), choose_gpu(gpu)
    if not 1 <= images <= MAX_IMAGES:
        raise ValueError(f"images: got {images}, want 1..{MAX_IMAGES}")
    if path is not None:
        raw = read_bytes(path)
        profile = parse(raw, path)
        if profile.workload.model != row.slug:
            raise ProfileError(f"{path}: for model {profile.workload.model}, not {row.slug}; give that model or another file")
        if profile.silicon.gpu != silicon_row.slug:
            raise ProfileError(f"{path}: for other silicon ({profile.silicon.gpu}, here {silicon_row.slug}); tune for this one")
        return prepare(profile, path, silicon_row, ["file given"], hashlib.sha256(raw).hexdigest())
    resolution, aspect = resolution or row.default_resolution, aspect or row.default_aspect
    row.schedule(resolution, aspect)
    misses = []
    for count in near_counts(images):
        name = profile_name(row.slug, preset, resolution, aspect, (row.default_resolution, row.default_aspect), count)
        found = find(name, silicon_row, near(silicon_row), folders or (user_folder(), shipped_folder()))
        if isinstance(found, Match):
            reasons = [found.reason]
            if count != images:
                reasons.append(f"no profile for {images} images at once: that for {count} serves, its gains measured for {count}")
            return prepare(found.profile, found.path, silicon_row, reasons, found.sha256)
        misses.append(found.reason)
    if record_miss:
        record(Missed(silicon_row.slug, row.slug, preset, resolution, aspect, images))
    return Tuned(silicon_row, None, None, (f"{misses[0]}; nor for another number of images within a factor of {IMAGES_APART}",))


def near_counts(images: int) -> list[int]:
    """Numbers of images whose profiles serve `images`, nearest by ratio first; of two as near the smaller, which gains less."""
    counts = range(-(-images // IMAGES_APART), min(images * IMAGES_APART, MAX_IMAGES) + 1)
    return sorted(counts, key=lambda n: (max(n / images, images / n), n))


def deciding(policy: Policy, demoted: Container[int] = ()) -> set[int]:
    """Scales that later sparse scales take keys or residuals from; what was demoted takes nothing.

    The time of such a scale holds the ranking that later ones live on: no reason to make its other heads dense.
    """
    decisions = {getattr(r.variant, "decision_scale", None) for r in policy.rules if r.scale_index not in demoted}
    return {s for s in decisions if s is not None}


def prepare(profile: Profile, path: Path, gpu: Gpu, reasons: list[str], sha256: str) -> Tuned:
    """Holds a profile against this machine, and what verify found here, and demotes what may not win."""
    reasons = [*reasons, f"from {path}"]
    reasons += mismatch(profile, gpu=gpu, versions=versions())
    here, there = silicon(gpu, is_here(gpu)), profile.silicon
    local, said = _overlay(path.name, gpu, sha256, profile, device_name(here))
    reasons += said
    demoted = _demotions(profile, local)
    if (here.name, here.threads) != (there.name, there.threads) and profile.state == "measured":
        reasons.append(f"measured on {device_name(there)}; here {device_name(here)}")
    if profile.state == "predicted":
        reasons.append("times are predicted, not measured; run sparvar-tune verify --write on this GPU")
    if profile.policy_state == "unverified":
        reasons.append("the policy is unverified on this model")
    if profile.state == "predicted" or profile.policy_state == "unverified":
        warnings.warn(f"{path.name}: {reasons[-1]}", stacklevel=3)
    return Tuned(gpu, profile, path, tuple(reasons), demoted, sha256, local)


def _overlay(name: str, gpu: Gpu, sha256: str, profile: Profile, device: str) -> tuple[Overlay | None, list[str]]:
    """What verify left for exactly this file, these meanings and this device, and what to say of one that is not."""
    try:
        found = overlay.find(gpu.slug, name)
    except ProfileError as error:  # it only ever takes back what verify can find again
        warnings.warn(f"{error}; ignored", stacklevel=4)
        return None, [f"what verify found here is ignored: {error}"]
    if found is None:
        return None, []
    needed = dict(identity.meaning_of(profile.policy, {row.kernel for row in profile.rows}))
    meaning = {name: number for name, number in found.meaning if name in needed}
    pairs = (
        ("another profile file", found.profile_sha256, sha256), ("another meaning of its variants", meaning, needed),
        ("another device", found.device, device),
    )  # fmt: skip
    other = [what for what, was, now in pairs if was != now]
    if other:
        return None, [f"what verify found on {found.created} is ignored: it was for {', '.join(other)}"]
    now, said = versions(), [f"verified on {found.created}: {found.reason or found.verdict}"]
    if (found.versions.torch, found.versions.triton) != (now.torch, now.triton):
        said.append(f"verified with torch {found.versions.torch} and triton {found.versions.triton or '(none)'}: verify again")
    return found, said


def _demotions(profile: Profile, local: Overlay | None) -> dict[int, str]:
    """Scale -> why it runs dense all the same. What was measured here goes before what the file says."""
    by = f"demoted by verify on {local.created}: " if local else ""
    if local is not None and local.verdict == DEMOTED:
        return {r.scale_index: by + local.reason for r in profile.rows}
    found = {v.scale_index: v for v in local.rows} if local else {}
    demoted = {s: why for s, why in identity.refused(profile).items() if s not in found}  # verify measured today's meaning
    for r in reversed(profile.rows):  # later scales first: a decision scale is needed only while one of them is sparse
        s, needed = r.scale_index, r.scale_index in deciding(profile.policy, demoted)
        if s in demoted:
            continue
        if s in found:
            speedup = found[s].speedup
            if speedup is None or (speedup.low <= 1 and not needed):
                demoted[s] = by + (found[s].reason or "its gain is not certain here")
        elif not needed and (r.dense_predicted_ms or 0.0) <= (r.tuned_predicted_ms or -1.0):
            demoted[s] = (
                f"it is predicted to be no faster ({r.tuned_predicted_ms:.3g} ms against {r.dense_predicted_ms:.3g} dense)"
            )
        elif r.speedup is not None and r.speedup.low <= 1 and not needed:
            demoted[s] = f"its measured gain is not certain ({r.speedup.low:.2f}x at the low end)"
    for decision in deciding(profile.policy, demoted):  # what a decision scale costs, the scales that live on it must bring in
        alive = [r for r in profile.rows if r.scale_index not in demoted and _lives_on(profile.policy, r.scale_index, decision)]
        saved = sum(_saved_ms(r, found.get(r.scale_index)) for r in alive)
        if saved < 0:
            group = ", ".join(str(r.scale_index) for r in alive)
            demoted |= {r.scale_index: f"scales {group} live on the keys of scale {decision} and together do not certainly gain "
                        f"({saved:+.3f} ms a layer at the low end)" for r in alive}  # fmt: skip
    return dict(sorted(demoted.items()))


def _lives_on(policy: Policy, scale: int, decision: int) -> bool:
    """Whether a scale is the decision scale or takes something from it."""
    rules = (r.variant for r in policy.rules if r.scale_index == scale)
    return scale == decision or any(getattr(variant, "decision_scale", None) == decision for variant in rules)


def _saved_ms(row: Row, found: Verified | None) -> float:
    """Milliseconds a layer that a row certainly saves against dense, negative if it costs; 0 where nothing is known."""
    speedup = found.speedup if found else row.speedup
    if row.dense and speedup:
        return row.dense.p50_ms * (1 - 1 / speedup.low)
    return (row.dense_predicted_ms or 0.0) - (row.tuned_predicted_ms or 0.0)


def apply(model: Any, tuned: Tuned) -> Any:
    """Makes a live model use the profile; returns an object with `undo()`. Raises ValueError when they do not fit."""
    return adapters.apply(model, tuned.sparse_attention())
