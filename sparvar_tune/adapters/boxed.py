"""What the models in the box share: their one attention callable replaced and put back, and the hash of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.bitwise.sampling import Attend


@lru_cache(maxsize=4)
def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def why_not_a(kind: type[Any]) -> Callable[[Any], str | None]:
    """A family's `why_not` for a class of models."""
    return lambda model: None if isinstance(model, kind) else f"it is a {type(model).__name__}"


def weights_sha256(model: Any, path: Path) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    shipped = load_file(path) if path.is_file() else {}
    own = {name: t for name, t in model.state_dict().items() if name in shipped}
    if own and own.keys() == shipped.keys() and all(torch.equal(t.cpu(), shipped[name]) for name, t in own.items()):
        return file_hash(path)
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode() + t.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Attached:
    """`undo` takes this attention out of the model, whatever was put in before and after it."""

    # what a model attended with before any of ours, whether as an attribute of its own, and ours in the order they came
    _of: ClassVar[WeakKeyDictionary[Any, tuple[Attend, bool, list[Attached]]]] = WeakKeyDictionary()

    def __init__(self, model: Any, attend: Attend) -> None:
        self.model, self.attend = model, attend
        _, _, ours = self._of.setdefault(model, (model.attend, "attend" in vars(model), []))
        ours.append(self)
        model.attend = attend

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts the model attends as it did before any of ours."""
        now = self.model.attend
        before = self._of.get(self.model, (now,))[0]
        self.model.attend = before
        try:
            yield
        finally:
            self.model.attend = now

    def undo(self) -> None:
        before, own, ours = self._of.get(self.model, (None, False, []))
        if before is None or self not in ours:
            return
        ours.remove(self)
        if self.model.attend is self.attend:  # else something newer is on, ours or not
            self.model.attend = ours[-1].attend if ours else before
            if not ours and not own:
                del self.model.attend  # its class says it
        if not ours:
            del self._of[self.model]


def attach(found: Parts, attend: SparseAttention) -> Attached:
    """Makes the model's sampling use `attend`. Raises ValueError when the two do not fit."""
    reason = attend.policy.why_not(found.model.schedule, found.layers, found.heads)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    return Attached(found.model, attend)
