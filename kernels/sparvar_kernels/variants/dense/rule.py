"""Every key: what a head does where no rule names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.protocol import Inputs, Reads, WithoutLists


@dataclass(frozen=True)
class Dense(WithoutLists):
    """Every key."""

    kind: ClassVar[str] = "dense"
    reads: ClassVar[Reads] = "everything"
    decision_scale: ClassVar[None] = None
    residual: ClassVar[bool] = False
    meaning: ClassVar[int] = 1

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        from sparvar_kernels.variants.dense.oracle import reference

        return reference(self, q, k, v, problem, decision)
