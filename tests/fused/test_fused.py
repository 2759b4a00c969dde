"""The fused path on a look-alike with whole blocks: the untouched model is the oracle; undone, nothing is left."""

from __future__ import annotations

import warnings

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
from fused_checks import BOUND, assert_called, compiled, errors, fold_all, on, ours_and_own
from torch import nn

from sparvar_kernels.path import fastest_product
from sparvar_tune import adapters, fused
from sparvar_tune.fused import folded_text, stream
from sparvar_tune.fused.product import Product


def poisoned(path: fused.OnPath) -> None:
    """NaN in every buffer that an image has to write before it reads."""
    work, stack = path.fused.work, path.fused.stack
    for t in (work.x, work.cached, stack.modulation):
        t.fill_(float("nan"))


@pytest.mark.parametrize("given", [{}, {"batch": 2}, {"batch": 2, "aspect": 1.5}, {"cfg": 1.0}], ids=str)
def test_dense_equals_the_untouched_model(given):
    driven = block_lookalikes.Infinity()
    plain = checks.draw(driven, **given)
    with on(driven) as path:
        checks.draw(driven, **given)
        poisoned(path)
        ours = checks.draw(driven, **given)
        assert path.why_not_fused is None and path.reason is None and path.why_not_graphs == "the model is on no GPU"
    assert max(errors(ours, plain)) < BOUND["fp32"]
    assert checks.same(checks.draw(driven, **given), plain)


def test_half_precision_rounds_no_more_than_the_model():
    """Against fp32 our bf16 is as near as the model's own, but for the first token that differs."""
    exact = checks.draw(block_lookalikes.Infinity())
    driven = block_lookalikes.Infinity("bf16")
    own = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    assert errors(ours, exact)[0] < 1.5 * errors(own, exact)[0] + 1e-3 and errors(ours, own)[0] < BOUND["bf16"]


@pytest.mark.parametrize("name", ["windows", "reuse"])
@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_equals_the_attention_path(name, batch):
    driven = block_lookalikes.Infinity()
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))[name])
    with adapters.apply(driven.model, attend):
        want = checks.draw(driven, batch=batch)
    assert max(errors(want, checks.draw(driven, batch=batch))) > 1e-4  # the policy does something
    with on(driven, attend) as path:
        for _ in range(3):
            checks.draw(driven, batch=batch)
        poisoned(path)
        ours = checks.draw(driven, batch=batch)
    assert max(errors(ours, want)) < BOUND["fp32"]


@pytest.mark.parametrize("name", [None, "reuse"])
def test_dropped_half_equals_guidance_one(name):
    driven = block_lookalikes.Infinity()
    scales = len(driven.grids())
    attend = name and checks.attention_of(driven, checks.policies(len(driven.blocks), scales)[name])[0]
    cfg = [3.0] * (scales - 2) + [1.0, 1.0]
    held = adapters.apply(driven.model, attend) if attend else None
    want = checks.draw(driven, batch=2, cfg=cfg)
    if held:
        held.undo()
    with on(driven, attend) as path, adapters.drop_unconditional(driven.model, scales - 2):
        ours = checks.draw(driven, batch=2)
        assert path.why_not_fused is None
        rows = {t.shape[0] for t in ours.logits[-2:]}
    assert rows == {2} and max(errors(ours, want)) < BOUND["fp32"]
    with pytest.raises(ValueError, match="drop after"), adapters.drop_unconditional(driven.model, scales - 2):
        on(driven)


def test_what_cannot_run_as_one_runs_the_attention_path():
    driven = block_lookalikes.Infinity()
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["windows"])
    plain = checks.draw(driven, aspect=1.5)
    with on(driven, attend) as path:
        with pytest.warns(UserWarning, match="own blocks run for this image: the image has 6 scales up to 9x6"):
            other = checks.draw(driven, aspect=1.5)
        assert "up to 9x6" in path.why_not_fused and "up to 9x6" in path.reason
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checks.draw(driven)
        assert path.why_not_fused is None and path.reason is None
        path.fused.enabled = False
        off = checks.draw(driven)
        path.fused.enabled = True
    assert checks.same(other, plain)
    with adapters.apply(driven.model, attend):
        assert checks.same(off, checks.draw(driven))


