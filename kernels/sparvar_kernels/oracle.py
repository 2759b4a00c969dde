"""The oracle: every variant in fp64 on the CPU, written from the definitions, sharing no code with the planners.

Each variant's own is in its folder; this is the door to all of them, for tests and `sparvar-tune check`.
"""

from __future__ import annotations

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import Tile
from sparvar_kernels.variants import Variant
from sparvar_kernels.variants.cs4a.oracle import cs4a_keys, kept, mass
from sparvar_kernels.variants.csla.oracle import csla_keys
from sparvar_kernels.variants.definitions import enlarge, masked, probabilities, tile_lists, window_keys
from sparvar_kernels.variants.protocol import Inputs

__all__ = [
    "cs4a_keys",
    "csla_keys",
    "enlarge",
    "kept",
    "masked",
    "mass",
    "probabilities",
    "reference_attention",
    "tile_lists",
    "window_keys",
]  # fmt: skip


def reference_attention(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None = None,
    decision_tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, Nq, D] fp64 of one variant for all heads. `decision`: the problem and q, k, v of the decision scale.

    decision_tile: of the tile used there, only to say that it is the one expected.
    """
    there = variant.at_decision(problem.schedule, problem.scale_index)
    if decision_tile is not None and there.tile != decision_tile:
        raise ValueError(f"decision_tile: got {decision_tile}, want {there.tile}")
    return variant.oracle(q, k, v, problem, decision)
