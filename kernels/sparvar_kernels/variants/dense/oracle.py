"""Dense attention by its definition."""

from __future__ import annotations

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.definitions import dense
from sparvar_kernels.variants.dense.rule import Dense
from sparvar_kernels.variants.protocol import Inputs


def reference(variant: Dense, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64."""
    return dense(q, k, v, problem)
