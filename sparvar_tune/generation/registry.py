"""Every kind of generation step, by its name in files."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sparvar_kernels.policy import Policy, Step
from sparvar_tune.generation.cache_budget import CacheBudget
from sparvar_tune.generation.drop_unconditional import DropUnconditional
from sparvar_tune.generation.precision import Precision
from sparvar_tune.generation.prune_tokens import PruneTokens
from sparvar_tune.generation.skip_scales import SkipScales

STEPS: dict[str, type[Step]] = {step.kind: step for step in (SkipScales, DropUnconditional, CacheBudget, PruneTokens, Precision)}


def why_not_steps(steps: Sequence[Step], can: Collection[str], who: str) -> str | None:
    """Why `who`, which can do steps of the kinds `can`, cannot do these, or None."""
    for step in steps:
        if step.kind not in can:
            return f"{step.kind}: {who} cannot do that; it can do {', '.join(sorted(can)) or 'no step of a generation'}"
    if len(thin := [step.kind for step in steps if step.thins]) > 1:  # which window would be kept of a scale that was pruned?
        return f"{thin[1]}: it and {thin[0]} both leave out tokens; want one of them"
    if {CacheBudget.kind, Precision.kind} <= {step.kind for step in steps}:
        return f"{Precision.kind}: with {CacheBudget.kind} keys would be ranked by queries of another precision; want one of them"
    return None


def works_inside(step: Step) -> bool:
    """Whether a step is done inside the blocks, and not around them: what runs all blocks as one does it itself."""
    return step.thins or step.kind == Precision.kind


def drop_from(policy: Policy) -> int | None:
    """The scale from which on the policy runs the conditional half alone, or None."""
    return _from_scale(policy, DropUnconditional.kind)


def skip_from(policy: Policy) -> int | None:
    """The first scale that the policy does not draw, or None."""
    return _from_scale(policy, SkipScales.kind)


def _from_scale(policy: Policy, kind: str) -> int | None:
    return next((step.from_scale for step in policy.steps if step.kind == kind), None)
