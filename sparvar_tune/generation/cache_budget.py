"""ScaleKV: from some scale on every layer keeps no more keys of the past than its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule


@dataclass(frozen=True)
class CacheBudget:
    """Before scale `from_scale + i`, layer l keeps `keys[i][l]` cached keys at most, each batch row and head its own.

    Kept are the `window` tokens in the middles of an even division of the grid just drawn, and of the others those of the best
    scores. A key's score: the dot products with the window's queries as they come from the projection (no bias, norm, rotation
    or learned factor), over sqrt(head_dim), summed, and the largest of `pool` neighbours in the cache's order; the window's own
    are left out before and after that. Kept keys stay in their order, so that what is left is the cache of the next scale.

    Oracle: the same in fp64, a row and a head at a time (`cut_by_hand` in the adapters' tests). Source: ScaleKV
    (arXiv 2505.19602), whose public code draws the same picture from `published`.
    """

    from_scale: int
    keys: tuple[tuple[int, ...], ...]
    window: int = 16
    pool: int = 5
    kind: ClassVar[str] = "cache_budget"
    meaning: ClassVar[int] = 1
    thins: ClassVar[bool] = True

    @classmethod
    def published(cls, model: str) -> CacheBudget:
        """The 10 % budget that ScaleKV's code has for "infinity-2b" or "infinity-8b", at 13 scales. Raises ValueError."""
        if model not in _PUBLISHED:
            raise ValueError(f"{model}: no budget was published; want one of {', '.join(_PUBLISHED)}")
        layers, wide, rows = _PUBLISHED[model]
        return cls(8, tuple(tuple(most if layer in wide[i] else least for layer in range(layers))
                            for i, (most, least) in enumerate(rows)))  # fmt: skip

    @property
    def skips(self) -> tuple[int, ...]:
        return ()

    def before(self, scale_index: int, layer: int) -> int | None:
        """The keys that a layer keeps for this scale; None: all."""
        i = scale_index - self.from_scale
        return self.keys[i][layer] if 0 <= i < len(self.keys) else None

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        if not 1 <= self.from_scale < len(schedule):
            return f"cache_budget: from_scale={self.from_scale}, want 1..{len(schedule) - 1}"
        shape = (len(schedule) - self.from_scale, layers)
        if len(self.keys) != shape[0] or any(len(row) != layers for row in self.keys):
            return f"cache_budget: keys: want {shape[0]} rows, one a scale from {self.from_scale} on, of {layers} layers"
        side = math.isqrt(max(0, self.window))
        smallest = min(min(grid) for grid in schedule.grids[self.from_scale - 1 : -1])
        if side < 1 or side * side != self.window or side > smallest:
            return f"cache_budget: window={self.window}, want a square of at most {smallest}x{smallest} tokens"
        if self.pool < 1 or self.pool % 2 == 0:
            return f"cache_budget: pool={self.pool}, want an odd number"
        if any(keys < self.window for row in self.keys for keys in row):
            return f"cache_budget: keys: want at least the window's {self.window} everywhere"
        return None

    def describe(self) -> str:
        flat = [keys for row in self.keys for keys in row]
        return f"{min(flat)} to {max(flat)} keys of the past kept a layer from scale {self.from_scale} on"


# layers, those of the wider budget at each scale, and (wider, other) budgets at scales 8 to 12
_PUBLISHED: dict[str, tuple[int, tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]] = {
    "infinity-2b": (32, ((0, 23),) * 4 + ((0,),), ((920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465))),
    "infinity-8b": (40, ((0, 1, 2),) * 5, ((909, 629), (1464, 584), (2463, 503), (4054, 374), (6200, 200))),
}
