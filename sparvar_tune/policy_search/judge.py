"""Looks at one policy with a live model: how long the pictures take and how close they are to the dense ones.

Each search pair's dense generation is run once up to the first scale any policy touches and kept there; a policy then
finishes from that state, so a trial costs only what attention can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pvariance, stdev
from typing import Any

import torch

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.measure.fidelity import CONFIDENCE, Constraint, PictureFidelity, class_mean, compare_pictures, t_quantile
from sparvar_tune.measure.timing import CLOCK, Clock, Stopwatch
from sparvar_tune.policy_search.menu import Table, assign, decision_scale, paper_policy
from sparvar_tune.policy_search.study import Knobs, Verdict

MARGIN_DB = 0.25  # predictions from 8 pairs that were also searched on are optimistic: two of three runs missed with 0.05
RACE_AFTER = 3  # pairs judged before a trial may be given up


@dataclass(frozen=True)
class Reference:
    """One search pair: its parked state, dense picture and the dense time of the rest (ms)."""

    state: Any
    picture: torch.Tensor
    dense_ms: float


def build_policy(knobs: Knobs, adapter: Adapter, table: Table) -> Policy:
    """The policy some knobs stand for."""
    schedule, layers, heads = adapter.schedule, adapter.model.layers, adapter.model.heads
    if knobs.form == "paper":
        return paper_policy(schedule, layers, heads)
    if knobs.form == "drop last scale":
        return Policy(("A" * heads,) * layers, (), (len(schedule) - 1,))
    prices = {s: knobs.prices[len(schedule) - 1 - s] for s in table.time_ms}
    return assign(table, schedule, prices, knobs.tilt)


def make_attention(adapter: Adapter, policy: Policy, launches: Mapping[int, Launch] | None = None) -> SparseAttention:
    return SparseAttention(
        policy, adapter.schedule, softmax_scale=adapter.softmax_scale, logit_bound=adapter.logit_bound, launches=launches
    )  # fmt: skip


def first_touched(adapter: Adapter) -> int:
    """The first scale any policy of the search may act on."""
    return decision_scale(adapter.schedule)


class Judge:
    """Callable: knobs -> verdict, from the search pairs; `held_out` pairs will have the last word."""

    def __init__(self, adapter: Adapter, pairs: Sequence[Pair], constraint: Constraint, held_out: int, table: Table,
                 say: Callable[[str], None], clock: Clock = CLOCK) -> None:  # fmt: skip
        self.adapter, self.pairs, self.constraint = adapter, pairs, constraint
        self.held_out, self.table = held_out, table
        self.stopwatch = Stopwatch(adapter.device, clock)
        self.references: list[Reference] = []
        for i, pair in enumerate(pairs):
            state = adapter.start(pair, first_touched(adapter))
            made: list[torch.Tensor] = []
            ms = self.stopwatch(lambda: made.append(adapter.finish(state, adapter.dense)))  # noqa: B023
            self.references.append(Reference(state, made[0], ms))
            say(f"dense pictures to compare with: {i + 1}/{len(pairs)}")
        self.best_ms: float | None = None  # of the fastest trial that meets the constraint

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

    def shortfall(self, psnr: Sequence[float], ssim: Sequence[float]) -> float:
        flat = (0.0,) * self.adapter.num_classes
        missing = (
            self.constraint.psnr_db - self.predicted(psnr, self.adapter.class_levels(), self.pairs),
            100 * (self.constraint.ssim - self.predicted(ssim, flat, self.pairs)),
        )
        return max(missing) + MARGIN_DB

    def doomed(self, found: Sequence[PictureFidelity], pairs: Sequence[Pair]) -> bool:
        """True if held-out pairs seen so far leave little hope for PSNR. Giving up early can only refuse, never certify."""
        if len(found) < RACE_AFTER:
            return False
        psnr = [f.psnr_db for f in found]
        return self.predicted(psnr, self.adapter.class_levels(), pairs) + self._doubt(psnr, pairs) < self.constraint.psnr_db

    def _doubt(self, psnr: Sequence[float], pairs: Sequence[Pair]) -> float:
        """How far (dB) a mean over so few pairs may yet move."""
        return 1.5 * stdev(_above(psnr, self.adapter.class_levels(), pairs)) / math.sqrt(len(psnr))

    def __call__(self, knobs: Knobs) -> Verdict:
        attend = make_attention(self.adapter, build_policy(knobs, self.adapter, self.table))
        times: list[float] = []
        found: list[PictureFidelity] = []
        for reference in self.references:
            made: list[torch.Tensor] = []
            attend.reset()
            times.append(self.stopwatch(lambda: made.append(self.adapter.finish(reference.state, attend))))  # noqa: B023
            found.append(compare_pictures(made[0], reference.picture))
            if RACE_AFTER <= len(found) < len(self.references) and self._hopeless(times, found):
                break
        psnr, ssim = [f.psnr_db for f in found], [f.ssim for f in found]
        shortfall, complete = self.shortfall(psnr, ssim), len(found) == len(self.references)
        if complete and shortfall <= 0 and (self.best_ms is None or median(times) < self.best_ms):
            self.best_ms = median(times)
        return Verdict(median(times), shortfall, fmean(psnr), fmean(ssim), complete)

    def _hopeless(self, times: Sequence[float], found: Sequence[PictureFidelity]) -> bool:
        """True if the trial is clearly slower than the best that meets the constraint, or clearly short of it."""
        slower = self.best_ms is not None and median(times) > 1.03 * self.best_ms
        psnr = [f.psnr_db for f in found]
        return slower or self.shortfall(psnr, [f.ssim for f in found]) > 0.3 + self._doubt(psnr, self.pairs)


def _above(values: Sequence[float], levels: Sequence[float], pairs: Sequence[Pair]) -> list[float]:
    """What each value is above the level of its pair's class; `pairs` may go on longer."""
    return [value - levels[label] for value, (label, _) in zip(values, pairs, strict=False)]
