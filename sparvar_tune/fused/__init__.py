"""The whole block stack of a live model, scale by scale: our path around the attention.

stack.py says what a family tells of its blocks, a file a family; engine.py runs it: hooks and graphs, in a workspace of buffers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters import steps
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts, Undoable
from sparvar_tune.fused import boxed
from sparvar_tune.fused.compile_ahead import read_triton
from sparvar_tune.fused.engine import FusedPath, attach
from sparvar_tune.fused.stack import Stack
from sparvar_tune.fused.workspace import Foreseen

__all__ = ["PATHS", "STACKS", "Foreseen", "FusedPath", "OnPath", "attach", "put_on", "read_triton", "stack_of"]

STACKS = {family: f"sparvar_tune.fused.{family}" for family in ("infinity", "hart", "var")}


def stack_of(found: Parts) -> Stack:
    """The stack of a recognised model; raises ValueError for a family that has none."""
    if found.family not in STACKS:
        raise ValueError(f"{found.family}: its blocks have no fused path; known: {', '.join(sorted(STACKS))}")
    made: Stack = importlib.import_module(STACKS[found.family]).stack(found)
    return made


PATHS = ("auto", "fused", "attention")


def check_path(path: object) -> None:
    """Raises ValueError for what is no path."""
    if not isinstance(path, str) or path not in PATHS:
        raise ValueError(f"path={path!r}: want one of {', '.join(PATHS)}")


class OnPath(Undos):
    """A live model on a path. live: its attention alone, which also serves what the fused path cannot; fused: None if not on.

    why_not_fused: why the fused path is not on, or why it did not run the last image; None if it did.
    """

    def __init__(self, live: Undoable | None) -> None:
        super().__init__()
        self.live = live
        self.fused: FusedPath | boxed.FusedSampling | None = None
        self._why_not_fused: str | None = None
        if live is not None:
            self.add(live)

    def put_on_fused(self, found: Parts, attend: SparseAttention | None, path: str, graphs: bool) -> None:
        """Raises ValueError where the fused path is asked for by name and cannot be on."""
        self.fused, self._why_not_fused = _fused(found, attend, path, graphs)
        if self.fused is not None:
            self.add(self.fused)
        elif path == "fused":
            raise ValueError(self._why_not_fused)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts the model draws by its own code, every step of its own, one image at a time; nothing may be undone
        meanwhile."""
        with ExitStack() as undone:
            for change in self.changes:
                if change is not self.fused:
                    undone.enter_context(change.paused())
            if self.fused is not None:
                undone.callback(setattr, self.fused, "enabled", self.fused.enabled)
                self.fused.enabled = False
            yield

    @property
    def why_not_fused(self) -> str | None:
        return self._why_not_fused if self.fused is None else self.fused.reason

    @property
    def why_not_graphs(self) -> str | None:
        """Why the fused path is not replayed as CUDA graphs, or None."""
        return self.why_not_fused if self.fused is None else self.fused.why_not_graphs

    @property
    def reason(self) -> str | None:
        """Why the last image, from some call on, ran the model's own attention; None if it did not."""
        return getattr(self.live, "reason", None) if self.fused is None or self.fused.reason else None


def put_on(family: Any, found: Parts, attend: SparseAttention | None, path: str = "auto", graphs: bool = True) -> OnPath:
    """Puts a model on a path: "fused", "attention", or "auto", which is fused where that is legal and the model on a GPU.

    attend: None for everything dense, on the fused path alone. Raises ValueError for another path, for "fused" where it is not
    legal, and for what `family.attach` raises.
    """
    check_path(path)
    reason = None if attend is None else steps.why_not_does(family, found, attend)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    made = OnPath(None if attend is None else family.attach(found, attend))
    try:
        if attend is not None:
            made.add(steps.put_on(family, found, attend, [True]))  # inside the blocks, for images that run those
        made.put_on_fused(found, attend, path, graphs)
        if attend is not None:
            made.add(steps.put_on(family, found, attend, [False]))  # around: a half is dropped before the first block
    except BaseException:
        made.undo()
        raise
    return made


def _fused(
    found: Parts, attend: SparseAttention | None, path: str, graphs: bool
) -> tuple[FusedPath | boxed.FusedSampling | None, str | None]:
    """The fused path put on, or why not."""
    if path == "attention" or (path == "auto" and not found.on_gpu):
        return None, "path is attention" if path == "attention" else "the model is on no GPU; path='fused' runs it all the same"
    try:
        if found.family in boxed.FAMILIES:
            return boxed.attach(found, attend, graphs), None
        return attach(found, stack_of(found), attend, graphs), None
    except ValueError as error:
        return None, str(error)
