"""What Python does while a first image is drawn: it collects no garbage, and its threads take turns more often.

A first image makes hundreds of thousands of objects, none of them garbage, and a full collection walks all that PyTorch and
Triton hold: 0.2 s of a first image of 2 s. Threads that compile need Python's lock for moments, and get it every 5 ms.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURN_S = 0.0005

_lock = threading.Lock()
_before: list[tuple[bool, float]] = []  # what there was when the first of those that are being drawn began, once for each


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around a first image; the last of several that ends puts back what there was."""
    with _lock:
        _before.append(_before[0] if _before else (gc.isenabled(), sys.getswitchinterval()))
        gc.disable()
        sys.setswitchinterval(min(TURN_S, sys.getswitchinterval()))
    try:
        yield
    finally:
        with _lock:
            collects, turn_s = _before.pop()
            if not _before:
                sys.setswitchinterval(turn_s)
                if collects:
                    gc.enable()
