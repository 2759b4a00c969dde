"""Geometry of next-scale (VAR) images: which token sits where, on which grid.

Tokens are ordered `prefix` first (text or context tokens, on no grid), then the grids coarse to fine, each grid in
raster order. Everything here is plain integers or index tensors; nothing runs a kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids (height, width) of one image, coarse to fine; `scale_index` counts them from 0.

    `prefix` is the number of tokens ahead of scale 0 (HART: 300 context tokens); they are always visible.
    Raises ValueError on an empty schedule, a non-positive grid side or a negative prefix.
    """

    grids: tuple[tuple[int, int], ...]
    prefix: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.grids, tuple):  # it is a key of caches
            raise ValueError(f"grids: got a {type(self.grids).__name__}, want a tuple of (height, width)")
        if not self.grids:
            raise ValueError("grids=(): a schedule needs at least one grid")
        for i, grid in enumerate(self.grids):
            if not isinstance(grid, tuple) or len(grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in grid):
                raise ValueError(f"grids[{i}]={grid}: want (height, width), both >= 1")
        if not isinstance(self.prefix, int) or self.prefix < 0:
            raise ValueError(f"prefix={self.prefix}: want >= 0")

    @classmethod
    def square(cls, sides: tuple[int, ...], prefix: int = 0) -> ScaleSchedule:
        return cls(tuple((s, s) for s in sides), prefix)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of the first token of each scale, and one past the last token at the end."""
        out = [self.prefix]
        for h, w in self.grids:
            out.append(out[-1] + h * w)
        return tuple(out)

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    def num_queries(self, scale_index: int) -> int:
        h, w = self.grids[scale_index]
        return h * w

    def num_keys(self, scale_index: int) -> int:
        """Keys the queries of `scale_index` may see: the prefix and every scale up to their own."""
        return self.starts[scale_index + 1]

    def aspect(self) -> str:
        h, w = self.grids[-1]
        return f"{h}x{w}"


@dataclass(frozen=True)
class Tile:
    """A query tile: `height` x `width` tokens of the grid, or `width` consecutive raster tokens when `height` is 0.

    Written "8x16" or "raster128" in files and on the command line.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.height, int) or not isinstance(self.width, int) or self.height < 0 or self.width < 1:
            raise ValueError(f"tile {self.height}x{self.width}: want height >= 0 (0: raster) and width >= 1")

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Tile from "8x16" or "raster128"; raises ValueError naming what was got."""
        found = re.fullmatch(r"raster([1-9][0-9]{0,8})|([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
        if not found:
            raise ValueError(f'tile {text!r}: want "HEIGHTxWIDTH" such as "8x16", or "rasterN" such as "raster128"')
        return cls(int(found[2] or 0), int(found[1] or found[3]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}" if self.height else f"raster{self.width}"

    @property
    def rows(self) -> int:
        """Most queries one tile can hold."""
        return self.height * self.width if self.height else self.width

    def scaled(self, source: tuple[int, int], target: tuple[int, int]) -> Tile:
        """The tile on grid `target` that covers about the same share of the picture as this one on `source`."""
        if not self.height:
            return Tile(0, max(1, round(self.width * target[0] * target[1] / (source[0] * source[1]))))
        h, w = (max(1, round(n * t / s)) for n, s, t in zip((self.height, self.width), source, target, strict=True))
        return Tile(h, w)


@dataclass(frozen=True)
class TilePartition:
    """One grid cut into query tiles.

    rows:   [T, Q] int64, query index within the scale; short tiles repeat their first query to fill Q columns.
    counts: [T] int64, real queries in each tile.
    tile_of: [N] int64, the tile of each query.   centre: [T, 2] float64, (y, x) in grid units of the tile's middle.
    inverse: [N] int64, place of each query in rows.flatten().
    """

    rows: Tensor
    counts: Tensor
    tile_of: Tensor
    inverse: Tensor
    centre: Tensor

    def sampled(self, sample: int) -> tuple[Tensor, Tensor]:
        """Every `sample`-th query of each tile: query indices [T, Q'], and [T, Q'] bool, which are the tile's own.

        What is not its own only fills the table: a short tile has fewer.
        """
        own = torch.arange(self.rows.shape[1], device=self.rows.device) < self.counts[:, None]
        return self.rows[:, ::sample], own[:, ::sample]

    @property
    def is_permutation(self) -> bool:
        """True if every tile is full, so rows.flatten() is a permutation of the queries."""
        return self.rows.numel() == self.inverse.numel()


@lru_cache(maxsize=256)
def partition(grid: tuple[int, int], tile: Tile, device: str = "cpu") -> TilePartition:
    """The tiles of `grid`, in raster order of tiles; tiles at the right and bottom edge may be smaller."""
    h, w = grid
    n = h * w
    place = torch.arange(n)
    y, x = place // w, place % w
    if tile.height:
        across = -(-w // tile.width)
        tile_of = (y // tile.height) * across + x // tile.width
    else:
        tile_of = place // tile.width
    order = torch.argsort(tile_of, stable=True)
    counts = torch.bincount(tile_of)
    first = torch.cumsum(counts, 0) - counts
    width = int(counts.max())
    column = torch.arange(width)
    slot = first[:, None] + torch.where(column < counts[:, None], column, 0)
    rows = order[slot]
    inverse = torch.empty_like(order)
    inverse[order] = tile_of[order] * width + (torch.arange(n) - first[tile_of[order]])
    yx = torch.stack([y, x], -1).double() + 0.5
    centre = torch.zeros(len(counts), 2, dtype=torch.float64).index_add_(0, tile_of, yx) / counts[:, None]
    return TilePartition(*(t.to(device) for t in (rows, counts, tile_of, inverse, centre)))


@lru_cache(maxsize=256)
def nearest_cell(fine: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """[fine tokens] int64: for each token of `fine` in raster order the token of `coarse` its centre falls into."""
    (fh, fw), (ch, cw) = fine, coarse
    y = (2 * torch.arange(fh) + 1) * ch // (2 * fh)
    x = (2 * torch.arange(fw) + 1) * cw // (2 * fw)
    return (y[:, None] * cw + x[None, :]).reshape(-1)
