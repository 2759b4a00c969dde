"""FastVAR's pruning of tokens on Infinity's look-alike, against the same by hand: a row, a token and a cell at a time in fp64."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import adapter_checks as checks
import block_lookalikes
import lookalikes
import pytest
import torch
import torch.nn.functional as F
import var_hart_lookalikes
from block_lookalikes import DIM, HEADS
from lookalikes import SIDES
from token_oracles import standing_in

from sparvar_kernels import Policy, Pooled, Rule
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.catalog.models import find_model
from sparvar_tune.generation import DropUnconditional, PruneTokens

STEP = PruneTokens(4, (20, 30), 3, 1, 2)  # grids 6x6 and 8x8, what was given at 4x4, two of three layers


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def turned(t: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One token's [H, D], turned by (cos, sin) [2, D / 2]."""
    (cos, sin), (a, b) = table.double(), t.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attended(block, row: int, tokens: list[int], y: torch.Tensor, keys: list, values: list, table: torch.Tensor) -> torch.Tensor:
    """[chosen, C] of one row's attention; y [chosen, C]. keys, values: that row's cache, [H, D] a token, which grows."""
    sa = block.sa
    bias = torch.cat((sa.q_bias, sa.zero_k_bias, sa.v_bias)).double()
    factor = sa.scale_mul_1H11.double().clamp_max(math.log(100)).exp().view(HEADS, 1)
    queries = []
    for place, token in zip(tokens, y, strict=True):
        q, k, v = (sa.mat_qkv.weight.double() @ token + bias).view(3, HEADS, DIM)
        queries.append(turned(F.normalize(q, dim=-1) * factor, table[:, place]))
        keys.append(turned(F.normalize(k, dim=-1), table[:, place]))
        values.append(v)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", torch.stack(queries), torch.stack(keys)), -1)
    out = torch.einsum("hqk,khd->qhd", weights, torch.stack(values)).flatten(1)
    return out @ sa.proj.weight.double().T + sa.proj.bias.double()


@contextlib.contextmanager
def by_hand(driven, step: PruneTokens, schedule: ScaleSchedule):
    """The look-alike with every block's forward written out; the unconditional rows are left out where x has lost them."""
    for layer, block in enumerate(driven.blocks):
        caches, given = {}, {}

        def forward(x, cond_BD, ca_kv, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0, *, layer=layer, block=block,
                    caches=caches, given=given, **_rest):  # fmt: skip
            keep = step.at(scale_ind) if step.first_layer <= layer <= step.last_layer else None
            start, count = schedule.starts[scale_ind], schedule.num_queries(scale_ind)
            table = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, 0, 0, start : start + count]
            gates = (block.ada_gss + cond_BD).double().unbind(2)
            if scale_ind == 0:
                caches.update({row: ([], []) for row in range(x.shape[0])})
            for part in ("attention", "text", "mlp"):
                added = []
                for row in range(x.shape[0]):
                    r = x[row].double()
                    far = [float((token - r.mean(0)).square().sum()) for token in r]
                    tokens = list(range(count)) if keep is None else sorted(range(count), key=lambda i: -far[i])[:keep]
                    chosen = r[tokens]
                    g1, g2, s1, s2, t1, t2 = (g[row, 0] for g in gates)
                    if part == "attention":
                        y = F.layer_norm(chosen, chosen.shape[-1:], eps=1e-6) * (1 + s1) + t1
                        out = attended(block, row, tokens, y, *caches[row], table) * g1
                    elif part == "text":
                        compact, ends, longest = ca_kv
                        text = compact[ends[row] : ends[row + 1]], torch.tensor([0, ends[row + 1] - ends[row]]), longest
                        out = (block.ca(block.ca_norm(chosen.float())[None], text)[0] * block.ca_gamma).double()
                    else:
                        y = F.layer_norm(chosen, chosen.shape[-1:], eps=1e-6) * (1 + s2) + t2
                        out = block.ffn(y.float()).double() * g2
                    added.append(standing_in(given, (part, row), out, tokens, keep, step, schedule.grids, scale_ind))
                x = x + torch.stack(added).float()
            return x

        block.forward = forward
    try:
        yield
    finally:
        for block in driven.blocks:
            del block.forward


