"""The last word on a policy: how often it may err, on which pictures, in which order; and what `verify` says of it later."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types

import pytest
import replayed
import tiny
import torch
from made_profiles import profile

from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import Pooled
from sparvar_tune import runtime
from sparvar_tune.bitwise.sampling import DenseAttention
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.metrics import MS_SSIM_BETAS, find_metric, ms_ssim_levels
from sparvar_tune.catalog.models import find_model
from sparvar_tune.generation import Precision
from sparvar_tune.measure import pairs as drawing
from sparvar_tune.measure.fidelity import CONFIDENCE, Constraint, compare_pictures, lower_bound, worst_mean
from sparvar_tune.measure.pairs import MOST_PAIRS, held_out_pairs, search_pairs, verify_pairs, yardstick_pairs
from sparvar_tune.policy_search import certify
from sparvar_tune.policy_search.judge import first_touched
from sparvar_tune.profile import store
from sparvar_tune.profile.describe import describe_evidence
from sparvar_tune.profile.schema import Measured
from sparvar_tune.ways import search_here, take_over, verify
from sparvar_tune.ways.subject import Subject

WANTED = Constraint({"psnr": 34.57, "ssim": 0.93})

# --- how often a run may certify what does not meet the bound ---


def test_attempts_together_spend_the_error_probability_and_no_more():
    spent = [1 - certify.confidence_of(attempt) for attempt in range(len(certify.SHARES))]
    assert sum(spent) == pytest.approx(1 - CONFIDENCE, abs=1e-12) and sum(certify.SHARES) <= 1 + 1e-12
    assert all(a >= b > 0 for a, b in itertools.pairwise(spent)) and take_over.ATTEMPT == 0


@pytest.mark.slow
def test_runs_that_try_again_certify_wrongly_in_at_most_five_of_a_hundred():
    """Every candidate's true mean is the bound itself, where a wrong certificate is likeliest; each attempt draws anew."""
    g, runs, n = torch.Generator().manual_seed(0), 2500, 32
    classes = [label for label, _ in held_out_pairs(10, n)]
    levels = 3 * torch.randn(10, generator=g, dtype=torch.float64)
    levels -= levels.mean()
    wrong = 0
    for _ in range(runs):
        for attempt in range(len(certify.SHARES)):
            draws = levels[classes] + 0.6 * torch.randn(n, generator=g, dtype=torch.float64)
            if lower_bound(draws.tolist(), classes, certify.confidence_of(attempt)) >= 0:
                wrong += 1
                break
    deviation = math.sqrt(0.05 * 0.95 / runs)
    assert 0.035 < wrong / runs <= 0.05 + 2 * deviation, wrong / runs


@pytest.fixture
def candidates(monkeypatch):
    """The replayed tuner with `change(trial, attempt)` done to every certification; returns (tune, the certifications)."""
    replayed.install(monkeypatch.setattr)
    measured, seen = search_here.compare_on, []

    def tune(folder, change, budget_s=300.0, wanted=WANTED, **options):
        def compared(adapter, policy, launches, pairs, say, doomed, clock, more):
            trial = measured(adapter, policy, launches, pairs, say, doomed, clock, more)
            seen.append((policy, tuple(pairs)))
            change(trial, len(seen) - 1)
            return trial

        monkeypatch.setattr(search_here, "compare_on", compared)
        clock = replayed.Clock()
        adapter = replayed.Adapter(clock)
        request = search_here.Request(
            adapter.model, "256", "1.000", GPUS["cpu"], "near-lossless", wanted, budget_s, 32, 0, False, folder
        )
        return search_here.tune(request, adapter, lambda text: None, lambda text: None, clock, shipped={}, **options)

    return tune, seen


def worse(by: float):
    def change(trial, attempt):
        if attempt == 0:
            trial.found = [{**f, "psnr": f["psnr"] - by} for f in trial.found]

    return change


