"""Pooled keys by their definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.definitions import mean_square
from sparvar_kernels.variants.pooled.rule import Pooled
from sparvar_kernels.variants.protocol import Inputs


def reference(variant: Pooled, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64: keys of the grids from `first_scale` on merged block by block, logits by the second-order rule."""
    schedule, f = problem.schedule, variant.factor
    groups = [[j] for j in range(schedule.starts[variant.first_scale])]
    for s in range(variant.first_scale, problem.scale_index + 1):
        h, w = schedule.grids[s]
        for top in range(0, h, f):
            for left in range(0, w, f):
                ys, xs = range(top, min(top + f, h)), range(left, min(left + f, w))
                groups.append([schedule.starts[s] + y * w + x for y in ys for x in xs])
    qd, kd, vd = (t.double() * c for t, c in ((q, problem.softmax_scale), (k, 1), (v, 1)))
    q2 = mean_square(q) * problem.softmax_scale**2
    logits, values = [], []
    for group in groups:
        mean = kd[:, :, group].mean(2, keepdim=True)
        spread = ((kd[:, :, group] - mean) ** 2).sum(-1).mean(-1, keepdim=True)  # [B, H, 1]
        bias = math.log(len(group)) + q2 * spread / (2 * q.shape[-1])
        logits.append((qd @ mean.transpose(-1, -2)).squeeze(-1) + bias)
        values.append(vd[:, :, group].mean(2))
    return torch.softmax(torch.stack(logits, -1), -1) @ torch.stack(values, 2)
