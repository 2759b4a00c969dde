"""What must hold of an adapter, for any model that it drives: the public code (public_models/) and our look-alikes alike.

A driven model is an object with `model`, `blocks`, `globals` (of the module its attention's code lives in), `dtype`, `grids()`,
`sample(...)` -> pictures. The reference puts the fp64 oracle into those globals and counts calls; it shares nothing with the
adapter, which reads the scale off the cache and touches instances only.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from sparvar_kernels import AttentionProblem, Csla, Policy, Pooled, Reuse, Rule, SparseAttention, Tile
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.oracle import reference_attention
from sparvar_kernels.variants import Dense
from sparvar_tune import adapters
from sparvar_tune.generation import CacheBudget, DropUnconditional, SkipScales

NAMES = ("slow_attn", "flash_attn_func", "memory_efficient_attention")


def policies(layers: int, scales: int) -> dict[str, Policy]:
    """Policies by name, of two heads a layer; the last two scales have rules, the one before them is their decision scale."""
    last, before, decision = scales - 1, scales - 2, scales - 3
    near = Csla(tuple(-1 if s < 2 else 3 for s in range(scales)), 2, Tile(4, 4))
    mixed = tuple(("AB", "BA", "AC", "CB")[i % 4] for i in range(layers))
    windows = (Rule(before, "A", near), Rule(last, "A", near), Rule(last, "B", Pooled(2, 2)))
    reuse = (Rule(before, "A", Pooled(2, 2)), Rule(before, "B", Reuse(decision)), Rule(last, "B", Reuse(decision)))
    return {"dense": Policy(mixed), "windows": Policy(("AB",) * layers, windows), "reuse": Policy(mixed, reuse)}


class Reference:
    """The oracle under the names that the model's code calls, for the time of a `with`."""

    def __init__(self, driven, policy: Policy, schedule: ScaleSchedule, thinned: int | None = None) -> None:
        """thinned: the scale from which on caches are not the schedule's, so that calls are no problems of it."""
        self.driven, self.policy, self.schedule = driven, policy, schedule
        self.thinned = len(schedule) if thinned is None else thinned
        self.calls, self.kept = 0, {}

    def __enter__(self):
        self.before = {name: self.driven.globals[name] for name in NAMES if self.driven.globals.get(name) is not None}
        for name in self.before:
            self.driven.globals[name] = lambda *a, name=name, **kw: self.attend(name, *a, **kw)
        return self

    def __exit__(self, *error):
        self.driven.globals.update(self.before)

    def attend(self, name, *args, **kwargs):
        """The oracle where the policy has a rule, and the function that was there elsewhere."""
        given = {**dict(zip("qkv", args, strict=False)), **kwargs}
        q, k, v = (given.get(short, given.get(long)) for short, long in (("q", "query"), ("k", "key"), ("v", "value")))
        swap = name != "slow_attn"
        if swap:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        layer, place = self.calls % len(self.driven.blocks), self.calls // len(self.driven.blocks)
        self.calls += 1
        s = place - bool(self.schedule.prefix)  # the context tokens come first
        q, k = q.to(v.dtype), k.to(v.dtype)
        if 0 <= s < self.thinned:
            factor = given.get("scale", given.get("softmax_scale"))
            problem = AttentionProblem(self.schedule, s, q.shape[0], q.shape[1], q.shape[3], "fp64", factor)
            wide = tuple(t.double() for t in (q, k, v))
            problem.check_inputs(*wide)
            self.kept[layer, s] = (problem, *wide)
        variants = [self.policy.variant(layer, head, s) for head in range(q.shape[1])]
        if all(isinstance(variant, Dense) for variant in variants):
            return self.before[name](*args, **kwargs)
        out = torch.full(q.shape, float("nan"), dtype=torch.float64)
        for head, variant in enumerate(variants):
            decision = self.kept.get((layer, variant.decision_scale))
            if decision is not None:
                decision = (decision[0], *(t[: q.shape[0]] for t in decision[1:]))
            out[:, head] = reference_attention(variant, *wide, problem, decision)[:, head]
        out = out.to(v.dtype)
        return out.transpose(1, 2).contiguous() if swap else out


def everything(driven) -> list[dict]:
    """Every module's `__dict__` (values by identity, keys in order), to see that nothing was left behind."""
    own = [driven.model, *driven.model.modules(), *getattr(driven, "others", ())]
    return [{k: id(v) for k, v in vars(m).items() if k not in ("_parameters", "_buffers", "_modules")} for m in own]


def attention_of(driven, policy: Policy, **given) -> tuple[SparseAttention, ScaleSchedule]:
    _, parts = adapters.recognise(driven.model)
    schedule = parts.schedule or ScaleSchedule(tuple(driven.grids(**given)))
    return SparseAttention(policy, schedule, softmax_scale=parts.softmax_scale), schedule


