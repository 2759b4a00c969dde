"""A live model driven on the fused path: the pictures of `apply`, the untouched model beside them, nothing left when closed."""

from __future__ import annotations

import functools
from dataclasses import replace

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
import var_hart_lookalikes as whole
from live_images import generate_of

from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_tune import fused
from sparvar_tune.adapters import recognise
from sparvar_tune.adapters.whole_images import as_picture
from sparvar_tune.generation import DropUnconditional, PruneTokens, SkipScales
from sparvar_tune.live import LiveModel
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.policy_search import certify
from sparvar_tune.policy_search.certify import compare_on, decision_cost, generation, measured_rows
from sparvar_tune.policy_search.judge import make_attention, prepare
from sparvar_tune.ways.check_adapter import check_adapter

KINDS = {
    "infinity": block_lookalikes.Infinity, "infinity-bf16": functools.partial(block_lookalikes.Infinity, "bf16"),
    "hart": whole.Hart, "var": whole.Var,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def opened(kind: str):
    driven = KINDS[kind]()
    return driven, LiveModel(driven.model, generate_of(driven), [0, 1], path="fused")


def policies(adapter: LiveModel):
    """A policy that decides, one that drops the unconditional half before what lives on the decision, one that skips a scale, and
    one that leaves out tokens, where the model can."""
    last = len(adapter.schedule) - 1
    reuse = checks.policies(adapter.model.layers, last + 1)["reuse"]
    early = tuple(r for r in reuse.rules if r.scale_index < last)
    pruned = replace(reuse, rules=(), steps=(PruneTokens(last - 1, (9, 16), last - 2, 0, 1),))
    return ({"pruned": pruned} if "prune_tokens" in adapter.family.STEPS else {}) | {
        "reuse": reuse, "half": replace(reuse, steps=(DropUnconditional(last - 1),)),
        "skip": replace(reuse, rules=early, steps=(SkipScales.last(adapter.schedule),)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_apply_and_nothing_is_left(kind):
    driven = KINDS[kind]()
    generate, attributes = generate_of(driven), [dict(vars(m)) for m in driven.model.modules()]
    own = as_picture(generate(1, 5))
    adapter = LiveModel(driven.model, generate, [0, 1], path="fused")
    assert adapter.why_not_fused is None and adapter.picture_path == "fused path"
    start = adapter.start((1, 5), len(adapter.schedule) - 3)
    made = {name: (make_attention(adapter, policy), policy) for name, policy in policies(adapter).items()}
    drawn = {name: adapter.finish(start, attend) for name, (attend, _) in made.items()}
    drawn["dense"] = adapter.finish(start, adapter.dense)
    assert torch.equal(adapter.untouched((1, 5)), own), "the untouched model between two pictures of ours"
    for name, (attend, _) in made.items():
        assert torch.equal(adapter.finish(start, attend), drawn[name]), "drawn again among the others"
    adapter.close()
    assert all(dict(vars(m)) == before for m, before in zip(driven.model.modules(), attributes, strict=True))
    for name, picture in drawn.items():
        attend = None if name == "dense" else make_attention(adapter, made[name][1])
        with fused.put_on(*recognise(driven.model), attend, "fused") as on:
            assert torch.equal(as_picture(generate(1, 5)), picture), name
            assert on.why_not_fused is None
    assert torch.equal(adapter.finish(start, adapter.dense), own), "closed, a dense picture is the untouched model's"


def test_what_is_watched_is_drawn_by_hooks_and_the_rest_is_timed_on_the_path(monkeypatch):
    """Whole pictures are timed as an application has them, attention by scale in pictures of their own, of the first pairs."""
    monkeypatch.setattr(certify, "SCALE_PAIRS", 2)
    _, adapter = opened("infinity")
    attend = make_attention(adapter, policies(adapter)["reuse"])
    calls: list[str] = []
    monkeypatch.setattr(
        adapter, "_inside", lambda pair, inside: calls.append("hooks") or LiveModel._inside(adapter, pair, inside)
    )
    monkeypatch.setattr(adapter, "_on_fused", lambda pair, way: calls.append("path") or LiveModel._on_fused(adapter, pair, way))
    assert prepare(adapter, attend) and calls == ["path"] * 2, "the second picture of an attention would be captured"
    assert prepare(adapter, attend) and calls == ["path"] * 2
    calls.clear()
    pairs = held_out_pairs(2, 4)
    seen = compare_on(adapter, attend.policy, {}, pairs, lambda text: None)
    last = len(adapter.schedule) - 1
    assert calls.count("hooks") == 2 * 2 and [bool(spent) for spent in seen.tuned_scales] == [True, True, False, False]
    assert seen.dense_scales[0].keys() == {last - 2, last - 1, last}
    assert generation(seen, adapter).dense_name.endswith(", fused path") and generation(seen, adapter).dense.n == 4
    assert decision_cost(seen, adapter, attend.policy)
    kernel = KERNELS[kernel_for("cpu")]
    launches = dict.fromkeys(range(last + 1), Launch(kernel.name, kernel.config()))
    assert {row.dense.n for row in measured_rows(seen, adapter, attend.policy, launches)} == {2}
    for (psnr, found), pair in zip(((f["psnr"], f) for f in seen.found), pairs, strict=True):
        start = adapter.start(pair, last - 2)
        again = certify.compare_pictures(adapter.finish(start, attend), adapter.finish(start, adapter.dense))
        assert again == found and psnr < 100, "against the dense picture of the same path"


def test_the_path_keeps_what_the_last_few_attentions_need():
    _, adapter = opened("infinity")
    path, policy = adapter._fused, policies(adapter)["reuse"]
    first = [make_attention(adapter, policy) for _ in range(fused.engine.MOST_WORKS)]
    works = []
    for attend in (*first, first[0]):
        adapter.finish(adapter.start((0, 1), 3), attend)
        works.append(path.work)
    assert works[0] is works[-1] and len({id(w) for w in works}) == len(first)
    adapter.finish(adapter.start((0, 1), 3), make_attention(adapter, policy))
    adapter.finish(adapter.start((0, 1), 3), first[0])
    assert path.work is works[0], "the one used longest ago gave way"
    adapter.finish(adapter.start((0, 1), 3), first[1])
    assert path.work is not works[1]


def test_an_image_that_leaves_its_loop_early_is_counted():
    """HART's loop has no other end than an exception; its graphs are captured all the same."""
    _, adapter = opened("hart")
    attend = make_attention(adapter, policies(adapter)["skip"])
    for images in (1, 2):
        adapter.finish(adapter.start((0, 1), 0), attend)
        assert adapter._fused.work.images == images


def test_how_far_the_path_is_from_the_untouched_model_is_in_the_evidence():
    driven, adapter = opened("infinity")
    ((name, psnr, ssim),) = adapter.yardsticks()
    assert "untouched" in name and 30 < psnr and 0.9 < ssim <= 1
    with pytest.raises(ValueError, match="undo that first"):
        LiveModel(driven.model, generate_of(driven), [0])
    adapter.close()
    assert LiveModel(driven.model, generate_of(driven), [0]).yardsticks() == ()


def test_a_path_that_is_not_legal_is_said_or_left():
    driven = block_lookalikes.Infinity()
    blocks = recognise(driven.model)[1].blocks
    blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hook is on it") as refused:
        LiveModel(driven.model, generate_of(driven), [0], path="fused")
    assert "\n" not in str(refused.value)
    assert LiveModel(driven.model, generate_of(driven), [0]).picture_path == ""


@pytest.mark.slow
def test_every_promise_is_kept_on_the_path():
    _, adapter = opened("infinity")
    found = {check.name: check for check in check_adapter(adapter)}
    assert not {name: check.reason for name, check in found.items() if check.reason}
    assert found["dense is the model's own picture"].note == "bit for bit", "watched, it is drawn by hooks"
