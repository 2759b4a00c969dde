"""CSLA: windows around each query's own place in every earlier grid, and sinks (paper section 3.3, public code's masks)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.protocol import Inputs, Reads

BLOCK = 128  # side of the paper's block mask


@dataclass(frozen=True)
class Csla:
    """Each query tile sees the first `sinks` scales (and the prefix) whole and the union of its queries' windows.

    windows[h] is the window's side on key scale h, radius windows[h] // 2; negative: scale h unseen.
    form "exact": that union; "block128": the paper's mask, where any 128 x 128 block (raster order, keys counted from
    key 0) with one visible pair is attended whole (needs tile raster128).
    decision_scale: where dense minus sparse is taken and added, enlarged, to later scales; None: no residual.
    """

    windows: tuple[int, ...]
    sinks: int
    tile: Tile
    form: str = "exact"
    decision_scale: int | None = None
    kind: ClassVar[str] = "csla"
    reads: ClassVar[Reads] = "fixed lists"
    meaning: ClassVar[int] = 1

    @property
    def residual(self) -> bool:
        return self.decision_scale is not None

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        if len(self.windows) != len(schedule):
            return f"csla: {len(self.windows)} windows, want one per scale ({len(schedule)})"
        if not 0 <= self.sinks <= len(schedule):
            return f"csla: sinks={self.sinks}, want 0..{len(schedule)}"
        if self.form not in ("exact", "block128"):
            return f'csla: form={self.form!r}, want "exact" or "block128"'
        if self.form == "block128" and self.tile != Tile(0, BLOCK):
            return f"csla: form block128 with tile {self.tile}, want raster{BLOCK}"
        if max(self.windows) < 0 and self.sinks == 0 and schedule.prefix == 0:
            return "csla: no window and no sinks, so no key is visible; want at least one"
        own = self.windows[scale_index]
        if self.sinks == 0 and schedule.prefix == 0 and own < 0:
            return f"csla: windows[{scale_index}]={own} without sinks can leave a query without keys; want >= 0"
        return None

    def at_decision(self, schedule: ScaleSchedule, scale_index: int) -> Csla:
        if self.decision_scale is None or self.form == "block128":
            return self  # the paper keeps its raster groups at every scale
        tile = self.tile.scaled(schedule.grids[scale_index], schedule.grids[self.decision_scale])
        return dataclasses.replace(self, tile=tile)

    def ranks(self, schedule: ScaleSchedule, scale_index: int) -> int:
        return 0

    def lists(self, schedule: ScaleSchedule, scale_index: int, device: str, ranked: Tensor | None = None) -> KeyLists:
        from sparvar_kernels.variants.csla.planner import csla_lists

        return csla_lists(schedule, scale_index, self, device)

    def describe(self) -> str:
        sides = ",".join(str(w) for w in self.windows if w >= 0)
        return f"csla {sides} {self.tile}" + (" block128" if self.form == "block128" else "")

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.csla.oracle import reference

        return reference(self, q, k, v, problem, decision)
