"""What all images of one kind draw in: buffers at addresses that stay, attention, graphs; and a pass through the blocks there."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.backends.dense import dense_attention, dense_with_lse, plans_shapes
from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.path.fastest_product import is_many
from sparvar_kernels.policy import LayerPlan, Policy
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.fused.compile_ahead import Ahead
from sparvar_tune.fused.first_image import beside
from sparvar_tune.fused.graph import captured, held_bytes
from sparvar_tune.fused.product import scaled_builds
from sparvar_tune.fused.thinning import ThinnedPasses
from sparvar_tune.generation.halves import another
from sparvar_tune.generation.scaled_product import precision_of
from sparvar_tune.generation.tokens import Work

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Attends(Protocol):
    """What attends where all blocks run as one. policy: whose steps leave out tokens there, if any do."""

    @property
    def policy(self) -> Policy | None: ...

    def new_attention(self, schedule: ScaleSchedule) -> SparseAttention: ...

    def splits(self, schedule: ScaleSchedule) -> bool:
        """Whether the halves of guidance need decisions of their own: one is dropped before a scale that lives on them."""


class _Builds(Protocol):
    """What launches binaries of its own: a `Stack`. exact_gelu: of its MLPs."""

    exact_gelu: ClassVar[bool]

    @property
    def blocks(self) -> Sequence[Any]: ...

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]: ...

    def multiply_once(self, rows: int, length: int) -> None: ...


def attention_like(found: Parts, a: SparseAttention | None, schedule: ScaleSchedule) -> SparseAttention:
    """A fresh attention with the policy, schedule and launches of `a`; None: a dense one."""
    if a is None:
        policy = Policy(("A" * found.heads,) * found.layers)
        return SparseAttention(policy, schedule, softmax_scale=found.softmax_scale, logit_bound=found.logit_bound)
    return another(a)


def attention_builds(
    attend: SparseAttention, problems: Sequence[AttentionProblem], dtype: torch.dtype, device: torch.device
) -> dict[int, list[Any]]:
    """Binaries that an attention launches for problems of these forms, by the layers that its first call would make.

    Each at the first scale that launches it.
    """
    first = [replace(p, softmax_scale=attend.softmax_scale, logit_bound=attend.logit_bound) for p in problems]
    kind = (first[0].batch, first[0].heads, first[0].head_dim, dtype, device)
    with torch.device("cpu"):  # plans are the host's, whatever the caller's default device
        if kind not in attend._layers:
            attend._layers[kind] = attend._build(first, device)
        layers: list[Any] = attend._layers[kind]
        found: dict[int, list[Any]] = {}
        seen = set[Any]()
        for s in range(len(first)):
            new = [build for layer in layers for build in layer.builds(s) if build not in seen]
            seen.update(new)
            if new:
                found[s] = new
        return found


def _begin(builds: Mapping[int, Sequence[Any]], device: torch.device) -> dict[int, Ahead]:
    """Begins to compile what each scale launches first, those of the last one before others: they take longest."""
    return {s: Ahead(builds[s], device) for s in sorted(builds, reverse=True)}


def _multiply_once(stack: _Builds, rows: int, lengths: Iterable[int]) -> None:
    for length in lengths:
        stack.multiply_once(rows, length)


def _is_dense(plan: LayerPlan) -> bool:
    return not plan.records and all(variant.reads == "everything" for variant, _ in plan.groups)


def _dense_kind(plan: LayerPlan) -> str | None:
    """How all heads of a layer attend densely at a scale: as nothing else, as those that decide, or not."""
    return "alone" if _is_dense(plan) else "decides" if plan.records else None


class Foreseen:
    """An attention that is made ready in the background before the first image: its tables are built and its binaries compiled.

    of: what it is like. It is for two rows, a picture with guidance; others build it once more. What is wrong is said there.
    dtype: of q, k and v.
    """

    def __init__(
        self, of: SparseAttention, made: SparseAttention, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.of, self._made = of, made
        self._binaries: dict[int, Ahead] = {}
        form = heads, head_dim, NAMES[dtype], made.softmax_scale, made.logit_bound

        def build() -> None:
            with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.device(device):
                problems = [AttentionProblem(made.schedule, s, 2, *form) for s in range(len(made.schedule))]
                builds = attention_builds(made, problems, dtype, device)
                torch.cuda.current_stream().synchronize()  # of this thread, on which nobody else waits
                self._binaries = _begin(builds, device)

        self._thread = threading.Thread(target=build, daemon=True)
        self._thread.start()

    def let_go_first(self) -> None:
        """Returns when its binaries, the longest of an image, are being compiled or need not be."""
        self._thread.join()
        for ahead in self._binaries.values():
            ahead.begun.wait()

    def taken(self) -> SparseAttention:
        """The attention, when its tables are built."""
        self._thread.join()
        return self._made


class Workspace:
    """What one kind of image needs at addresses that stay: the stream, keys and values, attention, graphs."""

    def __init__(
        self, found: Parts, x: Tensor, stream: torch.dtype, dtype: torch.dtype, schedule: ScaleSchedule, path: _Attends,
        pool: Any = None,
    ) -> None:  # fmt: skip
        self.rows, self.schedule, self.dtype = x.shape[0], schedule, dtype
        longest = max(schedule.prefix, *(schedule.num_queries(s) for s in range(len(schedule))))
        self.x = _shared(found.model, "x", (self.rows * longest * x.shape[2],), stream, x.device)
        self.thinning = ThinnedPasses(path.policy, schedule, found.layers, self.rows, x.device, partial(_shared, found.model))
        self.precision = precision_of(path.policy)
        self.before, self.tail = schedule.starts[-2], schedule.num_queries(len(schedule) - 1)
        self.places = self.thinning.layout()
        shape = 2, self.rows, max(end for _, end in self.places), found.heads, found.head_dim
        self.keys_and_values = _shared(found.model, "keys and values", (math.prod(shape),), dtype, x.device)
        self.cached = self.keys_and_values[: math.prod(shape)].view(shape)
        self.graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self.pool = pool  # of `torch.cuda.graph_pool_handle`; those of one path share it, they are replayed one after another
        self.room: torch.cuda.CUDAGraph | None = None  # never replayed
        self.constants: torch.cuda.CUDAGraph | None = None
        self.why_not_graphs: str | None = None
        self.images = 0  # drawn to the end
        self._beside: list[threading.Thread] = []
        self._known: set[tuple[int, int]] = set()  # rows and tokens of passes whose products are known
        self.sparse = [path.new_attention(schedule) for _ in range(2 if path.splits(schedule) else 1)]
        self._of_attention: dict[int, Ahead] = {}  # its binaries by the first scale that needs them, until they are waited for
        form = found.heads, found.head_dim, NAMES[dtype], found.softmax_scale, found.logit_bound
        self.problems = {
            rows: [AttentionProblem(schedule, s, rows, *form) for s in range(len(schedule))]
            for rows in {self.rows, self.rows // 2 or 1}
        }

    def compile(self, stack: _Builds, device: torch.device) -> None:
        """Compiles what an image launches, but for the decoder's; what a later call still lacks is compiled there.

        Returns when the blocks' own binaries are ready. Those of attention are the longest, and most policies are dense at the
        first scales, so what needs them waits for them: `attention`. Those of the last scale take longest of all.
        """
        builds = list(stack.builds(self.thinning.lengths(), self.thinning.prune is not None))
        if self.precision is not None:
            builds += scaled_builds(stack.blocks, self.dtype, stack.exact_gelu, self.precision.fmt)
        ahead, lengths = Ahead(builds, device), dict.fromkeys(self.thinning.lengths())
        self.begin(partial(_multiply_once, stack, self.rows, lengths))
        form = self.problems[self.rows if len(self.sparse) == 1 else self.rows // 2]
        wanted: dict[int, list[Any]] = {}
        for attend in self.sparse:
            for s, of_scale in attention_builds(attend, form, self.dtype, device).items():
                wanted.setdefault(s, []).extend(of_scale)
        self._of_attention = _begin(wanted, device)
        self.plan_dense(device)
        ahead.wait()

    def begin(self, work: Callable[[], object]) -> None:
        """Begins with what is done so that libraries load their kernels, beside what the caller does, and before any capture."""
        self._beside.append(beside(work, self.x.device))

    def know_products(self, stack: _Builds, rows: int, length: int) -> None:
        """Returns when the fastest algorithms of a pass of many tokens are known, so that a first picture has the bits of later
        ones. A dropped half has other algorithms, and nobody announces it."""
        if not self.x.is_cuda or not is_many(rows * length) or (rows, length) in self._known:
            return
        self._end_beside()
        stack.multiply_once(rows, length)
        self._known.add((rows, length))

    def _end_beside(self) -> None:
        while self._beside:
            self._beside.pop().join()

    def attention(self, scale_index: int) -> list[SparseAttention]:
        """What attends at a scale where a layer is not dense, ready to: one object, or one for each half of the rows. Raises what
        compiling its binaries raised, once."""
        for s in [s for s in self._of_attention if s <= scale_index]:
            self._of_attention.pop(s).wait()
        return self.sparse

    def waits_at(self, scale_index: int | None) -> bool:
        """Whether attention at a scale is of binaries that nobody has waited for."""
        return scale_index is not None and any(s <= scale_index for s in self._of_attention)

    def plan_dense(self, device: torch.device) -> None:
        """Runs each dense attention of an image once, of whatever the buffers hold: cuDNN plans a shape for 50 to 200 ms.

        PyTorch keeps plans by thread, shape and strides, so this is for the thread that draws.
        """
        rows, decided = self.rows, self.rows // len(self.sparse)
        for s in range(len(self.schedule)):
            problem = self.problems[rows][s]
            kinds = dict.fromkeys(kind for plans in self.sparse[0].plans if (kind := _dense_kind(plans[s])))
            for kind in kinds:
                each = decided if kind == "decides" else rows
                q = torch.empty(each, problem.num_queries, problem.heads, problem.head_dim, dtype=self.dtype, device=device)
                end = self.thinning.filled[0][s] + problem.num_queries
                q, k, v = q.transpose(1, 2), *(t[:each, :, :end] for t in self.cache(0))
                if not plans_shapes(q, k, v):
                    continue
                if kind == "decides":
                    dense_with_lse(q, k, v, problem.softmax_scale)
                else:
                    dense_attention(q, k, v, problem)

    def capture(self, what: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
        """A graph of what is launched, in the memory that all of them share; from one that cannot be on, none is replayed."""
        self._end_beside()  # while one captures, nobody else may use the device
        graph = captured(what, device, self.pool)
        if not isinstance(graph, str):
            return graph
        self.why_not_graphs = graph
        self.graphs.clear()
        warnings.warn(f"the fused path runs without graphs: {graph}", stacklevel=2)
        return None

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [rows, H, N, D], laid out [rows, N, H, D]."""
        begin, end = self.places[layer]
        keys, values = self.cached[:, :, begin:end].transpose(2, 3).unbind(0)
        return keys, values

    def why_not_pass(self, start: int, x: Tensor) -> str | None:
        """Why x [rows, L, C] after `start` tokens is no pass of this kind of image, or None: buffers are laid out for those."""
        schedule = self.schedule
        lengths = {begin: schedule.num_queries(s) for s, begin in enumerate(schedule.starts[:-1])}
        if schedule.prefix:
            lengths[0] = schedule.prefix
        if lengths.get(start) != x.shape[1]:
            return f"{x.shape[1]} tokens after {start} are no scale of the image's schedule"
        if x.shape[0] not in self.problems:
            return f"{x.shape[0]} rows where the image began with {self.rows}; want all or half"
        return None

    def last(self, x: Tensor) -> Tensor:
        """The stream of the last grid, as many rows and channels as x has."""
        return self.x[: x.shape[0] * self.tail * x.shape[2]].view(x.shape[0], self.tail, x.shape[2])

    def stream(self, x: Tensor) -> Tensor:
        """The buffer in the shape of x."""
        return self.x[: x.numel()].view(x.shape)

    @property
    def captured_bytes(self) -> int:
        """Memory that graphs hold beside the buffers."""
        return 0 if self.pool is None else held_bytes(self.pool)


