"""The ways one head may do its attention, as plain frozen values: what a policy is made of.

Each has a folder: rule.py (the value and what may be said with it), planner.py where it has lists to plan, oracle.py (the
definition in fp64). protocol.py says what a variant is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.cs4a.rule import Cs4a
from sparvar_kernels.variants.csla.rule import Csla
from sparvar_kernels.variants.dense.rule import Dense
from sparvar_kernels.variants.near_far.rule import NearFar
from sparvar_kernels.variants.pooled.rule import Pooled
from sparvar_kernels.variants.protocol import Variant
from sparvar_kernels.variants.reuse.rule import Reuse

__all__ = ["VARIANTS", "Cs4a", "Csla", "Dense", "NearFar", "Pooled", "Reuse", "Variant", "register", "variant_from_dict",
           "variant_to_dict", "why_not_variant"]  # fmt: skip

VARIANTS: dict[str, type[Variant]] = {v.kind: v for v in (Dense, Csla, Cs4a, Reuse, Pooled, NearFar)}


def register(cls: type[Variant]) -> type[Variant]:
    """Adds a variant of one's own; a decorator.

    Raises ValueError where it is not what protocol.py asks for, or its kind is taken.
    """
    missing = [name for name in ("kind", "meaning", "reads", "why_not", "at_decision", "ranks", "lists", "describe", "oracle",
                                 "residual") if not hasattr(cls, name)]  # fmt: skip
    if missing or not dataclasses.is_dataclass(cls):
        what = f"has no {missing[0]}" if missing else "is no dataclass"
        raise ValueError(f"{cls.__name__}: {what}; sparvar_kernels/variants/protocol.py says what a variant is")
    if VARIANTS.setdefault(cls.kind, cls) is not cls:
        raise ValueError(f"{cls.__name__}: kind {cls.kind!r} is taken by {VARIANTS[cls.kind].__name__}; choose another")
    return cls


def why_not_variant(variant: Variant, schedule: ScaleSchedule, scale_index: int) -> str | None:
    """Why `variant` cannot be used at `scale_index`, or None. The one statement of what a policy may say."""
    decision = variant.decision_scale
    if decision is not None and not 0 <= decision < scale_index:
        return f"{variant.kind}: decision_scale={decision}, want 0..{scale_index - 1} (before scale_index={scale_index})"
    return variant.why_not(schedule, scale_index)


def variant_to_dict(variant: Variant) -> dict[str, Any]:
    """Plain JSON values, fields by name; the inverse of `variant_from_dict`."""
    out: dict[str, Any] = {"kind": variant.kind}
    for field in dataclasses.fields(variant):
        value = getattr(variant, field.name)
        out[field.name] = str(value) if isinstance(value, Tile) else list(value) if isinstance(value, tuple) else value
    return out


def variant_from_dict(data: Any, where: str) -> Variant:
    """Variant from JSON values; raises ValueError naming the field under `where` that is missing, unknown or wrong."""
    got = data.get("kind") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(got, str) or got not in VARIANTS:
        raise ValueError(f"{where}.kind: got {got!r}, want one of {', '.join(VARIANTS)}")
    cls = VARIANTS[data["kind"]]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name != "kind" and name not in fields:
            raise ValueError(f"{where}.{name}: unknown field for {data['kind']}; known: {', '.join(fields) or 'none'}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in data:
            raise ValueError(f"{where}.{name}: missing")
        values[name] = _field_from_json(str(field.type), data[name], f"{where}.{name}")
    return cls(**values)


def _field_from_json(kind: str, value: Any, where: str) -> Any:
    def wrong(want: str) -> ValueError:
        return ValueError(f"{where}: got {value!r}, want {want}")

    def is_int(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    if kind == "Tile":
        if not isinstance(value, str):
            raise wrong('a tile such as "8x16"')
        try:
            return Tile.parse(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if kind == "tuple[int, ...]":
        if not isinstance(value, list) or not all(map(is_int, value)):
            raise wrong("a list of integers")
        return tuple(value)
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            raise wrong("a finite number")
        return float(value)
    if kind == "int | None" and value is None:
        return None
    if kind in ("int", "int | None"):
        if not is_int(value):
            raise wrong("an integer")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if not isinstance(value, str):
        raise wrong("a string")
    return value
