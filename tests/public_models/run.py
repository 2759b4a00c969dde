"""The adapters on the public code: every check on tiny random models of a checkout, one JSON line each.

    python tests/public_models/run.py infinity|hart|var CHECKOUT

One checkout a process: their modules' names collide, and the stand-ins are for a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import adapter_checks as checks

from public_models import stand_ins, tiny_hart, tiny_infinity, tiny_var
from sparvar_tune import adapters


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


def run_infinity(checkout: str) -> None:
    tiny = tiny_infinity.Tiny(checkout)
    common(tiny)
    common(tiny, batch=2)
    say(tiny, checks.exception_mid_image(tiny))
    say(tiny, checks.undo_in_any_order(tiny))
    say(tiny, checks.dense_and_undo(tiny, aspect=0.667, batch=2), aspect=0.667, batch=2)
    scales = len(tiny.grids())
    tail = [3.0] * (scales - 2) + [1.0] * 2
    for given in ({"cfg": 1.0}, {"cfg": tail}):
        say(tiny, checks.dense_and_undo(tiny, **given), options="cfg off" if given["cfg"] == 1.0 else "cfg 1 at the end")
        say(tiny, checks.sparse_is_the_oracle(tiny, "reuse", **given), options=f"cfg {given['cfg']}")
    say(tiny, other_schedule(tiny))
    for dtype in ("fp32", "bf16"):
        driven = tiny if dtype == "fp32" else tiny_infinity.Tiny(checkout, dtype)
        for batch in (1, 2):
            say(driven, guidance_drop(driven, tail, batch), batch=batch)
        say(driven, scales_skipped(driven, trunk_scale=scales - 2))
    common(driven)
    common(driven, batch=2)
    common(tiny_infinity.Tiny(checkout, patchify=True), options="patchify")
    common(tiny_infinity.Tiny(checkout, fused=False), options="unfused norm")


def guidance_drop(driven, tail, batch: int) -> dict[str, bool]:
    """The untouched model with guidance 1 from that scale on is the oracle, bit for bit; with a sparse policy too."""
    begin = len(tail) - 2
    reuse = checks.policies(len(driven.blocks), len(tail))["reuse"]
    plain, want = checks.draw(driven, batch=batch), checks.draw(driven, batch=batch, cfg=tail)
    half = adapters.drop_unconditional(driven.model, begin)
    got = checks.draw(driven, batch=batch)
    attend, schedule = checks.attention_of(driven, reuse)
    with checks.no_warnings(), adapters.apply(driven.model, attend):
        sparse = checks.draw(driven, batch=batch)
    half.undo()
    with checks.Reference(driven, reuse, schedule):
        oracle = checks.draw(driven, batch=batch, cfg=tail)
    return {
        "half dropped = guidance 1": checks.same(got, want), "half dropped changes the picture": not checks.same(got, plain),
        "half dropped and reuse = oracle": checks.near(sparse, oracle, driven.dtype),
        "after the drop = untouched": checks.same(plain, checks.draw(driven, batch=batch)),
    }  # fmt: skip


def scales_skipped(driven, **own) -> dict[str, bool]:
    plain, want = checks.draw(driven), checks.draw(driven, **own)
    skipped = adapters.skip_scales(driven.model, own["trunk_scale"])
    got = checks.draw(driven)
    skipped.undo()
    return {
        "scales skipped = trunk_scale": checks.same(got, want),
        "after skipping = untouched": checks.same(plain, checks.draw(driven)),
    }


def other_schedule(driven) -> dict[str, bool]:
    plain = checks.draw(driven, aspect=1.5)
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), len(driven.grids()))["windows"])
    with adapters.apply(driven.model, attend) as live, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = checks.draw(driven, aspect=1.5)
        said_why = [str(w.message) for w in said if "own attention" in str(w.message)]
    return {
        "other aspect = untouched": checks.same(plain, got),
        "and says why": len(said_why) == 1 and "profile is for" in live.reason,
    }


def rows_replaced(driven, begin: int, prefix: int, **given):
    """Pictures of the untouched model whose unconditional rows are the conditional ones from scale `begin` on."""
    hooks, layers = [], len(driven.blocks)
    calls = [0]

    def twice(t):
        return torch.cat((t[: t.shape[0] // 2],) * 2)

    def pre(module, args, kwargs):
        layer, place = calls[0] % layers, calls[0] // layers
        calls[0] += 1
        if place - bool(prefix) < begin:
            return None
        a = module.attn
        if a.cached_k is not None:
            a.cached_k, a.cached_v = twice(a.cached_k), twice(a.cached_v)
        names = ("x", "cond_BD", "context_position_ids", "context_mask")
        return args, {**kwargs, **{n: twice(kwargs[n]) for n in names if kwargs.get(n) is not None and (n != "x" or layer == 0)}}

    for block in driven.blocks:
        hooks.append(block.register_forward_pre_hook(pre, with_kwargs=True))

    def logits(inner, x, cond_BD):
        return inner(x, twice(cond_BD) if calls[0] > (begin + bool(prefix)) * layers else cond_BD)

    own = driven.model.get_logits
    driven.model.get_logits = lambda x, cond_BD: logits(own, x, cond_BD)
    try:
        return checks.draw(driven, **given)
    finally:
        del driven.model.get_logits
        for hook in hooks:
            hook.remove()


def half_and_skip(driven, batch: int = 1) -> dict[str, bool]:
    _, parts = adapters.recognise(driven.model)
    prefix, scales = parts.schedule.prefix, len(parts.schedule)
    plain = checks.draw(driven, batch=batch)
    want = rows_replaced(driven, scales - 2, prefix, batch=batch)
    with adapters.drop_unconditional(driven.model, scales - 2):
        got = checks.draw(driven, batch=batch)
    sums = []
    quantiser = driven.model.vae_quant_proxy[0]
    own = quantiser.get_next_autoregressive_input
    quantiser.get_next_autoregressive_input = lambda *a, **kw: (lambda r: (sums.append(r[0].clone()), r)[1])(own(*a, **kw))
    checks.draw(driven, batch=batch)
    del quantiser.get_next_autoregressive_input
    with torch.inference_mode(), stand_ins.autocast(driven.dtype):
        earlier = driven.model.vae_proxy[0].fhat_to_img(sums[scales - 3 + bool(prefix)]).add_(1).mul_(0.5)
    with adapters.skip_scales(driven.model, scales - 2):
        skipped = checks.draw(driven, batch=batch)
    return {
        "half dropped = conditional rows twice": checks.near(got, want, driven.dtype),
        "half dropped changes the picture": not checks.near(got, plain, "fp32"),
        "scales skipped = the sum before them": torch.equal(skipped.pictures, earlier),
        "after half and skip = untouched": checks.same(plain, checks.draw(driven, batch=batch)),
    }  # fmt: skip


def run_hart(checkout: str) -> None:
    for dtype, flash in (("fp32", False), ("bf16", True)):
        tiny = tiny_hart.Tiny(checkout, dtype, flash)
        options = "flash layout" if flash else ""
        common(tiny, options)
        common(tiny, options, batch=2)
        say(tiny, half_and_skip(tiny), options=options)
        say(tiny, half_and_skip(tiny, 2), options=options, batch=2)
        if not flash:
            say(tiny, checks.exception_mid_image(tiny))
            say(tiny, checks.undo_in_any_order(tiny))


def run_var(checkout: str) -> None:
    cases = (("fp32", "slow", False), ("fp32", "xformers", False), ("bf16", "flash", False), ("fp32", "slow", True))
    for dtype, kernel, shared in cases:
        tiny = tiny_var.Tiny(checkout, dtype, kernel, shared)
        options = kernel + ", shared AdaLN" * shared
        common(tiny, options)
        common(tiny, options, batch=2)
        say(tiny, half_and_skip(tiny), options=options)
        if kernel == "slow":
            say(tiny, checks.exception_mid_image(tiny), options=options)
            say(tiny, checks.undo_in_any_order(tiny), options=options)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    {"infinity": run_infinity, "hart": run_hart, "var": run_var}[sys.argv[1]](sys.argv[2])
