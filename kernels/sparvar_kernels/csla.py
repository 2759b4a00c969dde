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


def _any_of(visible: Tensor, side: int) -> Tensor:
    """[n, target] -> [ceil(n / side), target]: seen by any query of each run of `side`."""
    n, target = visible.shape
    padded = torch.zeros(-(-n // side) * side, target, dtype=torch.bool)
    padded[:n] = visible
    return padded.view(-1, side, target).any(1)


def _near(n: int, sides: Tensor, radius: Tensor, run: int) -> Tensor:
    """[ceil(n / run), sum(sides)] bool: cells of each key grid's axis within its radius of any query of a run on this axis."""
    grid, cell = _runs(sides)
    centre = torch.round(torch.arange(n, dtype=torch.float64)[:, None] / n * sides[grid])
    return _any_of((centre - cell).abs() <= radius[grid], run)


def _runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(which run, place in it) of every element of runs of these lengths, one after the other."""
    which = torch.repeat_interleave(lengths)
    return which, torch.arange(len(which)) - (torch.cumsum(lengths, 0) - lengths)[which]


def _rectangle_spans(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> tuple[Tensor, Tensor, Tensor]:
    """(tile, first key, length) of every span of neighbouring keys that rectangular query tiles see, in ascending order.

    A tile's union of windows on a grid is a product of rows and columns, so two small tables say all of it.
    """
    (h, w), tile = schedule.grids[scale_index], variant.tile
    prefixed = [(1, schedule.prefix), *schedule.grids[: scale_index + 1]]  # the prefix: one row of a grid, all of it visible
    everywhere = max(map(max, prefixed)) + 1
    seen = [everywhere if s < variant.sinks else r // 2 if r >= 0 else -1 for s, r in enumerate(variant.windows)]
    radius = torch.tensor([everywhere, *seen[: scale_index + 1]])
    starts = torch.tensor([0, *schedule.starts[: scale_index + 1]])
    heights, widths = torch.tensor(prefixed).unbind(1)
    row_grid, row_cell = _runs(heights)
    column_grid, column_cell = _runs(widths)
    row_at = starts[row_grid] + row_cell * widths[row_grid]
    tile_y, row = _near(h, heights, radius, tile.height).nonzero(as_tuple=True)
    near_x = _near(w, widths, radius, tile.width)
    # columns as spans: they end where the next cell is unseen or of another grid, and begin behind such an end
    on = near_x[:, :-1] & near_x[:, 1:] & (column_grid[:-1] == column_grid[1:])
    edge = torch.zeros(len(near_x), 1, dtype=torch.bool)
    tile_x, first = (near_x & ~torch.cat([edge, on], 1)).nonzero(as_tuple=True)
    length = (near_x & ~torch.cat([on, edge], 1)).nonzero(as_tuple=True)[1] - first + 1
    # every tile's rows one after the other, and of each row the tile's spans on that grid
    across, grids = len(near_x), len(prefixed)
    rows = torch.bincount(tile_y, minlength=-(-h // tile.height))
    spans = torch.bincount(tile_x * grids + column_grid[first], minlength=across * grids)
    row_tile, place = _runs(rows.repeat_interleave(across))
    row = row[(torch.cumsum(rows, 0) - rows)[row_tile // across] + place]
    group = row_tile % across * grids + row_grid[row]
    line, place = _runs(spans[group])
    span = (torch.cumsum(spans, 0) - spans)[group[line]] + place
    return row_tile[line], row_at[row[line]] + column_cell[first[span]], length[span]


def tile_mask(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> Tensor:
    """[T, Nk] bool on the CPU: the keys each query tile of `variant` attends to."""
    h, w = schedule.grids[scale_index]
    tile = variant.tile
    num_tiles = -(-h // tile.height) * -(-w // tile.width) if tile.height else -(-h * w // tile.width)
    mask = torch.zeros(num_tiles, schedule.num_keys(scale_index), dtype=torch.bool)
    if tile.height:
        seen_by, first, length = _rectangle_spans(schedule, scale_index, variant)
        span, place = _runs(length)
        mask[seen_by[span], first[span] + place] = True
        return mask
    mask[:, : schedule.starts[variant.sinks]] = True
    for s in range(variant.sinks, scale_index + 1):
        if variant.windows[s] < 0:
            continue
        rows, columns = schedule.grids[s]
        part = mask[:, schedule.starts[s] : schedule.starts[s + 1]]
        # A window is a product of two axis intervals; a tile's union over rectangles of queries is one as well, but a
        # raster tile is not a rectangle, so the union is taken over its grid rows, each of which is.
        by_row = torch.zeros(num_tiles * h, columns, dtype=torch.bool)
        place = torch.arange(h * w)
        begin = place // tile.width * h + place // w
        radius = torch.tensor([variant.windows[s] // 2])
        by_row.index_put_((begin,), _near(w, torch.tensor([columns]), radius, 1)[place % w], accumulate=True)
        seen = by_row.view(num_tiles, h, columns).float()
        near = _near(h, torch.tensor([rows]), radius, 1).float()  # [h, rows]
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
        if variant.tile.height:
            tile, begin, length = _rectangle_spans(schedule, scale_index, variant)
        else:
            tile, begin = tile_mask(schedule, scale_index, variant).nonzero(as_tuple=True)
            length = torch.ones_like(begin)
        tiles = partition(schedule.grids[scale_index], variant.tile, device)
        counts = torch.zeros(tiles.rows.shape[0], dtype=torch.int64).index_add_(0, tile, length)
        if int(counts.min()) == 0:
            raise ValueError(f"csla at scale {scale_index}: a query tile sees no key; widen windows or add sinks")
        width = int(counts.max())
        last = torch.cumsum(torch.bincount(tile, minlength=len(counts)), 0) - 1
        length[last] += width - counts  # a tile's last span runs on to fill its list: any key will do there
        end = torch.cumsum(length, 0)
        keys = (begin - end + length)[torch.repeat_interleave(length)] + torch.arange(len(counts) * width)
        keys = keys.int().clamp_(max=schedule.num_keys(scale_index) - 1).view(len(counts), width)
    finally:
        torch.set_num_threads(threads)
    exact = None if bool((counts == width).all()) else counts.int()[None, None].to(device)
    return KeyLists(tiles, keys[None, None].to(device), exact)
