"""Reads frozen dataclasses from plain JSON values, strictly, and writes them back.

The annotations are the schema: every field must be there, no other may be, every value must have the field's type, and
each class may refuse the whole with `why_not() -> str | None`. Errors name the dotted path of the field.

A file also holds the `checksum` of its values: a flipped digit mostly makes another sound file, which no check of fields sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from functools import lru_cache
from typing import Any

from sparvar_kernels.policy import LATER, Policy, Rule, Step
from sparvar_kernels.variants import variant_from_dict, variant_to_dict
from sparvar_tune.generation import STEPS, SkipScales

MAX_TEXT, MAX_ITEMS = 500, 100_000
T = typing.TypeVar("T")


class ReadError(ValueError):
    """What was got, what was wanted, at which field."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`: raises ReadError where an object names a key twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ReadError("a key stands twice in one object")
    return out


def checksum(data: dict[str, Any]) -> str:
    """sha256 of the values in one form, whatever order and spacing the file has them in; `checksum` itself left out.

    Raises ValueError on infinities, NaN and integers of thousands of digits.
    """
    values = {name: value for name, value in data.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def sealed_text(data: dict[str, Any]) -> str:
    """A file's text: sorted keys, one value a line, its checksum. Raises ValueError as `checksum` does."""
    data = {**data, "checksum": checksum(data)}
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def why_not_sealed(data: dict[str, Any]) -> str | None:
    """Why `data`, whose fields were found sound, is not what its checksum was made of, or None."""
    got = data.get("checksum")
    if got == checksum(data):
        return None
    return "checksum: missing" if got is None else f"checksum: {_short(got)} is not that of its values"


class Reader:
    """Turns JSON values into dataclasses; see the module docstring."""

    def read(self, cls: type[T], data: Any, where: str, whole: bool = True) -> T:
        """whole: False where `why_not` wants to know more than the fields, and is asked later."""
        if not isinstance(data, dict):
            raise ReadError(f"{where or 'file'}: got {_short(data)}, want an object")
        hints = typing.get_type_hints(cls)
        fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in data:
            if name not in fields:
                raise ReadError(f"{_join(where, name)}: unknown field")
        values = {}
        for name in fields:
            if name not in data:
                raise ReadError(f"{_join(where, name)}: missing")
            values[name] = self.value(hints[name], data[name], _join(where, name))
        made = cls(**values)
        reason = made.why_not() if whole and hasattr(made, "why_not") else None
        if reason:
            raise ReadError(f"{where + ': ' if where else ''}{reason}")
        return made

    def value(self, kind: Any, data: Any, where: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Policy:
            return self._policy(data, where)
        if origin in (types.UnionType, typing.Union):
            if data is None:
                return None
            return self.value(next(a for a in arguments if a is not type(None)), data, where)
        if origin is tuple and _is_mapping(arguments):
            if not isinstance(data, dict) or len(data) > 32:
                raise ReadError(f"{where}: got {_short(data)}, want an object of at most 32 values")
            of = typing.get_args(arguments[0])[1]
            return tuple((self.value(str, k, where), self.value(of, data[k], _join(where, k))) for k in sorted(data))
        if origin is tuple:
            if not isinstance(data, list) or len(data) > MAX_ITEMS:
                raise ReadError(f"{where}: got {_short(data)}, want a list")
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return tuple(self.value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
            if len(data) != len(arguments):
                raise ReadError(f"{where}: got {len(data)} items, want {len(arguments)}")
            pairs = zip(arguments, data, strict=True)
            return tuple(self.value(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(pairs))
        if dataclasses.is_dataclass(kind):
            return self.read(kind, data, where)  # type: ignore[arg-type]
        return _scalar(kind, data, where)

    def _policy(self, data: Any, where: str) -> Policy:
        """Steps are a list of their own, or the field `skip_scales` alone, which files had before there were others."""
        steps = self._steps(data.get("steps"), _join(where, "steps")) if isinstance(data, dict) and "steps" in data else None
        if steps is not None:
            data = {"skip_scales": [], **{name: value for name, value in data.items() if name != "steps"}}
        parts = self.read(_PolicyFile, data, where)
        if steps is None:
            steps = (SkipScales(parts.skip_scales),) if parts.skip_scales else ()
        elif parts.skip_scales:
            raise ReadError(f"{_join(where, 'skip_scales')}: got it beside steps, want it among them")
        rules = []
        for i, rule in enumerate(parts.rules):
            try:
                rules.append(Rule(rule.scale_index, rule.head_class, variant_from_dict(rule.variant, "variant")))
            except ValueError as error:
                raise ReadError(f"{where}.rules[{i}].{error}") from None
        return Policy(parts.heads, tuple(rules), steps)

    def _steps(self, data: Any, where: str) -> tuple[Step, ...]:
        if not isinstance(data, list) or len(data) > len(STEPS):
            raise ReadError(f"{where}: got {_short(data)}, want a list of at most {len(STEPS)} steps")
        made = []
        for i, fields in enumerate(data):
            kind = fields.get("kind") if isinstance(fields, dict) else None
            if not isinstance(kind, str) or kind not in STEPS:
                raise ReadError(f"{where}[{i}].kind: got {_short(kind)}, want one of {', '.join(STEPS)}")
            values = _defaults(STEPS[kind]) | {name: value for name, value in fields.items() if name != "kind"}
            made.append(self.read(STEPS[kind], values, f"{where}[{i}]", whole=False))
        return tuple(made)


@dataclasses.dataclass(frozen=True)
class _RuleFile:
    scale_index: int
    head_class: str
    variant: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _PolicyFile:
    heads: tuple[str, ...]
    rules: tuple[_RuleFile, ...]
    skip_scales: tuple[int, ...]

    def why_not(self) -> str | None:
        if not self.heads or not all(self.heads):
            return "heads: want one string of class letters per layer"
        return None


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float:
        if isinstance(data, bool) or not isinstance(data, int | float) or not abs(data) < 1e300 or math.isnan(data):
            raise ReadError(f"{where}: got {_short(data)}, want a finite number")
        return float(data)
    if kind is int:
        if isinstance(data, bool) or not isinstance(data, int) or abs(data) >= 1 << 63:
            raise ReadError(f"{where}: got {_short(data)}, want an integer")
        return data
    if kind is bool:
        if not isinstance(data, bool):
            raise ReadError(f"{where}: got {_short(data)}, want true or false")
        return data
    if kind is str:
        if not isinstance(data, str) or len(data) > MAX_TEXT or not data.isprintable():
            raise ReadError(f"{where}: got {_short(data)}, want printable text of at most {MAX_TEXT} characters")
        return data
    if not isinstance(data, dict):  # the one other kind: a variant, read by `variant_from_dict`
        raise ReadError(f"{where}: got {_short(data)}, want an object")
    return data


def to_plain(value: Any) -> Any:
    """JSON values of a dataclass tree; floats keep 6 significant digits."""
    if isinstance(value, Policy):
        return _plain_policy(value)
    if isinstance(value, Rule):
        variant = to_plain(variant_to_dict(value.variant))
        return {"scale_index": value.scale_index, "head_class": value.head_class, "variant": variant}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_plain(dict(getattr(value, f.name)) if _is_mapping(typing.get_args(hint)) else getattr(value, f.name))
            for f, hint in zip(dataclasses.fields(value), _hints(type(value)), strict=True)
        }
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _plain_policy(policy: Policy) -> dict[str, Any]:
    """A policy that only skips scales, or does nothing else, is written as it always was, so that its file keeps every byte."""
    data = {"heads": to_plain(policy.heads), "rules": to_plain(policy.rules)}
    if all(isinstance(step, SkipScales) for step in policy.steps):
        return {**data, "skip_scales": list(policy.skip_scales)}
    return {**data, "steps": [{"kind": step.kind, **_without_defaults(step)} for step in policy.steps]}


def _defaults(step: type[Step]) -> dict[str, Any]:
    """The defaults of a step's fields that came to it later: files from before have none, and keep every byte."""
    fields = dataclasses.fields(step)
    return {f.name: f.default for f in fields if LATER in f.metadata}


def _without_defaults(step: Step) -> dict[str, Any]:
    later = _defaults(type(step))
    return {name: value for name, value in to_plain(step).items() if later.get(name, dataclasses.MISSING) != value}


def _is_mapping(arguments: tuple[Any, ...]) -> bool:
    """Whether a tuple is a small mapping kept sorted: tuple[tuple[str, T], ...], an object in the file."""
    return len(arguments) == 2 and arguments[1] is Ellipsis and typing.get_args(arguments[0])[:1] == (str,)


@lru_cache(maxsize=64)
def _hints(cls: type) -> tuple[Any, ...]:
    """The types of a dataclass's fields, in their order."""
    hints = typing.get_type_hints(cls)
    return tuple(hints[f.name] for f in dataclasses.fields(cls))


def _join(where: str, name: str) -> str:
    shown = name if name.isprintable() and len(name) <= 60 else _short(name)
    return f"{where}.{shown}" if where else shown


def _short(data: Any) -> str:
    text = repr(data) if isinstance(data, str | int | float | bool | None) else f"a {type(data).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
