"""Who hears of ranges: a file each, named in RANGES; nsight.py has the commands of the tools that run ours under them.

A file has `why_not(device)`, why it cannot be used here ("cpu" or "cuda") or None, and `session(stem)`, a context manager that
gives the `Ranges` to tell, and afterwards the files it wrote beside `stem`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from sparvar_tune.tracing.ranges import Ranges

RANGES = {
    "nvtx": "sparvar_tune.tracing.backends.nvtx",
    "torch": "sparvar_tune.tracing.backends.torch_profiler",
    "proton": "sparvar_tune.tracing.backends.proton",
}


@dataclass
class Session:
    """One traced run. files: written when it is over."""

    ranges: Ranges
    files: list[Path] = field(default_factory=list)


def open_session(name: str, device: str) -> Callable[[Path], AbstractContextManager[Session]]:
    """The `session` of a backend. Raises ValueError, in one line, where it cannot be used on "cpu" or "cuda"."""
    module = importlib.import_module(RANGES[name])
    reason = module.why_not(device)
    if reason:
        raise ValueError(f"--with {name}: {reason}")
    return cast("Callable[[Path], AbstractContextManager[Session]]", module.session)
