"""sparvar-tune: fast and faithful sparse attention for next-scale (VAR) image models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparvar_tune.monitoring import monitor
    from sparvar_tune.profile.schema import Profile
    from sparvar_tune.runtime import apply, keep_memory, load_profile
    from sparvar_tune.ways.api import capture, explain, trials, tune

__version__ = "0.1.0"
__all__ = ["Profile", "__version__", "apply", "capture", "explain", "keep_memory", "load_profile", "monitor", "trials", "tune"]

# Fetched on first use: `--version` and `--help` need no torch, the runtime neither optuna nor pandas.
_ROOMS = {
    "load_profile": "sparvar_tune.runtime", "apply": "sparvar_tune.runtime", "keep_memory": "sparvar_tune.runtime",
    "Profile": "sparvar_tune.profile.schema",
    "tune": "sparvar_tune.ways.api", "trials": "sparvar_tune.ways.api", "explain": "sparvar_tune.ways.api",
    "capture": "sparvar_tune.ways.api", "monitor": "sparvar_tune.monitoring",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'sparvar_tune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
