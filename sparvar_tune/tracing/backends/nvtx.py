"""NVTX: ranges of the domain "sparvar", heard by Nsight Systems and Nsight Compute when they run the process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparvar_tune.tracing.backends import Session

DOMAIN = "sparvar"


def why_not(device: str) -> str | None:
    return None if importlib.util.find_spec("nvtx") else "the package nvtx is missing: pip install 'sparvar-tune[profile]'"


class Domain:
    """Push and pop on the calling thread."""

    def __init__(self) -> None:
        import nvtx

        self.domain: Any = nvtx.get_domain(DOMAIN)

    def push(self, name: str) -> None:
        self.domain.push_range(self.domain.get_event_attributes(message=name))

    def pop(self) -> None:
        self.domain.pop_range()


@contextmanager
def session(stem: Path) -> Iterator[Session]:
    """Writes nothing: what the ranges are for is the tool that listens."""
    yield Session(Domain())