# model -> buffers in use, by what they are: all paths of one model draw one image at a time, so they can have the same
_BUFFERS: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Tensor]] = weakref.WeakKeyDictionary()


def _shared(model: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of this model that lives as long as somebody holds it; of one axis it may be longer, that of a longer cache."""
    own = _BUFFERS.setdefault(model, weakref.WeakValueDictionary())
    found = own.get((what, shape, dtype, device))
    if found is None and len(shape) == 1:
        longer = [t for key, t in own.items() if key[0] == what and key[2:] == (dtype, device) and key[1] > shape]
        found = min(longer, key=Tensor.numel, default=None)
    if found is None:
        with torch.inference_mode(False):
            found = own[what, shape, dtype, device] = torch.empty(shape, dtype=dtype, device=device)
    return found


class OnePass:
    """See `stack.Pass`."""

    def __init__(self, work: Workspace, start: int, x: Tensor, dense: bool = False) -> None:
        self.work, self.start, self.dense = work, start, dense
        self.rows, self.length = x.shape[0], x.shape[1]
        places = {begin: s for s, begin in enumerate(work.schedule.starts[:-1])}
        self.scale_index = places.get(start) if start or not work.schedule.prefix else None

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.work.cache(layer)

    def filled(self, layer: int) -> int:
        return 0 if self.scale_index is None else self.work.thinning.filled[layer][self.scale_index]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        end = self.filled(layer) + q.shape[2]
        k, v = (t[: self.rows, :, :end] for t in self.cache(layer))
        out = self._out(layer, q, k, v, self.scale_index)
        return out.transpose(1, 2).reshape(self.rows, q.shape[2], -1)

    def cut(self, layer: int, queries: Callable[[Tensor], Tensor]) -> None:
        if self.scale_index is not None:
            keys, values = (t[: self.rows] for t in self.cache(layer))
            self.work.thinning.cut(layer, self.scale_index, keys, values, queries)

    def scaled(self, layer: int) -> str | None:
        precision = self.work.precision
        return precision.fmt if precision is not None and precision.at(self.scale_index, layer) else None

    def by_parts(self, layer: int) -> bool:
        return self.scale_index is not None and self.work.thinning.by_parts(layer, self.scale_index)

    def add(self, layer: int, part: str, x: Tensor, work: Work) -> None:
        assert self.scale_index is not None, "by_parts says so"
        self.work.thinning.add(layer, self.scale_index, part, x, work)

    def _out(self, layer: int, q: Tensor, k: Tensor, v: Tensor, s: int | None) -> Tensor:
        sparse = self.work.sparse[0]
        plan = None if s is None or self.dense else sparse.plans[layer][s]
        if plan is None or _is_dense(plan):
            return dense_attention(q, k, v, self.work.problems[self.rows][s or 0])
        assert s is not None
        attention = self.work.attention(s)
        if len(attention) == 1 or self.rows < self.work.rows:  # what is left after a drop is the first object's half
            return sparse(q, k, v, layer, s)
        half = self.rows // 2
        halves = zip(attention, (slice(None, half), slice(half, None)), strict=True)
        return torch.cat([a(q[h], k[h], v[h], layer, s) for a, h in halves])
