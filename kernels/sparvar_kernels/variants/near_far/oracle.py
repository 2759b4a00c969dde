"""Near and far by its definition."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.definitions import mean_square, tile_lists
from sparvar_kernels.variants.near_far.rule import NearFar
from sparvar_kernels.variants.protocol import Inputs


def near_far_groups(variant: NearFar, problem: AttentionProblem, queries: list[int]) -> list[list[int]]:
    """The keys that a query tile reads together: one each of what is near, all of a cell that is far."""
    schedule, (height, width) = problem.schedule, problem.grid
    groups = [[j] for j in range(schedule.prefix)]
    spans = [(min(n), max(n) + 1) for n in ([i // width for i in queries], [i % width for i in queries])]
    for s, (h, w) in enumerate(schedule.grids[: problem.scale_index + 1]):
        side = next(c for c in range(1, max(h, w) + 1) if c * variant.cells >= max(h, w))
        for top in range(0, h, side):
            for left in range(0, w, side):
                cell = [
                    schedule.starts[s] + y * w + x
                    for y in range(top, min(top + side, h))
                    for x in range(left, min(left + side, w))
                ]
                near = True
                for at, (begin, end), size, own in ((top, spans[0], h, height), (left, spans[1], w, width)):
                    # the tile's shadow on this grid, made longer by `near` cells at each end, against the cell's span
                    low, high = (Fraction(edge * size, own * side) for edge in (begin, end))
                    near &= math.floor(low) - variant.near <= at // side < math.ceil(high) + variant.near
                groups += [[j] for j in cell] if near else [cell]
    return groups


def reference(variant: NearFar, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64: a cell's logit by the second-order rule around its mean."""
    qd, kd, vd = (t.double() * c for t, c in ((q, problem.softmax_scale), (k, 1), (v, 1)))
    q2 = mean_square(q) * problem.softmax_scale**2
    out = torch.full_like(qd, math.nan)
    for queries in tile_lists(problem.grid, variant.tile):
        logits, values = [], []
        for group in near_far_groups(variant, problem, queries):
            mean = kd[:, :, group].mean(2, keepdim=True)
            spread = ((kd[:, :, group] - mean) ** 2).sum(-1).mean(-1, keepdim=True)  # [B, H, 1]
            bias = math.log(len(group)) + q2 * spread / (2 * q.shape[-1])
            logits.append((qd[:, :, queries] @ mean.transpose(-1, -2)).squeeze(-1) + bias)
            values.append(vd[:, :, group].mean(2))
        out[:, :, queries] = torch.softmax(torch.stack(logits, -1), -1) @ torch.stack(values, 2)
    return out
