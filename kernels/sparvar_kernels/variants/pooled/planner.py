"""Pooled keys: heads that look everywhere read averages of fine cells instead of the cells.

Ours, not the paper's. A diffuse head spreads its mass over thousands of keys, so windows and top-k lists both fail it;
but its softmax hardly changes within a small block. On the grids from `first_scale` on, each factor x factor block of keys
becomes one key and one value, their means, and its logit gains

    log(n) + q2 / (2 D) * spread,   spread = mean |k - mean k|^2 over the block of n keys,   q2 = mean |q|^2 of the head

the first two terms of log sum exp(q.k) around the mean (the second for an isotropic spread). No decision scale is needed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.variants.pooled.rule import Pooled


def pool_keys(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, variant: Pooled) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, N', D] in their dtype and the logit bias [B, H, N'] (fp32, fp64 for fp64 inputs)."""
    schedule, factor = problem.schedule, variant.factor
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    whole = schedule.starts[variant.first_scale]
    keys, values = [k[:, :, :whole]], [v[:, :, :whole]]
    biases = [torch.zeros(*k.shape[:2], whole, dtype=work, device=k.device)]
    stretch = stretch_of(q, problem)
    for s in range(variant.first_scale, problem.scale_index + 1):
        block = slice(schedule.starts[s], schedule.starts[s + 1])
        made = pool_grid(k[:, :, block], v[:, :, block], schedule, s, factor, stretch)
        for parts, part in zip((keys, values, biases), made, strict=True):
            parts.append(part)
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases, 2)


def stretch_of(q: Tensor, problem: AttentionProblem) -> Tensor:
    """[B, H, 1]: what a block's spread is multiplied by in its bias."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.to(work).square().sum(-1).mean(-1, keepdim=True) * (problem.softmax_scale**2 / (2 * q.shape[-1]))


def pool_grid(
    k: Tensor, v: Tensor, schedule: ScaleSchedule, scale: int, factor: int, stretch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the keys and values [B, H, cells, D] of one grid, k and v [B, H, h * w, D], and their biases [B, H, cells]."""
    near_k, near_v = k.to(stretch.dtype), v.to(stretch.dtype)
    mean_k, mean_v = (_pool(t, schedule.grids[scale], factor) for t in (near_k, near_v))
    mean_square = _pool(near_k.square().sum(-1, keepdim=True), schedule.grids[scale], factor).squeeze(-1)
    spread = (mean_square - mean_k.square().sum(-1)).clamp(min=0)
    bias = _log_counts(schedule, scale, factor, str(k.device)).to(stretch.dtype) + stretch * spread
    return mean_k.to(k.dtype), mean_v.to(v.dtype), bias


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
