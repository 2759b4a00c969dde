"""The schedule of a GPU, with made-up times in real worker processes: what is picked, what faults cost, what a log gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from leftovers import gone, marked, wait_for
from places import PYTHONPATH, ROOT

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_tune.catalog.gpus import GPUS, detect_gpu
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.launch_search.choose import ChosenLaunches, LaunchSearch, space
from sparvar_tune.launch_search.compiling import Binary, Compiled
from sparvar_tune.launch_search.log import Identity, Log, Workshop, read_log
from sparvar_tune.launch_search.process_pool import Job, Pool
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile import store
from sparvar_tune.profile.reader import to_plain
from sparvar_tune.profile.schema import Profile, ProfileError, Workload
from sparvar_tune.ways import time_only

from timer_target import made_up_ms  # isort: skip

PATH = os.pathsep.join([str(Path(__file__).parent), PYTHONPATH])
MODEL = MODELS["var-d16"]
IDENTITY = Identity("h100-sxm", "a made-up GPU", "0" * 64, "2.11", "3.6", "eager")
SOAK = int(os.environ.get("SPARVAR_SOAK", "20"))


def made_up_code(jobs, _processes, _say):
    """No compiler: a binary's code is its name, which the register limit does not change."""
    unlimited = {job: [kv for kv in job.build.options if kv[0] != "maxnreg"] for job in dict.fromkeys(jobs)}
    return {
        job: Compiled(128, 1000, 0, f"{job.build.kernel} {job.build.constants} {options}") for job, options in unlimited.items()
    }


def workshop(folder: Path, log: Log, workers: int = 2, compiler=made_up_code, task_s: float = 20.0) -> Workshop:
    environment = {"PYTHONPATH": PATH, "FAKE": str(folder)}
    return Workshop(IDENTITY, log, 1, [environment] * workers, "timer_target:time_task", compiler, task_s)


