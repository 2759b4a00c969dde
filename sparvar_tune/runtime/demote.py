"""Which scales of a profile run dense here all the same, and why. Never slower on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Container

from sparvar_kernels.backends.configs import Capability
from sparvar_kernels.backends.registry import why_not
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.profile import identity, overlay
from sparvar_tune.profile.machine import versions
from sparvar_tune.profile.overlay import DEMOTED, Overlay, Verified
from sparvar_tune.profile.schema import Profile, ProfileError, Row
from sparvar_tune.profile.store import NoHome
from sparvar_tune.runtime.tuned import launch_of


def deciding(policy: Policy, demoted: Container[int] = ()) -> set[int]:
    """Scales that later sparse scales take keys or residuals from; what was demoted takes nothing.

    The time of such a scale holds the ranking that later ones live on: no reason to make its other heads dense.
    """
    decisions = {r.variant.decision_scale for r in policy.rules if r.scale_index not in demoted}
    return {s for s in decisions if s is not None}


def demotions(profile: Profile, local: Overlay | None, capability: Capability) -> dict[int, str]:
    """Scale -> why it runs dense all the same. What was measured here goes before what the file says."""
    by = f"demoted by verify on {local.created}: " if local else ""
    if local is not None and local.verdict == DEMOTED:
        return {r.scale_index: by + local.reason for r in profile.rows}
    found = {v.scale_index: v for v in local.rows} if local else {}
    demoted = {s: why for s, why in identity.refused(profile).items() if s not in found}  # verify measured today's meaning
    for r in profile.rows:
        launch = launch_of(r)
        assert launch.config is not None
        reason = why_not(profile.workload.problem(r.scale_index), r.kernel, launch.config, capability)
        if reason:
            demoted[r.scale_index] = f"its launch cannot run here: {reason}"
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
    return scale == decision or any(variant.decision_scale == decision for variant in rules)


def _saved_ms(row: Row, found: Verified | None) -> float:
    """Milliseconds a layer that a row certainly saves against dense, negative if it costs; 0 where nothing is known."""
    speedup = found.speedup if found else row.speedup
    if row.dense and speedup:
        return row.dense.p50_ms * (1 - 1 / speedup.low)
    return (row.dense_predicted_ms or 0.0) - (row.tuned_predicted_ms or 0.0)


def overlay_of(name: str, gpu: Gpu, sha256: str, profile: Profile, device: str) -> tuple[Overlay | None, list[str]]:
    """What verify left for exactly this file, these meanings and this device, and what to say of one that is not."""
    try:
        found = overlay.find(gpu.slug, name)
    except NoHome as error:
        return None, [f"what verify may have found here could not be looked at: {error}"]
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
