"""Recorded Q, K, V of one dense generation: what attention-level fidelity is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Recorder:
    """Attention that remembers its inputs at `scales` and answers with `inner`.

    Tensors are kept as they come: q is fresh at every call, k and v are views of a cache that only grows.
    """

    inner: Any
    scales: tuple[int, ...]
    calls: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    skip_scales: tuple[int, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        if scale_index in self.scales:
            self.calls[layer, scale_index] = (q, k, v)
        return self.inner(q, k, v, layer, scale_index)