def aspect_of(given: dict) -> dict:
    return {"aspect": given["aspect"]} if "aspect" in given else {}


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model's own attention")
        yield


class Drawn(NamedTuple):
    pictures: Tensor
    logits: list[Tensor]  # of every scale; a picture alone hides what the sampler's choice hides


def draw(driven, **given) -> Drawn:
    model, logits = driven.model, []
    before = dict(vars(model))
    own = model.get_logits

    def get_logits(*args):
        out = own(*args)
        logits.append(out.clone())
        return out

    vars(model)["get_logits"] = get_logits
    try:
        return Drawn(driven.sample(**given), logits)
    finally:
        del vars(model)["get_logits"]
        if "get_logits" in before:
            vars(model)["get_logits"] = before["get_logits"]


def draw_until(driven, scale: int) -> None:
    """An image that ends in a ZeroDivisionError when the logits of `scale` are asked for."""
    model, left = driven.model, [scale]
    own = model.get_logits

    def get_logits(*args):
        left[0] -= 1
        return own(*args) if left[0] >= 0 else 1 / 0

    vars(model)["get_logits"] = get_logits
    try:
        driven.sample()
    finally:
        del vars(model)["get_logits"]


def same(a: Drawn, b: Drawn) -> bool:
    return torch.equal(a.pictures, b.pictures) and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def near(a: Drawn, b: Drawn, dtype: str) -> bool:
    """Equal but for rounding. In bf16 that may change a token, so what is drawn after it, the last scale, is not looked at."""
    scales = range(len(b.logits) - (dtype == "bf16"))
    bound = {"fp32": 1e-4, "bf16": 0.03}[dtype]
    pairs = [(a.logits[s], b.logits[s]) for s in scales]
    return all(bool((x - y).norm() <= bound * y.norm()) for x, y in pairs)


def dense_and_undo(driven, **given) -> dict[str, bool]:
    """A dense policy draws the untouched model's picture, bit for bit; so does the model after undo."""
    plain, before = draw(driven, **given), everything(driven)
    attend, _ = attention_of(driven, policies(len(driven.blocks), len(driven.grids()))["dense"], **aspect_of(given))
    with no_warnings(), adapters.apply(driven.model, attend):
        dense = draw(driven, **given)
    return {
        "dense policy = untouched": same(plain, dense), "after undo = untouched": same(plain, draw(driven, **given)),
        "nothing left behind": everything(driven) == before,
    }  # fmt: skip


def sparse_is_the_oracle(driven, name: str, **given) -> dict[str, bool]:
    policy = policies(len(driven.blocks), len(driven.grids()))[name]
    plain = draw(driven, **given)
    attend, schedule = attention_of(driven, policy, **aspect_of(given))
    with Reference(driven, policy, schedule):
        want = draw(driven, **given)
    with no_warnings(), adapters.apply(driven.model, attend):
        got = draw(driven, **given)
        again = draw(driven, **given)
    return {
        f"{name} = oracle": near(got, want, driven.dtype), f"{name} twice": same(got, again),
        f"{name} is not dense": not same(got, plain),
        f"after {name} = untouched": same(plain, draw(driven, **given)),
    }  # fmt: skip


class Boom(Exception):
    pass


def exception_mid_image(driven, **given) -> dict[str, bool]:
    """An exception in the middle of an image: the next image is right, applied and after undo, and no cache is left open."""
    plain, before = draw(driven, **given), everything(driven)
    attend, _ = attention_of(driven, policies(len(driven.blocks), len(driven.grids()))["reuse"])
    calls = []

    def boom(module, args, kwargs):
        calls.append(1)
        if len(calls) == len(driven.grids()) - 1:
            raise Boom

    live = adapters.apply(driven.model, attend)
    sparse = draw(driven, **given)
    hook = driven.blocks[1].register_forward_pre_hook(boom, with_kwargs=True)
    try:
        draw(driven, **given)
        raised = False
    except Boom:
        raised = True
    hook.remove()
    _, parts = adapters.recognise(driven.model)
    closed = not any(a.caching or a.cached_k is not None for a in parts.attentions)
    again = draw(driven, **given)
    live.undo()
    live.undo()
    return {
        "exception passes": raised, "caches closed": closed, "next sparse image": same(again, sparse),
        "next image after undo": same(draw(driven, **given), plain), "left as before": everything(driven) == before,
    }  # fmt: skip


