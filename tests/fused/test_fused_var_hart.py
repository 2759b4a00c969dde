"""The fused path of VAR and HART on look-alikes with whole blocks: the untouched model is the oracle; undone, nothing is left."""

from __future__ import annotations

import warnings

import adapter_checks as checks
import pytest
import torch
import var_hart_lookalikes as whole
from fused_checks import BOUND, assert_called, errors, on, ours_and_own

from sparvar_tune import adapters

FAMILIES = {"var": whole.Var, "shared": lambda *a: whole.Var(*a, shared=True), "flash": lambda *a: whole.Var(*a, flash=True),
            "hart": whole.Hart, "cosine": lambda *a: whole.Hart(*a, cosine=True)}  # fmt: skip


def poison(path) -> None:
    """NaN in every buffer that an image has to write before it reads."""
    work, stack = path.fused.work, path.fused.stack
    for t in (work.x, work.cached, getattr(stack, "modulation", work.x), getattr(stack, "rotation", work.x)):
        t.fill_(float("nan"))


@pytest.mark.parametrize("given", [{}, {"batch": 2}, {"batch": 3, "cfg": 3.0}], ids=str)
@pytest.mark.parametrize("family", ["var", "shared", "hart", "cosine"])
def test_dense_equals_the_untouched_model(family, given):
    driven = FAMILIES[family]()
    before, plain = checks.everything(driven), checks.draw(driven, **given)
    with on(driven) as path:
        checks.draw(driven, **given)
        poison(path)
        ours = checks.draw(driven, **given)
        assert path.why_not_fused is None and path.reason is None
    assert max(errors(ours, plain)) < 1e-5
    assert checks.same(checks.draw(driven, **given), plain) and checks.everything(driven) == before


@pytest.mark.parametrize("family", ["var", "shared", "flash", "hart"])
def test_half_precision_rounds_no_more_than_the_model(family):
    """Against fp32 our bf16 is as near as the model's own; after the first token that differs there is nothing to compare."""
    exact, driven = checks.draw(FAMILIES[family]()), FAMILIES[family]("bf16")
    own = checks.draw(driven)
    with on(driven) as path:
        ours = checks.draw(driven)
        assert path.fused.work.dtype == torch.bfloat16 and path.fused.work.x.dtype == (
            torch.bfloat16 if family == "hart" else torch.float32
        )
    assert errors(ours, exact)[0] < 1.2 * errors(own, exact)[0] + 1e-3 and errors(ours, own)[0] < BOUND["bf16"]


@pytest.mark.parametrize("name", ["windows", "reuse"])
@pytest.mark.parametrize("family", ["var", "hart"])
def test_sparse_equals_the_attention_path(family, name):
    driven = FAMILIES[family]()
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))[name])
    with adapters.apply(driven.model, attend):
        want = checks.draw(driven, batch=2)
    assert max(errors(want, checks.draw(driven, batch=2))) > 1e-4  # the policy does something
    with on(driven, attend) as path:
        checks.draw(driven, batch=2)
        poison(path)
        ours = checks.draw(driven, batch=2)
    assert max(errors(ours, want)) < BOUND["fp32"]


@pytest.mark.parametrize("policy", [None, "reuse"])
@pytest.mark.parametrize("family", ["var", "shared", "hart"])
def test_half_dropped_and_scales_skipped_as_without_it(family, policy):
    driven = FAMILIES[family]()
    scales = len(driven.grids())
    attend = policy and checks.attention_of(driven, checks.policies(len(driven.blocks), scales)[policy])[0]
    held = adapters.apply(driven.model, attend) if attend else None
    with adapters.drop_unconditional(driven.model, scales - 2):
        dropped = checks.draw(driven, batch=2)
    with adapters.skip_scales(driven.model, scales - 1):
        skipped = checks.draw(driven, batch=2)
    if held:
        held.undo()
    plain = checks.draw(driven, batch=2)
    assert max(errors(dropped, plain)) > 1e-3
    with on(driven, attend) as path:
        with adapters.drop_unconditional(driven.model, scales - 2):
            ours = checks.draw(driven, batch=2)
            assert path.why_not_fused is None
        with adapters.skip_scales(driven.model, scales - 1):
            fewer = checks.draw(driven, batch=2)
            assert path.why_not_fused is None
    assert len(fewer.logits) == len(skipped.logits) == len(plain.logits) - 1
    assert max(errors(ours, dropped)) < BOUND["fp32"] and max(errors(fewer, skipped)) < BOUND["fp32"]
    assert float((fewer.pictures - skipped.pictures).abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["var", "hart"])
