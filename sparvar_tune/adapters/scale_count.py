"""Which scale a call is for: not every model's calls say it, so those of one block or attention are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparvar_tune.adapters.protocol import Parts

IsOther = Callable[[Parts, dict[str, Any]], bool]  # whether an image has another schedule than the parts'


class ScaleCount:
    """Counts calls of one module by its `attention`, whose cache is empty where an image begins. scale: of the last call."""

    def __init__(self, found: Parts, attention: Any, is_other: IsOther) -> None:
        self.found, self.attention, self.is_other = found, attention, is_other
        self.scale: int | None = None

    def next(self, call: Callable[[], dict[str, Any]]) -> int | None:
        """The scale of a call that comes now, -1 before the first grid; None where the image has another schedule.

        call(): its arguments by name. Once a call, before it runs, and only while images are drawn (`attention.caching`).
        """
        assert self.found.schedule is not None, "the policy's"
        if self.attention.cached_k is None:
            first = -1 if self.found.schedule.prefix else 0
            self.scale = None if self.is_other(self.found, call()) else first
        elif self.scale is not None:
            self.scale += 1
        return self.scale


def never(_found: Parts, _call: dict[str, Any]) -> bool:
    """Of a model that draws one schedule alone."""
    return False
