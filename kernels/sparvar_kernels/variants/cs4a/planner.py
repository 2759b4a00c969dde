"""CS4A planner: keys ranked by softmax mass at the decision scale, carried to finer scales as key lists.

Everything is a fixed number of tensor operations on the device of the mass, with no host synchronisation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule, Tile, nearest_cell, partition
from sparvar_kernels.variants.cs4a.rule import KEY_MULTIPLE, PAPER_MULTIPLE, Cs4a
from sparvar_kernels.variants.csla.planner import tile_mask
from sparvar_kernels.variants.csla.rule import Csla
from sparvar_kernels.variants.lists import KeyLists


def keys_kept(variant: Cs4a, schedule: ScaleSchedule, scale_index: int) -> int:
    """How many keys every tile keeps at `scale_index` (the decision scale included); place: a multiple of 64."""
    if variant.keys == "place":
        n = schedule.num_keys(scale_index)
        return min(n, max(KEY_MULTIPLE, round(variant.top_k * n / KEY_MULTIPLE) * KEY_MULTIPLE))
    n = schedule.num_keys(variant.decision_scale)
    kept = min(n, max(PAPER_MULTIPLE, round(variant.top_k * n / PAPER_MULTIPLE) * PAPER_MULTIPLE))
    for s in range(variant.decision_scale + 1, scale_index + 1):
        kept += _band(schedule, s, variant).shape[1]
    return kept


def ranks_needed(variant: Cs4a, schedule: ScaleSchedule, scale_index: int) -> int:
    """How many of the decision scale's keys, best first, the plan at `scale_index` may look at."""
    if variant.keys == "index":
        return keys_kept(variant, schedule, variant.decision_scale)
    return min(keys_kept(variant, schedule, scale_index), schedule.num_keys(variant.decision_scale))


