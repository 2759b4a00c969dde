"""The whole tuner on recorded numbers: it is a function of its seed, and it finds what there is to find."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import replayed

from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.policy_search import judge
from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.planned_trials import SCALE_WEIGHTS
from sparvar_tune.policy_search.trial import HIGH_PRICE, LOW_PRICE, Knobs, Verdict, candidates
from sparvar_tune.profile import schema
from sparvar_tune.ways import search_here

WANTED = Constraint({"psnr": 34.57, "ssim": 0.93})
NEEDED_DB = WANTED.bounds["psnr"] + 0.45  # of a trial's mean: the judge's margin and what the confidence bound takes
TRIALS, BUDGET_S = 20, 400.0


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed.install(monkeypatch.setattr)


def run(folder: Path, seed: int, storage: str | None = None) -> tuple[str, schema.Profile, list[str], float]:
    """The profile file's text, the profile, what was said, and the seconds of the replayed clock."""
    clock, said = replayed.Clock(), list[str]()
    adapter = replayed.Adapter(clock)
    request = search_here.Request(
        adapter.model, "256", "1.000", GPUS["cpu"], "near-lossless", WANTED, BUDGET_S, 32, seed, False, folder, storage
    )
    profile = search_here.tune(request, adapter, said.append, lambda text: None, clock)
    return schema.to_json(profile), profile, said, clock.now


@pytest.mark.slow
def test_the_same_seed_gives_the_same_profile_byte_for_byte(tmp_path):
    first, second, other = (run(tmp_path / str(i), seed) for i, seed in enumerate((7, 7, 8)))
    assert first[0].encode() == second[0].encode() and first[2:] == second[2:]
    assert first[2] != other[2], "the seed changes nothing"


@pytest.mark.slow
def test_the_profile_says_what_the_recording_says(tmp_path):
    _, profile, said, seconds = run(tmp_path, 0)
    assert seconds < BUDGET_S and sum(" trial " in line for line in said) >= 8
    adapter, raw = replayed.Adapter(), replayed.recording()
    dense = raw["dense"]["start_ms"] + raw["dense"]["rest_ms"]
    assert profile.generation.dense.p50_ms == pytest.approx(dense)
    kernel = search_here.KERNELS[search_here.kernel_for("cpu")]
    best = min(factor(kernel.name, values) for values in search_here.combinations(kernel.config.space()))
    assert [factor(row.kernel, dict(row.config)) for row in profile.rows] == [best] * len(profile.rows)
    launches = {row.scale_index: search_here.Launch(row.kernel, kernel.config(**dict(row.config))) for row in profile.rows}
    spent = sum(adapter.layer_ms(profile.policy, launches).values()) + adapter.other_ms(profile.policy)
    assert profile.generation.tuned.p50_ms == pytest.approx(raw["dense"]["start_ms"] + spent)
    assert abs(profile.evidence.of("psnr").mean - adapter.psnr(profile.policy)) < 0.4
    assert profile.evidence.of("psnr").bound >= WANTED.bounds["psnr"]


def factor(kernel: str, values: dict[str, int]) -> float:
    return replayed.launch_factor(search_here.Launch(kernel, search_here.KERNELS[kernel].config(**values)))


