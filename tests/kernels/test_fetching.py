"""The kernel whose warps fetch or multiply (Hopper): its geometry and legality here, compiled ahead of time, and on the device.

Gluon has no interpreter, so what it computes is seen with `-m gpu` alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gathered_checks import LAST_CASES, ODD, VARIANTS, check, edges_layouts_and_bits, needs_triton
from tolerances import TOLERANCES
from usage_target import usage

from sparvar_kernels import AttentionProblem, Cs4a, Csla, Policy, Reuse, Rule, ScaleSchedule, Tile, why_not
from sparvar_kernels.backends.configs import SHARED_LIMIT, TritonConfig
from sparvar_kernels.backends.triton.table import FIELDS, Column
from sparvar_kernels.backends.triton.work import Part, cell_columns, tiles_of, work_table
from sparvar_tune.launch_search.choose import space
from sparvar_tune.launch_search.compiling import Binary

HOPPER = (9, 0)
KINDS = [(dtype, dim) for dtype in ("bf16", "fp16") for dim in (64, 128)]


def fetching(dtype: str, dim: int) -> tuple[TritonConfig, ...]:
    return TritonConfig.fetching(AttentionProblem(ODD, 4, 1, 1, dim, dtype))


@pytest.mark.parametrize("tile", [Tile(8, 16), Tile(3, 5), Tile(0, 128), Tile(0, 7), Tile(64, 64), Tile(1, 9)], ids=str)
@pytest.mark.parametrize(("grid", "source"), [((16, 16), (10, 10)), ((9, 11), (7, 6)), ((12, 5), (12, 5)), ((14, 9), (3, 1))])
@pytest.mark.parametrize("block_m", [64, 128])
def test_a_table_names_every_source_cell_that_bears_on_its_rows(tile, grid, source, block_m):
    """Against the weights of a bilinear enlargement, by moving one unit of residual over the source grid."""
    tiles = tiles_of(grid, tile)
    nothing = torch.zeros(len(tiles.rows), dtype=torch.int32)
    table = work_table([Part(tiles, (0,), 0, 0, 0, nothing, nothing, (0,))], block_m, grid, source).numpy()
    cells = torch.eye(source[0] * source[1]).view(-1, 1, *source)
    weights = torch.nn.functional.interpolate(cells, grid, mode="bilinear").view(-1, *source, *grid).numpy()
    assert table.shape[1] == FIELDS and (table[:, 14:] == 0).all()
    rows_seen = 0
    for _, origin, width, first, end, *_, low_y, low_x, high_y, high_x, _, _ in table.tolist():
        m = np.arange(first, end)
        y, x = np.divmod(origin + m // width * grid[1] + m % width, grid[1])
        outside = np.ones(source, dtype=bool)
        outside[low_y : high_y + 1, low_x : high_x + 1] = False
        bears = np.abs(weights.reshape(*source, *grid)[:, :, y, x]).max(-1) > 1e-5
        assert not (bears & outside).any()
        assert 0 <= low_y <= high_y < source[0] and 0 <= low_x <= high_x < source[1]
        rows_seen += len(m)
    assert rows_seen == grid[0] * grid[1]


@pytest.mark.parametrize(("tile", "block_m", "block_n", "columns", "steps"), [
    (Tile(8, 8), 64, 64, 8, 1), (Tile(8, 16), 128, 128, 16, 1), (Tile(8, 16), 128, 64, 16, 1), (Tile(8, 8), 64, 32, 8, 2),
    (Tile(0, 192), 128, 128, 16, 3), (Tile(0, 192), 128, 64, 16, 3), (Tile(16, 8), 128, 128, 8, 1),
])  # fmt: skip
def test_a_residual_is_taken_in_as_few_steps_as_there_can_be(tile, block_m, block_n, columns, steps):
    """Steps over the cells under each group's 64 rows of an inner tile, 64x64 above 40x40, against every way to lay them out."""

    def table(rows):
        tiles = tiles_of((64, 64), tile)
        nothing = torch.zeros(len(tiles.rows), dtype=torch.int32)
        return work_table([Part(tiles, (0,), 0, 0, 0, nothing, nothing, (0,))], rows, (64, 64), (40, 40)).numpy()

    assert cell_columns(table(block_m)) == columns
    groups, own = table(block_m), table(64)  # a group's rows are those of an entry of 64
    inner = own[own[:, Column.ORIGIN] == groups[9, Column.ORIGIN]]
    cells, needed = block_n * 64 // block_m if block_n > 64 else block_n, {}
    for across in (8, 16):
        down, right = (-(-(inner[:, high] - inner[:, low] + 1) // side) for low, high, side in (
            (Column.LOW_Y, Column.HIGH_Y, cells // across), (Column.LOW_X, Column.HIGH_X, across)))  # fmt: skip
        needed[across] = int(down.max() * right.max())
    assert needed[columns] == steps == min(needed.values())


def test_why_not_names_what_is_wrong():
    problem = AttentionProblem(ODD, 4, 1, 1, 128, "bf16")
    good = TritonConfig(64, 64, 4, 5, fetchers=4)
    assert why_not(problem, "triton", good, HOPPER) is None
    for changes, capability, reason in (
        ({}, (8, 0), "wants a Hopper GPU (9.0), got 8.0"), ({}, (10, 0), "got 10.0"), ({}, None, "got none"),
        ({"fetchers": 2}, HOPPER, "fetchers=2"), ({"block_m": 128}, HOPPER, "128 with 8"), ({"block_n": 16}, HOPPER, "and 16"),
        ({"maxnreg": 128}, HOPPER, "maxnreg 0"), ({"num_stages": 2}, HOPPER, "num_stages 3..16"),
        ({"num_stages": 6}, HOPPER, "shared memory 2 times"),
    ):  # fmt: skip
        assert reason in (why_not(problem, "triton", dataclasses.replace(good, **changes), capability) or "")
    for dtype, dim in (("fp32", 128), ("bf16", 96), ("fp16", 80)):
        assert "head_dim 64 or 128" in (why_not(AttentionProblem(ODD, 4, 1, 1, dim, dtype), "triton", good, HOPPER) or "")


def test_the_search_sees_it_on_hopper_alone():
    problem = AttentionProblem(ODD, 4, 1, 1, 128, "bf16", 1.0, 20.0)
    assert {c.block_m for c in space(problem, HOPPER) if c.fetchers} == {64, 128}
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not any(c.fetchers for c in space(problem, capability))
    assert not any(c.fetchers for c in space(AttentionProblem(ODD, 4, 1, 1, 96, "bf16"), HOPPER))


@pytest.mark.slow
@needs_triton
def test_every_configuration_compiles_and_fits():
    """Without a GPU: shared memory as foreseen, all programs that should be resident are, and hardly a spill.

    fp16 alone where it adds a residual, the longest: all three of every configuration took what those of bf16 did, but for 16
    bytes of spills of one.
    """
    from sparvar_kernels.backends.triton.layer import gathered_build

    jobs = {}
    for dtype, dim in KINDS:
        problem = AttentionProblem(ODD, 4, 1, 1, dim, dtype, 1.0, 20.0 if dtype == "bf16" else None)
        for config in TritonConfig.fetching(problem):
            for epilogue in (0, 1, 2) if dtype == "bf16" else (1,):
                build = gathered_build(problem, config, epilogue=epilogue, masked=epilogue != 0)
                jobs[Binary(build, HOPPER)] = problem, config
    for job, made in usage(jobs).items():
        problem, config = jobs[job]
        assert made.failure is None, (job, made)
        assert made.shared_bytes <= config.shared_bytes(problem), (job, made)
        many, threads = config.resident(problem), 32 * (config.num_warps + config.fetchers)
        assert many * (config.shared_bytes(problem)) <= SHARED_LIMIT[HOPPER]
        assert made.registers * threads * many <= 65536 and made.registers == config.registers(problem)[0]
        assert made.spill_bytes <= 256, (job, made)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("epilogue", [0, 1, 2])
def test_the_assembler_keeps_every_product(epilogue):
    """Products of the tensor cores in the machine code, by count: an assembler once dropped those of the values."""
    import re

    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.backends.triton.layer import gathered_build

    for dim in (64, 128):
        problem = AttentionProblem(ODD, 4, 1, 1, dim, "bf16", 1.0, 20.0)
        for config in TritonConfig.fetching(problem):
            build = gathered_build(problem, config, epilogue=epilogue, masked=epilogue != 0)  # as above: already compiled
            written = re.findall(r"HGMMA\.64x\d+x16\S* +(\w+)", machine_code(compile_for(build, HOPPER)))
            groups = config.block_m // 64
            cells = config.block_n // groups if config.block_n == 128 else config.block_n
            of_keys, of_values, of_cells = 2 * dim // 16, 2 * config.block_n // 16, 2 * cells // 16 if epilogue == 1 else 0
            assert "RZ" not in written and len(written) == groups * (of_keys + of_values + of_cells), (build, len(written))


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_gpu_agrees_with_oracle(name, dtype, dim):
    """With residuals added and taken, lists of data and of geometry, heads that reuse the decision scale's output."""
    for config in fetching(dtype, dim):
        assert check(name, dtype, dim, "cuda", config=config) < 2 * TOLERANCES[dtype], config


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAST_CASES)
@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_gpu_edges_layouts_and_bits(name, dtype, dim):
    for config in fetching(dtype, dim):
        edges_layouts_and_bits(name, dtype, dim, config)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_full_size_given_the_lists(dim):
    """The last scale of Infinity: every kind of head in one launch, every program against fp32 attention over its list."""
    from lab.kernel_table import Case, error_of
    from sparvar_tune.launch_search.layer_call import Bench

    schedule = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    windows = (-1,) * 8 + (1, 1, 3, 5, 7)
    policy = Policy(("ABCD",), (
        Rule(12, "A", Csla(windows, 5, Tile(8, 16), decision_scale=10)), Rule(12, "B", Cs4a(10, 0.1, Tile(8, 16))),
        Rule(12, "C", Reuse(10)), Rule(12, "D", Csla(windows, 5, Tile(8, 8))),
    ))  # fmt: skip
    for bound in (20.0, None):
        case = Case("all kinds", schedule, 12, 4, dim, "bf16", bound, policy)
        bench = Bench(policy, {s: case.problem(s) for s in range(13)}, 0, 12)
        for config in TritonConfig.fetching(bench.problem):
            attend = bench.attention(config)
            bench.call(attend)
            assert error_of(case, attend, bench, 10**9) < TOLERANCES["bf16"], config


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [
    Tile(8, 16), Tile(16, 8), Tile(0, 128), Tile(0, 100), Tile(3, 40), Tile(40, 3), Tile(1, 64), Tile(64, 1), Tile(11, 13),
    Tile(8, 8), Tile(5, 64), Tile(24, 24),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    ("source", "grid"), [((20, 20), (32, 32)), ((27, 18), (48, 32)), ((9, 40), (11, 60)), ((3, 2), (30, 41))]
)
def test_gpu_each_group_finds_the_cells_under_its_rows(tile, source, grid):
    """Tiles that groups of 64 rows cut in every way, above grids that are finer and coarser than theirs; every program."""
    from lab.kernel_table import Case, error_of
    from sparvar_tune.launch_search.layer_call import Bench

    schedule = ScaleSchedule(((1, 1), (2, 2), source, grid))
    policy = Policy.uniform(1, 3, {3: Csla((-1, -1, 1, 3), 2, tile, decision_scale=2)})
    case = Case("cells", schedule, 3, 3, 64, "bf16", 20.0, policy)
    bench = Bench(policy, {s: case.problem(s) for s in range(4)}, 0, 3)
    for m, n in ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
        attend = bench.attention(TritonConfig(m, n, m // 16, 4, fetchers=4))
        bench.call(attend)
        assert error_of(case, attend, bench, 10**9) < TOLERANCES["bf16"], (m, n)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 20.0), ("fp16", None)])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_lists_of_several_whole_lengths(dim, dtype, bound):
    """More table entries than programs, no list with a tail, not all alike: a compiler once took the first length for all."""
    from lab.kernel_table import Case, error_of
    from sparvar_tune.launch_search.layer_call import Bench

    schedule = ScaleSchedule.square((1, 2, 3, 4, 6, 9, 13, 18))  # 640 keys
    policy = Policy.uniform(1, 36, {7: Csla((-1,) * 4 + (1, 3, 3, 3), 2, Tile(0, 128), "block128")})
    case = Case("blocks", schedule, 7, 36, dim, dtype, bound, policy)
    bench = Bench(policy, {s: case.problem(s) for s in range(8)}, 0, 7)
    for config in TritonConfig.fetching(bench.problem):
        attend = bench.attention(config)
        bench.call(attend)
        layer = next(iter(attend._layers.values()))[0]
        ((stage, gather),) = layer.stages.values()
        assert not stage.masked and len(stage.table[:, Column.COUNT].unique()) > 1, "this is what the test is for"
        ((_, grid, _),) = gather.ready.values()
        assert len(stage.table) * 2 > grid[0]
        assert error_of(case, attend, bench, 10**9) < TOLERANCES[dtype], config
