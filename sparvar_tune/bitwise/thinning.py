"""What the steps that leave out tokens do in sampling: FastVAR's pruning and ScaleKV's budgets.

`generation/prune_tokens.py` and `generation/cache_budget.py` say which tokens and keys stay; the order of the work is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.generation import CacheBudget, PruneTokens
from sparvar_tune.generation.tokens import Work, kept_rows, pruned, window_places

Given = dict[tuple[int, str], Tensor]  # what a block's part gave at the cached scale, by (layer, part)


@dataclass(frozen=True)
class Thinning:
    """The steps of one attention's policy that leave out tokens, at most one of each."""

    schedule: ScaleSchedule
    prune: PruneTokens | None = None
    budget: CacheBudget | None = None

    @classmethod
    def of(cls, attend: Any, schedule: ScaleSchedule) -> Thinning:
        """Those of `attend.policy`, where it has one."""
        steps = getattr(getattr(attend, "policy", None), "steps", ())
        prune = next((step for step in steps if isinstance(step, PruneTokens)), None)
        return cls(schedule, prune, next((step for step in steps if isinstance(step, CacheBudget)), None))

    def by_parts(self, s: int, layer: int) -> bool:
        """Whether a block chooses tokens at a scale, or gives there what stands for the others later."""
        return self.prune is not None and self.prune.by_parts(s, layer)

    def part(self, given: Given, name: tuple[int, str], s: int, x: Tensor, work: Work) -> Tensor:
        """What a part adds to all tokens of x [B, N, C], in their dtype: the fused path gives fp32."""
        assert self.prune is not None, "by_parts"
        return pruned(self.prune, self.schedule.grids, s, x, work, given, name).to(x.dtype)

    def budget_after(self, s: int, layer: int) -> int | None:
        """The keys that a layer's cache is cut to once scale `s` is in it; None: it is not cut."""
        return None if self.budget is None else self.budget.before(s + 1, layer)

    def window_of(self, x: Tensor, s: int) -> Tensor:
        """[B, window, C] of a scale's tokens x [B, N, C]: copies, as x changes."""
        assert self.budget is not None, "budget_after"
        return x[:, window_places(self.schedule.grids[s], self.budget.window).to(x.device)]

    def kept(self, q: Tensor, keys: Tensor, keep: int, s: int) -> Tensor:
        """[B, H, keep] places in keys [B, H, N, D] that stay, by the window's raw queries q [B, H, window, D]."""
        assert self.budget is not None, "budget_after"
        own = window_places(self.schedule.grids[s], self.budget.window).to(keys.device)
        return kept_rows(q, keys, own + keys.shape[2] - self.schedule.num_queries(s), keep, self.budget.pool)
