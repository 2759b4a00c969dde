"""The monitor: what it hangs on while it is on, and what it makes of what it sees.

It replaces single methods of single objects, as an adapter does, and takes them out again exactly. Of a generation's calls of
attention only the first and the last layer's tell it anything; between them nothing is asked or counted. On a GPU times are of
events that are read when they are done: nothing waits for the device but a sampled generation, whose pictures are looked at.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.instance_forward import Replaced, Undos, replace_method
from sparvar_tune.adapters.live_attention import LiveAttention
from sparvar_tune.catalog.metrics import METRICS
from sparvar_tune.fused import FusedPath
from sparvar_tune.monitoring.images import RandomState, generators_in, pictures_of
from sparvar_tune.monitoring.metrics import FIDELITY
from sparvar_tune.monitoring.sinks import Sink, open_sink
from sparvar_tune.runtime import Applied, Tuned

SAME_DB = 60.0  # two drawings from one random state: the same pictures, but for a GPU's order of sums
WHOLE = "all"  # label `scale` of what is about no one scale
MOST_PENDING = 64  # generations whose times are not read yet; a device that is further behind loses the oldest
T = TypeVar("T")


class _Mark:
    """A moment: of this process, or of the GPU's stream by an event."""

    def __init__(self, on_gpu: bool) -> None:
        self.event = None
        if on_gpu:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.at = time.perf_counter()

    @property
    def passed(self) -> bool:
        return self.event is None or bool(self.event.query())

    def seconds_to(self, later: _Mark) -> float:
        if self.event is None or later.event is None:
            return later.at - self.at
        return float(self.event.elapsed_time(later.event)) / 1e3


@dataclass
class _Generation:
    """begin: of the first scale, or of the drawing where one is seen. last: after the last layer's attention."""

    begin: _Mark
    scales: list[tuple[int, _Mark]] = field(default_factory=list)
    last: _Mark | None = None
    end: _Mark | None = None


