"""Nothing a caller hands to the kernels may end in a silently wrong result: right as the oracle has it, or refused in one line.

The Triton rows run in Triton's interpreter, in a process of their own (`interpreted.py`).
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from interpreted import in_interpreter
from tolerances import assert_close

from sparvar_kernels import (
    AttentionProblem,
    Cs4a,
    Csla,
    NearFar,
    Policy,
    Pooled,
    Rule,
    ScaleSchedule,
    SparseAttention,
    Tile,
    oracle,
    why_not,
)
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.dense import SAFE_LOGIT, column_mass
from sparvar_kernels.backends.registry import default_config
from sparvar_kernels.backends.triton.table import Column
from sparvar_kernels.variants.csla.planner import csla_lists, tile_mask
from sparvar_kernels.variants.pooled.planner import pool_keys

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SMALL, VARIANT = ScaleSchedule(((1, 1), (4, 4), (8, 8))), Csla((0, 1, 3), 1, Tile(4, 4))
ODD = ScaleSchedule(((1, 1), (2, 3), (4, 5), (9, 11), (13, 15)))
KERNELS = {"cpu": None, "triton": TritonConfig(16, 32, 4, 1)}


def attention(kernel: str = "cpu", variant=VARIANT, schedule=SMALL, heads: int = 2, **options) -> SparseAttention:
    last = len(schedule) - 1
    launches = {s: Launch(kernel, KERNELS[kernel]) for s in range(len(schedule))}
    return SparseAttention(Policy.uniform(1, heads, {last: variant}), schedule, launches=launches, **options)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2; anything that is not finite counts as wrong."""
    return float((got.double() - want).nan_to_num(1e9, 1e9, 1e9).norm() / want.norm())


# Ranking by a tile's own queries


@pytest.mark.parametrize(("grid", "tile", "sample"), [
    ((40, 40), Tile(0, 192), 1), ((9, 11), Tile(4, 4), 1), ((9, 11), Tile(4, 4), 3), ((5, 7), Tile(0, 16), 4),
    ((3, 3), Tile(8, 8), 2),
])  # fmt: skip
def test_a_short_tile_ranks_by_its_own_queries(grid, tile, sample):
    """The paper's 40 x 40 case cuts 1,600 queries into groups of 192: the last one has 64."""
    p = AttentionProblem(ScaleSchedule(((2, 2), grid)), 1, 1, 2, 16)
    q, k, _ = p.make_inputs(0)
    mass = column_mass(q, k, p, (0, 1), tile, sample)
    probabilities = torch.softmax(q.double() @ k.double().transpose(-1, -2), -1)
    for t, queries in enumerate(oracle.tile_lists(grid, tile)):
        assert_close(mass[:, :, t], probabilities[:, :, queries[::sample]].sum(2), "fp32", 4)


def mass_error_on_triton() -> float:
    from sparvar_kernels.backends.dense import dense_with_lse
    from sparvar_kernels.backends.triton.selecting import column_mass as on_gpu

    worst = 0.0
    for grid, tile, sample in (((9, 11), Tile(4, 4), 1), ((9, 11), Tile(4, 4), 3), ((6, 7), Tile(0, 16), 2)):
        p = AttentionProblem(ScaleSchedule(((2, 2), grid)), 1, 1, 2, 32)
        q, k, v = p.make_inputs(0)
        got = on_gpu(q, k, dense_with_lse(q, k, v, 1.0)[1], p, (0, 1), tile, sample)[..., : p.num_keys]
        worst = max(worst, error(got, oracle.mass(q, k, p, tile, sample)))
    return worst


@pytest.mark.slow
@needs_triton
def test_a_short_tile_ranks_by_its_own_queries_on_triton():
    assert in_interpreter("test_boundary_kernels", "t.mass_error_on_triton()") < 1e-5


def test_masses_of_other_samples_are_not_shared():
    """The same heads ranked for two later scales, on every query and on every third one: each list has its own mass."""
    schedule = ScaleSchedule(((1, 1), (3, 4), (6, 5), (7, 9), (11, 10)))
    variants = {3: Cs4a(2, 0.6, Tile(4, 3)), 4: Cs4a(2, 0.3, Tile(6, 3), sample=3)}
    assert variants[3].at_decision(schedule, 3).tile == variants[4].at_decision(schedule, 4).tile, "not what is to be tested"
    problems = {s: AttentionProblem(schedule, s, 1, 2, 32) for s in (2, 3, 4)}
    inputs = {s: p.make_inputs(s) for s, p in problems.items()}
    attend = SparseAttention(Policy.uniform(1, 2, variants), schedule)
    for s, qkv in inputs.items():
        got = attend(*qkv, 0, s)
        if s in variants:
            want = oracle.reference_attention(variants[s], *qkv, problems[s], (problems[2], *inputs[2]))
            assert_close(got, want, "fp32", 2)


