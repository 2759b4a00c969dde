"""Every variant through the one entry point against the fp64 oracle, on odd shapes and every dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerances import MASS_TOLERANCE, TOLERANCES

from sparvar_kernels import (
    AttentionProblem,
    Cs4a,
    Csla,
    Dense,
    NearFar,
    Policy,
    Pooled,
    Reuse,
    Rule,
    ScaleSchedule,
    SparseAttention,
    Tile,
    oracle,
)
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.configs import CpuConfig
from sparvar_kernels.backends.dense import column_mass
from sparvar_kernels.variants import variant_from_dict, variant_to_dict, why_not_variant
from sparvar_kernels.variants.residual import enlarge

ODD = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)))
PREFIXED = ScaleSchedule(((2, 2), (3, 3), (5, 5), (8, 8), (13, 10)), prefix=7)
DECISION, LAST = 3, 4
TILE = Tile(4, 3)
WINDOWS = (-1, -1, 3, 3, 5)

VARIANTS = {
    "dense": Dense(),
    "csla": Csla(WINDOWS, 2, TILE),
    "csla raster": Csla(WINDOWS, 1, Tile(0, 17)),
    "csla block128": Csla(WINDOWS, 1, Tile(0, 128), "block128"),
    "csla residual": Csla(WINDOWS, 2, TILE, decision_scale=DECISION),
    "csla all sinks": Csla((-1,) * 5, 5, TILE),
    "csla whole windows": Csla((99,) * 5, 0, Tile(50, 50)),
    "cs4a": Cs4a(DECISION, 0.5, TILE),
    "cs4a plain": Cs4a(DECISION, 0.5, TILE, residual=False),
    "cs4a window sampled": Cs4a(DECISION, 0.6, Tile(3, 4), window=3, sample=3),
    "cs4a raster": Cs4a(DECISION, 0.7, Tile(0, 20)),
    "reuse": Reuse(DECISION),
    "pooled 2": Pooled(2, 2),
    "pooled 4": Pooled(3, 4),
    "near-far": NearFar(3, 0, TILE),
    "near-far wider": NearFar(4, 1, Tile(3, 5)),
    "near-far of one cell": NearFar(1, 0, Tile(5, 2)),
    "near-far whole": NearFar(99, 0, TILE),
}


def problems(schedule, dtype="fp32", batch=1, heads=2, dim=32, bound=None):
    scale = 1.0 if bound else dim**-0.5
    return tuple(AttentionProblem(schedule, s, batch, heads, dim, dtype, scale, bound) for s in (DECISION, LAST))


def run(policy, pair, inputs, **options):
    attend = SparseAttention(
        policy, pair[1].schedule, softmax_scale=pair[1].softmax_scale, logit_bound=pair[1].logit_bound, **options
    )
    attend(*inputs[0], layer=0, scale_index=DECISION)
    return attend(*inputs[1], layer=0, scale_index=LAST)


def want(variant, pair, inputs):
    tile = variant.at_decision(pair[1].schedule, LAST).tile
    return oracle.reference_attention(variant, *inputs[1], pair[1], (pair[0], *inputs[0]), tile)


def relative(got, ref):
    return float((got.double() - ref).norm() / ref.norm())


@pytest.mark.parametrize("schedule", [ODD, PREFIXED], ids=["odd", "prefixed"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "dim", "batch", "bound"), [
    ("fp32", 32, 1, None), ("fp32", 64, 2, 20.0), ("fp64", 80, 1, None), ("fp32", 128, 1, 90.0),
])  # fmt: skip
def test_variant_agrees_with_oracle(schedule, name, dtype, dim, batch, bound):
    variant, pair = VARIANTS[name], problems(schedule, dtype, batch, 2, dim, bound)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    policy = Policy.uniform(1, 2, {} if name == "dense" else {LAST: variant})
    # logits of 90 leave few bits for the softmax's small terms: fp32 rounding of the logit is 90 * 2**-24 relative
    slack = 10 if bound and bound > 60 else 1
    assert relative(run(policy, pair, inputs), want(variant, pair, inputs)) < TOLERANCES[dtype] * slack


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_low_precision(name, dtype):
    """The ranking is the planner's own (near ties may fall either way in 16 bits); everything after it is checked."""
    variant, pair = VARIANTS[name], problems(ODD, dtype, 1, 2, 64, 20.0)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    got = run(Policy.uniform(1, 2, {} if name == "dense" else {LAST: variant}), pair, inputs)
    assert relative(got, want(variant, pair, inputs)) < TOLERANCES[dtype] * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_around_a_call_changes_nothing(name):
    pair = problems(ODD)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    policy = Policy.uniform(1, 2, {} if name == "dense" else {LAST: VARIANTS[name]})
    with torch.autocast("cpu", torch.bfloat16):
        got = run(policy, pair, inputs)
    assert torch.equal(got, run(policy, pair, inputs))


