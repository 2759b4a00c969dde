"""The work of one launch as a table: which program does which query rows of which head against which list.

One table mixes heads of any variant. It is built once per (layer plan, scale, batch) from plain geometry and stays on the
device, so a call copies nothing and waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparvar_kernels.scales import Tile

FIELDS = 16  # int32 a program, one 64-byte line: the ten below, zeros after
LIST_PAD = 256  # readable entries behind every list: the largest key block


@dataclass(frozen=True)
class Tiles:
    """One grid cut into rectangles without listing its tokens: [T] int32 each, in the order of `scales.partition`.

    origin: first token. width: columns of the rectangle. rows: its tokens. Token m of a tile is
    origin + m // width * grid width + m % width; a raster tile is one long row.
    """

    origin: Tensor
    width: Tensor
    rows: Tensor


def tiles_of(grid: tuple[int, int], tile: Tile) -> Tiles:
    """The tiles of `grid` on the CPU."""
    h, w = grid
    if not tile.height:
        origin = torch.arange(0, h * w, tile.width)
        rows = (h * w - origin).clamp(max=tile.width)
        return Tiles(*(t.int() for t in (origin, rows, rows)))
    y, x = torch.arange(0, h, tile.height), torch.arange(0, w, tile.width)
    heights, widths = (h - y).clamp(max=tile.height), (w - x).clamp(max=tile.width)
    origin = (y[:, None] * w + x[None, :]).flatten()
    width = widths.expand(len(y), -1).flatten()
    return Tiles(*(t.int() for t in (origin, width, (heights[:, None] * widths[None, :]).flatten())))


@dataclass(frozen=True)
class Part:
    """Heads that share tiles and list shape. Lists lie in the key buffer at `at` + head_step * i + batch_step * b + starts.

    heads: the layer's head numbers. starts, counts: [T] int32, where each tile's list begins and how long it is.
    slots: per head the row of its residual, or None. outs: per head where its output goes, None: the head itself.
    """

    tiles: Tiles
    heads: tuple[int, ...]
    at: int
    head_step: int
    batch_step: int
    starts: Tensor
    counts: Tensor
    slots: tuple[int, ...] | None = None
    outs: tuple[int, ...] | None = None


def work_table(parts: list[Part], block_m: int) -> Tensor:
    """[P, FIELDS] int32 on the CPU: longest lists first, then head by head so that K and V of a head stay in the L2 cache."""
    out = []
    for part in parts:
        pieces = -(-part.tiles.rows // block_m)
        tile = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
        begin = torch.cumsum(pieces, 0) - pieces
        first = (torch.arange(len(tile)) - begin[tile]) * block_m
        for i, head in enumerate(part.heads):
            rows = torch.zeros(len(tile), FIELDS, dtype=torch.int32)
            rows[:, 0] = head
            rows[:, 1], rows[:, 2] = part.tiles.origin[tile], part.tiles.width[tile]
            rows[:, 3], rows[:, 4] = first, torch.minimum(part.tiles.rows[tile], (first + block_m).int())
            rows[:, 5] = part.at + part.head_step * i + part.starts[tile]
            rows[:, 6] = part.batch_step
            rows[:, 7] = part.counts[tile]
            rows[:, 8] = -1 if part.slots is None else part.slots[i]
            rows[:, 9] = head if part.outs is None else part.outs[i]
            out.append(rows)
    table = torch.cat(out)
    blocks = -(-table[:, 7] // 256)  # lists of about one length keep their head-by-head order
    return table[torch.argsort(blocks, descending=True, stable=True)].contiguous()
