"""Turning raw times into honest numbers: quantiles, and ratios against a baseline timed in alternation with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import torch

from sparvar_tune.profile.schema import Speedup, Timing

T = TypeVar("T")


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolation quantile of at least one value."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def timing(samples_ms: Sequence[float]) -> Timing:
    """p20, p50, p80 and n of the samples (milliseconds)."""
    p20, p50, p80 = (quantile(samples_ms, q) for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(samples_ms))


def paired_speedup(dense_ms: Sequence[float], tuned_ms: Sequence[float], resamples: int = 2000) -> Speedup:
    """Median of dense / tuned over pairs timed side by side, with a 95 % bootstrap interval (fixed seed)."""
    ratios = torch.tensor([d / t for d, t in zip(dense_ms, tuned_ms, strict=True)], dtype=torch.float64)
    picks = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(0))
    medians = ratios[picks].quantile(0.5, dim=1)
    low, high = (float(medians.quantile(q)) for q in (0.025, 0.975))
    middle = median(ratios.tolist())
    return Speedup(middle, min(low, middle), max(high, middle), len(ratios))


def rotated(ways: Sequence[T], turn: int) -> list[T]:
    """All of them, each first in its turn: what comes first finds another machine than what comes last."""
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, watch: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each way on the current GPU, by events, one call of each a round in rotating order.

    The clock starts and stops on the device, so host work counts only where it makes the device wait. Inputs larger than
    the L2 cache flush it for one another. `watch` is called once when all work is queued and the GPU is still at it.
    """
    names = list(ways)
    for _ in range(warmup):
        for way in ways.values():
            way()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    torch.cuda.synchronize()
    for i in range(rounds):
        for name in rotated(names, i):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            ways[name]()
            end.record()
            marks[name].append((begin, end))
    if watch:
        watch()
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in marks.items()}


UNDISTURBED = 0.8  # share of its time a thread that computes has a processor on an idle machine, at least

Clock = Callable[[], float]  # seconds since some moment; a replay gives one that recorded times turn
CLOCK: Clock = time.perf_counter


class Stopwatch:
    """Milliseconds of one call, with the device finished on both sides.

    running: the share of all time measured in which this thread had a processor (1 before any). On a CPU it is close to 1
    unless others want the processors too, or the machine has fewer than torch has threads.
    """

    def __init__(self, device: str, clock: Clock = CLOCK, thread_clock: Clock | None = None) -> None:
        self.device, self.clock = device, clock
        self.thread_clock = thread_clock or (time.thread_time if clock is CLOCK else clock)
        self.measured_s = self.ran_s = 0.0

    def __call__(self, work: Callable[[], object]) -> float:
        self._settle()
        begun, ran = self.clock(), self.thread_clock()
        work()
        self._settle()
        spent = self.clock() - begun
        self.measured_s += spent
        self.ran_s += self.thread_clock() - ran
        return spent * 1e3

    @property
    def running(self) -> float:
        return self.ran_s / self.measured_s if self.measured_s > 0 else 1.0

    def load(self) -> str | None:
        """One line where others held the processors while a CPU was timed, else None."""
        if self.device.startswith("cuda") or self.running >= UNDISTURBED:
            return None
        return (f"this machine is busy elsewhere: of the time measured its processors worked on this for {self.running:.0%}; "
                "every time is compared with a dense one beside it, but a gain is less certain")  # fmt: skip

    def _settle(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
