"""Ours over dense, in turn inside one process: what is left when the machine is slow today, or busy.

On a CPU time is that of the thread, which stands still while others have the processor, and torch gets one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sparvar_tune.measure.timing import Clock, interleaved, paired_speedup
from sparvar_tune.profile.schema import Speedup
from sparvar_tune.regression.baseline import RATIO_SLACK, Fact

FEWEST, MOST, AT_ONCE = 16, 160, 16  # pairs
NARROW = 0.03  # half of the interval over the median, at which there are pairs enough: 20 % is then far outside


def cpu_ratio(
    ours: Callable[[], object], dense: Callable[[], object], clock: Clock = time.thread_time, most: int = MOST
) -> Speedup:
    """Median of dense / ours over pairs, each way first in turn, until the 95 % interval is narrow."""
    for way in (ours, dense):
        way()
    times: tuple[list[float], list[float]] = [], []
    while len(times[0]) < most:
        for _ in range(AT_ONCE):
            first = len(times[0]) % 2
            for which in (first, 1 - first):
                begun = clock()
                (ours, dense)[which]()
                times[which].append(clock() - begun)
        found = paired_speedup(times[1], times[0])
        if len(times[0]) >= FEWEST and found.high - found.low < 2 * NARROW * found.median:
            break
    return found


def gpu_ratio(ours: Callable[[], object], dense: Callable[[], object], rounds: int = MOST) -> Speedup:
    """The same by events on the current GPU."""
    times = interleaved({"ours": ours, "dense": dense}, rounds)
    return paired_speedup(times["dense"], times["ours"])


@contextmanager
def one_thread() -> Iterator[None]:
    """What threads wait for one another is not the code's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratio(name: str, found: Speedup, under: str) -> Fact:
    """As a fact that must not become smaller."""
    return Fact(name, found.median, found.low, found.high, "x", "higher", RATIO_SLACK, under)
