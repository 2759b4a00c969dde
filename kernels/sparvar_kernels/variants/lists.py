"""Explicit key lists: what every sparse variant is turned into before a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

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

    def mean_keys(self) -> float:
        """Keys per tile, averaged over tiles, heads and batch."""
        return float(self.keys.shape[-1]) if self.counts is None else float(self.counts.double().mean())
