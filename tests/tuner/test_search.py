"""The search on a made-up judge whose optimum is known, and what it keeps when it is stopped."""

from __future__ import annotations

import json
import math
import types

import pytest

from sparvar_kernels import Dense, Policy
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search import judge as judging
from sparvar_tune.policy_search import study as s
from sparvar_tune.policy_search.menu import OptionTable, assign, decision_scale, menu, paper_policy
from sparvar_tune.policy_search.trial import FinishedTrial, Knobs, Verdict, candidates, front
from sparvar_tune.profile.describe import describe
from sparvar_tune.ways import search_here

LATENCY = {"paper": 60.0, "drop last scale": 40.0}


def judge(knobs: Knobs) -> Verdict:
    """Cheaper prices are faster and worse; the bound is met from a price of 60 on, so 60 is the best common price."""
    if knobs.form != "priced":
        return Verdict(LATENCY[knobs.form], 5.0, {"psnr": 29.0, "ssim": 0.9}, True)
    price = math.sqrt(knobs.price_last * knobs.price_second / 1.65)
    latency = 50 + 10 * math.log10(price)
    return Verdict(latency, 60.0 / price - 1.0, {"psnr": 35.0, "ssim": 0.97}, True)


def run(folder, trials: int, judge=judge, resume=False, seed=0):
    study = s.open_study(folder, "space", seed, resume)
    told: list[FinishedTrial] = []
    before = len(s.finished(study))
    s.search(study, judge, lambda: len(s.finished(study)) - before >= trials, told.append)
    return study, told


def test_seeds_come_first_and_the_best_is_found(tmp_path):
    study, told = run(tmp_path, 30)
    assert [f.knobs.form for f in told[:2]] == ["paper", "drop last scale"]
    best = candidates(s.finished(study))[0]
    price = math.sqrt(best.knobs.price_last * best.knobs.price_second / 1.65)
    assert best.verdict.shortfall_db <= 0 and 60 <= price < 75


def test_what_misses_the_bound_or_was_given_up_is_no_candidate():
    good = Verdict(10.0, -1.0, {"psnr": 36.0, "ssim": 0.97}, True)
    found = [
        FinishedTrial(0, Knobs(price_last=1.0), Verdict(1.0, 0.1, {"psnr": 36.0, "ssim": 0.97}, True)),
        FinishedTrial(1, Knobs(price_last=2.0), Verdict(2.0, -1.0, {"psnr": 36.0, "ssim": 0.97}, False)),
        FinishedTrial(2, Knobs(price_last=3.0), good),
        FinishedTrial(3, Knobs(price_last=4.0), Verdict(9.0, 0.0, {"psnr": 36.0, "ssim": 0.97}, True)),
    ]
    assert [f.number for f in candidates(found)] == [3, 2]


def trials(*ratios: float) -> list[FinishedTrial]:
    means = {"psnr": 36.0, "ssim": 0.97}
    return [FinishedTrial(i, Knobs(price_last=i + 1.0), Verdict(r, -1.0, means, True)) for i, r in enumerate(ratios)]


def test_trials_close_to_the_best_are_timed_again_and_the_others_are_not():
    """Minutes apart a machine is faster or slower by more than they differ."""
    found, asked, said = trials(0.40, 0.41, 0.45, 0.47, 0.39999), [], []
    found = candidates(found)

    def timed_again(knobs):
        asked.append([k.price_last for k in knobs])
        return [0.6, 0.5, 0.4, 0.7][: len(knobs)]

    ordered = search_here.in_turn(found, types.SimpleNamespace(timed_again=timed_again), said.append)
    assert asked == [[5.0, 1.0, 2.0, 3.0]]
    assert [f.number for f in ordered] == [1, 0, 4, 2, 3]
    assert said == ["timed again in turn: trial 1 2.50x, trial 0 2.00x, trial 4 1.67x, trial 2 1.43x"]
    for alone in (found[:1], trials(0.4, 0.5)):
        assert search_here.in_turn(alone, None, said.append) == alone and len(said) == 1
    assert search_here.in_turn([], None, said.append) == []


