"""Predicts attention times for a GPU that is not here: a roofline from the GPU table, with two measured efficiencies.

A call takes the longer of its arithmetic at a share of the tensor-core peak and its compulsory bytes at a share of the
memory bandwidth, plus one launch. The shares come from one H100 80GB HBM3 (bf16, last scale of Infinity-8B: 3.40 ms
FlashAttention-2, 0.245 ms gathered 8x16 tiles), so what this predicts is a starting point, marked as such, never a win.
"""

from __future__ import annotations

from sparvar_kernels.cs4a import keys_kept
from sparvar_kernels.csla import csla_lists
from sparvar_kernels.policy import Policy
from sparvar_kernels.pooled import num_keys
from sparvar_kernels.problem import AttentionProblem
from sparvar_kernels.variants import Cs4a, Csla, Pooled, Reuse, Variant
from sparvar_tune.gpus import Gpu

DENSE_EFFICIENCY, GATHERED_EFFICIENCY, MEMORY_EFFICIENCY = 0.37, 0.33, 0.8
LAUNCH_MS = 0.005
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def mean_keys(variant: Variant, problem: AttentionProblem) -> float:
    """Keys a query reads, averaged over query tiles."""
    if isinstance(variant, Csla):
        return csla_lists(problem.schedule, problem.scale_index, variant).mean_keys()
    if isinstance(variant, Cs4a):
        return keys_kept(variant, problem.schedule, problem.scale_index)
    if isinstance(variant, Pooled):
        return num_keys(problem.schedule, problem.scale_index, variant)
    return 0.0 if isinstance(variant, Reuse) else float(problem.num_keys)


def predict_ms(variant: Variant, problem: AttentionProblem, gpu: Gpu, heads: int) -> float:
    """Milliseconds of one call with `heads` heads. Raises ValueError for a row without rates (the CPU is always measured)."""
    if gpu.bf16_tflops is None or gpu.memory_gbps is None:
        raise ValueError(f"gpu {gpu.slug}: no rates in the table to predict from; measure it instead")
    keys = mean_keys(variant, problem)
    flops = 4.0 * problem.batch * heads * problem.num_queries * keys * problem.head_dim
    rows = 2 * problem.num_queries + 2 * min(keys * problem.num_queries / 64, problem.num_keys)  # q, out; k and v at most once
    size = problem.batch * heads * problem.head_dim * rows * BYTES[problem.dtype]
    efficiency = DENSE_EFFICIENCY if keys == problem.num_keys else GATHERED_EFFICIENCY
    compute = flops / (gpu.bf16_tflops * 1e12 * efficiency)
    return max(compute, size / (gpu.memory_gbps * 1e9 * MEMORY_EFFICIENCY)) * 1e3 + LAUNCH_MS


def predict_layer_ms(policy: Policy, problem: AttentionProblem, gpu: Gpu) -> float:
    """Milliseconds of one layer at one scale, averaged over layers; groups of heads run one after the other."""
    total = 0.0
    for layer, letters in enumerate(policy.heads):
        counts: dict[Variant, int] = {}
        for head in range(len(letters)):
            variant = policy.variant(layer, head, problem.scale_index)
            counts[variant] = counts.get(variant, 0) + 1
        total += sum(predict_ms(variant, problem, gpu, n) for variant, n in counts.items())
    return total / len(policy.heads)
