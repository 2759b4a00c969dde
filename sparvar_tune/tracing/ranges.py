"""Ranges: what they are called, and what one traced run saw of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparvar_kernels.policy import Policy

# In the order of a block. "attention" is what of a call of attention no other step is, "rest" what of a picture none is: norms,
# gates, sampling, the tokenizer.
STEPS = (
    "norm", "qk path", "attention", "plan", "decide", "gathered", "dense", "pooled", "residual", "text", "products", "decoder",
    "replay", "rest",
)  # fmt: skip
OUTER = "trace"  # the range around a whole run: what a kernel profiler is told to look at


@dataclass(frozen=True)
class Label:
    """A range's name in parts. scale, layer: None where it is of no one scale or layer. variant: kinds, such as "cs4a+csla"."""

    model: str
    step: str
    scale: int | None = None
    layer: int | None = None
    variant: str = ""

    def __str__(self) -> str:
        parts = (("model", self.model), ("scale", self.scale), ("layer", self.layer), ("step", self.step.replace(" ", "-")),
                 ("variant", self.variant or None))  # fmt: skip
        return " ".join(f"{name}={value}" for name, value in parts if value is not None)


@dataclass(frozen=True)
class Work:
    """What a call must do: floating-point operations, and bytes in and out of memory if every operand moves once."""

    flops: float
    moved: float


@dataclass(frozen=True)
class Span:
    """One range as it was seen. own_ms: its time less that of the ranges inside it. work: None where it is not known."""

    label: Label
    begin_ms: float
    ms: float
    own_ms: float
    work: Work | None


class Ranges(Protocol):
    """Somebody who hears of ranges as they begin and end; see backends/."""

    def push(self, name: str) -> None: ...
    def pop(self) -> None: ...


class HostClock:
    """Milliseconds of this process; on a CPU work is done when a call returns."""

    def now(self) -> Any:
        return time.perf_counter_ns()

    def read(self, marks: Sequence[Any]) -> list[float]:
        return [(mark - marks[0]) / 1e6 for mark in marks]


class DeviceClock:
    """Milliseconds of the GPU's stream, by events: a range lasts from when its work begins there to when it ends.

    A range whose launches take the host longer than the device holds that waiting too. Nothing waits until `read`.
    """

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, marks: Sequence[Any]) -> list[float]:
        torch.cuda.synchronize()
        return [float(marks[0].elapsed_time(mark)) for mark in marks]


@dataclass
class _Open:
    """A range under way or done. parent: its place among all, None for the first. work is computed after the run."""

    label: Label
    parent: int | None
    begin: Any
    work: Callable[[], Work] | None
    end: Any = None


class Tracer:
    """Names ranges and keeps them. model: its slug. clock: None keeps nothing. ranges: who else hears of them."""

    def __init__(self, model: str, clock: HostClock | DeviceClock | None = None, ranges: Ranges | None = None) -> None:
        self.model, self.clock, self.ranges = model, clock, ranges
        self.scale: int | None = None
        self.layer: int | None = None
        self.policy: Policy | None = None
        self.opened: list[_Open] = []
        self.under_way: list[int] = []

    @contextmanager
    def range(self, step: str, variant: str = "", work: Callable[[], Work] | None = None) -> Iterator[None]:
        """A range of the scale and layer that are being drawn."""
        label = Label(self.model, step, self.scale, self.layer, variant)
        if self.ranges is not None:
            self.ranges.push(str(label) if step != OUTER else OUTER)
        if self.clock is not None:
            self.opened.append(_Open(label, self.under_way[-1] if self.under_way else None, self.clock.now(), work))
            self.under_way.append(len(self.opened) - 1)
        try:
            yield
        finally:
            if self.clock is not None:
                self.opened[self.under_way.pop()].end = self.clock.now()
            if self.ranges is not None:
                self.ranges.pop()

    @contextmanager
    def inside(self, scale: int | None, layer: int | None = None, policy: Policy | None = None) -> Iterator[None]:
        """Ranges made while it lasts are of this scale, layer and policy."""
        before = self.scale, self.layer, self.policy
        self.scale, self.layer, self.policy = scale, layer, policy or self.policy
        try:
            yield
        finally:
            self.scale, self.layer, self.policy = before

    def variant_of(self, heads: Sequence[int] | None = None) -> str:
        """What these heads (None: all that do anything but read every key) do at the scale and layer being drawn.

        At a decision scale that is what later scales do, if they do nothing else here.
        """
        if self.policy is None or self.layer is None or self.scale is None:
            return ""
        letters = self.policy.heads[self.layer]
        wanted = {letters[h] for h in (range(len(letters)) if heads is None else heads)}
        rules = [r for r in self.policy.rules if r.head_class in wanted]
        listed = [r for r in rules if r.variant.reads not in ("means", "keys and means")]
        here = {r.variant.kind for r in listed if r.scale_index == self.scale}
        later = {r.variant.kind for r in rules if r.variant.decision_scale == self.scale}
        return "+".join(sorted(here or later))

    def spans(self) -> list[Span]:
        """Every range that ended, in the order they began; on a GPU this waits for it."""
        done = [o for o in self.opened if o.end is not None]
        if self.clock is None or not done:
            return []
        times = self.clock.read([mark for o in done for mark in (o.begin, o.end)])
        begins, ends = times[::2], times[1::2]
        own = [end - begin for begin, end in zip(begins, ends, strict=True)]
        place = {id(o): i for i, o in enumerate(done)}
        for i, o in enumerate(done):
            parent = None if o.parent is None else place.get(id(self.opened[o.parent]))
            if parent is not None:
                own[parent] -= ends[i] - begins[i]
        return [
            Span(o.label, begin, end - begin, max(mine, 0.0), o.work() if o.work else None)
            for o, begin, end, mine in zip(done, begins, ends, own, strict=True)
        ]  # fmt: skip
