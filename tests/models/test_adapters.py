"""Adapters on look-alikes of Infinity, HART and VAR; tests/models/public_models runs the same checks on the public code."""

from __future__ import annotations

import copy
import functools
import threading
import types
from importlib.metadata import EntryPoint

import adapter_checks as checks
import lookalikes
import pytest
import tiny
import torch
from made_profiles import tuned_for

import sparvar_tune
from sparvar_kernels import Csla, Policy, Rule, SparseAttention, Tile
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.adapters import registry
from sparvar_tune.adapters.attention_names import attention_names
from sparvar_tune.adapters.instance_forward import replace_method
from sparvar_tune.generation import DropUnconditional, SkipScales

KINDS = {
    "infinity": lookalikes.Infinity,
    "infinity-bf16": functools.partial(lookalikes.Infinity, "bf16"),
    "hart": lookalikes.Hart,
    "hart-flash-bf16": functools.partial(lookalikes.Hart, "bf16", flash=True),
    "var": lookalikes.Var,
    "var-flash-bf16": functools.partial(lookalikes.Var, "bf16", flash=True),
    "var-xformers": functools.partial(lookalikes.Var, xform=True),
}


@pytest.fixture(params=list(KINDS))
def driven(request):
    return KINDS[request.param]()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the tensors are tiny: threads only wait for each other


def hold(found: dict[str, bool]) -> None:
    assert all(found.values()), [check for check, holds in found.items() if not holds]


def applied(driven, policy="windows"):
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))[policy])
    return adapters.apply(driven.model, attend)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_dense_policy_and_undo_change_no_bit(driven, batch):
    hold(checks.dense_and_undo(driven, batch=batch))


@pytest.mark.parametrize("policy", ["windows", "reuse"])
def test_a_sparse_policy_is_the_oracle(driven, policy):
    hold(checks.sparse_is_the_oracle(driven, policy, batch=2))


def test_an_exception_mid_image_leaves_the_next_image_right(driven):
    hold(checks.exception_mid_image(driven))


def test_changes_are_undone_in_any_order(driven):
    hold(checks.undo_in_any_order(driven))


TAIL = [3.0] * 4 + [1.0] * 2


@pytest.mark.parametrize("cfg", [1.0, TAIL], ids=["off", "1 at the end"])
def test_infinity_without_guidance(cfg):
    driven = lookalikes.Infinity()
    hold(checks.dense_and_undo(driven, cfg=cfg, batch=2))
    hold(checks.sparse_is_the_oracle(driven, "reuse", cfg=cfg))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_infinity_half_dropped_is_guidance_1(dtype, batch):
    hold(checks.guidance_drop(lookalikes.Infinity(dtype), TAIL, batch, functools.partial(checks.near, dtype=dtype)))


def test_infinity_scales_skipped_is_trunk_scale():
    hold(checks.scales_skipped(lookalikes.Infinity(), trunk_scale=4))


def test_infinity_of_another_aspect_runs_its_own_attention_and_says_why():
    hold(checks.other_schedule(lookalikes.Infinity()))
    hold(checks.dense_and_undo(lookalikes.Infinity(), aspect=1.5))
    hold(checks.sparse_is_the_oracle(lookalikes.Infinity(), "windows", aspect=1.5))


@pytest.mark.parametrize("kind", ["hart", "hart-flash-bf16", "var", "var-xformers"])
def test_half_dropped_and_scales_skipped(kind):
    hold(checks.half_and_skip(KINDS[kind](), batch=2))


def test_a_policy_skips_its_scales(driven):
    scales = len(driven.grids())
    with adapters.skip_scales(driven.model, scales - 1):
        want = checks.draw(driven)
    policy = Policy(("AA",) * len(driven.blocks), (), (SkipScales((scales - 1,)),))
    attend, _ = checks.attention_of(driven, policy)
    with adapters.apply(driven.model, attend):
        assert checks.same(checks.draw(driven), want)


@pytest.mark.parametrize("kind", ["infinity", "hart", "hart-flash-bf16", "var", "var-xformers"])
def test_a_policy_does_its_steps(kind):
    own = {"cfg": [3.0] * 3 + [1.0] * 3, "trunk_scale": 5} if kind == "infinity" else {}
    hold(checks.policy_steps(KINDS[kind](), 2, **own))


@pytest.mark.parametrize("batch", [1, 2])
def test_infinity_keeps_to_a_budget_of_caches(batch):
    hold(checks.caches_budgeted(lookalikes.Infinity(), batch))


