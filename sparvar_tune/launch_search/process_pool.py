"""Measurements in processes of their own: a crash, a hang or a broken CUDA context is an outcome, never the end of the run.

Each worker is a fresh interpreter running `worker.py`, on one end of a socket pair. Payloads and values are JSON values
(tuples come back as lists). A target may raise `Poisoned` to have its process replaced.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait  # `select` for any number of sockets

from sparvar_tune.launch_search.worker import TAIL, frame, line, unframe
from sparvar_tune.launch_search.worker import Poisoned as Poisoned

STARTS = 3  # failed starts in a row after which a worker is given up
TICK_S = 0.2  # how often to look for a death that the socket does not tell: a forked child may hold it open
EXIT_S, KILL_S = 5.0, 30.0  # a process gets so long to finish exiting, and a killed one to go (freeing GPU memory takes time)
ANSWER_S = 10.0  # for reading an answer that is longer than the socket holds
ENDINGS: dict[int | None, str] = {None: "would not die", **{-s.value: s.name for s in signal.Signals}}  # by return code


@dataclass(frozen=True)
class Job:
    """What a worker is asked. key names the job in logs; timeout_s counts from when the worker is ready."""

    key: str
    payload: object
    timeout_s: float


@dataclass(frozen=True)
class Finished:
    """What became of a job. failure: None, "raised", "died" or "timed out". detail: one line. seconds: spent in the target."""

    key: str
    value: object | None
    failure: str | None
    detail: str
    seconds: float


# A helper imports what its parent imports: Python puts the current folder first, where anything may lie, so it goes again.
START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import importlib; "
    "importlib.import_module('sparvar_tune.launch_search.worker').serve(*sys.argv[1:])"
)


class Pool:
    """Workers that call `target` ("package.module:function"), one for each mapping of extra environment variables."""

    def __init__(self, target: str, workers: Sequence[Mapping[str, str]], start_timeout_s: float = 120.0) -> None:
        if not all(target.partition(":")) or not workers:
            raise ValueError(f"got target {target!r} and {len(workers)} workers, want 'package.module:function' and at least one")
        self._workers = [_Worker(target, env, start_timeout_s) for env in workers]
        self._running = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts every process now, so that their imports go on while the caller does something else."""
        for worker in self._workers:
            worker.start()

    def run(self, jobs: Iterable[Job]) -> Iterator[Finished]:
        """Outcomes as they finish. A job is pulled when a worker is free and every outcome before has been handed out.

        Raises RuntimeError once no worker can be started any more. Left early, it ends the jobs under way.
        """
        if self._running:
            raise RuntimeError("the pool runs other jobs: finish or close that iterator first")
        self._running, queue = True, iter(jobs)
        try:
            while True:
                if all(worker.lost for worker in self._workers):
                    raise RuntimeError(f"no worker is left: {self._workers[-1].lost}")
                for worker in self._workers:
                    if not worker.job and not worker.lost and (job := next(queue, None)):
                        worker.take(job)
                if not (busy := [worker for worker in self._workers if worker.job]):
                    return
                yield from _step(busy)
        finally:
            self._running = False
            for worker in self._workers:
                if worker.job:  # its answer must not be taken for that of a later run's job
                    worker.end()
                    worker.job = None

    def close(self) -> None:
        """Kills every worker and what it started, and waits for them."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.end()
            worker.lost = worker.lost or "the pool is closed"


def _step(busy: list[_Worker]) -> list[Finished]:
    """Waits for something to happen. Collected before they are handed out: the caller may take long over each."""
    left = min(worker.deadline for worker in busy) - time.monotonic()
    heard = wait([worker.wire for worker in busy], min(max(left, 0.0), TICK_S))
    return [outcome for worker in busy if (outcome := worker.look(worker.wire in heard))]


class _Worker:
    """A place for one process at a time: started when a job needs it, ended when it can no longer be trusted."""

    def __init__(self, target: str, env: Mapping[str, str], start_timeout_s: float) -> None:
        self.target, self.env, self.start_timeout_s = target, env, start_timeout_s
        self.process: subprocess.Popen[bytes] | None = None
        self.job: Job | None = None
        self.number = 0  # of the job, so that its answer is told from an older one's
        self.failed_starts = 0
        self.ready = False  # the process has said that it takes jobs
        self.lost = ""  # why no process is tried here any more

    def start(self) -> None:
        if not self.process and not self.lost:
            self._start()

    def take(self, job: Job) -> None:
        """Gives the job to the process, or starts one for it. TypeError or ValueError if the payload is no JSON."""
        self.number += 1
        self.request, self.job = frame([self.number, job.payload]), job
        if self.process and self.ready and (self.process.poll() is not None or wait([self.wire], 0)):
            self.end()  # it died, or spoke out of turn, since its last job: not this one's fault
        if not self.process:
            self._start()
        elif self.ready:
            self._ask()  # else it is starting, and asked once it is ready

    def look(self, heard: bool) -> Finished | None:
        """The outcome of the job, if it is known by now. An answer counts even when it is read after the deadline."""
        assert self.process
        self.spent = time.monotonic() - self.begun
        if heard:
            try:
                return self._hear()
            except (EOFError, OSError):
                return self._fail("died", self.end(EXIT_S))
            except (ValueError, RecursionError):
                return self._fail("died", self.end(why="sent garbage"))
        if self.process.poll() is not None:
            return self._fail("died", self.end())
        if self.begun + self.spent < self.deadline:
            return None
        return self._fail("timed out", self.end(why=f"no answer in {self.deadline - self.begun:g} s"))

    def kill(self) -> None:
        if self.process:
            with suppress(ProcessLookupError, PermissionError):  # PermissionError is macOS's word for a group of zombies
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, grace_s: float = 0.0, why: str = "") -> str:
        """Ends the process and what it started; returns `why`, or how it ended by itself, and the last it said on stderr."""
        if not self.process:
            return why
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self.kill()
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver: `subprocess` waits for it later
            self.process.wait(KILL_S)
        code, self.process = self.process.poll(), None
        size = os.fstat(self.stderr.fileno()).st_size
        said = os.pread(self.stderr.fileno(), 4 * TAIL, max(size - 4 * TAIL, 0)).decode("utf-8", "replace")[-TAIL:]
        self.wire.close()
        self.stderr.close()
        return (why or ENDINGS.get(code, f"exit code {code}")) + (f"; stderr: {line(said)}" if said.strip() else "")

    def _start(self) -> None:
        self.ready, self.inbox = False, bytearray()
        self.stderr = tempfile.TemporaryFile()  # a file never makes the target wait for a reader
        ours, theirs = socket.socketpair()
        # The kernel ties a process to the thread that started it, and only the main thread lasts as long as this process.
        tied = threading.current_thread() is threading.main_thread()
        command = [
            sys.executable,
            "-c",
            START,
            self.target,
            str(theirs.fileno()),
            "tied" if tied else "loose",
        ]
        self.begun = time.monotonic()
        self.deadline = self.begun + self.start_timeout_s
        with theirs:
            process = subprocess.Popen(
                command, env={**os.environ, **self.env}, pass_fds=(theirs.fileno(),), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
            )  # fmt: skip
        self.wire, self.process = ours, process  # interrupted before, `ours` is closed, and that ends the process

    def _ask(self) -> None:
        assert self.job
        self.inbox = bytearray()
        os.ftruncate(self.stderr.fileno(), 0)
        os.lseek(self.stderr.fileno(), 0, os.SEEK_SET)  # shared with the worker: it goes on writing from here
        self.begun = time.monotonic()
        self.deadline = self.begun + self.job.timeout_s
        self.wire.settimeout(max(self.job.timeout_s, 1e-3))
        with suppress(OSError):  # a worker that does not take its job is dead or late, as `look` will find
            self.wire.sendall(self.request)

    def _hear(self) -> Finished | None:
        """Reads on, and acts on a whole message. EOFError or OSError: it is gone. Any other error: it sends garbage."""
        if not (chunk := self.wire.recv(1 << 20)):
            raise EOFError
        if not self.inbox:  # a long answer that began in time, or while the caller was busy, may be read to its end
            self.deadline = max(self.deadline, time.monotonic() + ANSWER_S)
        self.inbox += chunk
        match unframe(self.inbox):
            case None:
                return None  # not whole yet
            case "ready" if not self.ready:
                self.ready, self.failed_starts = True, 0
                self._ask()
                return None
            case [self.number, float(seconds), value, str() | None as error, bool(poisoned)] if self.ready:
                if poisoned:
                    self.end()
                return self._outcome("raised" if error is not None else None, error or "", seconds, value)
        raise ValueError

    def _fail(self, failure: str, detail: str) -> Finished | None:
        if self.ready:
            return self._outcome(failure, detail, self.spent)
        self.failed_starts += 1
        if self.failed_starts < STARTS:
            self._start()
            return None
        self.lost = f"cannot start: {detail}"
        return self._outcome("died", self.lost, 0.0)

    def _outcome(self, failure: str | None, detail: str, seconds: float, value: object = None) -> Finished:
        assert self.job
        job, self.job = self.job, None
        return Finished(job.key, value, failure, detail, seconds)
