"""Generation steps: what may be said with them, how a profile holds them, and that a model does exactly them and no other."""

from __future__ import annotations

import dataclasses
import json
import math

import adapter_checks as checks
import block_lookalikes
import lookalikes
import pytest
import tiny
import torch
from examples import example

import sparvar_tune
from sparvar_kernels import Policy, Pooled, Reuse, Rule, SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.adapters import infinity
from sparvar_tune.catalog.gpus import find_gpu
from sparvar_tune.catalog.models import find_model
from sparvar_tune.generation import (
    STEPS,
    CacheBudget,
    DropUnconditional,
    Precision,
    SkipScales,
    decides_apart,
    drop_from,
    skip_from,
    why_not_steps,
)
from sparvar_tune.generation.tokens import kept_rows, window_places
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.profile import identity, schema
from sparvar_tune.profile.describe import describe
from sparvar_tune.profile.reader import sealed_text
from sparvar_tune.profile.schema import ProfileError
from sparvar_tune.runtime.tuned import Tuned

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4, 6))
BOTH = (SkipScales((4,)), DropUnconditional(3))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# What may be said


@pytest.mark.parametrize(("rules", "steps", "reason"), [
    ((), (SkipScales((3,)),), "want the last scales"), ((), (SkipScales(()),), "want the last scales"),
    ((), (SkipScales((0, 1, 2, 3, 4)),), "want the last scales"),
    ((Rule(4, "A", Reuse(3)),), (SkipScales((4,)),), "has a rule"), ((), (DropUnconditional(5),), "want 0..4"),
    ((), (DropUnconditional(-1),), "want 0..4"), ((), (DropUnconditional(2), DropUnconditional(3)), "a second drop"),
    ((), (SkipScales((4,)), DropUnconditional(4)), "begins at scale 4, which is skipped"), ((), (4,), "want a step"),
])  # fmt: skip
def test_illegal_steps(rules, steps, reason):
    policy = Policy(("AA",), rules, steps)
    assert reason in (policy.why_not(SCHEDULE, 1, 2) or "")
    with pytest.raises(ValueError, match="policy: "):
        SparseAttention(policy, SCHEDULE)


BUDGET = CacheBudget(3, ((9, 8), (12, 8)), window=4)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"from_scale": 0}, "want 1..4"), ({"from_scale": 4}, "want 1 rows"), ({"keys": ((9, 8), (12,))}, "of 2 layers"),
    ({"window": 5}, "want a square"), ({"window": 16}, "at most 3x3"), ({"window": 0}, "want a square"), ({"pool": 4}, "odd"),
    ({"keys": ((9, 8), (12, 3))}, "at least the window's 4"),
])  # fmt: skip
def test_illegal_budgets(changes, reason):
    assert BUDGET.why_not(SCHEDULE, 2) is None and Policy(("AA",) * 2, (), (BUDGET,)).why_not(SCHEDULE, 2, 2) is None
    assert reason in (dataclasses.replace(BUDGET, **changes).why_not(SCHEDULE, 2) or "")
    before = Policy(("AA",) * 2, (Rule(2, "A", Pooled(1, 2)),), (BUDGET,))
    assert before.why_not(SCHEDULE, 2, 2) is None
    ruled = dataclasses.replace(before, rules=(Rule(3, "A", Pooled(1, 2)),))
    assert "leaves out tokens from scale 3 on; scale 3 has a rule" in ruled.why_not(SCHEDULE, 2, 2)


def test_published_budgets_fit_their_models():
    for name in ("infinity-2b", "infinity-8b"):
        model, step = find_model(name), CacheBudget.published(name)
        assert step.why_not(model.schedule("1M", "1.000"), model.layers) is None
        means = [sum(row) / model.layers for row in step.keys]
        assert all(abs(mean - 650) < 1 for mean in means), "its 10 % are 650 keys a layer at every scale"
    assert step.before(8, 2) == 909 and step.before(8, 3) == 629 and step.before(7, 0) is None and step.before(13, 0) is None


