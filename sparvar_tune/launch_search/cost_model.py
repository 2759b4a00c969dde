"""Predicts what a launch takes on a GPU, from the work it has and what its binary takes there.

    cycles of a key step = arithmetic / rate + bytes / L2 rate + latency / programs at once,   (1 + spill penalty) times
    time = launch + (steps an SM has * step + programs an SM has * overhead + half a program as the tail) / clock,

times a measured efficiency per configuration; never less than the bytes that must move take at the memory's rate. The
coefficients are fitted to launch spaces recorded on an H100 (`costfit`), which also says how far off they are on an H200
that the fit never saw. Registers and shared memory come from binaries compiled for the target, kept in a table so that
nothing needs to be compiled here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.triton.table import Column
from sparvar_kernels.backends.triton.work import build_stage, launch_groups, means_stage
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import LayerPlan, Policy, plan_layers
from sparvar_kernels.variants import NearFar, Pooled
from sparvar_kernels.variants.pooled.planner import num_keys
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.profile.reader import Reader, unique_keys

HERE = Path(__file__).parent
FITTED, BINARIES = HERE / "cost_fit.json", HERE / "cost_binaries.json"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Share of the tensor cores' peak that dense attention reaches, by width of a head: cuDNN on the H100 of reports/kernels-h100.md;
# elsewhere what FlashAttention-2's paper reports for an A100 (50..73 %).
DENSE_SHARE, HOPPER_DENSE_SHARE = {64: 0.55, 128: 0.65}, {64: 0.44, 128: 0.60}
THREADS_PER_SM = {(8, 0): 2048, (9, 0): 2048, (10, 0): 2048}  # others: 1536
# A decision scale with its ranking, lists and residual against its dense pass alone, as measured when the fit was made; 1.8 by
# today's reports/kernels-h100.md. What it says decides what is timed, so it changes with the next fit, with profiles made anew.
DECIDING = 2.25
KEPT = 1.35  # a configuration predicted within this of the best is worth timing: on every recorded space it holds the best


@dataclass(frozen=True)
class LaunchWork:
    """One launch: how many keys the list of each program has, and how many query rows it takes."""

    head_dim: int
    dtype: str
    keys: torch.Tensor  # [P] int32
    rows: int  # of all programs together
    batch: int
    masked: bool
    residual: bool
    bias: bool = False

    def steps(self, block_n: int) -> float:
        return float(self.batch * (-(-self.keys // block_n)).sum())

    @property
    def programs(self) -> int:
        return self.batch * len(self.keys)


@dataclass(frozen=True)
class Taken:
    """What a binary takes: registers and spilled bytes a thread, shared bytes a program."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Fit:
    """The coefficients. Cycles are of the SM clock; shares are of the tensor cores' peak.

    share: by "<warps> <block_m>". latency: of a step by number of stages. efficiency: measured over modelled time by head_dim
    and configuration. error: median |log ratio| on the H200 that was held out, on problems left out, and on whole layers of
    profiles measured on the H200.
    """

    gpu: str
    share: dict[str, float]
    l2_bytes_per_cycle: float
    latency: dict[str, float]
    latency_power: float
    spill: float
    overhead: float
    launch_us: float
    narrow: float
    residual: float
    efficiency: dict[str, float]
    error_other_gpu: float
    error_other_problem: float
    error_layers: float

    def why_not(self) -> str | None:
        numbers = (
            *self.share.values(),
            *self.latency.values(),
            *self.efficiency.values(),
            self.l2_bytes_per_cycle,
            self.launch_us,
        )
        good = all(isinstance(x, float) and 0 < x < 1e9 for x in numbers)
        return None if good else "want every share, latency and efficiency above 0"


def works(
    policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int, config: TritonConfig
) -> list[LaunchWork]:
    """The launches over key lists of one layer at one scale, planned on the CPU; dense heads are none of them."""
    problem = problems[scale_index]
    plan = plan_layers(policy, problem.schedule)[layer][scale_index]
    found = []
    for groups in launch_groups(plan.groups).values():
        stage = build_stage(groups, problem, config, "cpu", [None] * len(groups), [None] * len(groups))
        residual = any(v.residual and v.decision_scale is not None for v, _ in groups)
        rows = int((stage.table[:, Column.END_ROW] - stage.table[:, Column.FIRST_ROW]).sum())
        found.append(
            LaunchWork(problem.head_dim, problem.dtype, stage.table[:, Column.COUNT], rows, problem.batch, stage.masked, residual)
        )
    return found + [_over_means(problem, v, heads, config) for v, heads in plan.groups if isinstance(v, Pooled | NearFar)]


