"""Near and far: heads that look both sharply around them and diffusely everywhere.

Ours, not the paper's. Windows lose what lies outside them and pooled keys blur what lies near; a head mostly needs both. As in a
fast multipole method every grid is cut into cells. What a query tile has under it, and `near` cells around that, it reads key by
key; of every other cell it reads one mean, with the bias that `pooled.planner` derives. Cells grow with their grid, so that all
grids together have about (cells**2 * grids) of them. No decision scale is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, partition
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.near_far.rule import NearFar
from sparvar_kernels.variants.pooled.planner import with_means


def _near(queries: int, run: int, keys: int, cell: int, near: int) -> np.ndarray:
    """[runs of queries, cells] bool along one axis: cells that a run lies over, and `near` more on both sides."""
    begin = np.arange(0, queries, run)
    end = np.minimum(begin + run, queries)
    first = begin * keys // (queries * cell) - near
    last = -(-end * keys // (queries * cell)) - 1 + near
    at = np.arange(-(-keys // cell))
    return (first[:, None] <= at) & (at <= last[:, None])


def cells_of(schedule: ScaleSchedule, scale_index: int, variant: NearFar) -> dict[int, int]:
    """The grids up to this scale whose far cells are read as means, with the side of a cell."""
    sides = {s: variant.cell(grid) for s, grid in enumerate(schedule.grids[: scale_index + 1])}
    return {s: side for s, side in sides.items() if side > 1}


def _seen(schedule: ScaleSchedule, scale_index: int, variant: NearFar) -> tuple[np.ndarray, np.ndarray]:
    """[T, keys] and [T, cells] bool: the keys each query tile reads one by one, and the cells of which it reads the mean."""
    (height, width), tile = schedule.grids[scale_index], variant.tile
    many = -(-height // tile.height) * -(-width // tile.width)
    keys, far = [np.ones((many, schedule.prefix), dtype=bool)], [np.ones((many, 0), dtype=bool)]
    for h, w in schedule.grids[: scale_index + 1]:
        cell = variant.cell((h, w))
        if cell == 1:
            keys.append(np.ones((many, h * w), dtype=bool))
            continue
        rows = _near(height, tile.height, h, cell, variant.near)  # [tiles along this axis, cells along it]
        columns = _near(width, tile.width, w, cell, variant.near)
        seen = rows[:, None, :, None] & columns[None, :, None, :]
        far.append(~seen.reshape(many, -1))
        keys.append(seen[:, :, np.arange(h) // cell][..., np.arange(w) // cell].reshape(many, -1))
    return np.concatenate(keys, 1), np.concatenate(far, 1)


def _listed(schedule: ScaleSchedule, scale_index: int, variant: NearFar, seen: np.ndarray, device: str) -> KeyLists:
    """What each tile sees, seen [T, N] bool, as lists; behind its own a list holds its last key again."""
    counts = seen.sum(1)
    place = np.minimum(np.arange(counts.max()), counts[:, None] - 1) + (np.cumsum(counts) - counts)[:, None]
    made = torch.from_numpy(seen.nonzero()[1].astype(np.int32)[place])[None, None].to(device)
    exact = None if (counts == counts[0]).all() else torch.from_numpy(counts.astype(np.int32)[None, None]).to(device)
    return KeyLists(partition(schedule.grids[scale_index], variant.tile, device), made, exact)


@lru_cache(maxsize=256)
def near_far_lists(schedule: ScaleSchedule, scale_index: int, variant: NearFar, device: str = "cpu") -> KeyLists:
    """Key lists shared by batch and heads: keys one by one in ascending order, then means. See `NearFar.lists`."""
    return _listed(schedule, scale_index, variant, np.concatenate(_seen(schedule, scale_index, variant), 1), device)


@dataclass(frozen=True)
class NearAndFar:
    """The same in two parts: what all tiles may read (`whole` keys, then the mean of every cell), and what each has near.

    near: lists of keys of the grids that are averaged; None: there is no such grid. whole: [W] int64, all keys of the others.
    hidden: [T, W + cells] fp32, -inf of cells that the tile has near, else 0. unlisted: [T, K] fp32, -inf of entries that only
    fill a near list, else 0; None: there are none.
    """

    near: KeyLists | None
    whole: Tensor
    hidden: Tensor
    unlisted: Tensor | None


@lru_cache(maxsize=256)
def near_far_parts(schedule: ScaleSchedule, scale_index: int, variant: NearFar) -> NearAndFar:
    """On the CPU; see `NearAndFar`."""
    keys, far = _seen(schedule, scale_index, variant)
    is_whole = np.ones(keys.shape[1], dtype=bool)
    for s in cells_of(schedule, scale_index, variant):
        is_whole[schedule.starts[s] : schedule.starts[s + 1]] = False
    whole = torch.from_numpy(is_whole.nonzero()[0])
    hidden = torch.zeros(len(keys), len(whole) + far.shape[1])
    hidden[:, len(whole) :].masked_fill_(torch.from_numpy(~far), -math.inf)
    if is_whole.all():
        return NearAndFar(None, whole, hidden, None)
    near = _listed(schedule, scale_index, variant, keys & ~is_whole, "cpu")
    if near.counts is None:
        return NearAndFar(near, whole, hidden, None)
    unlisted = torch.arange(near.keys.shape[-1]) >= near.counts[0, 0][:, None]
    return NearAndFar(near, whole, hidden, torch.zeros(unlisted.shape).masked_fill_(unlisted, -math.inf))


def keys_and_means(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, variant: NearFar) -> tuple[Tensor, Tensor, Tensor]:
    """What `near_far_lists` number: keys and values [B, H, N', D] in their dtype and the logit bias [B, H, N'], 0 of a key."""
    return with_means(q, k, v, problem, problem.num_keys, cells_of(problem.schedule, problem.scale_index, variant))
