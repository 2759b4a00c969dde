"""Making many binaries ready in the background, before the first call that needs them.

    ahead = Ahead(builds, device)    a thread begins
    ...                              the caller does what needs no binary of ours
    ahead.wait()                     every launcher is where its first call finds it, or what was raised is raised here

Compiling holds Python's lock for most of its time, so threads do it hardly faster than one: 25 binaries took 9.3 s of 16 cores.
What is not in Triton's cache on disk is therefore compiled by children of this process, which leave it there. A child is a
fork and not a new interpreter, which would import PyTorch and Triton first (2 s, as long as most of the work). What speaks
against forks does not hold for these:

- A child must not use CUDA, whose state is not copied. It compiles for a named target and loads nothing on a GPU; it collects
  no garbage and ends with `os._exit`, so no tensor of this process is freed in it and no handler of an exit runs.
- A lock that another thread holds at the fork stays held in the child; Python 3.12 warns of that. A child takes few: what
  Triton and the C library need. Python, the C library and PyTorch renew theirs at a fork, but not the locks of modules that are
  being imported: one of ten cold starts hung for a minute. So the fork waits until nobody else imports (`_nobody_imports`).
  Should a child hang all the same, its alarm ends it after LIMIT_S a binary.
- Children that outlive this process would hold its GPU memory. The kernel ends them with the thread that started them.

Nothing is left to chance: what children did not make, because one crashed, hung or raised, or because there are none (Windows,
macOS, no memory for a fork), is compiled by threads of this process, and what is wrong with it is raised there.
"""

from __future__ import annotations

import _imp
import contextlib
import ctypes
import gc
import importlib._bootstrap
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NoReturn

import torch

LIMIT_S = 30  # for one binary; the longest takes 4 s of an idle core
IMPORT_S = 5  # that a fork waits for other threads' imports at most
MOST = 16  # children, or threads
JOBS = 256  # a job's number is one byte
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Ahead:
    """Binaries (`backends.triton.binary.Build`) that are being made ready for `device`; see the module docstring.

    What another one is making already is waited for and not made twice. after: returns when this one may begin to compile.
    most: children, and threads, at a time; binaries that are needed late leave cores to the longest, for which the image waits.
    begun: set when its children are at work, when it needs none, or when it failed.
    """

    _begun: ClassVar[dict[tuple[Any, torch.device], Ahead]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, builds: Iterable[Any], device: torch.device, after: Callable[[], object] | None = None, most: int = MOST
    ) -> None:
        self._error: BaseException | None = None
        self._after, self._most, self.begun = after, most, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        with self._lock:
            keys = {(build, device): self._begun.get((build, device), self) for build in builds}
            self._own = [key for key, maker in keys.items() if maker is self]
            self._begun.update(dict.fromkeys(self._own, self))
            self._thread.start()
        self._others = dict.fromkeys(maker for maker in keys.values() if maker is not self)

    def wait(self) -> None:
        """Returns when all of them are ready; raises what compiling raised, once."""
        for ahead in (self, *self._others):
            ahead._thread.join()
            error, ahead._error = ahead._error, None
            if error is not None:
                raise error

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after()
            if self._own:
                _make_ready([build for build, _ in self._own], self._own[0][1], self.begun.set, self._most)
        except BaseException as error:
            self._error = error
        finally:
            self.begun.set()
            with self._lock:
                for key in self._own:
                    del self._begun[key]


def compile_ahead(builds: Iterable[Any], device: torch.device) -> None:
    """Makes the launcher of every binary, where its first call finds it."""
    Ahead(builds, device).wait()


def read_triton() -> None:
    """Begins to read Triton's own files, whose hash is part of every key of its cache: 0.4 s that need no lock of Python's."""
    threading.Thread(target=_read_triton, daemon=True).start()


_READING = threading.Lock()  # one thread reads, the others wait for what it found
# Of one `Ahead` at a time, but not while it waits for children: these would find Triton's own locks held by the others' threads.
_IN_TRITON = threading.Lock()


def _read_triton() -> None:
    with contextlib.suppress(ImportError), _READING:  # who launches says that it is missing
        from triton.runtime import cache

        getattr(cache, "triton_key", lambda: None)()


