"""Searches of several processes on one storage: SQLite, a journal and a real PostgreSQL server.

MySQL too where SPARVAR_TEST_MYSQL names a server, as in mysql://user:password@127.0.0.1:3306, whose user may create databases.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from leftovers import wait_for
from places import PYTHONPATH

from sparvar_tune.cli import parser
from sparvar_tune.policy_search import storage
from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.planned_trials import FIRST_PRICE, FIXED_POINTS, common_price, next_planned
from sparvar_tune.policy_search.trial import FinishedTrial, Knobs, Verdict

LONG = 1500.0  # seconds; only ends a test that would wait for ever
KINDS = ("sqlite", "journal", "postgresql", "mysql")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URI of a PostgreSQL server of this session, with a password that says what must not be printed.

    Its folder is none of pytest's, which every new session closes to other users, such as the server's. The package waits
    10 s for its start, which a busy machine may take several times.
    """
    pgserver = pytest.importorskip("pgserver", reason="pgserver has no wheel for this Python")
    with tempfile.TemporaryDirectory(prefix="sparvar-postgres-", ignore_cleanup_errors=True) as folder:
        for left in reversed(range(12)):
            try:
                made = pgserver.get_server(folder)
                break
            except (subprocess.SubprocessError, OSError):
                if not left:
                    raise
        yield made.get_uri()
        made.cleanup()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = f"t{abs(hash(str(tmp_path)))}"  # of a database of this test's own; a hash: nothing to quote
    if request.param == "postgresql":
        uri = request.getfixturevalue("server")
        import psycopg

        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return str(uri).replace("/postgres?", f"/{name}?")
    if request.param == "mysql":
        if not (uri := os.environ.get("SPARVAR_TEST_MYSQL")):
            pytest.skip("SPARVAR_TEST_MYSQL names no server")
        import sqlalchemy

        with sqlalchemy.create_engine(uri.replace("mysql://", "mysql+pymysql://")).connect() as connection:
            connection.execute(sqlalchemy.text(f"create database {name}"))
        return f"{uri.rstrip('/')}/{name}"
    return f"sqlite:///{tmp_path}/shared.db" if request.param == "sqlite" else f"journal://{tmp_path}/shared.journal"


def start(
    url: str, trials: int, sleep_s: float, log: Path, grace_s: int = 60, other: Path | None = None
) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([PYTHONPATH, *sys.path])}
    words = [url, str(trials), str(sleep_s), str(log), str(grace_s), *([str(other)] if other else [])]
    return subprocess.Popen([sys.executable, "-m", "shared_search", *words], env=env, text=True, stderr=subprocess.PIPE)


def read(log: Path, what: str) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if line["what"] == what]


def kept(url: str) -> list[FinishedTrial]:
    return search.finished(search.join_study(storage.open_shared(url), "space"))


