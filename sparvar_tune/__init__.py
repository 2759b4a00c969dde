"""sparvar-tune: fast and faithful sparse attention for next-scale (VAR) image models."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "load_profile"]


def __getattr__(name: str) -> Any:
    """`load_profile` and `apply` on first use, so that `--version` and `--help` need not import torch."""
    if name in ("load_profile", "apply"):
        from sparvar_tune import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'sparvar_tune' has no attribute {name!r}")
