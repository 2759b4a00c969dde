"""Looks at one policy with a live model: how long the pictures take and how close they are to the dense ones.

Each search pair's dense generation is run once up to the first scale any policy touches and kept there; a policy then
finishes from that state, so a trial costs only what attention can change. Some pairs of every trial are finished densely as
well: a machine that is busy now and idle in an hour changes both times, and their ratio much less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pvariance, stdev
from typing import Any

import torch

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.adapters.whole_images import begin_image
from sparvar_tune.catalog.metrics import LEAD, always, find_metric
from sparvar_tune.generation import Precision, why_not_steps
from sparvar_tune.generation.scaled_product import capability_of, gaining, precision_of
from sparvar_tune.measure.fidelity import CONFIDENCE, Constraint, Fidelity, class_mean, compare_pictures, t_quantile
from sparvar_tune.measure.timing import CLOCK, Clock, Stopwatch, rotated
from sparvar_tune.policy_search.menu import OptionTable, StepOption, assign, decision_scale, fixed_points, step_menu
from sparvar_tune.policy_search.trial import Knobs, Verdict

MARGIN_DB = 0.1  # predictions from pairs that were also searched on are optimistic: of 8 pairs two of three runs missed with 0.05
RACE_AFTER = 3  # pairs judged before a trial may be given up
TWIN_EVERY = 5  # one pair in so many has a dense twin; the first of a trial is among those before the race
FINAL_PAIRS = 3  # on which finalists are timed again
SLOWER = 1.06  # than the best by so much over the first pairs: given up


@dataclass(frozen=True)
class Reference:
    """One search pair: its parked state, dense picture and the dense time of the rest (ms)."""

    state: Any
    picture: torch.Tensor
    dense_ms: float


def build_policy(knobs: Knobs, adapter: Adapter, table: OptionTable, points: Mapping[str, Policy] | None = None) -> Policy:
    """The policy some knobs stand for. points: as of `Judge`."""
    schedule = adapter.schedule
    if knobs.form != "priced":
        return (points or points_of(adapter))[knobs.form]
    prices = {s: knobs.prices[len(schedule) - 1 - s] for s in table.time_ms}
    steps = steps_named(adapter)[knobs.steps].steps if knobs.steps else ()
    return assign(table, schedule, prices, knobs.tilt, steps)


def steps_named(adapter: Adapter) -> dict[str, StepOption]:
    """The generation steps that a search with this adapter may take."""
    return step_menu(adapter.schedule, offered(adapter), adapter.model.layers, formats(adapter))


def points_of(adapter: Adapter, shipped: Mapping[str, Policy] | None = None) -> dict[str, Policy]:
    """The fixed points of a search with this adapter (`menu.fixed_points`)."""
    return fixed_points(adapter.schedule, adapter.model.layers, adapter.model.heads, shipped, offered(adapter), formats(adapter))


def make_attention(adapter: Adapter, policy: Policy, launches: Mapping[int, Launch] | None = None) -> SparseAttention:
    """A policy's attention for the model of `adapter`. Raises ValueError for a generation step that the adapter cannot do."""
    reason = why_not_steps(policy.steps, steps_of(adapter), f"the adapter of {adapter.model.slug}")
    if reason:
        raise ValueError(f"policy: {reason}")
    return SparseAttention(
        policy, adapter.schedule, softmax_scale=adapter.softmax_scale, logit_bound=adapter.logit_bound, launches=launches
    )  # fmt: skip


def steps_of(adapter: Adapter) -> Collection[str]:
    """Kinds of generation steps an adapter can do, also one that does not derive from `Adapter`."""
    return getattr(adapter, "steps", Adapter.steps)


def offered(adapter: Adapter) -> Collection[str]:
    """Those of them that can gain where its model is."""
    return [kind for kind in steps_of(adapter) if kind != Precision.kind or formats(adapter)]


def formats(adapter: Adapter) -> Sequence[str]:
    """The 8-bit formats that `Precision` gains with where its model is, the best first."""
    return gaining(capability_of(adapter.device))


def without_slow_steps(policy: Policy, adapter: Adapter) -> Policy:
    """A policy found elsewhere without 8-bit products that `adapter` cannot do, or its machine would only emulate."""
    step = precision_of(policy)
    if step is None or (step.kind in steps_of(adapter) and step.fmt in formats(adapter)):
        return policy
    return replace(policy, steps=tuple(own for own in policy.steps if own is not step))


def prompt_of(adapter: Adapter, pair: Pair) -> str:
    """What the picture of a pair is drawn from, "" where that is no text."""
    prompts = getattr(adapter, "prompts", ())
    return str(prompts[pair[0]]) if prompts else ""


def prepare(adapter: Adapter, attend: Any) -> bool:
    """See `Adapter.prepare`, which one that does not derive from it may lack."""
    return bool(getattr(adapter, "prepare", lambda _attend: False)(attend))


