"""A policy searched on one silicon taken over by another: found by what it is, timed and certified anew, or refused."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from places import ROOT

from sparvar_kernels import Cs4a, Csla, Policy, Rule, Tile
from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import find_model
from sparvar_tune.launch_search.choose import ChosenLaunches
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.policy_search import certify
from sparvar_tune.profile import machine, schema, store
from sparvar_tune.ways import search_here, take_over
from sparvar_tune.ways.search_here import SEARCHED, NothingMeetsTheBound, Request
from sparvar_tune.ways.time_only import Shop

SHIPPED = ROOT / "profiles"
T = schema.Timing(1.0, 1.0, 1.0, 30)


def test_only_a_policy_searched_on_other_silicon_and_these_weights_is_taken_over(tmp_path):
    shipped = store.load(SHIPPED / "cpu" / "pocketvar.json")
    weights = shipped.workload.weights_sha256
    found = take_over.find_policy("pocketvar.json", weights, GPUS["h100-sxm"], (tmp_path, SHIPPED))
    assert found and found[0] == shipped and found[1] == SHIPPED / "cpu" / "pocketvar.json"
    assert take_over.find_policy("pocketvar.json", "0" * 64, GPUS["h100-sxm"], (SHIPPED,)) is None
    near = take_over.find_policy("pocketvar.json", weights, GPUS["h200"], (SHIPPED,))
    assert near and near[1].parent.name == "h100-sxm", "the nearest silicon's, before the CPU's"
    store.save(shipped, tmp_path / "cpu" / "pocketvar.json")
    assert take_over.find_policy("pocketvar.json", weights, GPUS["cpu"], (tmp_path,)) is None, "its own is no other silicon's"
    assert take_over.find_policy("hart.json", weights, GPUS["h100-sxm"], (SHIPPED,)) is None
    taken = dataclasses.replace(shipped, policy_source="searched on h200, certified again here")
    store.save(taken, tmp_path / "cpu" / "pocketvar.json")
    assert take_over.find_policy("pocketvar.json", weights, GPUS["h100-sxm"], (tmp_path,)) is None, "a copy is no source"


@pytest.fixture
def taken_over(monkeypatch, tmp_path):
    """`transfer` on the tiny model, launches not timed; returns a function of the bound and the gain to pretend."""
    tiny.install(monkeypatch.setattr)
    model = find_model("pocketvar")
    adapter = load_adapter(model, "cpu")
    windows = (-1, -1, -1, 3, 3, 5, 5)
    rules = (Rule(6, "A", Csla(windows, 3, Tile(8, 8))), Rule(6, "B", Cs4a(4, 0.5, Tile(4, 4))))
    policy = Policy(("AB", "BA"), rules)
    row = schema.Row(6, "cpu", (("score_elements", 1 << 20),), "measured", "dense", T, T, schema.Speedup(2.0, 2.0, 2.0, 30))
    here = machine.silicon(GPUS["h100-sxm"], False)
    monkeypatch.setattr(search_here, "silicon", lambda gpu, here_: here)
    measured = certify.compare_on

    def run(psnr_db: float, gain: float) -> schema.Profile:
        def compare(*args, **kwargs):
            trial = measured(*args, **kwargs)
            trial.tuned_ms = [ms / gain for ms in trial.dense_ms]
            return trial

        monkeypatch.setattr(take_over, "compare_on", compare)
        monkeypatch.setattr(take_over, "time_launches", lambda *_: ChosenLaunches((row,), 16, ("a note",)))
        bound = Constraint({"psnr": psnr_db, "ssim": 0.0})
        request = Request(model, "256", "1.000", GPUS["h100-sxm"], "near-lossless", bound, 60.0, 12, 0, False, tmp_path)
        source = dataclasses.replace(store.load(SHIPPED / "cpu" / "pocketvar.json"), policy=policy)
        return take_over.transfer(request, adapter, source, Shop(tmp_path), lambda text: None, lambda text: None)

    return run


def test_it_is_certified_again_and_says_where_it_comes_from(taken_over):
    made = taken_over(1.0, 2.0)
    assert made.evidence and made.evidence.n == 12 and made.policy_state == "measured" and made.silicon.gpu == "h100-sxm"
    assert made.policy_source.startswith("searched on cpu (") and made.policy_source != SEARCHED
    assert made.generation and made.generation.speedup.median == pytest.approx(2.0)
    assert [row.scale_index for row in made.rows] == [6] and made.notes[-1] == "a note"


def test_it_is_refused_where_pictures_or_times_do_not_hold(taken_over):
    with pytest.raises(NothingMeetsTheBound, match=r"dB short.*give --search"):
        taken_over(150.0, 2.0)
    with pytest.raises(NothingMeetsTheBound, match=r"no gain.*give --search"):
        taken_over(1.0, 0.9)


def test_trials_of_another_processor_schedule_or_bound_are_of_another_space(monkeypatch, tmp_path):
    """A home folder that moved to another machine: its trials' times are not this one's."""
    tiny.install(monkeypatch.setattr)
    adapter, here = load_adapter(find_model("pocketvar"), "cpu"), machine.silicon(GPUS["cpu"], True)
    request = Request(
        adapter.model,
        "256",
        "1.000",
        GPUS["cpu"],
        "near-lossless",
        Constraint({"psnr": 30.0, "ssim": 0.9}),
        60.0,
        12,
        0,
        True,
        tmp_path,
    )
    spaces = set()
    for silicon in (here, dataclasses.replace(here, name="Another"), dataclasses.replace(here, threads=64)):
        monkeypatch.setattr(search_here, "silicon", lambda gpu, there, s=silicon: s)
        for other in (
            request,
            dataclasses.replace(request, constraint=Constraint({"psnr": 31.0, "ssim": 0.9})),
            dataclasses.replace(request, pairs=8),
        ):
            spaces.add(search_here._space(other, adapter))
    assert len(spaces) == 9 and all(s.startswith("pocketvar-") for s in spaces)
    same = dataclasses.replace(request, seed=5, budget_s=9.0, resume=False)
    assert search_here._space(same, adapter) in spaces
