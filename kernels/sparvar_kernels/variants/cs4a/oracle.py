"""CS4A by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.cs4a.rule import Cs4a
from sparvar_kernels.variants.definitions import dense, enlarge, masked, probabilities, tile_lists, window_keys
from sparvar_kernels.variants.protocol import Inputs


def mass(q: Tensor, k: Tensor, problem: AttentionProblem, tile: Tile, sample: int = 1) -> Tensor:
    """[B, H, T, Nk] fp64: probability summed over every `sample`-th query of each tile.

    A tile shorter than the others ranks by the queries it has.
    """
    p = probabilities(q, k, problem.softmax_scale)
    return torch.stack([p[:, :, t[::sample]].sum(2) for t in tile_lists(problem.grid, tile)], 2)


def kept(variant: Cs4a, schedule: ScaleSchedule, scale_index: int) -> int:
    n = schedule.num_keys(scale_index)
    if variant.keys == "place":
        return min(n, max(64, 64 * round(variant.top_k * n / 64)))
    n = schedule.num_keys(variant.decision_scale)
    return min(n, max(112, 112 * round(variant.top_k * n / 112)))


def cs4a_keys(ranking: list[int], schedule: ScaleSchedule, scale_index: int, variant: Cs4a) -> list[int]:
    """Keys of a query tile at a later scale, in order, from its decision tile's ranking (keys "place")."""
    s0, (gh, gw) = variant.decision_scale, schedule.grids[variant.decision_scale]
    budget = kept(variant, schedule, scale_index)
    chosen: list[int] = []
    for key in ranking[: min(budget, len(ranking))]:
        family = [key]
        if key >= schedule.starts[s0]:
            cell = key - schedule.starts[s0]
            for s in range(s0 + 1, scale_index + 1):
                h, w = schedule.grids[s]
                for y in range(h):
                    for x in range(w):
                        if (2 * y + 1) * gh // (2 * h) * gw + (2 * x + 1) * gw // (2 * w) == cell:
                            family.append(schedule.starts[s] + y * w + x)
        chosen += family
    return chosen[:budget]


def reference(variant: Cs4a, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64, keys "place"; the paper's form "index" is held against brute force in the tests of plans."""
    assert decision is not None
    schedule = problem.schedule
    p, dq, dk, dv = decision
    full, decision_tile = dense(dq, dk, dv, p), variant.at_decision(schedule, problem.scale_index).tile
    importance = mass(dq, dk, p, decision_tile, variant.sample)
    if variant.window:
        for t, queries in enumerate(tile_lists(p.grid, decision_tile)):
            near = set().union(*(window_keys(schedule, p.scale_index, n, p.scale_index, variant.window) for n in queries))
            importance[:, :, t, sorted(near)] += 2 * q.shape[2]  # more than any mass
    ranking = torch.argsort(importance, dim=-1, descending=True, stable=True)
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    sparse = torch.full(dq.shape, math.nan, dtype=torch.float64)
    tiles, source = tile_lists(problem.grid, variant.tile), tile_lists(p.grid, decision_tile)
    few = kept(variant, schedule, p.scale_index)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = (slice(b, b + 1), slice(h, h + 1))
            lists = []
            for queries in tiles:
                w = problem.grid[1]
                cy = sum(a // w + 0.5 for a in queries) / len(queries) * p.grid[0] / problem.grid[0]
                cx = sum(a % w + 0.5 for a in queries) / len(queries) * p.grid[1] / problem.grid[1]
                parent = next(j for j, s in enumerate(source) if int(cy) * p.grid[1] + int(cx) in s)
                lists.append(cs4a_keys(ranking[b, h, parent].tolist(), schedule, problem.scale_index, variant))
            out[one] = masked(q[one], k[one], v[one], problem, variant.tile, lists)
            best = [r[:few].tolist() for r in ranking[b, h]]
            sparse[one] = masked(dq[one], dk[one], dv[one], p, decision_tile, best)
    return out + enlarge(full - sparse, p.grid, problem.grid) if variant.residual else out