@pytest.mark.parametrize("elements", [1, 700, 10**9])
def test_chunk_size_changes_nothing(elements):
    pair = problems(ODD)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    policy = Policy.uniform(1, 2, {LAST: VARIANTS["csla residual"]})
    got = run(policy, pair, inputs, launches={LAST: Launch("cpu", CpuConfig(elements))})
    assert relative(got, want(VARIANTS["csla residual"], pair, inputs)) < TOLERANCES["fp32"]


def test_heads_of_one_call_may_differ():
    heads = ["csla residual", "cs4a", "dense", "reuse", "pooled 2", "near-far", "csla", "cs4a"]
    pair = problems(ODD, heads=len(heads))
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    letters = {name: chr(65 + i) for i, name in enumerate(dict.fromkeys(heads))}
    rules = tuple(Rule(LAST, letter, VARIANTS[name]) for name, letter in letters.items() if name != "dense")
    got = run(Policy(("".join(letters[n] for n in heads),), rules), pair, inputs)
    for h, name in enumerate(heads):
        ref = want(VARIANTS[name], pair, inputs)[:, h]
        assert relative(got[:, h], ref) < TOLERANCES["fp32"], name


def test_strided_and_cached_inputs():
    """k and v as slices of a larger cache, q as [B, N, H, D] seen as [B, H, N, D]."""
    pair = problems(ODD, batch=2, heads=3)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    strided = []
    for q, k, v in inputs:
        cache = torch.full((2, 3, 200, 32), float("nan"))
        cache[:, :, : k.shape[2]] = k
        strided.append(
            (
                q.transpose(1, 2).contiguous().transpose(1, 2),
                cache[:, :, : k.shape[2]],
                v.transpose(1, 2).contiguous().transpose(1, 2),
            )
        )
    for name in ("csla residual", "cs4a", "pooled 2", "near-far", "reuse"):
        policy = Policy.uniform(1, 3, {LAST: VARIANTS[name]})
        assert relative(run(policy, pair, strided), want(VARIANTS[name], pair, inputs)) < TOLERANCES["fp32"]


def test_same_bits_every_time():
    pair = problems(PREFIXED, heads=3)
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    policy = Policy(("ABC",), tuple(Rule(LAST, c, VARIANTS[n]) for c, n in zip("ABC", ("cs4a", "csla", "pooled 2"), strict=True)))
    assert torch.equal(run(policy, pair, inputs), run(policy, pair, inputs))


@pytest.mark.parametrize(
    ("tile", "sample"), [(Tile(4, 3), 1), (Tile(2, 2), 1), (Tile(4, 4), 3), (Tile(0, 13), 2), (Tile(9, 9), 1)]
)
@pytest.mark.parametrize("bound", [None, 20.0, 90.0])
def test_column_mass(tile, sample, bound):
    problem = problems(PREFIXED, batch=2, heads=3, bound=bound)[0]
    q, k, _ = problem.make_inputs(3)
    got = column_mass(q, k, problem, (0, 2), tile, sample)
    ref = oracle.mass(q, k, problem, tile, sample)[:, [0, 2]]
    assert relative(got, ref) < MASS_TOLERANCE
    rows = torch.tensor([len(t[::sample]) for t in oracle.tile_lists(problem.grid, tile)], dtype=got.dtype)
    assert torch.allclose(got.sum(-1), rows.expand(got.shape[:3]), rtol=1e-4)


@pytest.mark.parametrize(("source", "target"), [((4, 5), (7, 6)), ((1, 1), (3, 4)), ((40, 40), (64, 64)), ((8, 3), (8, 3))])
def test_enlarge(source, target):
    cached = torch.randn(2, 3, source[0] * source[1], 16)
    assert relative(enlarge(cached, source, target), oracle.enlarge(cached, source, target)) < 1e-6


def test_paper_index_form_runs():
    variant = Cs4a(DECISION, 0.2, Tile(0, 192), "index", bands=(3,), residual=False)
    pair = problems(ODD, "fp64")
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    got = run(Policy.uniform(1, 2, {LAST: variant}), pair, inputs)
    from sparvar_kernels.variants.cs4a.planner import rank_keys, ranks_needed

    ranked = rank_keys(oracle.mass(*inputs[0][:2], pair[0], variant.tile), ranks_needed(variant, ODD, LAST))
    lists = variant.lists(pair[1].schedule, LAST, "cpu", ranked)
    for h in range(2):
        one = (slice(None), slice(h, h + 1))
        keys = [set(row.tolist()) for row in lists.keys[0, h]]
        ref = oracle.masked(inputs[1][0][one], inputs[1][1][one], inputs[1][2][one], pair[1], variant.tile, keys)
        assert relative(got[one], ref) < 1e-5


