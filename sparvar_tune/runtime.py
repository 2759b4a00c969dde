"""Using a profile: find it, check it against this machine, run attention by it. Imports neither optuna nor pandas.

    tuned = sparvar_tune.load_profile("pocketvar")     # exact silicon -> same family -> dense, and it says which
    sparvar_tune.apply(model, tuned)                   # the model samples with it from now on; .undo() takes it back
    attend = tuned.attention(problem)                  # or one call at a time: attend(q, k, v, layer=17)

Never slower on purpose: a scale whose measured win is not certain, other kernel sources or another shape means dense,
and `explain()` gives the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.dense import dense_attention
from sparvar_kernels.policy import Policy
from sparvar_kernels.problem import AttentionProblem
from sparvar_kernels.registry import KERNELS
from sparvar_tune import adapters
from sparvar_tune.gpus import GPUS, Gpu
from sparvar_tune.machine import choose_gpu, silicon, versions
from sparvar_tune.misses import Missed, record
from sparvar_tune.models import find_model
from sparvar_tune.names import DEFAULT_PRESET
from sparvar_tune.policies import describe
from sparvar_tune.profiles import (
    Miss,
    find,
    kernel_hash,
    load,
    mismatch,
    profile_name,
    shipped_folder,
    user_folder,
)
from sparvar_tune.schema import Profile, ProfileError, Row


@dataclass
class Tuned:
    """A profile made ready for this machine, or the reason there is none (then everything is dense).

    reasons: how the profile was found and what differs here. demoted: scale -> why it runs dense all the same.
    One object serves one image stream; it keeps what decision scales left for later ones.
    """

    gpu: Gpu
    profile: Profile | None
    path: Path | None
    reasons: tuple[str, ...]
    demoted: dict[int, str] = field(default_factory=dict)
    _attend: SparseAttention | None = None

    def policy(self) -> Policy | None:
        """The policy as it will run: demoted scales have lost their rules."""
        if self.profile is None:
            return None
        full = self.profile.policy
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
            return "\n".join([*lines, self._why_not(problem) or self._explain_scale(problem.scale_index)])
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
        if row.speedup is None:
            cost = f"{row.tuned_predicted_ms:.3g} ms predicted against {row.dense_predicted_ms:.3g} dense"
        else:
            s = row.speedup
            cost = f"{s.median:.2f}x measured (95 % interval {s.low:.2f}..{s.high:.2f}, n={s.n}) against {row.dense_name}"
        return f"scale {scale_index}: kernel {row.kernel} ({config}), {cost}"


def launch_of(row: Row) -> Launch:
    """The row's kernel and configuration as the kernels take it."""
    return Launch(row.kernel, KERNELS[row.kernel].config(**dict(row.config)))


def load_profile(
    model: str, *, gpu: str = "auto", preset: str = DEFAULT_PRESET, resolution: str | None = None, aspect: str | None = None,
    path: Path | None = None, folders: tuple[Path, ...] | None = None, record_miss: bool = False,
) -> Tuned:  # fmt: skip
    """The profile of `model` for this machine; never raises for a missing one (everything is then dense).

    path: that file and no other; it must be for this model and silicon. record_miss: where there is none, keep a note in
    this user's folder for `sparvar-tune --from-misses`. Raises ValueError for an unknown model or GPU
    and ProfileError for a damaged or foreign file.
    """
    row, silicon_row = find_model(model), choose_gpu(gpu)
    if path is not None:
        profile = load(path)
        if profile.workload.model != row.slug:
            raise ProfileError(f"{path}: for model {profile.workload.model}, not {row.slug}; give that model or another file")
        if profile.silicon.gpu != silicon_row.slug:
            raise ProfileError(f"{path}: for other silicon ({profile.silicon.gpu}, here {silicon_row.slug}); tune for this one")
        return prepare(profile, path, silicon_row, ["file given"])
    resolution, aspect = resolution or row.default_resolution, aspect or row.default_aspect
    row.schedule(resolution, aspect)
    name = profile_name(row.slug, preset, resolution, aspect, (row.default_resolution, row.default_aspect))
    relatives = tuple(g for g in GPUS.values() if g.family == silicon_row.family and g.slug != silicon_row.slug)
    found = find(name, silicon_row, relatives, folders or (user_folder(), shipped_folder()))
    if isinstance(found, Miss):
        if record_miss:
            record(Missed(silicon_row.slug, row.slug, preset, resolution, aspect))
        return Tuned(silicon_row, None, None, (found.reason,))
    return prepare(found.profile, found.path, silicon_row, [found.reason])


def prepare(profile: Profile, path: Path, gpu: Gpu, reasons: list[str]) -> Tuned:
    """Holds a profile against this machine and demotes what may not win here."""
    reasons = [*reasons, f"from {path}"]
    demoted: dict[int, str] = {}
    now_hash = kernel_hash(gpu)
    reasons += mismatch(profile, gpu=gpu, versions=versions(), kernel_hash=now_hash)
    if profile.kernel_hash != now_hash:
        demoted = {r.scale_index: "the kernels changed since it was tuned; run sparvar-tune verify --write" for r in profile.rows}
    # The time of a decision scale holds the ranking that later scales live on: no reason to make its other heads dense.
    deciding = {getattr(rule.variant, "decision_scale", None) for rule in profile.policy.rules}
    for r in profile.rows:
        if r.speedup is not None and r.speedup.low <= 1 and r.scale_index not in deciding:
            demoted.setdefault(r.scale_index, f"its measured gain is not certain ({r.speedup.low:.2f}x at the low end)")
    here, there = silicon(gpu, profile.silicon.gpu == gpu.slug), profile.silicon
    if (here.name, here.threads) != (there.name, there.threads) and profile.state == "measured":
        reasons.append(f"measured on {there.name} ({there.threads} threads), here {here.name} ({here.threads})")
    if profile.state == "predicted":
        reasons.append("times are predicted, not measured; run sparvar-tune verify --write on this GPU")
    if profile.policy_state == "unverified":
        reasons.append("the policy is unverified on this model")
    if profile.state == "predicted" or profile.policy_state == "unverified":
        warnings.warn(f"{path.name}: {reasons[-1]}", stacklevel=3)
    return Tuned(gpu, profile, path, tuple(reasons), demoted)


def apply(model: Any, tuned: Tuned) -> Any:
    """Makes a live model use the profile; returns an object with `undo()`. Raises ValueError when they do not fit."""
    return adapters.apply(model, tuned.sparse_attention())
