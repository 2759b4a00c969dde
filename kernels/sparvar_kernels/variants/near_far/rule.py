"""Near and far: keys around a query one by one, all others as means of cells (ours; planner.py has the arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.protocol import Inputs, Reads, WithoutRanks


@dataclass(frozen=True)
class NearFar(WithoutRanks):
    """Each grid is cut into square cells, at most `cells` along its longer side. A query tile reads the keys of the cells that
    lie under it, and of `near` more on every side, one by one, and of every other cell one mean key and value.

    Grids of at most `cells` a side, and the prefix, are read whole.
    """

    cells: int
    near: int
    tile: Tile
    kind: ClassVar[str] = "near_far"
    reads: ClassVar[Reads] = "keys and means"
    decision_scale: ClassVar[None] = None
    residual: ClassVar[bool] = False
    meaning: ClassVar[int] = 1

    def cell(self, grid: tuple[int, int]) -> int:
        """Side of a cell of this grid, in keys."""
        return -(-max(grid) // self.cells)

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        if self.cells < 1:
            return f"near_far: cells={self.cells}, want >= 1"
        if self.near < 0:
            return f"near_far: near={self.near}, want >= 0"
        if not self.tile.height:
            return f"near_far: tile {self.tile}, want a rectangle such as 8x16: a raster tile lies under no cell"
        return None

    def lists(self, schedule: ScaleSchedule, scale_index: int, device: str, ranked: Tensor | None = None) -> KeyLists:
        """The keys that exist come first; the mean of cell c is number num_keys + c, cells counted grid by grid."""
        from sparvar_kernels.variants.near_far.planner import near_far_lists

        return near_far_lists(schedule, scale_index, self, device)

    def describe(self) -> str:
        return f"near-far {self.cells} cells, {self.near} near, {self.tile}"

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.near_far.oracle import reference

        return reference(self, q, k, v, problem, decision)
