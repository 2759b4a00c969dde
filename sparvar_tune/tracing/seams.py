"""Which functions get ranges, and how they are put on and taken off.

Nothing in the kernels or the models knows of ranges. While tracing is on the functions below are replaced, in their module or
class, by ones that make a range and call them; afterwards the very objects that were there are there again. So nothing is paid
while tracing is off, and no source that a measurement's identity depends on changes.

Replacing is for the whole process: one run is traced at a time. What torch.compile made of a function before does not see it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparvar_tune.fused import STACKS
from sparvar_tune.tracing import work
from sparvar_tune.tracing.ranges import OUTER, Tracer

CPU, TRITON, VARIANTS = "sparvar_kernels.backends.cpu.layer", "sparvar_kernels.backends.triton.layer", "sparvar_kernels.variants"
ATTENTION, SAMPLING = "sparvar_kernels.attention", "sparvar_tune.bitwise.sampling"
FUSED, PASSES = "sparvar_tune.fused.engine", "sparvar_tune.fused.workspace"
BOXED = {"PocketVAR": "sparvar_tune.pocketvar.model", "EmojiVAR": "sparvar_tune.emojivar.model"}  # models in the box

Call = Callable[..., Any]
Around = Callable[[Tracer, Call, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Seam:
    """A function by module and name ("Class.method" for a method), and what is done around its calls."""

    module: str
    name: str
    around: Around


def _step(step: str, spent: Call | None = None, heads_at: int | None = None, variant: bool = False) -> Around:
    """A range of this step. spent: FLOPs and bytes from the call's arguments. heads_at: which argument names the heads."""

    def around(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        later = spent(*args, **kwargs) if spent and tracer.clock is not None else None
        kind = tracer.variant_of(None if heads_at is None else args[heads_at]) if variant else ""
        with tracer.range(step, kind, later):
            return call(*args, **kwargs)

    return around


def _attend(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """SparseAttention.__call__(self, q, k, v, layer, scale_index): says which layer and scale it is."""
    self, layer, scale = args[0], _argument(args, kwargs, 4, "layer"), _argument(args, kwargs, 5, "scale_index")
    with tracer.inside(scale, layer, self.policy), tracer.range("attention"):
        return call(*args, **kwargs)


def _dense(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """DenseAttention.__call__(self, q, k, v, layer, scale_index): the model's own attention."""
    later = work.dense_call(*args[1:4]) if tracer.clock is not None else None
    with tracer.inside(_argument(args, kwargs, 5, "scale_index"), _argument(args, kwargs, 4, "layer")):
        with tracer.range("dense", work=later):
            return call(*args, **kwargs)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _block(step: str) -> Around:
    """A step of a boxed model's block: method(self, block, ...)."""

    def around(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = next((i for i, block in enumerate(args[0].blocks) if block is args[1]), None)
        with tracer.inside(tracer.scale, layer), tracer.range(step):
            return call(*args, **kwargs)

    return around


def _stack(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """FusedPath._run(self, work, x, at), FusedSampling._run(self, work, state, at): all blocks at one scale; where a graph is
    replayed no Python runs inside."""
    _, work_space, _, at = args
    replayed = (at.start, at.length, at.rows) in work_space.graphs
    with tracer.inside(at.scale_index), tracer.range("replay" if replayed else "rest"):
        return call(*args, **kwargs)


def _pass(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """OnePass.attend(self, layer, q): attention where all blocks run as one."""
    with tracer.inside(args[0].scale_index, args[1]), tracer.range("attention"):
        return call(*args, **kwargs)


def _in_layer(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """method(self, layer, ...): says which layer it is, and is no range itself."""
    with tracer.inside(tracer.scale, args[1]):
        return call(*args, **kwargs)


def _product(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Product.__call__ and Product.gelu(self, x), where they multiply themselves; else they call what does."""
    self, x = args
    if self.weight is None:
        return call(*args, **kwargs)
    with tracer.range("products", work=work.linear(self, x) if tracer.clock is not None else None):
        return call(*args, **kwargs)


def _scaled(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """ScaledProduct.__call__(self, x, ...): of unknown work, since no limit is measured in 8-bit numbers."""
    with tracer.range("products", args[0].fmt):
        return call(*args, **kwargs)


def _generation(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Generating.step(self): one scale of the picture."""
    with tracer.inside(args[0].scale), tracer.range("rest"):
        return call(*args, **kwargs)


def _record(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """_record(q, k, v, problem, records, ...): what a decision scale leaves behind; most scales leave nothing."""
    if not args[4]:
        return call(*args, **kwargs)
    with tracer.range("decide", tracer.variant_of()):
        return call(*args, **kwargs)


def _gather(tracer: Tracer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gather.__call__(self, q, k, v, out, ...) on a GPU: key lists, or those of heads that read means."""
    pooled = args[0].bias
    later = work.gathered_stage(*args) if tracer.clock is not None else None
    with tracer.range("pooled" if pooled else "gathered", "pooled" if pooled else tracer.variant_of(), later):
        return call(*args, **kwargs)


# What a family's stack of blocks is made of, by the names its file knows them by; each has those it needs.
_STACKS = tuple(
    Seam(module, name, around)
    for family, module in STACKS.items()
    for name, around in (
        ("append_qkv", _step("qk path")), ("residual_norm", _step("norm")), ("gated_silu", _step("norm")),
        ("text_attention", _step("text")), (f"{family.capitalize()}Stack._attend", _in_layer),
        (f"{family.capitalize()}Stack._attend_text", _in_layer),
    )
)  # fmt: skip

_BOXED_STACK = tuple(
    Seam("sparvar_tune.fused.boxed_blocks", name, around)
    for name, around in (("append_qkv", _step("qk path")), ("residual_norm", _step("norm")), ("BoxedBlocks._attend", _in_layer))
)

_BOXED = tuple(
    Seam(module, name, around)
    for model, module in BOXED.items()
    for name, around in (
        (f"{model}.before_attention", _block("qk path")), (f"{model}.after_attention", _block("rest")),
    )
)  # fmt: skip

SEAMS = (
    Seam(ATTENTION, "SparseAttention.__call__", _attend),
    Seam(ATTENTION, "SparseAttention._prepare", _step("plan")),
    Seam(VARIANTS, "Csla.lists", _step("plan")),
    Seam(VARIANTS, "Cs4a.lists", _step("plan")),
    Seam(CPU, "dense_heads", _step("dense", work.dense_heads)),
    Seam(CPU, "pooled_attention", _step("pooled", work.pooled_heads)),
    Seam(CPU, "near_far_attention", _step("pooled", work.near_far_heads)),
    Seam(CPU, "gathered_attention", _step("gathered", work.gathered_lists, heads_at=4, variant=True)),
    Seam(CPU, "_record", _record),
    Seam(CPU, "column_mass", _step("decide")),
    Seam(CPU, "rank_keys", _step("decide")),
    Seam(CPU, "enlarge", _step("residual")),
    Seam(TRITON, "dense_heads", _step("dense", work.dense_heads)),
    Seam(TRITON, "dense_with_lse", _step("dense", work.dense_call)),
    Seam(TRITON, "pool_keys", _step("pooled")),
    Seam(TRITON, "keys_and_means", _step("pooled")),
    Seam(TRITON, "Gather.__call__", _gather),
    Seam(TRITON, "Layer._decide", _step("decide")),
    Seam(TRITON, "column_mass", _step("decide")),
    Seam(TRITON, "fill_lists", _step("decide")),
    Seam(TRITON, "build_stage", _step("plan")),
    Seam(TRITON, "shared_stage", _step("plan")),
    Seam(SAMPLING, "DenseAttention.__call__", _dense),
    Seam(SAMPLING, "Generating.pictures", _step("decoder")),
    Seam(SAMPLING, "Generating.step", _generation),
    *_BOXED,
    Seam("torch.nn", "Linear.forward", _step("products", work.linear)),
    Seam("sparvar_tune.generation.scaled_product", "ScaledProduct.__call__", _scaled),
    Seam(FUSED, "FusedPath._run", _stack),
    Seam("sparvar_tune.fused.boxed", "FusedSampling._run", _stack),
    Seam(PASSES, "OnePass.attend", _pass),
    Seam(PASSES, "dense_attention", _step("dense", work.dense_call)),
    Seam("sparvar_tune.fused.product", "Product.__call__", _product),
    Seam("sparvar_tune.fused.product", "Product.gelu", _product),
    Seam("sparvar_tune.fused.product", "gated_weight", _step("products")),
    Seam("sparvar_tune.fused.stream", "residual_norm", _step("norm")),
    Seam("sparvar_tune.fused.stream", "add_linear", _step("products", work.added_linear)),
    *_STACKS,
    *_BOXED_STACK,
)

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def traced(tracer: Tracer, seams: tuple[Seam, ...] = SEAMS) -> Iterator[Tracer]:
    """While it lasts, everything of `seams` that runs in this process makes ranges; see the module docstring.

    Raises ValueError where another run is being traced.
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise ValueError("another run is being traced in this process; trace one at a time")
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for seam in seams:
            if (found := _owner(seam)) is not None:
                owner, name = found
                replaced.append((owner, name, vars(owner)[name]))
                setattr(owner, name, _with_range(tracer, vars(owner)[name], seam.around))
        with tracer.range(OUTER):
            yield tracer
    finally:
        for owner, name, before in reversed(replaced):
            setattr(owner, name, before)
        _ONE_AT_A_TIME.release()


def _owner(seam: Seam) -> tuple[Any, str] | None:
    """The module or class, and the name in it; None for a backend that does not run here."""
    if seam.module == TRITON and TRITON not in sys.modules:
        if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
            return None
    owner = importlib.import_module(seam.module)
    *classes, name = seam.name.split(".")
    for step in classes:
        owner = getattr(owner, step)
    return None if seam in _STACKS and name not in vars(owner) else (owner, name)


def _with_range(tracer: Tracer, call: Call, around: Around) -> Call:
    @functools.wraps(call)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        return around(tracer, call, args, kwargs)

    return ranged