def test_hart_draws_its_last_grid_in_rounds_densely_and_says_why():
    driven = lookalikes.Hart()
    with applied(driven) as live, pytest.warns(UserWarning, match="tokens after .* are no scale"):
        driven.sample(rounds=2)
    assert "no scale of the profile's schedule" in live.reason
    with checks.no_warnings(), live:
        driven.sample()


def test_flex_attention_of_infinity_is_left_out_where_the_policy_is_sparse():
    driven = lookalikes.Infinity()
    plain = applied(driven)
    want = checks.draw(driven)
    calls = []

    def flex(q, k, v, scale):
        calls.append(q.shape[2])
        return lookalikes.slow_attn(q, k, v, scale=scale)

    for block in driven.blocks:
        block.sa.use_flex_attn = True
    assert checks.same(checks.draw(driven, attn_fn=flex), want)
    assert set(calls) == {1, 4, 9, 16}  # scales 4 and 5 are sparse
    plain.undo()


@pytest.mark.parametrize("name", checks.NAMES)
def test_inside_attention_all_is_in_the_dtype_of_v_and_autocast_is_off(name):
    seen = []

    def attend(q, k, v):
        seen.append((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu"), q.shape))
        return q

    q, v = torch.randn(1, 3, 3, 8), torch.randn(1, 3, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_names(attend)[name](q[:, :2], q, v)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    shape = (1, 2, 3, 8) if name == "slow_attn" else (1, 3, 2, 8)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, False, shape)]


# Recognition and refusals


def refusal(model) -> str:
    with pytest.raises(ValueError, match="no adapter knows it") as error:
        adapters.recognise(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parts(driven):
    family, parts = adapters.recognise(driven.model)
    assert parts.family == driven.name and parts.layers == 4 and (parts.heads, parts.head_dim) == (2, 16)
    assert parts.attentions[2] in list(driven.blocks[2].children()) and family.why_not(driven.model) is None
    if driven.name == "hart":
        assert parts.schedule == ScaleSchedule.square(lookalikes.SIDES[1:], lookalikes.CONTEXT) and parts.logit_bound is None
    else:
        factors = [a.scale_mul_1H11.clamp_max(a.max_scale_mul).exp().max().item() for a in parts.attentions]
        assert parts.logit_bound == max(factors) > 4
        parts.attentions[3].scale_mul_1H11.fill_(7.0)
        assert family.parts(driven.model).logit_bound == pytest.approx(100.0)
        parts.attentions[3].bfloat16()
        assert family.parts(driven.model).logit_bound == 99.0


def test_a_missing_attribute_is_named():
    driven = lookalikes.Var()
    del driven.blocks[1].attn.zero_k_bias
    assert "var: the attention of a block has no zero_k_bias" in refusal(driven.model)
    assert "infinity: it has no unregistered_blocks" in refusal(torch.nn.Linear(1, 1))


def test_other_parameters_are_named(monkeypatch):
    def forward(self, x, attn_bias, start_layer=0):
        return lookalikes.slow_attn(x, x, x)

    monkeypatch.setattr(lookalikes.VarAttention, "forward", forward)
    assert "forward takes (x, attn_bias, start_layer), want (x, attn_bias)" in refusal(lookalikes.Var().model)


def test_attention_by_another_name_is_refused(monkeypatch):
    def forward(self, x, attn_bias):
        return self.proj(x)

    monkeypatch.setattr(lookalikes.VarAttention, "forward", forward)
    assert "forward calls none of slow_attn" in refusal(lookalikes.Var().model)


def test_layers_that_differ_are_refused():
    driven = lookalikes.Hart()
    driven.blocks[3].attn.num_heads = 1
    assert "hart: layers differ in num_heads: 1, 2" in refusal(driven.model)


@pytest.mark.slow
def test_what_is_compiled_is_refused_and_a_compiled_whole_is_looked_into():
    driven = lookalikes.Var()
    assert adapters.recognise(torch.compile(driven.model))[1].model is driven.model
    driven.blocks[2].compile()
    assert "block 2 is compiled already; apply first, compile after" in refusal(driven.model)


@pytest.mark.slow
def test_blocks_compiled_after_apply():
    driven = lookalikes.Var()
    with applied(driven, "reuse"):
        want = checks.draw(driven)
        for block in driven.blocks:
            block.compile(backend="eager")
        got = checks.draw(driven)
        assert checks.near(got, want, "fp32") and checks.same(checks.draw(driven), got)
    assert checks.near(checks.draw(driven), checks.draw(lookalikes.Var()), "fp32")


def test_a_foreign_forward_is_refused_and_nothing_changed(driven):
    attention = adapters.recognise(driven.model)[1].attentions[2]
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = checks.everything(driven)
    with pytest.raises(ValueError, match=r"attention of block 2: its forward was set by another tool \(.*test_adapters\)"):
        applied(driven)
    assert checks.everything(driven) == before


def test_a_bound_forward_of_its_own_class_is_no_foreign_one(driven):
    """As accelerate leaves behind when it takes its hooks out."""
    attention = adapters.recognise(driven.model)[1].attentions[0]
    attention.forward = attention.forward
    hold(checks.dense_and_undo(driven))


def hook_like_accelerate(module) -> list:
    seen = []
    module._hf_hook, module._old_forward = object(), module.forward

    def forward(module, *args, **kwargs):
        seen.append(1)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.partial(forward, module)
    return seen


def unhook_like_accelerate(module) -> None:
    module.forward = module._old_forward
    del module._old_forward, module._hf_hook


def test_accelerates_hook_stays_around_ours(driven):
    attention = adapters.recognise(driven.model)[1].attentions[1]
    with applied(driven):
        want = checks.draw(driven)
    seen = hook_like_accelerate(attention)
    before = checks.everything(driven)
    with applied(driven):
        assert checks.same(checks.draw(driven), want)
    assert len(seen) >= len(driven.grids()) and checks.everything(driven) == before


def test_a_hook_put_over_ours_and_taken_out_again(driven):
    plain = checks.draw(driven)
    attention = adapters.recognise(driven.model)[1].attentions[1]
    live = applied(driven)
    sparse = checks.draw(driven)
    hook_like_accelerate(attention)
    assert checks.same(checks.draw(driven), sparse)
    live.undo()
    assert checks.same(checks.draw(driven), plain)
    unhook_like_accelerate(attention)
    assert checks.same(checks.draw(driven), plain)
    live = applied(driven)
    hook_like_accelerate(attention)
    unhook_like_accelerate(attention)
    live.undo()
    assert "Replaced" not in str(vars(attention).get("forward")) and checks.same(checks.draw(driven), plain)


def test_a_function_put_over_ours_passes_through_once_ours_is_undone(driven):
    plain = checks.draw(driven)
    live = applied(driven)
    attention = adapters.recognise(driven.model)[1].attentions[1]
    ours = attention.forward
    attention.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    live.undo()
    assert checks.same(checks.draw(driven), plain)


@pytest.mark.parametrize("first", [0, 1])
def test_replaced_methods_come_out_in_any_order(first):
    linear = torch.nn.Linear(1, 1)
    before = dict(vars(linear))
    changes = [replace_method(linear, "forward", lambda inner, x, n=n: inner(x) + n) for n in (10, 100)]
    own = type(linear).forward(linear, torch.ones(1))
    assert linear(torch.ones(1)) == own + 110
    changes[first].undo()
    assert linear(torch.ones(1)) == own + (100, 10)[first]
    changes[1 - first].undo()
    changes[first].undo()
    assert vars(linear) == before


def test_a_model_in_use_is_neither_copied_nor_saved(driven, tmp_path):
    with applied(driven):
        with pytest.raises(ValueError, match="undo it before copying the model"):
            copy.deepcopy(driven.model)
        with pytest.raises(ValueError, match="undo it before saving the model"):
            torch.save(driven.model, tmp_path / "model.pt")
    copy.deepcopy(driven.model)


def test_one_image_at_a_time(driven):
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args, kwargs):
        inside.set()
        assert go_on.wait(60)

    with applied(driven):
        hook = driven.blocks[0].register_forward_pre_hook(wait, with_kwargs=True)
        first = threading.Thread(target=driven.sample)
        first.start()
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="drawing an image already"):
            driven.sample()
        go_on.set()
        first.join()
        hook.remove()
        want = checks.draw(driven)
        assert checks.same(checks.draw(driven), want)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"softmax_scale": 0.125}, "softmax_scale is .*, the profile is for 0.125"),
        ({"logit_bound": 2.0}, "logits, the profile needs |logit| <= 2"),
        ({"layers": 3}, "want 4 rows of 2"),
        ({"sides": (1, 2, 3, 4, 5, 8)}, "with other grids between"),
    ],
)
def test_what_does_not_fit_is_refused(driven, changes, words):
    _, parts = adapters.recognise(driven.model)
    if parts.schedule is None and "sides" in changes:
        pytest.skip("its calls bring the schedule")
    sides = changes.get("sides", lookalikes.SIDES)
    schedule = ScaleSchedule.square(sides[1:], lookalikes.CONTEXT) if driven.name == "hart" else ScaleSchedule.square(sides)
    policy = Policy(("AA",) * changes.get("layers", 4), (Rule(4, "A", Csla((3,) * len(schedule), 2, Tile(4, 4))),))
    attend = SparseAttention(
        policy, schedule, softmax_scale=changes.get("softmax_scale", parts.softmax_scale), logit_bound=changes.get("logit_bound")
    )
    before = checks.everything(driven)
    with pytest.raises(ValueError, match=f"does not fit the model: .*{words.replace('|', '.')}"):
        adapters.apply(driven.model, attend)
    assert checks.everything(driven) == before


