"""CSLA by its definition."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.variants.csla.rule import Csla
from sparvar_kernels.variants.definitions import dense, enlarge, masked, tile_lists, window_keys
from sparvar_kernels.variants.protocol import Inputs


def csla_keys(schedule: ScaleSchedule, scale_index: int, variant: Csla) -> list[set[int]]:
    """The keys of each query tile."""
    out = []
    for queries in tile_lists(schedule.grids[scale_index], variant.tile):
        keys = set(range(schedule.starts[min(variant.sinks, scale_index + 1)]))
        for query in queries:
            for s in range(variant.sinks, scale_index + 1):
                keys |= window_keys(schedule, scale_index, query, s, variant.windows[s])
        if variant.form == "block128":
            blocks = {key // 128 for key in keys}
            keys = {key for key in range(schedule.num_keys(scale_index)) if key // 128 in blocks}
        out.append(keys)
    return out


def reference(variant: Csla, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
    """[B, H, Nq, D] fp64; with a residual, dense minus the same rule at the decision scale is added, enlarged."""
    schedule, s = problem.schedule, problem.scale_index
    out = masked(q, k, v, problem, variant.tile, csla_keys(schedule, s, variant))
    if variant.decision_scale is None:
        return out
    assert decision is not None
    p, dq, dk, dv = decision
    tile = variant.at_decision(schedule, s).tile
    there = dataclasses.replace(variant, tile=tile)
    sparse = masked(dq, dk, dv, p, tile, csla_keys(schedule, p.scale_index, there))
    return out + enlarge(dense(dq, dk, dv, p) - sparse, p.grid, problem.grid)