@pytest.mark.slow
@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_two_processes_share_every_trial_and_double_none(url, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    both = [start(url, 10, 0.0, log, other=other) for log, other in zip(logs, reversed(logs), strict=True)]
    for process in both:
        _, err = process.communicate(timeout=LONG)
        assert process.returncode == 0, err
    told = [line for log in logs for line in read(log, "told")]
    assert all(len(read(log, "told")) >= 3 for log in logs)
    assert not any(read(log, "waited in vain") for log in logs), "they were not at work at the same time"
    found = {f.number: f.knobs for f in kept(url)}
    assert len({line["number"] for line in told}) == len(told)
    assert {line["number"]: Knobs(**line["knobs"]) for line in told}.items() <= found.items()
    judged = [Knobs(**line["knobs"]) for log in logs for line in read(log, "judge")]
    assert len(set(judged)) == len(judged) == len(told), "the same knobs were judged twice"
    assert {k.form for k in judged} == {*FIXED_POINTS, "priced"} and set(found.values()) == set(judged)


@pytest.mark.slow
@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_a_killed_process_neither_hangs_nor_spoils_the_other(url, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    first = start(url, 99, 600.0, logs[0], grace_s=2)
    wait_for(lambda: read(logs[0], "judge"))  # at the paper's setting, which nobody else takes now
    second = start(url, 9, 0.2, logs[1], grace_s=2)
    wait_for(lambda: read(logs[1], "told"))
    assert read(logs[1], "judge")[0]["knobs"]["form"] == "drop last scale"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, err = second.communicate(timeout=LONG)
    assert second.returncode == 0, err
    shared = storage.open_shared(url, 1, 2)
    study = search.join_study(shared, "space")
    wait_for(lambda: shared.stale(study) or not storage._running(study))
    done, told = search.finished(study), list[FinishedTrial]()
    assert {line["number"] for line in read(logs[1], "told")} <= {f.number for f in done}
    search.search(study, lambda knobs: done[0].verdict, lambda: len(search.finished(study)) >= len(done) + 2, told.append, shared)
    assert [f.knobs.form for f in kept(url)].count("paper") >= 1, "nobody took up what the killed one was at"


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_what_is_taken_for_dead_and_lives_loses_no_trial(url):
    shared = storage.open_shared(url)
    study, told = search.join_study(shared, "space"), []

    def judge(knobs: Knobs) -> Verdict:
        if not told:
            for trial in storage._running(study):
                storage._fail(study, trial)
        return Verdict(10.0, -1.0, {"psnr": 36.0, "ssim": 0.97}, True)

    search.search(study, judge, lambda: len(told) >= 2, told.append, shared)
    assert [f.number for f in search.finished(study)] == [f.number for f in told] == [1, 2]
    assert [f.knobs for f in search.finished(study)] == [f.knobs for f in told]


def test_a_trial_without_an_owner_is_closed_after_a_while(tmp_path, monkeypatch):
    shared = storage.open_shared(f"sqlite:///{tmp_path}/shared.db")
    study = search.join_study(shared, "space")
    study.ask()
    shared.stale(study)
    assert len(storage._running(study)) == 1
    monkeypatch.setattr(storage, "UNOWNED_S", -1)
    shared.stale(study)
    assert not storage._running(study)


def test_of_two_that_choose_at_once_the_first_keeps_the_knobs(tmp_path):
    shared = storage.open_shared(f"sqlite:///{tmp_path}/shared.db")
    study = search.join_study(shared, "space")
    paper = json.dumps(asdict(Knobs(form="paper")))
    for _ in range(2):
        study.enqueue_trial({"form": "paper"}, user_attrs={"knobs": paper})
    trials = [study.ask(), study.ask()]
    assert [search._taken(study, t, Knobs(form="paper")) for t in trials] == [False, True]


def test_a_torn_line_of_a_killed_writer_is_cut(tmp_path):
    path = tmp_path / "shared.journal"
    study = search.join_study(storage.open_shared(f"journal://{path}"), "space")
    study.ask()
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    other = search.join_study(storage.open_shared(f"journal://{path}"), "space")
    assert other.ask().number == 1 and all(json.loads(line) for line in path.read_text().splitlines())
    assert len(study.get_trials()) == 2


def test_two_lies_look_to_both_sides():
    first = next_planned(SEEDS, ())
    second = next_planned(SEEDS, {first})
    assert first == common_price(FIRST_PRICE) and second.price_last > first.price_last
    met = FinishedTrial(2, first, Verdict(1.0, -1.0, {"psnr": 36.0, "ssim": 0.97}, True))
    assert next_planned([*SEEDS, met], ()).price_last < first.price_last


SEEDS = [
    FinishedTrial(i, Knobs(form=form), Verdict(1.0, 5.0, {"psnr": 29.0, "ssim": 0.9}, True))
    for i, form in enumerate(("paper", "drop last scale"))
]


@pytest.mark.parametrize(("words", "said"), [
    ("nonsense", "cannot be read as a URL"), ("redis://u:hunter2@host/0", "no storage of this kind"),
    ("sqlite://", "names no file"), ("sqlite:////no/such/folder/x.db", "No such file or directory"),
    ("journal://relative", "three slashes"), ("journal:////dev/null/x", "Not a directory"),
    ("postgresql://u:hunter2@localhost:1/x?connect_timeout=2", "refused"), ("postgresql://u:hun@ter2@localhost/x", "%40"),
    ("postgresql://u:hunter2@localhost:port/x", "cannot be read"), ("mysql://u:hunter2@localhost:1/x", "refused"),
    ("postgresql+nodriver://u:hunter2@h/x", "nodriver"),
])  # fmt: skip
def test_bad_urls_are_one_line_before_any_work(capsys, home, monkeypatch, words, said):
    """A dry run says the same one."""
    monkeypatch.setattr("sparvar_tune.ways.subject.load_adapter", lambda *_: pytest.fail("work began"))
    lines = set()
    for more in ([], ["--dry-run"]):
        assert parser.main(["--gpu", "cpu", "--model", "pocketvar", "--storage", words, *more]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and "Traceback" not in err, err
        assert not any(secret in out + err for secret in ("hunter2", "hun@", "ter2"))
        lines.add(err)
    assert len(lines) == 1


@pytest.mark.parametrize("url", KINDS, indirect=True)
def test_a_dry_run_says_where_and_makes_nothing(capsys, home, tmp_path, url):
    """On what is not there, and on what another run made."""
    words = ["--gpu", "cpu", "--model", "pocketvar", "--dry-run", "--storage", url]
    assert parser.main(words) == 0 and not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert f"trials go to {storage.place(url)}" in out and "hunter2" not in out
    storage.open_shared(url)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert parser.main(words) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == made


def test_a_dry_run_makes_no_file_of_a_uri_that_sqlite_reads_itself(capsys, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///file:a%2520b.db?uri=true"
    assert parser.main(["--gpu", "cpu", "--model", "pocketvar", "--dry-run", "--storage", url]) == 0
    storage.require_shared(url)
    with pytest.raises(ValueError, match="no such file"):
        storage.open_existing(url)
    assert not list(tmp_path.iterdir())
    storage.open_shared(url)
    assert [path.name for path in tmp_path.iterdir()] == ["a b.db"]
    storage.require_shared(url)
    storage.open_existing(url)
    with pytest.raises(ValueError, match="unable to open"):
        storage.require_shared("sqlite:///file:other.db?mode=rw&uri=true")
    for memory in ("file:x?mode=memory&uri=true", "file::memory:?uri=true"):
        with pytest.raises(ValueError, match="names no file"):
            storage.require_shared(f"sqlite:///{memory}")


@pytest.mark.parametrize("name, said", [("alive", "is no folder"), ("flock", "Is a directory")])
def test_what_is_in_the_place_of_a_journals_own_files_is_refused(capsys, home, tmp_path, monkeypatch, name, said):
    """A dry run says the same line as the run."""
    monkeypatch.setattr("sparvar_tune.ways.subject.load_adapter", lambda *_: pytest.fail("work began"))
    beside = tmp_path / f"shared.journal.{name}"
    beside.write_text("") if name == "alive" else beside.mkdir()
    lines = set()
    for more in ([], ["--dry-run"]):
        words = ["--gpu", "cpu", "--model", "pocketvar", "--storage", f"journal://{tmp_path}/shared.journal", *more]
        assert parser.main(words) == 2
        lines.add(capsys.readouterr().err)
    assert len(lines) == 1 and said in lines.pop()
    assert list(tmp_path.iterdir()) == [beside]


def test_a_missing_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"needs psycopg.*pip install 'sparvar-tune\[storage\]'"):
        storage.open_shared("postgresql://u:hunter2@localhost/x")


def test_a_wrong_password_is_not_repeated(server, tmp_path):
    """The server asks nobody of this machine for one, so a user that is not there stands in for a refusal."""
    with pytest.raises(ValueError, match="nobody") as refused:
        storage.open_shared(str(server).replace("postgres:@", "nobody:hunter2@"))
    assert "hunter2" not in str(refused.value) and "check server" in str(refused.value)


@pytest.mark.parametrize("content", [b"not a database, and long enough to have a header" * 9, b'{"op_code": \n{}\n'])
def test_other_files_are_refused_and_left_as_they_are(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    for scheme in ("sqlite:///", "journal://"):
        for opens in (storage.require_shared, storage.open_shared):
            with pytest.raises(ValueError, match="Optuna"):
                opens(f"{scheme}{path}")
            assert path.read_bytes() == content
