"""Whether a live model's weights are still those that were prepared, and its modules those that were looked at."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn


def place(t: Tensor) -> Hashable:
    """Differs where a tensor lies elsewhere or has another dtype; what is written to it is of no matter."""
    return t.data_ptr(), t.dtype


def contents(t: Tensor) -> Hashable:
    """Differs also where a tensor was written to."""
    return t.data_ptr(), -1 if t.is_inference() else t._version


class Watched:
    """All modules within some and what they hold, in lists that take a fifth of the time of walking them anew, at every picture.

    of: what is looked at of a tensor. hooks: whether also at forward hooks and a `forward` of an instance's own. modules: (name,
    module), each of the given ones before those within it, as of the last `state()`. They are held, so that no other module can
    take the place of one that is gone and be taken for it.
    """

    def __init__(self, within: Sequence[Any], of: Callable[[Tensor], Hashable], hooks: bool = False) -> None:
        self.within, self.of, self.hooks = within, of, hooks
        self.modules: list[tuple[str, nn.Module]] = []
        self._members: list[dict[str, Any]] = []
        self._seen: list[Hashable] = []
        self._walks = 0

    def state(self) -> int:
        """A new number where `of` a tensor differs, or a tensor, module or hook was replaced, added or taken away."""
        if not self._walks or self._looked_at() != self._seen:  # modules that are new may hold more
            self.modules = [named for module in self.within for named in module.named_modules()]
            self._members = [own for _, m in self.modules for own in (m._parameters, m._buffers, m._modules)]
            self._seen, self._walks = self._looked_at(), self._walks + 1
        return self._walks

    def _looked_at(self) -> list[Hashable]:
        of = self.of
        seen = [of(v) if isinstance(v, Tensor) else id(v) for own in self._members for v in own.values()]
        if self.hooks:
            instances = [module.__dict__ for _, module in self.modules]
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                seen += [tuple(own[name]) for own in instances if own[name]]
            seen += [(i, type(own["forward"])) for i, own in enumerate(instances) if "forward" in own]
        return seen
