"""One method of one object replaced, and put back exactly: what was in the object's `__dict__` is there again.

    mine = replace_method(block.attn, "forward", body)   # body(inner, *args, **kwargs); inner is what was called before
    mine.undo()

Only the instance is touched, never its class or module. Undoing works in any order. Where another tool put its own function
over ours, ours cannot be lifted out from under it; it then passes every call through and does nothing itself.

accelerate keeps what it wraps in `_old_forward` and puts its own function into `forward`; ours then goes into `_old_forward`, so
that its hooks still run around it. A `forward` set by anybody else may do attention its own way, so `why_not_replace` says no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HOOKED, OLD = "_hf_hook", "_old_forward"  # accelerate's


class Replaced:
    """What sits in the instance's `__dict__`; see `replace_method`."""

    def __init__(self, owner: Any, slot: str, name: str, body: Callable[..., Any]) -> None:
        self.owner, self.slot, self.name, self.body, self.active = owner, slot, name, body, True
        self.had, self.before = slot in vars(owner), vars(owner).get(slot)
        vars(owner)[slot] = self

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What was called before: the function that was in the place of ours, or the class's."""
        if self.had:
            return self.before(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self.inner, *args, **kwargs) if self.active else self.inner(*args, **kwargs)

    def undo(self) -> None:
        """Puts back what was there; a second call does nothing."""
        self.active = False
        for slot in {self.slot, self.name, OLD}:  # accelerate may have moved it since
            while isinstance(top := vars(self.owner).get(slot), Replaced) and not top.active:
                if top.had:
                    vars(self.owner)[slot] = top.before
                elif slot == top.slot:
                    del vars(self.owner)[slot]
                else:  # what accelerate would have found without ours
                    vars(self.owner)[slot] = getattr(type(self.owner), self.name).__get__(self.owner)

    def __deepcopy__(self, memo: Any) -> Replaced:
        raise ValueError(f"{type(self.owner).__name__}.{self.name} is replaced; undo it before copying the model")

    def __reduce__(self) -> str:
        raise ValueError(f"{type(self.owner).__name__}.{self.name} is replaced; undo it before saving the model")


def replace_method(owner: Any, name: str, body: Callable[..., Any]) -> Replaced:
    """Puts `body(inner, *args, **kwargs)` in the place of `owner.name`; `undo()` of what it returns takes it out."""
    slot = OLD if name == "forward" and HOOKED in vars(owner) and OLD in vars(owner) else name
    return Replaced(owner, slot, name, body)


def why_not_replace(owner: Any, name: str = "forward") -> str | None:
    """Why the class's own method cannot be replaced by one that does its work, or None."""
    slot = OLD if HOOKED in vars(owner) and OLD in vars(owner) else name
    found = vars(owner).get(slot)
    while isinstance(found, Replaced):
        found = found.before
    own = getattr(type(owner), name)
    if found is None or (getattr(found, "__func__", None) is own and getattr(found, "__self__", None) is owner):
        return None
    where = getattr(found, "__module__", None) or type(found).__module__
    return f"its {name} was set by another tool ({where}); take that out first"


class Undos:
    """Several changes as one: undone together, the last first. Also a context manager.

    needed: what is changed cannot run here without it, so a pause leaves it on.
    """

    def __init__(self, needed: bool = False) -> None:
        self.changes: list[Any] = []
        self.needed = needed

    def add(self, change: Any) -> None:
        self.changes.append(change)

    def undo(self) -> None:
        while self.changes:
            self.changes.pop().undo()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts every change passes its calls through, as if it were undone; nothing may be undone meanwhile."""
        stopped = [change for change in self._pausable() if change.active]
        for change in stopped:
            change.active = False
        try:
            yield
        finally:
            for change in stopped:
                change.active = True

    def _pausable(self) -> list[Replaced]:
        found: list[Replaced] = []
        for change in self.changes:
            if isinstance(change, Undos):
                found += [] if change.needed else change._pausable()
            elif isinstance(change, Replaced):
                found.append(change)
        return found

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
