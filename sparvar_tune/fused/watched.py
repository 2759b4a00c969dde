"""Whether a live model's weights are still those that were prepared, and its modules those that were looked at."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, nn


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


class Walked:
    """All modules within one and what they hold, in lists that take a fifth of the time of walking it anew, at every picture.

    modules: (name, module), the module itself first, as of the last `state()`. They are held, as those of `Watched` are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules: list[tuple[str, nn.Module]] = []
        self._members: list[dict[str, Any]] = []
        self._state: tuple[Hashable, ...] | None = None

    def state(self) -> Hashable:
        """Differs where a weight lies elsewhere or has another dtype, or a tensor or module is replaced, added or taken away."""
        found = self._looked_at()
        if found != self._state:  # modules that are new may hold more
            self.modules = list(self.module.named_modules())
            self._members = [own for _, m in self.modules for own in (m._parameters, m._buffers, m._modules)]
            self._state = self._looked_at()
        return self._state

    def _looked_at(self) -> tuple[Hashable, ...]:
        return tuple([
            (v.data_ptr(), v.dtype) if isinstance(v, Tensor) else id(v) for own in self._members for v in own.values()
        ])  # fmt: skip
