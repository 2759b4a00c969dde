"""Files that somebody damaged, swapped or put in the way: one line that names the file, no traceback, no hang."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
from examples import changed, example
from places import PYTHONPATH

from sparvar_tune.launch_search.log import Line, Log, read_log
from sparvar_tune.launch_search.process_pool import Job, Pool
from sparvar_tune.launch_search.timing_task import Times
from sparvar_tune.profile import files, misses, overlay, store
from sparvar_tune.profile.schema import ProfileError

JUNK = [b"null", b"{}", b"[1]", b'"text"', b"1e999", b"NaN", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\x00",
        b'{"key": "a"}',
        b'{"gpu": "cpu", "model": 3}', b'{"gpu": "cpu", "gpu": "cpu"}']  # fmt: skip


def refused(call, *arguments) -> str:
    with pytest.raises(ProfileError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("content", JUNK, ids=range(len(JUNK)))
def test_junk_for_a_profile_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "pocketvar.json"
    path.write_bytes(content)
    assert str(path) in refused(store.load, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_a_device_and_a_folder_are_no_profiles(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no plain file" in refused(store.load, tmp_path / "pipe")
    assert "no plain file" in refused(store.load, Path("/dev/null"))
    assert "directory" in refused(store.load, tmp_path).lower()


@pytest.mark.parametrize("fields", [
    {"resolution": "../../../evil"}, {"aspect": "../up"}, {"resolution": "/etc/passwd"}, {"aspect": "1.000/../.."},
    {"model": "../x"},
])  # fmt: skip
def test_no_name_in_a_file_leads_outside_its_folder(tmp_path, fields):
    made = changed("workload", **fields)
    with pytest.raises(ValueError, match="unknown"):
        store.name_of(made)
    store.save(made, tmp_path / "cpu" / "pocketvar.json")
    said = refused(store.find, "pocketvar.json", store.GPUS["cpu"], (), (tmp_path,))
    assert "unknown" in said and str(tmp_path) in said
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["pocketvar.json"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError) as caught:
            files.append_line(tmp_path / "log.jsonl", {"a": 1})
        assert caught.value.filename == str(tmp_path / "log.jsonl") and caught.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(store.save, example(), tmp_path / "pocketvar.json")
    assert str(tmp_path / "pocketvar.json") in said and "No space left" in said
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"], "no half-written file stays behind"


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "cpu").write_text("")
    assert str(tmp_path / "cpu") in refused(store.save, example(), tmp_path / "cpu" / "pocketvar.json")
    with pytest.raises(ValueError, match="cannot keep trials here"), files.exclusive(tmp_path / "cpu" / "run"):
        pass


def test_one_run_a_folder(tmp_path):
    with files.exclusive(tmp_path), pytest.raises(ValueError, match="another tuning run"), files.exclusive(tmp_path):
        pass
    with files.exclusive(tmp_path):
        pass


def test_a_dry_run_sees_another_run_and_leaves_nothing(tmp_path):
    new = tmp_path / "runs" / "new"
    files.require_trials_folder(new)
    assert not list(tmp_path.iterdir())
    with files.exclusive(tmp_path):
        with pytest.raises(ValueError, match="another tuning run") as caught:
            files.require_trials_folder(tmp_path)
        assert "\n" not in str(caught.value)
    before = sorted(tmp_path.iterdir())
    files.require_trials_folder(tmp_path)  # that run has ended; its lock's file is still there
    assert sorted(tmp_path.iterdir()) == before


def test_junk_among_misses_is_skipped(home):
    file = misses.file()
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\n".join(JUNK) + b"\n")
    assert misses.read() == []
    wanted = misses.Missed("cpu", "pocketvar", "paper", "256", "1.000")
    misses.record(wanted)
    assert misses.read() == [wanted]


GOOD = Line("k", "what", None, Times((2.0,), ((1.0,),), 1.0, None), None)


def test_junk_in_a_log_is_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path).keep(GOOD)
    with path.open("ab") as file:
        file.write(
            b"\n".join(JUNK) + b"\n" + json.dumps({**json.loads(path.read_text()), "times": None, "new": 1}).encode() + b"\n"
        )
    assert read_log(path) == [GOOD]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_lines_about_one_thing_the_one_that_worked_counts(tmp_path, order):
    failed = Line("k", "what", None, None, "died: once")
    path = tmp_path / "log.jsonl"
    for i in order:
        Log(path).keep((GOOD, failed)[i])
    assert Log(path).lines == {"k": GOOD}
    slower = dataclasses.replace(GOOD, times=Times((9.0,), ((9.0,),), 1.0, None))
    other = tmp_path / "other.jsonl"
    Log(other).keep(slower)
    assert Log(path, [other]).lines["k"] in (GOOD, slower)


@pytest.mark.parametrize("content", JUNK, ids=range(len(JUNK)))
def test_junk_for_an_overlay_is_one_line(home, content):
    path = overlay.file("cpu", "pocketvar.json")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert str(path) in refused(overlay.find, "cpu", "pocketvar.json")


@pytest.mark.parametrize("name", ["queue.py", "random.py", "torch/__init__.py", "json.py"])
def test_workers_import_nothing_of_the_current_folder(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('code of the current folder was run')\n")
    monkeypatch.chdir(tmp_path)
    with Pool("sparvar_tune.catalog.names:unknown_name", [{"PYTHONPATH": PYTHONPATH}]) as pool:
        (outcome,) = pool.run([Job("x", "payload", 240.0)])
    assert outcome.failure == "raised" and "unknown_name" in outcome.detail, outcome  # it started, and was called
