"""Which tokens a step keeps, and what stands for the others: the arithmetic that every model does alike."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_tune.generation.prune_tokens import PruneTokens

Work = Callable[[Tensor, Tensor | None], Tensor]  # (rows, their places; None: all of them) -> what a block's part gives, gated


def farthest(x: Tensor, keep: int) -> Tensor:
    """[B, keep] places in x [B, N, C] of the rows farthest from the mean row, farthest first."""
    return (x - x.mean(1, keepdim=True)).square().sum(-1).argsort(1, descending=True)[:, :keep]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """[B, kept, C] of x [B, N, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def enlarge(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """x [B, tokens of grid, C] on the grid `to`, each cell the mean of the cells it covers."""
    wide = F.interpolate(x.unflatten(1, grid).permute(0, 3, 1, 2), size=to, mode="area")
    return wide.permute(0, 2, 3, 1).flatten(1, 2)


def pruned(
    step: PruneTokens, grids: Sequence[tuple[int, int]], s: int, x: Tensor, work: Work, given: MutableMapping[Any, Tensor],
    part: Any,
) -> Tensor:  # fmt: skip
    """What a block's part adds to every token of x [B, N, C] at the cached scale, or at one where tokens are left out.

    given: by part, what it gave at the cached scale, kept there until the last scale that needs it.
    """
    keep = step.at(s)
    if keep is None:
        out = given[part] = work(x, None)
        return out
    if not is_given(step, grids, given.get(part)):
        raise not_given(step)
    # with Infinity-2B at 1024x1024 it is 28 MB a layer; conditional rows come first, where the others are dropped since
    before = (given.pop(part) if s == step.last_scale else given[part])[: x.shape[0]]
    places = farthest(x, keep)
    whole = enlarge(before, grids[step.cached_scale], grids[s])
    return whole.scatter_(1, places[..., None].expand(-1, -1, x.shape[-1]), work(rows_at(x, places), places).to(whole.dtype))


def is_given(step: PruneTokens, grids: Sequence[tuple[int, int]], out: Tensor | None) -> bool:
    """Whether that is what a part gave at the cached scale [B, N, C]; other steps have others."""
    return out is not None and out.shape[1] == math.prod(grids[step.cached_scale])


def not_given(step: PruneTokens) -> ValueError:
    """What is raised where a part has nothing that stands for the tokens left out."""
    return ValueError(f"prune_tokens: scale {step.cached_scale} was drawn before the step was known; begin before it")


def window_places(grid: tuple[int, int], window: int) -> Tensor:
    """[window] raster places of the middles (the upper and left one of two) of an even division of `grid`."""
    side = math.isqrt(window)
    y, x = (torch.arange(side) * (n // side) + (n // side - 1) // 2 for n in grid)
    return (y[:, None] * grid[1] + x).flatten()


def kept_rows(q: Tensor, keys: Tensor, window: Tensor, keep: int, pool: int) -> Tensor:
    """[B, H, keep] places in the cache that stay, ascending. q [B, H, window, D], keys [B, H, N, D], window: their own places."""
    score = (q @ keys.transpose(2, 3) / math.sqrt(q.shape[-1])).index_fill_(3, window, -torch.inf).sum(2)
    score = F.max_pool1d(score, pool, 1, pool // 2).index_fill_(2, window, -torch.inf)
    best = score.topk(keep - window.numel(), -1).indices
    return torch.cat((best, window.expand(*best.shape[:2], -1)), -1).sort(-1).values
