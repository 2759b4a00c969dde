"""A policy and its evidence in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.metrics import METRICS, known_metric

if TYPE_CHECKING:
    from sparvar_tune.profile.schema import Evidence


def describe(policy: Policy) -> str:
    """One line: how many heads do what at each scale that has a rule, and what the generation does otherwise."""
    parts = []
    for s in sorted({r.scale_index for r in policy.rules}):
        counts: dict[str, int] = {}
        for layer, letters in enumerate(policy.heads):
            for head in range(len(letters)):
                name = policy.variant(layer, head, s).describe()
                counts[name] = counts.get(name, 0) + 1
        parts.append(f"scale {s}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda x: -x[1])))
    parts += [step.describe() for step in policy.steps]
    return "; ".join(parts) or "dense everywhere"


def describe_evidence(evidence: Evidence) -> str:
    """One line: every metric's mean and, where there is one, its bound and what that had to reach."""
    parts = []
    for name, m in sorted(evidence.metrics, key=lambda found: _place(found[0])):
        metric = known_metric(name)
        say = metric.say if metric else "{:.4g}".format
        text = f"{metric.title if metric else name} {say(m.mean)}"
        text += f", bound {say(m.bound)}" if m.bound is not None else ""
        parts.append(text + (f" (wanted {say(m.required)})" if m.required is not None else ""))
    return f"{'; '.join(parts)}; {evidence.n} held-out pairs, bounds at {evidence.confidence:.1%}"


def _place(name: str) -> tuple[int, bool]:
    """In the order of the table, the worst class after the mean."""
    metric = known_metric(name)
    return (list(METRICS).index(metric.measured), metric.worst_class) if metric else (len(METRICS), False)
