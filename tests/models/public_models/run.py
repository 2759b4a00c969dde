"""The adapters on the public code: every check on tiny random models of a checkout, one JSON line each.

    python tests/models/public_models/run.py infinity|hart|var CHECKOUT

One checkout a process: their modules' names collide, and the stand-ins are for a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "shared" / "lookalike_models"))
import adapter_checks as checks
import lookalikes
import torch

from public_models import tiny_hart, tiny_infinity, tiny_var
from public_models.stand_ins import autocast
from sparvar_tune import adapters, fused
from sparvar_tune.adapters.cross_attention import varlen_cross_attention
from sparvar_tune.fused import two_choices
from sparvar_tune.fused.denoiser import put_on_denoiser


def say(driven, found: dict[str, bool], **given) -> None:
    for check, holds in found.items():
        print(
            json.dumps({"model": driven.name, "dtype": driven.dtype, **given, "check": check, "holds": bool(holds)}), flush=True
        )


def common(driven, options: str = "", **given) -> None:
    shown = {"options": options, **given}
    say(driven, checks.dense_and_undo(driven, **given), **shown)
    for policy in ("windows", "reuse"):
        say(driven, checks.sparse_is_the_oracle(driven, policy, **given), **shown)


def fused_path(driven, **given) -> dict[str, bool]:
    """The block stack as one, dense and sparse, against the untouched model and the attention path; undone, nothing is left.

    In half precision the first scale is compared: behind it a token that fell the other way may change all the rest.
    """

    def near(ours: checks.Drawn, want: checks.Drawn) -> bool:
        found = [float((a - b).norm() / b.norm()) for a, b in zip(ours.logits, want.logits, strict=True)]
        return max(found) < 1e-5 if driven.dtype == "fp32" else found[0] < 2e-2

    before, plain = checks.everything(driven), checks.draw(driven, **given)
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["reuse"])
    with adapters.apply(driven.model, attend):
        sparse = checks.draw(driven, **given)
    found = {}
    for name, own, want in (("dense", None, plain), ("sparse", attend, sparse)):
        with fused.put_on(*adapters.recognise(driven.model), own, "fused") as path:
            first, again = (checks.draw(driven, **given) for _ in range(2))
            ran = path.why_not_fused is None
        found[f"fused, {name}: close"] = ran and near(first, want) and near(again, want)
    undone = checks.same(checks.draw(driven, **given), plain) and checks.everything(driven) == before
    return found | {"fused, undone = untouched": undone}


def accelerate_hooks(driven) -> dict[str, bool]:
    """accelerate's hooks on every attention, put on before or after ours and taken off again."""
    try:
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    except ImportError:
        return {}
    plain, attentions = checks.draw(driven), adapters.recognise(driven.model)[1].attentions
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["reuse"])
    with adapters.apply(driven.model, attend):
        sparse = checks.draw(driven)
        for module in attentions:
            add_hook_to_module(module, ModelHook())
        after = checks.draw(driven)
    undone = checks.draw(driven)
    with adapters.apply(driven.model, attend):
        before = checks.draw(driven)
        for module in attentions:
            remove_hook_from_module(module)
        off = checks.draw(driven)
    found = (after, sparse), (undone, plain), (before, sparse), (off, sparse), (checks.draw(driven), plain)
    names = ("hook put over ours", "ours undone under it", "ours put under it", "hook taken off", "all off = untouched")
    return {f"accelerate: {name}": checks.same(*pair) for name, pair in zip(names, found, strict=True)}


def cross_attention(driven, batch: int) -> dict[str, bool]:
    """The tiny model was imported where flash-attn is not installed, so its cross-attention is ours: each call against fp64.

    The public code casts to bf16 for it, so that is the precision asked for.
    """
    name, errors = "flash_attn_varlen_kvpacked_func", []
    ours = driven.globals[name]

    def both(*args, **kwargs):
        got, want = ours(*args, **kwargs).double(), lookalikes.flash_attn_varlen_kvpacked_func(*args, **kwargs).double()
        errors.append(float((got - want).norm() / want.norm()))
        return ours(*args, **kwargs)

    driven.globals[name] = both
    try:
        driven.sample(batch=batch)
    finally:
        driven.globals[name] = ours
    calls = len(driven.blocks) * len(driven.grids()) + 1  # and the pooling of the text
    return {"cross-attention without flash-attn = fp64": ours is varlen_cross_attention and len(errors) == calls
            and max(errors) < 2**-7}  # fmt: skip


def denoiser(driven) -> dict[str, bool]:
    """The denoiser of the last grid: the same random numbers, the same sample, and the global generator left alike."""
    loss, sampled, c = driven.model.diffloss, [], torch.randn(12, 128, generator=torch.Generator().manual_seed(3))

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        with torch.inference_mode(), autocast(driven.dtype):
            return loss.sample(z=c, temperature=0.9, cfg=2.5), torch.get_rng_state()

    plain = sample()
    own = type(loss.gen_diffusion).p_sample
    type(loss.gen_diffusion).p_sample = lambda *args, **kwargs: sampled.append(1) or own(*args, **kwargs)
    try:
        with put_on_denoiser(driven.model, lambda: True, graphs=False):
            ours = sample()
        steps, undone = len(sampled), sample()
    finally:
        type(loss.gen_diffusion).p_sample = own
    same = [all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)) for other in (ours, undone)]
    return {"denoiser = untouched": same[0] and steps == 0, "denoiser, undone = untouched": same[1] and len(sampled) > 0}


