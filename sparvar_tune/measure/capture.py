"""Recorded Q, K, V of one dense generation: what attention-level fidelity is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Recorder:
    """Attention that remembers its inputs at `scales` and answers with `inner`.

    Tensors are kept as they come: q is fresh at every call, k and v are views of a cache that only grows. Where a model makes
    its cache anew at every scale, the last one is kept and the earlier scales' are views of it.
    """

    inner: Any
    scales: tuple[int, ...]
    calls: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    skip_scales: tuple[int, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        if scale_index in self.scales:
            self.calls[layer, scale_index] = (q, k, v)
            for s in (s for s in self.scales if s < scale_index):
                before = self.calls.get((layer, s))
                if before is not None:
                    self.calls[layer, s] = (before[0], _view(before[1], k), _view(before[2], v))
        return self.inner(q, k, v, layer, scale_index)


def _view(old: Tensor, grown: Tensor) -> Tensor:
    """`old`, as the first tokens of `grown` where they are the same and lie elsewhere."""
    first = grown[:, :, : old.shape[2]]
    return first if old.data_ptr() != grown.data_ptr() and torch.equal(old, first) else old
