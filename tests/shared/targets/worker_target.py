"""What the tests of the worker pool call in workers: every way to fail, by name. Imported there, so without torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sparvar_tune.launch_search.process_pool import Poisoned

# A file whose length says how many of the next imports die.
if "BROKEN_STARTS" in os.environ and (broken := Path(os.environ["BROKEN_STARTS"])).read_text():
    broken.write_text(broken.read_text()[1:])
    print("no driver today", file=sys.stderr)
    os._exit(7)


def target(payload: dict) -> object:
    if "began" in payload:
        Path(payload["began"]).touch()
    return globals()[f"do_{payload['mode']}"](payload)


def do_ok(payload: dict) -> object:
    return {"pid": os.getpid(), "echo": payload.get("echo")}


def do_environment(payload: dict) -> object:
    return os.environ.get(payload["name"])


def do_raise(payload: dict) -> object:
    raise ValueError(payload.get("text", "two\nlines"))


def do_chained(payload: dict) -> object:
    try:
        do_raise(payload)
    except ValueError as error:
        raise KeyError("the kernel failed") from error


def do_poison(payload: dict) -> object:
    raise Poisoned("do not use me again")


def do_memory(payload: dict) -> object:
    raise MemoryError("no room")


def do_leave(payload: dict) -> object:
    sys.exit(3)


def do_exit(payload: dict) -> object:
    print("x" * 5000 + "\nlast words", file=sys.stderr)
    os._exit(3)


def do_segfault(payload: dict) -> object:
    ctypes.string_at(0)


def do_kill(payload: dict) -> object:
    os.kill(os.getpid(), signal.SIGKILL)


def do_hang(payload: dict) -> object:
    time.sleep(600)


def do_hang_with_gil(payload: dict) -> object:
    """Reads a pipe that stays empty. Unlike sleep, read goes on after a signal, so Python never runs again."""
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


def do_hang_with_child(payload: dict) -> object:
    subprocess.run(["sleep", "600"])


def do_die_leaving_child(payload: dict) -> object:
    """The child is forked, so it keeps the worker's socket open and the parent reads no end of file."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(4)


def do_noise(payload: dict) -> object:
    for stream in (sys.stdout, sys.stderr):
        print("noise " * 20000, file=stream, flush=True)
    os.write(1, b"\0\1\2\3")
    return "quiet"


def do_garbage(payload: dict) -> object:
    os.write(int(sys.argv[2]), payload.get("text", "garbage").encode())
    return "never believed"


def do_unsayable(payload: dict) -> object:
    return object()


def do_big(payload: dict) -> object:
    return "v" * payload["size"]


def do_die_after(payload: dict) -> object:
    """Answers, and is gone before the next job."""
    import threading

    threading.Timer(0.05, os._exit, (5,)).start()
    return os.getpid()
