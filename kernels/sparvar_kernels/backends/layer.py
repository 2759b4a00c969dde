"""The contract of a backend: one object a layer that runs its policy at every scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sparvar_kernels.backends.configs import LaunchConfig
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import LayerPlan


class Layer(Protocol):
    """All scales of one layer, for one batch size, dtype and device: what a backend's module calls `Layer`.

    It may assume what `SparseAttention` saw to: tensors of the scale's shape on one device, of one dtype, plain, without grad;
    launches legal for the problems; a policy that fits the schedule. It must take any strides. It keeps what a decision scale
    found (ranked keys, residuals) until `reset`, refuses by `why_not_live` to live on what was not found or found twice, and
    may build tables and lists at a scale's first call; later calls wait for nothing.
    """

    def __init__(
        self, plans: tuple[LayerPlan, ...], problems: Sequence[AttentionProblem], configs: Sequence[LaunchConfig], device: str
    ) -> None:
        """plans, problems, configs: one a scale."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale_index: int) -> Tensor:
        """[B, H, Nq, D]; q [B, H, Nq, D], k and v [B, H, Nk, D]. Raises ValueError where its decision scale was not run."""

    def reset(self) -> None:
        """Forgets the image."""
