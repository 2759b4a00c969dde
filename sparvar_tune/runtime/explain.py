"""What runs here and why, as values; `words` says them. The command `explain` prints either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparvar_tune.profile.describe import describe, describe_evidence
from sparvar_tune.profile.schema import Speedup

if TYPE_CHECKING:
    from sparvar_tune.runtime.tuned import Tuned


@dataclass(frozen=True)
class ScaleExplained:
    """One scale. runs: "sparse" or "dense", and then why.

    Of a sparse one: its launch, and its gain against `baseline`: measured (speedup; `verified` is the date where `verify`
    measured it on this machine, None where the profile says so) or predicted (milliseconds of one layer).
    """

    scale_index: int
    runs: str
    why: str | None
    kernel: str | None = None
    config: tuple[tuple[str, int], ...] = ()
    baseline: str | None = None
    speedup: Speedup | None = None
    verified: str | None = None
    tuned_predicted_ms: float | None = None
    dense_predicted_ms: float | None = None

    @property
    def words(self) -> str:
        if self.runs == "dense":
            return f"scale {self.scale_index}: dense, because {self.why}"
        s, config = self.speedup, ", ".join(f"{k}={v}" for k, v in self.config)
        if s is None:
            cost = f"{self.tuned_predicted_ms:.3g} ms predicted against {self.dense_predicted_ms:.3g} dense"
        else:
            when = f" here by verify on {self.verified}" if self.verified else ""
            cost = f"{s.median:.2f}x measured{when} (95 % interval {s.low:.2f}..{s.high:.2f}, n={s.n}) against {self.baseline}"
            cost += "; its time holds the ranking that later scales live on" if s.low <= 1 else ""
        return f"scale {self.scale_index}: kernel {self.kernel} ({config}), {cost}"


@dataclass(frozen=True)
class Explained:
    """gpu: slug; gpu_name: as the table has it. reasons: how the profile was found and what differs here.

    profile: the file, None where there is none; everything is then dense and what follows is None or empty. policy: as it
    will run, in words. left_out: generation steps it goes without, and why. scales: those the profile has a row for.
    pictures: how close they were where it was certified, the worst class beside the mean.
    """

    gpu: str
    gpu_name: str
    reasons: tuple[str, ...]
    profile: str | None = None
    profile_sha256: str | None = None
    preset: str | None = None
    state: str | None = None
    policy_state: str | None = None
    policy_source: str | None = None
    policy: str | None = None
    left_out: tuple[str, ...] = ()
    scales: tuple[ScaleExplained, ...] = ()
    pictures: str | None = None

    @property
    def found(self) -> list[str]:
        """The silicon and how the profile was found, a line each."""
        return [f"silicon: {self.gpu} ({self.gpu_name})", *(f"- {reason}" for reason in self.reasons)]

    @property
    def words(self) -> str:
        if self.policy is None:
            return "\n".join([*self.found, "everything runs dense"])
        head = f"policy ({self.policy_state}; {self.policy_source}): {self.policy}"
        close = [f"pictures: {self.pictures}"] if self.pictures else []
        return "\n".join([*self.found, head, *self.left_out, *close, *(scale.words for scale in self.scales)])


def explained(tuned: Tuned) -> Explained:
    """All there is to say of what `load_profile` returned."""
    p, policy = tuned.profile, tuned.policy()
    if p is None or policy is None:
        return Explained(tuned.gpu.slug, tuned.gpu.name, tuned.reasons)
    return Explained(
        tuned.gpu.slug, tuned.gpu.name, tuned.reasons, str(tuned.path), tuned.sha256, p.preset, p.state, p.policy_state,
        p.policy_source, describe(policy),
        tuple(f"{kind}: left out, because {why}" for kind, why in tuned.refused_steps().items()),
        tuple(explained_scale(tuned, row.scale_index) for row in p.rows),
        describe_evidence(p.evidence) if p.evidence else None,
    )  # fmt: skip


def explained_scale(tuned: Tuned, scale_index: int) -> ScaleExplained:
    """One scale of a profile that was found."""
    assert tuned.profile is not None
    if scale_index in tuned.demoted:
        return ScaleExplained(scale_index, "dense", tuned.demoted[scale_index])
    row = next((r for r in tuned.profile.rows if r.scale_index == scale_index), None)
    if row is None:
        return ScaleExplained(scale_index, "dense", "the policy has no rule for it")
    found = tuned.overlay.rows if tuned.overlay else ()
    local = next((v.speedup for v in found if v.scale_index == scale_index), None)
    return ScaleExplained(
        scale_index, "sparse", None, row.kernel, row.config, row.dense_name, local or row.speedup,
        tuned.overlay.created if local and tuned.overlay else None, row.tuned_predicted_ms, row.dense_predicted_ms,
    )  # fmt: skip