def first_touched(adapter: Adapter, policies: Iterable[Policy] = ()) -> int:
    """The first scale at which a search's rules, or one of these policies, may change anything: what comes before is shared."""
    begins = (policy.from_scale for policy in policies)
    return min([decision_scale(adapter.schedule), *(s for s in begins if s is not None)])


class Judge:
    """Callable: knobs -> verdict, from the search pairs; `held_out` pairs will have the last word.

    points: the fixed ones by form, `menu.fixed_points` of the model by default.
    """

    def __init__(self, adapter: Adapter, pairs: Sequence[Pair], constraint: Constraint, held_out: int, table: OptionTable,
                 say: Callable[[str], None], clock: Clock = CLOCK,
                 points: Mapping[str, Policy] | None = None) -> None:  # fmt: skip
        self.adapter, self.pairs, self.constraint = adapter, pairs, constraint
        self.held_out, self.table = held_out, table
        self.points = dict(points or points_of(adapter))
        self._policies: dict[Knobs, Policy] = {}
        self.stopwatch = Stopwatch(adapter.device, clock)
        self.references: list[Reference] = []
        first = first_touched(adapter, self.points.values())  # these hold every step of the menu
        for i, pair in enumerate(pairs):
            state = adapter.start(pair, first)
            made: list[torch.Tensor] = []
            prepare(adapter, adapter.dense)
            ms = self.stopwatch(lambda: made.append(adapter.finish(state, adapter.dense)))  # noqa: B023
            self.references.append(Reference(state, made[0], ms))
            say(f"dense pictures to compare with: {i + 1}/{len(pairs)}")
        self.best_ratio: float | None = None  # of the fastest trial that meets the constraint
        self.turn = 0  # trials so far: which pairs have a dense twin, and which of the two is timed first, goes round

    @property
    def forms(self) -> tuple[str, ...]:
        """Of the fixed points."""
        return tuple(self.points)

    @property
    def steps(self) -> dict[str, tuple[str, ...]]:
        """Those of the fixed points that are generation steps alone, with the weaker ones that are looked at before."""
        return {name: option.after for name, option in steps_named(self.adapter).items()}

    @property
    def saves(self) -> dict[str, float]:
        """By those steps, and "" for none, what share of the dense time attention can save at most on top of them."""
        model, menu = self.adapter.model, {"": StepOption(())} | steps_named(self.adapter)
        saved = {name: self.table.most_saved(option.steps, model.layers, model.heads) for name, option in menu.items()}
        return {name: ms / self.dense_ms for name, ms in saved.items()}

    @property
    def dense_ms(self) -> float:
        return median(r.dense_ms for r in self.references)

    def predicted(self, values: Sequence[float], levels: Sequence[float], pairs: Sequence[Pair]) -> float:
        """The lower bound of the mean that balanced held-out pairs would give, from the first of `pairs`.

        levels[class] say beforehand how the classes differ; as long as some class was not seen, only what a policy does on
        top of them is estimated.
        """
        above = _above(values, levels, pairs)
        spread = stdev(above) if len(above) > 1 else 0.0
        degrees = self.held_out - 1
        if self.held_out >= 2 * len(levels):  # the bound will be stratified by class
            degrees = self.held_out - len(levels)
        else:
            spread = math.hypot(spread, math.sqrt(pvariance(levels)))
        classes = [label for label, _ in pairs[: len(values)]]
        seen_all = len(set(classes)) == len(levels)
        middle = class_mean(values, classes) if seen_all else fmean(levels) + fmean(above)
        return middle - t_quantile(CONFIDENCE, degrees) * spread / math.sqrt(self.held_out)

    def predicted_worst(self, values: Sequence[float], levels: Sequence[float], pairs: Sequence[Pair]) -> float:
        """The lower bound of the worst class's mean that balanced held-out pairs would give: the worst of every class's own.

        A search pair a class says nothing of the spread within it, so that over all above `levels` stands for it: it is larger.
        """
        each = self.held_out // len(levels)
        if each < 2:
            return -math.inf
        above = _above(values, levels, pairs)
        seen: dict[int, list[float]] = {}
        for value, (label, _) in zip(values, pairs, strict=False):
            seen.setdefault(label, []).append(value)
        middle = fmean(above)
        worst = min(fmean(seen.get(label, [level + middle])) for label, level in enumerate(levels))
        spread = stdev(above) if len(above) > 1 else 0.0
        return worst - t_quantile(CONFIDENCE, each - 1) * spread / math.sqrt(each)

    def shortfall(self, found: Sequence[Fidelity]) -> float:
        """Of the search pairs seen so far, in dB of PSNR, with a margin."""
        return max(self._missing(name, found, self.pairs) for name in self.constraint.bounds) + MARGIN_DB

    def doomed(self, found: Sequence[Fidelity], pairs: Sequence[Pair]) -> bool:
        """True if held-out pairs seen so far leave little hope. Giving up early can only refuse, never certify."""
        if len(found) < RACE_AFTER:
            return False
        return self._missing(self.lead, found, pairs) > self._doubt(found, pairs)

    @property
    def lead(self) -> str:
        """The metric that is looked at before a trial is given up: PSNR, if it is bound at all."""
        return LEAD.name if LEAD.name in self.constraint.bounds else next(iter(self.constraint.bounds))

    def _missing(self, name: str, found: Sequence[Fidelity], pairs: Sequence[Pair]) -> float:
        """By how much the predicted bound of a metric misses what is wanted, in dB of PSNR."""
        metric = find_metric(name)
        levels = [metric.sign * level for level in self._levels(metric.measured)]
        predicted = self.predicted_worst if metric.worst_class else self.predicted
        reached = metric.sign * predicted([metric.sign * f[metric.measured] for f in found], levels, pairs)
        return metric.missing(reached, self.constraint.bounds[name])

    def _levels(self, name: str) -> Sequence[float]:
        return self.adapter.class_levels() if name == LEAD.name else (0.0,) * self.adapter.num_classes

    def _doubt(self, found: Sequence[Fidelity], pairs: Sequence[Pair]) -> float:
        """How far (dB) a mean over so few pairs may yet move."""
        metric = find_metric(self.lead)
        above = _above([f[metric.measured] for f in found], self._levels(metric.measured), pairs)
        return 1.5 * stdev(above) / metric.step / math.sqrt(len(found))

    def policy(self, knobs: Knobs) -> Policy:
        """What the knobs stand for, built once."""
        if knobs not in self._policies:
            self._policies[knobs] = build_policy(knobs, self.adapter, self.table, self.points)
        return self._policies[knobs]

    def __call__(self, knobs: Knobs) -> Verdict:
        attend = make_attention(self.adapter, self.policy(knobs))
        tuned: list[float] = []
        twins: dict[int, float] = {}
        found: list[Fidelity] = []
        self.turn += 1
        more = self.constraint.more
        for i, reference in enumerate(self.references):
            ways = [True, False] if i % TWIN_EVERY == self.turn % RACE_AFTER else [False]
            for dense in ways if (i + self.turn) % 2 else reversed(ways):
                made: list[torch.Tensor] = []
                way = self.adapter.dense if dense else attend
                prepare(self.adapter, way)
                attend.reset()
                ms = self.stopwatch(lambda: made.append(self.adapter.finish(reference.state, way)))  # noqa: B023
                if dense:
                    twins[i] = ms
                else:
                    tuned.append(ms)
                    found.append(compare_pictures(made[0], reference.picture, more, prompt_of(self.adapter, self.pairs[i])))
            if RACE_AFTER <= len(found) < len(self.references) and self._hopeless(time_ratio(tuned, twins), found):
                break
        ratio, shortfall, complete = time_ratio(tuned, twins), self.shortfall(found), len(found) == len(self.references)
        if complete and shortfall <= 0 and (self.best_ratio is None or ratio < self.best_ratio):
            self.best_ratio = ratio
        return Verdict(ratio, shortfall, {m.name: fmean(f[m.name] for f in found) for m in (*always(), *more)}, complete)

    def timed_again(self, knobs: Sequence[Knobs]) -> list[float]:
        """The time ratio of each, of a few pairs that all of them draw in turn with dense ones beside them.

        Trials are minutes apart, in which a machine's speed moves by more than good policies differ: the luckiest of many looks
        best, and was slower than the one before it when it was certified.
        """
        ways = [self.adapter.dense, *(make_attention(self.adapter, self.policy(k)) for k in knobs)]
        spent: list[list[float]] = [[] for _ in ways]
        for i, reference in enumerate(self.references[:FINAL_PAIRS]):
            for at in rotated(range(len(ways)), i):
                prepare(self.adapter, ways[at])
                begin_image(ways[at])
                spent[at].append(self.stopwatch(lambda: self.adapter.finish(reference.state, ways[at])))  # noqa: B023
        return [median(ms / dense for ms, dense in zip(own, spent[0], strict=True)) for own in spent[1:]]

    def _hopeless(self, ratio: float, found: Sequence[Fidelity]) -> bool:
        """True if the trial is clearly slower than the best that meets the constraint, or clearly short of it."""
        slower = self.best_ratio is not None and ratio > SLOWER * self.best_ratio
        return slower or self.shortfall(found) > 0.3 + self._doubt(found, self.pairs)


def _above(values: Sequence[float], levels: Sequence[float], pairs: Sequence[Pair]) -> list[float]:
    """What each value is above the level of its pair's class; `pairs` may go on longer."""
    return [value - levels[label] for value, (label, _) in zip(values, pairs, strict=False)]


def time_ratio(tuned_ms: Sequence[float], twins_ms: Mapping[int, float]) -> float:
    """Median over pairs of tuned time over the dense time measured nearest to it. twins_ms: by pair, at least one."""
    nearest = (twins_ms[min(twins_ms, key=lambda at: abs(at - i))] for i in range(len(tuned_ms)))
    return median(ms / dense for ms, dense in zip(tuned_ms, nearest, strict=True))