# Numbers


@pytest.mark.parametrize("bound", [None, 100.0])
@pytest.mark.parametrize("gap", [60.0, 100.0, 200.0])
def test_keys_that_only_fill_a_list_have_no_influence(gap, bound):
    schedule, last = ScaleSchedule(((1, 1), (4, 4), (8, 8), (11, 9))), 3
    variant = Csla((0, 0, 1, 3), 1, Tile(4, 4))
    lists, listed = csla_lists(schedule, last, variant), tile_mask(schedule, last, variant)
    unit = torch.nn.functional.normalize(torch.ones(32), dim=0)
    p = AttentionProblem(schedule, last, 1, 1, 32, "fp32", 1.0, bound)
    k = (-unit * 0.5).repeat(1, 1, p.num_keys, 1)
    outsider = next(j for j in lists.keys[0, 0, 0, int(lists.counts[0, 0, 0]) :].tolist() if not listed[0, j])
    k[0, 0, outsider] = unit * 0.5
    q, v = (unit * gap).repeat(1, 1, p.num_queries, 1), torch.randn(1, 1, p.num_keys, 32)
    attend = SparseAttention(Policy.uniform(1, 1, {last: variant}), schedule, logit_bound=bound)
    assert_close(attend(q, k, v, 0, last), oracle.reference_attention(variant, q, k, v, p), "fp32", 2)
    v[0, 0, outsider] = float("nan")
    rows = oracle.tile_lists(schedule.grids[last], variant.tile)[0]
    assert bool(attend(q, k, v, 0, last)[0, 0, rows].isfinite().all())


def test_a_logit_bound_is_used_only_where_exp_is_safe():
    """A bound above SAFE_LOGIT must not leave the running maximum out: fp32 would overflow from a logit of 88.7 on."""
    assert SAFE_LOGIT == 60.0
    for bound in (SAFE_LOGIT, 61.0, 95.0, 600.0):
        p = AttentionProblem(SMALL, 2, 1, 2, 32, "fp32", 1.0, bound)
        q, k, v = p.make_inputs(0)
        q = q * 0 + k[:, :, 5:6] * (bound * 0.99 / k[:, :, 5:6].norm() * 2**0.5)  # every query's best key at the bound
        q = q / (q @ k.transpose(-1, -2)).abs().amax() * bound * 0.99
        got = attention(logit_bound=bound)(q, k, v, 0, 2)
        assert_close(got, oracle.reference_attention(VARIANT, q, k, v, p), "fp32", 4)


