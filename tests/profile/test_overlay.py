"""What verify leaves on a machine: only ever dense or not, only for exactly its file; and verify itself, on a faked device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import types
import warnings

import pytest
import tiny
from examples import HUGE, metrics, paths_of
from made_profiles import GRIDS, profile

from sparvar_kernels import Policy, Pooled, Reuse, Rule
from sparvar_tune import runtime
from sparvar_tune.catalog import models
from sparvar_tune.catalog.gpus import find_gpu
from sparvar_tune.generation import SkipScales
from sparvar_tune.launch_search.compiling import Compiled
from sparvar_tune.launch_search.timing_task import Times
from sparvar_tune.profile import identity, machine, overlay, schema, store
from sparvar_tune.profile.identity import meaning_of
from sparvar_tune.profile.overlay import DEMOTED, OK, Overlay, Verified
from sparvar_tune.profile.schema import ProfileError, Speedup
from sparvar_tune.runtime import load
from sparvar_tune.ways import verify
from sparvar_tune.ways.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore:.*unverified")
CPU = find_gpu("cpu")
GOOD, BAD = Speedup(2.0, 1.9, 2.1, 20), Speedup(1.01, 0.97, 1.05, 20)


ROWS = (Verified(5, GOOD, OK, ""), Verified(6, BAD, DEMOTED, "slow"))


def made(sha256="12" * 32, rows=ROWS, **changes) -> Overlay:
    base = Overlay(
        overlay.OVERLAY_SCHEMA, "2026-11-24", sha256, meaning_of(profile().policy, ["cpu"]), machine.versions(),
        machine.device_name(machine.silicon(CPU, True)),
        OK, "", tuple(rows),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def loaded(folder, **changes):
    """A profile of pocketvar as it loads here, and its file."""
    path = folder / "cpu" / "pocketvar.json"
    store.save(profile(**changes), path)
    return runtime.load_profile("pocketvar", gpu="cpu", folders=(folder,)), path


def leave(tuned, **changes):
    """The same profile as it loads after verify left an overlay."""
    overlay.save(made(tuned.sha256, **changes), overlay.file("cpu", "pocketvar.json"))
    return runtime.load_profile("pocketvar", gpu="cpu", folders=(tuned.path.parent.parent,))


def test_a_row_that_failed_here_is_dense(tmp_path, home):
    before, _ = loaded(tmp_path)
    after = leave(before)
    assert not before.demoted and set(after.demoted) == {6} and {r.scale_index for r in after.policy().rules} == {5}
    assert "scale 6: dense, because demoted by verify on 2026-11-24: slow" in after.explain()
    assert "2.00x measured here by verify on 2026-11-24" in after.explain() and after.profile == before.profile
    assert overlay.find("cpu", "pocketvar.json") == made(before.sha256)


def test_what_was_measured_here_goes_before_the_file(tmp_path, home):
    """Other kernels or an uncertain gain in the file, a certain one here: sparse; rows verify did not reach stay as they were."""
    older = tuple((name, 99) for name, _ in profile().meaning)
    stale, _ = loaded(tmp_path, meaning=older)
    assert set(stale.demoted) == {5, 6}
    assert set(leave(stale, rows=[Verified(5, GOOD, OK, "")]).demoted) == {6}
    weak = dataclasses.replace(profile().rows[0], speedup=BAD)
    unsure, _ = loaded(tmp_path, rows=(weak, profile().rows[1]))
    assert set(unsure.demoted) == {5} and not leave(unsure, rows=[Verified(5, GOOD, OK, "")]).demoted
    assert set(leave(unsure, rows=[Verified(5, None, DEMOTED, "its launch failed")]).demoted) == {5}


def test_a_decision_scale_stays_while_a_later_scale_lives_on_it(tmp_path, home):
    policy = dataclasses.replace(profile().policy, rules=(Rule(4, "B", Pooled(3, 2)), *profile().policy.rules))
    rows = (dataclasses.replace(profile().rows[0], scale_index=4), *profile().rows)
    tuned, _ = loaded(tmp_path, policy=policy, rows=rows)
    slow = Verified(4, BAD, OK, "later scales live on its ranking")
    assert not leave(tuned, rows=[slow]).demoted
    assert set(leave(tuned, rows=[slow, Verified(6, BAD, DEMOTED, "slow")]).demoted) == {4, 6}  # scale 5 takes nothing from it


def test_a_profile_whose_pictures_failed_is_all_dense(tmp_path, home):
    policy = Policy(("AB", "BB"), (Rule(5, "A", Reuse(4)),), (SkipScales((6,)),))
    meaning = meaning_of(policy, ["cpu"])
    tuned, _ = loaded(tmp_path, policy=policy, rows=profile().rows[:1], meaning=meaning)
    assert tuned.policy().skip_scales == (6,)
    rows = [Verified(5, GOOD, OK, "")]
    after = leave(tuned, verdict=DEMOTED, reason="pictures: PSNR 20 dB", rows=rows, meaning=meaning)
    assert after.policy() == Policy(("AB", "BB"), ()) and set(after.demoted) == {5} and "PSNR 20 dB" in after.explain()


@pytest.mark.parametrize(("changes", "said"), [
    ({"profile_sha256": "34" * 32}, "another profile file"), ({"meaning": (("cpu", 99),)}, "another meaning of its variants"),
    ({"device": "Abacus, 2 threads"}, "another device"),
])  # fmt: skip
def test_an_overlay_of_something_else_is_ignored(tmp_path, home, changes, said):
    tuned, _ = loaded(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = leave(tuned, **changes)
    assert not after.demoted and after.overlay is None and said in after.explain() and "2026-11-24" in after.explain()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[" * 100_000, b"{}", b"[]", b"1" * (2 << 20), None])
def test_a_damaged_overlay_is_ignored_with_a_warning(tmp_path, home, content):
    tuned, _ = loaded(tmp_path)
    leave(tuned)
    path = overlay.file("cpu", "pocketvar.json")
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="ignored") as caught:
        after = runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and caught[0].filename == __file__
    assert not after.demoted and "what verify found here is ignored" in after.explain()


TEXT = overlay.to_json(made())


def test_overlay_round_trips_and_is_checked():
    assert overlay.from_json(TEXT, "f") == made()
    for changes, said in (
        ({"rows": (Verified(6, BAD, OK, ""), Verified(5, GOOD, OK, ""))}, "ascending"), ({"verdict": "fine"}, "verdict"),
        ({"rows": (Verified(5, GOOD, DEMOTED, "no"),)}, "bear out"), ({"rows": (Verified(5, None, OK, ""),)}, "bear out"),
        ({"rows": (Verified(5, dataclasses.replace(GOOD, n=5), OK, ""),)}, "want >= 6"),
        ({"created": "today"}, "created"), ({"meaning": (("cpu", 0),)}, "meaning"), ({"schema": 1}, "schema"),
    ):  # fmt: skip
        with pytest.raises(ProfileError, match=said):
            overlay.from_json(overlay.to_json(made(**changes)), "f")


@pytest.mark.parametrize("path", [p for p in paths_of(json.loads(TEXT)) if p], ids=lambda p: ".".join(map(str, p)))
def test_every_field_is_needed_and_typed(path):
    for wrong in ({"x": 1}, True, "\x00", [[[]]], "x", -1, HUGE, float("nan"), float("inf"), ...):
        data = json.loads(TEXT)
        at = data
        for step in path[:-1]:
            at = at[step]
        if wrong is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = wrong
        with pytest.raises(ProfileError) as caught:
            overlay.from_json(json.dumps(data), "f")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.slow
def test_flipped_bytes_never_crash_or_change_a_verdict(tmp_path, home):
    """SPARVAR_SOAK sets how many; one in fifty is loaded all the way."""
    tuned, _ = loaded(tmp_path)
    after = leave(tuned)
    path, rng = overlay.file("cpu", "pocketvar.json"), random.Random(0)
    raw = path.read_bytes()
    for i in range(int(os.environ.get("SPARVAR_SOAK", "3000"))):
        broken = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            broken[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            assert overlay.from_json(broken.decode("utf-8", "replace"), "f") == after.overlay
        except ProfileError as error:
            assert str(error).isprintable()
        if i % 50 == 0:
            path.write_bytes(broken)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))
            assert got.profile == tuned.profile and got.demoted in ({}, after.demoted)


# --- verify without an adapter: the GPU is faked, its times are made up ---

H100 = find_gpu("h100-sxm")
CONFIG = (("block_m", 64), ("block_n", 64), ("fetchers", 0), ("maxnreg", 0), ("num_stages", 5), ("num_warps", 4))


@pytest.fixture
def gpu(monkeypatch, home):
    """An H100 whose times (ms) are {scale: (dense, tuned; None: it raises)}; returns that and what was said."""
    here = schema.Silicon("h100-sxm", "hopper", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1 << 36, None)
    times, said, calls = {}, [], []

    noise = random.Random(0)

    class Shop:
        identity = types.SimpleNamespace(triton="3.9")

        def compile(self, wanted, status):
            return {b: Compiled(32, 1024, 0, "ab" * 32) for b in wanted}

        def time(self, tasks, workload, policy, status):
            found = {}
            for task in tasks:
                calls.append((task.scale_index, workload.batch, task.configs[0]))
                dense, tuned = times[task.scale_index]
                spread = [[ms * (1 + 0.01 * noise.random()) for _ in range(task.rounds)] for ms in (dense, tuned or dense)]
                failure = "raised: RuntimeError: " + "out of memory " * 99
                found[task] = failure if tuned is None else Times(tuple(spread[0]), (tuple(spread[1]),), 1.0, None)
            return found

    monkeypatch.setattr(verify.time_only, "workshop", lambda gpu, shop: contextlib.nullcontext(Shop()))
    for module in (verify, load):
        monkeypatch.setattr(module, "silicon", lambda _gpu, _here: here)
    monkeypatch.setitem(models.MODELS, "hart", dataclasses.replace(
        models.MODELS["hart"], layers=2, heads=2, head_dim=32,
        resolutions={"1024": {"1.000": schema.ScaleSchedule(GRIDS)}},
    ))  # fmt: skip
    return times, said, calls


def hart(tmp_path):
    """Stores an unverified profile of that model, tuned on an H100 with the kernels as they are."""
    rows = tuple(dataclasses.replace(row, kernel="triton", config=CONFIG) for row in profile().rows)
    store.save(profile(
        workload=dataclasses.replace(profile().workload, model="hart", resolution="1024", dtype="fp16", batch=2), rows=rows,
        silicon=dataclasses.replace(profile().silicon, gpu="h100-sxm", family="hopper", capability=(9, 0), threads=None),
        policy_state="unverified", evidence=None, generation=None, kernel_hash=identity.kernel_hash(H100),
    ), tmp_path / "h100-sxm" / "hart.json")  # fmt: skip


def check(tmp_path, said, budget=55.0, write=False):
    tuned = runtime.load_profile("hart", gpu="h100-sxm", folders=(tmp_path,))
    good = verify.verify(tuned, None, 8, budget, write, said.append, lambda text: None).good
    return good, runtime.load_profile("hart", gpu="h100-sxm", folders=(store.user_folder(), tmp_path))


def test_verify_without_an_adapter_times_the_rows(tmp_path, gpu):
    times, said, calls = gpu
    hart(tmp_path)
    times.update({5: (2.0, 1.0), 6: (1.0, 1.02)})
    good, after = check(tmp_path, said)
    assert not good and set(after.demoted) == {6} and "demoted by verify on" in after.demoted[6]
    assert {batch for _, batch, _ in calls} == {2} and {dict(CONFIG) == vars(config) for _, _, config in calls} == {True}
    text = "\n".join(said)
    assert "scale  5: ok: 2.0" in text and "scale  6: FAIL" in text and "verified in" in text and "scale 6 runs dense" in text
    times[6] = (3.0, 1.0)
    good, after = check(tmp_path, said)
    assert good and not after.demoted and after.overlay.rows[1].speedup.n == verify.ROUNDS


def test_a_launch_that_raises_is_demoted(tmp_path, gpu):
    times, said, _ = gpu
    hart(tmp_path)
    times.update({5: (2.0, 1.0), 6: (1.0, None)})
    good, after = check(tmp_path, said, write=True)
    assert not good and set(after.demoted) == {6} and "launch failed: raised: RuntimeError" in after.demoted[6]
    assert "not written as a profile" in "\n".join(said) and not (store.user_folder() / "h100-sxm").exists()


def test_a_spent_budget_leaves_rows_as_they_are(tmp_path, gpu):
    times, said, calls = gpu
    hart(tmp_path)
    times.update({5: (1.0, 2.0), 6: (2.0, 3.0)})
    _, after = check(tmp_path, said, budget=1e-9)
    assert {scale for scale, _, _ in calls} == {6} or {scale for scale, _, _ in calls} == {5}
    assert len(after.overlay.rows) == 1 == len(after.demoted) and "left as they are: scales" in "\n".join(said)


def test_written_times_are_this_users_profile(tmp_path, gpu):
    """Stale kernels and an uncertain gain: new times make a new profile, and the overlay is about that one."""
    times, said, _ = gpu
    hart(tmp_path)
    stale = dataclasses.replace(store.load(tmp_path / "h100-sxm" / "hart.json"), kernel_hash="00" * 32)
    store.save(stale, tmp_path / "h100-sxm" / "hart.json")
    times.update({5: (2.0, 1.0), 6: (3.0, 1.0)})
    good, after = check(tmp_path, said, write=True)
    assert good and after.path == store.user_folder() / "h100-sxm" / "hart.json" and not after.demoted
    assert after.overlay is not None and after.profile.kernel_hash == identity.kernel_hash(H100)
    assert after.profile.rows[1].speedup.median == pytest.approx(3, rel=0.02) and after.profile.policy == stale.policy


def test_another_number_of_images_serves_and_is_said(tmp_path, gpu):
    hart(tmp_path)

    def load(images):
        return runtime.load_profile("hart", gpu="h100-sxm", folders=(tmp_path,), images=images)

    for images in (2, 4):
        assert load(images).profile is not None and f"no profile for {images} images at once" in load(images).explain()
    assert load(5).profile is None and "hart--images-5.json" in load(5).explain() and "factor of 4" in load(5).explain()
    four = dataclasses.replace(store.load(tmp_path / "h100-sxm" / "hart.json"), trials=4)
    four = dataclasses.replace(four, workload=dataclasses.replace(four.workload, batch=8))
    store.save(four, tmp_path / "h100-sxm" / "hart--images-4.json")
    assert [load(n).profile.workload.batch for n in (1, 2, 3, 4, 16)] == [2, 2, 8, 8, 8]
    with pytest.raises(ValueError, match=r"want a whole number, 1\.\.256"):
        load(0)
    problem = load(4).profile.workload.problem(6)
    assert "batch is" not in load(4).explain(problem) and "batch is 8, tuned for 2" in load(2).explain(problem)


# --- verify with an adapter: the tiny model in pocketvar's place ---


def test_verify_with_an_adapter(tmp_path, home, monkeypatch):
    tiny.install(monkeypatch.setattr)
    weights = dataclasses.replace(profile().workload, weights_sha256=None, logit_bound=models.MODELS["pocketvar"].logit_bound)
    said = []

    def check(tuned, budget=55.0, **changes):
        real = verify.compare_on

        def faked(*args):
            trial = real(*args)
            trial.tuned_ms = [ms * changes.get("whole", 0.5) for ms in trial.dense_ms]
            trial.tuned_scales = [{s: ms * changes.get(s, 0.5) for s, ms in spent.items()} for spent in trial.dense_scales]
            return trial

        with monkeypatch.context() as patch:
            patch.setattr(verify, "compare_on", faked)
            good = verify.verify(tuned, Subject.of("pocketvar", "cpu").open, 6, budget, False, said.append, said.append).good
        return good, runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))

    proof = dataclasses.replace(profile().evidence, weights_sha256=None)
    required = dataclasses.replace(proof, metrics=metrics(36.0, 35.0, 1.0))
    tuned, _ = loaded(tmp_path, workload=weights, evidence=required)
    good, after = check(tuned)
    assert good and not after.demoted and "verified on" in after.explain() and "PSNR" in after.explain()
    good, after = check(tuned, **{"whole": 1.1})
    assert not good and after.policy().rules == () and "not certainly faster" in after.explain()
    _, after = check(tuned, budget=1e-9)
    assert "2 of 6 pairs" in "\n".join(said) and "rows are left as they are" in "\n".join(said)
    assert not after.demoted and after.overlay.rows == ()
    strict = dataclasses.replace(proof, metrics=metrics(150.0, 140.0, 140.0))
    tuned, _ = loaded(tmp_path, workload=weights, evidence=strict)
    good, after = check(tuned)
    assert not good and after.policy().rules == () and "demoted by verify" in after.explain() and "pictures:" in after.explain()
    other, _ = loaded(tmp_path, workload=weights, evidence=profile().evidence)
    with pytest.raises(ValueError, match="other weights"):
        check(other)
    with pytest.raises(ValueError, match="at least 2"):
        verify.verify(tuned, Subject.of("pocketvar", "cpu").open, 1, 9.0, False, said.append, said.append)
