"""Making many binaries ready in the background, before the first call that needs them.

    ahead = Ahead(builds, device)    a thread begins
    ...                              the caller does what needs no binary of ours
    ahead.wait()                     every launcher is where its first call finds it, or what was raised is raised here

Compiling holds Python's lock for most of its time, so threads do it hardly faster than one: 25 binaries took 9.3 s of 16 cores.
What is not in Triton's cache on disk is therefore compiled by other processes, which leave it there. They are forks and not new
interpreters, which would import PyTorch and Triton first (2 s, as long as most of the work): one fork of this process, made by
`read_triton` before an image begins, is the parent of all others and does nothing else. What speaks against forks:

- A child must not use CUDA, whose state is not copied. It compiles for a named target and loads nothing on a GPU; it collects
  no garbage and ends with `os._exit`, so no tensor of this process is freed in it and no handler of an exit runs.
- A lock that another thread holds at the fork stays held in the child for ever: of an import, of a library that is being loaded.
  While a first image is drawn there are many of both; one of ten cold starts hung for a minute when forks were made then. The
  parent is made while nothing is going on, and its own children are forked from a process of one thread.
  Should a child hang all the same, its alarm ends it after LIMIT_S a binary.
- Children that outlive this process would hold its GPU memory. The parent ends when its socket does or nothing was asked of it
  for IDLE_S, at the latest a second after this process, and the kernel ends the others with it.

Nothing is left to chance: what children did not make, because one crashed, hung or raised, or because there are none (Windows,
macOS, no memory for a fork), is compiled by threads of this process, and what is wrong with it is raised there.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch

LIMIT_S = 30  # for one binary; the longest takes 4 s of an idle core
IDLE_S = 60  # that the parent of all children waits to be asked
MOST = 16  # children, or threads
JOBS = 256  # a job's number is one byte
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Ahead:
    """Binaries (`backends.triton.binary.Build`) that are being made ready for `device`; see the module docstring.

    What another one is making already is waited for and not made twice. after: returns when this one may begin to compile.
    begun: set when its children are at work, when it needs none, or when it failed.
    """

    _begun: ClassVar[dict[tuple[Any, torch.device], Ahead]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, builds: Iterable[Any], device: torch.device, after: Callable[[], None] = lambda: None) -> None:
        self._error: BaseException | None = None
        self._after, self.begun = after, threading.Event()
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
            self._after()
            if self._own:
                _make_ready([build for build, _ in self._own], self._own[0][1], self.begun.set)
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
    """Begins to read Triton's own files, whose hash is part of every key of its cache: 0.4 s that need no lock of Python's.

    Makes the parent of the children that will compile, now that nothing is going on.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # no memory for it
            _parent()
    threading.Thread(target=_read_triton, daemon=True).start()


_READING = threading.Lock()  # one thread reads, the others wait for what it found
# Of one `Ahead` at a time, but not while it waits for children: these would find Triton's own locks held by the others' threads.
_IN_TRITON = threading.Lock()


def _read_triton() -> None:
    from triton.runtime import cache

    with _READING:
        getattr(cache, "triton_key", lambda: None)()


def _make_ready(builds: list[Any], device: torch.device, begun: Callable[[], None]) -> None:
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
        with ThreadPoolExecutor(_side_by_side(len(builds))) as pool:
            missing = [build for build, made in zip(builds, pool.map(is_made, builds), strict=True) if not made]
        if not missing:
            return
        missing.sort(key=_size, reverse=True)
        wait = in_children(missing, torch.cuda.get_device_capability(device))
    begun()
    wait()
    with _IN_TRITON, ThreadPoolExecutor(_side_by_side(len(missing))) as pool:
        with contextlib.suppress(Exception):  # launching says what is wrong with it
            binary.load_driver()  # not sooner: the next `Ahead` forks first, whose binaries may be the longest
        list(pool.map(lambda build: binary.launcher(build, device), missing))


def _side_by_side(jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores, jobs))


def _size(build: Any) -> tuple[int, int]:
    """The larger, the longer it is compiled, about: kernels of many arguments, with large tiles and all there is to do."""
    return len(build.types), sum(value for _, value in build.constants)


def in_children(builds: Sequence[Any], capability: tuple[int, int]) -> Callable[[], None]:
    """Begins to compile in children what is not in Triton's cache, in this order; returns what waits for all of them.

    Says nothing of what failed: it is then not in the cache.
    """
    if sys.platform != "linux":
        return lambda: None
    room = tempfile.mkdtemp()  # files of who is ended in the middle
    asked = {
        "builds": [{"of": type(build).__name__, **asdict(build)} for build in builds[:JOBS]],
        "capability": capability, "limit_s": LIMIT_S, "room": room, "many": _side_by_side(len(builds)),
        "variables": {name: value for name, value in os.environ.items() if name.startswith("TRITON_")},
    }  # fmt: skip
    done: int | None = None
    with contextlib.suppress(OSError):  # no memory for a fork
        try:
            done = _ask(asked)
        except ConnectionError:  # the parent has just ended
            done = _ask(asked)

    def wait() -> None:
        if done is not None:
            while os.read(done, 1):
                pass
            os.close(done)
        shutil.rmtree(room, ignore_errors=True)

    return wait


