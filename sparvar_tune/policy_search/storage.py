"""Where the trials of several runs meet: an Optuna storage, named by a URL, that processes and machines share.

A trial under way belongs to a live process or it is failed: databases by Optuna's heartbeat (clock of the database), a
journal by a file its owner keeps locked, which the kernel unlocks when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from sparvar_tune.profile.files import try_folder

WANT = "want sqlite:///FILE, postgresql://USER@HOST/NAME, mysql://USER@HOST/NAME or journal:///FILE"
DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
# seconds: a beat while a trial is judged; without one for so long it is failed; connecting; waiting for SQLite's lock
BEAT_S, GRACE_S, CONNECT_S, LOCK_S = 10, 60, 10, 60
UNOWNED_S = 600  # a trial nobody put a name on is a process killed within the millisecond; clocks may differ by less
OWNER = "owner"
VERSIONS = ("version_info", "alembic_version")  # tables in which Optuna says what made the others
OPENED_AS_IT_IS = ("ro", "rw")  # modes of a SQLite URI that make no file
OPENINGS = 5  # runs that start together may all try to create the tables; the losers look again


class Shared(Protocol):
    """A storage this process takes part in."""

    storage: Any

    def hold(self, study: optuna.Study, trial: optuna.Trial) -> Any:
        """Context in which the others see that `trial` is alive."""

    def stale(self, study: optuna.Study) -> None:
        """Fails trials whose process is gone."""


def open_shared(url: str, beat_s: int = BEAT_S, grace_s: int = GRACE_S) -> Shared:
    """Connects and makes sure the tables are there. Raises ValueError, one line without the password."""
    _quiet()
    if url.startswith("journal://"):
        return _Journal(_journal_of(url))
    target = _parse(url)
    for opening in range(1, OPENINGS + 1):
        with _one_line_of_database(url, target, again=opening < OPENINGS):
            return _Database(target, beat_s, grace_s)
    raise AssertionError("unreachable")


def require_shared(url: str) -> None:
    """Raises ValueError, one line, where `open_shared` could not open it, as far as can be seen without making anything."""
    _quiet()
    if url.startswith("journal://"):
        path = _journal_of(url)
        with _one_line_of_journal(path):
            if path.exists():
                JournalStorage(JournalFile(path))
        return
    target = _parse(url)
    with _one_line_of_database(url, target):
        _look(target)


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # hold() beats in optimize's place


@contextmanager
def _one_line_of_database(url: str, target: sqlalchemy.URL, again: bool = False) -> Iterator[None]:
    """Turns what opening raises into ValueError, one line. again: but for what those raise that start together; once more."""
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or "a driver"
        raise ValueError(
            f"--storage {place(url)}: needs {missing}, which is not installed; pip install 'sparvar-tune[storage]'"
        ) from None
    except OSError as error:
        raise ValueError(f"--storage {place(url)}: {error.strerror or error}; {_advice(target)}") from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:  # RuntimeError: tables of another Optuna
        if not again or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
            raise ValueError(_line(url, error, _advice(target))) from None


def open_existing(url: str) -> Shared:
    """Connects to a storage to read it: `open_shared`, which would make a file that is not there. Raises ValueError likewise."""
    if url.startswith("journal://"):
        file: Path | None = Path(url.removeprefix("journal://"))
    else:
        file = _file_of(_parse(url))[0]
    if file is not None and not file.is_file():
        raise ValueError(f"--storage {place(url)}: no such file")
    return open_shared(url)


def place(url: str) -> str:
    """The URL for people: no user, no password, no options."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('?')[0].rpartition('@')[2]}" if rest else scheme.split(":")[0]


def _parse(url: str) -> sqlalchemy.URL:
    try:
        target = sqlalchemy.make_url(url)
        kind = target.get_backend_name() if "+" in target.drivername else target.drivername
    except (ArgumentError, ValueError):
        raise ValueError(f"--storage {place(url)}: cannot be read as a URL; {WANT}") from None
    if kind not in DRIVERS:
        raise ValueError(f"--storage {place(url)}: no storage of this kind; {WANT}")
    if "@" in (target.host or ""):
        raise ValueError(f"--storage {place(url)}: more than one @; write one inside a password as %40")
    target = target if "+" in target.drivername else target.set(drivername=DRIVERS[kind])
    if kind == "sqlite" and (target.database in (None, "") or _file_of(target)[0] == Path(":memory:")):
        raise ValueError("--storage sqlite: names no file; want sqlite:///FILE")
    return target


