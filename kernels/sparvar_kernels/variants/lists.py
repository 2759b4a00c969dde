"""Explicit key lists: what every sparse variant is turned into before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import TilePartition


@dataclass(frozen=True)
class KeyLists:
    """Which keys each query tile attends to; heads and batch that share a list share storage.

    keys:   [B or 1, H or 1, T, K] int32, positions in 0..num_keys-1, no duplicates among the first `counts`.
    counts: [B or 1, H or 1, T] int32, valid entries; None: all K. Entries past the count are positions of any keys.
    tiles:  the query tiles, T of them.
    """

    tiles: TilePartition
    keys: Tensor
    counts: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """[B or 1, H or 1, T] int32: `counts`, also where all are one."""
        if self.counts is not None:
            return self.counts
        *shape, width = self.keys.shape
        return torch.full(shape, width, dtype=torch.int32, device=self.keys.device)

    def mean_keys(self) -> float:
        """Keys per tile, averaged over tiles, heads and batch."""
        return float(self.lengths.double().mean())