BAD_VARIANTS = [
    (Reuse(4), "decision_scale=4"), (Cs4a(-1, 0.2, TILE), "decision_scale=-1"), (Csla((1,) * 4, 2, TILE), "4 windows"),
    (Csla(WINDOWS, 6, TILE), "sinks=6"), (Csla(WINDOWS, 2, TILE, "block64"), "form='block64'"),
    (Csla(WINDOWS, 2, TILE, "block128"), "want raster128"), (Csla((-1,) * 5, 0, TILE), "no window and no sinks"),
    (Csla((3, 3, 3, 3, -1), 0, TILE), "without sinks"), (Cs4a(3, 0.0, TILE), "top_k=0.0"), (Cs4a(3, 1.5, TILE), "top_k=1.5"),
    (Cs4a(3, 0.2, TILE, "row"), "keys='row'"), (Cs4a(3, 0.2, TILE, sample=0), "sample=0"),
    (Cs4a(3, 0.2, TILE, window=-1), "window=-1"), (Cs4a(3, 0.2, TILE, bands=(1,)), "no bands"),
    (Cs4a(3, 0.2, TILE, "index", bands=(1,)), "raster tile"), (Cs4a(3, 0.2, Tile(0, 9), "index"), "1 bands"),
    (Cs4a(3, 0.2, Tile(0, 9), "index", bands=(-2,)), "every side"), (Pooled(5, 2), "first_scale=5"), (Pooled(2, 1), "factor=1"),
    (NearFar(0, 0, TILE), "cells=0"), (NearFar(4, -1, TILE), "near=-1"), (NearFar(4, 0, Tile(0, 9)), "raster9"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "reason"), BAD_VARIANTS, ids=[r for _, r in BAD_VARIANTS])
def test_illegal_variants_are_refused_with_the_reason(variant, reason):
    assert reason in (why_not_variant(variant, ODD, LAST) or "")
    with pytest.raises(ValueError, match="rules"):
        SparseAttention(Policy.uniform(1, 2, {LAST: variant}), ODD)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_legal_variants_round_trip_through_json_values(variant):
    assert why_not_variant(variant, ODD, LAST) is None
    assert variant_from_dict(variant_to_dict(variant), "variant") == variant


@pytest.mark.parametrize(("policy", "reason"), [
    (Policy(("AA", "A")), "class letters"), (Policy(("AA",), (Rule(9, "A", Reuse(3)),)), "scale_index=9"),
    (Policy(("AA",), (Rule(4, "B", Reuse(3)),)), "has no head"),
    (Policy(("AA",), (Rule(4, "A", Reuse(3)), Rule(4, "A", Reuse(2)))), "second rule"),
    (Policy(("AA",), (Rule(3, "A", Pooled(2, 2)), Rule(4, "A", Reuse(3)))), "must be dense"),
    (Policy(("AA",), (), (4,)), "want a step"),
])  # fmt: skip
def test_illegal_policies(policy, reason):
    assert reason in (policy.why_not(ODD, 1, 2) or "")


def test_misuse_is_refused():
    pair = problems(ODD)
    q, k, v = pair[1].make_inputs(0)
    attend = SparseAttention(Policy.uniform(1, 2, {LAST: Cs4a(DECISION, 0.5, TILE)}), ODD)
    with pytest.raises(ValueError, match="decision scale 3 was not run"):
        attend(q, k, v, 0, LAST)
    with pytest.raises(ValueError, match="k: got"):
        attend(q, k[:, :, 1:], v, 0, LAST)
    with pytest.raises(ValueError, match="layer=1"):
        attend(q, k, v, 1, LAST)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        attend(q.int(), k, v, 0, LAST)
    with pytest.raises(ValueError, match="4 heads, want 2"):
        attend(*(torch.cat([t, t], 1) for t in (q, k, v)), 0, LAST)
    with pytest.raises(ValueError, match="scale 4"):
        SparseAttention(Policy.uniform(1, 2, {}), ODD, launches={LAST: Launch("cpu", CpuConfig(0))})(q, k, v, 0, LAST)


def test_a_new_image_forgets_the_old_one():
    pair = problems(ODD)
    attend = SparseAttention(Policy.uniform(1, 2, {LAST: Reuse(DECISION)}), ODD, softmax_scale=pair[0].softmax_scale)
    attend(*pair[0].make_inputs(0), layer=0, scale_index=DECISION)
    first = dataclasses.replace(pair[0], scale_index=0)
    attend(*first.make_inputs(0), layer=0, scale_index=0)
    with pytest.raises(ValueError, match="was not run"):
        attend(*pair[1].make_inputs(0), layer=0, scale_index=LAST)
