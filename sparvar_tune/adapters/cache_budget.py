"""Caches cut to their layers' budgets, in a live model; `generation/cache_budget.py` says which keys stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.scale_count import IsOther, ScaleCount
from sparvar_tune.generation import CacheBudget
from sparvar_tune.generation.tokens import kept_rows, window_places


def keep_budget(
    found: Parts, step: CacheBudget, queries: Callable[[Any, Tensor], Tensor], given: Callable[..., dict[str, Any]],
    is_other: IsOther,
) -> Undos:  # fmt: skip
    """Cuts the cache after every scale that the next one's budget is smaller than.

    queries(attention, x [B, n, C]) -> [B, n, H, D], raw from the projection. given: a call's arguments by name. is_other: whether
    an image has another schedule than the parts'; it then keeps its whole cache.
    """
    undos = Undos()
    for layer, module in enumerate(found.attentions):
        undos.add(replace_method(module, "forward", _body(found, step, layer, module, queries, given, is_other)))
    return undos


def _body(found: Parts, step: CacheBudget, layer: int, module: Any, queries: Any, given: Any, is_other: Any) -> Any:
    schedule, count = found.schedule, ScaleCount(found, module, is_other)
    assert schedule is not None, "the policy's"

    def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not module.caching:
            return inner(*args, **kwargs)
        call = given(*args, **kwargs)
        s = count.next(lambda: call)
        out = inner(*args, **kwargs)
        if s is None or module.cached_k is None:
            return out
        keep = step.before(s + 1, layer)
        axis = 1 if module.using_flash else 2
        if keep is not None and module.cached_k.shape[axis] > keep:
            at = window_places(schedule.grids[s], step.window).to(module.cached_k.device)
            q = queries(module, call["x"][:, at]).transpose(1, 2)
            keys = module.cached_k.transpose(1, 2) if axis == 1 else module.cached_k
            rows = kept_rows(q, keys, at + keys.shape[2] - call["x"].shape[1], keep, step.pool)
            rows = (rows.transpose(1, 2) if axis == 1 else rows)[..., None].expand(-1, -1, -1, module.head_dim)
            module.cached_k, module.cached_v = module.cached_k.gather(axis, rows), module.cached_v.gather(axis, rows)
        return out

    return forward
