"""CSLA planner: windows around each query's own place in every earlier grid, as key lists.

Query (y, x) of a grid H x W looks, on key grid h x w, at the window centred on (round(y / H * h), round(x / W * w)),
round half to even; a centre may lie one past the edge, then only the part of the window inside the grid counts
(public code's `SparseFlexAttn`; paper section 3.3). Geometry only: one plan per (schedule, scale, variant), cached.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparvar_kernels.lists import KeyLists
from sparvar_kernels.scales import ScaleSchedule, partition
from sparvar_kernels.variants import BLOCK, Csla


def _centres(n: int, target: int) -> Tensor:
    """[n] int64: where each of n query coordinates is centred on an axis of `target` cells."""
    return torch.round(torch.arange(n, dtype=torch.float64) / n * target).long()


def _axis_visible(n: int, target: int, window: int) -> Tensor:
    """[n, target] bool: |centre - key| <= window // 2 on one axis."""
    return (_centres(n, target)[:, None] - torch.arange(target)).abs() <= window // 2


def tile_mask(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> Tensor:
    """[T, Nk] bool on the CPU: the keys each query tile of `variant` attends to."""
    h, w = schedule.grids[scale_index]
    tiles = partition((h, w), variant.tile)
    num_tiles = len(tiles.counts)
    place = torch.arange(h * w)
    y, x = place // w, place % w
    mask = torch.zeros(num_tiles, schedule.num_keys(scale_index), dtype=torch.bool)
    mask[:, : schedule.starts[variant.sinks]] = True
    for s in range(variant.sinks, scale_index + 1):
        if variant.windows[s] < 0:
            continue
        rows, columns = schedule.grids[s]
        # A window is a product of two axis intervals; a tile's union over rectangles of queries is one as well, but a
        # raster tile is not a rectangle, so the union is taken over its grid rows, each of which is.
        by_row = torch.zeros(num_tiles * h, columns, dtype=torch.bool)
        by_row.index_put_((tiles.tile_of * h + y,), _axis_visible(w, columns, variant.windows[s])[x], accumulate=True)
        seen = by_row.view(num_tiles, h, columns).float()
        near = _axis_visible(h, rows, variant.windows[s]).float()  # [h, rows]
        union = torch.einsum("tyc,yr->trc", seen, near) > 0
        mask[:, schedule.starts[s] : schedule.starts[s + 1]] = union.flatten(1)
    if variant.form == "block128":
        blocks = -(-mask.shape[1] // BLOCK)
        padded = torch.zeros(num_tiles, blocks * BLOCK, dtype=torch.bool)
        padded[:, : mask.shape[1]] = mask
        touched = padded.view(num_tiles, blocks, BLOCK).any(-1, keepdim=True)
        mask = touched.expand(-1, -1, BLOCK).reshape(num_tiles, -1)[:, : mask.shape[1]]
    return mask


@lru_cache(maxsize=256)
def csla_lists(schedule: ScaleSchedule, scale_index: int, variant: Csla, device: str = "cpu") -> KeyLists:
    """Key lists shared by batch and heads, keys ascending. Raises ValueError if a tile would see no key."""
    mask = tile_mask(schedule, scale_index, variant).to(device)
    counts = mask.sum(-1)
    if int(counts.min()) == 0:
        raise ValueError(f"csla at scale {scale_index}: a query tile sees no key; widen windows or add sinks")
    width = int(counts.max())
    order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True)[:, :width]
    valid = torch.arange(width, device=mask.device) < counts[:, None]
    keys = torch.where(valid, order, order[:, :1]).int().contiguous()
    exact = None if bool((counts == width).all()) else counts.int()[None, None]
    tiles = partition(schedule.grids[scale_index], variant.tile, device)
    return KeyLists(tiles, keys[None, None], exact)
