"""Pooled: diffuse heads read block means of keys (ours; planner.py has the arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.variants.protocol import Inputs, Reads, WithoutLists


@dataclass(frozen=True)
class Pooled(WithoutLists):
    """Grids from `first_scale` on are read as means over factor x factor blocks of keys (ours; see pooled.py)."""

    first_scale: int
    factor: int
    kind: ClassVar[str] = "pooled"
    reads: ClassVar[Reads] = "means"
    decision_scale: ClassVar[None] = None
    residual: ClassVar[bool] = False
    meaning: ClassVar[int] = 1

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        if not 0 <= self.first_scale <= scale_index:
            return f"pooled: first_scale={self.first_scale}, want 0..{scale_index}"
        return f"pooled: factor={self.factor}, want >= 2" if self.factor < 2 else None

    def describe(self) -> str:
        return f"pooled {self.factor}x{self.factor}"

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.pooled.oracle import reference

        return reference(self, q, k, v, problem, decision)
