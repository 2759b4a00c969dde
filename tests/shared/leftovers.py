"""Processes of a test: found by a mark in their environment that children inherit, and waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def marked(mark: str) -> list[int]:
    """Processes whose environment has MARK=mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            if f"MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def gone(mark: str, seconds: float = 10.0) -> bool:
    """True once none is left; waits so long for it."""
    until = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    return not left


def running(pid: int) -> bool:
    """False once the process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(true: Callable[[], object], seconds: float = 240.0) -> None:
    """Until it is so. The limit only ends a test that would wait for ever: no machine is too slow for it."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