def test_a_hook_on_all_modules_is_not_gone_past():
    driven = block_lookalikes.Infinity()
    plain = checks.draw(driven)
    with on(driven) as path:
        checks.draw(driven)
        put = nn.modules.module.register_module_forward_hook
        hook = put(lambda module, args, out: out * 1.1 if isinstance(module, nn.Linear | nn.Embedding) else None)
        try:
            with pytest.warns(UserWarning, match="own blocks run for this image: another tool's hook is on all modules"):
                ours = checks.draw(driven)
            path.fused.enabled = False
            want = checks.draw(driven)
            path.fused.enabled = True
        finally:
            hook.remove()
        assert max(errors(ours, want)) < BOUND["fp32"] < max(errors(ours, plain))
        assert max(errors(checks.draw(driven), plain)) < BOUND["fp32"] and path.why_not_fused is None


@pytest.mark.parametrize("where", ["sa.proj", "ffn.fc1", "ffn.fc2", "ffn.act", "ffn", "sa", "ca_norm", "ca.proj", ""])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_what_another_tool_puts_on_a_block_between_pictures_is_seen(where, how):
    """And that it is gone again."""
    driven = block_lookalikes.Infinity()
    module = driven.blocks[1].get_submodule(where) if where else driven.blocks[1]
    with on(driven) as path:
        plain = checks.draw(driven)
        if how == "hook":
            taken = module.register_forward_hook(lambda module, args, out: out * 1.5).remove
        else:
            own = module.forward
            vars(module)["forward"], before = lambda *args, **given: own(*args, **given) * 1.5, vars(module).get("forward")

            def taken():
                vars(module).pop("forward")
                if before is not None:
                    vars(module)["forward"] = before

        ours, want = ours_and_own(driven, path)
        taken()
        again = checks.draw(driven)
        assert path.why_not_fused is None
    assert max(errors(ours, want)) < BOUND["fp32"] < max(errors(ours, plain)) and max(errors(again, plain)) < BOUND["fp32"]


def test_a_hook_on_the_level_embedding_is_kept():
    driven = block_lookalikes.Infinity()
    hook = driven.model.lvl_embed.register_forward_hook(lambda module, args, out: out * 1.5)
    want = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    hook.remove()
    assert max(errors(ours, want)) < BOUND["fp32"] < max(errors(ours, checks.draw(driven)))


def test_an_exception_leaves_nothing_behind():
    driven = block_lookalikes.Infinity()
    before, plain = checks.everything(driven), checks.draw(driven)
    path = on(driven)
    checks.draw(driven)
    down, bias = driven.blocks[1].ffn.fc2.weight, driven.blocks[2].sa.v_bias  # one is used where it is, one is copied
    with pytest.raises(ZeroDivisionError):
        checks.draw_until(driven, 3)
    again = checks.draw(driven)
    assert max(errors(again, plain)) < BOUND["fp32"]
    down.mul_(2)  # weights that change are seen
    bias.add_(0.5)
    changed = checks.draw(driven)
    path.undo()
    want = checks.draw(driven)
    assert max(errors(changed, want)) < BOUND["fp32"] < max(errors(changed, plain))
    down.div_(2)
    bias.sub_(0.5)
    assert max(errors(checks.draw(driven), plain)) < 1e-6 and checks.everything(driven) == before


def test_a_module_that_is_replaced_between_images_is_seen():
    driven = block_lookalikes.Infinity()
    ffn = driven.blocks[2].ffn
    with on(driven):
        before = checks.draw(driven)
        own, ffn.fc2 = ffn.fc2, nn.Linear(ffn.fc2.in_features, ffn.fc2.out_features).requires_grad_(False)
        changed = checks.draw(driven)
        ffn.fc2.weight.zero_()
        zeroed = checks.draw(driven)
    want = checks.draw(driven)
    assert max(errors(zeroed, want)) < BOUND["fp32"] < min(max(errors(changed, before)), max(errors(zeroed, changed)))
    ffn.fc2 = own


