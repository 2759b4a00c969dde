"""Pictures that share an attention: what its decision scales leave is of one of them, and no other may live on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from sparvar_kernels.attention import SparseAttention

OTHERS = (
    "scale {}: lives on a decision scale of this picture, and another picture's was run after it or none; draw one picture after "
    "the other, or give each an attention of its own"
)


@dataclass
class Decided:
    """What an attention decides, and for whom last. deciding, living: scales that leave something, and that live on it."""

    deciding: frozenset[int]
    living: frozenset[int]
    last: object = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_OF: WeakKeyDictionary[SparseAttention, Decided] = WeakKeyDictionary()


def decided_by(attend: Any) -> Decided | None:
    """Of a SparseAttention or what wraps one (`inner`, `first`); None where nothing is decided."""
    while not isinstance(attend, SparseAttention):
        attend = getattr(attend, "inner", None) or getattr(attend, "first", None)
        if attend is None:
            return None
    if attend not in _OF:
        _OF.setdefault(attend, Decided(*deciding_and_living(attend)))  # another thread may be at it, too
    return _OF[attend] if _OF[attend].deciding else None


def deciding_and_living(attend: SparseAttention) -> tuple[frozenset[int], frozenset[int]]:
    """The scales that leave something to later ones, and those that live on it."""
    scales, plans = range(len(attend.schedule)), attend.plans
    deciding = frozenset(s for s in scales if any(plan[s].records for plan in plans))
    return deciding, frozenset(
        s for s in scales if any(v.decision_scale is not None for plan in plans for v, _ in plan[s].groups)
    )


@contextmanager
def of_one_picture(state: Any) -> Iterator[None]:
    """Around a scale of a picture (`Generating`): of several threads one at a time. Raises ValueError where what the scale lives
    on is another picture's."""
    own = decided_by(state.attend)
    if own is None:
        yield
        return
    with own.lock:
        begins = state.scale == min(own.deciding)
        if not begins and state.scale in own.deciding | own.living and (state.decided is None or own.last is not state.decided):
            raise ValueError(OTHERS.format(state.scale))
        if begins:
            own.last = state.decided = object()
        yield
