"""The last word on a policy: held-out pictures and interleaved times, in one pass.

For every held-out (class, seed) pair the dense and the tuned generation run one after the other, in alternating order,
from the same coarse state; the part before the first scale a policy may touch is the same computation in both, so it is
run once and its time counted on both sides.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.registry import kernel_for
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.adapters.whole_images import begin_image
from sparvar_tune.catalog.metrics import LEAD, Metric
from sparvar_tune.measure.fidelity import (
    CONFIDENCE,
    Constraint,
    Fidelity,
    compare_pictures,
    hash_pairs,
    mean_of,
    worst_mean,
)
from sparvar_tune.measure.timing import CLOCK, Clock, Stopwatch, paired_speedup, rotated, timing
from sparvar_tune.policy_search.judge import first_touched, make_attention, prepare, prompt_of
from sparvar_tune.profile.identity import meaning_of
from sparvar_tune.profile.schema import Evidence, Measured, Row, WholePicture, Yardstick

SCALE_PAIRS = 5  # whose attention is timed by scale, where that takes pictures of their own
SHARES = (0.7, 0.2, 0.1)  # of the error probability, by attempt: together all of it


def confidence_of(attempt: int) -> float:
    """What the bound of certification attempt 0, 1, ... has to hold with.

    A run certifies wrongly if any of its attempts does, which is at most as likely as all their error probabilities together
    (Bonferroni): 1 - CONFIDENCE. Early giving up changes nothing, it can only refuse.
    """
    return 1 - (1 - CONFIDENCE) * SHARES[attempt]


class TimedByScale:
    """Attention that adds up the milliseconds spent at each scale."""

    def __init__(self, inner: Any, stopwatch: Stopwatch) -> None:
        self.inner, self.stopwatch = inner, stopwatch
        self.skip_scales: tuple[int, ...] = inner.skip_scales
        self.policy: Policy | None = getattr(inner, "policy", None)  # of the dense baseline there may be none
        self.spent_ms: dict[int, float] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        made: list[Tensor] = []
        ms = self.stopwatch(lambda: made.append(self.inner(q, k, v, layer, scale_index)))
        self.spent_ms[scale_index] = self.spent_ms.get(scale_index, 0.0) + ms
        return made[0]


@dataclass(frozen=True)
class Outcome:
    """One picture made one way: whole generation and attention by scale in ms, fidelity against the dense twin.

    scales_ms: empty where attention was not timed, as it was of no picture of its own.
    """

    ms: float
    scales_ms: dict[int, float]
    fidelity: Fidelity


def run_pairs(
    adapter: Adapter, ways: Mapping[str, Any], pairs: Sequence[Pair], say: Callable[[str], None], more: Sequence[Metric] = (),
    give_up: Callable[[dict[str, list[Outcome]]], bool] = lambda outcomes: False, clock: Clock = CLOCK,
) -> dict[str, list[Outcome]]:  # fmt: skip
    """Every pair's picture every way (attention callables by name; "dense" must be one), in rotating order.

    more: metrics beside those of the table. Ends early once `give_up` says so after a pair.
    """
    stopwatch, begun = Stopwatch(adapter.device, clock), clock()
    first = first_touched(adapter, [way.policy for way in ways.values() if hasattr(way, "policy")])
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    for i, pair in enumerate(pairs):
        states: list[Any] = []
        shared = stopwatch(lambda: states.append(adapter.start(pair, first)))  # noqa: B023
        made: dict[str, tuple[Tensor, float, dict[int, float]]] = {}
        watched: list[TimedByScale] = []
        names = list(ways)
        for name in rotated(names, i):
            way, timed, pictures = ways[name], TimedByScale(ways[name], stopwatch), list[Tensor]()
            apart = prepare(adapter, way)
            begin_image(way)
            ms = stopwatch(lambda: pictures.append(adapter.finish(states[0], way if apart else timed)))  # noqa: B023
            made[name] = (pictures[0], shared + ms, timed.spent_ms)
            if apart and i < SCALE_PAIRS:
                watched.append(timed)
        for timed in watched:
            begin_image(timed.inner)
            adapter.finish(states[0], timed)
        for name, (picture, ms, spent) in made.items():
            dense = made["dense"][0]
            outcomes[name].append(Outcome(ms, spent, compare_pictures(picture, dense, more, prompt_of(adapter, pair))))
        if give_up(outcomes):
            break
        left = (clock() - begun) / (i + 1) * (len(pairs) - i - 1)
        say(f"pair {i + 1}/{len(pairs)}: {_so_far(outcomes)}, {left:.0f} s left")
    return outcomes


def _so_far(outcomes: dict[str, list[Outcome]]) -> str:
    dense = sum(o.ms for o in outcomes["dense"])
    return ", ".join(
        f"{name} {LEAD.say(fmean(o.fidelity[LEAD.name] for o in found))} at {dense / sum(o.ms for o in found):.2f}x"
        for name, found in outcomes.items() if name != "dense"
    )  # fmt: skip


@dataclass
class Comparison:
    """Everything measured on the held-out pairs; lists run over pairs, times are in ms."""

    pairs: list[Pair]
    found: list[Fidelity]
    dense_ms: list[float]
    tuned_ms: list[float]
    dense_scales: list[dict[int, float]]
    tuned_scales: list[dict[int, float]]


def compare_on(
    adapter: Adapter, policy: Policy, launches: Mapping[int, Launch], pairs: Sequence[Pair], say: Callable[[str], None],
    doomed: Callable[[Sequence[Fidelity], Sequence[Pair]], bool] = lambda found, pairs: False, clock: Clock = CLOCK,
    more: Sequence[Metric] = (),
) -> Comparison:  # fmt: skip
    """Dense and tuned pictures of every pair, timed side by side; of the first pairs only once `doomed` says so."""
    ways = {"dense": adapter.dense, "tuned": make_attention(adapter, policy, launches)}
    dense, tuned = run_pairs(
        adapter,
        ways,
        pairs,
        say,
        more,
        clock=clock,
        give_up=lambda outcomes: doomed([o.fidelity for o in outcomes["tuned"]], pairs),
    ).values()
    return Comparison(
        list(pairs[: len(tuned)]), [o.fidelity for o in tuned], [o.ms for o in dense], [o.ms for o in tuned],
        [o.scales_ms for o in dense], [o.scales_ms for o in tuned],
    )  # fmt: skip


def evidence(
    seen: Comparison, adapter: Adapter, policy: Policy, constraint: Constraint, confidence: float
) -> tuple[Evidence, float]:
    """The evidence a profile carries, and the shortfall (<= 0: certified)."""
    classes, metrics, reached = [label for label, _ in seen.pairs], dict[str, Measured](), dict[str, float]()
    for metric in constraint.metrics:
        values, name = [f[metric.measured] for f in seen.found], metric.name
        reached[name] = worst_mean(metric, values, classes, confidence)
        bound = reached[name] if math.isfinite(reached[name]) else None  # too few pairs for one
        metrics[name] = Measured(mean_of(metric, values, classes), bound, constraint.bounds.get(name))
    made = Evidence(
        n=len(seen.found), confidence=confidence, metrics=tuple(sorted(metrics.items())),
        data_hash=hash_pairs(seen.pairs, adapter.weights_sha256, adapter.temperature),
        yardsticks=tuple(Yardstick(*y) for y in adapter.yardsticks()),
        measured=datetime.date.today().isoformat(), weights_sha256=adapter.weights_sha256,
        meaning=meaning_of(policy, [kernel_for(adapter.device.split(":")[0])]),
    )  # fmt: skip
    return made, constraint.shortfall(reached)


def generation(seen: Comparison, adapter: Adapter) -> WholePicture:
    return WholePicture(
        ", ".join(filter(None, (adapter.dense_name, getattr(adapter, "picture_path", "")))),
        timing(seen.dense_ms),
        timing(seen.tuned_ms),
        paired_speedup(seen.dense_ms, seen.tuned_ms),
    )


def measured_rows(seen: Comparison, adapter: Adapter, policy: Policy, launches: Mapping[int, Launch]) -> tuple[Row, ...]:
    """One row per scale with a rule: one layer's attention, averaged over layers, list making included."""
    rows, layers = [], adapter.model.layers
    for s in sorted({r.scale_index for r in policy.rules}):
        dense, tuned = ([spent[s] / layers for spent in side if spent] for side in (seen.dense_scales, seen.tuned_scales))
        config = launches[s].config
        assert config is not None, "a launch that was chosen"
        rows.append(Row(
            s, launches[s].kernel, config.to_row(), "measured", adapter.dense_name,
            timing(tuned), timing(dense), paired_speedup(dense, tuned),
        ))  # fmt: skip
    return tuple(rows)


def decision_cost(seen: Comparison, adapter: Adapter, policy: Policy) -> tuple[str, ...]:
    """Notes on what decision scales pay for ranking keys and keeping residuals; the whole-picture time includes it."""
    decisions = [r.variant.decision_scale for r in policy.rules]
    scales = {s for s in decisions if s is not None}
    notes = []
    for s in sorted(scales - {r.scale_index for r in policy.rules}):
        dense, tuned = (
            timing([x[s] / adapter.model.layers for x in side if x]) for side in (seen.dense_scales, seen.tuned_scales)
        )
        notes.append(f"decision scale {s}: {dense.p50_ms:.1f} -> {tuned.p50_ms:.1f} ms a layer for ranking keys and residuals")
    return tuple(notes)