@pytest.mark.slow
def test_a_run_that_joins_certifies_the_best_of_all_trials(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    _, first, _, _ = run(tmp_path / "a", 0, url)
    _, second, said, _ = run(tmp_path / "b", 0, url)
    assert f"going on after {first.trials} finished trials" in said[1] and second.trials > first.trials
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert sum("(paper)" in line for line in said) == 0
    assert second.generation.tuned.p50_ms <= first.generation.tuned.p50_ms
    _, alone, _, _ = run(tmp_path / "c", 0)
    assert alone.trials < second.trials


class World:
    """What policies take and do to the picture if a unit of error weighs `weights` (by scale) and exp(+-tilt) over layers."""

    def __init__(self, weights: numpy.ndarray, tilt: float) -> None:
        self.adapter = replayed.Adapter()
        table, raw = self.adapter.table, replayed.recording()
        self.choices = table.choices()
        self.ms = numpy.array(list(self.choices.values()))
        self.error = numpy.array([
            [[[table.error[s][choice[i]][layer][head] for choice in self.choices] for head in range(4)] for layer in range(8)]
            for i, s in enumerate(table.error)
        ])  # fmt: skip
        self.unit = table.time_ms[self.adapter.scales[-1]]["dense"]
        self.truth = weights[:, None, None] * numpy.exp(tilt * numpy.linspace(-1, 1, 8))[None, :, None]
        self.other_ms, self.fit = raw["dense"]["rest_ms"] - sum(self.adapter.dense_ms.values()), raw["fit"]

    def outcome(self, prices: tuple[float, ...], tilt: float) -> tuple[float, float]:
        """(ms of a rest, PSNR in dB) of what `policies.assign` gives; prices as in `Knobs`, last scale first."""
        weight = self.unit * numpy.exp(tilt * numpy.linspace(-1, 1, 8))[:, None, None]
        chosen = (self.ms + weight * numpy.einsum("s,slhc->lhc", numpy.array(prices[::-1]), self.error)).argmin(-1)
        wrong = (self.truth * numpy.take_along_axis(self.error, chosen[None, ..., None], -1)[..., 0]).sum()
        return float(self.ms[chosen].sum()) + self.other_ms, self.fit["a"] - self.fit["b"] * math.log10(max(wrong, 1e-9))

    def judge(self, knobs: Knobs) -> Verdict:
        if knobs.form != "priced":
            row = replayed.recording()[knobs.form]
            return Verdict(row["rest_ms"], NEEDED_DB - row["psnr_db"], {"psnr": row["psnr_db"], "ssim": 0.92}, True)
        ms, psnr = self.outcome(knobs.prices, knobs.tilt)
        return Verdict(ms, NEEDED_DB - psnr, {"psnr": psnr, "ssim": 0.97}, True)

    def best_ms(self) -> float:
        """Of 3000 random settings of the knobs and 3000 steps around the best of them."""
        rng = numpy.random.default_rng(0)
        best, at = math.inf, numpy.zeros(4)
        for i in range(6000):
            if i < 3000 or best == math.inf:
                x = numpy.append(rng.uniform(math.log10(LOW_PRICE), math.log10(HIGH_PRICE), 3), rng.uniform(-2, 2))
            else:
                x = at + rng.normal(0, 0.15, 4)
            ms, psnr = self.outcome(tuple(10 ** x[:3]), x[3])
            if psnr >= NEEDED_DB and ms < best:
                best, at = ms, x
        return best

    def found_ms(self, folder: Path, seed: int) -> float:
        folder.mkdir()
        study = search.open_study(folder, "world", seed, False)
        search.search(study, self.judge, lambda: len(search.finished(study)) >= TRIALS, lambda found: None)
        return candidates(search.finished(study))[0].verdict.time_ratio


ASSUMED = numpy.array(SCALE_WEIGHTS[::-1])


def test_the_world_is_the_tuners(tmp_path):
    world, knobs = World(ASSUMED, 0.0), Knobs("priced", 14.0, 9.0, 60.0, 0.5)
    policy = judge.build_policy(knobs, world.adapter, world.adapter.table)
    ms, psnr = world.outcome(knobs.prices, knobs.tilt)
    assert ms == pytest.approx(sum(world.adapter.layer_ms(policy, {}).values()) + world.other_ms)
    assert psnr == pytest.approx(world.adapter.psnr(policy))


@pytest.mark.slow
def test_on_the_recording_every_seed_comes_within_5_percent_of_the_best(tmp_path):
    world = World(ASSUMED, 0.0)
    best = world.best_ms()
    assert [seed for seed in range(10) if world.found_ms(tmp_path / str(seed), seed) > 1.05 * best] == []


@pytest.mark.slow
def test_where_errors_weigh_otherwise_than_assumed(tmp_path):
    """Ten worlds whose scales and layers weigh by chance: there the one common price is off, and TPE must make up for it."""
    over = []
    for seed in range(10):
        rng = numpy.random.default_rng(seed)
        world = World(ASSUMED * numpy.exp(rng.normal(0, 0.5, 3)), float(rng.uniform(-1, 1)))
        over.append(world.found_ms(tmp_path / str(seed), seed) / world.best_ms() - 1)
    assert sorted(over)[5] < 0.04 and max(over) < 0.08, over