def nan_in_a_query() -> list[list[object]]:
    """(dtype, values of the queries 0, 70 and 143) for which selection wrote before its lists or changed another tile's."""
    from sparvar_kernels.backends.dense import dense_with_lse
    from sparvar_kernels.backends.triton.selecting import column_mass as on_gpu
    from sparvar_kernels.backends.triton.selecting import select
    from sparvar_kernels.backends.triton.work import Lists

    schedule, front, width, canary = ScaleSchedule(((1, 1), (2, 3), (4, 5), (12, 12), (17, 18))), 4096, 64, -7
    there = Cs4a(3, 0.3, Tile(4, 4)).at_decision(schedule, 4)
    queries, nan, inf = (0, 70, 143), float("nan"), float("inf")
    own = {q // 12 // there.tile.height * -(-12 // there.tile.width) + q % 12 // there.tile.width for q in queries}
    assert len(own) == 3, "a tile of its own for each: not what is to be tested"

    def lists_of(dtype, values):
        p = AttentionProblem(schedule, 3, 1, 1, 32, dtype)
        q, k, v = p.make_inputs(0)
        for query, value in zip(queries, values, strict=False):
            q[0, 0, query, 0] = value
        mass = on_gpu(q, k, dense_with_lse(q, k, v, 1.0)[1], p, (0,), there.tile, 1)
        rows = mass.shape[2]
        keys = torch.full((front + rows * width + 256,), canary, dtype=torch.int32)
        select(mass, keys, Lists(there, (0,), front, rows * width, rows * width, width, rows, width), p, p)
        outside = torch.cat([keys[:front], keys[front + rows * width :]])
        return bool((outside != canary).any()), keys[front : front + rows * width].view(rows, width)

    wrong = []
    for dtype, cases in (("fp32", ((nan, inf, -inf), (inf, -inf, nan), (-inf, nan, inf))), ("fp16", ((nan, inf, -inf),))):
        _, good = lists_of(dtype, ())
        for values in cases:
            outside, got = lists_of(dtype, values)
            others = [t for t in range(len(got)) if t not in own and not torch.equal(got[t], good[t])]
            inside = bool(((got >= 0) & (got < schedule.num_keys(3))).all())
            if outside or others or not inside:
                wrong.append([dtype, *map(str, values)])
    return wrong


@pytest.mark.slow
@needs_triton
def test_nan_in_a_query_stays_in_its_own_list():
    assert in_interpreter("test_boundary_kernels", "t.nan_in_a_query()") == []


def rows_of_a_broken_query(kernel: str) -> list[list[object]]:
    """(variant, value in a query, rows that are not finite, error of the others) where these are not that query alone."""
    schedule, wrong = ScaleSchedule(((1, 1), (4, 4), (8, 8))), []
    p = AttentionProblem(schedule, 2, 1, 2, 32)
    for variant in (VARIANT, Pooled(1, 2), NearFar(4, 0, Tile(4, 4))):
        # 1e19: |q|^2 is finite, the sum of the four is not; 1e16: that times a spread of keys, which all rows would share
        nan, inf = float("nan"), float("inf")
        for value, queries, must in ((nan, [7], True), (inf, [7], True), (1e19, [7, 8, 40, 63], False), (1e16, [7], False)):
            q, k, v = p.make_inputs(0)
            q, k = q * 1e-6, k * 1e6
            q[0, 1, queries, 3] = value
            got, want = attention(kernel, variant)(q, k, v, 0, 2), oracle.reference_attention(variant, q, k, v, p)
            broken = (~got.isfinite().all(-1)).nonzero().tolist()
            got[0, 1, queries] = want[0, 1, queries] = 0
            apart = error(got, want)
            own = [[0, 1, query] for query in queries]
            if broken not in ([own] if must else [own, []]) or apart > 1e-5:
                wrong.append([variant.kind, str(value), broken, apart])
    return wrong


def test_nan_in_a_query_stays_in_its_own_row():
    assert rows_of_a_broken_query("cpu") == []


@pytest.mark.slow
@needs_triton
def test_nan_in_a_query_stays_in_its_own_row_on_a_gpu():
    assert in_interpreter("test_boundary_kernels", "t.rows_of_a_broken_query('triton')") == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("bound", [20.7, 100.0])
def test_the_bias_of_pooled_keys_keeps_its_digits(dtype, bound):
    schedule, variant = ScaleSchedule(((4, 4), (8, 8), (16, 16), (24, 24))), Pooled(1, 2)
    p = AttentionProblem(schedule, 3, 1, 2, 64, dtype, 1.0, bound)
    q, k, v = p.make_inputs(0)
    want = oracle.reference_attention(variant, q, k, v, p)
    got = SparseAttention(Policy.uniform(1, 2, {3: variant}), schedule, logit_bound=bound)(q, k, v, 0, 3)
    keys, values, bias = pool_keys(q, k, v, p, variant)
    wide = torch.softmax(q.float() @ keys.float().transpose(-1, -2) + bias.unsqueeze(2), -1) @ values.float()
    assert error(got, want) < 2 * error(wide, want) + 2.0**-11


# Tensors


def views(t: torch.Tensor):
    """Other ways the same kind of values may lie in memory."""
    yield "last axis expanded", t[..., :1].clone().expand(t.shape)
    yield "one value expanded to all", torch.tensor(0.5).expand(t.shape)
    yield "batch and heads expanded", t[:1, :1].clone().expand(t.shape)
    yield "tokens expanded", t[:, :, :1].clone().expand(t.shape)
    yield "transposed BNHD", t.transpose(1, 2).contiguous().transpose(1, 2)
    yield "last axis strided by 2", torch.stack([t, t * 0 + 99], -1)[..., 0]
    yield "transposed BHDN", t.transpose(2, 3).contiguous().transpose(2, 3)
    yield "slice of a wider cache", torch.cat([t, t * 0 + 99], -1)[..., : t.shape[-1]]
    yield "negative-bit view", torch._neg_view(-t)
    yield "odd address", torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)


