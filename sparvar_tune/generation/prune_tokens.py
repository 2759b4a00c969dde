"""FastVAR: at some scales the middle layers work on a part of the tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule

# FastVAR's forms by family: the first scale from the end, shares of the tokens left out from there on, layers (None: the last)
_PUBLISHED: dict[str, tuple[int, tuple[float, ...], int, int | None]] = {
    "infinity": (4, (0.4, 0.5), 3, 27),  # grids 32 and 40 of 13; it leaves out the last two besides
    "hart": (2, (0.5, 0.75), 0, None),  # grids 48 and 64
}


@dataclass(frozen=True)
class PruneTokens:
    """At scale `from_scale + i` layers `first_layer`..`last_layer` work on `kept[i]` tokens of a grid, each batch row its own.

    Each of a block's parts (attention, text, MLP) chooses anew: the tokens whose residual is farthest, by squared distance,
    from the mean over the grid. They keep their places in RoPE, and they alone are appended to the cache. What the part gave at
    `cached_scale`, after its gate, is brought to this grid (each cell the mean of those it covers), and the results of the chosen
    tokens stand in it; then it is added to the residual.

    Oracle: the same in fp64, a row at a time, on Infinity's look-alike (tests/generation/test_prune_tokens.py). Source: FastVAR
    (arXiv 2503.23367), whose public code draws the same picture from `published`; of Infinity it leaves the last two scales out
    besides.
    """

    from_scale: int
    kept: tuple[int, ...]
    cached_scale: int
    first_layer: int
    last_layer: int
    kind: ClassVar[str] = "prune_tokens"
    meaning: ClassVar[int] = 1
    thins: ClassVar[bool] = True

    @classmethod
    def published(cls, family: str, schedule: ScaleSchedule, layers: int) -> PruneTokens:
        """That of FastVAR's code for "infinity" or "hart", square and of 13 scales; at others the same by scale index.

        Raises ValueError for another family, schedules too short and models too shallow for it.
        """
        if family not in _PUBLISHED:
            raise ValueError(f"{family}: FastVAR has no form for it; want one of {', '.join(_PUBLISHED)}")
        back, shares, first, last = _PUBLISHED[family]
        begin = len(schedule) - back
        if begin < 2 or layers <= first:
            raise ValueError(f"{len(schedule)} scales, {layers} layers: FastVAR wants {back + 2} and {first + 1} at least")
        counts = (schedule.num_queries(begin + i) for i in range(len(shares)))
        kept = tuple(count - int(count * share) for count, share in zip(counts, shares, strict=True))
        return cls(begin, kept, begin - 1, first, layers - 1 if last is None else min(last, layers - 1))

    @property
    def skips(self) -> tuple[int, ...]:
        return ()

    @property
    def last_scale(self) -> int:
        """The last scale at which tokens are left out."""
        return self.from_scale + len(self.kept) - 1

    def at(self, scale_index: int) -> int | None:
        """The tokens that its layers work on at this scale; None: all."""
        i = scale_index - self.from_scale
        return self.kept[i] if 0 <= i < len(self.kept) else None

    def by_parts(self, scale_index: int, layer: int) -> bool:
        """Whether a block leaves out tokens at this scale, or what its parts give there is kept for later ones."""
        if not self.first_layer <= layer <= self.last_layer:
            return False
        return scale_index == self.cached_scale or self.at(scale_index) is not None

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        if not 1 <= self.from_scale <= self.last_scale < len(schedule):
            return f"prune_tokens: scales {self.from_scale}..{self.last_scale}, want some of 1..{len(schedule) - 1}"
        if not 0 <= self.cached_scale < self.from_scale:
            return f"prune_tokens: cached_scale={self.cached_scale}, want 0..{self.from_scale - 1}"
        if not 0 <= self.first_layer <= self.last_layer < layers:
            return f"prune_tokens: layers {self.first_layer}..{self.last_layer}, want some of 0..{layers - 1}"
        for s, kept in enumerate(self.kept, self.from_scale):
            if not 1 <= kept <= schedule.num_queries(s):
                return f"prune_tokens: kept={kept} at scale {s}, want 1..{schedule.num_queries(s)}"
        return None

    def describe(self) -> str:
        scales = ", ".join(f"{kept} tokens at scale {s}" for s, kept in enumerate(self.kept, self.from_scale))
        return f"{scales} in layers {self.first_layer} to {self.last_layer}"
