"""Which head does what at which scale: the GPU-independent half of a profile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.variants import Dense, Variant, why_not_variant

LATER = "later"  # in the metadata of a step's field that it had not at first: files leave its default out


@dataclass(frozen=True)
class Rule:
    """At `scale_index`, heads of class `head_class` use `variant`. Whatever no rule names is dense."""

    scale_index: int
    head_class: str
    variant: Variant


@runtime_checkable
class Step(Protocol):
    """What a generation does otherwise, beside attention, such as leaving out scales. The kernels carry it and never run it.

    kind: its name in files. meaning: raised when the same fields come to stand for another picture. from_scale: the first scale
    it changes. skips: scales that are not drawn because of it, so that no attention is called there. thins: whether from then on
    a call has other keys or queries than the schedule says, so that no rule can stand there.
    """

    kind: ClassVar[str]
    meaning: ClassVar[int]
    thins: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def from_scale(self) -> int: ...
    @property
    def skips(self) -> tuple[int, ...]: ...

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        """Why it cannot be done on this schedule in a model of so many layers, or None."""

    def describe(self) -> str:
        """A few words for people."""


@dataclass(frozen=True)
class Policy:
    """heads[layer] is a string with one class letter per head, such as "LLDL"; at most one rule per (scale, class).

    steps: of the generation around attention, at most one of a kind.
    """

    heads: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def skip_scales(self) -> tuple[int, ...]:
        """Scales that its steps leave out altogether."""
        return tuple(s for step in self.steps for s in step.skips)

    @property
    def from_scale(self) -> int | None:
        """The first scale that it changes, None where it changes nothing."""
        begins = [*(rule.scale_index for rule in self.rules), *(step.from_scale for step in self.steps)]
        return min(begins, default=None)

    @classmethod
    def uniform(cls, layers: int, heads: int, rules: dict[int, Variant]) -> Policy:
        """Every head alike (class "A"): one variant per scale."""
        return cls(("A" * heads,) * layers, tuple(Rule(s, "A", v) for s, v in sorted(rules.items())))

    def variant(self, layer: int, head: int, scale_index: int) -> Variant:
        letter = self.heads[layer][head]
        return next((r.variant for r in self.rules if (r.scale_index, r.head_class) == (scale_index, letter)), Dense())

    def why_not(self, schedule: ScaleSchedule, layers: int, heads: int) -> str | None:
        """Why this policy does not fit a model with `layers` x `heads` and `schedule`, or None."""
        if not self.heads:
            return "heads: got none, want a string of class letters a layer"
        if len(self.heads) != layers or any(len(row) != heads for row in self.heads):
            got = f"{len(self.heads)} rows of {sorted({len(row) for row in self.heads})}"
            return f"heads: got {got} class letters, want {layers} rows of {heads}"
        letters = set("".join(self.heads))
        seen = set()
        for i, rule in enumerate(self.rules):
            where = f"rules[{i}]"
            if not isinstance(rule.variant, Variant):
                return f"{where}: got a {type(rule.variant).__name__}, want a variant such as Csla"
            if not 0 <= rule.scale_index < len(schedule):
                return f"{where}: scale_index={rule.scale_index}, want 0..{len(schedule) - 1}"
            if rule.head_class not in letters:
                return f"{where}: head class {rule.head_class!r} has no head; known: {', '.join(sorted(letters))}"
            if (rule.scale_index, rule.head_class) in seen:
                return f"{where}: a second rule for scale {rule.scale_index}, class {rule.head_class!r}"
            seen.add((rule.scale_index, rule.head_class))
            reason = why_not_variant(rule.variant, schedule, rule.scale_index)
            if reason:
                return f"{where}: {reason}"
        for i, rule in enumerate(self.rules):
            decision = rule.variant.decision_scale
            if decision is not None and (decision, rule.head_class) in seen:
                return f"rules[{i}]: decision scale {decision} must be dense for class {rule.head_class!r}, but has a rule"
        return self._why_not_steps(schedule, layers)

    def _why_not_steps(self, schedule: ScaleSchedule, layers: int) -> str | None:
        kinds = set()
        for i, step in enumerate(self.steps):
            if not isinstance(step, Step):
                return f"steps[{i}]: got {step!r}, want a step of the generation"
            if step.kind in kinds:
                return f"steps[{i}]: a second {step.kind}"
            kinds.add(step.kind)
            reason = step.why_not(schedule, layers)
            if reason:
                return f"steps[{i}]: {reason}"
        skipped = self.skip_scales
        for i, step in enumerate(self.steps):
            if not step.skips and step.from_scale in skipped:
                return f"steps[{i}]: {step.kind} begins at scale {step.from_scale}, which is skipped"
            ruled = [r.scale_index for r in self.rules if step.thins and r.scale_index >= step.from_scale]
            if ruled:
                return f"steps[{i}]: {step.kind} leaves out tokens from scale {step.from_scale} on; scale {ruled[0]} has a rule"
        if any(r.scale_index in skipped for r in self.rules):
            return f"skip_scales={skipped}: a skipped scale has a rule"
        return None


def why_not_live(scale_index: int, decision: int, runs: int) -> str | None:
    """Why a scale may not live on what its decision scale left, which was run so often for this layer since scale 0; or None.

    A second run overwrites the first: of guidance as two passes over one object, the first pass would read the second's keys.
    """
    if runs == 0:
        return f"scale {scale_index}: its decision scale {decision} was not run for this image and layer"
    if runs > 1:
        return (
            f"scale {scale_index}: its decision scale {decision} was run {runs} times for this image and layer, want once: give "
            "each pass an object of its own, put both halves of guidance into one batch, or call reset() between"
        )
    return None


RecordKey = tuple[Variant, tuple[int, ...]]


@dataclass(frozen=True)
class Record:
    """What a decision scale leaves behind for some heads: `variant` is `at_decision`'s form."""

    variant: Variant
    heads: tuple[int, ...]
    ranks: int  # best keys to remember; 0: none

    @property
    def key(self) -> RecordKey:
        return self.variant, self.heads

    @property
    def wants_residual(self) -> bool:
        return self.variant.residual


