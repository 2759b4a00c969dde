"""What ranges and the monitor cost a call of attention: off, off again after a run, and on.

    python -m lab.range_cost --out reports/range-cost.md

A call here does next to nothing: the layer behind it returns its query. So what is left is the door, `SparseAttention.__call__`,
which is where a cost would be. Blocks of calls run in rotating order; the difference is of paired blocks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.measure.timing import rotated
from sparvar_tune.monitoring import Monitor, monitor
from sparvar_tune.profile.machine import silicon
from sparvar_tune.profile.store import write_atomic
from sparvar_tune.runtime import Tuned
from sparvar_tune.tracing import Tracer, traced
from sparvar_tune.tracing.ranges import HostClock

CALLS, ROUNDS = 200, 1500


class Nothing:
    """A layer that returns its query."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale_index: int) -> Tensor:
        return q

    def reset(self) -> None:
        pass


class Nobody:
    """A sink that keeps nothing."""

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...
    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...
    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...


def door() -> tuple[SparseAttention, tuple[Any, ...]]:
    """An attention whose three layers do nothing, and the arguments of a call of the middle one."""
    schedule = ScaleSchedule.square((1, 2))
    attend = SparseAttention(Policy.uniform(3, 1, {}), schedule)
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 8)
    attend(q, k, k, 1, 1)
    attend._layers = {kind: [Nothing() for _ in layers] for kind, layers in attend._layers.items()}
    attend._ready.clear()
    return attend, (q, k, k, 1, 1)


def block_us(call: Callable[..., object], arguments: tuple[Any, ...], calls: int) -> float:
    """Microseconds of a call, the mean of a block."""
    begun = time.perf_counter_ns()
    for _ in range(calls):
        call(*arguments)
    return (time.perf_counter_ns() - begun) / calls / 1e3


def measure(rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, list[float]]:
    """Microseconds a call of each way, by round."""
    (never, arguments), (traced_once, _), (watched_once, _), (watched, _) = door(), door(), door(), door()
    with traced(Tracer("m", HostClock())):
        traced_once(*arguments)
    with _watch(watched_once):
        watched_once(*arguments)
    on = _watch(watched)
    ways: dict[str, Callable[[], float]] = {
        "never": lambda: block_us(never, arguments, calls), "never again": lambda: block_us(never, arguments, calls),
        "after trace": lambda: block_us(traced_once, arguments, calls),
        "after monitor": lambda: block_us(watched_once, arguments, calls),
        "monitored": lambda: block_us(watched, arguments, calls), "traced": lambda: _traced(never, arguments, calls),
    }  # fmt: skip
    spent: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        for name in rotated(names, i):
            spent[name].append(ways[name]())
    on.undo()
    return spent


def _traced(attend: SparseAttention, arguments: tuple[Any, ...], calls: int) -> float:
    with traced(Tracer("m", HostClock())):
        return block_us(attend, arguments, max(calls // 20, 1))


def _watch(attend: SparseAttention) -> Monitor:
    return monitor(Tuned(GPUS["cpu"], None, None, (), _attends={None: attend}), to=Nobody())


def interval(values: list[float]) -> tuple[float, float, float]:
    """(median, low, high): of the median, a 95 % bootstrap interval with a fixed seed."""
    found = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(found), (2000, len(found)), generator=torch.Generator().manual_seed(0))
    medians = found[picks].quantile(0.5, dim=1)
    return median(values), float(medians.quantile(0.025)), float(medians.quantile(0.975))


def render(raw: dict[str, Any]) -> str:
    """The page of raw numbers."""
    spent: dict[str, list[float]] = raw["us"]
    base = spent["never"]
    lines = [
        "# What ranges and the monitor cost a call", "",
        f"{raw['machine']}; torch {raw['torch']}, Python {raw['python']}; {raw['date']}. `python -m lab.range_cost`: "
        f"{raw['rounds']} rounds of {raw['calls']} calls a way, in rotating order, of a call whose layer does nothing. "
        "Differences are medians of paired rounds with a 95 % bootstrap interval. "
        "The goal is 0.1 us at most for what is off.", "",
        "| a call of `SparseAttention` | us | against the first, us (95 %) |", "| --- | --- | --- |",
    ]  # fmt: skip
    says = {
        "never": "never traced or monitored", "never again": "the same once more: the noise",
        "after trace": "tracing off again after a run", "after monitor": "the monitor off again after a run",
        "monitored": "the monitor on, a layer that is neither the first nor the last",
        "traced": "tracing on, this process' clock alone listening",
    }  # fmt: skip
    for name, what in says.items():
        middle, low, high = interval([a - b for a, b in zip(spent[name], base, strict=True)])
        beside = "" if name == "never" else f"{middle:+.3f} ({low:+.3f}..{high:+.3f})"
        lines.append(f"| {what} | {median(spent[name]):.3f} | {beside} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/range-cost.md"))
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    us = measure()
    raw = {"machine": silicon(GPUS["cpu"], True).name, "torch": torch.__version__, "python": platform.python_version(),
           "date": datetime.date.today().isoformat(), "rounds": ROUNDS, "calls": CALLS, "us": us}  # fmt: skip
    write_atomic(out, render(raw).encode())
    raw["us"] = {name: [round(us, 4) for us in values] for name, values in us.items()}
    write_atomic(out.with_suffix(".json"), (json.dumps(raw) + "\n").encode())
    print(render(raw))


if __name__ == "__main__":
    main()