def undo_in_any_order(driven, **given) -> dict[str, bool]:
    plain, before = draw(driven, **given), everything(driven)
    found = policies(len(driven.blocks), len(driven.grids()))
    first = adapters.apply(driven.model, attention_of(driven, found["reuse"])[0])
    one = draw(driven, **given)
    half = adapters.drop_unconditional(driven.model, len(driven.grids()) - 2)
    second = adapters.apply(driven.model, attention_of(driven, found["windows"])[0])
    first.undo()
    second.undo()
    third = adapters.apply(driven.model, attention_of(driven, found["reuse"])[0])
    half.undo()
    back = draw(driven, **given)
    third.undo()
    return {
        "last applied rules": same(one, back), "all undone = untouched": same(plain, draw(driven, **given)),
        "all undone, nothing left": everything(driven) == before,
    }  # fmt: skip


def guidance_drop(driven, tail, batch: int, alike=same) -> dict[str, bool]:
    """The untouched model with guidance 1 from that scale on is the oracle, bit for bit; with a sparse policy too.

    alike: for sizes at which this CPU's products round differently by the number of rows.
    """
    begin = len(tail) - 2
    reuse = policies(len(driven.blocks), len(tail))["reuse"]
    plain, want = draw(driven, batch=batch), draw(driven, batch=batch, cfg=tail)
    half = adapters.drop_unconditional(driven.model, begin)
    got = draw(driven, batch=batch)
    attend, schedule = attention_of(driven, reuse)
    with no_warnings(), adapters.apply(driven.model, attend):
        sparse = draw(driven, batch=batch)
    half.undo()
    with Reference(driven, reuse, schedule):
        oracle = draw(driven, batch=batch, cfg=tail)
    return {
        "half dropped = guidance 1": alike(got, want), "half dropped changes the picture": not same(got, plain),
        "half dropped and reuse = oracle": near(sparse, oracle, driven.dtype),
        "after the drop = untouched": same(plain, draw(driven, batch=batch)),
    }  # fmt: skip


def scales_skipped(driven, **own) -> dict[str, bool]:
    plain, want = draw(driven), draw(driven, **own)
    skipped = adapters.skip_scales(driven.model, own["trunk_scale"])
    got = draw(driven)
    skipped.undo()
    return {
        "scales skipped = trunk_scale": same(got, want),
        "after skipping = untouched": same(plain, draw(driven)),
    }


def policy_steps(driven, batch: int = 1, **own) -> dict[str, bool]:
    """Both steps of one policy: the unconditional half dropped for the last three scales, the last of them left out.

    own: what draws that with the untouched model, where it can say so; elsewhere its rows are replaced from outside.
    """
    _, parts = adapters.recognise(driven.model)
    scales = len(driven.grids())
    drop, last = scales - 3, scales - 1
    plain = draw(driven, batch=batch)
    prefix = parts.schedule.prefix if parts.schedule else 0
    want = draw(driven, batch=batch, **own) if own else rows_replaced(driven, drop, prefix, batch=batch)
    policy = Policy(("AB",) * len(driven.blocks), (), (SkipScales((last,)), DropUnconditional(drop)))
    with no_warnings(), adapters.apply(driven.model, attention_of(driven, policy)[0]):
        got = draw(driven, batch=batch)
    with adapters.skip_scales(driven.model, last), adapters.drop_unconditional(driven.model, drop):
        apart = draw(driven, batch=batch)
    cut = Drawn(got.pictures, want.logits[: len(got.logits)])
    return {
        "a policy's steps = guidance 1 and fewer scales": same(got, want) if own else near(got, cut, driven.dtype),
        "a policy's steps = each put in alone": same(got, apart) and len(got.logits) == last + bool(prefix) * (not own),
        "a policy's steps change the picture": not same(got, Drawn(plain.pictures, plain.logits[: len(got.logits)])),
        "after a policy's steps = untouched": same(plain, draw(driven, batch=batch)),
    }  # fmt: skip