def test_training_runs_the_models_own_attention():
    driven = lookalikes.Var()
    x, mask = torch.randn(2, 130, 32), torch.zeros(130, 130)
    want = driven.blocks[0](x=x, cond_BD=x[:, 0], attn_bias=mask)
    alone = driven.blocks[0](x=x, cond_BD=x[:, 0], attn_bias=None)
    with applied(driven), checks.no_warnings():
        assert torch.equal(driven.blocks[0](x=x, cond_BD=x[:, 0], attn_bias=mask), want)
        assert torch.equal(driven.blocks[0](x=x, cond_BD=x[:, 0], attn_bias=None), alone)


@pytest.mark.parametrize("from_scale", [0, 6, -1])
def test_scales_that_cannot_be_skipped(from_scale):
    driven = lookalikes.Var()
    with pytest.raises(ValueError, match=rf"from_scale={from_scale}: want 1\.\.5"):
        adapters.skip_scales(driven.model, from_scale)
    with adapters.drop_unconditional(driven.model, 2), pytest.raises(ValueError, match="dropped already"):
        adapters.drop_unconditional(driven.model, 2)
    with pytest.raises(ValueError, match="its adapter has no skip_scales"):
        adapters.skip_scales(tiny.make_model(), 3)


# Through a profile


@pytest.mark.parametrize("kind, model", [("infinity", "infinity-2b"), ("hart", "hart"), ("var", "var-d16")])
def test_a_profile_is_applied_and_undone(kind, model):
    driven = KINDS[kind]()
    policy = checks.policies(4, len(driven.grids()))["windows"]
    plain, before = checks.draw(driven), checks.everything(driven)
    with applied(driven):
        want = checks.draw(driven)
    with sparvar_tune.apply(driven.model, tuned_for(driven, model, policy)) as on:
        assert checks.same(checks.draw(driven), want) and on.why_dense is None and on.reasons == ()
        if kind == "infinity":
            with pytest.warns(UserWarning, match="own attention"):
                driven.sample(aspect=1.5)
            assert "the profile is for 6 scales up to 8x8" in on.why_dense
    assert checks.same(checks.draw(driven), plain) and checks.everything(driven) == before


