"""The families of live models: a row for each, and those that installed packages add under `sparvar_tune.adapters`.

An entry point names a module with the functions of `protocol.Family`:

    [project.entry-points."sparvar_tune.adapters"]
    mymodel = "mypackage.sparvar_adapter"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from sparvar_tune.adapters.protocol import Family, Parts
from sparvar_tune.catalog.names import words_of

GROUP = "sparvar_tune.adapters"
FAMILIES = {
    "pocketvar": "sparvar_tune.adapters.pocketvar",
    "emojivar": "sparvar_tune.adapters.emojivar",
    "infinity": "sparvar_tune.adapters.infinity",
    "hart": "sparvar_tune.adapters.hart",
    "var": "sparvar_tune.adapters.var",
}


def families() -> Iterator[tuple[str, Family | str]]:
    """(name, the family, or why it could not be loaded), one after another, since looking for installed ones takes as long as
    drawing two scales. Our own first: an installed package cannot take their names."""
    for name, path in FAMILIES.items():
        yield name, importlib.import_module(path)
    seen = set(FAMILIES)
    for point in entry_points(group=GROUP):
        if point.name not in seen:
            seen.add(point.name)
            yield point.name, _load(point)


def _load(point: EntryPoint) -> Family | str:
    try:
        family = point.load()
    except Exception as error:  # whatever an installed package does wrong must not stop the others
        return f"{point.value} could not be loaded: {error}"
    missing = [name for name in ("why_not", "parts", "attach") if not hasattr(family, name)]
    return f"{point.value} has no {missing[0]}" if missing else family


def _is_meta(model: Any) -> bool:
    try:
        return isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters())
    except Exception:  # as below, where it is said
        return False


def _why_not(family: Family, model: Any) -> str | None:
    try:
        return family.why_not(model)
    except Exception as error:  # what a foreign model's attributes do when somebody asks for them is its own affair
        return f"looking at it raised {type(error).__name__}: {words_of(error, 100)}"


def recognise(model: Any) -> tuple[Family, Parts]:
    """The family of a live model and its parts. Raises ValueError with each family's reason when none knows it."""
    if _is_meta(model):
        raise ValueError(f"model of type {type(model).__name__}: its weights are on the meta device; load them first")
    reasons = []
    for name, family in families():
        reason = family if isinstance(family, str) else _why_not(family, model)
        if reason is None:
            assert not isinstance(family, str)
            return family, family.parts(model)
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"model of type {type(model).__name__}: no adapter knows it ({'; '.join(reasons)})")
