"""Sampling of the models in the box with all blocks as one function, and on a GPU each scale, drawing of its bits and all, as one
CUDA graph.

    model.attend = FusedSampling    a state that samples with it asks it to draw; without an answer it goes its own way
    draw                            takes the state's keys and values into the model's buffers, if they are not there, and runs
    give_back                       copies them out, when the state is parked or forked or another one needs the buffers

What parts of blocks gave that later scales live on (FastVAR) goes in and out with them.
So states may be begun, parked, forked and finished in any order, as a search does. The first run of a scale is eager (kernels
compile, tables are built), the second is captured, later ones are replayed. A scale that lives on a decision is replayed only
where the decision was, and refused where the buffers hold another picture's.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sparvar_kernels.attention import InOneModel, SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters.boxed import Attached
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.bitwise.decisions import OTHERS, deciding_and_living
from sparvar_tune.bitwise.sampling import Attend, Generating
from sparvar_tune.fused.boxed_blocks import BoxedBlocks
from sparvar_tune.fused.compile_ahead import read_triton
from sparvar_tune.fused.graph import Replays
from sparvar_tune.fused.product import why_not_hooked
from sparvar_tune.fused.thinning import Lengths, why_not_thinned
from sparvar_tune.fused.watched import Watched, contents
from sparvar_tune.fused.workspace import OnePass, Workspace, attention_like
from sparvar_tune.generation import decides_apart, drop_from

FAMILIES = ("pocketvar", "emojivar")


@dataclass(eq=False)
class _Held:
    """Whose keys and values are in a model's buffers, which all its paths share."""

    lock: threading.RLock
    state: weakref.ref[Generating] | None = None


_HELD: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _Decided:
    """One run of a decision scale."""

    by_graph: bool


