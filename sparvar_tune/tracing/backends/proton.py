"""Triton's proton: kernels' time on the GPU under each range, as a tree that `proton-viewer` prints."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparvar_tune.tracing.backends import Session


def why_not(device: str) -> str | None:
    if device != "cuda":
        return "proton sees a GPU's kernels and nothing of a CPU; use --with torch"
    return None if importlib.util.find_spec("triton") else "it comes with Triton: pip install 'sparvar-tune[gpu]'"


class Scopes:
    """Proton's scopes, as a stack."""

    def __init__(self) -> None:
        self.stack: list[str] = []

    def push(self, name: str) -> None:
        import triton.profiler as proton

        self.stack.append(name)
        proton.enter_scope(name)

    def pop(self) -> None:
        import triton.profiler as proton

        proton.exit_scope(self.stack.pop())


@contextmanager
def session(stem: Path) -> Iterator[Session]:
    """Writes <stem>.hatchet."""
    import triton.profiler as proton

    stem.parent.mkdir(parents=True, exist_ok=True)
    try:
        number, made = proton.start(str(stem)), Session(Scopes())
    except RuntimeError as error:  # CUPTI serves one profiler a process
        raise ValueError(f"proton cannot start here: {error}; run it in a process where no other profiler ran") from None
    try:
        yield made
    finally:
        proton.finalize(number)
    made.files.append(stem.with_name(f"{stem.name}.hatchet"))
