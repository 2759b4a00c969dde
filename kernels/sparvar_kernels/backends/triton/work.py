"""The work of one launch: a table (which program does which query rows of which head against which list) and the lists.

One table mixes heads of any variant. It is built once per (layer plan, scale, batch) from plain geometry and stays on the
device, so a call copies nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.triton.table import FIELDS, Column
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import Tile, partition
from sparvar_kernels.variants import Cs4a, Variant
from sparvar_kernels.variants.cs4a.planner import band_lists, keys_kept, source_tiles

Array = np.ndarray
APART = ("everything", "means", "keys and means")  # what a variant reads that does not share a launch with others
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


def _cells_under(first: Array, last: Array, length: int, source: int) -> tuple[Array, Array]:
    """The first and last cell of a residual's axis of `source` cells that bear on queries first..last of `length`."""
    place = [((n + 0.5) * (source / length) - 0.5).clip(0, source - 1).astype(np.int32) for n in (first, last)]
    return place[0], np.minimum(place[1] + 1, source - 1)


def _residual_cells(rows: Array, grid: tuple[int, int], source: tuple[int, int]) -> Array:
    """[..., 4]: first row, first column, last row and last column of the cells that bear on table rows (ORIGIN to END_ROW)."""
    (h, w), last = grid, rows[..., Column.END_ROW] - 1
    origin, width, first = (rows[..., column] for column in (Column.ORIGIN, Column.WIDTH, Column.FIRST_ROW))
    one_row = first // width == last // width
    ends = [origin + n // width * w + np.where(one_row, n % width, side) for n, side in ((first, 0), (last, width - 1))]
    (top, left), (bottom, right) = (np.divmod(n, w) for n in ends)
    wraps = (origin % w + width > w) & (top != bottom)  # a raster tile that goes on in the next row
    left, right = np.where(wraps, 0, left), np.where(wraps, w - 1, right)
    (low_y, high_y), (low_x, high_x) = _cells_under(top, bottom, h, source[0]), _cells_under(left, right, w, source[1])
    return np.stack([low_y, low_x, high_y, high_x], -1)


def work_table(parts: list[Part], block_m: int, grid: tuple[int, int] = (1, 1), source: tuple[int, int] | None = None) -> Tensor:
    """[P, FIELDS] int32 on the CPU: longest lists first, then head by head so that K and V of a head stay in the L2 cache."""
    made = []
    for part in parts:
        sizes, heads = part.tiles.rows.numpy(), np.array(part.heads)
        pieces = -(-sizes // block_m)
        tile = np.repeat(np.arange(len(pieces)), pieces)
        first = (np.arange(len(tile)) - (np.cumsum(pieces) - pieces)[tile]) * block_m
        rows = np.zeros((len(heads), len(tile), FIELDS), dtype=np.int32)
        rows[..., Column.HEAD] = heads[:, None]
        rows[..., Column.ORIGIN], rows[..., Column.WIDTH] = part.tiles.origin.numpy()[tile], part.tiles.width.numpy()[tile]
        rows[..., Column.FIRST_ROW], rows[..., Column.END_ROW] = first, np.minimum(sizes[tile], first + block_m)
        rows[..., Column.LIST_AT] = part.at + part.head_step * np.arange(len(heads))[:, None] + part.starts.numpy()[tile]
        rows[..., Column.LIST_STEP] = part.batch_step
        rows[..., Column.COUNT] = part.counts.numpy()[tile]
        rows[..., Column.SLOT] = -1 if part.slots is None else np.array(part.slots)[:, None]
        rows[..., Column.OUT] = heads[:, None] if part.outs is None else np.array(part.outs)[:, None]
        if source is not None:
            rows[..., Column.LOW_Y : Column.HIGH_X + 1] = _residual_cells(rows, grid, source)
        made.append(rows.reshape(-1, FIELDS))
    table = np.concatenate(made)
    blocks = -(-table[:, Column.COUNT] // 256)  # lists of about one length keep their head-by-head order
    return torch.from_numpy(table[np.argsort(-blocks, kind="stable")])


def cell_columns(table: Array) -> int:
    """Columns of a residual's cells in a step: 8 where tiles are narrow and so are the cells under each, else 16."""
    across = table[:, Column.HIGH_X] - table[:, Column.LOW_X] + 1
    return 8 if table[:, Column.WIDTH].max() <= 16 and across.max() <= 8 else 16


@dataclass(frozen=True)
class Lists:
    """Where a part's lists lie, so that a decision scale can fill them: see `work.Part`. rows: lists a head has."""

    variant: Cs4a
    heads: tuple[int, ...]
    at: int
    head_step: int
    batch_step: int
    row_step: int
    rows: int
    width: int


@dataclass(frozen=True)
class Stage:
    """One launch: its key buffer and table on the device, and what a decision scale has to fill in beforehand.

    cells: columns of a residual's cells that warps which fetch take in one step.
    """

    keys: Tensor
    table: Tensor
    masked: bool
    dynamic: tuple[Lists, ...]
    cells: int = 16


Groups = list[tuple[Variant, tuple[int, ...]]]


def launch_groups(groups: Sequence[tuple[Variant, tuple[int, ...]]]) -> dict[int | None, Groups]:
    """Decision scale -> the variants over key lists, with their heads, that one launch takes; None where there is no decision."""
    wanted: dict[int | None, Groups] = {}
    for variant, heads in groups:
        if variant.reads not in APART:
            wanted.setdefault(variant.decision_scale, []).append((variant, heads))
    if len(wanted) > 1 and (free := wanted.pop(None, [])):  # lists without a residual ride along
        wanted[next(iter(wanted))] += free
    return wanted


def build_stage(
    groups: Sequence[tuple[Variant, tuple[int, ...]]], problem: AttentionProblem, config: TritonConfig, device: str,
    slots: Sequence[tuple[int, ...] | None], outs: Sequence[tuple[int, ...] | None],
) -> Stage:  # fmt: skip
    """The stage of some variants, each with its heads. Raises ValueError where a query tile would see no key."""
    schedule, s = problem.schedule, problem.scale_index
    size, parts, dynamic = 0, [], []
    known: list[tuple[int, Tensor]] = []  # lists of geometry alone, and where they go
    bands: list[tuple[Lists, Tensor]] = []
    for (variant, heads), slot, out in zip(groups, slots, outs, strict=True):
        tiles = tiles_of(problem.grid, variant.tile or Tile(0, config.block_m))
        many = len(tiles.rows)
        if variant.reads == "ranked lists":
            assert isinstance(variant, Cs4a), "the one way to rank keys so far"
            made, width = place_lists(variant, heads, problem, size)
            shared = variant.keys == "place" and s != variant.decision_scale  # lists lie by tile of the decision scale
            sources = source_tiles(schedule, s, variant) if shared else torch.arange(many)
            parts.append(Part(tiles, heads, size, made.head_step, made.batch_step, sources.int() * made.row_step,
                              torch.full((many,), width, dtype=torch.int32), slot, out))  # fmt: skip
            dynamic.append(made)
            if made.width < width:
                bands.append((made, band_lists(schedule, s, variant)))
            size += problem.batch * made.batch_step
            continue
        listed, starts, counts = _known_lists(variant, problem, many, 0 if variant.reads == "decision" else problem.num_keys)
        parts.append(Part(tiles, heads, size, 0, 0, starts, counts, slot, out))
        known.append((size, listed))
        size += len(listed)
    if size >= 1 << 31:
        raise ValueError(f"scale {s}: key lists of {size} entries; want less than 2**31 (fewer images at once)")
    decision = next((v.decision_scale for v, _ in groups if v.decision_scale is not None), s)
    table = work_table(parts, config.block_m, problem.grid, schedule.grids[decision])
    keys = torch.zeros(size + LIST_PAD, dtype=torch.int32, device=device)
    for at, listed in known:
        keys[at : at + len(listed)] = listed.to(device)
    for made, band in bands:
        block = keys[made.at : made.at + problem.batch * made.batch_step].view(-1, made.rows, made.row_step)
        block[..., made.width : made.width + band.shape[-1]] = band.to(device)
    ragged, empty = table[:, Column.COUNT] % config.block_n != 0, table[:, Column.COUNT] == 0
    masked = bool((ragged | empty if config.fetchers else ragged).any())  # warps that fetch begin with a block
    return Stage(keys, table.to(device), masked, tuple(dynamic), cell_columns(table.numpy()))


def means_stage(
    variant: Variant, heads: tuple[int, ...], problem: AttentionProblem, config: TritonConfig, device: str, keys: int
) -> Stage:
    """The stage of heads over `keys` keys and means: pooled heads read all of them in order, others by lists."""
    tiles = tiles_of(problem.grid, variant.tile or Tile(0, config.block_m))
    listed, starts, counts = _known_lists(variant, problem, len(tiles.rows), keys)
    padded = torch.cat([listed, torch.zeros(LIST_PAD, dtype=torch.int32)])
    table = work_table([Part(tiles, heads, 0, 0, 0, starts, counts)], config.block_m)
    return Stage(padded.to(device), table.to(device), True, ())


def _known_lists(variant: Variant, problem: AttentionProblem, tiles: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a variant reads by geometry alone: entries, and where each tile's list begins and how long it is; all share one that
    counts to `keys` where the variant has no lists.
    """
    if variant.reads in ("fixed lists", "keys and means"):
        lists = variant.lists(problem.schedule, problem.scale_index, "cpu")
        starts = torch.arange(tiles, dtype=torch.int32) * lists.keys.shape[-1]
        return lists.keys.flatten(), starts, lists.lengths[0, 0]
    return torch.arange(keys, dtype=torch.int32), torch.zeros(tiles, dtype=torch.int32), torch.full((tiles,), keys)


@lru_cache(maxsize=256)
def shared_stage(*arguments: Any) -> Stage:
    """A stage of geometry alone: every layer with the same groups uses one."""
    return build_stage(*arguments)


def place_lists(variant: Cs4a, heads: tuple[int, ...], problem: AttentionProblem, at: int) -> tuple[Lists, int]:
    """Where the lists lie, and how long each is once the band of a paper's group is behind what is chosen."""
    schedule, s = problem.schedule, problem.scale_index
    own = s == variant.decision_scale
    if variant.keys == "place" and not own:
        there = variant.at_decision(schedule, s)
        rows = len(partition(schedule.grids[variant.decision_scale], there.tile).counts)
    else:
        rows = len(partition(problem.grid, variant.tile).counts)
    full = keys_kept(variant, schedule, s)
    chosen = full if variant.keys == "place" else keys_kept(variant, schedule, variant.decision_scale)
    step = -(-full // 4) * 4
    return Lists(variant, heads, at, rows * step, len(heads) * rows * step, step, rows, chosen), full