def two_choice_bits(driven) -> dict[str, bool]:
    """Bits that the public sampling draws of logits whose slow functions are done otherwise, as on a GPU."""
    calls = []

    def counted(own):
        return lambda *args, **kwargs: calls.append(own.__name__) or own(*args, **kwargs)

    with fused.put_on(*adapters.recognise(driven.model), None, "fused"):
        want = checks.draw(driven)
        own, devices, least = dict(two_choices._OTHERWISE), two_choices.DEVICES, two_choices.LEAST
        two_choices.DEVICES, two_choices.LEAST = ("cpu",), 0
        two_choices._OTHERWISE.update({function: counted(way) for function, way in own.items()})
        try:
            got = checks.draw(driven)
        finally:
            two_choices.DEVICES, two_choices.LEAST = devices, least
            two_choices._OTHERWISE.update(own)
    used = calls.count("_summed") == calls.count("_largest") == len(driven.grids())
    return {"bits of two choices = public": used and checks.same(got, want)}


def run_infinity(checkout: str) -> None:
    tiny = tiny_infinity.Tiny(checkout)
    common(tiny)
    common(tiny, batch=2)
    for batch in (1, 2):
        say(tiny, cross_attention(tiny, batch), batch=batch)
    say(tiny, checks.exception_mid_image(tiny))
    say(tiny, checks.undo_in_any_order(tiny))
    say(tiny, accelerate_hooks(tiny))
    say(tiny, two_choice_bits(tiny))
    say(tiny, checks.dense_and_undo(tiny, aspect=0.667, batch=2), aspect=0.667, batch=2)
    scales = len(tiny.grids())
    tail = [3.0] * (scales - 2) + [1.0] * 2
    for given in ({"cfg": 1.0}, {"cfg": tail}):
        say(tiny, checks.dense_and_undo(tiny, **given), options="cfg off" if given["cfg"] == 1.0 else "cfg 1 at the end")
        say(tiny, checks.sparse_is_the_oracle(tiny, "reuse", **given), options=f"cfg {given['cfg']}")
    say(tiny, checks.other_schedule(tiny))
    for dtype in ("fp32", "bf16"):
        driven = tiny if dtype == "fp32" else tiny_infinity.Tiny(checkout, dtype)
        for batch in (1, 2):
            say(driven, checks.guidance_drop(driven, tail, batch), batch=batch)
        say(driven, checks.scales_skipped(driven, trunk_scale=scales - 2))
        say(driven, checks.caches_budgeted(driven, 2), batch=2)
        say(driven, checks.policy_steps(driven, cfg=[3.0] * (scales - 3) + [1.0] * 3, trunk_scale=scales - 1))
    common(driven)
    common(driven, batch=2)
    common(tiny_infinity.Tiny(checkout, patchify=True), options="patchify")
    common(tiny_infinity.Tiny(checkout, fused=False), options="unfused norm")


def run_hart(checkout: str) -> None:
    for dtype, flash in (("fp32", False), ("bf16", True)):
        tiny = tiny_hart.Tiny(checkout, dtype, flash)
        options = "flash layout" if flash else ""
        common(tiny, options)
        common(tiny, options, batch=2)
        for batch in (1, 2):
            say(tiny, checks.half_and_skip(tiny, batch), options=options, batch=batch)
            say(tiny, fused_path(tiny, batch=batch), options=options, batch=batch)
        say(tiny, checks.policy_steps(tiny, 2), options=options, batch=2)
        say(tiny, denoiser(tiny), options=options)
        if not flash:
            say(tiny, checks.exception_mid_image(tiny))
            say(tiny, checks.undo_in_any_order(tiny))
            say(tiny, accelerate_hooks(tiny))


def run_var(checkout: str) -> None:
    cases = (("fp32", "slow", False), ("fp32", "xformers", False), ("bf16", "flash", False), ("fp32", "slow", True))
    for dtype, kernel, shared in cases:
        tiny = tiny_var.Tiny(checkout, dtype, kernel, shared)
        options = kernel + ", shared AdaLN" * shared
        common(tiny, options)
        common(tiny, options, batch=2)
        say(tiny, checks.half_and_skip(tiny), options=options)
        for batch in (1, 2):
            say(tiny, fused_path(tiny, batch=batch), options=options, batch=batch)
        say(tiny, checks.policy_steps(tiny), options=options)
        if kernel == "slow":
            say(tiny, checks.exception_mid_image(tiny), options=options)
            say(tiny, checks.undo_in_any_order(tiny), options=options)
            say(tiny, accelerate_hooks(tiny), options=options)


if __name__ == "__main__":
    torch.set_num_threads(
        1
    )  # several sum the product of a single row, which half of guidance leaves, in another order than of two
    warnings.filterwarnings("ignore", category=FutureWarning)
    {"infinity": run_infinity, "hart": run_hart, "var": run_var}[sys.argv[1]](sys.argv[2])