@pytest.mark.parametrize("change, reason", [
    (lambda x: x[:, :-1], "3 tokens after 1 are no scale"),
    (lambda x: torch.cat((x, x, x[:1])), "5 rows where the image began with 2"),
])  # fmt: skip
def test_a_loop_of_another_order_ends_in_one_line(change, reason):
    driven = block_lookalikes.Infinity()
    own = driven.model.add_lvl_embeding
    plain = checks.draw(driven)
    with on(driven):
        checks.draw(driven)
        vars(driven.model)["add_lvl_embeding"] = lambda x, s, *a: change(x) if s == 1 else own(x, s, *a)
        with pytest.raises(ValueError, match=reason) as caught:
            checks.draw(driven)
        assert "\n" not in str(caught.value) and "path='attention'" in str(caught.value)
        del vars(driven.model)["add_lvl_embeding"]
    assert checks.same(checks.draw(driven), plain)


def test_other_prompts_and_batches_in_turn():
    """Buffers are made again where an image is of another kind, and serve again where it is not."""
    driven = block_lookalikes.Infinity()
    kinds = [{}, {"batch": 2}, {}, {"batch": 3, "aspect": 1.5}, {"cfg": 1.0}, {}, {"batch": 6}]  # at last 138 tokens of text
    plain = [checks.draw(driven, **given) for given in kinds]
    with on(driven):
        ours = [checks.draw(driven, **given) for given in kinds]
    assert max(max(errors(a, b)) for a, b in zip(ours, plain, strict=True)) < BOUND["fp32"]


@pytest.mark.parametrize("given", [{}, {"batch": 2}, {"cfg": 1.0}], ids=str)
def test_a_folded_text_equals_the_untouched_model(given, monkeypatch):
    fold_all(monkeypatch)
    driven = block_lookalikes.Infinity()
    plain = checks.draw(driven, **given)
    with on(driven) as path:
        checks.draw(driven, **given)
        poisoned(path)
        folded = path.fused.stack.folded
        assert folded.room == (8 if given.get("batch") else 4)
        for t in (folded.keys, folded.values, folded.bias):
            t.fill_(float("nan"))
        ours = checks.draw(driven, **given)
    assert max(errors(ours, plain)) < BOUND["fp32"]


def test_a_folded_text_rounds_no_more_than_the_model(monkeypatch):
    fold_all(monkeypatch)
    exact, driven = checks.draw(block_lookalikes.Infinity()), block_lookalikes.Infinity("bf16")
    own = checks.draw(driven)
    with on(driven) as path:
        ours = checks.draw(driven)
        assert path.fused.stack.folded is not None
    assert errors(ours, exact)[0] < 1.5 * errors(own, exact)[0] + 1e-3 and errors(ours, own)[0] < BOUND["bf16"]


@pytest.mark.parametrize("where", ["ca.mat_q", "ca.proj"])
def test_a_text_is_not_folded_into_a_module_that_is_no_plain_linear(where, monkeypatch):
    fold_all(monkeypatch)
    assert_called(block_lookalikes.Infinity(), where, BOUND["fp32"])


def test_a_text_is_folded_where_that_saves_products():
    assert [folded_text.room_of({"ca_kv": (None, None, n)}, 128) for n in (1, 32, 33, 96, 97, 0)] == [32, 32, 64, 96, None, None]
    assert folded_text.room_of({"ca_kv": (None, None, torch.tensor(9))}, 128) is None, "what the device knows is not waited for"


@pytest.mark.parametrize("where", ["ffn.fc1", "ffn.fc2", "ca.mat_q", "sa.proj", "ca.proj"])
def test_a_module_that_is_no_plain_linear_is_called(where):
    assert_called(block_lookalikes.Infinity(), where, BOUND["fp32"])