@pytest.mark.parametrize("pool", [1, 3, 5])
def test_kept_keys_are_the_window_and_those_of_the_best_scores(pool):
    """Any choice among equal scores is right, so it is the scores that are held against each other; fp64, by hand."""
    g = torch.Generator().manual_seed(pool)
    q, keys, window = torch.randn(2, 3, 4, 8, generator=g), torch.randn(2, 3, 40, 8, generator=g), torch.tensor([25, 27, 33, 35])
    kept = kept_rows(q, keys, window, 17, pool)
    assert kept.shape == (2, 3, 17)
    for row in range(2):
        for head in range(3):
            mine = kept[row, head].tolist()
            assert mine == sorted(set(mine)) and set(window.tolist()) <= set(mine)
            score = (q[row, head].double() @ keys[row, head].double().T).sum(0).tolist()
            score = [-math.inf if i in window else s for i, s in enumerate(score)]
            pooled = [max(score[max(0, i - pool // 2) : i + pool // 2 + 1]) for i in range(40)]
            others, left = (set(s) - set(window.tolist()) for s in (mine, set(range(40)) - set(mine)))
            assert min(pooled[i] for i in others) >= max(pooled[i] for i in left) - 1e-5


def test_the_window_is_the_middle_of_an_even_division():
    assert window_places((8, 8), 16).tolist() == [y * 8 + x for y in (0, 2, 4, 6) for x in (0, 2, 4, 6)]
    assert window_places((9, 12), 4).tolist() == [1 * 12 + 2, 1 * 12 + 8, 5 * 12 + 2, 5 * 12 + 8]


def test_what_a_policy_says_of_its_steps():
    policy = Policy(("AA",), (Rule(3, "A", Pooled(2, 2)),), BOTH)
    assert policy.why_not(SCHEDULE, 1, 2) is None and policy.skip_scales == (4,)
    assert (drop_from(policy), skip_from(policy)) == (3, 4)
    assert (drop_from(Policy(("A",))), skip_from(Policy(("A",)))) == (None, None)
    assert SkipScales.last(SCHEDULE, 2) == SkipScales((3, 4))
    words = describe(policy)
    assert "scale 4 left out" in words and "unconditional half dropped from scale 3 on" in words


@pytest.mark.parametrize(("dropped", "apart"), [(None, False), (1, False), (2, False), (3, True), (4, True)])
def test_halves_decide_apart_where_one_ends_between_a_decision_and_what_lives_on_it(dropped, apart):
    rules = Rule(3, "A", Pooled(1, 2)), Rule(4, "A", Reuse(2))
    assert decides_apart(SparseAttention(Policy(("A",), rules), SCHEDULE), dropped) is apart


def test_who_can_do_what():
    assert list(STEPS) == ["skip_scales", "drop_unconditional", "cache_budget", "prune_tokens", "precision"]
    assert why_not_steps(BOTH, STEPS, "it") is None and why_not_steps((), (), "it") is None
    assert why_not_steps(BOTH, ("skip_scales",), "it") == "drop_unconditional: it cannot do that; it can do skip_scales"


# In a profile


def holding(*steps) -> schema.Profile:
    """The example without what it has at scales that `steps` leave out."""
    base = example()
    policy = Policy(base.policy.heads, tuple(r for r in base.policy.rules if r.scale_index != 6), steps)
    meaning = tuple(sorted({**dict(base.meaning), **{step.kind: step.meaning for step in steps}}.items()))
    return dataclasses.replace(base, policy=policy, rows=base.rows[:1], meaning=meaning)


def edited(made: schema.Profile, change) -> str:
    data = schema.plain(made)
    change(data["policy"])
    return sealed_text(data)


IN_FILES = CacheBudget(6, ((40, 30),), window=9)


@pytest.mark.parametrize("steps", [
    (), (SkipScales((6,)),), (DropUnconditional(4),), (SkipScales((6,)), DropUnconditional(4)), (IN_FILES,),
    (DropUnconditional(4), IN_FILES), (Precision(5, ((0, 0),)),),
])  # fmt: skip
def test_a_profile_keeps_its_steps(steps):
    made = holding(*steps)
    assert made.why_not() is None
    text = schema.to_json(made)
    assert schema.from_json(text, "f") == made and schema.to_json(schema.from_json(text, "f")) == text
    older = all(isinstance(step, SkipScales) for step in steps)  # such a file says what files said before there were steps
    assert ("skip_scales" in json.loads(text)["policy"]) == older != ("steps" in json.loads(text)["policy"])


def test_a_file_from_before_there_were_steps_keeps_what_it_skips():
    data = schema.plain(holding(SkipScales((6,))))
    del data["meaning"]["skip_scales"]
    made = schema.from_json(sealed_text(data), "f")
    assert made.policy.steps == (SkipScales((6,)),) and dict(made.meaning)["skip_scales"] == 1


@pytest.mark.parametrize(("change", "said"), [
    (lambda p: p["steps"].append({"kind": "fly", "from_scale": 3}), "policy.steps[1].kind: got 'fly', want one of skip_scales"),
    (lambda p: p["steps"].append({"from_scale": 3}), "steps[1].kind: got None"),
    (lambda p: p["steps"].append(7), "steps[1].kind: got None"),
    (lambda p: p["steps"][0].update(width=48), "policy.steps[0].width: unknown field"),
    (lambda p: p["steps"][0].pop("from_scale"), "policy.steps[0].from_scale: missing"),
    (lambda p: p["steps"][0].update(from_scale="4"), "policy.steps[0].from_scale: got '4', want an integer"),
    (lambda p: p["steps"][0].update(from_scale=7), "steps[0]: drop_unconditional: from_scale=7, want 0..6"),
    (lambda p: p["steps"].append({"kind": "cache_budget", "from_scale": 6, "keys": [[9, 2.5]], "window": 9, "pool": 5}),
     "policy.steps[1].keys[0][1]: got 2.5, want an integer"),
    (lambda p: p.update(steps={}), "policy.steps: got a dict, want a list"),
    (lambda p: p.update(steps=p["steps"] * 9), "want a list of at most"),
    (lambda p: p.update(skip_scales=[6]), "policy.skip_scales: got it beside steps"),
    (lambda p: p.pop("steps"), "policy.skip_scales: missing"),
])  # fmt: skip
def test_what_a_file_may_not_say(change, said):
    with pytest.raises(ProfileError) as refused:
        schema.from_json(edited(holding(DropUnconditional(4)), change), "f")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_without_its_meaning_is_refused():
    made = holding(DropUnconditional(4))
    assert "drop_unconditional" in dataclasses.replace(made, meaning=example().meaning).why_not()
    assert dict(identity.meaning_of(made.policy, ()))["drop_unconditional"] == 1


def test_a_step_of_another_meaning_is_left_out(monkeypatch):
    made = holding(SkipScales((6,)), DropUnconditional(4))
    tuned = Tuned(find_gpu("cpu"), made, None, ())
    assert tuned.policy().steps == made.policy.steps and "dropped from scale 4" in tuned.explain()
    monkeypatch.setattr(DropUnconditional, "meaning", 2)
    assert tuned.policy().steps == (SkipScales((6,)),)
    assert "drop_unconditional: left out, because its meaning was 1 (now 2)" in tuned.explain()


# In a model


def tuned_with(driven, model: str, *steps, rules=(), layers: int = 4) -> Tuned:
    _, parts = adapters.recognise(driven.model)
    schedule = parts.schedule or ScaleSchedule(tuple(driven.grids()))
    base = example()
    w = dataclasses.replace(
        base.workload, model=model, grids=schedule.grids, prefix=schedule.prefix, layers=layers, heads=2, head_dim=16,
        softmax_scale=parts.softmax_scale, logit_bound=parts.logit_bound and 100.0,
    )  # fmt: skip
    policy = Policy(("AB",) * layers, rules, steps)
    meaning = identity.meaning_of(policy, [])
    return Tuned(find_gpu("cpu"), dataclasses.replace(base, policy=policy, rows=(), workload=w, meaning=meaning), None, ())


def test_a_profile_brings_its_steps_to_infinity():
    """The oracle is the untouched model with guidance 1 at those scales and its own `trunk_scale`, bit for bit."""
    driven = lookalikes.Infinity()
    plain, before = checks.draw(driven), checks.everything(driven)
    tail = [3.0] * 3 + [1.0] * 3
    for steps, own in (
        ((DropUnconditional(3),), {"cfg": tail}), ((SkipScales((4, 5)),), {"trunk_scale": 4}),
        ((SkipScales((5,)), DropUnconditional(3)), {"cfg": tail, "trunk_scale": 5}),
    ):  # fmt: skip
        want = checks.draw(driven, **own)
        with sparvar_tune.apply(driven.model, tuned_with(driven, "infinity-2b", *steps)):
            got = checks.draw(driven)
        assert checks.same(got, want) and not checks.same(want, plain)
        assert checks.same(checks.draw(driven), plain) and checks.everything(driven) == before


def test_steps_and_rules_of_a_profile_together_are_the_oracle():
    driven, rules = lookalikes.Infinity(), (Rule(3, "A", Pooled(2, 2)), Rule(4, "A", Reuse(2)), Rule(4, "B", Pooled(2, 2)))
    tuned = tuned_with(driven, "infinity-2b", SkipScales((5,)), DropUnconditional(3), rules=rules)
    with checks.Reference(driven, tuned.policy(), ScaleSchedule(tuple(driven.grids()))):
        want = checks.draw(driven, cfg=[3.0] * 3 + [1.0] * 3, trunk_scale=5)
    with checks.no_warnings(), sparvar_tune.apply(driven.model, tuned):
        got = checks.draw(driven)
    assert len(got.logits) == 5 and checks.near(got, want, "fp32")


def test_rules_before_a_budget_are_the_oracle():
    """Up to the scale where caches are cut, attention is as sparse as ever; from there on it is the model's own, and silent."""
    driven, rules = lookalikes.Infinity(), (Rule(3, "A", Pooled(2, 2)), Rule(3, "B", Reuse(2)))
    schedule, step = ScaleSchedule(tuple(driven.grids())), CacheBudget(4, ((20, 16) * 2, (24, 12) * 2), window=4, pool=1)
    tuned = tuned_with(driven, "infinity-2b", step, rules=rules)
    with checks.Reference(driven, dataclasses.replace(tuned.policy(), steps=()), schedule, thinned=4):
        want = checks.cut_by_hand(driven, step, schedule)
    with checks.no_warnings(), sparvar_tune.apply(driven.model, tuned):
        got = checks.draw(driven)
    assert checks.near(got, want, "fp32")


def test_an_image_of_another_aspect_keeps_its_scales_halves_and_keys():
    driven = lookalikes.Infinity()
    plain = checks.draw(driven, aspect=1.5)
    steps = SkipScales((5,)), DropUnconditional(3), CacheBudget(4, ((20,) * 4, (24,) * 4), window=4)
    with sparvar_tune.apply(driven.model, tuned_with(driven, "infinity-2b", *steps)) as on:
        with pytest.warns(UserWarning, match="own attention"):
            assert checks.same(checks.draw(driven, aspect=1.5), plain)
        assert "the profile is for" in on.why_dense


@pytest.mark.parametrize(("kind", "model"), [(lookalikes.Hart, "hart"), (lookalikes.Var, "var-d16")])
def test_a_profile_brings_its_steps_to_hart_and_var(kind, model):
    driven = kind()
    plain, before, scales = checks.draw(driven), checks.everything(driven), len(driven.grids())
    prefix = adapters.recognise(driven.model)[1].schedule.prefix
    want = checks.rows_replaced(driven, scales - 3, prefix)
    with sparvar_tune.apply(driven.model, tuned_with(driven, model, DropUnconditional(scales - 3))):
        assert checks.near(checks.draw(driven), want, "fp32") and not checks.near(want, plain, "fp32")
    with sparvar_tune.apply(driven.model, tuned_with(driven, model, SkipScales((scales - 1,)), DropUnconditional(scales - 3))):
        both = checks.draw(driven)
    assert len(both.logits) == len(want.logits) - 1
    kept = checks.Drawn(both.pictures, both.logits), checks.Drawn(want.pictures, want.logits[:-1])
    assert checks.near(*kept, "fp32")
    with adapters.skip_scales(driven.model, scales - 1), adapters.drop_unconditional(driven.model, scales - 3):
        assert checks.same(checks.draw(driven), both)
    assert checks.same(checks.draw(driven), plain) and checks.everything(driven) == before


def test_steps_go_around_the_fused_path():
    """The whole blocks run as one, the half is cut before the first of them."""
    driven = block_lookalikes.Infinity()
    before = checks.everything(driven)
    tuned = tuned_with(driven, "infinity-2b", SkipScales((5,)), DropUnconditional(3), rules=(Rule(4, "A", Reuse(2)),), layers=3)
    with sparvar_tune.apply(driven.model, tuned, "attention"):
        want = checks.draw(driven)
    with sparvar_tune.apply(driven.model, tuned, "fused", graphs=False) as on:
        got = checks.draw(driven)
        assert on.why_not_fused is None
    assert len(got.logits) == 5 and checks.near(got, want, "fp32") and checks.everything(driven) == before


def test_a_step_that_fails_takes_everything_back(monkeypatch):
    driven = lookalikes.Infinity()
    before = checks.everything(driven)
    with adapters.drop_unconditional(driven.model, 2):
        during = checks.everything(driven)
        with pytest.raises(ValueError, match="dropped already"):
            sparvar_tune.apply(driven.model, tuned_with(driven, "infinity-2b", SkipScales((5,)), DropUnconditional(3)))
        assert checks.everything(driven) == during
    monkeypatch.setattr(infinity, "STEPS", {"skip_scales": infinity.STEPS["skip_scales"]})
    with pytest.raises(ValueError, match="drop_unconditional: the infinity adapter cannot do that"):
        sparvar_tune.apply(driven.model, tuned_with(driven, "infinity-2b", SkipScales((5,)), DropUnconditional(3)))
    assert checks.everything(driven) == before


def test_pocketvar_skips_and_has_no_half_to_drop(monkeypatch):
    tiny.install(monkeypatch.setattr)
    adapter = adapters.load_adapter(sparvar_tune.catalog.models.find_model("pocketvar"), "cpu")
    scales, heads = len(adapter.schedule), ("AA",) * 2
    state = adapter.start((3, 7), scales - 2)
    whole, part = (adapter.finish(state, make_attention(adapter, Policy(heads, (), steps))) for steps in
                   ((), (SkipScales.last(adapter.schedule),)))  # fmt: skip
    fork = state.fork().run(until=scales - 1)
    assert torch.equal(part, fork.pictures()) and not torch.equal(part, whole)
    with pytest.raises(ValueError, match="drop_unconditional: the adapter of pocketvar cannot do that"):
        make_attention(adapter, Policy(heads, (), (DropUnconditional(3),)))
    dropping = SparseAttention(Policy(heads, (), (DropUnconditional(3),)), adapter.schedule)
    with pytest.raises(ValueError, match="the pocketvar adapter cannot do that"):
        adapters.apply(tiny.make_model(), dropping)
