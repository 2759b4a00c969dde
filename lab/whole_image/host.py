"""What a first picture's time hangs on beside the GPU: the host, which plans, launches and captures in Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.profile.machine import silicon

STEPS, TIMES = 1_000_000, 5


def host(clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """host: the CPU's name as the system gives it, which a virtual machine may make vague; python_loop_ms: of `python_loop`, the
    median of a few, by `clock` (seconds). Call it before anything else keeps the cores busy.
    """
    spent = []
    for _ in range(TIMES):
        begun = clock()
        python_loop()
        spent.append((clock() - begun) * 1e3)
    return {"host": silicon(GPUS["cpu"], True).name, "python_loop_ms": median(spent)}


def python_loop() -> int:
    """A fixed piece of pure Python, always the same, so that its time tells hosts (and versions of Python) apart."""
    total = 0
    for i in range(STEPS):
        total += i & 7
    return total
