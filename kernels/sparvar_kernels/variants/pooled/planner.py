"""Pooled keys: heads that look everywhere read averages of fine cells instead of the cells.

Ours, not the paper's. A diffuse head spreads its mass over thousands of keys, so windows and top-k lists both fail it;
but its softmax hardly changes within a small block. On the grids from `first_scale` on, each factor x factor block of keys
becomes one key and one value, their means, and its logit gains

    log(n) + q2 / (2 D) * spread,   spread = mean |k - mean k|^2 over the block of n keys,   q2 = mean |q|^2 of the head

the first two terms of log sum exp(q.k) around the mean (the second for an isotropic spread). A query whose |q|^2 is not below
BELIEVED counts as 0 in q2. No decision scale is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.variants.pooled.rule import Pooled

BELIEVED = 2.0**64  # |q|^2 of no model; sums of these and their products with a spread of keys are far from fp32's end


def pool_keys(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, variant: Pooled) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, N', D] in their dtype and the logit bias [B, H, N'] (fp32, fp64 for fp64 inputs)."""
    factors = dict.fromkeys(range(variant.first_scale, problem.scale_index + 1), variant.factor)
    return with_means(q, k, v, problem, problem.schedule.starts[variant.first_scale], factors)


def with_means(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, kept: int, factors: Mapping[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `kept` keys and values as they are, bias 0, and behind them the means of each grid in `factors` (scale -> side of
    its blocks); shapes and dtypes as of `pool_keys`.
    """
    means = grid_means(q, k, v, problem, factors)
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    nothing = torch.zeros(*k.shape[:2], kept, dtype=work, device=k.device)
    parts = [(k[:, :, :kept], v[:, :, :kept], nothing), *means]
    keys, values, bias = (torch.cat(same, 2) for same in zip(*parts, strict=True))
    return keys, values, bias


def grid_means(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, factors: Mapping[int, int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each grid in `factors` (scale -> side of its blocks) mean keys and values [B, H, blocks, D], biases [B, H, blocks]."""
    schedule = problem.schedule
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    # all rows share the mean: what is not finite, or would make it so, stays in its own row
    squares = q.to(work).square().sum(-1).nan_to_num_(0.0, 0.0, 0.0)
    squares.masked_fill_(squares >= BELIEVED, 0.0)
    stretch = squares.mean(-1, keepdim=True) * (problem.softmax_scale**2 / (2 * q.shape[-1]))  # [B, H, 1]
    made = []
    for s, factor in factors.items():
        block = slice(schedule.starts[s], schedule.starts[s + 1])
        near_k, near_v = k[:, :, block].to(work), v[:, :, block].to(work)
        mean_k, mean_v = (_pool(t, schedule.grids[s], factor) for t in (near_k, near_v))
        mean_square = _pool(near_k.square().sum(-1, keepdim=True), schedule.grids[s], factor).squeeze(-1)
        spread = (mean_square - mean_k.square().sum(-1)).clamp(min=0)
        bias = torch.addcmul(_log_counts(schedule, s, factor, str(k.device)).to(work), stretch, spread)
        made.append((mean_k.to(k.dtype), mean_v.to(v.dtype), bias))
    return made


def _pool(t: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """[B, H, h*w, C] -> [B, H, ceil(h/f)*ceil(w/f), C]: means over blocks, smaller ones at the right and bottom edge."""
    picture = t.reshape(-1, *grid, t.shape[-1]).permute(0, 3, 1, 2)  # channels_last view
    pooled = F.avg_pool2d(picture, factor, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).reshape(*t.shape[:2], -1, t.shape[-1])


@lru_cache(maxsize=256)
def _log_counts(schedule: ScaleSchedule, scale: int, factor: int, device: str) -> Tensor:
    """[cells] fp64: log of how many keys each block holds."""
    h, w = (torch.bincount(torch.arange(n) // factor).double() for n in schedule.grids[scale])
    return (h[:, None] * w[None, :]).flatten().log().to(device)


def num_keys(schedule: ScaleSchedule, scale_index: int, variant: Pooled) -> int:
    """How many keys a query reads."""
    blocks = (-(-h // variant.factor) * -(-w // variant.factor) for h, w in schedule.grids[variant.first_scale : scale_index + 1])
    return schedule.starts[variant.first_scale] + sum(blocks)
