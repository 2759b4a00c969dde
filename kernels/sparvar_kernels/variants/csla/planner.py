"""CSLA planner: windows around each query's own place in every earlier grid, as key lists.

Query (y, x) of a grid H x W looks, on key grid h x w, at the window centred on (round(y / H * h), round(x / W * w)),
round half to even; a centre may lie one past the edge, then only the part of the window inside the grid counts
(public code's `SparseFlexAttn`; paper section 3.3). Geometry only: one plan per (schedule, scale, variant), cached.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule, partition
from sparvar_kernels.variants.csla.rule import BLOCK, Csla
from sparvar_kernels.variants.lists import KeyLists

Array = np.ndarray  # in here: some fifty small operations, each of which costs several times less than a tensor's


def _near(n: int, sides: Array, radius: Array, run: int) -> Array:
    """[ceil(n / run), sum(sides)] bool: cells of each key grid's axis within its radius of any query of a run on this axis."""
    grid, cell = _runs(sides)
    centre = np.rint(np.arange(n, dtype=np.float64)[:, None] / n * sides[grid])
    near = np.abs(centre - cell) <= radius[grid]
    return np.logical_or.reduceat(near, np.arange(0, n, run))


def _runs(lengths: Array) -> tuple[Array, Array]:
    """(which run, place in it) of every element of runs of these lengths, one after the other."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) - (np.cumsum(lengths) - lengths)[which]


def _rectangle_spans(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> tuple[Array, Array, Array]:
    """(tile, first key, length) of every span of neighbouring keys that rectangular query tiles see, in ascending order.

    A tile's union of windows on a grid is a product of rows and columns, so two small tables say all of it.
    """
    (h, w), tile = schedule.grids[scale_index], variant.tile
    prefixed = [(1, schedule.prefix), *schedule.grids[: scale_index + 1]]  # the prefix: one row of a grid, all of it visible
    everywhere = max(map(max, prefixed)) + 1
    seen = [everywhere if s < variant.sinks else r // 2 if r >= 0 else -1 for s, r in enumerate(variant.windows)]
    radius = np.array([everywhere, *seen[: scale_index + 1]])
    starts = np.array([0, *schedule.starts[: scale_index + 1]])
    heights, widths = np.array(prefixed).T
    row_grid, row_cell = _runs(heights)
    column_grid, column_cell = _runs(widths)
    row_at = starts[row_grid] + row_cell * widths[row_grid]
    tile_y, row = _near(h, heights, radius, tile.height).nonzero()
    near_x = _near(w, widths, radius, tile.width)
    # columns as spans: they end where the next cell is unseen or of another grid, and begin behind such an end
    on = near_x[:, :-1] & near_x[:, 1:] & (column_grid[:-1] == column_grid[1:])
    edge = np.zeros((len(near_x), 1), dtype=bool)
    tile_x, first = (near_x & ~np.concatenate([edge, on], 1)).nonzero()
    length = (near_x & ~np.concatenate([on, edge], 1)).nonzero()[1] - first + 1
    # every tile's rows one after the other, and of each row the tile's spans on that grid
    across, grids = len(near_x), len(prefixed)
    rows = np.bincount(tile_y, minlength=-(-h // tile.height))
    spans = np.bincount(tile_x * grids + column_grid[first], minlength=across * grids)
    row_tile, place = _runs(np.repeat(rows, across))
    row = row[(np.cumsum(rows) - rows)[row_tile // across] + place]
    group = row_tile % across * grids + row_grid[row]
    line, place = _runs(spans[group])
    span = (np.cumsum(spans) - spans)[group[line]] + place
    return row_tile[line], row_at[row[line]] + column_cell[first[span]], length[span]


def tile_mask(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> Tensor:
    """[T, Nk] bool on the CPU: the keys each query tile of `variant` attends to."""
    h, w = schedule.grids[scale_index]
    tile = variant.tile
    num_tiles = -(-h // tile.height) * -(-w // tile.width) if tile.height else -(-h * w // tile.width)
    mask = np.zeros((num_tiles, schedule.num_keys(scale_index)), dtype=bool)
    if tile.height:
        seen_by, first, length = _rectangle_spans(schedule, scale_index, variant)
        span, place = _runs(length)
        mask[seen_by[span], first[span] + place] = True
        return torch.from_numpy(mask)
    mask[:, : schedule.starts[variant.sinks]] = True
    place = np.arange(h * w)
    row = place // tile.width * h + place // w  # every grid row of every tile is one run of queries
    first = np.flatnonzero(np.diff(row, prepend=-1))
    for s in range(variant.sinks, scale_index + 1):
        if variant.windows[s] < 0:
            continue
        rows, columns = schedule.grids[s]
        # A window is a product of two axis intervals; a tile's union over rectangles of queries is one as well, but a
        # raster tile is not a rectangle, so the union is taken over its grid rows, each of which is.
        by_row = np.zeros((num_tiles * h, columns), dtype=np.float32)
        radius = np.array([variant.windows[s] // 2])
        seen_by = _near(w, np.array([columns]), radius, 1)[place % w]
        by_row[row[first]] = np.logical_or.reduceat(seen_by, first)
        near = _near(h, np.array([rows]), radius, 1).astype(np.float32)  # [h, rows]
        seen = near.T @ by_row.reshape(num_tiles, h, columns)
        mask[:, schedule.starts[s] : schedule.starts[s + 1]] = (seen > 0).reshape(num_tiles, -1)
    if variant.form == "block128":
        touched = np.logical_or.reduceat(mask, np.arange(0, mask.shape[1], BLOCK), axis=1)
        mask = np.repeat(touched, BLOCK, axis=1)[:, : mask.shape[1]]
    return torch.from_numpy(mask)


@lru_cache(maxsize=256)
def csla_lists(schedule: ScaleSchedule, scale_index: int, variant: Csla, device: str = "cpu") -> KeyLists:
    """Key lists shared by batch and heads, keys ascending. Raises ValueError if a tile would see no key."""
    if variant.tile.height:
        tile, begin, length = _rectangle_spans(schedule, scale_index, variant)
    else:
        tile, begin = tile_mask(schedule, scale_index, variant).numpy().nonzero()
        length = np.ones_like(begin)
    tiles = partition(schedule.grids[scale_index], variant.tile, device)
    counts = np.bincount(tile, length, minlength=len(tiles.rows)).astype(np.int64)
    if counts.min() == 0:
        raise ValueError(f"csla at scale {scale_index}: a query tile sees no key; widen windows or add sinks")
    width = int(counts.max())
    last = np.cumsum(np.bincount(tile, minlength=len(counts))) - 1
    length[last] += width - counts  # a tile's last span runs on to fill its list: any key will do there
    places = np.repeat(begin - np.cumsum(length) + length, length) + np.arange(len(counts) * width)
    keys = np.minimum(places, schedule.num_keys(scale_index) - 1).astype(np.int32).reshape(1, 1, len(counts), width)
    exact = None if (counts == width).all() else torch.from_numpy(counts.astype(np.int32)[None, None]).to(device)
    return KeyLists(tiles, torch.from_numpy(keys).to(device), exact)
