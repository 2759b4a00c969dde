"""Speed of the kernel table's cases: `pytest tests/benchmarks --benchmark-enable -m ''` on any machine.

The cases are those of `lab.kernel_table`, by the same names: on a GPU (marker gpu) as they stand, on a CPU in fp32 on a tiny
schedule with four heads. What is timed is first held against a reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmark_cases import CASES, POOLED, tiny_call

from lab.kernel_table import Case, error_of
from sparvar_kernels import oracle
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_tune.launch_search.layer_call import Bench


def reference_error(case: Case, made: torch.Tensor, inputs: dict[int, tuple[torch.Tensor, ...]]) -> float:
    """Relative error of every head against the fp64 oracle."""
    problem, worst = case.problem(case.scale_index), 0.0
    for h in range(case.heads):
        variant = case.policy.variant(0, h, case.scale_index)
        decision = variant.decision_scale
        one = replace(problem, heads=1)
        source = None
        if decision is not None:
            source = (replace(case.problem(decision), heads=1), *(t[:, h : h + 1] for t in inputs[decision]))
        tile = getattr(variant.at_decision(case.schedule, case.scale_index), "tile", None)
        want = oracle.reference_attention(variant, *(t[:, h : h + 1] for t in inputs[case.scale_index]), one, source, tile)
        worst = max(worst, float((made[:, h : h + 1].double() - want).norm() / want.norm()))
    return worst


@pytest.mark.parametrize("name", [*CASES, POOLED.name])
def test_tiny_case_on_a_cpu(benchmark, name):
    case, inputs, call = tiny_call(name)
    made = benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert reference_error(case, made, inputs) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_case_on_a_gpu(benchmark, name):
    case = CASES[name]
    bench = Bench(case.policy, {s: case.problem(s) for s in range(len(case.schedule))}, 0, case.scale_index)
    attend = bench.attention(TritonConfig())
    if not case.decision:
        assert error_of(case, attend, bench) < 0.01

    def call() -> torch.Tensor:
        made = bench.call(attend)
        torch.cuda.synchronize()
        return made

    assert bool(torch.isfinite(benchmark.pedantic(call, rounds=20, warmup_rounds=3)).all())