@dataclass(frozen=True)
class LayerPlan:
    """One layer at one scale: the variant of each group of heads, and what must be recorded for later scales."""

    groups: tuple[tuple[Variant, tuple[int, ...]], ...]
    records: tuple[Record, ...] = field(default=())


@lru_cache(maxsize=64)
def plan_layers(policy: Policy, schedule: ScaleSchedule) -> tuple[tuple[LayerPlan, ...], ...]:
    """[layer][scale] plans of a legal policy; raises ValueError with the reason for another."""
    reason = policy.why_not(schedule, len(policy.heads), len(policy.heads[0]) if policy.heads else 0)
    if reason:
        raise ValueError(f"policy: {reason}")
    out = []
    for layer, letters in enumerate(policy.heads):
        groups = [_group(policy, layer, len(letters), s) for s in range(len(schedule))]
        records: list[dict[RecordKey, Record]] = [{} for _ in schedule.grids]
        for s, found in enumerate(groups):
            for variant, heads in found:
                decision = variant.decision_scale
                if decision is None:
                    continue
                there, ranks = variant.at_decision(schedule, s), variant.ranks(schedule, s)
                record = records[decision].get((there, heads), Record(there, heads, 0))
                records[decision][there, heads] = replace(record, ranks=max(record.ranks, ranks))
        out.append(tuple(LayerPlan(g, tuple(r.values())) for g, r in zip(groups, records, strict=True)))
    return tuple(out)


def _group(policy: Policy, layer: int, heads: int, scale_index: int) -> tuple[tuple[Variant, tuple[int, ...]], ...]:
    groups: dict[Variant, list[int]] = {}
    for h in range(heads):
        groups.setdefault(policy.variant(layer, h, scale_index), []).append(h)
    return tuple((variant, tuple(members)) for variant, members in groups.items())
