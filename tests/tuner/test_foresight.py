"""What is foreseen from a few trials, on a made-up model whose law is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from sparvar_tune.generation import DropUnconditional
from sparvar_tune.policy_search import foresight as f
from sparvar_tune.policy_search import study as s
from sparvar_tune.policy_search.menu import OptionTable, StepOption
from sparvar_tune.policy_search.planned_trials import common_price
from sparvar_tune.policy_search.trial import DEFAULT_TILT, FinishedTrial, Knobs, Verdict

LAW = np.array([3.0, 1.0, 5.0])  # of the third-last, second-last and last scale
WANTED_DB = 30.0
OPTIONS = ("dense", "fine", "rough", "none")


def table(layers: int = 6, heads: int = 4) -> OptionTable:
    """Bolder options take less time and do more harm, to every head and scale by a factor of its own."""
    rng = random.Random(0)
    error = {
        scale: {
            o: tuple(tuple(i**2 * 10 ** rng.uniform(-4, -1) for _ in range(heads)) for _ in range(layers))
            for i, o in enumerate(OPTIONS)
        }
        for scale in (4, 5, 6)
    }
    time = {scale: {o: 2.0 ** (scale - i) for i, o in enumerate(OPTIONS)} for scale in (4, 5, 6)}
    return OptionTable(error, time, {})


def outcome(made: OptionTable, knobs: Knobs, rest: float = 0.0) -> tuple[float, float, np.ndarray]:
    """PSNR by the law, time and errors of a trial, head by head."""
    prices, unit, ms, seen = (knobs.price_third, knobs.price_second, knobs.price_last), made.time_ms[6]["dense"], 0.0, np.zeros(3)
    layers, heads = len(made.error[4]["dense"]), len(made.error[4]["dense"][0])
    for layer, head in itertools.product(range(layers), range(heads)):
        depth = 2 * layer / max(1, layers - 1) - 1
        for i, scale in enumerate((4, 5, 6)):
            weight = unit * math.exp(knobs.tilt * depth) * prices[i]
            o = min(OPTIONS, key=lambda o: made.time_ms[scale][o] + weight * made.error[scale][o][layer][head])
            ms += made.time_ms[scale][o]
            seen[i] += made.error[scale][o][layer][head] * math.exp(DEFAULT_TILT * depth)
    return 30 - 10 * math.log10((rest + float(seen**0.75 @ LAW)) ** (2 / 3)), ms, seen


def trial(number: int, made: OptionTable, knobs: Knobs, rest: float = 0.0) -> FinishedTrial:
    lead, ms, _ = outcome(made, knobs, rest)
    return FinishedTrial(number, knobs, Verdict(ms / 1000, WANTED_DB - lead, {"psnr": lead, "ssim": 0.97}, True))


def test_the_law_is_found_and_few_trials_lean_on_what_is_known():
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.05, 1, (40, 3))
    assert f.fitted(rows, rows @ LAW) == pytest.approx(LAW, rel=0.2)
    known = 7 * np.array(f.RATIO)
    assert f.fitted(rows[:2], rows[:2] @ known) == pytest.approx(known, rel=1e-6)
    assert (f.fitted(rows[:2], np.array([1e-12, 1.0])) > 0).all()


def test_two_trials_are_enough_to_come_close_and_the_rest_is_better_than_any_common_price():
    made = table()
    foresee, found = f.Foresight(made, {}), [trial(i, made, common_price(p)) for i, p in enumerate((30.0, 10.0))]
    assert foresee(found[:1]) is None
    for _ in range(f.PROPOSALS + 1):
        knobs = foresee(found)
        if knobs is None:
            break
        found.append(trial(len(found), made, knobs))
    assert knobs is None, "it never ends"
    kept = min(t.verdict.time_ratio for t in found if t.verdict.shortfall_db <= 0.02)
    common = [trial(0, made, common_price(10 ** (i / 20))) for i in range(-20, 60)]
    assert kept < min(t.verdict.time_ratio for t in common if t.verdict.shortfall_db <= 0)


def test_what_generation_steps_do_is_counted_once():
    made, steps, rest = table(), {"half": StepOption((DropUnconditional(5),))}, 10 ** (-0.15 * (40 - 30))
    halved = made.under(steps["half"].steps)
    alone = FinishedTrial(0, Knobs(form="half"), Verdict(0.8, WANTED_DB - 40, {"psnr": 40.0, "ssim": 0.98}, True))
    on_top = [dataclasses.replace(trial(i + 1, halved, common_price(p), rest)) for i, p in enumerate((30.0, 10.0))]
    found = [alone, *(dataclasses.replace(t, knobs=dataclasses.replace(t.knobs, steps="half")) for t in on_top)]
    foresee = f.Foresight(made, steps)
    assert foresee(found[1:], "half") is None and foresee(found) is None
    knobs = foresee(found, "half")
    assert knobs is not None and knobs.steps == "half"
    assert outcome(halved, knobs, rest)[0] == pytest.approx(WANTED_DB, abs=1.0)


def test_errors_and_times_are_those_of_the_policy_and_some_heads_stand_for_all(monkeypatch):
    made, knobs = table(), Knobs(price_last=8.0, price_second=30.0, price_third=2.0, tilt=0.7)
    _, ms, seen = outcome(made, knobs)
    errors, found = f._Heads(made, ()).run((2.0, 30.0, 8.0), 0.7)
    assert errors == pytest.approx(seen) and found == pytest.approx(ms)
    monkeypatch.setattr(f, "MOST", 6 * len(made.choices()))
    few = f._Heads(made, ())
    assert few.error.shape[1] == 6 and few.run((2.0, 30.0, 8.0), 0.7)[1] == pytest.approx(ms, rel=0.3)


def test_a_search_tries_what_is_foreseen_behind_the_common_price(tmp_path):
    asked: list[int] = []

    def foresee(found, name):
        asked.append(len(found))
        return Knobs(price_last=77.0) if not any(t.knobs.price_last == 77.0 for t in found) else None

    def judge(knobs):
        price = knobs.price_last if knobs.form == "priced" else 1.0
        return Verdict(1 + math.log10(price), 60.0 / price - 1.0, {"psnr": 35.0, "ssim": 0.97}, True)

    study, told = s.open_study(tmp_path, "space", 0, False), []
    s.search(study, judge, lambda: len(told) >= 12, told.append, foresee=foresee)
    at = [t.knobs.price_last for t in told].index(77.0)
    assert 2 < at < 11 and min(asked) == at and told[at].knobs.tilt == DEFAULT_TILT


def test_the_same_trials_are_thought_over_once(monkeypatch):
    """A sampler that repeats a fixed point asks again, with that point twice among the trials."""
    made, asked = table(), []
    fastest = f._Heads.fastest
    monkeypatch.setattr(f._Heads, "fastest", lambda *given: asked.append(given) or fastest(*given))
    foresee, found = f.Foresight(made, {}), [trial(i, made, common_price(p)) for i, p in enumerate((30.0, 10.0))]
    paper = FinishedTrial(2, Knobs(form="paper"), Verdict(0.5, 5.0, {"psnr": 29.0, "ssim": 0.9}, True))
    first = foresee(found)
    assert first is not None and foresee([*found, paper]) == first and len(asked) == 1
    assert foresee([*found, trial(3, made, first)]) != first and len(asked) == 2
