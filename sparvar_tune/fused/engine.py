"""All blocks of a live model as one call a scale, and from the second image on as one CUDA graph a scale.

    generate (wrapped)    an image begins: which pass comes next is known from the tokens that were appended
    block 0 (replaced)    copies its input into the residual stream's buffer, runs or replays the whole stack, returns that
    other blocks          return what they get

The first image of a kind runs eagerly (kernels compile, tables are built), the second is captured while it is drawn, later
ones are replayed. A kind is: schedule, rows, dtype, device and what the family's constants depend on (text rows). One kind is
kept at a time; its key-value cache is the largest part of it. Where an image cannot run this way the model's own blocks run,
with the attention that was put into them, a warning says why, and `reason` keeps it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters.guidance import GENERATE, Enough, bound
from sparvar_tune.adapters.instance_forward import Replaced, Undos, replace_method, why_not_replace
from sparvar_tune.adapters.live_attention import DROPPED, other_schedule
from sparvar_tune.adapters.precision import why_not_scaled
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.fused.compile_ahead import read_triton
from sparvar_tune.fused.decoder import FusedDecoder, Untouched, decoder_of
from sparvar_tune.fused.first_image import sample_once, undisturbed
from sparvar_tune.fused.graph import Replays
from sparvar_tune.fused.product import make_scaled, why_not_hooked
from sparvar_tune.fused.stack import Stack
from sparvar_tune.fused.thinning import why_not_thinned
from sparvar_tune.fused.watched import Watched, contents
from sparvar_tune.fused.workspace import Foreseen, OnePass, Workspace, attention_like
from sparvar_tune.generation import decides_apart
from sparvar_tune.generation.scaled_product import multiplied_in, precision_of

WARM = 2  # images of a kind: the first compiles, the second is captured
MOST_WORKS = 4  # attentions whose graphs a path keeps
LEAST_GRID = 32 * 32  # tokens of the last grid from which on the fused decoder gains on a GPU without a graph


class FusedPath(Undos, Replays):
    """The whole stack in a live model. `reason`: why the last image ran the model's own blocks, None if it did not.

    decoder: the picture decoder on its fused path from the first image on; why_not_decoder: why it is not, None if it is.
    """

    def __init__(self, found: Parts, stack: Stack, attend: SparseAttention | None, graphs: bool) -> None:
        super().__init__()
        self.found, self.stack, self.attend, self.use_graphs = found, stack, attend, graphs
        self.reason: str | None = None
        self.decoder: FusedDecoder | None = None
        self.why_not_decoder: str | None = "no image was drawn yet"
        self._decodes: Any = None  # the decoder of the last image
        self._untouched: Untouched | None = None  # it, until it is called or the image ends
        self._first_decode: Replaced | None = None  # what waits in it for that
        self._foreseen: Foreseen | None = None
        self._enabled = True
        self.images = 0  # begun
        self._since = 0  # images drawn since it was switched on
        self.work: Workspace | None = None  # of the last image
        self._works: dict[Any, Workspace] = {}  # by attention, the last one used at the end; all of one kind of image
        self._pool: Any = None
        self._kind: Any = None
        self._watched = Watched(found.blocks, contents, hooks=True)
        self._start: int | None = None  # tokens appended so far; None: the model's own blocks run
        self._drawing = threading.Lock()
        self._given: Mapping[str, Any] = {}
        self._said: set[str] = set()

    @property
    def policy(self) -> Policy | None:
        return None if self.attend is None else self.attend.policy

    @property
    def enabled(self) -> bool:
        """Where False the model draws as if this were undone, but graphs and buffers are kept."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if on and not self._enabled:
            self._since = 0
        self._enabled = on
        self._put_on_decoder(self._decodes if on else None)

    def undo(self) -> None:
        self._put_on_decoder(None)
        super().undo()

    def _put_on_decoder(self, decoder: Any) -> None:
        if self.decoder is not None and self.decoder.decoder is not decoder:
            self.decoder.undo()
            self.decoder = None
        self._take_untouched()
        if decoder is not None and self.decoder is None:
            self._begin_decoder(decoder)
            self._end_decoder()

    def _begin_decoder(self, decoder: Any) -> None:
        """What its kernels are not needed for. The rest waits for its first call, at the latest for the image's end: by then they
        are compiled, and the GPU is busy with the last scale."""
        self._decodes, self.why_not_decoder = decoder, None
        try:
            first = self._foreseen.let_go_first if self._foreseen is not None else None
            aside = self.found.on_gpu and self.work is None  # nothing is captured in a first image
            self._untouched = Untouched(decoder, self._likely_latent(), first, aside)
        except ValueError as error:
            self.why_not_decoder = str(error)
            return
        self._first_decode = replace_method(decoder, "forward", self._decode_first)

    def _decode_first(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        decoder = self._decodes
        self._end_decoder()
        return decoder.forward(*args, **kwargs)

    def _take_untouched(self) -> Untouched | None:
        if self._first_decode is not None:
            self._first_decode.undo()
        if self._untouched is not None:
            self._untouched.wait()
        untouched, self._untouched, self._first_decode = self._untouched, None, None
        return untouched

    def _end_decoder(self) -> None:
        untouched = self._take_untouched()
        if untouched is None:
            return
        try:
            self.decoder = untouched.attach(graphs=self.use_graphs)
        except ValueError as error:
            self.why_not_decoder = str(error)

    def _likely_latent(self) -> tuple[int, int, int] | None:
        schedule = self.stack.schedule(self._given) if self._given else None
        return (*schedule.grids[-1], 1) if isinstance(schedule, ScaleSchedule) else None

    def _is_small(self) -> bool:
        """Whether the image is so small that its decoder waits for the host where it has no graph: an H100 took 35 ms instead of
        11 at 256 pixels."""
        schedule = self.stack.schedule(self._given)
        last = schedule.num_queries(len(schedule) - 1) if isinstance(schedule, ScaleSchedule) else LEAST_GRID
        return self.found.on_gpu and not self.use_graphs and last < LEAST_GRID

    # Attention

    def why_not_serve(self, attend: SparseAttention | None) -> str | None:
        """Why it cannot draw with another attention, or None."""
        return _why_not_steps(self.found, self.stack, attend)

    def serve(self, attend: SparseAttention | None) -> None:
        """Draws with another attention from the next image on; graphs of those before are kept, of the last few."""
        self.attend = attend

    @property
    def images_to_warm(self) -> int:
        """Images like the last one until the next takes as long as all later ones: everything is compiled and captured then."""
        work = self._works.get(self._served)
        return max(0, WARM - min(self._since, 0 if work is None else work.images))

    @property
    def _served(self) -> Any:
        return self.attend, DROPPED.get(self.found.model)

    def foresee(self, dtype: torch.dtype) -> None:
        """Begins with the attention of one picture with guidance: its tables, and what it launches in `dtype`."""
        if self.attend is not None and self.work is None and self._foreseen is None and self.found.on_gpu:
            made = self.new_attention(self.attend.schedule)
            device = next(self.found.attentions[0].parameters()).device
            self._foreseen = Foreseen(self.attend, made, self.found.heads, self.found.head_dim, dtype, device)

    def new_attention(self, schedule: ScaleSchedule) -> SparseAttention:
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.of is self.attend and schedule == foreseen.of.schedule:
            return foreseen.taken()
        return attention_like(self.found, self.attend, schedule)

    def splits(self, schedule: ScaleSchedule) -> bool:
        return self.attend is not None and decides_apart(self.attend, DROPPED.get(self.found.model))

    # An image

    def is_drawing(self) -> bool:
        """Whether an image is being drawn this way, or will be unless its first block finds a reason against it."""
        return self._start is not None

    def generate(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return inner(*args, **kwargs)
        if not self._drawing.acquire(blocking=False):
            raise RuntimeError("this model is drawing an image already; draw one at a time, or load it twice")
        try:
            self._given, self._start, self.reason = bound(self.found, args, kwargs), 0, None
            self.images += 1
            hooked = why_not_hooked()
            if hooked:
                self._leave(hooked)
            if torch.is_autocast_enabled("cuda"):
                self.foresee(torch.get_autocast_dtype("cuda"))
            decoder = None if self._is_small() or hooked else decoder_of(self.found.model, self._given)
            if decoder is not self._decodes:
                self._put_on_decoder(None)
                self._decodes = decoder
                if decoder is not None:
                    self._begin_decoder(decoder)
                else:
                    self.why_not_decoder = hooked or "the picture is too small to gain, or its decoder is not known"
            with undisturbed() if self.images == 1 and self.found.on_gpu else nullcontext():
                out = inner(*args, **kwargs)
                self._drew()
            return out
        except Enough:
            self._drew()
            raise
        except BaseException:
            if self.work is not None and self.work.images < 2:
                self.work.graphs.clear()  # half an image was captured
                self.work.constants = None
                self.work.images = min(self.work.images, 1)
            raise
        finally:
            self._given, self._start = {}, None
            self._drawing.release()

    def _drew(self) -> None:
        self._end_decoder()  # of an image that did not call it
        if self.work is not None and self._start is not None:
            self.work.images += 1
        self._since += 1

    def first_block(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.stack.parameters, args, strict=False)), **kwargs}
        if self._start == 0:
            self._begin(given)
        if self._start is None:
            return inner(*args, **kwargs)
        work = self.work
        assert work is not None
        with torch.no_grad(), torch.autocast(given["x"].device.type, enabled=False):
            reason = work.why_not_pass(self._start, given["x"])
            if reason:
                raise ValueError(f"{reason}; apply with path='attention' for a loop of another order")
            x = work.stream(given["x"])
            x.copy_(given["x"])
            at = OnePass(work, self._start, x)
            self._start += at.length
            self._run(work, x, at)
        return x

    def other_block(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self._start is None:
            return inner(*args, **kwargs)
        return kwargs["x"] if "x" in kwargs else args[0]

    def _begin(self, given: Mapping[str, Any]) -> None:
        """What an image needs, or the reason why the model's own blocks run."""
        reason = self._why_not({**self._given, **given})
        if reason is not None:
            self._leave(reason)
            return
        x, schedule = given["x"], self.stack.schedule(given)
        assert isinstance(schedule, ScaleSchedule)
        dtype = multiplied_in(x)
        kind = schedule, x.shape[0], x.shape[2], dtype, x.device, self.stack.kind(given), self._watched.state()
        if kind != self._kind and (reason := _why_not_blocks(self.found, self.stack)) is not None:  # they may have changed since
            self._leave(reason)
            return
        with torch.no_grad(), torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            if kind != self._kind:
                self.work, self._kind = None, None  # let go of the old caches before the new ones are made
                self._works.clear()
                self.stack.prepare(given, x.shape[0], dtype, schedule)
                self._kind = *kind[:-1], self._watched.state()
            self.work = self._work_of(x, dtype, schedule)
            if self.why_not_graphs is not None or self.work.images < 2:  # a replay runs no Python of theirs
                for attend in self.work.sparse:
                    attend.reset()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.stack.begin(given)
            self._derive(self.work, x)

    def _leave(self, reason: str) -> None:
        """The model's own blocks run for this image."""
        self._start, self.reason = None, reason
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"the model's own blocks run for this image: {reason}", stacklevel=4)

    def _work_of(self, x: Tensor, dtype: torch.dtype, schedule: ScaleSchedule) -> Workspace:
        """The workspace of this attention, that of another let go where there are many."""
        work = self._works.pop(self._served, None)
        if work is None:
            if len(self._works) == MOST_WORKS:
                del self._works[next(iter(self._works))]
            if x.is_cuda and not self._works:
                self._pool = torch.cuda.graph_pool_handle()
            work = Workspace(self.found, x, self.stack.stream or x.dtype, dtype, schedule, self, self._pool)
            if x.is_cuda:
                work.begin(partial(sample_once, x.device))
                work.compile(self.stack, x.device)
            make_scaled(work.precision, self.stack.blocks, [self.stack.linears(b) for b in self.found.blocks])
        self._works[self._served] = work
        return work

    def _why_not(self, given: Mapping[str, Any]) -> str | None:
        if any(block.training for block in self.found.blocks):
            return "the model is in training mode"
        schedule = self.stack.schedule(given)
        if isinstance(schedule, str):
            return schedule
        reason = other_schedule(schedule, self.attend.schedule) if self.attend is not None else None
        return reason or self.stack.why_not_image(given)

    def _derive(self, work: Workspace, x: Tensor) -> None:
        """What an image holds constant: hundreds of launches, so also a graph."""
        if self.why_not_graphs is not None or work.images == 0:
            return self.stack.derive()
        if work.constants is None:
            work.constants = work.capture(self.stack.derive, x.device)
        return self.stack.derive() if work.constants is None else work.constants.replay()

    def _run(self, work: Workspace, x: Tensor, at: OnePass) -> None:
        work.know_products(self.stack, at.rows, at.length)
        if self.why_not_graphs is not None or work.images == 0:
            if work.waits_at(at.scale_index):
                self._end_decoder()  # meanwhile
            return self.stack.run(x, at)
        graph = work.graphs.get((at.start, at.length, at.rows)) or self._capture(work, x, at)
        return self.stack.run(x, at) if graph is None else graph.replay()

    def _capture(self, work: Workspace, x: Tensor, at: OnePass) -> torch.cuda.CUDAGraph | None:
        """The stack at one scale as a graph. Its memory comes from the pool that all graphs share."""
        if work.room is None:  # the largest first, so that the others fit into what it takes
            last = work.last(x)
            largest = OnePass(work, work.before, last, dense=True)
            work.room = work.capture(lambda: self.stack.run(last, largest), x.device)
        graph = None if work.room is None else work.capture(lambda: self.stack.run(x, at), x.device)
        if graph is not None:
            work.graphs[at.start, at.length, at.rows] = graph
        return graph