def wrong_views(kernel: str) -> list[str]:
    p = AttentionProblem(SMALL, 2, 1, 2, 32)
    qkv, attend, wrong = p.make_inputs(0), attention(kernel), []
    for i, name in enumerate("qkv"):
        for what, other in views(qkv[i]):
            args = [*qkv]
            args[i] = other
            want = oracle.reference_attention(VARIANT, *[a.clone() for a in args], p)
            if error(attend(*args, 0, 2), want) > 1e-4:
                wrong.append(f"{name} {what}")
    return wrong


def test_every_way_to_lie_in_memory_is_read_right():
    assert wrong_views("cpu") == []


@pytest.mark.slow
@needs_triton
def test_every_way_to_lie_in_memory_is_read_right_on_triton():
    assert in_interpreter("test_boundary_kernels", "t.wrong_views('triton')") == []


def said_of_grad(kernel: str) -> list[str]:
    p, out = AttentionProblem(SMALL, 2, 1, 2, 16), []
    for i, letters in itertools.product(range(3), ("AA", "DA")):
        config = KERNELS[kernel]
        attend = SparseAttention(Policy((letters,), (Rule(2, "A", VARIANT),)), SMALL, launches={2: Launch(kernel, config)})
        inputs = [t.requires_grad_(j == i) for j, t in enumerate(p.make_inputs(0))]
        with torch.no_grad():
            attend(*inputs, 0, 2)
        try:
            attend(*inputs, 0, 2)
        except ValueError as refused:
            out.append(str(refused))
    return out


@pytest.mark.slow
@needs_triton
def test_gradients_are_refused_alike_everywhere():
    both = said_of_grad("cpu") + in_interpreter("test_boundary_kernels", "t.said_of_grad('triton')")
    assert len(both) == 12 and len(set(both)) == 1 and "no backward pass" in both[0] and "\n" not in both[0]


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.to("meta"), "on meta, want a plain one"), (lambda t: t.to_sparse(), "sparse"), (lambda t: t[0], "four axes"),
    (lambda t: t.long(), "want one of"), (lambda t: t[:, :, :-1], "want (1, 2, 64, 32)"),
    (lambda t: t[:, :, :0], "want (1, 2, 64"),
])  # fmt: skip
def test_wrong_tensors_are_one_line(change, said):
    q, k, v = AttentionProblem(SMALL, 2, 1, 2, 32).make_inputs(0)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        attention()(change(q), k, v, 0, 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("at", "got", "said"), [
    (0, None, "q: got a NoneType"), (1, None, "k: got a NoneType"), (2, np.zeros((1, 2, 85, 32), "f4"), "v: got a ndarray"),
    (0, [[1.0]], "q: got a list"), (1, torch.zeros(1, 2, 85, 32).to_sparse(), "k: got a torch.sparse_coo tensor"),
    (3, "0", "layer='0': want 0..0"), (3, [0], "layer=[0]"), (3, torch.tensor(0), "layer=tensor(0)"),
    (4, None, "scale_index=None"), (4, 2.5, "scale_index=2.5: want 0..2, a whole number"),
    (3, 0.0, "layer=0.0: want 0..0, a whole number"), (3, False, "layer=False: want 0..0, a whole number"),
    (4, 2.0, "scale_index=2.0: want 0..2, a whole number"), (4, True, "scale_index=True: want 0..2, a whole number"),
    (4, np.bool_(True), "want 0..2, a whole number"), (3, np.float64(0), "want 0..0, a whole number"),
])  # fmt: skip
def test_what_is_no_tensor_or_index_is_one_line(at, got, said, warm):
    given = [*AttentionProblem(SMALL, 2, 1, 2, 32).make_inputs(0), 0, 2]
    attend = attention()
    if warm:
        attend(*given)
    given[at] = got
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=re.escape(said)) as refused:
            attend(*given)
        assert "\n" not in str(refused.value)


