"""Finds processes that a test left behind, by a mark in their environment that children inherit."""

from __future__ import annotations

import time
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
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.02)
    return not marked(mark)