def rank_keys(mass: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """mass [..., T, Nk] -> [..., T, count] int32 key positions, most mass first; `first` [T, Nk] bool goes ahead."""
    if first is not None:
        mass = mass + first * (mass.amax(-1, keepdim=True) + 1)
    return torch.topk(mass, count, dim=-1, sorted=True).indices.int()


@lru_cache(maxsize=64)
def window_first(schedule: ScaleSchedule, variant: Cs4a, device: str = "cpu") -> Tensor | None:
    """[T_S, keys of the decision scale] bool: the window's cells on the decision grid; None without a window."""
    if variant.window == 0:
        return None
    return _own_window(schedule, variant.decision_scale, variant.tile, variant.window).to(device)


def _own_window(schedule: ScaleSchedule, scale_index: int, tile: Tile, side: int) -> Tensor:
    """[T, Nk] bool: keys of the tiles' own scale within `side` windows of their queries."""
    windows = tuple(side if s == scale_index else -1 for s in range(len(schedule)))
    mask = tile_mask(schedule, scale_index, Csla(windows, 0, tile))
    mask[:, : schedule.prefix] = False  # CSLA always shows the prefix; a window does not hold it
    return mask


@lru_cache(maxsize=64)
def children(schedule: ScaleSchedule, decision_scale: int, scale_index: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The keys at `scale_index` each key of the decision scale stands for: table [Nk_S, W] int32 and counts [Nk_S].

    A key of an earlier scale stands for itself; a cell of the decision grid also for every cell of the finer grids
    whose centre falls into it. Each row starts with the key itself, then coarse to fine in raster order; zeros pad.
    """
    first, last = schedule.starts[decision_scale], schedule.starts[decision_scale + 1]
    key, parent = [torch.arange(last)], [torch.arange(last)]
    for s in range(decision_scale + 1, scale_index + 1):
        key.append(torch.arange(schedule.starts[s], schedule.starts[s + 1]))
        parent.append(first + nearest_cell(schedule.grids[s], schedule.grids[decision_scale]))
    keys, parents = torch.cat(key), torch.cat(parent)
    order = torch.argsort(parents, stable=True)
    counts = torch.bincount(parents, minlength=last)
    begin = torch.cumsum(counts, 0) - counts
    table = torch.zeros(last, int(counts.max()), dtype=torch.int32)
    table[parents[order], torch.arange(len(keys)) - begin[parents[order]]] = keys[order].int()
    return table.to(device), counts.int().to(device)


def expand(ranked: Tensor, table: Tensor, counts: Tensor, width: int) -> Tensor:
    """ranked [..., R] int32 -> [..., width] int32: the children of each ranked key in turn, the first `width` of all.

    The children of one row must number `width` or more.
    """
    many = counts[ranked.long()]  # [..., R]
    begin = many.cumsum(-1, dtype=torch.int32) - many
    marks = torch.zeros(*ranked.shape[:-1], width + 1, dtype=torch.int32, device=ranked.device)
    marks.scatter_(-1, begin.clamp(max=width).long(), 1)  # a ranked key's run starts here; late ones share the last slot
    which = marks[..., :width].cumsum(-1) - 1  # [..., width]: the ranked key each output belongs to
    child = torch.arange(width, device=ranked.device) - begin.gather(-1, which)
    return table.view(-1)[ranked.gather(-1, which) * table.shape[1] + child]


@lru_cache(maxsize=64)
def source_tiles(schedule: ScaleSchedule, scale_index: int, variant: Cs4a, device: str = "cpu") -> Tensor:
    """[T] int64: the decision-scale tile whose list each tile at `scale_index` takes.

    place: the tile that the centre of the query tile falls into. index (paper): the nearest raster group by position,
    rint((g + .5) / G_k * G_S - .5), taken scale by scale.
    """
    source_grid = schedule.grids[variant.decision_scale]
    if variant.keys == "place":
        target = partition(schedule.grids[scale_index], variant.tile)
        source = partition(source_grid, variant.at_decision(schedule, scale_index).tile)
        size = torch.tensor(schedule.grids[scale_index], dtype=torch.float64)
        cell = (target.centre * torch.tensor(source_grid, dtype=torch.float64) / size).long()
        return source.tile_of[cell[:, 0] * source_grid[1] + cell[:, 1]].to(device)
    group = torch.arange(len(partition(source_grid, variant.tile).counts))
    for s in range(variant.decision_scale + 1, scale_index + 1):
        group = group[_nearest_group(len(partition(schedule.grids[s], variant.tile).counts), len(group))]
    return group.to(device)


def _nearest_group(count: int, source_count: int) -> Tensor:
    g = torch.arange(count, dtype=torch.float64)
    return torch.round((g + 0.5) / count * source_count - 0.5).long().clamp(0, source_count - 1)


@lru_cache(maxsize=64)
def _band(schedule: ScaleSchedule, scale_index: int, variant: Cs4a, device: str = "cpu") -> Tensor:
    """[T, L] int32: the paper's contiguous own-scale band of each raster group.

    It starts at the first key of the union of the group's windows; its length is the longest union's size rounded up to
    a multiple of 112; it is moved left where it would pass the last key.
    """
    side = variant.bands[scale_index - variant.decision_scale - 1]
    own = _own_window(schedule, scale_index, variant.tile, side)[:, schedule.starts[scale_index] :]
    n = own.shape[1]
    length = min(n, -(-int(own.sum(-1).max()) // PAPER_MULTIPLE) * PAPER_MULTIPLE)
    begin = own.int().argmax(-1).clamp(max=n - length)
    return (schedule.starts[scale_index] + begin[:, None] + torch.arange(length)).int().to(device)


@lru_cache(maxsize=64)
def band_lists(schedule: ScaleSchedule, scale_index: int, variant: Cs4a) -> Tensor:
    """[T, L] int32 on the CPU: the paper's bands of every scale after the decision scale, carried along group by group."""
    keys = torch.zeros(len(partition(schedule.grids[variant.decision_scale], variant.tile).counts), 0, dtype=torch.int32)
    for s in range(variant.decision_scale + 1, scale_index + 1):
        group = _nearest_group(len(partition(schedule.grids[s], variant.tile).counts), len(keys))
        keys = torch.cat([keys[group], _band(schedule, s, variant)], -1)
    return keys


def cs4a_lists(ranked: Tensor, schedule: ScaleSchedule, scale_index: int, variant: Cs4a) -> KeyLists:
    """Key lists at `scale_index` from ranked [B, H, T_S, R] int32 (see `rank_keys`, R >= `ranks_needed`).

    At the decision scale itself `variant` must be `at_decision`'s: the list is then simply the best keys.
    """
    device = str(ranked.device)
    tiles = partition(schedule.grids[scale_index], variant.tile, device)
    kept = keys_kept(variant, schedule, scale_index)
    if scale_index == variant.decision_scale:
        return KeyLists(tiles, ranked[..., :kept])
    ranked = ranked[..., : ranks_needed(variant, schedule, scale_index)]
    ranked = ranked[:, :, source_tiles(schedule, scale_index, variant, device)]
    if variant.keys == "index":
        bands = band_lists(schedule, scale_index, variant).to(device)
        return KeyLists(tiles, torch.cat([ranked, bands.expand(*ranked.shape[:2], -1, -1)], -1))
    table, counts = children(schedule, variant.decision_scale, scale_index, device)
    return KeyLists(tiles, expand(ranked, table, counts, kept))
