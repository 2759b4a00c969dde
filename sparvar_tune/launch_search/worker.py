"""The inside of a worker process (see `workers`): it takes a job from its socket, calls the target, sends what came of it.

Both ways go JSON frames, so nothing another process says is ever unpickled.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

HEAD = struct.Struct("!4sI")  # MAGIC, length of the JSON that follows
MAGIC, MOST_BYTES = b"spw1", 1 << 26
TAIL = 2000  # characters of an error worth keeping
# What drivers, torch and Triton say when the CUDA context is lost with the call: whatever follows in that process fails too.
BROKEN = (
    "cuda error", "cuda_error", "illegal memory access", "device-side assert", "unspecified launch failure",
    "misaligned address", "illegal instruction",
)  # fmt: skip
PR_SET_PDEATHSIG = 1


class Poisoned(RuntimeError):
    """Raised by a target whose process must not be used again."""


def frame(message: object) -> bytes:
    """The message as it goes over the wire; TypeError, ValueError or RecursionError if it is no JSON or too long."""
    body = json.dumps(message).encode()
    if len(body) > MOST_BYTES:
        raise ValueError(f"got a message of {len(body)} bytes, want at most {MOST_BYTES}")
    return HEAD.pack(MAGIC, len(body)) + body


def unframe(inbox: bytes | bytearray) -> object | None:
    """The one message that is all of `inbox`, None while it is incomplete; ValueError or RecursionError if it is none."""
    if len(inbox) < HEAD.size:
        return None
    magic, size = HEAD.unpack_from(inbox)
    if magic != MAGIC or not 0 < size <= MOST_BYTES or len(inbox) > HEAD.size + size:
        raise ValueError("no message")
    return json.loads(inbox[HEAD.size :]) if len(inbox) == HEAD.size + size else None


def line(text: str) -> str:
    return " ".join(text.split())


def serve(target: str, fd: str, tied: str) -> None:
    """Imports the target, says "ready" and answers jobs until killed, or until the other end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if tied == "tied" and sys.platform == "linux":
        _die_with_parent()
    wire = socket.socket(fileno=int(fd))
    wire.set_inheritable(False)  # a compiler that the target starts must not hold it open
    jobs: SimpleQueue[tuple[int, object]] = SimpleQueue()
    threading.Thread(target=_listen, args=(wire, jobs), daemon=True).start()
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    wire.sendall(frame("ready"))
    while True:
        wire.sendall(_answer(function, *jobs.get()))


def _answer(function: Callable[[object], object], number: int, payload: object) -> bytes:
    begun = time.perf_counter()
    try:
        value = function(payload)
        return frame([number, time.perf_counter() - begun, value, None, False])
    except BaseException as error:
        chain = "".join(traceback.format_exception(error, limit=0)).lower()  # the cause may be the one to name CUDA
        poisoned = isinstance(error, Poisoned) or any(words in chain for words in BROKEN)
        text = line("".join(traceback.format_exception_only(error)))[:TAIL]
        return frame([number, time.perf_counter() - begun, None, text, poisoned])


def _listen(wire: socket.socket, jobs: SimpleQueue[tuple[int, object]]) -> None:
    """Reads jobs until the parent is gone; then ends the process, whatever it is doing, and all that it started."""
    try:
        with wire.makefile("rb") as stream:
            while head := stream.read(HEAD.size):
                number, payload = json.loads(stream.read(HEAD.unpack(head)[1]))
                jobs.put((number, payload))
    finally:
        with suppress(ProcessLookupError):  # started by hand it leads no group, and the group is somebody else's
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def _die_with_parent() -> None:
    """Sees to a worker stuck in code that holds the GIL, where `_listen` cannot run.

    When the parent dies the kernel sends SIGHUP, and its handler is the C function `alarm`, called with the signal's number, 1:
    death one second later without any Python. The second is for `_listen`, which takes the worker's children along.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGHUP, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