class Monitor:
    """See `monitor`. Also a context manager."""

    def __init__(self, what: Applied | Tuned, sink: Sink, every: int, picture: Callable[[Any], list[Tensor]]) -> None:
        self.tuned = what if isinstance(what, Tuned) else what.tuned
        self.change: Any = what._change if isinstance(what, Applied) else None
        self.live: Any = getattr(self.change, "live", self.change)  # the attention; the stack around it, where that is on
        self.fused: FusedPath | None = getattr(self.change, "fused", None)
        self.sink, self.every, self.picture = sink, every, picture
        profile, policy = self.tuned.profile, self.tuned.policy()
        self.labels = {"model": profile.workload.model if profile else "unknown", "gpu": self.tuned.gpu.slug,
                       "preset": profile.preset if profile else "none"}  # fmt: skip
        ruled = {rule.scale_index for rule in policy.rules} if policy else set()
        self.kernels = {row.scale_index: row.kernel for row in profile.rows if row.scale_index in ruled} if profile else {}
        self.bounds = profile.evidence.certified() if profile and profile.evidence else {}
        self.on_gpu = self.tuned.gpu.device == "cuda" and torch.cuda.is_available()
        self.hooks = Undos()
        self.begun = 0  # generations that `draw` saw
        self.drawing = self.repeats = False
        self.on = True
        self.now: _Generation | None = None
        self.pending: list[_Generation] = []
        self._hang_on(what)
        for name, bound in self.bounds.items():
            if name in FIDELITY:
                self.sink.set(f"sparvar.certified.{FIDELITY[name]}", bound, self.labels)
        self.sink.set("sparvar.sampling.every", float(every), self.labels)

    @property
    def last_reason(self) -> str | None:
        """Why the last image of a live model, from some call on, ran the model's own attention; None if it did not."""
        return getattr(self.change, "reason", None)

    # Hooks

    def _hang_on(self, what: Applied | Tuned) -> None:
        if isinstance(what, Tuned):
            for made in what._attends.values():
                self._hang_on_attention(made)
            self.hooks.add(replace_method(what, "sparse_attention", self._made))
            self.hooks.add(replace_method(what, "attention", self._asked))
            return
        if isinstance(self.live, LiveAttention):
            self.hooks.add(replace_method(self.live, "scale_of", self._scale_of))
        elif isinstance(attend := getattr(self.live, "attend", None), SparseAttention):
            self._hang_on_attention(attend)
        if self.fused is not None:
            self.hooks.add(replace_method(self.fused, "_run", self._stack))
        change: Any
        for change in (self.live, self.fused):
            ours = [c for c in getattr(change, "changes", ()) if isinstance(c, Replaced) and c.body == change.generate]
            if ours:
                self.hooks.add(replace_method(ours[0].owner, ours[0].name, self._generate))
                break

    def _hang_on_attention(self, attend: SparseAttention) -> None:
        last = len(attend.plans) - 1

        def prepare(inner: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Any:
            ready = inner(q, k, v, layer, scale_index)
            return _Watched(self, ready, layer == 0, layer == last) if layer in (0, last) else ready

        self.hooks.add(replace_method(attend, "_prepare", prepare))
        self.hooks.add(_Forgetting(attend))

    def _made(self, inner: Callable[..., SparseAttention], *args: Any, **kwargs: Any) -> SparseAttention:
        attend = inner(*args, **kwargs)
        self._hang_on_attention(attend)
        return attend

    def _asked(self, inner: Callable[..., Any], problem: Any) -> Any:
        if self.tuned.profile is not None and self.tuned._why_not(problem):
            self._fell_back("problem", str(problem.scale_index))
        return inner(problem)

    def _scale_of(self, inner: Callable[..., int | None], layer: int, cached: int, x: Tensor, given: Any) -> int | None:
        scale = inner(layer, cached, x, given)
        if layer == 0:
            self.begins(self.live.starts.get(cached) if scale is None else scale, cached == 0, self.live.reason is None)
        return scale

    def _stack(self, inner: Callable[..., None], work: Any, x: Tensor, at: Any) -> None:
        self.begins(at.scale_index, at.start == 0)
        inner(work, x, at)

    def _generate(self, inner: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self.draw(lambda: inner(*args, **kwargs), generators_in(args, kwargs, self._model()))

    def _model(self) -> Any:
        return self.fused.found.model if self.fused is not None else self.live.parts.model

    # What is seen

    def begins(self, scale: int | None, first: bool, by_policy: bool = True) -> None:
        """The first layer's attention of a scale is about to run. first: of an image. by_policy: not by the model's own code."""
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            return
        if first and not self.drawing:
            self._close()
            self._open()
        if self.now is None or scale is None:
            return
        self.now.scales.append((scale, _Mark(self.on_gpu)))
        if by_policy and scale in self.kernels:
            self.sink.add("sparvar.rows.used", 1, {**self.labels, "scale": str(scale), "kernel": self.kernels[scale]})

    def ended(self) -> None:
        """The last layer's attention of a scale was queued."""
        if self.now is not None and not self.drawing:
            self.now.last = _Mark(self.on_gpu)

    def _open(self) -> None:
        self._drain()
        self.now = _Generation(_Mark(self.on_gpu))
        self.sink.add("sparvar.generations", 1, self.labels)
        if self.tuned.profile is None:
            self._fell_back("no profile", WHOLE)
        for scale in self.tuned.demoted:
            self._fell_back("demoted", str(scale))

    def _close(self) -> None:
        done, self.now = self.now, None
        if done is None:
            return
        if self.last_reason is not None:
            self._fell_back(self.live.about, WHOLE)
        if self.fused is not None and self.fused.reason is not None:
            self.sink.add("sparvar.unfused", 1, self.labels)
        done.end = done.end or done.last
        if done.end is not None:
            self.pending = [*self.pending, done][-MOST_PENDING:]
        self._drain()

    def _fell_back(self, reason: str, scale: str) -> None:
        self.sink.add("sparvar.dense.fallbacks", 1, {**self.labels, "scale": scale, "reason": reason})

    def _drain(self, wait: bool = False) -> None:
        """Records the times of generations that the device has finished; wait: of all."""
        if wait and self.on_gpu and self.pending:
            torch.cuda.synchronize()
        while self.pending and self.pending[0].end is not None and self.pending[0].end.passed:
            done = self.pending.pop(0)
            end = done.end
            assert end is not None
            self.sink.record("sparvar.generation.seconds", done.begin.seconds_to(end), self.labels)
            moments = [*(mark for _, mark in done.scales), end]
            for i, (scale, begin) in enumerate(done.scales):
                until = moments[i + 1]
                self.sink.record("sparvar.scale.seconds", begin.seconds_to(until), {**self.labels, "scale": str(scale)})

    # Drawings

    def draw(self, draw: Callable[[], T], generators: Iterable[torch.Generator] = ()) -> T:
        """What `draw()` returns: one generation, timed to its end and, every Nth time, drawn densely as well.

        A live Infinity, HART or VAR needs no such call: its own method is watched. generators: those `draw` takes noise from
        beside Python's, NumPy's and torch's own. The dense twin begins with the same random state, and the caller finds that
        state as one drawing leaves it. What goes wrong in sampling is counted and warned of, never raised.
        """
        if self.drawing or not self.on:
            return draw()
        self.begun += 1
        sampled = self.every > 0 and self.begun % self.every == 0 and self.tuned.profile is not None
        state = RandomState(generators) if sampled else None
        self._close()
        self._open()
        self.drawing = True  # also while a twin is drawn: what begins then is of no generation
        try:
            returned = draw()
            seen = self.now
            if seen is not None:
                seen.end = _Mark(self.on_gpu)
            self._close()
            if state is not None:
                self._sample(returned, draw, state, bool(seen and seen.scales))
        finally:
            self.now, self.drawing = None, False
        return returned

    def _sample(self, returned: T, draw: Callable[[], T], before: RandomState, seen: bool) -> None:
        after = RandomState(before.generators)
        try:
            if not seen:
                raise ValueError("no attention of this model was called; a captured graph has no dense twin, sample eager ones")
            ours = [picture.clone() for picture in self.picture(returned)]
            if not self.repeats:
                before.restore()
                again = self.picture(draw())
                if min(METRICS["psnr"].compare(a, b) for a, b in zip(again, ours, strict=True)) < SAME_DB:
                    raise ValueError("two drawings from one random state differ; seed them, or give their generators")
                self.repeats = True
            before.restore()
            with self.change.paused():
                dense = self.picture(draw())
            for a, b in zip(ours, dense, strict=True):
                self._compare(a, b)
        except Exception as error:  # the picture is drawn and good; only its twin is not
            self.sink.add("sparvar.samples.failed", 1, self.labels)
            warnings.warn(f"a sampled picture could not be compared with a dense one: {error}", stacklevel=4)
        finally:
            after.restore()

    def _compare(self, sparse: Tensor, dense: Tensor) -> None:
        for name in self.bounds or ("psnr",):
            if name in FIDELITY:
                value = METRICS[name].compare(sparse, dense)
                self.sink.record(f"sparvar.sampled.{FIDELITY[name]}", value, self.labels)
                self.sink.add(f"sparvar.sampled.{FIDELITY[name]}.squares", value * value, self.labels)

    # The end

    def undo(self) -> None:
        """Takes every hook out, and records what was still on its way; a second time it does nothing."""
        if not self.on:
            return
        self.on = False
        self.hooks.undo()
        self._close()
        self._drain(wait=True)
        self.sink.set("sparvar.sampling.every", 0.0, self.labels)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class _Watched:
    """What runs one kind of input, with the monitor told before it (first layer) or after it (last layer)."""

    def __init__(self, monitor: Monitor, ready: Callable[..., Tensor], first: bool, last: bool) -> None:
        self.monitor, self.ready, self.first, self.last = monitor, ready, first, last

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale_index: int) -> Tensor:
        if self.first:
            self.monitor.begins(scale_index, scale_index == 0)
        out = self.ready(q, k, v, scale_index)
        if self.last:
            self.monitor.ended()
        return out


class _Forgetting:
    """Lets an attention ask again what runs each kind of input, now and when the hooks are out: the layers themselves stay."""

    def __init__(self, attend: SparseAttention) -> None:
        self.attend = attend
        attend._ready.clear()

    def undo(self) -> None:
        self.attend._ready.clear()


def monitor(
    what: Applied | Tuned, *, to: Any = None, every: int = 0, picture: Callable[[Any], list[Tensor]] | None = None
) -> Monitor:
    """Tells a metrics library what runs, until `undo()` or the end of a `with`.

    what: what `apply` returned, or a `Tuned` whose `attention` is called directly. to: "prometheus", "opentelemetry", a
    CollectorRegistry, a MeterProvider, or a `Sink`; None for what is installed. every: every Nth generation is drawn densely,
    too, and compared (twice more the first time, to see that drawings repeat); 0: none. picture: makes a list of
    [1, 3, H, W] in 0..1 of what a generation returns, None for `images.pictures_of`. Numbers: `metrics.INSTRUMENTS`.

    Raises ValueError, in one line: no metrics library, `every` below 0, or sampling of what cannot be drawn densely.
    """
    if not isinstance(what, Applied | Tuned):
        raise ValueError(f"monitor: got {type(what).__name__}, want what sparvar_tune.apply or load_profile returned")
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ValueError(f"monitor: every={every!r}, want a whole number, 0 for no sampling")
    if every and isinstance(what, Tuned):
        raise ValueError("monitor: every: single calls make no picture; give what sparvar_tune.apply returned")
    change = what._change if isinstance(what, Applied) else None
    if every and change is not None and not hasattr(getattr(change, "live", change), "paused"):
        raise ValueError("monitor: every: this model's adapter has no `paused`, so it cannot be drawn densely in between")
    if picture is not None and not callable(picture):
        raise ValueError(f"monitor: picture: got a {type(picture).__name__}, want a function that makes a list of pictures")
    return Monitor(what, open_sink(to), every, pictures_of if picture is None else picture)
