"""CS4A's ranking kernels alone: the mass of keys against fp64, and the chosen keys against sorting, tie by tie."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from interpreted import in_interpreter

from sparvar_kernels import AttentionProblem, Cs4a, ScaleSchedule, Tile
from sparvar_kernels.backends.triton.work import place_lists
from sparvar_kernels.geometry.problem import DTYPES
from sparvar_kernels.geometry.scales import partition
from sparvar_kernels.oracle import tile_lists
from sparvar_kernels.variants.cs4a.planner import children, window_first

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ODD = ScaleSchedule(((2, 2), (5, 6), (11, 9), (14, 12)), prefix=3)
LARGE = ScaleSchedule(((40, 50), (70, 80), (150, 171)))  # more keys than two counts share 32 bits for
SELECTIONS = [
    (ODD, 2, scale, tile, window, mass, short)
    for (scale, tile), window, mass, short in itertools.product(((2, "4x5"), (3, "6x6")), (0, 3), ("fp32", "bf16"), (False, True))
] + [(LARGE, 1, 2, "80x90", 0, "bf16", False), (LARGE, 1, 2, "80x90", 5, "fp32", False)]


# decision scale, then the scales that want lists of it, each with its tile
NEAR = ScaleSchedule(((2, 2), (16, 20), (24, 30), (32, 40)), prefix=300)
PLACES = {1: "4x10", 2: "6x15", 3: "8x20"}
MERGED = [
    (NEAR, 0.08, 1, {s: PLACES[s] for s in scales}, window)
    for scales, window in itertools.product(((1, 2, 3), (2, 3), (1, 3)), (0, 3))
] + [(LARGE, 0.05, 1, {1: "37x42", 2: "80x90"}, 5)]


def random_mass(keys: int, tiles: int, seed: int, mass_dtype: str):
    """[2, 2, tiles, >= keys]: equals among them, and NaN in the places of no key."""
    mass = torch.rand(2, 2, tiles, -(-keys // 16) * 16, generator=torch.Generator().manual_seed(seed)).pow(9)
    mass[..., 3:9] = mass[..., 3:4]
    mass[..., keys:] = float("nan")
    return mass.to(DTYPES[mass_dtype])


def empty_buffer(lists, device):
    return torch.full((4 * lists.rows * lists.row_step + 64,), -7, dtype=torch.int32, device=device)


def wrong_entries(buffer, lists, mass, schedule, decision_scale, scale, there) -> int:
    """Lists that differ from taking keys by mass, then by position, until the list is full; nothing before or behind them."""
    keys = schedule.num_keys(decision_scale)
    table, weight = torch.arange(keys)[:, None], torch.ones(keys, dtype=torch.int32)
    if scale != decision_scale:
        table, weight = children(schedule, decision_scale, scale)
    first, got, wrong = window_first(schedule, there), buffer.cpu(), 0
    untouched = torch.ones(len(got), dtype=torch.bool)
    for b, i, row in itertools.product(range(2), range(2), range(lists.rows)):
        ranked = mass[b, i, row, :keys].double()
        if first is not None:
            ranked[first[row]] = 1e9  # ahead of all others, by position among themselves
        order = torch.argsort(ranked, descending=True, stable=True)
        taken = (lists.width - (weight[order].cumsum(0) - weight[order])).clamp(min=0).minimum(weight[order])
        number = torch.zeros(keys, dtype=torch.int64)
        number[order] = taken.long()
        want = table[torch.arange(table.shape[1])[None, :] < number[:, None]]
        at = lists.at + b * lists.batch_step + i * lists.head_step + row * lists.row_step
        wrong += not torch.equal(got[at : at + lists.width].long(), want.long())
        untouched[at : at + lists.width] = False
    return wrong + int((got[untouched] != -7).sum())


def wrong_lists(schedule, decision_scale, scale, tile, window, mass_dtype, short, device) -> int:
    """`wrong_entries` of one selection, from all keys or from a shortlist."""
    from sparvar_kernels.backends.triton.selecting import select, shortlist

    problems = {s: AttentionProblem(schedule, s, 2, 3, 32, "fp32") for s in (decision_scale, scale)}
    variant = Cs4a(decision_scale, 0.4 if schedule is ODD else 0.3, Tile.parse(tile), window=window)
    heads = (0, 2)
    lists, _ = place_lists(variant, heads, problems[scale], 0)
    there = variant if scale == decision_scale else variant.at_decision(schedule, scale)
    keys, tiles = schedule.num_keys(decision_scale), len(partition(schedule.grids[decision_scale], there.tile).counts)
    mass, buffer = random_mass(keys, tiles, scale, mass_dtype), empty_buffer(lists, device)
    mass_here, decision = mass.to(device), problems[decision_scale]
    best = shortlist(mass_here, there, decision, heads, -(-lists.width // 16) * 16) if short else None
    select(mass_here, buffer, lists, problems[scale], decision, best)
    return wrong_entries(buffer, lists, mass, schedule, decision_scale, scale, there)


def wrong_merged(schedule, top_k, decision_scale, tiles, window, device, at=12) -> int:
    """`wrong_entries` of all lists that one ranking fills, which is one launch; they begin `at` entries into their buffers."""
    from sparvar_kernels.backends.triton.choosing import fill_lists, record_builds

    heads, problems = (0, 2), {s: AttentionProblem(schedule, s, 2, 3, 32, "fp32") for s in {decision_scale, *tiles}}
    variants = {s: Cs4a(decision_scale, top_k, Tile.parse(tile), window=window) for s, tile in tiles.items()}
    (there,) = {v if s == decision_scale else v.at_decision(schedule, s) for s, v in variants.items()}
    decision = problems[decision_scale]
    count = len(partition(decision.grid, there.tile).counts)
    mass = random_mass(decision.num_keys, count, len(tiles), "bf16")
    made = {s: place_lists(v, heads, problems[s], at)[0] for s, v in variants.items()}
    fill = [(lists, empty_buffer(lists, device), problems[s]) for s, lists in made.items()]
    (build,) = record_builds(there, decision, fill, mass.dtype)
    assert build.kernel.endswith("merged_select_kernel")
    fill_lists(mass.to(device), there, decision, heads, fill)
    return sum(wrong_entries(buffer, lists, mass, schedule, decision_scale, p.scale_index, there) for lists, buffer, p in fill)


MASSES = [
    (dtype, dim, tile, sample)
    for (dtype, dim), (tile, sample) in itertools.product(
        (("fp32", 32), ("fp32", 128), ("fp16", 64), ("bf16", 128), ("bf16", 256)),
        (("5x4", 2), ("raster30", 1), ("raster300", 1)),
    )
]


def mass_error(dtype, dim, tile, sample, device) -> float:
    """Largest difference from fp64, relative to the largest mass; a tile of 300 queries is more than a program holds."""
    from sparvar_kernels.backends.triton.selecting import column_mass

    schedule = ScaleSchedule(((3, 4), (11, 9), (17, 19)))
    problem = AttentionProblem(schedule, 2, 2, 3, dim, dtype, 1.0, 9.0)
    q, k, _ = problem.make_inputs(0)
    scores = q.double() @ k.double().transpose(-1, -2)
    lse, probability = torch.logsumexp(scores, -1).float(), torch.softmax(scores, -1)
    got = column_mass(q.to(device), k.to(device), lse.to(device), problem, (0, 2), Tile.parse(tile), sample).cpu()
    rows = tile_lists(problem.grid, Tile.parse(tile))  # a short tile has the queries it has
    want = torch.stack([probability[:, [0, 2]][:, :, t[::sample]].sum(2) for t in rows], 2)
    return float((got[..., : problem.num_keys].double() - want).abs().max() / want.max())


@pytest.mark.slow
@needs_triton
def test_selection_equals_sorting():
    assert in_interpreter("test_selecting", "[t.wrong_lists(*case, 'cpu') for case in t.SELECTIONS]") == [0] * len(SELECTIONS)


@pytest.mark.slow
@needs_triton
def test_merged_selections_equal_sorting():
    assert in_interpreter("test_selecting", "[t.wrong_merged(*case, 'cpu') for case in t.MERGED]") == [0] * len(MERGED)


@needs_triton
def test_what_one_launch_is_not_made_for_has_one_for_each_list():
    """No shortlist that would gain, the paper's lists, more lists than there are places for, mass in fp32, too many keys."""
    from sparvar_kernels.backends.triton.choosing import record_builds

    def problems_of(schedule):
        return {s: AttentionProblem(schedule, s, 2, 3, 32, "bf16") for s in range(1, len(schedule))}

    problems = problems_of(ScaleSchedule((*NEAR.grids, (40, 50)), prefix=300))
    place = {s: Cs4a(1, 0.03, Tile.parse(tile)) for s, tile in (PLACES | {4: "10x25"}).items()}
    paper = Cs4a(1, 0.1, Tile(0, 40), keys="index", bands=(3, 3, 3))

    def launched(variants, mass=torch.bfloat16, problems=problems):
        schedule = problems[1].schedule
        fill = [(place_lists(v, (0, 2), problems[s], 0)[0], torch.empty(0), problems[s]) for s, v in variants.items()]
        there = next(iter(variants.values())).at_decision(schedule, next(iter(variants)))
        return [b.kernel.partition(".")[2] for b in record_builds(there, problems[1], fill, mass)]

    assert launched({s: place[s] for s in (2, 3, 4)}) == ["merged_select_kernel"]
    assert launched({s: place[s] for s in (2, 3, 4)}, torch.float32) == ["select_kernel"] * 4
    for rows, most in ((255, {"merged_select_kernel"}), (256, {"select_kernel"})):  # 65,281 keys and 65,537
        many = problems_of(ScaleSchedule(((1, 1), (rows, 256), (rows, 512))))
        assert set(launched({1: Cs4a(1, 0.03, Tile(51, 64)), 2: Cs4a(1, 0.03, Tile(51, 128))}, problems=many)) == most
    assert launched(place) == ["select_kernel"] * 5
    assert launched({3: place[3]}) == ["select_kernel"]
    assert launched({2: paper, 3: paper}) == ["select_kernel"] * 3


@pytest.mark.slow
@needs_triton
def test_mass_equals_fp64():
    cases = [c for c in MASSES if c[0] != "bf16"]  # the interpreter's dot takes bf16 for integers
    errors = in_interpreter("test_selecting", f"[t.mass_error(*case, 'cpu') for case in {cases}]")
    for case, error in zip(cases, errors, strict=True):
        assert error < (1e-5 if case[0] == "fp32" else 1e-2), (case, error)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SELECTIONS, ids=lambda c: f"{len(c[0])}-{'-'.join(map(str, c[1:]))}")
def test_gpu_selection_equals_sorting(case):
    assert wrong_lists(*case, "cuda") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", MERGED, ids=lambda c: f"{len(c[0])}-{'-'.join(map(str, c[3]))}-{c[4]}")
def test_gpu_merged_selections_equal_sorting(case):
    assert wrong_merged(*case, "cuda") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", MASSES, ids=lambda c: "-".join(map(str, c)))
def test_gpu_mass_equals_fp64(case):
    assert mass_error(*case, "cuda") < (1e-5 if case[0] == "fp32" else 1e-2)
