"""pocketvar's pruned tokens and cut caches against the same by hand, in fp64: a row, a head, a token at a time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from token_oracles import standing_in

from sparvar_kernels import Policy, Pooled, Rule, SparseAttention
from sparvar_tune import adapters
from sparvar_tune.adapters.pocketvar import STEPS
from sparvar_tune.catalog import models
from sparvar_tune.generation import CacheBudget, DropUnconditional, PruneTokens
from sparvar_tune.live.pocketvar import PocketAdapter
from sparvar_tune.pocketvar.model import DENSE, Generation, PocketVAR, draw_noise
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.policy_search.menu import step_menu

PRUNE = PruneTokens(5, (60, 90), 4, 1, 1)  # grids 12x12 and 16x16, what was given at 8x8, one of two layers
CUT = CacheBudget(5, ((100, 70), (150, 90)), window=4, pool=1)  # of a larger pool many scores are equal: test_generation.py
LAYERS, HEADS, DIM = 2, 2, 32


@pytest.fixture(scope="module")
def model() -> PocketVAR:
    torch.set_num_threads(1)
    return tiny.make_model().double()


def with_steps(model: PocketVAR, *steps, rules=()) -> SparseAttention:
    policy = Policy(("A" * HEADS,) * LAYERS, rules, steps)
    return SparseAttention(policy, model.schedule, softmax_scale=1.0, logit_bound=model.logit_bound)


class InDouble(SparseAttention):
    """The kernels take no fp64; a policy without rules is dense anyway."""

    def __call__(self, q, k, v, layer, scale_index):
        return DENSE(q, k, v, layer, scale_index)


def drawn(model: PocketVAR, *steps, labels=(3, 5), attend=None) -> torch.Tensor:
    given = with_steps(model, *steps)
    attend = attend or InDouble(given.policy, model.schedule, softmax_scale=1.0, logit_bound=model.logit_bound)
    return Generation(model, labels, draw_noise(model.schedule, 16, 7), 0.7, attend).run().fhat


def by_hand(model: PocketVAR, prune: PruneTokens | None, budget: CacheBudget | None, labels=(3, 5)) -> torch.Tensor:
    """fhat of the whole generation; a picture of the batch after the other, blocks token by token."""
    noise, schedule, out = draw_noise(model.schedule, 16, 7), model.schedule, []
    for label in labels:
        mod, head_mod = model.modulations(torch.tensor([label]))
        fhat = torch.zeros(1, 16, *schedule.grids[-1], dtype=torch.float64)
        caches = [[([], []) for _ in range(HEADS)] for _ in range(LAYERS)]
        given = {}
        for s, grid in enumerate(schedule.grids):
            x = model.inputs([fhat if s else None], range(s, s + 1))[0].detach()
            for layer, block in enumerate(model.blocks):
                pruned = prune is not None and prune.first_layer <= layer <= prune.last_layer
                keep = prune.at(s) if pruned else None
                m = (mod[0] + block.modulation).detach()
                entered = x
                for name, (shift, scale, gate) in (("attention", m[:3]), ("mlp", m[3:])):
                    far = [float((token - x.mean(0)).square().sum()) for token in x]
                    tokens = list(range(len(x))) if keep is None else sorted(range(len(x)), key=lambda i: -far[i])[:keep]
                    y = F.layer_norm(x[tokens], x.shape[-1:]) * (1 + scale) + shift
                    if name == "mlp":
                        added = block.fc2(F.gelu(block.fc1(y))) * gate
                    else:
                        places = [schedule.starts[s] + t for t in tokens]
                        added = block.proj(attended(model, block, y, places, caches[layer])) * gate
                    if pruned:
                        added = standing_in(given, (layer, name), added, tokens, keep, prune, schedule.grids, s)
                    x = (x + added).detach()
                if budget is not None and (most := budget.before(s + 1, layer)) is not None:
                    cut(block, F.layer_norm(entered, x.shape[-1:]) * (1 + m[1]) + m[0], grid, caches[layer], most, budget)
            bits = model.logits(x[None], head_mod).detach() + 0.7 * noise[schedule.starts[s] : schedule.starts[s + 1]] > 0
            fhat = model.quantiser.add(fhat, bits.transpose(1, 2).unflatten(2, grid), s)
        out.append(fhat)
    return torch.cat(out)


def attended(model, block, y, places, cache) -> torch.Tensor:
    """[chosen, width]; places among all tokens of the picture. cache: (keys, values) a head, lists that grow."""
    queries = [[] for _ in range(HEADS)]
    for place, token in zip(places, y, strict=True):
        q, k, v = block.qkv(token).view(3, HEADS, DIM)
        angle = model.rotations[place]
        for head in range(HEADS):
            turned = []
            for t, factor in ((q[head], model.head_scale(block)[head]), (k[head], 1.0)):
                a, b = (F.normalize(t, dim=0) * factor).view(-1, 2).unbind(1)
                turned.append(torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), 1).flatten())
            queries[head].append(turned[0])
            cache[head][0].append(turned[1].detach())
            cache[head][1].append(v[head])
    heads = [
        torch.softmax(torch.stack(queries[h]) @ torch.stack(cache[h][0]).T, -1) @ torch.stack(cache[h][1]) for h in range(HEADS)
    ]
    return torch.cat(heads, 1)


def cut(block, y, grid, cache, most, budget) -> None:
    """Leaves `most` keys a head: the window's, and of the others those of the best scores."""
    side = math.isqrt(budget.window)
    middles = [[i * (n // side) + (n // side - 1) // 2 for i in range(side)] for n in grid]
    window = [a * grid[1] + b for a in middles[0] for b in middles[1]]
    raw = (y[window] @ block.qkv.weight[: HEADS * DIM].T).detach()
    for head, (keys, values) in enumerate(cache):
        if len(keys) <= most:
            continue
        own = {len(keys) - len(y) + w for w in window}
        queries = raw.view(-1, HEADS, DIM)[:, head]
        score = [-math.inf if i in own else float((queries @ k).sum()) / math.sqrt(DIM) for i, k in enumerate(keys)]
        half = budget.pool // 2
        pooled = [max(score[max(0, i - half) : i + half + 1]) for i in range(len(keys))]
        others = sorted((i for i in range(len(keys)) if i not in own), key=lambda i: -pooled[i])[: most - len(own)]
        kept = sorted([*others, *own])
        keys[:], values[:] = [keys[i] for i in kept], [values[i] for i in kept]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One bit of the last scale is worth 1e-2 or more, the decoder aside."""
    return float((a - b).abs().max()) < 1e-6


def test_by_hand_without_steps_is_the_model(model):
    assert near(by_hand(model, None, None), drawn(model))


@pytest.mark.parametrize(("prune", "budget"), [(PRUNE, None), (dataclasses.replace(PRUNE, first_layer=0), None), (None, CUT)])
def test_steps_are_the_oracle(model, prune, budget):
    """Left out, a step would draw the plain picture, which is another."""
    step = prune or budget
    got = drawn(model, step)
    assert near(got, by_hand(model, prune, budget)) and not near(got, drawn(model))


def test_a_generation_that_goes_on_from_a_parked_state_is_the_same():
    model = tiny.make_model()
    noise = draw_noise(model.schedule, 16, 7)
    for step in (PRUNE, CUT):
        attend = with_steps(model, step)
        parked = Generation(model, [3], noise, 0.7, DENSE).run(4).parked()
        whole = Generation(model, [3], noise, 0.7, attend).run().fhat
        assert torch.equal(parked.fork(attend).run().fhat, whole) and torch.equal(parked.fork(attend).run().fhat, whole)
        late = Generation(model, [3], noise, 0.7, attend).run(6)  # in the midst of it
        assert torch.equal(late.fork().run().fhat, whole) and torch.equal(late.fork().run().fhat, whole)
    after = Generation(model, [3], noise, 0.7, DENSE).run(5).parked()
    with pytest.raises(ValueError, match="scale 4 was drawn before the step was known"):
        after.fork(with_steps(model, PRUNE)).run()


def test_dense_pictures_are_what_they_were_and_rules_stand_before_the_step():
    model = tiny.make_model()
    noise = draw_noise(model.schedule, 16, 7)
    plain = Generation(model, [3], noise, 0.7).run().fhat
    assert torch.equal(Generation(model, [3], noise, 0.7, with_steps(model)).run().fhat, plain)
    rule = (Rule(4, "A", Pooled(3, 2)),)
    both, alone = (Generation(model, [3], noise, 0.7, with_steps(model, s, rules=rule)).run().fhat for s in (PRUNE, CUT))
    assert not torch.equal(both, alone) and not torch.equal(both, plain)
    with adapters.apply(model, with_steps(model, CUT)):
        assert torch.equal(
            Generation(model, [3], noise, 0.7).run().fhat, drawn(model, labels=(3,), attend=with_steps(model, CUT))
        )
    assert torch.equal(Generation(model, [3], noise, 0.7).run().fhat, plain)


def test_pocketvar_is_offered_both_and_refuses_others_by_name(monkeypatch):
    tiny.install(monkeypatch.setattr)
    adapter = PocketAdapter(models.find_model("pocketvar"), "cpu")
    assert set(adapter.steps) == set(STEPS) == {"skip_scales", "prune_tokens", "cache_budget", "precision"}
    offered = step_menu(models.find_model("infinity-2b").schedule("1M", "1.000"), adapter.steps, 32, ("int8",))
    assert {option.steps[0].kind for option in offered.values()} == set(STEPS)
    assert offered["50 % of tokens at 12"].after == ("75 % of tokens at 12",)
    heads = ("A" * HEADS,) * LAYERS
    with pytest.raises(ValueError, match="drop_unconditional: the adapter of pocketvar cannot do that"):
        make_attention(adapter, Policy(heads, (), (DropUnconditional(6),)))
    with pytest.raises(ValueError, match="cache_budget: it and prune_tokens both leave out tokens"):
        make_attention(adapter, Policy(heads, (), (PRUNE, CUT)))
