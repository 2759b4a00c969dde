"""The ways one head may do its attention, as plain frozen values: what a policy is made of.

`Dense`; `Csla` (windows and sinks, paper section 3.3 and the public code's masks); `Cs4a` (keys chosen at a decision
scale, paper section 3.2); `Reuse` (the enlarged dense output of the decision scale: CS4A at zero keys with its
residual); `Pooled` (diffuse heads read block means of keys). None of them says how it is run: that is a kernel's launch
configuration.

`meaning` is raised when the same fields come to stand for other keys or other arithmetic: a profile of an earlier meaning is
then refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule, Tile

KEY_MULTIPLE = 64  # CS4A keeps a multiple of this many keys: no kernel then needs a masked tail
PAPER_MULTIPLE = 112  # the same in the paper's code (its key tile)
BLOCK = 128  # side of the paper's CSLA block mask


@dataclass(frozen=True)
class Dense:
    """Every key."""

    kind: ClassVar[str] = "dense"
    meaning: ClassVar[int] = 1


@dataclass(frozen=True)
class Csla:
    """Each query tile sees the first `sinks` scales (and the prefix) whole and the union of its queries' windows.

    windows[h] is the window's side on key scale h, radius windows[h] // 2; negative: scale h unseen.
    form "exact": that union; "block128": the paper's mask, where any 128 x 128 block (raster order, keys counted from
    key 0) with one visible pair is attended whole (needs tile raster128).
    decision_scale: where dense minus sparse is taken and added, enlarged, to later scales; None: no residual.
    """

    windows: tuple[int, ...]
    sinks: int
    tile: Tile
    form: str = "exact"
    decision_scale: int | None = None
    kind: ClassVar[str] = "csla"
    meaning: ClassVar[int] = 1


@dataclass(frozen=True)
class Cs4a:
    """Each query tile sees the keys with the most softmax mass at the decision scale.

    keys "place" (ours): keys map by 2-D place (a cell of the decision grid stands for itself and for every cell of the
    finer grids whose centre falls into it), best first, until `top_k` of *this* scale's keys are kept.
    keys "index" (paper's code): `top_k` of the *decision* scale's keys, indices unchanged, plus one contiguous band of
    rows per scale after it; needs raster tiles.
    window (place): side of the own-scale window on the decision grid whose cells rank ahead of all others; 0: none.
    bands (index): side of the own-scale window for each scale after the decision scale.
    residual: add the enlarged dense minus sparse of the decision scale.
    sample: the mass is measured on every `sample`-th query of a tile.
    """

    decision_scale: int
    top_k: float
    tile: Tile
    keys: str = "place"
    window: int = 0
    bands: tuple[int, ...] = ()
    residual: bool = True
    sample: int = 1
    kind: ClassVar[str] = "cs4a"
    meaning: ClassVar[int] = 2  # 1: a tile shorter than the others counted its first query several times


@dataclass(frozen=True)
class Reuse:
    """The decision scale's dense output, bilinearly enlarged: no attention at all."""

    decision_scale: int
    kind: ClassVar[str] = "reuse"
    meaning: ClassVar[int] = 1


@dataclass(frozen=True)
class Pooled:
    """Grids from `first_scale` on are read as means over factor x factor blocks of keys (ours; see pooled.py)."""

    first_scale: int
    factor: int
    kind: ClassVar[str] = "pooled"
    meaning: ClassVar[int] = 1


Variant = Dense | Csla | Cs4a | Reuse | Pooled
VARIANTS: dict[str, type] = {v.kind: v for v in (Dense, Csla, Cs4a, Reuse, Pooled)}


def why_not_variant(variant: Variant, schedule: ScaleSchedule, scale_index: int) -> str | None:
    """Why `variant` cannot be used at `scale_index`, or None. The one statement of what a policy may say."""
    decision = getattr(variant, "decision_scale", None)
    if decision is not None and not 0 <= decision < scale_index:
        return f"{variant.kind}: decision_scale={decision}, want 0..{scale_index - 1} (before scale_index={scale_index})"
    if isinstance(variant, Csla):
        if len(variant.windows) != len(schedule):
            return f"csla: {len(variant.windows)} windows, want one per scale ({len(schedule)})"
        if not 0 <= variant.sinks <= len(schedule):
            return f"csla: sinks={variant.sinks}, want 0..{len(schedule)}"
        if variant.form not in ("exact", "block128"):
            return f'csla: form={variant.form!r}, want "exact" or "block128"'
        if variant.form == "block128" and variant.tile != Tile(0, BLOCK):
            return f"csla: form block128 with tile {variant.tile}, want raster{BLOCK}"
        if max(variant.windows) < 0 and variant.sinks == 0 and schedule.prefix == 0:
            return "csla: no window and no sinks, so no key is visible; want at least one"
        own = variant.windows[scale_index]
        if variant.sinks == 0 and schedule.prefix == 0 and own < 0:
            return f"csla: windows[{scale_index}]={own} without sinks can leave a query without keys; want >= 0"
    if isinstance(variant, Pooled):
        if not 0 <= variant.first_scale <= scale_index:
            return f"pooled: first_scale={variant.first_scale}, want 0..{scale_index}"
        if variant.factor < 2:
            return f"pooled: factor={variant.factor}, want >= 2"
    if isinstance(variant, Cs4a):
        if not 0 < variant.top_k <= 1:
            return f"cs4a: top_k={variant.top_k}, want 0 < top_k <= 1"
        if variant.keys not in ("place", "index"):
            return f'cs4a: keys={variant.keys!r}, want "place" or "index"'
        if variant.sample < 1:
            return f"cs4a: sample={variant.sample}, want >= 1"
        later = len(schedule) - 1 - variant.decision_scale
        if variant.keys == "place" and (variant.bands or variant.window < 0):
            return f"cs4a: keys place with window={variant.window}, bands={variant.bands}; want window >= 0 and no bands"
        if variant.keys == "index" and (variant.tile.height or variant.window or len(variant.bands) != later):
            return f"cs4a: keys index is the paper's form; want a raster tile, no window and {later} bands"
        if variant.bands and min(variant.bands) < 0:
            return f"cs4a: bands={variant.bands}, want every side >= 0"
    return None


def at_decision(variant: Variant, schedule: ScaleSchedule, scale_index: int) -> Variant:
    """The same rule with its tile carried to the decision grid: what is run there to make the residual."""
    if isinstance(variant, Dense | Reuse | Pooled) or variant.decision_scale is None:
        return variant
    if (isinstance(variant, Cs4a) and variant.keys == "index") or (isinstance(variant, Csla) and variant.form == "block128"):
        return variant  # the paper keeps its raster groups at every scale
    tile = variant.tile.scaled(schedule.grids[scale_index], schedule.grids[variant.decision_scale])
    return dataclasses.replace(variant, tile=tile)


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
