"""The entry point: one object that runs a policy over the scales of an image.

    attend = SparseAttention(policy, schedule)
    out = attend(q, k, v, layer=17, scale_index=12)      # q [B, H, Nq, D], k, v [B, H, Nk, D] -> [B, H, Nq, D]

One call may run some heads dense, others as CSLA, CS4A, pooled or reused. What a decision scale leaves behind (ranked keys,
residuals) is kept per layer and forgotten when scale 0 comes round again, so one object serves one image stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparvar_kernels.configs import LaunchConfig
from sparvar_kernels.cs4a import cs4a_lists, rank_keys, window_first
from sparvar_kernels.csla import csla_lists
from sparvar_kernels.dense import column_mass, dense_heads
from sparvar_kernels.lists import KeyLists
from sparvar_kernels.policy import LayerPlan, Policy, Record, RecordKey, plan_layers
from sparvar_kernels.pooled import pooled_attention
from sparvar_kernels.problem import DTYPES, AttentionProblem
from sparvar_kernels.registry import KERNELS, kernel_for, why_not
from sparvar_kernels.residual import enlarge
from sparvar_kernels.scales import ScaleSchedule
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant, at_decision

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Launch:
    """How key lists are run: a kernel of the registry and its configuration (None: that kernel's default)."""

    kernel: str
    config: LaunchConfig | None = None

    def resolved(self) -> Launch:
        return self if self.config is not None else Launch(self.kernel, KERNELS[self.kernel].config())


@dataclass
class Memory:
    """What one layer's decision scales left behind."""

    scale: dict[RecordKey, int] = field(default_factory=dict)
    ranked: dict[RecordKey, Tensor] = field(default_factory=dict)  # [B, h, T, R] int32
    residual: dict[RecordKey, Tensor] = field(default_factory=dict)  # [B, h, N_S, D]


class SparseAttention:
    """Callable attention for one image stream; see the module docstring.

    launches: per scale_index, how to run key lists there; others take the device's default kernel.
    Raises ValueError when the policy does not fit the schedule, when a launch is illegal for a problem, when inputs do
    not have the shapes of the schedule, or when a scale is called before its decision scale.
    """

    def __init__(
        self, policy: Policy, schedule: ScaleSchedule, *, softmax_scale: float = 1.0, logit_bound: float | None = None,
        launches: Mapping[int, Launch] | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.schedule = policy, schedule
        self.softmax_scale, self.logit_bound = softmax_scale, logit_bound
        self.plans = plan_layers(policy, schedule)
        self.launches = {s: launch.resolved() for s, launch in (launches or {}).items()}
        self.memories = [Memory() for _ in self.plans]
        self._legal: set[tuple[AttentionProblem, torch.device]] = set()

    @property
    def skip_scales(self) -> tuple[int, ...]:
        """Trailing scales the policy leaves out of the generation."""
        return self.policy.skip_scales

    def reset(self) -> None:
        """Forgets the image; called by itself when scale 0 comes."""
        self.memories = [Memory() for _ in self.plans]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        if not 0 <= layer < len(self.plans):
            raise ValueError(f"layer={layer}: want 0..{len(self.plans) - 1}")
        if scale_index == 0 and layer == 0:
            self.reset()
        if q.dtype not in _NAMES:
            raise ValueError(f"q: got {q.dtype}, want one of {', '.join(map(str, _NAMES))}")
        problem = AttentionProblem(
            self.schedule, scale_index, q.shape[0], q.shape[1], q.shape[-1], _NAMES[q.dtype],
            self.softmax_scale, self.logit_bound,
        )  # fmt: skip
        launch = self.launches.get(scale_index)
        if launch is None:
            launch = self.launches[scale_index] = Launch(kernel_for(q.device.type)).resolved()
        problem.check_inputs(q, k, v)
        if (problem, q.device) not in self._legal:
            if problem.heads != len(self.policy.heads[layer]):
                raise ValueError(f"q: got {problem.heads} heads, want {len(self.policy.heads[layer])} as in the policy")
            capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
            assert launch.config is not None
            reason = why_not(problem, launch.kernel, launch.config, capability)
            if reason:
                raise ValueError(f"scale {scale_index}: {reason}")
            self._legal.add((problem, q.device))
        return attend(q, k, v, problem, self.plans[layer][scale_index], self.memories[layer], launch)


def attend(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, plan: LayerPlan, memory: Memory, launch: Launch) -> Tensor:
    """[B, H, Nq, D] of one layer at one scale; writes what later scales need into `memory`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for variant, heads in plan.groups:
        if isinstance(variant, Dense):
            dense_heads(q, k, v, problem, heads, out)
            continue
        if isinstance(variant, Pooled):
            pooled_attention(q, k, v, problem, heads, variant, out)
            continue
        record = _record_of(variant, heads, problem, memory)
        if not isinstance(variant, Reuse):
            lists = key_lists(variant, problem, memory.ranked.get(record) if record else None, str(q.device))
            KERNELS[launch.kernel].load().gathered_attention(q, k, v, lists, heads, out, problem, launch.config)
        if record in memory.residual:
            grown = enlarge(memory.residual[record], problem.schedule.grids[memory.scale[record]], problem.grid)
            for i, h in enumerate(heads):
                if isinstance(variant, Reuse):
                    out[:, h] = grown[:, i]
                else:
                    out[:, h] += grown[:, i]
    _record(q, k, v, problem, plan.records, memory, launch, out)
    return out


def key_lists(variant: Variant, problem: AttentionProblem, ranked: Tensor | None, device: str) -> KeyLists:
    """The key lists of a sparse variant; `ranked` [B, h, T, R] is what its decision scale found (Cs4a)."""
    if isinstance(variant, Csla):
        return csla_lists(problem.schedule, problem.scale_index, variant, device)
    assert isinstance(variant, Cs4a) and ranked is not None
    return cs4a_lists(ranked, problem.schedule, problem.scale_index, variant)


def _record_of(variant: Variant, heads: tuple[int, ...], problem: AttentionProblem, memory: Memory) -> RecordKey | None:
    decision = getattr(variant, "decision_scale", None)
    if decision is None:
        return None
    record = (at_decision(variant, problem.schedule, problem.scale_index), heads)
    if record not in memory.scale:
        raise ValueError(f"scale {problem.scale_index}: its decision scale {decision} was not run for this image and layer")
    return record


def _record(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, records: tuple[Record, ...], memory: Memory,
    launch: Launch, out: Tensor,
) -> None:  # fmt: skip
    """Ranks keys and takes dense minus sparse for the heads that later scales will ask about; out holds dense."""
    masses: dict[tuple[object, ...], Tensor] = {}
    for record in records:
        variant, heads = record.key
        memory.scale[record.key] = problem.scale_index
        if isinstance(variant, Cs4a):
            shared = (heads, variant.tile, variant.sample)
            if shared not in masses:
                masses[shared] = column_mass(q, k, problem, heads, variant.tile, variant.sample)
            memory.ranked[record.key] = rank_keys(
                masses[shared], record.ranks, window_first(problem.schedule, variant, str(q.device))
            )
        if not record.wants_residual:
            continue
        dense = out[:, list(heads)]
        if not isinstance(variant, Reuse):
            lists = key_lists(variant, problem, memory.ranked.get(record.key), str(q.device))
            sparse = torch.empty_like(out)
            KERNELS[launch.kernel].load().gathered_attention(q, k, v, lists, heads, sparse, problem, launch.config)
            dense = dense - sparse[:, list(heads)]
        memory.residual[record.key] = dense
