"""Generation steps in the search, on recorded numbers: a model that is pocketvar's recording and has guidance besides."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

import pytest
import replayed
import tiny
import torch

from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.generation import DropUnconditional, SkipScales, drop_from, skip_from
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.policy_search import judge
from sparvar_tune.policy_search.menu import assign, step_menu
from sparvar_tune.policy_search.planned_trials import FIRST_PRICE, PRICE_STEPS, SCALE_WEIGHTS, common_price, next_planned, roomy
from sparvar_tune.policy_search.trial import FinishedTrial, Knobs, Verdict, from_json
from sparvar_tune.profile import schema
from sparvar_tune.ways import search_here

PAIRS = 20
DROP, SKIP = DropUnconditional.kind, SkipScales.kind


class Guided(replayed.Adapter):
    """A made-up model with both halves of guidance, whose errors add whatever they come from.

    harm: squared error (as the table's) of the half dropped from a scale on, per scale; skip: of the last scale left out; thin:
    of tokens left out at it, which saves `light` of its attention's time and of all beside attention.
    """

    def __init__(self, clock, can=(SKIP, DROP), harm: float = 1e-3, skip: float = 1e9, thin: float = 0.0, light: float = 0.0):
        self.steps, self.harm, self.skip, self.thin, self.light = can, harm, skip, thin, light
        super().__init__(clock)

    def _halved(self, policy: Policy, s: int) -> bool:
        begin = drop_from(policy)
        return begin is not None and s >= begin

    def layer_ms(self, policy, launches):
        thin = (12,) if _thins(policy) else ()
        return {
            (layer, s): ms / (1 + self._halved(policy, s)) * (1 - self.light * (s in thin))
            for (layer, s), ms in super().layer_ms(policy, launches).items()
        }

    def other_ms(self, policy):
        """Of every scale as much as its tokens are of all, half of it where the half is dropped, none where it is left out."""
        tokens = {s: self.schedule.num_queries(s) for s in self.scales if s not in policy.skip_scales}
        every = sum(self.schedule.num_queries(s) for s in self.scales)
        whole = super().other_ms(Policy(policy.heads, policy.rules)) * (1 - self.light * _thins(policy))
        return whole * sum(n / (1 + self._halved(policy, s)) for s, n in tokens.items()) / every

    def psnr(self, policy):
        fit, error = replayed.recording()["fit"], 0.0
        if policy == self.paper:
            return super().psnr(policy)
        for weight, s in zip(SCALE_WEIGHTS, reversed(self.scales), strict=True):
            for layer, rows in enumerate(self.table.error[s]["dense"]):
                for head in range(len(rows)):
                    error += weight * self.table.error[s][self._option(policy.variant(layer, head, s), s)][layer][head]
            error += weight * self.harm * self._halved(policy, s)
        error += self.skip * bool(policy.skip_scales) + self.thin * _thins(policy)
        return fit["a"] - fit["b"] * math.log10(max(error, 1e-9))

    def finish(self, state, attend, redraw_from=None):
        policy = getattr(attend, "inner", attend).policy
        if not policy.steps:
            return super().finish(state, attend, redraw_from)
        nothing = torch.empty(1, 1, 0, 1)
        for s in self.scales:
            for layer in range(self.model.layers):
                if s not in policy.skip_scales:
                    attend(nothing, nothing, nothing, layer, s)
        self.clock.now += self.other_ms(policy) / 1e3
        noise, texture, signs = replayed.picture_parts(*state)
        levels = replayed.recording()["class_levels"]
        return texture + signs * 10 ** (-(self.psnr(policy) + levels[state[0]] - fmean(levels) + noise) / 20)


def _thins(policy: Policy) -> bool:
    return any(step.thins for step in policy.steps)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[schema.Profile, list[str]]:
    return run(tmp_path_factory.mktemp("both"), 10)


def run(folder: Path, trials: int, **options) -> tuple[schema.Profile, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        replayed.install(patch.setattr)
        tiny.stop_after(trials, patch.setattr)
        return tune(folder, **options)


def tune(folder: Path, **options) -> tuple[schema.Profile, list[str]]:
    clock, said = replayed.Clock(), list[str]()
    adapter = Guided(clock, **options)
    request = search_here.Request(
        adapter.model, "256", "1.000", GPUS["cpu"], "near-lossless", Constraint({"psnr": 34.57}), 1e4, PAIRS, 7, False, folder
    )
    return search_here.tune(request, adapter, said.append, lambda text: None, clock), said


def test_steps_and_attention_are_certified_as_one_policy(tmp_path, both):
    """What the half dropped costs leaves room, so both are taken; the evidence is of the two together."""
    profile, said = both
    policy, proof = profile.policy, profile.evidence
    assert drop_from(policy) is not None and policy.rules and skip_from(policy) is None
    assert proof.of("psnr").bound >= 34.57 and dict(proof.meaning)[DROP] == dict(profile.meaning)[DROP] == 1
    assert schema.from_json(schema.to_json(profile), "f").policy == policy
    wanted = Guided(replayed.Clock()).psnr(policy)
    assert abs(proof.of("psnr").mean - wanted) < 0.4, "certified with the steps left out"
    alone, _ = run(tmp_path, 6, can=())
    assert not alone.policy.steps and profile.generation.tuned.p50_ms < 0.9 * alone.generation.tuned.p50_ms
    steps = Policy(policy.heads, (), policy.steps)
    adapter = Guided(replayed.Clock())
    only = replayed.recording()["dense"]["start_ms"] + adapter.other_ms(steps) + sum(adapter.layer_ms(steps, {}).values())
    assert profile.generation.tuned.p50_ms < 0.9 * only
    assert sum("drop half" in line and " trial " in line for line in said) >= 5


def test_a_step_that_misses_the_bound_alone_is_looked_at_once(tmp_path):
    profile, said = run(tmp_path, 10, harm=10.0)
    trials = [line for line in said if " trial " in line]
    assert not profile.policy.steps
    assert sum("drop half" in line for line in trials) == 1 and sum("(drop last scale)" in line for line in trials) == 1


def test_a_model_without_guidance_is_never_asked_to_drop_a_half(tmp_path):
    _, said = run(tmp_path, 4, can=(SKIP,), skip=1e-3)
    assert not any("drop half" in line for line in said)
    assert any("prices" in line and "drop last scale" in line for line in said), "a scale left out leaves room for attention"


@pytest.mark.slow
@pytest.mark.parametrize(("light", "taken"), [(0.1, False), (0.95, True)])
def test_pruning_that_cannot_overtake_costs_a_trial_a_strength_and_is_said(tmp_path, light, taken):
    """Where tokens are left out no rule may stand: what attention saves at the last scale is lost, as the table says."""
    profile, said = run(tmp_path, 14, can=(SKIP, "prune_tokens"), light=light)
    trials = [line for line in said if " trial " in line and "tokens at 12" in line]
    alone, on_top = (sum(("prices" in line) == priced for line in trials) for priced in (False, True))
    assert alone == 2 and (on_top > 0) == taken
    lines = [line for line in said if "not taken: 75 % of tokens at 12" in line]
    assert len(lines) == (not taken) and all("at most with attention on top; the best is" in line for line in lines)
    assert _thins(profile.policy) == taken
    _, said = run(tmp_path, 8, can=(SKIP, "prune_tokens"), light=light, thin=1e3)
    assert any("not taken: 75 % of tokens at 12 (misses the bound by" in line for line in said)
    assert not any("50 % of tokens" in line for line in said), "a stronger one was looked at"


def test_both_steps_where_both_leave_room(tmp_path):
    profile, _ = run(tmp_path, 13, harm=1e-4, skip=1e-3)
    assert skip_from(profile.policy) == 12 and drop_from(profile.policy) is not None and profile.policy.rules
    assert [row.scale_index for row in profile.rows] == sorted({r.scale_index for r in profile.policy.rules})
    assert 12 not in {r.scale_index for r in profile.policy.rules}


def test_the_same_seed_with_steps_gives_the_same_profile(tmp_path, both):
    assert schema.to_json(run(tmp_path, 10)[0]) == schema.to_json(both[0])


# The parts


def test_the_menu_of_steps():
    schedule = replayed.Adapter().schedule
    assert step_menu(schedule, (), 1) == {} and list(step_menu(schedule, (SKIP,), 1)) == ["drop last scale"]
    full = step_menu(schedule, (SKIP, DROP), 1)
    assert list(full) == [
        "drop last scale", "drop half from 12", "drop half from 11", "drop half from 10",
        "drop half from 11, drop last scale", "drop half from 10, drop last scale",
    ]  # fmt: skip
    assert full["drop half from 10"].after == ("drop half from 11",)
    cut = step_menu(schedule, (DROP, "cache_budget"), 1)
    both = {name: option.after for name, option in cut.items() if len(option.steps) > 1}
    keys = "50 % of cached keys at 12"
    assert both == {f"drop half from {s}, {keys}": (f"drop half from {s}", keys) for s in (11, 10)}
    for menu in (full, cut):
        for option in menu.values():
            assert Policy(("A",), (), option.steps).why_not(schedule, 1, 1) is None
            assert set(option.after) <= set(menu)


def test_prices_know_what_a_step_leaves_to_gain():
    """At a scale left out no head is told anything; where a half is dropped, time is worth half as much beside error."""
    table, schedule = replayed.recorded_table(), replayed.Adapter().schedule
    prices = dict.fromkeys(table.time_ms, 10.0)
    skip = (SkipScales.last(schedule),)
    less = assign(table, schedule, prices, 0.0, skip)
    assert less.steps == skip and less.why_not(schedule, 8, 4) is None
    assert {r.scale_index for r in less.rules} <= {10, 11} and {r.scale_index for r in assign(table, schedule, prices, 0.0).rules}
    thinned = assign(table, schedule, prices, 0.0, step_menu(schedule, ("cache_budget",), 8)["75 % of cached keys at 12"].steps)
    assert thinned.why_not(schedule, 8, 4) is None and {r.scale_index for r in thinned.rules} <= {10, 11}
    dropped = assign(table, schedule, prices, 0.0, (DropUnconditional(10),))
    doubled = assign(table, schedule, {s: 2 * p for s, p in prices.items()}, 0.0)
    assert (dropped.heads, dropped.rules) == (doubled.heads, doubled.rules) != (
        assign(table, schedule, prices, 0.0).heads, assign(table, schedule, prices, 0.0).rules
    )  # fmt: skip


def verdict(ratio: float, shortfall: float, complete: bool = True) -> Verdict:
    return Verdict(ratio, shortfall, {"psnr": 35.0}, complete)


def test_what_is_planned_with_steps():
    points = ("drop last scale", "drop half from 12", "drop half from 11")
    steps = {"drop last scale": (), "drop half from 12": (), "drop half from 11": ("drop half from 12",)}
    found: list[FinishedTrial] = []

    def planned() -> Knobs | None:
        return next_planned(found, (), points, steps)

    def judged(knobs: Knobs, said: Verdict) -> None:
        found.append(FinishedTrial(len(found), knobs, said))

    for form, said in (("drop last scale", verdict(0.5, 1.0)), ("drop half from 12", verdict(0.8, -2.0))):
        assert planned() == Knobs(form=form)
        judged(Knobs(form=form), said)
    assert planned() == Knobs(form="drop half from 11"), "the weaker one left room"
    judged(planned(), verdict(0.7, 0.1, complete=False))
    assert roomy(found, steps) == ["drop half from 12"]
    assert planned() == common_price(FIRST_PRICE, "drop half from 12")
    for _ in range(PRICE_STEPS):
        judged(planned(), verdict(0.6, -0.1))
    assert planned() == common_price(FIRST_PRICE), "then attention alone"


def test_trials_from_before_there_were_steps_are_read():
    old = '{"form": "priced", "price_last": 1.0, "price_second": 2.0, "price_third": 3.0, "tilt": 0.5}'
    assert from_json(Knobs, old) == Knobs("priced", 1.0, 2.0, 3.0, 0.5)
    with pytest.raises(ValueError, match="tilt"):
        from_json(Knobs, old.replace(', "tilt": 0.5', ""))


def test_what_an_adapter_cannot_do_is_not_judged():
    adapter = Guided(replayed.Clock(), can=(SKIP,))
    knobs = Knobs(steps="drop half from 12")
    with pytest.raises(KeyError):
        judge.build_policy(knobs, adapter, adapter.table)
    with pytest.raises(ValueError, match="the adapter of pocketvar cannot do that"):
        judge.make_attention(adapter, Policy(("AAAA",) * 8, (), (DropUnconditional(12),)))