@pytest.mark.slow
def test_the_next_attempt_has_its_own_confidence_and_its_own_pictures(candidates, tmp_path):
    tune, seen = candidates
    first = tune(tmp_path / "a", lambda *_: None, 0.1)
    assert first.evidence.confidence == pytest.approx(certify.confidence_of(0)) and len(seen) == 1
    assert seen[0][1] == held_out_pairs(10, 32, 0)
    seen.clear()
    second = tune(tmp_path / "b", worse(0.3))
    assert second.evidence.confidence == pytest.approx(certify.confidence_of(1)) and len(seen) == 2
    assert seen[1][1] == held_out_pairs(10, 32, 1) and seen[0][0] != seen[1][0]
    values = [f["psnr"] for f in tune_again(seen[1])]
    classes = [label for label, _ in seen[1][1]]
    assert second.evidence.of("psnr").bound == pytest.approx(lower_bound(values, classes, certify.confidence_of(1)), abs=1e-3)
    seen.clear()
    third = tune(tmp_path / "c", lambda *_: None, 0.1, attempts=1)
    assert third.evidence.confidence == pytest.approx(certify.confidence_of(1)), "a policy taken over came before"
    assert seen[0][1] == held_out_pairs(10, 32, 1)


@pytest.mark.slow
def test_the_worst_class_is_held_in_the_search_and_in_the_certificate(candidates, tmp_path, monkeypatch):
    """The recording's worst class is 2 dB below the mean. Asked for of it too, a closer policy is found and certified; pictures
    of that class that are worse on held-out pairs alone refuse the first one.
    """
    tiny.stop_after(14, monkeypatch.setattr)
    tune, seen = candidates
    mean_alone = tune(tmp_path / "a", lambda *_: None)
    shown = mean_alone.evidence.of("psnr_worst_class")
    asked = round(shown.mean + 0.4, 1)
    both = Constraint({**WANTED.bounds, "psnr_worst_class": asked})
    held = tune(tmp_path / "b", lambda *_: None, wanted=both)
    found = held.evidence.of("psnr_worst_class")
    assert shown.mean < asked <= found.bound < found.mean and found.required == asked and shown.required is None
    assert held.generation.tuned.p50_ms > mean_alone.generation.tuned.p50_ms, "the search did not hear of the worst class"
    assert f"PSNR of the worst class {found.mean:.2f} dB" in describe_evidence(held.evidence)
    pictures = tune_again(seen[-1])
    classes = [label for label, _ in seen[-1][1]]
    worst = find_metric("psnr_worst_class")
    assert found.bound == pytest.approx(
        worst_mean(worst, [f["psnr"] for f in pictures], classes, held.evidence.confidence), abs=1e-3
    )

    def one_class_worse(trial, _attempt):
        labels = [label for label, _ in trial.pairs]
        trial.found = [{**f, "psnr": f["psnr"] - 6 * (label == 0)} for f, label in zip(trial.found, labels, strict=True)]

    with pytest.raises(search_here.NothingMeetsTheBound):
        tune(tmp_path / "c", one_class_worse, wanted=Constraint({"psnr": 30.0, "psnr_worst_class": asked}))


def tune_again(certified) -> list[dict[str, float]]:
    """The pictures of one certification once more."""
    policy, pairs = certified
    adapter = replayed.Adapter()
    dense, sparse = adapter.dense, replayed.Attention(adapter, policy)
    return [compare_pictures(adapter.finish(pair, sparse), adapter.finish(pair, dense)) for pair in pairs]


def test_what_is_not_certainly_faster_is_not_certified(candidates, tmp_path):
    """The pictures are good every time; times are in the tuned one's favour half of the time."""

    def even(trial, _attempt):
        trial.tuned_ms = [ms * (0.8 if i % 2 else 1.25) for i, ms in enumerate(trial.dense_ms)]

    tune, seen = candidates
    with pytest.raises(search_here.NothingMeetsTheBound):
        tune(tmp_path, even)
    assert 1 <= len(seen) <= len(certify.SHARES) and len({policy for policy, _ in seen}) == len(seen)


def test_the_same_policy_by_other_knobs_is_certified_once(candidates, tmp_path, monkeypatch):
    tune, seen = candidates
    found = search_here.candidates

    def doubled(trials, *short_db):
        return [
            dataclasses.replace(f, knobs=dataclasses.replace(f.knobs, price_last=f.knobs.price_last * (1 + tiny)))
            for f in found(trials, *short_db) for tiny in (0.0, 1e-9, 2e-9)
        ]  # fmt: skip

    monkeypatch.setattr(search_here, "candidates", doubled)

    def slow(trial, _attempt):
        trial.tuned_ms = list(trial.dense_ms)

    with pytest.raises(search_here.NothingMeetsTheBound):
        tune(tmp_path, slow)
    assert len({policy for policy, _ in seen}) == len(seen) > 1


