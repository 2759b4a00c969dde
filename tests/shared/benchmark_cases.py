"""The kernel table's cases for machines without a GPU: the same policies on a tiny schedule with four heads, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from lab.kernel_table import Case, cases
from sparvar_kernels import Policy, Pooled, ScaleSchedule, SparseAttention
from sparvar_kernels.attention import Launch
from sparvar_tune.launch_search.layer_call import decision_scales
from sparvar_tune.regression.counts import counted, noted_kernels

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20)  # fourteen grids like HART's; Infinity's schedules have thirteen
CASES = {case.name: case for case in cases()}
POOLED = replace(CASES["reuse"], name="pooled 4x4", policy=Policy.uniform(1, 28, {12: Pooled(9, 4)}))  # no row of the table


def tiny(case: Case) -> Case:
    schedule = ScaleSchedule.square(SIDES[: len(case.schedule)])
    heads = case.policy.heads[0][:: case.heads // 4][:4]  # a mixed layer stays mixed
    rules = tuple(r for r in case.policy.rules if r.head_class in heads)
    return replace(case, schedule=schedule, heads=4, head_dim=32, dtype="fp32", policy=Policy((heads,), rules))


def tiny_call(name: str, kernel: str = "cpu") -> tuple[Case, dict[int, Any], Callable[[], torch.Tensor]]:
    """(the case, its inputs by scale, the call of its scale once its decision scales were run)."""
    case = tiny(CASES.get(name, POOLED))
    attend = SparseAttention(
        case.policy, case.schedule, softmax_scale=case.problem(0).softmax_scale, logit_bound=case.logit_bound,
        launches={s: Launch(kernel) for s in range(len(case.schedule))},
    )  # fmt: skip
    first = decision_scales(case.policy, 0, case.scale_index)
    inputs = {s: case.problem(s).make_inputs(s) for s in (*first, case.scale_index)}
    for s in first:
        attend(*inputs[s], 0, s)
    return case, inputs, lambda: attend(*inputs[case.scale_index], 0, case.scale_index)


def launches(names: list[str]) -> dict[str, dict[str, int]]:
    """Counts of the GPU's backend; wants a process with TRITON_INTERPRET=1, and leaves the kernels themselves out."""
    found = {}
    for name in names:
        with noted_kernels([], run=False):  # of the decision scales
            call = tiny_call(name, "triton")[2]
        found[name] = asdict(counted(call, run=False))
    return found