def test_finalists_are_drawn_in_turn_each_from_the_same_state():
    """A machine that slows down while they are timed slows all of them: the order of times is that of their work."""
    drawn, now = [], [0.0]

    class Adapter:
        device = "cpu"

        def finish(self, state, way):
            drawn.append((state, way.name))
            now[0] += way.work * (1 + len(drawn) / 10)  # ever slower

    adapter = Adapter()
    adapter.dense = types.SimpleNamespace(name="dense", work=10.0)
    ways = {1.0: types.SimpleNamespace(name="a", work=4.0), 2.0: types.SimpleNamespace(name="b", work=3.9)}
    references = [judging.Reference(i, None, 0.0) for i in range(5)]
    watch = Stopwatch("cpu", lambda: now[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "make_attention", lambda _, policy: ways[policy])
        judge_ = types.SimpleNamespace(
            adapter=adapter, references=references, stopwatch=watch, policy=lambda knobs: knobs.price_last
        )  # fmt: skip
        a, b = judging.Judge.timed_again(judge_, [Knobs(price_last=1.0), Knobs(price_last=2.0)])
    assert b < a
    assert [name for _, name in drawn] == ["dense", "a", "b", "a", "b", "dense", "b", "dense", "a"]
    assert [state for state, _ in drawn] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_front_is_what_nothing_beats_in_both():
    made = [
        (10.0, 30.0, True),
        (12.0, 29.0, True),
        (11.0, 33.0, True),
        (9.0, 40.0, False),
        (20.0, 36.0, True),
        (20.0, 35.0, True),
    ]
    found = [
        FinishedTrial(i, Knobs(price_last=i + 1.0), Verdict(ms, 0.0, {"psnr": db, "ssim": 0.9}, done))
        for i, (ms, db, done) in enumerate(made)
    ]
    assert [f.number for f in front(found)] == [0, 2, 4]


def test_resume_repeats_nothing_and_fresh_sets_aside(tmp_path):
    study, _ = run(tmp_path, 5)
    numbers = [f.number for f in s.finished(study)]
    study, told = run(tmp_path, 3, resume=True)
    assert [f.number for f in s.finished(study)][:5] == numbers
    assert not {f.knobs for f in told} & {f.knobs for f in s.finished(study)[:5]}
    study, _ = run(tmp_path, 1)
    assert len(s.finished(study)) == 1 and len(list(tmp_path.glob("trials-*.journal"))) == 1


def test_an_interrupt_keeps_finished_trials(tmp_path):
    calls = 0

    def stopped(knobs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return judge(knobs)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 10, stopped)
    study, _ = run(tmp_path, 1, resume=True)
    assert len(s.finished(study)) == 4


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_cut_off(tmp_path, cut):
    study, _ = run(tmp_path, 4)
    journal = tmp_path / "trials.journal"
    raw = journal.read_bytes()
    journal.write_bytes(raw + raw.splitlines()[-1][:cut])
    study, _ = run(tmp_path, 2, resume=True)
    assert len(s.finished(study)) == 6
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_trials_left_running_by_a_kill_are_closed(tmp_path):
    study = s.open_study(tmp_path, "space", 0, False)
    study.ask()
    study = s.open_study(tmp_path, "space", 0, True)
    assert [t.state.name for t in study.trials] == ["FAIL"]


def test_other_spaces_do_not_mix(tmp_path):
    run(tmp_path, 3)
    assert s.finished(s.open_study(tmp_path, "other space", 0, True)) == []


SCHEDULE = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16))


def table() -> OptionTable:
    menus = {s: list(menu(SCHEDULE, s)) for s in (4, 5, 6)}
    time = {
        s: {n: 1.0 if n == "dense" else 0.1 * (i + 1) / len(names) for i, n in enumerate(names)} for s, names in menus.items()
    }
    # head 0 of both layers is hurt by everything but cs4a 0.12, head 1 by nothing; at scale 4 everything hurts both
    free = ("dense", "cs4a 0.12 8x16")
    error = {
        s: {n: tuple((0.0 if n in free else 0.5, 0.5 * (s == 4 and n != "dense")) for _ in range(2)) for n in names}
        for s, names in menus.items()
    }
    deciding = {n for n, variant in menu(SCHEDULE, 6).items() if variant.decision_scale is not None}
    return OptionTable(error, time, dict.fromkeys(deciding, 0.01))


def same(price: float) -> dict[int, float]:
    return dict.fromkeys((4, 5, 6), price)


def test_prices_choose_options():
    cheap, dear = (assign(table(), SCHEDULE, same(p), 0.0) for p in (1e-6, 1e3))
    assert describe(cheap).count("dense") == 0
    names = [type(dear.variant(0, h, 6)).__name__ for h in range(2)]
    assert names == ["Cs4a", "Pooled"] and dear.variant(0, 0, 6).top_k == 0.12
    assert isinstance(dear.variant(0, 0, 4), Dense) and isinstance(dear.variant(0, 1, 4), Dense)
    for policy in (cheap, dear):
        assert policy.why_not(SCHEDULE, 2, 2) is None