# --- pairs and their order ---


def test_no_two_sets_of_pairs_share_a_seed_however_many_there_are():
    sets = [search_pairs(10, MOST_PAIRS), yardstick_pairs(10, MOST_PAIRS), verify_pairs(10, MOST_PAIRS)]
    sets += [held_out_pairs(10, MOST_PAIRS, attempt) for attempt in (0, 1, 2, 99)]
    seeds = [{seed for _, seed in pairs} for pairs in sets]
    assert all(len(found) == MOST_PAIRS for found in seeds)
    assert len(set().union(*seeds)) == MOST_PAIRS * len(sets)
    for draw in (search_pairs, held_out_pairs, yardstick_pairs, verify_pairs):
        with pytest.raises(ValueError, match="at most 10000"):
            draw(10, MOST_PAIRS + 1)
    with pytest.raises(ValueError, match=r"want 0\.\.99"):
        held_out_pairs(10, 2, 100)
    assert len(certify.SHARES) <= 100 and drawing._SEARCH + MOST_PAIRS <= drawing._HELD_OUT


def test_the_order_of_the_ways_goes_round():
    """Whoever comes first finds caches cold or clocks high: nobody may always be first."""
    replayed_adapter, order = replayed.Adapter(), []

    class Watched(replayed.Attention):
        def __init__(self, name):
            super().__init__(replayed_adapter, replayed_adapter.dense.policy)
            self.name = name

        def reset(self):
            order.append(self.name)

    ways = {name: Watched(name) for name in ("dense", "a", "b")}
    certify.run_pairs(replayed_adapter, ways, search_pairs(10, 6), lambda text: None, clock=replayed_adapter.clock)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == [("dense", "a", "b"), ("a", "b", "dense"), ("b", "dense", "a")] * 2


# --- verify ---


def trial(psnr: list[float], ssim: list[float]) -> certify.Trial:
    found = [{"psnr": p, "ssim": s, "ms_ssim": 0.99} for p, s in zip(psnr, ssim, strict=True)]
    times = [{5: 1.0} for _ in found]
    return certify.Comparison([(0, i) for i in range(len(found))], found, [1.0] * len(found), [0.5] * len(found), times, times)


def test_verify_refutes_what_the_interval_excludes_and_nothing_else():
    """Mean 30 dB, half of the interval by hand: t(0.95, 4) = 2.132 times sqrt(2.5 / 5)."""
    psnr, ssim = [28.0, 29.0, 30.0, 31.0, 32.0], [0.90, 0.91, 0.92, 0.93, 0.94]
    high = 30 + 2.132 * math.sqrt(2.5 / 5)
    for bound, good in ((25.0, True), (high - 0.05, True), (high + 0.05, False), (55.0, False)):
        looks = verify.look_at_pictures(trial(psnr, ssim), {"psnr": bound, "ssim": 0.5})
        assert [look.good for look in looks] == [good, True], bound
        assert f"{bound:.2f}" in looks[0].text and "30.00 dB" in looks[0].text
    high = 0.92 + 2.132 * math.sqrt(0.00025 / 5)
    for bound, good in ((0.5, True), (high - 0.0005, True), (high + 0.0005, False)):
        assert [look.good for look in verify.look_at_pictures(trial(psnr, ssim), {"psnr": 20.0, "ssim": bound})] == [
            True,
            good,
        ], bound


def test_verify_looks_at_the_worst_class_and_not_at_what_it_cannot_measure():
    """Class 1 is 4 dB below class 0: refuted is what its own interval excludes, though the mean bears it out."""
    made = trial([30.0, 26.0, 31.0, 27.0, 32.0, 28.0], [0.9] * 6)
    made.pairs = [(i % 2, i) for i in range(6)]
    for bound, good in ((26.0, True), (28.5, True), (28.9, False)):
        (look,) = verify.look_at_pictures(made, {"psnr_worst_class": bound, "lpips": 0.1})
        assert look.good == good and look.mean == 27, bound
    made.pairs = [(i, i) for i in range(6)]
    assert verify.look_at_pictures(made, {"psnr_worst_class": 31.0}) == ()


# --- pictures of any size ---


