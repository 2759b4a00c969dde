"""Nothing that goes wrong in one trial, one file or on a busy machine ends a search or is taken for a result."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from statistics import median

import optuna
import pytest
import replayed
import tiny
from optuna.storages.journal import JournalFileBackend

from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import find_model
from sparvar_tune.catalog.names import CUSTOM
from sparvar_tune.cli import parser
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.measure.pairs import search_pairs
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search import judge as judging
from sparvar_tune.policy_search import menu, storage
from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.planned_trials import FIRST_PRICE, common_price
from sparvar_tune.policy_search.trial import Knobs, Verdict
from sparvar_tune.profile import store
from sparvar_tune.ways import search_here

SHIPPED = store.shipped_folder()
GOOD = Verdict(0.5, 0.5, {"psnr": 35.0, "ssim": 0.97}, True)


def searched(study, judge, trials, shared=None) -> tuple[list, list]:
    """What was told of finished and failed trials once so many were judged."""
    told, broken = [], []
    search.search(study, judge, lambda: len(told) + len(broken) >= trials, told.append, shared, tell_failed=broken.append)
    return told, broken


# --- a trial that fails ---


def breaking(asked, wrong):
    def judge(knobs):
        asked.append(knobs)
        if knobs.form == "paper":
            if isinstance(wrong, Exception):
                raise wrong
            return wrong
        return dataclasses.replace(GOOD, shortfall_db=1.0 - knobs.price_last / 100)

    return judge


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal of its own", "shared journal", "shared database"])
@pytest.mark.parametrize(("wrong", "said"), [
    (ValueError("pictures: got NaN or infinity"), "ValueError: pictures: got NaN or infinity"),
    (RuntimeError("out\nof memory"), r"RuntimeError: out\nof memory"), (MemoryError(), "MemoryError"),
    (dataclasses.replace(GOOD, means={"psnr": math.nan}), "want finite numbers"),
    (dataclasses.replace(GOOD, time_ratio=0.0), "a ratio > 0"),
], ids=["nan", "oom", "memory", "verdict", "no-time"])  # fmt: skip
def test_a_bad_trial_is_kept_told_and_never_asked_again(tmp_path, kind, wrong, said):
    def opened(resume):
        if kind == "journal of its own":
            return search.open_study(tmp_path, "space", 0, resume), None
        url = f"journal://{tmp_path}/x.journal" if kind == "shared journal" else f"sqlite:///{tmp_path}/x.db"
        shared = storage.open_shared(url)
        return search.join_study(shared, "space"), shared

    asked = []
    study, shared = opened(False)
    told, broken = searched(study, breaking(asked, wrong), 4, shared)
    assert [k.form for k in asked] == ["paper", "drop last scale", "priced", "priced"] and len(told) == 3
    assert [f.knobs.form for f in broken] == ["paper"] and said in broken[0].reason and broken[0].reason.isprintable()
    study, shared = opened(True)
    assert search.failed(study) == broken and len(search.finished(study)) == 3
    searched(study, breaking(asked, wrong), 6, shared)
    assert sum(k.form == "paper" for k in asked) == 1 and len(set(asked)) == len(asked) == 10


def test_a_common_price_that_fails_is_taken_for_too_cheap(tmp_path):
    asked = []

    def judge(knobs):
        asked.append(knobs)
        if knobs == common_price(FIRST_PRICE):
            raise ValueError("this one")
        return GOOD

    searched(search.open_study(tmp_path, "space", 0, False), judge, 4)
    assert asked[2] == common_price(FIRST_PRICE) and asked[3].price_last > asked[2].price_last


def test_a_search_in_which_all_fails_ends(tmp_path):
    def judge(_knobs):
        raise RuntimeError("the device is gone")

    study = search.open_study(tmp_path, "space", 0, False)
    _, broken = searched(study, judge, 10**9)
    assert len(broken) == search.FAILURES_IN_A_ROW and not search.finished(study)


def test_what_is_not_the_policys_fault_ends_the_search(tmp_path, monkeypatch):
    def stop(_knobs):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        searched(search.open_study(tmp_path, "space", 0, False), stop, 1)
    full = search.open_study(tmp_path, "space", 0, False)

    def judge(_knobs):
        def no_space(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(JournalFileBackend, "append_logs", no_space)
        return GOOD

    with pytest.raises(OSError, match="No space") as refused:
        searched(full, judge, 3)
    assert refused.value.filename == str(tmp_path / "trials.journal")  # which disk it is


# --- a journal that is damaged ---


def journal(folder: Path) -> list[bytes]:
    """The lines of a sound one with four trials."""
    study = search.open_study(folder, "space", 0, False)
    searched(study, lambda knobs: GOOD, 4)
    return (folder / "trials.journal").read_bytes().splitlines(keepends=True)


DEEP = b"[" * 200_000 + b"\n"
WRONG_LINES = {
    "null": b"null\n", "object": b"{}\n", "list": b"[1]\n", "number": b"7\n", "deep": DEEP, "cut": b'{"op_code": 4, "wor\n',
    "binary": b"\xff\xfe\x00\n", "later optuna": b'{"op_code": 99, "worker_id": "x"}\n', "long number": b"9" * 5000 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_LINES.values(), ids=WRONG_LINES.keys())
@pytest.mark.parametrize("at", [0, 5])
def test_a_journal_with_a_wrong_line_is_set_aside_with_one_line(tmp_path, wrong, at):
    lines = journal(tmp_path)
    lines[at] = wrong
    set_aside(tmp_path, b"".join(lines))


@pytest.mark.parametrize("how", ["renamed", "missing", "text", "null", "nan", "not json"])
@pytest.mark.parametrize("name", ["verdict", "knobs"])
def test_trials_with_other_fields_are_set_aside(tmp_path, how, name):
    def spoilt(text):
        values = json.loads(text)
        field = {"verdict": "time_ratio", "knobs": "price_last"}[name]
        old = values.pop(field)
        other = {"renamed": {"latency_ms": old}, "text": {field: "7"}, "null": {field: None}, "nan": {field: math.nan}}
        values |= other.get(how, {})
        return "{" if how == "not json" else json.dumps(values)

    lines = []
    for line in journal(tmp_path):
        entry = json.loads(line)
        if name in entry.get("user_attr", {}):
            entry["user_attr"][name] = spoilt(entry["user_attr"][name])
        lines.append(json.dumps(entry).encode() + b"\n")
    assert b"".join(lines) != (tmp_path / "trials.journal").read_bytes()
    set_aside(tmp_path, b"".join(lines))


@pytest.mark.parametrize("content", [b"\x00\x01\x02" * 99, b"a text\n", b"[]", b'{"a": 1}\n'])
def test_what_is_no_journal_is_set_aside_whole(tmp_path, content):
    set_aside(tmp_path, content)


def set_aside(folder: Path, content: bytes) -> None:
    path = folder / "trials.journal"
    path.write_bytes(content)
    with pytest.raises(search.DamagedJournal, match=r"trials.journal: ") as refused:
        search.read_trials(folder)
    assert str(refused.value).isprintable()
    said = []
    study = search.open_study(folder, "space", 0, True, said.append)
    assert len(said) == 1 and said[0].isprintable() and "set aside" in said[0] and str(path) in said[0]
    kept = list(folder.glob("trials-*.journal"))
    assert [k.read_bytes()[: len(content)] for k in kept] == [content] and not search.finished(study)
    told, _ = searched(study, lambda knobs: GOOD, 2)
    assert search.read_trials(folder) == told


def test_a_pipe_or_a_folder_in_the_journals_place_does_not_hang(tmp_path):
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "trials.journal")
        with pytest.raises(ValueError, match="not a file"):
            search.read_trials(tmp_path)
        said = []
        study = search.open_study(tmp_path, "space", 0, True, said.append)
        assert len(said) == 1 and len(searched(study, lambda knobs: GOOD, 1)[0]) == 1
        (tmp_path / "trials.journal").unlink()


def test_one_damaged_trial_of_a_shared_storage_is_passed_over(tmp_path):
    shared = storage.open_shared(f"sqlite:///{tmp_path}/shared.db")
    study = search.join_study(shared, "space")
    attrs = {"knobs": json.dumps({"form": "paper", "colour": 3}), "verdict": "{}"}
    study.add_trial(optuna.create_trial(value=1.0, user_attrs=attrs, constraints={search.CONSTRAINT: 1.0}))
    told, _ = searched(study, lambda knobs: GOOD, 3, shared)
    assert search.finished(study) == told and told[0].knobs.form == "paper"


# --- times of a machine that is not always as fast ---


class Weather(replayed.Clock):
    """A clock of a machine that others use: `slow` times as long for everything."""

    def __init__(self) -> None:
        self.passed, self.slow = 0.0, 1.0

    @property
    def now(self) -> float:
        return self.passed

    @now.setter
    def now(self, value: float) -> None:
        self.passed += (value - self.passed) * self.slow


@pytest.fixture
def replay(monkeypatch):
    replayed.install(monkeypatch.setattr)


@pytest.mark.slow
def test_a_trials_time_is_compared_with_dense_beside_it(replay):
    clock = Weather()
    adapter = replayed.Adapter(clock)
    judge = judging.Judge(
        adapter, search_pairs(10, 10), Constraint({"psnr": 30.0, "ssim": 0.9}), 32, adapter.table, lambda text: None, clock
    )
    knobs = Knobs("priced", 14.0, 23.0, 60.0, 0.25)
    first = judge(knobs)
    raw = replayed.recording()["dense"]["rest_ms"]
    spent = sum(adapter.layer_ms(judging.build_policy(knobs, adapter, adapter.table), {}).values())
    assert first.time_ratio == pytest.approx((spent + raw - sum(adapter.dense_ms.values())) / raw)
    for clock.slow in (5.0, 0.2, 3.0):
        again = judge(knobs)
        assert again.time_ratio == pytest.approx(first.time_ratio) and again.complete
        assert judge.best_ratio == pytest.approx(first.time_ratio)


def test_which_pairs_have_a_dense_twin_and_which_is_timed_first_goes_round(replay):
    adapter = replayed.Adapter()
    judge = judging.Judge(
        adapter,
        search_pairs(10, 10),
        Constraint({"psnr": 30.0, "ssim": 0.9}),
        32,
        adapter.table,
        lambda text: None,
        adapter.clock,
    )
    order, finish = [], adapter.finish

    def watched(state, attend, redraw_from=None):
        order.append((judge.pairs.index(state), attend is adapter.dense))
        return finish(state, attend)

    adapter.finish = watched
    twins, first = set(), set()
    for turn in range(6):
        order.clear()
        judge(Knobs("priced", 14.0, 23.0, 60.0, 0.25))
        dense = [pair for pair, is_dense in order if is_dense]
        assert len(dense) == 2 and dense[0] < judging.RACE_AFTER and len(order) == 12, turn
        twins |= set(dense)
        first |= {order[[pair for pair, _ in order].index(pair)][1] for pair in dense}
    assert len(twins) == 6 and first == {True, False}


def test_time_ratio_by_hand():
    assert judging.time_ratio([1.0, 1.0, 2.0, 2.0], {0: 2.0, 3: 4.0}) == 0.5
    assert judging.time_ratio([1.0, 3.0, 8.0], {1: 4.0}) == median([0.25, 0.75, 2.0])


def test_load_from_outside_is_said():
    clock, mine = replayed.Clock(), replayed.Clock()
    watch = Stopwatch("cpu", clock, mine)

    def work(share):
        clock.now += 1.0
        mine.now += share

    assert watch.load() is None and watch(lambda: work(0.95)) == 1000 and watch.load() is None
    watch(lambda: work(0.1))
    assert watch.running == pytest.approx(0.525) and "busy elsewhere" in watch.load() and "52%" in watch.load()
    gpu = Stopwatch("cuda", clock, mine)
    gpu.measured_s = 1.0
    assert gpu.load() is None, "there the host only waits"


# --- a first run ends in a profile, whatever the budget ---

WANTED = Constraint({"psnr": 34.57, "ssim": 0.93})


def tuned(folder, budget_s, shipped, clock=None, said=None, **changes):
    clock = clock or replayed.Clock()
    adapter = replayed.Adapter(clock)
    request = search_here.Request(
        adapter.model, "256", "1.000", GPUS["cpu"], "near-lossless", WANTED, budget_s, 32, 0, False, folder
    )
    request = dataclasses.replace(request, **changes)
    said = [] if said is None else said
    return search_here.tune(request, adapter, said.append, lambda text: None, clock, shipped=shipped)


def test_on_a_slow_machine_the_shipped_policy_is_looked_at_first_and_certified_here(replay, tmp_path):
    policy, clock, said = store.load(SHIPPED / "cpu" / "pocketvar.json").policy, Weather(), []
    clock.slow = 20.0
    made = tuned(tmp_path, 1.0, {"shipped near-lossless": policy}, clock, said)
    trials = [line for line in said if line.endswith("s of search left")]
    assert len(trials) == 1 and "(shipped near-lossless)" in trials[0]
    assert made.policy == policy and made.evidence.n == 32 and clock.now > 1000 and "no time for a search" in "".join(said)
    kept = search.read_trials(tmp_path)
    assert [f.knobs.form for f in kept] == ["shipped near-lossless"] and kept[0].verdict.complete


def test_without_a_shipped_policy_some_trials_are_judged_whatever_the_budget(replay, tmp_path):
    made = tuned(tmp_path, 1e-3, {})
    assert made.trials == search_here.FEWEST_TRIALS and made.evidence.n == 32


@pytest.mark.slow
def test_a_shipped_policy_that_is_worse_gives_way_to_what_is_found(replay, tmp_path):
    adapter = replayed.Adapter()
    dear = menu.assign(adapter.table, adapter.schedule, dict.fromkeys(adapter.scales, 1000.0), 0.0)
    made = tuned(tmp_path, 400.0, {"shipped near-lossless": dear})
    assert made.policy != dear and made.generation.speedup.median > 1.5


def test_other_shipped_policies_are_another_space(replay, tmp_path):
    adapter = replayed.Adapter()
    request = search_here.Request(adapter.model, "256", "1.000", GPUS["cpu"], CUSTOM, WANTED, 1.0, 32, 0, False, tmp_path)
    points = menu.fixed_points(adapter.schedule, 8, 4)
    spaces = {search_here._space(request, adapter, p) for p in (points, {**points, "shipped paper": points["paper"]})}
    assert len(spaces) == 2


def test_what_was_shipped_is_found_by_its_weights(tmp_path, monkeypatch):
    adapter, said = replayed.Adapter(), []
    request = search_here.Request(adapter.model, "256", "1.000", GPUS["cpu"], "paper", WANTED, 1.0, 32, 0, False, tmp_path)
    found = search_here.shipped_policies(request, adapter, said.append)
    shipped = store.load(SHIPPED / "cpu" / "pocketvar--paper.json").policy
    assert found == {"shipped paper": dataclasses.replace(shipped, steps=())} and not said, "it cannot do 8-bit products"
    custom = search_here.shipped_policies(dataclasses.replace(request, preset=CUSTOM), adapter, said.append)
    assert list(custom) == ["shipped near-lossless", "shipped paper", "shipped fast"], "closest first"
    near = dataclasses.replace(request, gpu=GPUS["l40s"], preset="near-lossless")
    assert list(search_here.shipped_policies(near, adapter, said.append)) == ["shipped near-lossless"]
    monkeypatch.setattr(store, "shipped_folder", lambda: tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "pocketvar--paper.json").write_text("{")
    assert search_here.shipped_policies(request, adapter, said.append) == {} and len(said) == 1 and "not begun with" in said[0]
    monkeypatch.setattr(store, "shipped_folder", lambda: SHIPPED)
    adapter.weights_sha256 = "0" * 64
    assert search_here.shipped_policies(request, adapter, said.append) == {}


def test_a_run_that_certifies_nothing_ends_well_with_the_reason(home, monkeypatch, capsys):
    tiny.install(monkeypatch.setattr)

    def nothing(*_, **__):
        raise search_here.NothingMeetsTheBound("nothing is faster than dense here")

    monkeypatch.setattr(search_here, "tune", nothing)
    assert parser.main(["--gpu", "cpu", "--model", "pocketvar"]) == 0
    out = capsys.readouterr().out
    assert "gets no profile of this machine's own: nothing is faster than dense here" in out and "silicon: cpu" in out
    assert parser.main(["--gpu", "cpu", "--model", "pocketvar", "--min-psnr", "150"]) == 2
    assert capsys.readouterr().err == "sparvar-tune: nothing is faster than dense here\n"


def test_where_every_trial_failed_the_reason_is_theirs(replay, tmp_path, monkeypatch):
    monkeypatch.setattr(judging.Judge, "__call__", lambda self, knobs: 1 / 0)
    with pytest.raises(search_here.NothingMeetsTheBound, match=r"all 20 trials failed, the last with: ZeroDivisionError"):
        tuned(tmp_path, 400.0, {})


# --- models of few scales ---


@pytest.mark.parametrize("sides", [(4, 8, 16), (1, 4, 8, 16), (1, 2, 4, 8, 16)], ids=len)
def test_a_model_of_few_scales_is_tuned_from_end_to_end(home, tmp_path, monkeypatch, sides):
    monkeypatch.setattr(tiny, "SIDES", sides)
    tiny.install(monkeypatch.setattr)
    adapter = load_adapter(find_model("pocketvar"), "cpu")
    adapter.steps = ("skip_scales",)  # on a busy machine any step may look fastest, also one that is neither asked for below
    request = search_here.Request(
        adapter.model, "256", "1.000", GPUS["cpu"], CUSTOM, Constraint({"psnr": 1.0, "ssim": -1.0}), 0.1, 4, 0, False, tmp_path
    )
    measured = search_here.compare_on

    def faster(*args, **kwargs):
        trial = measured(*args, **kwargs)
        trial.tuned_ms = [ms / 2 for ms in trial.dense_ms]
        return trial

    monkeypatch.setattr(search_here, "compare_on", faster)
    said = []
    made = search_here.tune(request, adapter, said.append, lambda text: None)
    assert made.evidence.n == 4 and (made.policy.rules or made.policy.skip_scales)
    assert not any("(paper)" in line for line in said) and len(made.workload.grids) == len(sides)


def test_compare_leaves_the_papers_setting_out_of_few_scales(home, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "SIDES", (1, 4, 8, 16))
    tiny.install(monkeypatch.setattr)
    monkeypatch.setattr("sparvar_tune.runtime.load.shipped_folder", lambda: home)  # those are of seven scales
    assert parser.main(["compare", "--gpu", "cpu", "--model", "pocketvar", "--pairs", "2"]) == 0
    said = capsys.readouterr().out
    assert "left out the paper's fixed setting: pocketvar has 4 scales, it needs 6 at least" in said
    assert "\n| dense |" in said and "\n| paper's" not in said


def test_of_few_scales_only_options_that_hide_something_are_offered():
    from sparvar_kernels import Csla
    from sparvar_kernels.geometry.scales import ScaleSchedule

    for sides in ((4, 8, 16), (1, 4, 8, 16), (1, 2, 4, 8, 16)):
        schedule, last = ScaleSchedule.square(sides), len(sides) - 1
        assert any(isinstance(v, Csla) for v in menu.menu(schedule, last).values())
        for scale in range(menu.decision_scale(schedule), len(sides)):
            options = menu.menu(schedule, scale)
            assert len(set(options.values())) == len(options)
            assert (scale == last) == any(isinstance(v, Csla) for v in options.values())
        assert "paper" not in menu.fixed_points(schedule, 2, 2)
    with pytest.raises(ValueError, match="2 scales: a policy acts on the last 3"):
        menu.menu(ScaleSchedule.square((1, 2)), 1)


def test_the_papers_setting_of_a_shallow_model_has_no_rule_that_no_layer_uses():
    from sparvar_kernels import Csla
    from sparvar_kernels.geometry.scales import ScaleSchedule

    policy = menu.paper_policy(ScaleSchedule.square((1, 2, 4, 8, 12, 16)), 1, 2)
    assert policy.rules and all(isinstance(rule.variant, Csla) for rule in policy.rules)