@contextlib.contextmanager
def hart_by_hand(driven, step: PruneTokens, schedule: ScaleSchedule):
    """The same of HART's look-alike: no AdaLN, no text; places turn a token by its row and column and its prompt's length."""
    for layer, block in enumerate(driven.blocks):
        given = {}

        def attend(row, tokens, y, si, places, caches, block=block):
            sa, (keys, values), queries = block.attn, caches, []
            side = SIDES[si]
            for place, token in zip(tokens, y, strict=True):
                bias = torch.cat((sa.q_bias, sa.zero_k_bias, sa.v_bias)).double()
                q, k, v = (sa.qkv_proj.weight.double() @ token + bias).view(3, HEADS, DIM)
                at = [places[row, place]] if si == 0 else [a / side * SIDES[-1] + places[row, -1] for a in divmod(place, side)]
                rates = (sa.context_rotary_emb if si == 0 else sa.rotary_emb).inv_freq.double()
                angles = torch.cat([rates * float(a) for a in at for _ in range(2)])
                q, k = (t * angles.cos() + torch.cat((-t[:, DIM // 2 :], t[:, : DIM // 2]), 1) * angles.sin() for t in (q, k))
                queries.append(q)
                keys.append(k)
                values.append(v)
            weights = torch.softmax(sa.scale * torch.einsum("qhd,khd->hqk", torch.stack(queries), torch.stack(keys)), -1)
            out = torch.einsum("hqk,khd->qhd", weights, torch.stack(values)).flatten(1)
            return out @ sa.proj.weight.double().T + sa.proj.bias.double()

        def forward(x, si=-1, context_position_ids=None, *, layer=layer, block=block, given=given, attend=attend, **_rest):
            s = si - 1  # the text comes first
            keep = step.at(s) if s >= 0 and step.first_layer <= layer <= step.last_layer else None
            if s < 0:
                given["caches"] = [([], []) for _ in range(x.shape[0])]
            for part in ("attention", "mlp"):
                added = []
                for row in range(x.shape[0]):
                    r, count = x[row].double(), x.shape[1]
                    far = [float((token - r.mean(0)).square().sum()) for token in r]
                    tokens = list(range(count)) if keep is None else sorted(range(count), key=lambda i: -far[i])[:keep]
                    y = block.ln_wo_grad(r[tokens].float())
                    out = block.ffn(y).double()
                    if part == "attention":
                        out = attend(row, tokens, y.double(), si, context_position_ids, given["caches"][row])
                    added.append(standing_in(given, (part, row), out, tokens, keep, step, schedule.grids, s))
                x = x + torch.stack(added).float()
            return x

        block.forward = forward
    try:
        yield
    finally:
        for block in driven.blocks:
            del block.forward


def schedule_of(driven) -> ScaleSchedule:
    return adapters.recognise(driven.model)[1].schedule or ScaleSchedule(tuple(driven.grids()))


def drawn(driven, *steps, rules=(), **given):
    policy = Policy(("AB",) * 3, rules, steps)
    with checks.no_warnings(), adapters.apply(driven.model, checks.attention_of(driven, policy)[0]):
        return checks.draw(driven, **given)


@pytest.mark.parametrize(("kind", "hand", "step", "batch"), [
    (block_lookalikes.Infinity, by_hand, STEP, 1), (block_lookalikes.Infinity, by_hand, STEP, 2),
    (var_hart_lookalikes.Hart, hart_by_hand, PruneTokens(3, (20, 16), 2, 0, 1), 2),
])  # fmt: skip
def test_pruned_tokens_are_the_oracle(kind, hand, step, batch):
    driven = kind()
    plain, before = checks.draw(driven, batch=batch), checks.everything(driven)
    with hand(driven, step, schedule_of(driven)):
        want = checks.draw(driven, batch=batch)
    got = drawn(driven, step, batch=batch)
    assert checks.near(got, want, "fp32") and not checks.near(got, plain, "fp32")
    assert checks.same(checks.draw(driven, batch=batch), plain) and checks.everything(driven) == before


@pytest.mark.parametrize(("kind", "hand"), [(block_lookalikes.Infinity, by_hand), (var_hart_lookalikes.Hart, hart_by_hand)])
def test_by_hand_without_pruning_is_the_model(kind, hand):
    driven = kind()
    plain = checks.draw(driven)
    with hand(driven, dataclasses.replace(STEP, from_scale=6), schedule_of(driven)):
        assert checks.near(checks.draw(driven), plain, "fp32")


def test_the_last_grid_in_rounds_has_all_its_tokens():
    driven = var_hart_lookalikes.Hart()
    step = PruneTokens(4, (16,), 3, 0, 2)  # the last grid, 8x8
    plain = checks.draw(driven, rounds=2)
    assert checks.same(drawn(driven, step, rounds=2), plain) and not checks.same(drawn(driven, step), checks.draw(driven))


def test_with_the_half_dropped_and_rules_before():
    """The half goes between the scale whose outputs are kept and the pruned ones; a rule may stand before those."""
    driven, schedule = block_lookalikes.Infinity(), schedule_of(block_lookalikes.Infinity())
    steps = DropUnconditional(4), STEP
    with by_hand(driven, STEP, schedule), adapters.drop_unconditional(driven.model, 4):
        want = checks.draw(driven, batch=2)
    assert checks.near(drawn(driven, *steps, batch=2), want, "fp32")
    rules = (Rule(3, "A", Pooled(2, 2)),)
    assert not checks.same(drawn(driven, *steps, rules=rules), drawn(driven, *steps))


def test_another_aspect_is_left_alone():
    driven = block_lookalikes.Infinity()
    plain = checks.draw(driven, aspect=1.5)
    policy = Policy(("AA",) * 3, (), (STEP,))
    with adapters.apply(driven.model, checks.attention_of(driven, policy)[0]), pytest.warns(UserWarning, match="own attention"):
        assert checks.same(checks.draw(driven, aspect=1.5), plain)


def test_blocks_of_another_make_are_refused():
    driven = lookalikes.Infinity()
    before, policy = checks.everything(driven), Policy(("AA",) * 4, (), (STEP,))
    with pytest.raises(ValueError, match="prune_tokens: block 1 has no"):
        adapters.apply(driven.model, checks.attention_of(driven, policy)[0])
    assert checks.everything(driven) == before


@pytest.mark.parametrize(("changes", "reason"), [
    ({"from_scale": 0}, "want some of 1..5"), ({"from_scale": 5}, "want some of 1..5"), ({"kept": ()}, "want some of 1..5"),
    ({"cached_scale": 4}, "want 0..3"), ({"last_layer": 3}, "want some of 0..2"), ({"first_layer": 3}, "want some of 0..2"),
    ({"kept": (37, 30)}, "kept=37 at scale 4, want 1..36"), ({"kept": (20, 0)}, "kept=0 at scale 5"),
])  # fmt: skip
def test_what_cannot_be_pruned(changes, reason):
    schedule = schedule_of(block_lookalikes.Infinity())
    assert STEP.why_not(schedule, 3) is None
    assert reason in (dataclasses.replace(STEP, **changes).why_not(schedule, 3) or "")
    ruled = Policy(("A",) * 3, (Rule(4, "A", Pooled(2, 2)),), (STEP,))
    assert "prune_tokens leaves out tokens from scale 4 on; scale 4 has a rule" in ruled.why_not(schedule, 3, 1)


def test_the_published_form():
    for name, last in (("infinity-2b", 27), ("infinity-8b", 27)):
        model = find_model(name)
        step = PruneTokens.published("infinity", model.schedule("1M", "1.000"), model.layers)
        assert step == PruneTokens(9, (615, 800), 8, 3, last)
        other = PruneTokens.published("infinity", model.schedule("1M", "1.333"), model.layers)
        assert other.from_scale == 9 and other.why_not(model.schedule("1M", "1.333"), model.layers) is None
    hart = find_model("hart")
    assert PruneTokens.published("hart", hart.schedule(), hart.layers) == PruneTokens(11, (1152, 1024), 10, 0, 23)
    with pytest.raises(ValueError, match="5 scales, 32 layers: FastVAR wants 6 and 4 at least"):
        PruneTokens.published("infinity", ScaleSchedule.square((1, 2, 3, 4, 5)), 32)
    with pytest.raises(ValueError, match="var: FastVAR has no form for it"):
        PruneTokens.published("var", ScaleSchedule.square((1, 2, 3, 4, 5)), 32)
