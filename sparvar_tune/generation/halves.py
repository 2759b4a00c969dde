"""Guidance in two halves of one batch, the second dropped from some scale on: what decision scales leave is kept by half."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.generation.registry import drop_from

# an attention and the one that is built like it; what it planned serves every picture
_SECONDS: WeakKeyDictionary[SparseAttention, SparseAttention] = WeakKeyDictionary()


class HalvesApart:
    """Attention of a batch of `rows`, the halves of guidance one behind the other: `first` has one half, `second` the other.

    A batch of other rows is the first half alone, whose decision scales `first` knows.
    """

    def __init__(self, first: Any, second: Any, rows: int) -> None:
        self.first, self.second, self.rows = first, second, rows
        self.policy, self.skip_scales = first.policy, first.skip_scales

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        if q.shape[0] != self.rows:
            out: Tensor = self.first(q, k, v, layer, scale_index)
            return out
        halves = zip(*(t.chunk(2) for t in (q, k, v)), strict=True)
        return torch.cat([a(*half, layer, scale_index) for a, half in zip((self.first, self.second), halves, strict=True)])


def halves_apart(attend: Any, rows: int) -> Any:
    """`attend`, or a HalvesApart where its policy drops a half before a scale that lives on a decision of both.

    attend: a SparseAttention, what wraps one as its `inner` (a stopwatch), or anything else, which comes back as it is.
    The second half begins its picture here.
    """
    target = attend
    while not isinstance(target, SparseAttention) and hasattr(target, "inner"):
        target = target.inner
    if not isinstance(target, SparseAttention) or not decides_apart(target, drop_from(target.policy)):
        return attend
    if target not in _SECONDS:
        _SECONDS[target] = another(target)
    _SECONDS[target].reset()
    return HalvesApart(attend, _around(attend, _SECONDS[target]), rows)


def another(a: SparseAttention) -> SparseAttention:
    """One that is built like `a` and knows no picture yet."""
    return SparseAttention(a.policy, a.schedule, softmax_scale=a.softmax_scale, logit_bound=a.logit_bound, launches=a.launches)


def decides_apart(attend: SparseAttention, dropped: int | None) -> bool:
    """Whether a scale lives on a decision of both halves where, from scale `dropped` on, one of them is gone. None: it stays."""
    if dropped is None:
        return False
    decisions = (v.decision_scale for plans in attend.plans for plan in plans[dropped:] for v, _ in plan.groups)
    return any(decision is not None and decision < dropped for decision in decisions)


def _around(attend: Any, second: SparseAttention) -> Any:
    """`second` in the same wraps, which share what they add up."""
    if isinstance(attend, SparseAttention):
        return second
    wrap = copy.copy(attend)
    wrap.inner = _around(attend.inner, second)
    return wrap