def _advice(target: sqlalchemy.URL) -> str:
    if target.get_backend_name() == "sqlite":
        return "want a database of Optuna, or a new file, in a folder that can be written"
    return "check server, database, user and password (PGPASSWORD or ~/.pgpass keep it off the command line)"


@contextmanager
def one_line(url: str) -> Iterator[None]:
    """Turns what a storage at work raises into ValueError: where, what was got, what to do; never the password."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise ValueError(_line(url, error, "finished trials are kept there, the same command joins them again")) from None


def _line(url: str, error: BaseException, advice: str) -> str:
    found = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    text = " ".join(str(getattr(found, "orig", None) or found).split())
    for secret in _secrets(url):
        text = text.replace(secret, "***")
    return f"--storage {place(url)}: {text[:240] or type(found).__name__}; {advice}"


def _secrets(url: str) -> list[str]:
    """Everything of the URL a driver might repeat and nobody should read: longest first."""
    with suppress(ArgumentError, ValueError):
        target = sqlalchemy.make_url(url)
        words = [target.password, *(value for name, value in target.query.items() if name not in ("host", "port"))]
        raw = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
        return sorted((w for w in {*words, raw} if isinstance(w, str) and len(w) > 2), key=len, reverse=True)
    return [url]


def _look(target: sqlalchemy.URL) -> None:
    """Raises what opening the database would, as far as that can be seen without making anything."""
    file, mode = _file_of(target)
    if file is not None and mode not in OPENED_AS_IT_IS and not file.exists():
        file.parent.stat()  # SQLite makes no folder
        try_folder(file.parent)
        return
    engine = sqlalchemy.create_engine(target, **_options(target))
    try:
        with engine.connect() as connection:
            if file is not None:
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # refused for what is no database and what may only be read
            there = set(sqlalchemy.inspect(connection).get_table_names())
            made = there.issuperset(VERSIONS) and all(
                connection.exec_driver_sql(f"select 1 from {table} limit 1").first() for table in VERSIONS
            )
    finally:
        engine.dispose()
    if made:  # it compares versions, and would write its own where there is none
        RDBStorage(target.render_as_string(hide_password=False), _options(target), skip_table_creation=True).engine.dispose()


def _file_of(target: sqlalchemy.URL) -> tuple[Path | None, str | None]:
    """(the file of a SQLite database, by a path or by a URI that SQLite reads itself; the URI's mode); None: of a server."""
    if target.get_backend_name() != "sqlite":
        return None, None
    (name,), options = target.get_dialect()().create_connect_args(target)
    if not (options.get("uri") and name.startswith("file:")):
        return Path(name), None
    uri = urlsplit(name)
    mode = parse_qs(uri.query).get("mode", [None])[-1]
    return Path(":memory:" if mode == "memory" else unquote(uri.path)), mode


def _options(target: sqlalchemy.URL) -> dict[str, Any]:
    if target.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": LOCK_S}}
    return {"connect_args": {"connect_timeout": CONNECT_S}, "pool_pre_ping": True}


class _Database:
    """SQLite, PostgreSQL or MySQL: `Shared` by Optuna's heartbeat."""

    def __init__(self, target: sqlalchemy.URL, beat_s: int, grace_s: int) -> None:
        self.storage = RDBStorage(
            target.render_as_string(hide_password=False), _options(target), heartbeat_interval=beat_s, grace_period=grace_s
        )
        if target.get_backend_name() == "sqlite":
            _one_writer(self.storage.engine)
        self.beat_s = beat_s

    @contextmanager
    def hold(self, study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
        number = self.storage.get_trial_id_from_study_id_trial_number(
            self.storage.get_study_id_from_name(study.study_name), trial.number
        )
        self.storage.record_heartbeat(number)
        trial.set_user_attr(OWNER, f"{os.uname().nodename} {os.getpid()}")
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.beat_s):
                with suppress(Exception):  # a server away for a moment: the next beat, or the trial's end, will tell
                    self.storage.record_heartbeat(number)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(CONNECT_S)

    def stale(self, study: optuna.Study) -> None:
        optuna.storages.fail_stale_trials(study)
        _fail_unowned(study)


def _one_writer(engine: sqlalchemy.Engine) -> None:
    """Makes every SQLite transaction take the write lock when it begins.

    Otherwise two processes may read the same "waiting" or the same count before either writes, and one of two that
    upgrade from reading to writing is told "locked" at once, whatever the timeout.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_begin_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before know nothing of this


def _fail(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    with suppress(UpdateFinishedTrialError):  # another process was quicker
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _running(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def _fail_unowned(study: optuna.Study) -> None:
    old = datetime.now() - timedelta(seconds=UNOWNED_S)
    for trial in _running(study):
        if OWNER not in trial.user_attrs and trial.datetime_start is not None and trial.datetime_start < old:
            _fail(study, trial)


class _Lock(JournalFileOpenLock):
    """A journal's lock by flock: the kernel releases a killed holder's at once, where a lock file would stay."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.handle = journal, -1

    def acquire(self) -> bool:
        self.handle = os.open(_lock_of(self.journal), os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        cut_torn_tail(self.journal)  # whoever wrote half a line is dead: the lock is ours
        return True

    def release(self) -> None:
        os.close(self.handle)


class JournalFile(JournalFileBackend):
    """Optuna's, whose errors name the file: a write that finds the disk full says none."""

    def __init__(self, path: Path, lock: _Lock | None = None) -> None:
        super().__init__(str(path), lock)
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def cut_torn_tail(journal: Path) -> None:
    """Removes a last line that a kill cut short; new lines would otherwise be glued onto it."""
    raw = journal.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end != len(raw):
        with journal.open("r+b") as file:
            file.truncate(end)


def _journal_of(url: str) -> Path:
    """A journal's file. Raises ValueError, one line, for what is no journal or can be none."""
    path = Path(url.removeprefix("journal://"))
    if not path.is_absolute() or path.name == "":
        raise ValueError(f"--storage journal://{path}: {WANT} (three slashes and an absolute path)")
    alive = _alive_of(path)
    with _one_line_of_journal(path):
        if alive.exists() and not alive.is_dir():
            raise NotADirectoryError(0, f"{alive.name}, in which runs say that they are alive, is no folder")
        for folder in (path.parent, alive):
            try_folder(folder)
        for file in (path, _lock_of(path)):
            if file.exists():
                file.open("r+b").close()
        head = path.open("rb").read(2) if path.is_file() else b""
    if head not in (b"", b'{"'):  # before anything takes its last line for a torn one
        raise ValueError(f"--storage journal://{path}: not a journal of Optuna; want one, or a new file")
    return path


def _alive_of(journal: Path) -> Path:
    """The folder in which each process that takes part keeps a file locked."""
    return journal.with_name(journal.name + ".alive")


def _lock_of(journal: Path) -> Path:
    return journal.with_name(journal.name + ".flock")


@contextmanager
def _one_line_of_journal(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--storage journal://{path}: {error.strerror}; want a file in a folder that can be written") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--storage journal://{path}: a broken journal; want one of Optuna, or a new file") from None


class _Journal:
    """A journal file: `Shared` by one locked file per process in a folder beside it."""

    def __init__(self, path: Path) -> None:
        self.alive, self.name = _alive_of(path), uuid.uuid4().hex
        with _one_line_of_journal(path):
            self.alive.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(self.alive / self.name, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self.handle, fcntl.LOCK_EX)
            self.storage = JournalStorage(JournalFile(path, _Lock(path)))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            (self.alive / self.name).unlink(missing_ok=True)
            os.close(self.handle)

    @contextmanager
    def hold(self, study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
        trial.set_user_attr(OWNER, self.name)
        yield

    def stale(self, study: optuna.Study) -> None:
        for trial in _running(study):
            owner = trial.user_attrs.get(OWNER)
            if owner is not None and owner != self.name and self._gone(owner):
                _fail(study, trial)
        _fail_unowned(study)

    def _gone(self, owner: str) -> bool:
        try:
            handle = os.open(self.alive / owner, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True