def _make_ready(builds: list[Any], device: torch.device, begun: Callable[[], None], most: int) -> None:
    from sparvar_kernels.backends.triton import binary

    def is_made(build: Any) -> bool:
        try:
            with binary.only_made():
                binary.launcher(build, device)
        except binary.NotMade:
            return False
        return True

    with _IN_TRITON:
        _read_triton()
        with ThreadPoolExecutor(min(most, _side_by_side(len(builds)))) as pool:
            missing = [build for build, made in zip(builds, pool.map(is_made, builds), strict=True) if not made]
        if not missing:
            return
        missing.sort(key=_size, reverse=True)
        wait = in_children(missing, torch.cuda.get_device_capability(device), most)
    begun()
    wait()
    with _IN_TRITON, ThreadPoolExecutor(min(most, _side_by_side(len(missing)))) as pool:
        with contextlib.suppress(Exception):  # launching says what is wrong with it
            binary.load_driver()  # not sooner: the next `Ahead` forks first, whose binaries may be the longest
        list(pool.map(lambda build: binary.launcher(build, device), missing))


def _side_by_side(jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores, jobs))


def _size(build: Any) -> tuple[int, int]:
    """The larger, the longer it is compiled, about: kernels of many arguments, with large tiles and all there is to do."""
    return len(build.types), sum(value for _, value in build.constants)


def in_children(builds: Sequence[Any], capability: tuple[int, int], most: int = MOST) -> Callable[[], None]:
    """Begins to compile in children what is not in Triton's cache, in this order; returns what waits for all of them.

    Says nothing of what failed: it is then not in the cache. One fork of this process is the parent of all others, since a
    fork of a large process holds Python's lock for long.
    """
    if sys.platform != "linux":
        return lambda: None
    room = tempfile.mkdtemp()  # files of who is ended in the middle
    jobs, given = os.pipe()
    os.write(given, bytes(range(min(len(builds), JOBS))))
    os.close(given)  # so that a child that finds no more reads an end
    # not by a context, which other threads would see half of
    warnings.filterwarnings("ignore", r".*multi-threaded, use of fork", DeprecationWarning, __name__.replace(".", r"\."))
    before, prctl = os.getpid(), ctypes.CDLL(None).prctl
    child = -1
    with contextlib.suppress(OSError), _nobody_imports():  # no memory for it
        child = os.fork()
    if child == 0:
        _be_parent(jobs, builds, capability, LIMIT_S, room, before, prctl, most)
    os.close(jobs)

    def wait() -> None:
        if child > 0:
            with contextlib.suppress(ChildProcessError):  # somebody else waits for all children
                os.waitpid(child, 0)
        shutil.rmtree(room, ignore_errors=True)

    return wait


@contextlib.contextmanager
def _nobody_imports() -> Iterator[None]:
    """While it lasts no other thread is in the middle of an import, or after IMPORT_S all the same.

    Each module that is being imported has a lock with an owner; taking one needs the lock of all imports, which is held here.
    """
    locks: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
    until, me = time.monotonic() + IMPORT_S, threading.get_ident()
    while True:
        _imp.acquire_lock()
        owners = (getattr(ref(), "owner", None) for ref in list(locks.values()))
        if all(owner in (None, me) for owner in owners) or time.monotonic() > until:
            break
        _imp.release_lock()
        time.sleep(0.001)
    try:
        yield
    finally:
        _imp.release_lock()


def _be_parent(
    jobs: int, builds: Sequence[Any], capability: tuple[int, int], limit_s: int, room: str, before: int, prctl: Any, most: int
) -> NoReturn:
    """What the first child does: it starts the others and waits for them."""
    try:
        _be_child(limit_s, before, prctl)
        tempfile.tempdir = room  # where the files of who is ended in the middle are found
        own = os.getpid()
        for _ in range(min(most, _side_by_side(len(builds)))):
            if os.fork() == 0:
                _work(jobs, builds, capability, limit_s, own, prctl)
        signal.alarm(0)
        while True:
            os.wait()
    finally:
        os._exit(0)


def _work(jobs: int, builds: Sequence[Any], capability: tuple[int, int], limit_s: int, before: int, prctl: Any) -> NoReturn:
    """What each of the others does: it takes the next binary until there is none."""
    try:
        _be_child(limit_s, before, prctl)
        from sparvar_kernels.backends.triton.binary import compile_for, link

        while job := os.read(jobs, 1):
            signal.alarm(limit_s)
            with contextlib.suppress(Exception):
                link(compile_for(builds[job[0]], capability))
    finally:
        os._exit(0)


def _be_child(limit_s: int, before: int, prctl: Any) -> None:
    """Ends with its parent, after limit_s or at a signal, frees nothing that is its parent's, and says nothing."""
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.alarm(limit_s)
    prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != before:  # it ended meanwhile
        os._exit(0)
    gc.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    for output in (0, 1, 2):
        os.dup2(nothing, output)
