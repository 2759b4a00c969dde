"""Files a run keeps while it works: whether its folder takes any, a lock on it, and lines appended one at a time."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparvar_tune.profile.reader import unique_keys

LOCK = "lock"


def try_folder(folder: Path) -> None:
    """Raises OSError where no file can be made in the folder, or in the one that it would be made in. Leaves nothing."""
    folder = Path(os.path.realpath(folder))
    while True:
        try:
            with tempfile.TemporaryFile(dir=folder):  # without a name, where the file system has such files
                return
        except FileNotFoundError:
            if folder.exists():  # /proc is there and takes none
                raise
            folder = folder.parent


def require_trials_folder(folder: Path) -> None:
    """Raises ValueError, the line of `exclusive`, where that could keep nothing in the folder or another run has it.

    Leaves nothing.
    """
    try:
        try_folder(folder)
        held = (folder / LOCK).exists()
    except OSError as error:
        raise _no_trials(folder, error) from None
    if held:  # or was: the file stays behind
        with exclusive(folder):
            pass


def _no_trials(folder: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or error
    return ValueError(f"{folder}: cannot keep trials here ({reason}); set SPARVAR_TUNE_HOME to a writable folder")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the run folder; raises ValueError when another run does."""
    import filelock  # a runtime that only reads profiles needs none

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"{folder}: another tuning run is at work here; wait for it or set SPARVAR_TUNE_HOME") from None
    except (OSError, NotImplementedError) as error:
        raise _no_trials(folder, error) from None
    with lock:
        yield


def set_aside(path: Path) -> None:
    """Gives the file of an earlier run, if there is one, a name with the time in it."""
    if path.exists():
        path.replace(path.with_stem(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}"))


def append_line(path: Path, data: Any) -> None:
    """Adds one JSON line in one write, so that several processes may append at once. Raises OSError naming the file."""
    line = (json.dumps(data, sort_keys=True, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.lseek(handle, size - 1, os.SEEK_SET) >= 0 and os.read(handle, 1) != b"\n":
            line = b"\n" + line  # what a killed process left half-written must not swallow this line
        written = os.write(handle, line)
        if written < len(line):  # the disk is full: what stands there is a torn line, which readers skip
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON value of every line that is whole, oldest first; others are skipped. Nothing if there is no such file.

    Raises OSError, naming the file, for one that cannot be read.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            continue
