"""One layer's attention on a plain CPU: a group of heads at a time, what a decision scale found kept between scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparvar_kernels.backends.configs import CpuConfig
from sparvar_kernels.backends.cpu.gathered import gathered_attention
from sparvar_kernels.backends.cpu.near_far import near_far_attention
from sparvar_kernels.backends.cpu.pooled import pooled_attention
from sparvar_kernels.backends.dense import column_mass, dense_heads, out_like
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import LayerPlan, Record, RecordKey, why_not_live
from sparvar_kernels.variants import Cs4a, NearFar, Pooled, Variant
from sparvar_kernels.variants.cs4a.planner import rank_keys, window_first
from sparvar_kernels.variants.residual import enlarge


@dataclass
class Memory:
    """What one layer's decision scales left behind."""

    runs: dict[int, int] = field(default_factory=dict)  # decision scale -> how often it was run for this image
    scale: dict[RecordKey, int] = field(default_factory=dict)
    ranked: dict[RecordKey, Tensor] = field(default_factory=dict)  # [B, h, T, R] int32
    residual: dict[RecordKey, Tensor] = field(default_factory=dict)  # [B, h, N_S, D]


class Layer:
    """All scales of one layer for one batch size and dtype. `problems`, `configs`: per scale."""

    def __init__(
        self, plans: tuple[LayerPlan, ...], problems: Sequence[AttentionProblem], configs: Sequence[CpuConfig], device: str
    ) -> None:
        self.plans, self.problems, self.configs = plans, problems, configs
        self.memory = Memory()

    def reset(self) -> None:
        """Forgets the image."""
        self.memory = Memory()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale_index: int) -> Tensor:
        """[B, H, Nq, D] of this layer at one scale; keeps what later scales need."""
        return attend(q, k, v, self.problems[scale_index], self.plans[scale_index], self.memory, self.configs[scale_index])


def attend(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, plan: LayerPlan, memory: Memory, config: CpuConfig
) -> Tensor:
    """[B, H, Nq, D] of one layer at one scale; writes what later scales need into `memory`."""
    out = out_like(q)
    for variant, heads in plan.groups:
        if variant.reads == "everything":
            dense_heads(q, k, v, problem, heads, out)
            continue
        if variant.reads == "means":
            assert isinstance(variant, Pooled), "the one way to read means so far"
            pooled_attention(q, k, v, problem, heads, variant, out)
            continue
        if variant.reads == "keys and means":
            assert isinstance(variant, NearFar), "the one way to read keys and means so far"
            near_far_attention(q, k, v, problem, heads, variant, out, config)
            continue
        record = _record_of(variant, heads, problem, memory)
        if variant.reads != "decision":
            ranked = memory.ranked.get(record) if record else None
            lists = variant.lists(problem.schedule, problem.scale_index, str(q.device), ranked)
            gathered_attention(q, k, v, lists, heads, out, problem, config)
        if record in memory.residual:
            grown = enlarge(memory.residual[record], problem.schedule.grids[memory.scale[record]], problem.grid)
            for i, h in enumerate(heads):
                if variant.reads == "decision":
                    out[:, h] = grown[:, i]
                else:
                    out[:, h] += grown[:, i]
    _record(q, k, v, problem, plan.records, memory, config, out)
    return out


def _record_of(variant: Variant, heads: tuple[int, ...], problem: AttentionProblem, memory: Memory) -> RecordKey | None:
    decision = variant.decision_scale
    if decision is None:
        return None
    record = (variant.at_decision(problem.schedule, problem.scale_index), heads)
    if reason := why_not_live(problem.scale_index, decision, memory.runs.get(decision, 0)):
        raise ValueError(reason)
    return record


def _record(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, records: tuple[Record, ...], memory: Memory,
    config: CpuConfig, out: Tensor,
) -> None:  # fmt: skip
    """Ranks keys and takes dense minus sparse for the heads that later scales will ask about; out holds dense."""
    if records:
        memory.runs[problem.scale_index] = memory.runs.get(problem.scale_index, 0) + 1
    masses: dict[tuple[object, ...], Tensor] = {}
    for record in records:
        variant, heads = record.key
        memory.scale[record.key] = problem.scale_index
        if variant.reads == "ranked lists":
            assert isinstance(variant, Cs4a), "the one way to rank keys so far"
            shared = (heads, variant.tile, variant.sample)
            if shared not in masses:
                masses[shared] = column_mass(q, k, problem, heads, variant.tile, variant.sample)
            memory.ranked[record.key] = rank_keys(
                masses[shared], record.ranks, window_first(problem.schedule, variant, str(q.device))
            )
        if not record.wants_residual:
            continue
        dense = out[:, list(heads)]
        if variant.reads != "decision":
            lists = variant.lists(problem.schedule, problem.scale_index, str(q.device), memory.ranked.get(record.key))
            sparse = torch.empty_like(out)
            gathered_attention(q, k, v, lists, heads, sparse, problem, config)
            dense = dense - sparse[:, list(heads)]
        memory.residual[record.key] = dense
