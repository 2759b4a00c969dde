"""Whether a live model's weights are still those that were prepared."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor


class Watched:
    """The modules of some blocks, in a form that is quick to look through: a tenth of walking them anew, at every image's begin.

    They are held, so that no other module can take the place of one that is gone and be taken for it.
    """

    def __init__(self, blocks: Iterable[Any]) -> None:
        self._modules = [module for block in blocks for module in block.modules()]
        self._members = [own for m in self._modules for own in (m._parameters, m._buffers, m._modules) if own]

    def state(self) -> Hashable:
        """Differs where a tensor was changed, or a tensor or module replaced, added or taken away."""
        return tuple([_state(v) for own in self._members for v in own.values()])


def _state(v: Any) -> Hashable:
    if not isinstance(v, Tensor):
        return id(v)
    return v.data_ptr(), -1 if v.is_inference() else v._version