def test_an_exception_and_changed_weights_leave_nothing_behind(family):
    driven = FAMILIES[family]()
    before, plain = checks.everything(driven), checks.draw(driven)
    path = on(driven)
    checks.draw(driven)
    with pytest.raises(ZeroDivisionError):
        checks.draw_until(driven, 3)
    assert max(errors(checks.draw(driven), plain)) < 1e-5
    down = driven.blocks[1].ffn.fc2.weight if family == "var" else driven.blocks[1].ffn.down_proj.weight
    down.mul_(2)
    changed = checks.draw(driven)
    path.undo()
    assert max(errors(changed, checks.draw(driven))) < 1e-5 < max(errors(changed, plain))
    down.div_(2)
    assert checks.same(checks.draw(driven), plain) and checks.everything(driven) == before


@pytest.mark.parametrize("family", ["var", "hart"])
def test_weights_that_were_copied_are_seen_to_change(family):
    """In bf16 the path holds copies of fp32 weights."""
    driven = FAMILIES[family]("bf16")
    with on(driven):
        first = checks.draw(driven)
        (driven.blocks[1].ffn.fc2 if family == "var" else driven.blocks[1].ffn.down_proj).weight.mul_(2)
        changed = checks.draw(driven)
    assert errors(changed, first)[0] > 0.01
    with on(driven):
        assert checks.same(checks.draw(driven), changed)


def test_a_last_grid_in_rounds_runs_the_models_own_blocks():
    driven = whole.Hart()
    plain = checks.draw(driven, rounds=2)
    with on(driven) as path:
        with pytest.warns(UserWarning, match=r"last grid is drawn in 2 rounds \(num_maskgit_iters\), want 1"):
            ours = checks.draw(driven, rounds=2)
        assert "2 rounds" in path.why_not_fused and checks.same(ours, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checks.draw(driven)
        assert path.why_not_fused is None


@pytest.mark.parametrize(("family", "where"), [
    ("var", "ffn.fc1"), ("var", "attn.proj"), ("hart", "ffn.gate_proj"), ("hart", "ffn.down_proj"), ("hart", "attn.proj"),
])  # fmt: skip
def test_a_module_that_is_no_plain_linear_is_called(family, where):
    assert_called(FAMILIES[family](), where, 1e-5)


def _affine(block):
    block.ln_wo_grad = torch.nn.LayerNorm(whole.WIDTH)


def _swap(name, value):
    return lambda block: setattr(block, name, value)


@pytest.mark.parametrize(("family", "change", "reason"), [
    ("var", _affine, "its norm is LayerNorm, want LayerNorm without weights"),
    ("var", lambda b: setattr(b.ffn, "act", torch.nn.GELU()), "want fc1, GELU"),
    ("var", lambda b: delattr(b, "ada_lin"), "no ada_lin"),
    ("var", lambda b: b.attn.register_forward_hook(print), "another tool's hook"), ("hart", _affine, "its norm is LayerNorm"),
    ("hart", _swap("disable_aln", False), "it has AdaLN"), ("hart", _swap("shared_aln", True), "it has AdaLN"),
    ("hart", _swap("cross_attn", torch.nn.Identity()), "cross-attention"),
    ("hart", lambda b: setattr(b.ffn, "act_fn", torch.nn.GELU()), "want gate_proj, up_proj, SiLU"),
    ("hart", lambda b: b.attn.rotary_emb.inv_freq.mul_(2), "rotary_emb is not that of block 0"),
    ("hart", lambda b: delattr(b.attn, "context_rotary_emb"), "no context_rotary_emb"),
    ("hart", lambda b: setattr(b.ln_wo_grad, "use_quant", True), "quantise"),
])  # fmt: skip
def test_refuses_with_the_reason_and_changes_nothing(family, change, reason):
    driven = FAMILIES[family]()
    change(driven.blocks[1])
    before = checks.everything(driven)
    with pytest.raises(ValueError, match=reason) as caught:
        on(driven)
    assert "\n" not in str(caught.value) and checks.everything(driven) == before


@pytest.mark.parametrize(("family", "where"), [
    ("var", "attn"), ("var", "attn.proj"), ("var", "ffn"), ("var", "ffn.act"), ("var", "ffn.fc2"), ("var", "ln_wo_grad"),
    ("var", ""), ("hart", "attn"), ("hart", "attn.proj"), ("hart", "ffn"), ("hart", "ffn.act_fn"),
    ("hart", "ffn.down_proj"), ("hart", ""),
])  # fmt: skip
def test_a_hook_put_on_between_pictures_is_seen(family, where):
    driven = FAMILIES[family]()
    module = driven.blocks[1].get_submodule(where) if where else driven.blocks[1]
    with on(driven) as path:
        plain = checks.draw(driven)
        hook = module.register_forward_hook(lambda module, args, out: out * 1.5)
        ours, want = ours_and_own(driven, path)
        hook.remove()
        assert max(errors(checks.draw(driven), plain)) < BOUND["fp32"] and path.why_not_fused is None
    assert max(errors(ours, want)) < BOUND["fp32"] < max(errors(ours, plain))