@pytest.mark.parametrize("side", [1, 2, 3, 7, 10, 11, 43, 44, 87, 88, 98, 99, 160, 175, 176])
def test_pictures_of_any_size_are_compared(side):
    g = torch.Generator().manual_seed(0)
    dense = torch.rand(1, 3, side, side + 5, generator=g)
    near, far = ((dense + s * torch.randn(dense.shape, generator=g)).clamp(0, 1) for s in (0.01, 0.3))
    same, close, off = (compare_pictures(picture, dense) for picture in (dense, near, far))
    assert same["ssim"] == pytest.approx(1, abs=1e-5) and same["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert off["psnr"] < close["psnr"] < same["psnr"]
    assert all(-1 <= off[name] < close[name] <= 1.00001 for name in ("ssim", "ms_ssim"))


def test_ms_ssim_has_as_many_levels_as_there_is_room_for():
    assert [ms_ssim_levels(side) for side in (11, 43, 44, 98, 99, 175, 176, 4096)] == [1, 2, 3, 3, 4, 4, 5, len(MS_SSIM_BETAS)]


@pytest.mark.filterwarnings("ignore:.*unverified")
@pytest.mark.parametrize(("claimed_db", "claimed_ssim", "good"), [(1.0, 0.1, True), (140.0, 0.1, False), (1.0, 0.9999, False)])
def test_verify_keeps_evidence_as_it_was_measured_or_refutes_it(
    home, tmp_path, monkeypatch, claimed_db, claimed_ssim, good
):  # fmt: skip
    """Invented evidence does not come out as measured today, and what is written says when and by what it was measured."""
    tiny.install(monkeypatch.setattr)
    weights = dataclasses.replace(profile().workload, weights_sha256=None, logit_bound=find_model("pocketvar").logit_bound)
    proof = dataclasses.replace(
        profile().evidence, measured="2001-02-03", weights_sha256=None,
        metrics=(("psnr", Measured(claimed_db + 1, claimed_db, 1.0)), ("ssim", Measured(claimed_ssim, claimed_ssim, 0.1))),
    )  # fmt: skip
    path = tmp_path / "cpu" / "pocketvar.json"
    store.save(profile(workload=weights, evidence=proof, created="2001-02-03"), path)
    tuned = runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))
    measured, drawn, said = verify.compare_on, [], []

    def faster(adapter, policy, launches, pairs, *rest):
        drawn.extend(pairs)
        made = measured(adapter, policy, launches, pairs, *rest)
        made.tuned_ms = [ms / 2 for ms in made.dense_ms]
        made.tuned_scales = [{s: ms / 2 for s, ms in spent.items()} for spent in made.dense_scales]
        return made

    monkeypatch.setattr(verify, "compare_on", faster)
    found = verify.verify(tuned, Subject.of("pocketvar", "cpu").open, 6, 600.0, True, said.append, said.append)
    assert found.good == good, said
    assert tuple(drawn) == verify_pairs(10, 6), "none of the pairs that certified it"
    written = store.user_folder() / "cpu" / "pocketvar.json"
    assert written.exists() == good
    if good:
        assert store.load(written).evidence == proof and store.load(written).created > "2026"


# --- what pictures of a pair share ---


class _Counted:
    """Adapter of a schedule of six grids whose pictures are the scales that a way drew by itself."""

    device, num_classes, schedule = "cpu", 1, tiny.make_model().schedule

    def __init__(self):
        self.begun = []

    def start(self, pair, scale):
        self.begun.append(scale)
        return scale

    def finish(self, state, way):
        return torch.full((1, 3, 16, 16), 0.5)


@pytest.mark.parametrize("begins", [0, 1, 5])
def test_pictures_share_only_what_comes_before_the_first_scale_that_any_way_changes(begins):
    """A step that begins before the decision scale changes scales that were once shared with the dense picture."""
    adapter, steps = _Counted(), (Precision(begins, ((0, 1),)),)
    tuned = types.SimpleNamespace(policy=Policy(("AA", "AA"), (), steps), reset=lambda: None, skip_scales=())
    certify.run_pairs(adapter, {"dense": DenseAttention(1.0), "tuned": tuned}, [(0, 1)], lambda text: None)
    assert adapter.begun == [min(begins, len(adapter.schedule) - 3)]
    rule = Policy.uniform(2, 2, {begins: Pooled(0, 2)})
    assert (rule.from_scale, Policy(("A",)).from_scale) == (begins, None)
    assert first_touched(adapter, [rule, Policy(("A",))]) == min(begins, len(adapter.schedule) - 3)
