"""Reuse by its definition."""

from __future__ import annotations

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.definitions import dense, enlarge
from sparvar_kernels.variants.protocol import Inputs
from sparvar_kernels.variants.reuse.rule import Reuse


def reference(variant: Reuse, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64: the decision scale's dense output, enlarged."""
    assert decision is not None
    there, dq, dk, dv = decision
    return enlarge(dense(dq, dk, dv, there), there.grid, problem.grid)
