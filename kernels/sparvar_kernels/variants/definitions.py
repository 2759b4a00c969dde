"""What the oracles of several variants share: tiles, windows, softmax and enlarging by their definitions, in fp64 on the CPU.

Slow on purpose: loops and masks, nothing cached, and no code of the planners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile


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


def mean_square(q: Tensor) -> Tensor:
    """[B, H, 1] fp64: mean |q|^2 of a head's queries [B, H, Nq, D], of which one that is not below 2^64 counts as 0."""
    squares = (q.double() ** 2).sum(-1)
    return torch.where(squares < 2.0**64, squares, 0.0).mean(-1)[..., None]


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


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, H, Nq, Nk] fp64."""
    return torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, -1)


def masked(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, tile: Tile, keys: Sequence[Iterable[int]]) -> Tensor:
    """[B, H, Nq, D] fp64: attention of each tile's queries to its own keys, for every batch and head alike."""
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    for queries, chosen in zip(tile_lists(problem.grid, tile), keys, strict=True):
        listed = sorted(chosen)
        p = probabilities(q[:, :, queries], k[:, :, listed], problem.softmax_scale)
        out[:, :, queries] = p @ v[:, :, listed].double()
    return out


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


def dense(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
    """[B, H, Nq, D] fp64: every key."""
    return probabilities(q, k, problem.softmax_scale) @ v.double()