def cut_by_hand(driven, step: CacheBudget, schedule: ScaleSchedule, **given) -> Drawn:
    """The untouched model, whose caches are cut from outside after every scale, a row and a head at a time in fp64.

    The definition in words is `CacheBudget`'s; nothing is shared with the adapter. Caches are [B, H, N, D].
    """
    side, hooks = math.isqrt(step.window), []
    drawn = [0] * len(driven.blocks)  # scales so far, by layer

    def cut(module, args, kwargs, layer):
        s = drawn[layer] = 0 if module.cached_k.shape[2] == 1 else drawn[layer] + 1
        if s + 1 not in range(step.from_scale, len(schedule)):
            return
        keep, (height, width) = step.keys[s + 1 - step.from_scale][layer], schedule.grids[s]
        x = kwargs.get("x", args[0] if args else None)
        k, v = module.cached_k, module.cached_v
        batch, heads, count, dim = k.shape
        if count <= keep:
            return
        begin = count - height * width
        middles = [(n // side) * i + (n // side - 1) // 2 for n in (height, width) for i in range(side)]
        window = [y * width + x for y in middles[:side] for x in middles[side:]]
        q = module.mat_qkv(x).double()
        kept = torch.empty(batch, heads, keep, dtype=torch.long)
        for row in range(batch):
            for head in range(heads):
                mine = q[row, window][:, head * dim : (head + 1) * dim]
                score = (mine @ k[row, head].double().T).sum(0).div(math.sqrt(dim)).tolist()
                outside = [begin + place for place in window]
                for place in outside:
                    score[place] = -math.inf
                reach = step.pool // 2
                pooled = [max(score[max(0, i - reach) : i + reach + 1]) for i in range(count)]
                others = sorted(set(range(count)) - set(outside), key=lambda i: -pooled[i])
                kept[row, head] = torch.tensor(sorted(outside + others[: keep - step.window]))
        index = kept[..., None].expand(-1, -1, -1, dim)
        module.cached_k, module.cached_v = k.gather(2, index), v.gather(2, index)

    _, parts = adapters.recognise(driven.model)
    for layer, module in enumerate(parts.attentions):
        hooks.append(module.register_forward_hook(
            lambda module, args, kwargs, out, layer=layer: cut(module, args, kwargs, layer), with_kwargs=True
        ))  # fmt: skip
    try:
        return draw(driven, **given)
    finally:
        for hook in hooks:
            hook.remove()


def caches_budgeted(driven, batch: int = 1, window: int = 4) -> dict[str, bool]:
    """From the third-last scale on each layer keeps a part of its keys, the layers in turn more and less."""
    layers, schedule = len(driven.blocks), ScaleSchedule(tuple(driven.grids()))
    begin = len(schedule) - 3
    rows = tuple(tuple(schedule.starts[s] // (2 if layer % 2 else 3) + window for layer in range(layers))
                 for s in range(begin, len(schedule)))  # fmt: skip
    step = CacheBudget(begin, rows, window, pool=1)  # pooled scores have ties, which test_generation.py looks at
    plain = draw(driven, batch=batch)
    want = cut_by_hand(driven, step, schedule, batch=batch)
    policy = Policy(("AB",) * layers, (), (step,))
    sizes = []
    with no_warnings(), adapters.apply(driven.model, attention_of(driven, policy)[0]):
        _, parts = adapters.recognise(driven.model)
        hook = driven.blocks[-1].register_forward_hook(lambda *_: sizes.append([a.cached_k.shape[2] for a in parts.attentions]))
        got = draw(driven, batch=batch)
        hook.remove()
    return {
        "budget of caches = by hand": near(got, want, driven.dtype),
        "budget of caches changes the picture": not same(got, plain),
        "caches have their budgets": [tuple(s) for s in sizes[begin - 1 : -1]] == list(rows),
        "after the budget = untouched": same(plain, draw(driven, batch=batch)),
    }  # fmt: skip


def other_schedule(driven) -> dict[str, bool]:
    plain = draw(driven, aspect=1.5)
    attend, _ = attention_of(driven, policies(len(driven.blocks), len(driven.grids()))["windows"])
    with adapters.apply(driven.model, attend) as live, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = draw(driven, aspect=1.5)
        said_why = [str(w.message) for w in said if "own attention" in str(w.message)]
    return {
        "other aspect = untouched": same(plain, got),
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
        return draw(driven, **given)
    finally:
        del driven.model.get_logits
        for hook in hooks:
            hook.remove()


def half_and_skip(driven, batch: int = 1) -> dict[str, bool]:
    _, parts = adapters.recognise(driven.model)
    prefix, scales = parts.schedule.prefix, len(parts.schedule)
    plain = draw(driven, batch=batch)
    want = rows_replaced(driven, scales - 2, prefix, batch=batch)
    with adapters.drop_unconditional(driven.model, scales - 2):
        got = draw(driven, batch=batch)
    sums = []
    quantiser = driven.model.vae_quant_proxy[0]
    own = quantiser.get_next_autoregressive_input
    quantiser.get_next_autoregressive_input = lambda *a, **kw: (lambda r: (sums.append(r[0].clone()), r)[1])(own(*a, **kw))
    draw(driven, batch=batch)
    del quantiser.get_next_autoregressive_input
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=driven.dtype == "bf16"):
        earlier = driven.model.vae_proxy[0].fhat_to_img(sums[scales - 3 + bool(prefix)]).add_(1).mul_(0.5)
    with adapters.skip_scales(driven.model, scales - 2):
        skipped = draw(driven, batch=batch)
    return {
        "half dropped = conditional rows twice": near(got, want, driven.dtype),
        "half dropped changes the picture": not near(got, plain, "fp32"),
        "scales skipped = the sum before them": torch.equal(skipped.pictures, earlier),
        "after half and skip = untouched": same(plain, draw(driven, batch=batch)),
    }  # fmt: skip
