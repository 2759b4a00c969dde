"""Facts that need no stable clock, for `make bench`, which holds them against baseline.json: counts, binaries, ratios, replays.

Each test leaves its facts in pytest-benchmark's file, beside the times of what it ran; `python -m lab.bench_baseline` compares.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy
import pytest
import replayed
import torch
from benchmark_cases import CASES, POOLED, tiny_call
from interpreted import in_interpreter
from places import ROOT

from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import version_of
from sparvar_tune.profile.reader import Reader
from sparvar_tune.regression import binaries
from sparvar_tune.regression.baseline import Fact, count
from sparvar_tune.regression.counts import Counts, counted
from sparvar_tune.regression.profile_facts import compiled
from sparvar_tune.ways import search_here

COMPILED = (
    "CSLA 8x8, last scale", "CS4A 10 % 8x16, with residual", "CSLA 8x8, last scale, fp32", "HART CSLA 8x8, 300 text tokens",
    "decision scale 40: dense, mass, lists, residual",
)  # fmt: skip
WANTED = Constraint({"psnr": 34.57, "ssim": 0.93})
HOPPER = ("infinity-8b", "hart")  # their rows are run by warps that fetch
TORCH = f"torch {torch.__version__.partition('+')[0]}"


@pytest.fixture
def told(benchmark, request):
    """`told(facts)`; skips where nobody asked for benchmarks: `make test` has tests of what measures them."""
    if benchmark.disabled:
        benchmark(int)  # it wants to be used
        pytest.skip("make bench")

    def tell(facts: list[Fact]) -> None:
        benchmark.extra_info["facts"] = [fact.plain for fact in facts]

    return tell


@pytest.mark.parametrize("name", [*CASES, POOLED.name])
def test_counts_of_a_call_on_a_cpu(told, benchmark, name):
    _, _, call = tiny_call(name)
    benchmark.pedantic(call, rounds=3)
    told(counted(call).facts(f"tiny {name}", f"{TORCH} on cpu"))


def test_counts_of_a_call_on_a_gpu(told, benchmark):
    """In Triton's interpreter, with the kernels left out: what is launched is planned on the host."""
    names = [*CASES, POOLED.name]
    found = benchmark.pedantic(lambda: in_interpreter("benchmark_cases", f"t.launches({names!r})"), rounds=1)
    under = f"{TORCH}, triton {version_of('triton')}, interpreted"
    told([fact for name in names for fact in Counts(**found[name]).facts(f"tiny {name}", under)])


@pytest.mark.parametrize("name", COMPILED)
def test_binaries_of_five_targets(told, benchmark, name):
    case = CASES[name]
    problems = {s: case.problem(s) for s in range(len(case.schedule))}
    jobs = [job for at in binaries.TARGETS for job in binaries.wanted(case.policy, problems, 0, case.scale_index, at)]
    made = benchmark.pedantic(lambda: binaries.compiled(jobs), rounds=1)
    told(binaries.facts(name, made, jobs))


@pytest.mark.parametrize("model", HOPPER)
def test_binaries_of_a_shipped_profile(told, benchmark, model):
    profile = store.load(store.shipped_folder() / "h100-sxm" / f"{model}.json")
    told(benchmark.pedantic(lambda: compiled(profile, GPUS["h100-sxm"]), rounds=1))


def test_a_profile_on_a_cpu(told, benchmark):
    """pocketvar's shipped policy at its own size, by the command, in a process of its own: what ran before in a process decides
    which memory is warm there, and a ratio moves by a fifth with that.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    words = [sys.executable, "-m", "sparvar_tune", "bench", "--gpu", "cpu", "--model", "pocketvar", "--json", "--profile",
             str(store.shipped_folder() / "cpu" / "pocketvar.json")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": path}
    done = benchmark.pedantic(lambda: subprocess.run(words, env=env, capture_output=True, text=True), rounds=1)
    assert done.returncode == 0, done.stderr
    told([Reader().read(Fact, fact, "fact") for fact in json.loads(done.stdout)["facts"]])


def test_a_replayed_tune(told, benchmark, monkeypatch, tmp_path):
    """The tuner on recorded numbers: how many trials and replayed seconds it takes, and how fast a picture it finds."""
    replayed.install(monkeypatch.setattr)
    clock = replayed.Clock()
    adapter = replayed.Adapter(clock)
    request = search_here.Request(
        adapter.model, "256", "1.000", GPUS["cpu"], "near-lossless", WANTED, 400.0, 32, 0, False, tmp_path, None
    )
    profile = benchmark.pedantic(
        lambda: search_here.tune(request, adapter, lambda text: None, lambda text: None, clock), rounds=1
    )
    assert profile.generation is not None
    under = f"{TORCH}, optuna {importlib.metadata.version('optuna')}, numpy {numpy.__version__}"
    told([
        count("replayed tune: trials", profile.trials, under),
        count("replayed tune: seconds of its clock", round(clock.now), under),
        count("replayed tune: microseconds of a picture", round(profile.generation.tuned.p50_ms * 1e3), under),
    ])  # fmt: skip