def test_what_decides_pays_at_the_decision_scale_and_needs_dense_there():
    made = table()
    for choice, ms in made.choices().items():
        deciding = {o for o in choice if o in made.decision_ms}
        assert choice[0] == "dense" or not deciding
        assert ms == pytest.approx(sum(made.time_ms[s][o] for s, o in zip((4, 5, 6), choice, strict=True)) + 0.01 * len(deciding))
    assert ("pooled 2 from 1", "csla 8x16", "pooled 2 from 3") in made.choices()


def test_more_choices_than_letters_keep_the_commonest():
    names = {s: list(menu(SCHEDULE, s)) for s in (4, 5, 6)}
    heads = [(a, b) for a in names[5] for b in names[6]]  # every head loves another pair of options

    def errors(s, n):
        return tuple(0.0 if n == (pair[s - 5] if s > 4 else "dense") else 1.0 for pair in heads)

    made = OptionTable({s: {n: (errors(s, n),) for n in names[s]} for s in names}, table().time_ms, table().decision_ms)
    policy = assign(made, SCHEDULE, same(1e3), 0.0)
    assert len(set(policy.heads[0])) == 52 < len(heads) and policy.why_not(SCHEDULE, 1, len(heads)) is None


def test_tilt_favours_late_layers():
    policy = assign(table(), SCHEDULE, same(0.2), 2.0)
    assert policy.variant(0, 0, 6) != policy.variant(1, 0, 6)
    assert policy.variant(1, 0, 6).top_k == 0.12


def test_every_option_is_legal():
    infinity = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    for schedule in (SCHEDULE, infinity, ScaleSchedule(((2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16)), prefix=300)):
        for scale in range(decision_scale(schedule), len(schedule)):
            for variant in menu(schedule, scale).values():
                assert Policy.uniform(2, 2, {scale: variant}).why_not(schedule, 2, 2) is None


def test_the_papers_policy_on_infinity_8b():
    """Layers 0..10 CS4A at scales 11 and 12 (decided at 10), the other 29 CSLA at 10, 11 and 12."""
    infinity = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    policy = paper_policy(infinity, 40, 28)
    assert policy.why_not(infinity, 40, 28) is None
    kinds = {(layer, s): policy.variant(layer, 0, s).kind for layer in (0, 10, 11, 39) for s in (9, 10, 11, 12)}
    assert {k for (layer, s), k in kinds.items() if layer <= 10 and s >= 11} == {"cs4a"}
    assert {k for (layer, s), k in kinds.items() if layer > 10 and s >= 10} == {"csla"}
    assert {k for (layer, s), k in kinds.items() if s == 9 or (layer <= 10 and s == 10)} == {"dense"}
    csla, cs4a = policy.variant(39, 0, 12), policy.variant(0, 0, 12)
    assert csla.windows == (-1,) * 8 + (1, 1, 3, 5, 7) and csla.sinks == 5 and csla.form == "block128"
    assert cs4a.keys == "index" and cs4a.top_k == 0.2 and cs4a.bands == (7, 9) and str(cs4a.tile) == "raster192"
    with pytest.raises(ValueError, match="at least 6"):
        paper_policy(ScaleSchedule.square((1, 2, 3)), 4, 4)


@pytest.mark.parametrize(("shortfall", "psnr", "todo"), [
    (2.0, 30.0, "Ask for less with --min NAME=VALUE, or give more --budget"),
    (2.0, 40.0, "Ask for less with --min NAME=VALUE, or give more --pairs"), (-1.0, 40.0, "Give more --budget, or more --pairs"),
])  # fmt: skip
def test_what_to_do_where_nothing_certifies(monkeypatch, shortfall, psnr, todo):
    """A mean that is enough wants a narrower bound, not a lower one."""
    found = FinishedTrial(0, Knobs(), Verdict(0.5, shortfall, {"psnr": psnr, "ssim": 0.9}, True))
    monkeypatch.setattr(search_here, "finished", lambda study: [found])
    monkeypatch.setattr(search_here, "failed", lambda study: [])
    request = types.SimpleNamespace(constraint=Constraint({"psnr": 35.0}))
    for certified in (False, True):
        assert f"nothing written. {todo}" in search_here._best_reachable(None, request, certified)


def test_what_lacks_the_margin_alone_is_a_candidate_where_nothing_else_is():
    short = [FinishedTrial(i, Knobs(price_last=1.0 + i), Verdict(0.5 - i / 100, by, {"psnr": 34.0}, True))
             for i, by in enumerate((0.05, 0.1, 0.2))]  # fmt: skip
    assert candidates(short) == [] and [f.number for f in candidates(short, judging.MARGIN_DB)] == [1, 0]