class FusedSampling(Replays, InOneModel):
    """See the module docstring. attend: policy, schedule and launches; None: everything dense.

    reason: why the last picture that came here went its own way, None if it did not; `own` is what it attends with then.
    enabled: where False, pictures go their own way, but graphs and buffers are kept.
    """

    decoder: None = None
    why_not_decoder: str | None = "the decoders of the models in the box have no fused path"

    def __init__(self, found: Parts, attend: SparseAttention | None, graphs: bool) -> None:
        self.found, self.attend, self.use_graphs, self.enabled = found, attend, graphs, True
        self.model = found.model
        self.own: Attend = attend or found.model.attend
        self.policy: Policy | None = getattr(self.own, "policy", None)
        self.skip_scales: tuple[int, ...] = self.own.skip_scales
        self.reason: str | None = None
        self.stack, self.work = BoxedBlocks(found), cast(Workspace, None)  # buffers come with the first picture
        self._kind: Hashable = None
        self._watched = Watched([self.model], contents, hooks=True)
        self._picture: Generating  # reads what `constants` names from addresses that stay
        self._fhat = torch.empty(0)
        self._ran: set[tuple[int, int, int]] = set()  # passes that ran once
        self._apart = False  # whether the halves of guidance decide apart
        self._decided: _Decided | None = None
        self._held = _HELD.setdefault(self.model, _Held(threading.RLock()))
        self._said: set[str] = set()
        self._hook: Attached | None = None
        self.lengths = Lengths(self.policy, self.model.schedule, found.layers)
        nothing: frozenset[int] = frozenset()
        self._deciding, self._living = (nothing, nothing) if attend is None else deciding_and_living(attend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        return self.own(q, k, v, layer, scale_index)

    def undo(self) -> None:
        if self._hook is not None:
            self._hook.undo()

    # What a state asks for; see `bitwise.sampling.AsOne`

    def draw(self, state: Generating) -> bool:
        with self._held.lock:
            if not self._takes(state):
                return False
            schedule, s = self.model.schedule, state.scale
            x = self._stream(state.rows, schedule.num_queries(s))
            at = OnePass(self.work, schedule.starts[s], x)
            self.work.thinning.check(state.given, s)
            self._fhat.copy_(state.fhat)
            with self._whole(state):
                self._run(self.work, state, at)
            state.fhat = self._fhat.clone()
            state.given = self.work.thinning.after(state.given, s)
            state.scale, state.filled = s + 1, self.lengths.before(s + 1)
        return True

    def read(self, state: Generating, x: Tensor) -> bool:
        with self._held.lock:
            if not self._takes(state):
                return False
            stream = self._stream(*x.shape[:2])
            stream.copy_(x)
            with self._whole(state):
                self._run(self.work, state, OnePass(self.work, 0, stream))
            state.filled = [x.shape[1]] * self.found.layers
        return True

    def give_back(self, state: Generating) -> None:
        with self._held.lock:
            state.holder = self._held.state = None
            if state.scale == len(self.model.schedule):
                return  # the last grid's keys ran over those of other layers, and nobody needs them
            state.given = self.work.thinning.end(state.given, state.rows)
            state.cache = state.cache.new_empty(*state.cache.shape[:-2], max(state.filled), state.cache.shape[-1])
            for layer, done in enumerate(state.filled):
                for own, t in zip(state.cache[layer], self.work.cache(layer), strict=True):
                    own[..., :done, :] = t[: state.rows, :, :done]

    # A picture

    def _takes(self, state: Generating) -> bool:
        """Whether the state's next pass runs here; its keys and values are in the buffers then."""
        if state.holder is self:
            return True
        self.reason = self._why_not(state) if self.enabled else None
        if self.reason is not None or not self.enabled:
            state.attend = state.fitted(self.own)
            if self.reason is not None and self.reason not in self._said:
                self._said.add(self.reason)
                warnings.warn(f"the model's own blocks run for this image: {self.reason}", stacklevel=4)
            return False
        state.check_kept()
        last = None if self._held.state is None else self._held.state()
        for other in (state, last):
            if other is not None and other.holder is not None:
                other.holder.give_back(other)
        self._begin(state)
        return True

    def _why_not(self, state: Generating) -> str | None:
        if self.model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled(state.fhat.device.type):
            return "autocast is on; load the model in the dtype that its products shall have"
        if (hooked := why_not_hooked()) is not None:
            return hooked
        fits = not any(state.filled) or state.filled == self.lengths.before(state.scale)
        return None if fits else "earlier scales of it left other keys out of its caches than here"

    def _begin(self, state: Generating) -> None:
        """Buffers for this kind of picture, and in them what is known of it."""
        with torch.inference_mode(False), torch.no_grad():
            if self._kind_of(state) != self._kind:
                self._prepare(state)
                self._kind = self._kind_of(state)
        for name in state.constants:
            getattr(self._picture, name).copy_(getattr(state, name))
        self.stack.begin(self._picture)
        for layer, done in enumerate(state.filled):
            for t, own in zip(self.work.cache(layer), state.cache[layer], strict=True):
                t[: state.rows, :, :done].copy_(own[..., :done, :])
        state.given = self.work.thinning.begin(state.given, state.rows, self.work.x.dtype)
        state.cache = self._nothing(state)
        state.holder, self._held.state = self, weakref.ref(state)

    def _kind_of(self, state: Generating) -> Hashable:
        device = state.fhat.device
        return state.rows, state.kind, state.cache.dtype, device, self._decides_apart(state), self._watched.state()

    def is_ready(self, state: Generating) -> bool:
        """Whether a fork of a state that goes on here finds everything compiled, and captured where that is possible."""
        twin = state.fork(self)
        twin.narrow()
        if self.work is None or self._kind_of(twin) != self._kind:
            return False
        schedule, known = self.model.schedule, self.work.graphs if self.why_not_graphs is None else self._ran
        while twin.scale < len(schedule) - len(self.skip_scales):
            twin.narrow()
            if (schedule.starts[twin.scale], schedule.num_queries(twin.scale), twin.rows) not in known:
                return False
            twin.scale += 1
        return True

    def _prepare(self, state: Generating) -> None:
        self._apart = self._decides_apart(state)
        self.work, self._ran, self._decided = cast(Workspace, None), set(), None  # old buffers go before new ones are made
        dtype, device = state.cache.dtype, state.fhat.device
        self.stack.prepare(state.rows, dtype)
        x = torch.empty(state.rows, 0, self.model.config.width, device=device)
        pool = torch.cuda.graph_pool_handle() if x.is_cuda else None
        self.work = Workspace(self.found, x, torch.float32, dtype, self.model.schedule, self, pool)
        self._fhat, self._picture = torch.empty_like(state.fhat), copy.copy(state)
        self._picture.attend, self._picture.cache, self._picture.given = self.own, self._nothing(state), {}
        for name in state.constants:
            given = getattr(state, name)
            setattr(self._picture, name, torch.empty(given.shape, dtype=given.dtype, device=device))
        if device.type == "cuda":
            self.work.compile(self.stack, device)

    @staticmethod
    def _nothing(state: Generating) -> Tensor:
        """The state's cache without any token."""
        return state.cache.new_empty(*state.cache.shape[:-2], 0, state.cache.shape[-1])

    def _stream(self, rows: int, length: int) -> Tensor:
        return self.work.x[: rows * length * self.model.config.width].view(rows, length, -1)

    @contextmanager
    def _whole(self, state: Generating) -> Iterator[None]:
        """Around a pass. What breaks off one that writes over keys of before loses them."""
        try:
            yield
        except BaseException:
            if self.lengths.overwrites(state.scale):
                state.holder = self._held.state = None
            else:
                self.give_back(state)
            raise

    # A pass

    def _run(self, work: Workspace, state: Generating, at: OnePass) -> None:
        s, key, decided = at.scale_index, (at.start, at.length, at.rows), self._decided
        lives, decides = s in self._living, s in self._deciding
        if lives and (decided is None or state.decided is not decided):
            raise ValueError(OTHERS.format(s))
        decision_replays = not lives or decided is None or decided.by_graph
        by_graph = self.why_not_graphs is None and key in self._ran and decision_replays
        graph = work.graphs.get(key) if by_graph else None
        if graph is None and by_graph:
            self._forget(work, s)
            graph = work.capture(lambda: self._pass(work, at), self._fhat.device)
            if graph is not None:
                work.graphs[key] = graph
        if graph is None:
            self._forget(work, s)
            self._pass(work, at)
        else:
            graph.replay()
        self._ran.add(key)
        if decides:
            state.decided = self._decided = _Decided(graph is not None)

    def _forget(self, work: Workspace, s: int | None) -> None:
        """Before the first decision of a picture that is no replay."""
        if self._deciding and s == min(self._deciding):
            for attend in work.sparse:
                attend.reset()

    def _pass(self, work: Workspace, at: OnePass) -> None:
        x, picture = self._stream(at.rows, at.length), self._picture
        if at.scale_index is None:
            return self.stack.run(x, at)

        def through(tokens: Tensor) -> Tensor:
            x.copy_(tokens)
            self.stack.run(x, at)
            return x.to(tokens.dtype)

        picture.scale, picture.rows, picture.fhat = at.scale_index, at.rows, self._fhat
        picture.draw(through)
        self._fhat.copy_(picture.fhat)
        picture.fhat = self._fhat  # the other one may be of a graph's memory
        return None

    # Attention, for `Workspace`

    def new_attention(self, schedule: ScaleSchedule) -> SparseAttention:
        return attention_like(self.found, self.attend, schedule)

    def splits(self, schedule: ScaleSchedule) -> bool:
        return self._apart

    def _decides_apart(self, state: Generating) -> bool:
        guided = state.rows == 2 * state.fhat.shape[0]
        return self.attend is not None and guided and decides_apart(self.attend, drop_from(self.attend.policy))


def attach(found: Parts, attend: SparseAttention | None = None, graphs: bool = True) -> FusedSampling:
    """Makes the model's sampling run its blocks as one; `undo()` takes it back. attend: None for everything dense.

    Raises ValueError, and changes nothing, where the model's blocks cannot be run this way.
    """
    path = sampling(found, attend, graphs)
    path._hook = Attached(found.model, path)
    return path


def sampling(found: Parts, attend: SparseAttention | None = None, graphs: bool = True) -> FusedSampling:
    """The same for who gives a state its attention himself: nothing is put into the model."""
    path = FusedSampling(found, attend, graphs)
    reason = None if attend is None else attend.policy.why_not(found.model.schedule, found.layers, found.heads)
    reason = reason or (None if attend is None else why_not_thinned(attend.policy, path.stack.thins)) or path.stack.why_not()
    if reason:
        raise ValueError(f"the blocks cannot run as one: {reason}")
    if found.on_gpu:
        read_triton()
    return path
