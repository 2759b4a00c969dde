"""Planners against brute force: every key list, tile and mapping on random schedules, and the paper's own counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparvar_kernels import oracle
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile, nearest_cell, partition
from sparvar_kernels.variants import Cs4a, Csla
from sparvar_kernels.variants.cs4a.planner import children, cs4a_lists, expand, keys_kept, rank_keys, ranks_needed, source_tiles
from sparvar_kernels.variants.csla.planner import csla_lists

INFINITY = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
PAPER_WINDOWS = (-1,) * 8 + (1, 1, 3, 5, 7)

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
tiles = st.one_of(st.builds(Tile, st.integers(1, 6), st.integers(1, 6)), st.builds(lambda n: Tile(0, n), st.integers(1, 40)))


@st.composite
def schedules(draw, least: int = 1) -> ScaleSchedule:
    sides = draw(st.lists(grids, min_size=least, max_size=5))
    return ScaleSchedule(tuple(sorted(sides, key=lambda g: g[0] * g[1])), draw(st.integers(0, 4)))


@given(grids, tiles)
@settings(max_examples=150, deadline=None)
def test_partition_holds_every_query_once(grid, tile):
    made, want = partition(grid, tile), oracle.tile_lists(grid, tile)
    assert [row[:n].tolist() for row, n in zip(made.rows, made.counts.tolist(), strict=True)] == want
    for row, n in zip(made.rows, made.counts.tolist(), strict=True):
        assert set(row[n:].tolist()) <= {int(row[0])}
    flat = made.rows.flatten()
    assert flat[made.inverse].tolist() == list(range(grid[0] * grid[1]))
    assert all(int(made.tile_of[q]) == t for t, queries in enumerate(want) for q in queries)


@given(grids, grids)
@settings(max_examples=80, deadline=None)
def test_nearest_cell_is_where_the_centre_falls(fine, coarse):
    got = nearest_cell(fine, coarse).tolist()
    for y in range(fine[0]):
        for x in range(fine[1]):
            cy, cx = int((y + 0.5) / fine[0] * coarse[0] + 1e-9), int((x + 0.5) / fine[1] * coarse[1] + 1e-9)
            assert got[y * fine[1] + x] == cy * coarse[1] + cx


@given(schedules(), tiles, st.data())
@settings(max_examples=120, deadline=None)
def test_csla_lists_equal_brute_force(schedule, tile, data):
    n = len(schedule)
    scale = data.draw(st.integers(0, n - 1))
    windows = tuple(data.draw(st.lists(st.sampled_from((-1, 0, 1, 2, 3, 5, 7)), min_size=n, max_size=n)))
    sinks = data.draw(st.integers(0, n))
    block = data.draw(st.booleans())
    variant = Csla(windows, sinks, Tile(0, 128) if block else tile, "block128" if block else "exact")
    want = oracle.csla_keys(schedule, scale, variant)
    if min(map(len, want)) == 0:
        with pytest.raises(ValueError, match="sees no key"):
            csla_lists(schedule, scale, variant)
        return
    lists = csla_lists(schedule, scale, variant)
    counts = lists.counts[0, 0].tolist() if lists.counts is not None else [lists.keys.shape[-1]] * len(want)
    for row, count, keys in zip(lists.keys[0, 0].tolist(), counts, want, strict=True):
        assert sorted(row[:count]) == sorted(keys)
        assert set(row[count:]) <= set(range(schedule.num_keys(scale)))


@given(schedules(least=2), tiles, st.data())
@settings(max_examples=100, deadline=None)
def test_cs4a_lists_equal_brute_force(schedule, tile, data):
    scale = data.draw(st.integers(1, len(schedule) - 1))
    decision = data.draw(st.integers(0, scale - 1))
    variant = Cs4a(decision, data.draw(st.floats(0.01, 1.0)), tile, window=data.draw(st.sampled_from((0, 1, 3))))
    there = variant.at_decision(schedule, scale)
    num_tiles = len(partition(schedule.grids[decision], there.tile).counts)
    seed = data.draw(st.integers(0, 2**32))
    mass = torch.rand(2, 3, num_tiles, schedule.num_keys(decision), generator=torch.Generator().manual_seed(seed))
    ranked = rank_keys(mass, ranks_needed(variant, schedule, scale))
    lists = cs4a_lists(ranked, schedule, scale, variant)
    assert lists.keys.shape[-1] == keys_kept(variant, schedule, scale) == oracle.kept(variant, schedule, scale)
    source = source_tiles(schedule, scale, variant).tolist()
    for b in range(2):
        for h in range(3):
            for t, row in enumerate(lists.keys[b, h].tolist()):
                assert row == oracle.cs4a_keys(ranked[b, h, source[t]].tolist(), schedule, scale, variant)
                assert len(set(row)) == len(row)


def test_window_cells_rank_first():
    mass = torch.tensor([[[0.1, 0.5, 0.2, 0.9]]])
    assert rank_keys(mass, 4, torch.tensor([[True, False, True, False]])).tolist() == [[[2, 0, 3, 1]]]


@given(schedules(least=2), st.data())
@settings(max_examples=40, deadline=None)
def test_children_cover_every_key_once(schedule, data):
    scale = data.draw(st.integers(1, len(schedule) - 1))
    decision = data.draw(st.integers(0, scale - 1))
    table, counts = children(schedule, decision, scale)
    every = [key for row, n in zip(table.tolist(), counts.tolist(), strict=True) for key in row[:n]]
    assert sorted(every) == list(range(schedule.num_keys(scale)))
    assert table[:, 0].tolist() == list(range(schedule.num_keys(decision)))
    ranked = torch.randperm(schedule.num_keys(decision)).int()[None]
    every = [key for j in ranked[0].tolist() for key in table[j, : counts[j]].tolist()]
    assert expand(ranked, table, counts, len(every) - 1)[0].tolist() == every[:-1]


@pytest.mark.parametrize(
    ("tile", "form", "mean"), [("raster128", "exact", 1107.25), ("8x16", "exact", 681.5625), ("8x8", "exact", 471.15625)]
)
def test_keys_per_tile_of_the_papers_windows(tile, form, mean):
    assert csla_lists(INFINITY, 12, Csla(PAPER_WINDOWS, 5, Tile.parse(tile), form)).mean_keys() == mean


def test_block128_visits_1740_keys_per_tile():
    """13.59 blocks of 128; the last block of the 10,521 keys holds 25, so 1,733.6 of the 1,740 places are real keys."""
    lists = csla_lists(INFINITY, 12, Csla(PAPER_WINDOWS, 5, Tile(0, 128), "block128"))
    rows = zip(lists.keys[0, 0].tolist(), lists.counts[0, 0].tolist(), strict=True)
    blocks = [len({key // 128 for key in row[:n]}) for row, n in rows]
    assert sum(blocks) / len(blocks) * 128 == 1740
    assert lists.mean_keys() == 1733.5625


@pytest.mark.parametrize(("scale", "keys"), [(10, 131.7), (11, 155.5), (12, 202.0)])
def test_token_rule_of_the_paper(scale, keys):
    assert csla_lists(INFINITY, scale, Csla(PAPER_WINDOWS, 5, Tile(1, 1))).mean_keys() == pytest.approx(keys, abs=0.05)


def test_index_form_of_the_paper():
    """784 keys at 40x40, +560 at 48x48, +784 at 64x64; raster groups of 192 map 9 -> 12 -> 22."""
    variant = Cs4a(10, 0.2, Tile(0, 192), "index", bands=(7, 9))
    assert [keys_kept(variant, INFINITY, s) for s in (10, 11, 12)] == [784, 1344, 2128]
    assert source_tiles(INFINITY, 11, variant).tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8]
    ranked = torch.stack([torch.randperm(4121)[:784] for _ in range(9)]).int()[None, None]
    at_11, at_12 = (cs4a_lists(ranked, INFINITY, s, variant).keys[0, 0] for s in (11, 12))
    assert at_11[:, :784].tolist() == ranked[0, 0][source_tiles(INFINITY, 11, variant)].tolist()
    bands = at_11[:, 784:]
    assert torch.equal(bands, bands[:, :1] + torch.arange(560)) and int(bands.min()) == 4121 and int(bands.max()) == 6424
    # group 5 holds rows 20..23 of 48; its windows reach rows 17..26
    assert bands[5, 0] == 4121 + 17 * 48
    own = at_12[:, 1344:]
    assert torch.equal(own, own[:, :1] + torch.arange(784)) and int(own.min()) == 6425 and int(own.max()) == 10520


@pytest.mark.parametrize("text", ["", "8", "8x", "x8", "0x4", "-1x4", "raster", "rasterx", "raster0", "8x8x8", "8*8"])
def test_bad_tiles_are_refused(text):
    with pytest.raises(ValueError, match="tile"):
        Tile.parse(text)


@pytest.mark.parametrize(("grids", "prefix"), [((), 0), (((0, 4),), 0), (((4, 4),), -1)])
def test_bad_schedules_are_refused(grids, prefix):
    with pytest.raises(ValueError, match=r"grids|prefix"):
        ScaleSchedule(grids, prefix)