def test_a_profile_of_another_family_is_refused():
    driven = lookalikes.Var()
    with pytest.raises(ValueError, match="family is var, the profile is for infinity"):
        sparvar_tune.apply(driven.model, tuned_for(driven, "infinity-2b", checks.policies(4, 6)["windows"]))


# Other packages' adapters


def test_entry_points_add_families(monkeypatch):
    class Mine:
        pass

    family = types.SimpleNamespace(
        why_not=lambda model: None if isinstance(model, Mine) else "it is not mine",
        parts=lambda model: types.SimpleNamespace(family="mine"), attach=lambda parts, attend: f"attached {parts.family}",
    )  # fmt: skip
    monkeypatch.setattr(lookalikes, "my_family", family, raising=False)
    points = [EntryPoint(name, value, registry.GROUP) for name, value in
              (("mine", "lookalikes:my_family"), ("broken", "no_such_package"), ("empty", "math"), ("var", "math"))]  # fmt: skip
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    schedule = ScaleSchedule.square((1, 2, 4))
    assert adapters.apply(Mine(), SparseAttention(Policy(("A",)), schedule)) == "attached mine"
    dropping = SparseAttention(Policy(("A",), (), (DropUnconditional(2),)), schedule)
    with pytest.raises(ValueError, match=r"drop_unconditional: the mine adapter cannot do that; it can do no step"):
        adapters.apply(Mine(), dropping)
    said = refusal(torch.nn.Linear(1, 1))
    assert (
        "mine: it is not mine" in said and "broken: no_such_package could not be loaded" in said and "math has no why_not" in said
    )
    assert adapters.recognise(lookalikes.Var().model)[1].family == "var"


def test_weights_that_were_never_loaded_are_refused():
    with pytest.raises(ValueError, match="its weights are on the meta device; load them first"):
        adapters.recognise(tiny.make_model().to("meta"))
