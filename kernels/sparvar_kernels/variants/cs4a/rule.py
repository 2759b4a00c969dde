"""CS4A: each query tile sees the keys with the most softmax mass at a decision scale (paper section 3.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.protocol import Inputs, Reads

KEY_MULTIPLE = 64  # a multiple of this many keys is kept: no kernel then needs a masked tail
PAPER_MULTIPLE = 112  # the same in the paper's code (its key tile)


@dataclass(frozen=True)
class Cs4a:
    """Each query tile sees the keys with the most softmax mass at the decision scale.

    keys "place" (ours): keys map by 2-D place (a cell of the decision grid stands for itself and for every cell of the
    finer grids whose centre falls into it), best first, until `top_k` of *this* scale's keys are kept.
    keys "index" (paper's code): `top_k` of the *decision* scale's keys, indices unchanged, plus one contiguous band of
    rows per scale after it; needs raster tiles.
    window (place): side of the own-scale window on the decision grid whose cells rank ahead of all others; 0: none.
    bands (index): side of the own-scale window for each scale after the decision scale.
    residual: add the enlarged dense minus sparse of the decision scale.
    sample: the mass is measured on every `sample`-th query of a tile.
    """

    decision_scale: int
    top_k: float
    tile: Tile
    keys: str = "place"
    window: int = 0
    bands: tuple[int, ...] = ()
    residual: bool = True
    sample: int = 1
    kind: ClassVar[str] = "cs4a"
    reads: ClassVar[Reads] = "ranked lists"
    meaning: ClassVar[int] = 2  # 1: a tile shorter than the others counted its first query several times

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        if not 0 < self.top_k <= 1:
            return f"cs4a: top_k={self.top_k}, want 0 < top_k <= 1"
        if self.keys not in ("place", "index"):
            return f'cs4a: keys={self.keys!r}, want "place" or "index"'
        if self.sample < 1:
            return f"cs4a: sample={self.sample}, want >= 1"
        later = len(schedule) - 1 - self.decision_scale
        if self.keys == "place" and (self.bands or self.window < 0):
            return f"cs4a: keys place with window={self.window}, bands={self.bands}; want window >= 0 and no bands"
        if self.keys == "index" and (self.tile.height or self.window or len(self.bands) != later):
            return f"cs4a: keys index is the paper's form; want a raster tile, no window and {later} bands"
        return f"cs4a: bands={self.bands}, want every side >= 0" if self.bands and min(self.bands) < 0 else None

    def at_decision(self, schedule: ScaleSchedule, scale_index: int) -> Cs4a:
        if self.keys == "index":
            return self  # the paper keeps its raster groups at every scale
        tile = self.tile.scaled(schedule.grids[scale_index], schedule.grids[self.decision_scale])
        return dataclasses.replace(self, tile=tile)

    def ranks(self, schedule: ScaleSchedule, scale_index: int) -> int:
        from sparvar_kernels.variants.cs4a.planner import ranks_needed

        return ranks_needed(self, schedule, scale_index)

    def lists(self, schedule: ScaleSchedule, scale_index: int, device: str, ranked: Tensor | None = None) -> KeyLists:
        from sparvar_kernels.variants.cs4a.planner import cs4a_lists

        assert ranked is not None, "its decision scale ranks keys"
        return cs4a_lists(ranked, schedule, scale_index, self)

    def describe(self) -> str:
        return f"cs4a {self.top_k:.0%} {self.tile}" + (" paper" if self.keys == "index" else "")

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.cs4a.oracle import reference

        return reference(self, q, k, v, problem, decision)