def test_products():
    linear, x = nn.Linear(8, 6), torch.randn(2, 3, 8)
    own = torch.randn(6)
    assert torch.equal(Product(linear, torch.float32)(x), linear(x))
    assert torch.allclose(Product(linear, torch.float32, own)(x), linear(x) - linear.bias + own, atol=1e-6)
    hooked = nn.Linear(8, 6, bias=False)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.allclose(Product(hooked, torch.float32, own)(x), hooked(x) + own)
    for module, bare in ((nn.Linear(8, 6, bias=False), 0.0), (hooked, 1.0)):
        want = torch.nn.functional.linear(x, module.weight)[..., :4] + bare
        assert torch.allclose(Product(module, torch.float32, own).bare(x, 4), want, atol=1e-6)
    want = torch.nn.functional.gelu(linear(x), approximate="tanh")
    assert torch.equal(Product(linear, torch.float32).gelu(x), want)


def _hook(block):
    block.sa.register_forward_hook(lambda *a: None)


def _no_fused_norm(block):
    block.fused_norm_func = None


def _swiglu(block):
    block.ffn.act = nn.SiLU()


def _foreign(block):
    block.ffn.forward = lambda x: x


@pytest.mark.parametrize(
    "change, reason",
    [(_hook, "another tool's hook"), (_no_fused_norm, "fused_norm_func is None"), (_swiglu, "want fc1, GELU"),
     (_foreign, "set by another tool"), (lambda b: b.register_forward_hook(print), "block 1: another tool's hook")],
)  # fmt: skip
def test_refuses_with_the_reason_and_changes_nothing(change, reason):
    driven = block_lookalikes.Infinity()
    change(driven.blocks[1])
    before = checks.everything(driven)
    with pytest.raises(ValueError, match=reason) as caught:
        on(driven)
    assert "\n" not in str(caught.value) and checks.everything(driven) == before


def test_auto_is_the_attention_path_on_a_cpu_and_names_are_checked():
    driven = block_lookalikes.Infinity()
    family, parts = adapters.recognise(driven.model)
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["windows"])
    with fused.put_on(family, parts, attend) as path:
        assert path.fused is None and "no GPU" in path.why_not_fused
    with pytest.raises(ValueError, match="path='quick': want one of auto, fused, attention"):
        fused.put_on(family, parts, attend, "quick")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "windows", "reuse", "folded", "added"])
def test_gpu_graphs_are_the_eager_path_bit_for_bit(name, monkeypatch):
    """Captured in the second image and replayed, other prompts, guidance and a dropped half between; no binary comes late."""
    added = name == "added"
    if name in ("folded", "added"):
        fold_all(monkeypatch)
        name = "dense"
    if added:  # the first pictures' passes, too
        monkeypatch.setattr(fastest_product, "LEAST_ROWS", 1)
        monkeypatch.setattr(stream, "LEAST_TOKENS", 0)
        monkeypatch.setattr(fastest_product, "_FOUND", {})
    ahead, late = compiled(monkeypatch)
    kinds, found = [{}, {}, {"batch": 2}, {"batch": 2}, {"batch": 2}, {}, {}, {"batch": 2, "cfg": 1.0}], []
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        driven = block_lookalikes.Infinity()
        driven.model.rng = torch.Generator("cuda")
        scales = len(driven.grids())
        attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), scales)[name])
        for graphs in (False, True):
            with on(driven, attend, graphs=graphs) as path:
                for given in kinds:
                    found.append(checks.draw(driven, **given))
                    work = path.fused.work
                    assert path.why_not_fused is None and len(work.graphs) == (scales if graphs and work.images > 1 else 0)
                with adapters.drop_unconditional(driven.model, scales - 2):
                    found += [checks.draw(driven) for _ in range(3)]
                if added:
                    forms = [form for form, one in fastest_product._FOUND.items() if one is not None and form.adds]
                    assert {form.batch for form in forms} == {1, 2, 4}
    half = len(found) // 2
    assert all(checks.same(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    assert ahead and not late, late
