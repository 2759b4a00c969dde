"""Recognising a module by what it has and how it is called, never by where its class lives: copies of the public classes
live in many projects under other module paths."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters.protocol import Parts


@dataclass(frozen=True)
class Shape:
    """attributes: what an instance must have. parameters: exactly those of the method `method`, in order, without self.

    calls: global names the method's code must use, any one of them; empty: not looked at.
    """

    what: str
    attributes: tuple[str, ...]
    parameters: tuple[str, ...]
    method: str = "forward"
    calls: tuple[str, ...] = ()

    def why_not(self, found: Any) -> str | None:
        """Why `found` is none of this shape, or None."""
        missing = [name for name in self.attributes if not hasattr(found, name)]
        if missing:
            return f"{self.what} has no {missing[0]}"
        method = getattr(type(found), self.method, None)
        if method is None:
            return f"{self.what} has no method {self.method}"
        got = tuple(inspect.signature(method).parameters)[1:]
        if got != self.parameters:
            return f"{self.what}: {self.method} takes ({', '.join(got)}), want ({', '.join(self.parameters)})"
        if self.calls and not inspect.isfunction(method):
            return f"{self.what}: {self.method} is a {type(method).__name__}, want a plain function"
        if self.calls and (hasattr(method, "__wrapped__") or not set(self.calls) & set(method.__code__.co_names)):
            return f"{self.what}: {self.method} calls none of {', '.join(self.calls)}"
        return None

    def named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


def why_not_alike(modules: Iterable[Any], *names: str) -> str | None:
    """Why the modules, one per layer, are not alike in the attributes `names`, or None."""
    for name in names:
        values = {getattr(m, name) for m in modules}
        if len(values) != 1:
            return f"layers differ in {name}: {', '.join(map(str, sorted(values)))}"
    return None


def is_plain(module: Any) -> bool:
    """True for a Linear whose product is its weight and bias and nothing else."""
    own = module.__dict__
    hooked = any(own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks"))
    return type(module) is nn.Linear and not hooked and "forward" not in own and not own.get("parametrizations")


def uncompiled(module: Any) -> Any:
    """The module behind `torch.compile(module)`, or the module itself."""
    return module.__dict__.get("_modules", {}).get("_orig_mod", module) if hasattr(module, "__dict__") else module


def why_not_open(layers: Iterable[Any], what: str) -> str | None:
    """Why the layers cannot be changed any more, or None: what was compiled has its forward already in it."""
    for i, module in enumerate(layers):
        if uncompiled(module) is not module or getattr(module, "_compiled_call_impl", None) is not None:
            return f"{what} {i} is compiled already; apply first, compile after"
    return None


def cosine_bound(attentions: Iterable[Any]) -> float:
    """The largest |logit| of cosine attention: unit vectors times the learned factor, as the models' code computes it.

    Its own dtype matters: the cap of 100 is 99 in bf16.
    """
    return max(float((a.scale_mul_1H11.detach().clamp_max(a.max_scale_mul).exp() * a.scale).max()) for a in attentions)


def why_not_blocks(blocks: Sequence[Any], block: Shape, inside: Mapping[str, Shape], *alike: str) -> str | None:
    """Why a model's blocks are not of these shapes, or None.

    inside: the shapes of a block's own modules by attribute, its attention first. alike: attributes of the attention that no
    two layers may differ in.
    """
    if not blocks:
        return "it has no blocks"
    name = next(iter(inside))
    reason = why_not_open(blocks, "block")
    for module in blocks:
        reason = reason or block.why_not(module) or why_not_open([getattr(module, name)], "the attention of block")
        for attribute, shape in inside.items():
            reason = reason or shape.why_not(getattr(module, attribute))
    return reason or why_not_alike([getattr(module, name) for module in blocks], *alike)


def take_apart(
    family: str, model: Any, blocks: Iterable[Any], attention: str, cosine: str, schedule: ScaleSchedule | None
) -> Parts:
    """The parts of a model whose blocks hold their attention as `attention`; its attribute `cosine` says whether it is cosine."""
    blocks = tuple(blocks)
    attentions = tuple(getattr(block, attention) for block in blocks)
    first = attentions[0]
    bound = cosine_bound(attentions) if getattr(first, cosine) else None
    return Parts(family, model, blocks, attentions, first.num_heads, first.head_dim, float(first.scale), bound, schedule)
