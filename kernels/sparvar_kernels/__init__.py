"""Sparse attention for next-scale (VAR) image models: variants, planners, kernels and their oracle."""

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.backends.registry import KERNELS, why_not
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.policy import Policy, Rule
from sparvar_kernels.variants import VARIANTS, Cs4a, Csla, Dense, NearFar, Pooled, Reuse, Variant

__all__ = [
    "KERNELS", "VARIANTS", "AttentionProblem", "Cs4a", "Csla", "Dense", "Launch", "NearFar", "Policy", "Pooled", "Reuse", "Rule",
    "ScaleSchedule", "SparseAttention", "Tile", "Variant", "why_not",
]  # fmt: skip
