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


def _any_of(visible: Tensor, side: int) -> Tensor:
    """[n, target] -> [ceil(n / side), target]: seen by any query of each run of `side`."""
    n, target = visible.shape
    padded = torch.zeros(-(-n // side) * side, target, dtype=torch.bool)
    padded[:n] = visible
    return padded.view(-1, side, target).any(1)


def tile_mask(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> Tensor:
    """[T, Nk] bool on the CPU: the keys each query tile of `variant` attends to."""
    h, w = schedule.grids[scale_index]
    tile = variant.tile
    num_tiles = -(-h // tile.height) * -(-w // tile.width) if tile.height else -(-h * w // tile.width)
    mask = torch.zeros(num_tiles, schedule.num_keys(scale_index), dtype=torch.bool)
    mask[:, : schedule.starts[variant.sinks]] = True
    for s in range(variant.sinks, scale_index + 1):
        if variant.windows[s] < 0:
            continue
        rows, columns = schedule.grids[s]
        part = mask[:, schedule.starts[s] : schedule.starts[s + 1]]
        if tile.height:  # a rectangle's union of windows is a rectangle
            near_y = _any_of(_axis_visible(h, rows, variant.windows[s]), tile.height)
            near_x = _any_of(_axis_visible(w, columns, variant.windows[s]), tile.width)
            torch.logical_and(
                near_y[:, None, :, None], near_x[None, :, None, :],
                out=part.view(len(near_y), len(near_x), rows, columns),
            )  # fmt: skip
            continue
        # A window is a product of two axis intervals; a tile's union over rectangles of queries is one as well, but a
        # raster tile is not a rectangle, so the union is taken over its grid rows, each of which is.
        by_row = torch.zeros(num_tiles * h, columns, dtype=torch.bool)
        place = torch.arange(h * w)
        begin = place // tile.width * h + place // w
        by_row.index_put_((begin,), _axis_visible(w, columns, variant.windows[s])[place % w], accumulate=True)
        seen = by_row.view(num_tiles, h, columns).float()
        near = _axis_visible(h, rows, variant.windows[s]).float()  # [h, rows]
        part[:] = (torch.einsum("tyc,yr->trc", seen, near) > 0).flatten(1)
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a millisecond of small operations; waking many threads for each took 80 ms on a GPU server
    try:
        tile, key = tile_mask(schedule, scale_index, variant).nonzero(as_tuple=True)
        tiles = partition(schedule.grids[scale_index], variant.tile, device)
        counts = torch.bincount(tile, minlength=tiles.rows.shape[0])
        if int(counts.min()) == 0:
            raise ValueError(f"csla at scale {scale_index}: a query tile sees no key; widen windows or add sinks")
        width = int(counts.max())
        first = torch.cumsum(counts, 0) - counts
        keys = key[first][:, None].repeat(1, width).int()  # the tail repeats a listed key
        keys[tile, torch.arange(len(key)) - first[tile]] = key.int()
    finally:
        torch.set_num_threads(threads)
    exact = None if bool((counts == width).all()) else counts.int()[None, None].to(device)
    return KeyLists(tiles, keys[None, None].to(device), exact)