def _why_not_steps(found: Parts, stack: Stack, attend: SparseAttention | None) -> str | None:
    """Why the steps inside the blocks cannot be done where those run as one, or None."""
    if attend is None:
        return None
    reason = why_not_thinned(attend.policy, stack.thins)
    return reason or why_not_scaled(precision_of(attend.policy), [stack.linears(block) for block in found.blocks])


def _why_not_blocks(found: Parts, stack: Stack) -> str | None:
    """Why the blocks as they are now cannot run as one, or None."""
    reason = stack.why_not()
    for i, block in enumerate(found.blocks):
        if block.__dict__.get("_forward_hooks") or block.__dict__.get("_forward_pre_hooks"):
            reason = reason or f"block {i}: another tool's hook is on it"
        reason = reason or why_not_replace(block)
    return reason


def attach(found: Parts, stack: Stack, attend: SparseAttention | None = None, graphs: bool = True) -> FusedPath:
    """Puts the stack into the model; `undo()` takes it out. attend: its policy, schedule and launches; None: everything dense.

    Put it on after the attention path: that one then serves the images that cannot run as one. Raises ValueError, and changes
    nothing, where the model's blocks cannot be run this way, or its unconditional half is dropped already.
    """
    reason = _why_not_blocks(found, stack) or _why_not_steps(found, stack, attend)
    if found.model in DROPPED:
        reason = reason or "its unconditional half is dropped already; apply first, drop after"
    if reason:
        raise ValueError(f"the blocks cannot run as one: {reason}")
    if found.on_gpu:
        read_triton()
    path = FusedPath(found, stack, attend, graphs)
    likely = next(found.blocks[0].parameters()).dtype
    if likely != torch.float32:  # such a model runs under autocast, of which the first image tells
        path.foresee(likely)
    for i, block in enumerate(found.blocks):
        path.add(replace_method(block, "forward", path.first_block if i == 0 else path.other_block))
    path.add(replace_method(found.model, GENERATE, path.generate))
    path.add(stack.around(path.is_drawing, graphs and found.on_gpu))
    return path