class _Parent(NamedTuple):
    """The one child of this process, and this end of the socket to it. of: the process that it belongs to."""

    child: int
    socket: socket.socket
    of: int


_PARENT: list[_Parent] = []  # none or one
_ASKING = threading.RLock()


def _ask(asked: dict[str, Any]) -> int:
    """Gives the parent something to do; returns what can be read to its end when it is done. Raises OSError where it cannot."""
    text = json.dumps(asked).encode()
    with _ASKING:  # a parent that was forked between the pipe and its closing would hold it open
        link = _parent().socket
        done, theirs = os.pipe()
        try:
            socket.send_fds(link, [len(text).to_bytes(8, "little")], [theirs])
            link.sendall(text)
        except OSError:
            os.close(done)
            dismiss()
            raise
        finally:
            os.close(theirs)
        return done


def _parent() -> _Parent:
    """The parent, forked now where there is none, or another process's. Raises OSError where none can be had."""
    with _ASKING:
        if _PARENT and (_PARENT[0].of != os.getpid() or _has_ended(_PARENT[0].child)):
            _PARENT.pop().socket.close()
        if not _PARENT:
            ours, its = socket.socketpair()
            # not by a context, which other threads would see half of
            warnings.filterwarnings("ignore", r".*multi-threaded, use of fork", DeprecationWarning, __name__.replace(".", r"\."))
            before, prctl = os.getpid(), ctypes.CDLL(None).prctl
            try:
                child = os.fork()
            except OSError:
                ours.close()
                its.close()
                raise
            if child == 0:
                ours.close()
                _be_parent(its, before, prctl)
            its.close()
            _PARENT.append(_Parent(child, ours, before))
        return _PARENT[0]


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # somebody else waits for all children
        return True


def dismiss() -> None:
    """Ends the parent and who works for it."""
    with _ASKING:
        while _PARENT:
            child, link, of = _PARENT.pop()
            link.close()
            if of == os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)


atexit.register(dismiss)


def _be_parent(link: socket.socket, before: int, prctl: Any) -> NoReturn:
    """What the first child does: it starts the others, again and again."""
    try:
        _be_child(0, before)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # it waits for nobody
        begun = False
        asked_at = time.monotonic()
        while os.getppid() == before and time.monotonic() - asked_at < IDLE_S:
            if not select.select([link], [], [], 1.0 if begun else 0.0)[0]:
                if not begun:  # what all of them need, while nothing is asked
                    _read_triton()
                    begun = True
                continue
            head, (theirs, *_), *_ = socket.recv_fds(link, 8, 1)  # nothing, and so an error and the end, where the socket ended
            text = bytearray()
            while len(text) < int.from_bytes(head, "little") and (more := link.recv(1 << 16)):
                text += more
            _start(json.loads(text), theirs, prctl)
            os.close(theirs)
            asked_at = time.monotonic()
    finally:
        os._exit(0)


def _start(asked: dict[str, Any], theirs: int, prctl: Any) -> None:
    """Forks who does what was asked; they hold `theirs` until they end."""
    from sparvar_kernels.backends.triton.binary import Build
    from sparvar_kernels.path.triton.launch import PathBuild

    kinds = {kind.__name__: kind for kind in (Build, PathBuild)}
    builds = [kinds[build["of"]].from_plain(build) for build in asked["builds"]]
    jobs, given = os.pipe()
    os.write(given, bytes(range(len(builds))))
    os.close(given)  # so that a child that finds no more reads an end
    own = os.getpid()
    for _ in range(asked["many"]):
        if os.fork() == 0:
            os.environ.update(asked["variables"])
            tempfile.tempdir = asked["room"]  # where the files of who is ended in the middle are found
            _work(jobs, builds, tuple(asked["capability"]), asked["limit_s"], own, prctl)
    os.close(jobs)


def _work(jobs: int, builds: Sequence[Any], capability: tuple[int, int], limit_s: int, before: int, prctl: Any) -> NoReturn:
    """What each of the others does: it takes the next binary until there is none."""
    try:
        _be_child(limit_s, before)
        prctl(DIES_WITH_PARENT, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it does wait for the assembler
        from sparvar_kernels.backends.triton.binary import compile_for, link

        while os.getppid() == before and (job := os.read(jobs, 1)):
            signal.alarm(limit_s)
            with contextlib.suppress(Exception):
                link(compile_for(builds[job[0]], capability))
    finally:
        os._exit(0)


def _be_child(limit_s: int, before: int) -> None:
    """Ends after limit_s (0: not by itself) or at a signal, frees nothing that is its parent's, and says nothing."""
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.alarm(limit_s)
    if os.getppid() != before:  # it ended meanwhile
        os._exit(0)
    gc.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    for output in (0, 1, 2):
        os.dup2(nothing, output)
