"""A live model's products of scaled rows of 8-bit numbers; `generation/precision.py` says which and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.scale_count import IsOther, ScaleCount, never
from sparvar_tune.adapters.structure import is_plain
from sparvar_tune.generation import Precision
from sparvar_tune.generation.scaled_product import ScaledLinears


def scale_products(
    found: Parts, step: Precision, linears: Callable[[Any], Sequence[Any]], named: Callable[..., dict[str, Any]],
    is_other: IsOther = never,
) -> Undos:  # fmt: skip
    """The step in all its layers. linears(block): those whose products are scaled. named: a block's arguments by name.

    is_other: whether an image has another schedule than the parts'; it is drawn without. Raises ValueError, and changes nothing,
    for a block whose products cannot be scaled.
    """
    reason = why_not_scaled(step, [linears(block) for block in found.blocks])
    if reason:
        raise ValueError(reason)
    undos = Undos()
    for layer, block in enumerate(found.blocks):
        if step.at(step.from_scale, layer):
            undos.add(replace_method(block, "forward", _body(found, step, layer, linears(block), named, is_other)))
    return undos


def why_not_scaled(step: Precision | None, linears: Sequence[Sequence[Any]]) -> str | None:
    """Why the products of a model's blocks, by layer, cannot be scaled, or None."""
    for layer, modules in enumerate(linears if step is not None else ()):
        assert step is not None
        if not step.at(step.from_scale, layer):
            continue
        other = next((module for module in modules if not is_plain(module)), None)
        if other is not None:
            return f"precision: block {layer} has a {type(other).__name__} that is no plain Linear; leave its layer out"
    return None


def _body(found: Parts, step: Precision, layer: int, linears: Sequence[Any], named: Any, is_other: Any) -> Any:
    attention, scaled = found.attentions[layer], ScaledLinears(linears, step.fmt)
    count = ScaleCount(found, attention, is_other)

    def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not attention.caching or not step.at(count.next(lambda: named(*args, **kwargs)), layer):
            return inner(*args, **kwargs)
        with scaled.used(*range(len(linears))):
            return inner(*args, **kwargs)

    return forward