def _over_means(problem: AttentionProblem, variant: Pooled | NearFar, heads: tuple[int, ...], config: TritonConfig) -> LaunchWork:
    read = num_keys(problem.schedule, problem.scale_index, variant) if isinstance(variant, Pooled) else 0  # or by its lists
    counts = means_stage(variant, heads, problem, config, "cpu", read).table[:, Column.COUNT]
    rows = len(heads) * problem.num_queries
    return LaunchWork(problem.head_dim, problem.dtype, counts, rows, problem.batch, True, False, True)


def at_once(taken: Taken, warps: int, gpu: Gpu) -> int:
    """Programs that are on one multiprocessor together (CUDA's occupancy rules); 0 where one does not fit."""
    assert gpu.registers_per_sm and gpu.smem_per_sm_bytes and gpu.smem_per_block_bytes and gpu.capability
    if taken.shared_bytes > gpu.smem_per_block_bytes:
        return 0
    registers = -(-taken.registers * 32 // 256) * 256 * warps  # a warp gets them 256 at a time
    most_warps = THREADS_PER_SM.get(gpu.capability, 1536) // 32
    return min(gpu.registers_per_sm // registers, gpu.smem_per_sm_bytes // (taken.shared_bytes + 1024), most_warps // warps, 32)


def clock_hz(gpu: Gpu) -> float:
    """The SM clock its fp32 peak stands for."""
    assert gpu.fp32_tflops and gpu.sms
    return gpu.fp32_tflops * 1e12 / (2 * (64 if gpu.capability == (8, 0) else 128) * gpu.sms)


def launch_ms(work: LaunchWork, config: TritonConfig, taken: Taken, gpu: Gpu, fit: Fit) -> float:
    """Milliseconds of one launch; infinite where a program does not fit. Raises ValueError for a row without rates."""
    if not (gpu.bf16_tflops and gpu.memory_gbps and gpu.sms):
        raise ValueError(f"gpu {gpu.slug}: no rates in the table to predict from; measure it instead")
    together = at_once(taken, config.num_warps, gpu)
    if not together or not work.programs:
        return math.inf if work.programs else 0.0
    clock = clock_hz(gpu)
    rate = gpu.bf16_tflops * 1e12 / gpu.sms / clock
    if work.dtype == "fp32":
        rate /= 6  # three products of tensor cores, each at half the speed of bf16
    size = BYTES[work.dtype]
    wide = 4 * config.block_m * config.block_n * work.head_dim / rate / fit.share[f"{config.num_warps} {config.block_m}"]
    wide *= fit.narrow if work.head_dim <= 64 else 1.0
    loads = 2 * size * config.block_n * work.head_dim / fit.l2_bytes_per_cycle
    stages = min(fit.latency, key=lambda s: abs(int(s) - config.num_stages))
    waits = fit.latency[stages] * (config.block_n / 32) ** fit.latency_power / together
    step = (wide + loads + waits) * (1 + fit.spill * taken.spill_bytes / 1000)
    begin = fit.overhead / together * (1 + fit.residual * work.residual)
    steps = work.steps(config.block_n)
    cycles = steps / gpu.sms * step + work.programs / gpu.sms * begin + 0.5 * (steps / work.programs * step + begin) * together
    ms = fit.launch_us / 1e3 + cycles / clock * 1e3
    ms *= fit.efficiency.get(efficiency_key(work.head_dim, config), 1.0)
    moved = 2 * work.rows * work.batch * work.head_dim * size  # queries and outputs: no cache saves them
    return max(ms, moved / gpu.memory_gbps / 1e6)


def efficiency_key(head_dim: int, config: TritonConfig) -> str:
    return f"{head_dim} {config_key(config)}"


def config_key(config: TritonConfig) -> str:
    fetching = " fetching" if config.fetchers else ""  # nothing is known of these
    return f"{config.block_m} {config.block_n} {config.num_warps} {config.num_stages} {config.maxnreg}{fetching}"


def dense_ms(problem: AttentionProblem, gpu: Gpu, heads: int) -> float:
    """Milliseconds of dense attention for `heads` heads: a roofline at a measured or published share of the peak.

    Raises ValueError for a row without rates (the CPU is always measured).
    """
    if not (gpu.bf16_tflops and gpu.fp32_tflops and gpu.memory_gbps):
        raise ValueError(f"gpu {gpu.slug}: no rates in the table to predict from; measure it instead")
    share = (HOPPER_DENSE_SHARE if gpu.capability == (9, 0) else DENSE_SHARE)[64 if problem.head_dim < 96 else 128]
    peak = gpu.fp32_tflops if problem.dtype == "fp32" else gpu.bf16_tflops
    flops = 4.0 * problem.batch * heads * problem.num_queries * problem.num_keys * problem.head_dim
    moved = 2 * problem.batch * heads * problem.head_dim * (problem.num_queries + problem.num_keys) * BYTES[problem.dtype]
    return max(flops / (peak * 1e12 * share), moved / (gpu.memory_gbps * 1e9 * 0.8)) * 1e3 + 0.005


def dense_heads(plan: LayerPlan) -> int:
    return sum(len(heads) for variant, heads in plan.groups if variant.reads == "everything")


def layer_ms(
    policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int, config: TritonConfig, gpu: Gpu,
    taken: Mapping[str, Taken], fit: Fit,
) -> float:  # fmt: skip
    """Milliseconds of one layer's attention at one scale; its launches run one after the other.

    taken: what the binaries take on this GPU, by `binary_key`. Raises KeyError for one that is not there.
    """
    problem = problems[scale_index]
    plan = plan_layers(policy, problem.schedule)[layer][scale_index]
    if plan.records:  # its dense pass is over every head
        total = DECIDING * dense_ms(problem, gpu, problem.heads)
    else:
        total = dense_ms(problem, gpu, n) if (n := dense_heads(plan)) else 0.0
    for work in works(policy, problems, layer, scale_index, config):
        total += launch_ms(work, config, taken[binary_key(work, config, gpu)], gpu, fit)
    return total


def scale_ms(
    policy: Policy, problems: Mapping[int, AttentionProblem], kinds: Mapping[int, int], scale_index: int, config: TritonConfig,
    gpu: Gpu, taken: Mapping[str, Taken],
) -> float:  # fmt: skip
    """`layer_ms` averaged over layers; kinds: first layer of each kind -> how many."""
    fit = load_fit()
    total = sum(n * layer_ms(policy, problems, k, scale_index, config, gpu, taken, fit) for k, n in kinds.items())
    return total / len(policy.heads)


def binary_key(work: LaunchWork, config: TritonConfig, gpu: Gpu) -> str:
    """Names the gathered kernel's binary for a launch on this GPU's target."""
    assert gpu.capability
    return _key(gpu.capability, work.head_dim, work.dtype, (work.masked, work.residual, work.bias), config)


def key_of(
    kernel: str, constants: Mapping[str, int], dtype: str, config: TritonConfig, capability: tuple[int, int]
) -> str | None:
    """The `binary_key` of a compiled binary by its constants; None for one that no prediction is about."""
    known = kernel.endswith(".gathered_kernel") and not config.fetchers
    if not known or constants["EPILOGUE"] > 1 or constants["BLOCK_M"] != config.block_m:
        return None
    kinds = bool(constants["MASKED"]), constants["EPILOGUE"] == 1, bool(constants["HAS_BIAS"])
    return _key(capability, constants["HEAD_DIM"], dtype, kinds, config)


def _key(capability: tuple[int, int], head_dim: int, dtype: str, kinds: tuple[bool, bool, bool], config: TritonConfig) -> str:
    kind = "".join(letter for letter, on in zip("mrb", kinds, strict=True) if on)
    return f"{capability[0]}.{capability[1]} {head_dim} {dtype} {kind or '-'} {config_key(config)}"


def may_prune(problem: AttentionProblem, gpu: Gpu) -> bool:
    """True where predictions were held against measurements: half-precision launches on Hopper."""
    return gpu.family == "hopper" and problem.dtype != "fp32" and problem.head_dim in (64, 128)


@lru_cache(maxsize=1)
def load_fit() -> Fit:
    """The shipped coefficients. Raises ValueError where the file is damaged."""
    return Reader().read(Fit, json.loads(FITTED.read_text("utf-8"), object_pairs_hook=unique_keys), FITTED.name)


@lru_cache(maxsize=1)
def load_binaries() -> dict[str, Taken]:
    """What the binaries of predicted launches take, by `binary_key`."""
    return {key: Taken(*values) for key, values in json.loads(BINARIES.read_text("utf-8"))["taken"].items()}


def binaries_of() -> str:
    """The version of the Triton that made them: another one gives some kernels a few registers more or less."""
    return str(json.loads(BINARIES.read_text("utf-8"))["triton"])


def keep_likely(predicted: Mapping[TritonConfig, float]) -> list[TritonConfig]:
    """The configurations worth timing: those predicted within KEPT of the best, in the order given."""
    best = min(predicted.values())
    return [config for config, ms in predicted.items() if ms <= KEPT * best]
