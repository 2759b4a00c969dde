"""Reuse: the decision scale's dense output, enlarged; CS4A at zero keys with its residual (paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.protocol import Inputs, Reads, WithoutLists


@dataclass(frozen=True)
class Reuse(WithoutLists):
    """The decision scale's dense output, bilinearly enlarged: no attention at all."""

    decision_scale: int
    kind: ClassVar[str] = "reuse"
    reads: ClassVar[Reads] = "decision"
    residual: ClassVar[bool] = True
    meaning: ClassVar[int] = 1

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.reuse.oracle import reference

        return reference(self, q, k, v, problem, decision)
