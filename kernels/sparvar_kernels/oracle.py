"""The oracle: every variant in fp64 on the CPU, written from the definitions, sharing no code with the planners.

Slow on purpose. Loops over scales, tiles and queries; masks instead of lists; nothing is cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant


def tile_lists(grid: tuple[int, int], tile: Tile) -> list[list[int]]:
    """Queries of each tile, tiles in raster order."""
    h, w = grid
    if not tile.height:
        return [list(range(a, min(a + tile.width, h * w))) for a in range(0, h * w, tile.width)]
    out = []
    for top in range(0, h, tile.height):
        for left in range(0, w, tile.width):
            ys, xs = range(top, min(top + tile.height, h)), range(left, min(left + tile.width, w))
            out.append([y * w + x for y in ys for x in xs])
    return out


def window_keys(schedule: ScaleSchedule, scale_index: int, query: int, key_scale: int, side: int) -> set[int]:
    """Keys of `key_scale` in the window of `query`: |round(place) - key| <= side // 2 on both axes."""
    (h, w), (kh, kw) = schedule.grids[scale_index], schedule.grids[key_scale]
    if side < 0:
        return set()
    cy, cx = round(query // w / h * kh), round(query % w / w * kw)  # Python's round is half to even
    start, radius = schedule.starts[key_scale], side // 2
    return {
        start + y * kw + x
        for y in range(max(0, cy - radius), min(kh, cy + radius + 1))
        for x in range(max(0, cx - radius), min(kw, cx + radius + 1))
    }


def csla_keys(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> list[set[int]]:
    """The keys of each query tile."""
    out = []
    for queries in tile_lists(schedule.grids[scale_index], variant.tile):
        keys = set(range(schedule.starts[min(variant.sinks, scale_index + 1)]))
        for query in queries:
            for s in range(variant.sinks, scale_index + 1):
                keys |= window_keys(schedule, scale_index, query, s, variant.windows[s])
        if variant.form == "block128":
            blocks = {key // 128 for key in keys}
            keys = {key for key in range(schedule.num_keys(scale_index)) if key // 128 in blocks}
        out.append(keys)
    return out


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, H, Nq, Nk] fp64."""
    return torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, -1)


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


def masked(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, tile: Tile, keys: Sequence[Iterable[int]]) -> Tensor:
    """[B, H, Nq, D] fp64: attention of each tile's queries to its own keys, for every batch and head alike."""
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    for queries, chosen in zip(tile_lists(problem.grid, tile), keys, strict=True):
        listed = sorted(chosen)
        p = probabilities(q[:, :, queries], k[:, :, listed], problem.softmax_scale)
        out[:, :, queries] = p @ v[:, :, listed].double()
    return out


def pooled(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, variant: Pooled) -> Tensor:
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
    q2 = (qd**2).sum(-1).mean(-1)[..., None]  # [B, H, 1]
    logits, values = [], []
    for group in groups:
        mean = kd[:, :, group].mean(2, keepdim=True)
        spread = ((kd[:, :, group] - mean) ** 2).sum(-1).mean(-1, keepdim=True)  # [B, H, 1]
        bias = math.log(len(group)) + q2 * spread / (2 * q.shape[-1])
        logits.append((qd @ mean.transpose(-1, -2)).squeeze(-1) + bias)
        values.append(vd[:, :, group].mean(2))
    return torch.softmax(torch.stack(logits, -1), -1) @ torch.stack(values, 2)


def enlarge(cached: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bilinear at pixel centres, clamped at the border; [B, H, h*w, D] fp64."""

    def axis(n: int, m: int) -> Tensor:
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            at = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
            low = min(int(at), n - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, n - 1)] += at - low
        return matrix

    picture = cached.double().unflatten(2, source)
    return torch.einsum("bhyxd,Yy,Xx->bhYXd", picture, axis(source[0], target[0]), axis(source[1], target[1])).flatten(2, 3)


def reference_attention(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem,
    decision: tuple[AttentionProblem, Tensor, Tensor, Tensor] | None = None, decision_tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, Nq, D] fp64 of one variant for all heads. `decision`: the problem and q, k, v of the decision scale.

    `decision_tile` is the tile used there (needed by Csla with a residual and by Cs4a, keys "place").
    """
    schedule, i = problem.schedule, problem.scale_index
    everything = set(range(problem.num_keys))
    if isinstance(variant, Dense):
        return masked(q, k, v, problem, Tile(0, problem.num_queries), [everything])
    if isinstance(variant, Pooled):
        return pooled(q, k, v, problem, variant)
    if isinstance(variant, Csla):
        out = masked(q, k, v, problem, variant.tile, csla_keys(schedule, i, variant))
        if variant.decision_scale is None:
            return out
        assert decision is not None and decision_tile is not None
        p, dq, dk, dv = decision
        there = Csla(variant.windows, variant.sinks, decision_tile, variant.form)
        sparse = masked(dq, dk, dv, p, there.tile, csla_keys(schedule, p.scale_index, there))
        full = probabilities(dq, dk, p.softmax_scale) @ dv.double()
        return out + enlarge(full - sparse, p.grid, problem.grid)
    assert decision is not None
    p, dq, dk, dv = decision
    full = probabilities(dq, dk, p.softmax_scale) @ dv.double()
    if isinstance(variant, Reuse):
        return enlarge(full, p.grid, problem.grid)
    assert decision_tile is not None
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
