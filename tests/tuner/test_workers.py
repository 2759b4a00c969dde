"""The worker pool: every failure is one outcome of one job, the pool goes on, and nothing is left running."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from leftovers import gone, marked, running, wait_for
from places import PYTHONPATH

from sparvar_tune.launch_search import process_pool
from sparvar_tune.launch_search.process_pool import Finished, Job, Pool

LONG = 1500.0  # seconds; a limit that no job of these tests is meant to reach
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture
def env():
    """Environment of the workers, with a mark that their children inherit; afterwards no process may carry it."""
    mark, before = uuid.uuid4().hex, zombies()
    yield {"PYTHONPATH": PYTHONPATH, "MARK": mark}
    assert gone(mark, LONG), f"left running: {marked(mark)}"
    assert zombies() <= before


def zombies() -> set[str]:
    """Children of this process that have ended and were not waited for."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.add(entry.parent.name)
    return found


def pool(*envs: dict[str, str], target: str = "worker_target:target", **options: float) -> Pool:
    return Pool(target, envs, **options)


def job(mode: str, timeout_s: float = LONG, key: str = "", **payload: object) -> Job:
    return Job(key or mode, {"mode": mode, **payload}, timeout_s)


def ask(p: Pool, *args: object, **payload: object) -> Finished:
    (outcome,) = p.run([job(*args, **payload)])
    return outcome


def test_values_come_back_in_any_order_each_once(env):
    with pool(env, {**env, "WHO": "second"}) as p:
        jobs = [job("ok", key=str(i), echo=[i, {"half": 0.5}, None, "ü"]) for i in range(20)]
        outcomes = list(p.run(iter(jobs)))
        assert {o.key: o.value["echo"] for o in outcomes} == {j.key: j.payload["echo"] for j in jobs}
        assert all(o.failure is None and o.detail == "" and o.seconds >= 0 for o in outcomes)
        assert len({o.value["pid"] for o in outcomes}) <= 2
        assert {o.value for o in p.run([job("environment", name="WHO")] * 2)} == {None, "second"}


SURVIVED = {
    "raise": "ValueError: two lines",
    "memory": "MemoryError: no room",
    "leave": "SystemExit: 3",
    "unsayable": "TypeError: Object of type object is not JSON serializable",
}


def test_a_worker_survives_what_its_target_raises(env):
    with pool(env) as p:
        before = ask(p, "ok").value["pid"]
        for mode, detail in SURVIVED.items():
            outcome = ask(p, mode)
            assert (outcome.key, outcome.value, outcome.failure, outcome.detail) == (mode, None, "raised", detail)
        assert ask(p, "noise").value == "quiet"
        assert len(ask(p, "big", size=3_000_000).value) == 3_000_000
        assert len(ask(p, "ok", echo="e" * 3_000_000).value["echo"]) == 3_000_000
        assert ask(p, "ok").value["pid"] == before


REPLACED = [
    ("poison", {}, "raised", "sparvar_tune.launch_search.worker.Poisoned: do not use me again"),
    ("raise", {"text": "CUDA error: out"}, "raised", "ValueError: CUDA error: out"),
    ("chained", {"text": "an illegal memory access was encountered"}, "raised", "KeyError: 'the kernel failed'"),
    ("segfault", {}, "died", "SIGSEGV"),
    ("kill", {}, "died", "SIGKILL"),
    ("garbage", {}, "died", "sent garbage"),
    ("garbage", {"text": "spw1\0\0\0\2{}"}, "died", "sent garbage"),
    ("garbage", {"text": "spw1\0\0\0\2{{"}, "died", "sent garbage"),
    ("die_leaving_child", {}, "died", "exit code 4"),
    ("hang_with_child", {"timeout_s": 0.3}, "timed out", "no answer in 0.3 s"),
    ("hang_with_gil", {"timeout_s": 0.3}, "timed out", "no answer in 0.3 s"),
]


@pytest.mark.slow
def test_a_worker_that_cannot_be_trusted_is_replaced(env):
    with pool(env) as p:
        for mode, options, failure, detail in REPLACED:
            before = ask(p, "ok").value["pid"]
            outcome = ask(p, mode, **options)
            assert (outcome.value, outcome.failure, outcome.detail) == (None, failure, detail)
            after = ask(p, "ok").value["pid"]
            assert after != before and not Path(f"/proc/{before}").exists(), mode
        assert 0.3 <= outcome.seconds < LONG


def test_the_last_words_of_the_dead_are_kept_on_one_line(env):
    with pool(env) as p:
        ask(p, "noise")
        detail = ask(p, "exit").detail
    assert detail.startswith("exit code 3; stderr: xxx") and detail.endswith("x last words")
    assert 1900 < len(detail) < 2100 and "noise" not in detail and "\n" not in detail


def test_a_death_between_jobs_is_not_the_next_ones_fault(env):
    with pool(env) as p:
        dying = ask(p, "die_after").value
        wait_for(lambda: not running(dying))
        assert ask(p, "ok").failure is None


def test_jobs_are_pulled_when_a_worker_is_free_and_the_outcome_before_was_seen(env):
    pulled = []

    def jobs():
        for i in range(3):
            pulled.append(i)
            yield job("ok")

    with pool(env) as p:
        for seen, _ in enumerate(p.run(jobs())):
            assert len(pulled) == seen + 1