def test_whole_numbers_of_numpy_are_indices():
    given, attend = AttentionProblem(SMALL, 2, 1, 2, 32).make_inputs(0), attention()
    want = attend(*given, 0, 2)
    assert all(torch.equal(attend(*given, np.int64(0), np.uint8(2)), want) for attend in (attend, attention()))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: ScaleSchedule([(1, 1), (2, 2)]), "grids: got a list"), (lambda: ScaleSchedule(((1, 1.5),)), "grids[0]=(1, 1.5)"),
    (lambda: ScaleSchedule((4, 8)), "grids[0]=4"), (lambda: SparseAttention(None, SMALL), "policy: got a NoneType"),
    (lambda: SparseAttention(Policy(("A",)), [1, 4]), "schedule: got a list"), (lambda: Tile("8", 8), "tile 8x8: want height"),
    (lambda: SparseAttention(Policy(["AA"]), SMALL), "policy: unhashable type: 'list'; want tuples"),
    (lambda: SparseAttention(Policy(()), SMALL), "policy: heads: got none"),
    (lambda: SparseAttention(Policy(("A",), (Rule(2, "A", "csla"),)), SMALL), "rules[0]: got a str, want a variant"),
    (lambda: AttentionProblem(SMALL, 2, 1, 2.0, 16), "heads=2.0"), (lambda: AttentionProblem(None, 2, 1, 2, 16), "schedule: got"),
    (lambda: AttentionProblem(SMALL, "2", 1, 2, 16), "scale_index='2'"),
    (lambda: AttentionProblem(SMALL, 2, 1, 2, 16, "fp32", float("nan")), "softmax_scale=nan"),
])  # fmt: skip
def test_what_attention_is_made_of_is_checked_where_it_is_made(make, said):
    with pytest.raises(ValueError) as refused:
        make()
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BHND", "BNHD", "BHDN", "cut from qkv"])
def test_a_compiled_call_has_the_strides_it_promised(name):
    laid_out = {
        "BHND": lambda t: t, "BNHD": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "BHDN": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "cut from qkv": lambda t: torch.cat([t, t], -1)[..., :32],
    }[name]  # fmt: skip
    attend = attention()
    args = [laid_out(t) for t in AttentionProblem(SMALL, 2, 1, 2, 32).make_inputs(0)]

    def block(q, k, v):
        return attend(q, k, v, 0, 2).transpose(1, 2).flatten(2) * 2

    torch.library.opcheck(torch.ops.sparvar_kernels.attend, (*args, attend.handle, 0, 2))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(*args), block(*args))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_a_layout_with_gaps():
    attend = attention()
    args = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in AttentionProblem(SMALL, 2, 1, 2, 32).make_inputs(0)]

    def block(q, k, v):
        return attend(q, k, v, 0, 2).transpose(1, 2).flatten(2) * 2

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(block, fullgraph=True)(*args), block(*args))


# Sizes and launches


def errors_of_small_decisions(kernel: str) -> list[float]:
    out = []
    for first, prefix in (((1, 1), 0), ((1, 1), 1), ((1, 2), 0), ((1, 3), 0), ((2, 2), 0)):
        schedule = ScaleSchedule((first, (4, 4), (8, 8)), prefix=prefix)
        variant = Cs4a(0, 0.5, Tile(4, 4), residual=False)
        p = [AttentionProblem(schedule, s, 1, 1, 32) for s in range(3)]
        x = [q.make_inputs(i) for i, q in enumerate(p)]
        attend = attention(kernel, variant, schedule, 1)
        got = [attend(*x[s], 0, s) for s in range(3)][2]
        out.append(
            error(got, oracle.reference_attention(variant, *x[2], p[2], (p[0], *x[0]), variant.at_decision(schedule, 2).tile))
        )
    return out