def run(folder: Path, log: Log, keep=lambda found: None, gpu=GPUS["a100-80"], say=lambda text: None, **options) -> ChosenLaunches:
    """On a GPU whose launches are not predicted, unless told otherwise."""
    w = Workload.of(MODEL, MODEL.default_resolution, "1.000")
    policy = paper_policy(w.schedule, MODEL.layers, MODEL.heads)
    with workshop(folder, log, **options) as made:
        return LaunchSearch(w, policy, gpu, gpu.capability, made, say, lambda text: None).find(keep)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its folder, log and result."""
    folder = tmp_path_factory.mktemp("whole")
    seen: list[ChosenLaunches] = []
    found = run(folder, Log(folder / "log.jsonl"), seen.append)
    return folder, found, seen


def test_picks_the_fastest_and_says_how_it_was_measured(whole):
    folder, found, seen = whole
    w = Workload.of(MODEL, MODEL.default_resolution, "1.000")
    assert [row.scale_index for row in found.rows] == [7, 8, 9]
    for row in found.rows:
        distinct = [c for c in space(w.problem(row.scale_index), (8, 0)) if not c.maxnreg]  # a limit makes no new binary here
        best = min(made_up_ms(vars(c), row.scale_index) for c in distinct)
        assert row.tuned and row.tuned.p50_ms == pytest.approx(best, rel=1e-5), row
        assert row.dense and row.dense.p50_ms == 3.0 and row.tuned.n == 30
    assert len(seen) == 1 and "best so far" in seen[0].notes[-1]  # usable before the search has begun
    assert {row.config for row in seen[0].rows} == {tuple(sorted(vars(TritonConfig()).items()))}
    assert any("1980..1980 MHz" in note and "slowed by: nothing" in note for note in found.notes)
    finals = [json.loads(line) for line in calls(folder) if json.loads(line)["dense"]]
    assert all(vars(TritonConfig()) in task["configs"] for task in finals), "the default is pinned in every final"


def test_equal_binaries_are_looked_at_once(whole):
    folder, _, _ = whole
    looks = [json.loads(line) for line in calls(folder) if not json.loads(line)["dense"]]
    assert looks and all(config["maxnreg"] == 0 for task in looks for config in task["configs"])


def test_what_is_predicted_too_slow_is_not_looked_at(tmp_path):
    """On Hopper, where the model was held against measurements; binaries that spill or fill a multiprocessor are out."""

    def compiler(jobs, pool, say):
        out = {}
        for job, made in made_up_code(jobs, pool, say).items():
            heavy = ("BLOCK_M", 128) in job.build.constants
            out[job] = dataclasses.replace(made, registers=255 if heavy else 128, shared_bytes=60000, spill_bytes=900 * heavy)
        return out

    said: list[str] = []
    found = run(tmp_path, Log(None), gpu=GPUS["h100-sxm"], say=said.append, compiler=compiler)
    assert any("predicted too slow" in text and " 0 predicted" not in text for text in said)
    looks = [json.loads(line) for line in calls(tmp_path) if not json.loads(line)["dense"]]
    seen = [config for task in looks for config in task["configs"]]
    assert seen and all(config["block_m"] == 64 for config in seen if not config["fetchers"])
    assert {config["block_m"] for config in seen if config["fetchers"]} == {64, 128}, "of these it knows nothing"
    assert len(found.rows) == 3


def test_a_log_replays_the_run_without_a_gpu(whole, tmp_path):
    folder, found, _ = whole
    again = run(tmp_path, Log(None, [folder / "log.jsonl"]), workers=0, compiler=None)
    assert again == found
    half = tmp_path / "half.jsonl"
    half.write_text("".join((folder / "log.jsonl").read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ValueError, match="the log lacks 3 measurements"):
        run(tmp_path, Log(None, [half]), workers=0)


def test_two_machines_logs_make_one_run(whole, tmp_path):
    folder, found, _ = whole
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a").write_text("".join(lines[::2]))
    (tmp_path / "b").write_text("".join(lines[1::2]) + lines[0])
    assert run(tmp_path, Log(None, [tmp_path / "a", tmp_path / "b"]), workers=0) == found
    assert not calls(tmp_path)


def test_a_cut_log_goes_on_and_measures_only_what_is_missing(whole, tmp_path):
    folder, found, _ = whole
    raw = (folder / "log.jsonl").read_bytes()
    log = tmp_path / "log.jsonl"
    log.write_bytes(raw[: len(raw) * 2 // 3] + b'{"key": "torn')
    kept = len(read_log(log))
    assert run(tmp_path, Log(log)) == found
    assert len(calls(tmp_path)) <= raw.count(b"\n") - kept
    assert len(read_log(log)) == raw.count(b"\n"), "the torn tail swallowed nothing"


@pytest.mark.slow
def test_a_configuration_that_crashes_hangs_or_is_illegal_is_data(tmp_path):
    w = Workload.of(MODEL, MODEL.default_resolution, "1.000")
    configs = [c for c in space(w.problem(9), (8, 0)) if c != TritonConfig() and not c.maxnreg]
    always = {
        json.dumps(vars(c), sort_keys=True): fault
        for c, fault in zip(configs, ("raise", "illegal", "die", "garbage"), strict=False)
    }
    always[json.dumps(vars(configs[4]), sort_keys=True)] = "hang"
    (tmp_path / "plan.json").write_text(json.dumps({"always": always}))
    log = Log(tmp_path / "log.jsonl")
    found = run(tmp_path, log, task_s=1.0)
    bad = [json.loads(text) for text in always]
    assert all(dict(row.config) not in bad for row in found.rows)
    failures = [line.failure for line in read_log(tmp_path / "log.jsonl") if line.failure]
    assert len(failures) == (1 + 5) * 3 * 2  # the group and five of it, scales, kinds of layers
    assert {f.split(":")[0] for f in failures} == {"raised", "died", "timed out"}


def test_a_default_that_does_not_run_does_not_end_the_search(tmp_path):
    def broken(jobs, pool, say):
        return {job: failed if is_default(job) else made for job, made in made_up_code(jobs, pool, say).items()}

    def is_default(job: Binary) -> bool:  # not what a decision scale takes its residual with
        c, options, default = dict(job.build.constants), dict(job.build.options), TritonConfig()
        return c.get("EPILOGUE", 2) < 2 and (c["BLOCK_M"], c["BLOCK_N"], options["num_stages"]) == (
            default.block_m, default.block_n, default.num_stages
        )  # fmt: skip

    failed = Compiled(failure="raised: out of resources")
    seen: list[ChosenLaunches] = []
    found = run(tmp_path, Log(None), seen.append, compiler=broken)
    assert not seen and len(found.rows) == 3 and all(dict(row.config) != vars(TritonConfig()) for row in found.rows)


def test_an_unsteady_final_is_measured_again(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"drift": True}))
    found = run(tmp_path, Log(None))
    assert not any("drifted" in note for note in found.notes)
    assert {json.loads(line)["again"] for line in calls(tmp_path)} == {0, 1}


def test_a_compiler_that_fails_costs_its_configuration(tmp_path):
    def broken(jobs: list[Binary], processes, say):
        return {
            job: Compiled(failure="died: SIGSEGV")
            if "EPILOGUE" in dict(job.build.constants) and ("BLOCK_M", 128) in job.build.constants
            else made
            for job, made in made_up_code(jobs, processes, say).items()
        }

    found = run(tmp_path, Log(None), compiler=broken)
    assert all(dict(row.config)["block_m"] == 64 for row in found.rows)


def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path):
    """The disk is full after 2000 bytes, in the middle of a line: a limit on file sizes does the same to a write."""
    _, found, _ = whole
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ProfileError, match="cannot keep measurements"):
            run(tmp_path, Log(tmp_path / "log.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = len(read_log(tmp_path / "log.jsonl"))
    assert kept >= 2 and (tmp_path / "log.jsonl").stat().st_size == 2000
    assert run(tmp_path, Log(tmp_path / "log.jsonl")) == found


def good_lines(log: Path) -> set[str]:
    return {line.key for line in read_log(log) if not line.failure}


@pytest.mark.slow
def test_workers_that_fail_at_random_lose_no_finished_measurement(whole, tmp_path):
    """SPARVAR_SOAK faults: workers raise, break their context, die, are killed, hang, talk rubbish; runs end, and end right."""
    _, found, _ = whole
    (tmp_path / "faults").touch()
    for seed in range(100000):
        (tmp_path / "plan.json").write_text(json.dumps({"seed": seed, "faults": 0.4}))
        log = tmp_path / f"{seed}.jsonl"
        with contextlib.suppress(ValueError):  # a final whose every configuration failed ends the run in one line
            run(tmp_path, Log(log), task_s=0.5)
        kept = good_lines(log)
        with contextlib.suppress(ValueError):
            run(tmp_path, Log(log), task_s=0.5)
        assert kept <= good_lines(log), "a finished measurement is gone"
        (tmp_path / "plan.json").write_text("{}")
        sound = tmp_path / f"{seed}-sound.jsonl"  # what raised would raise again: these raised by chance
        sound.write_text("".join(line + "\n" for line in log.read_text().splitlines() if json.loads(line)["failure"] is None))
        assert run(tmp_path, Log(sound)) == found
        if len((tmp_path / "faults").read_text().splitlines()) >= SOAK:
            return


@pytest.mark.slow
def test_a_parent_killed_at_random_loses_no_finished_measurement(whole, tmp_path):
    """kill -9 in the middle, again and again, while its workers fail as well; nothing stays behind, and then it ends right."""
    _, found, _ = whole
    log, rng, killed, kept = tmp_path / "log.jsonl", random.Random(5), 0, set[str]()
    for seed in range(100000):
        (tmp_path / "plan.json").write_text(json.dumps({"seed": seed, "faults": 0.25, "slow": 0.05}))
        code = f"import test_schedule as t; from pathlib import Path; t.go_on(Path({str(tmp_path)!r}))"
        environment = {**os.environ, "PYTHONPATH": PATH, "MARK": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True, stderr=subprocess.PIPE)
        wait_for(lambda: process.poll() is not None or good_lines(log) - kept)  # noqa: B023
        time.sleep(rng.uniform(0.0, 0.3))  # wherever it is a moment after something new was finished
        killed += process.poll() is None
        process.kill()
        said = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), said
        lines = good_lines(log)
        assert kept <= lines, "a finished measurement is gone"
        kept = lines
        if killed >= max(3, SOAK // 20):
            break
        if process.returncode == 0:  # done: begin anew
            log.replace(tmp_path / f"done-{seed}.jsonl")
            kept = set()
    assert gone(str(tmp_path)), f"left running: {marked(str(tmp_path))}"
    (tmp_path / "plan.json").write_text("{}")
    log.unlink(missing_ok=True)
    assert run(tmp_path, Log(log)) == found


def go_on(folder: Path) -> None:
    """A run with --resume that may be killed at any time."""
    with contextlib.suppress(ValueError):  # a final whose every configuration failed ends the run in one line
        run(folder, Log(folder / "log.jsonl"), task_s=0.5)


@pytest.mark.gpu
def test_gpu_workers_outlive_broken_contexts():
    jobs = [Job(f"{i} {do}", {"do": do}, 60.0) for i in range(3) for do in ("fine", "break", "fill", "fine")]
    with Pool("gpu_target:target", [{"PYTHONPATH": PATH}]) as pool:
        outcomes = list(pool.run(jobs))
    assert [o.key for o in outcomes] == [job.key for job in jobs]
    for o in outcomes:
        assert (o.value == 8.0) if o.key.endswith("fine") else o.failure == "raised", o


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_gpu_schedule_from_start_to_replay(tmp_path, mode):
    gpu = detect_gpu()
    w = Workload.of(MODEL, MODEL.default_resolution, "1.000")
    policy = paper_policy(w.schedule, MODEL.layers, MODEL.heads)
    target = time_only.Target(MODEL, gpu, "near-lossless", MODEL.default_resolution, "1.000", 1, policy)
    first: list[Profile] = []
    made = time_only.time_policy(target, time_only.Shop(tmp_path, mode=mode), print, lambda text: None, first.append)
    assert made.why_not() is None and first[0].why_not() is None
    assert [row.scale_index for row in made.rows] == [7, 8, 9] and all(row.tuned and row.tuned.n == 30 for row in made.rows)
    assert any(f"of {mode} calls" in note for note in made.notes)
    lines = read_log(tmp_path / time_only.LOG)
    assert lines and [(line.what, line.failure) for line in lines if line.failure] == []
    again = time_only.launches_of_log(made, [tmp_path / time_only.LOG], gpu) if mode == "eager" else None
    assert again is None or (again.rows, again.notes) == (made.rows, made.notes[1:])


def test_a_worker_owns_a_gpu_like_the_first_and_plans_on_one_thread(monkeypatch):
    names = ["A", "B", "A", "A"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    every = time_only.gpu_environments(None)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in every] == ["7", "5", "4"]
    assert all(e["OMP_NUM_THREADS"] == "1" for e in every), "threads of several workers get into each other's way"
    assert time_only.gpu_environments(2) == every[:2]
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=r"want 1\.\.3"):
            time_only.gpu_environments(wrong)


@pytest.mark.slow
def test_a_worker_plans_on_one_thread(monkeypatch):
    """Planning threads of two workers used to spin on the same cores: together they made a third of what one does."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A")
    (environment,) = time_only.gpu_environments(1)
    with Pool("planning_target:plan", [{**environment, "PYTHONPATH": PATH}]) as pool:
        (outcome,) = pool.run([Job("plan", None, 240.0)])
    assert outcome.value == 1, outcome


SHIPPED = sorted((ROOT / "profiles").glob("h*/*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_log_gives_its_profile_again(path):
    """Every row, its choice and its times, from the measurements under reports/ alone; no GPU is asked."""
    made = store.load(path)
    logs = sorted((ROOT / "reports" / path.parent.name).glob("*.jsonl"))
    again = time_only.launches_of_log(made, logs, GPUS[made.silicon.gpu])
    assert to_plain(again.rows) == to_plain(made.rows)
    assert made.notes[0 if made.evidence else 1 :] == again.notes
    assert made.evidence or made.trials == again.tried, "all its trials were launches"