def test_an_answer_read_late_still_counts(env, monkeypatch):
    with pool(env, env) as p:
        outcomes = p.run([job("ok"), job("big", size=1_000_000)])
        first = next(outcomes)
        if late := [w.wire for w in p._workers if w.job]:
            assert wait(late, LONG)
        now = time.monotonic  # a caller that takes its time
        monkeypatch.setattr(process_pool.time, "monotonic", lambda: now() + 2 * LONG)
        assert (first.failure, [o.failure for o in outcomes]) == (None, [None])


def test_leaving_early_ends_the_jobs_under_way(env):
    with pool(env, env) as p:
        outcomes = p.run([job("hang"), job("ok"), job("raise")])
        assert next(outcomes).key == "ok"
        with pytest.raises(RuntimeError, match="runs other jobs"):
            next(p.run([]))
        outcomes.close()
        assert [o.key for o in p.run([job("ok"), job("ok")])] == ["ok", "ok"]
    with pytest.raises(RuntimeError, match="the pool is closed"):
        next(p.run([job("ok")]))


def test_a_payload_must_be_json_and_a_target_well_formed(env):
    with pool(env) as p:
        with pytest.raises(TypeError, match="JSON"):
            ask(p, "ok", echo=object())
        assert ask(p, "ok").failure is None
    for target, envs in (("no_function", [env]), ("worker_target:target", [])):
        with pytest.raises(ValueError, match=r"want 'package\.module:function'"):
            Pool(target, envs)


def test_two_failed_starts_are_forgiven(env, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("xx")
    with pool({**env, "BROKEN_STARTS": str(broken)}) as p:
        assert ask(p, "ok").failure is None
        broken.write_text("xx")
        assert [o.failure for o in p.run([job("kill"), job("ok")])] == ["died", None]


def test_a_worker_that_cannot_start_gives_up_and_the_others_go_on(env, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("x" * 3)
    with pool({**env, "BROKEN_STARTS": str(broken)}, env) as p:
        outcomes = [o for _ in range(2) for o in p.run([job("ok")] * 4)]
    assert Counter(o.failure for o in outcomes) == {None: 7, "died": 1}
    assert {o.detail for o in outcomes} == {"", "cannot start: exit code 7; stderr: no driver today"}


@pytest.mark.parametrize(
    ("target", "seconds", "why"),
    [("worker_target:missing", LONG, "has no attribute 'missing'"), ("time:sleep", 0.001, "no answer in 0.001 s")],
)
def test_no_worker_left_is_an_error_after_the_last_outcome(env, target, seconds, why):
    with pool(env, target=target, start_timeout_s=seconds) as p:
        outcomes = p.run([job("ok")] * 3)
        first = next(outcomes)
        assert first.failure == "died" and first.detail.startswith("cannot start: ") and why in first.detail
        with pytest.raises(RuntimeError, match="no worker is left: cannot start: ") as error:
            next(outcomes)
        assert "\n" not in str(error.value)


PARENT = """
import sys
from sparvar_tune.launch_search.process_pool import Job, Pool
modes = ["hang", "hang_with_gil", "hang_with_child"]
with Pool("worker_target:target", [{}] * len(modes)) as pool:
    list(pool.run(Job(m, {"mode": m, "began": f"{sys.argv[1]}/{m}"}, 600.0) for m in modes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_parent_that_is_killed_or_interrupted(env, tmp_path, how):
    # a shell's background job, such as a CI's, ignores SIGINT, and its children with it
    hear = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, **hear)
    # parent, three workers, a worker's child
    wait_for(lambda: (len(list(tmp_path.iterdir())), len(marked(env["MARK"]))) == (3, 5))
    parent.send_signal(how)
    _, said = parent.communicate(timeout=LONG)
    assert parent.returncode == -how and (how == signal.SIGKILL or b"KeyboardInterrupt" in said)
    assert gone(env["MARK"], LONG if how == signal.SIGKILL else 0.0)


# What each fault must come out as; "hang" gets a short limit, everything else one that it never reaches.
FAULTS = {
    "ok": None, "noise": None, "raise": "raised", "memory": "raised", "unsayable": "raised", "poison": "raised",
    "leave": "raised", "exit": "died", "segfault": "died", "kill": "died", "garbage": "died", "die_leaving_child": "died",
    "hang": "timed out", "hang_with_child": "timed out",
}  # fmt: skip


@pytest.mark.slow
def test_soak(env):
    """Some hundreds of faults in random order; SPARVAR_SOAK sets how many."""
    count = int(os.environ.get("SPARVAR_SOAK", "200"))
    draw = random.Random(20261123)
    modes = {f"job {i}": draw.choice(list(FAULTS)) for i in range(count)}
    begun = time.monotonic()
    with pool(*[env] * 4) as p:
        outcomes = list(p.run(job(m, 0.3 if "hang" in m else LONG, key) for key, m in modes.items()))
        assert len(marked(env["MARK"])) <= 4
    print(f"{count} jobs in {time.monotonic() - begun:.1f} s: {Counter(o.failure or 'fine' for o in outcomes)}")
    assert len(outcomes) == count and {o.key for o in outcomes} == set(modes)
    for outcome in outcomes:
        assert outcome.failure == FAULTS[modes[outcome.key]], outcome