@pytest.mark.slow
@needs_triton
def test_a_decision_scale_may_have_a_single_key():
    assert (
        max(errors_of_small_decisions("cpu") + in_interpreter("test_boundary_kernels", "t.errors_of_small_decisions('triton')"))
        < 1e-5
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_default_launch_fits_every_gpu(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for dtype, dim in itertools.product(("bf16", "fp32"), (64, 72, 80, 128, 160, 256)):
        problems = [AttentionProblem(SMALL, s, 1, 2, dim, dtype) for s in range(3)]
        config = default_config(problems[2], "triton", capability)
        assert why_not(problems[2], "triton", config, capability) is None, (dtype, dim)
        usual = TritonConfig()
        assert config == usual or why_not(problems[2], "triton", usual, capability) is not None, "no need to leave the default"
        SparseAttention(Policy.uniform(1, 2, {2: VARIANT}), SMALL)._build(problems, torch.device("cuda", 0))


# One object, one pass


def guidance(kernel: str, between: str) -> str:
    """Two passes over one object, scale by scale, as guidance without a common batch would be; what is said of it."""
    variant = Cs4a(1, 0.5, Tile(4, 4))
    problems = [AttentionProblem(SMALL, s, 1, 2, 32) for s in range(3)]
    attend = attention(kernel, variant)
    try:
        for s, p in enumerate(problems):
            for half in range(2):
                if between == "reset" and s == 1:
                    attend.reset()
                if between != "one pass" or half == 0:
                    attend(*p.make_inputs(half), 0, s)
    except ValueError as refused:
        return str(refused)
    return ""


@pytest.mark.slow
@needs_triton
def test_two_passes_over_one_object_are_refused():
    for said in (guidance("cpu", ""), in_interpreter("test_boundary_kernels", "t.guidance('triton', '')")):
        assert "run 2 times" in said and "one batch" in said and "\n" not in said
    assert guidance("cpu", "one pass") == "" and guidance("cpu", "reset") == ""


def test_a_scale_may_be_called_again_and_a_new_image_begins_at_scale_0():
    variant = Cs4a(1, 0.5, Tile(4, 4))
    problems = [AttentionProblem(SMALL, s, 1, 2, 32) for s in range(3)]
    attend = attention(variant=variant)
    for _image in range(2):
        for s, p in enumerate(problems):
            first = attend(*p.make_inputs(s), 0, s)
        assert torch.equal(attend(*problems[2].make_inputs(2), 0, 2), first)


@needs_triton
@pytest.mark.parametrize("window", [0, 3])
def test_the_work_table_is_sorted_by_length_of_list(window):
    """Long lists first: the last programs to start are short ones, so no multiprocessor ends long after the others."""
    from sparvar_kernels.backends.triton.work import build_stage

    schedule = ScaleSchedule(((1, 1), (4, 4), (16, 16), (32, 24)))
    variants = [(Csla((0, 1, 3, 5), 1, Tile(8, 8)), (0, 2)), (Csla((0, 1, 3, 9 + window), 1, Tile(8, 8)), (1,))]
    p = AttentionProblem(schedule, 3, 1, 3, 64)
    lengths = build_stage(variants, p, TritonConfig(), "cpu", [None, None], [None, None]).table[:, Column.COUNT]
    blocks = [-(-n // 256) for n in lengths.tolist()]  # about one length: those stay head by head
    assert len(set(blocks)) > 1 and blocks == sorted(blocks, reverse=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_runs_what_lies_on_it():
    """Whatever device is current: the outputs of both are the oracle's, and lie where the inputs do."""
    schedule = ScaleSchedule(((1, 1), (4, 4), (8, 8), (16, 16)))
    for variant in (Csla((0, 1, 3, 5), 1, Tile(8, 8)), Cs4a(2, 0.5, Tile(8, 8))):
        problems = [AttentionProblem(schedule, s, 1, 2, 64, "bf16") for s in range(4)]
        attend = SparseAttention(Policy.uniform(1, 2, {3: variant}), schedule)
        inputs = [p.make_inputs(i) for i, p in enumerate(problems)]
        outs = {}
        for device in ("cuda:0", "cuda:1"):
            for s in range(4):
                outs[device] = attend(*(t.to(device) for t in inputs[s]), 0, s)
            assert str(outs[device].device) == device
        assert torch.cuda.current_device() == 0 and torch.equal(outs["cuda:0"].cpu(), outs["cuda:1"].cpu())


def test_the_callers_default_device_is_not_where_plans_are_made():
    """As `torch.set_default_device("cuda")` around everything; here the device that holds nothing."""
    schedule = ScaleSchedule.square((1, 2, 3, 5, 6))
    policy = Policy(
        ("ABCD",),
        (
            Rule(4, "A", Cs4a(3, 0.5, Tile(4, 4))),
            Rule(4, "B", Csla((-1, -1, 3, 3, 5), 2, Tile(4, 4), decision_scale=3)),
            Rule(4, "C", Pooled(2, 2)),
        ),
    )
    problems = [AttentionProblem(schedule, s, 2, 4, 16, "fp32", 1.0, 12.0) for s in range(5)]
    inputs = [p.make_inputs(s, "cpu") for s, p in enumerate(problems)]
    plain = SparseAttention(policy, schedule, logit_bound=12.0)
    want = [plain(*t, 0, s) for s, t in enumerate(inputs)]
    with torch.device("meta"):
        attend = SparseAttention(policy, schedule, logit_bound=12.0)
        for _ in range(2):
            got = [attend(*t, 0, s) for s, t in enumerate(inputs)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
