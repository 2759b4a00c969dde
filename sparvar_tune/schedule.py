"""The schedule of one GPU: for each sparse scale of a policy the launch configuration that runs it fastest there.

Inputs are random (times of these kernels do not depend on values), shapes and policy are the model's. Binaries are
made first, each once, by processes that never touch the GPU; then every configuration is timed a little, and the best few
again in alternation with dense attention.
"""

from __future__ import annotations

import datetime
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.configs import TritonConfig
from sparvar_kernels.dense import dense_attention
from sparvar_kernels.policy import Policy
from sparvar_kernels.problem import DTYPES, AttentionProblem
from sparvar_kernels.registry import why_not
from sparvar_kernels.scales import ScaleSchedule
from sparvar_kernels.variants import Cs4a, Variant
from sparvar_tune.gpus import Gpu
from sparvar_tune.machine import silicon, versions
from sparvar_tune.measure import interleaved, paired_speedup, timing
from sparvar_tune.models import Model
from sparvar_tune.policies import PAPER_SOURCE, UNVERIFIED
from sparvar_tune.profiles import kernel_hash
from sparvar_tune.schema import SCHEMA, Profile, Row, Workload
from sparvar_tune.workers import Job, Pool

DENSE_NAME = "cuDNN through torch"
COMPILE_S = 180.0  # no kernel of ours takes a tenth of it
SCREENED, FINALISTS, ROUNDS = 8, 4, 30  # calls of the first look; who gets a second; rounds of that


def random_inputs(problem: AttentionProblem, seed: int = 0, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, Nq, D], k, v [B, H, Nk, D] made on the device; logits within `logit_bound` where there is one."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (problem.batch, problem.heads, problem.num_keys, problem.head_dim)
    k, v = (torch.randn(shape, device=device, generator=g, dtype=torch.float32) for _ in range(2))
    q = torch.randn(*shape[:2], problem.num_queries, problem.head_dim, device=device, generator=g, dtype=torch.float32)
    if problem.logit_bound is not None:
        k = torch.nn.functional.normalize(k, dim=-1)
        q = torch.nn.functional.normalize(q, dim=-1) * (0.99 * problem.logit_bound / problem.softmax_scale)
    dtype = DTYPES[problem.dtype]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def points(choices: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Every combination of one choice for each name, the last name's changing fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def space(problem: AttentionProblem, capability: tuple[int, int] | None) -> list[TritonConfig]:
    """Every legal configuration worth trying.

    Eight warps want 128 rows (a warp group of four works on 64), and only they gain from a register limit: two programs
    then fit on a multiprocessor. Pipelines of fewer than five stages never won on Hopper.
    """
    made = (TritonConfig(**point) for point in points(TritonConfig.space()))
    return [c for c in made if not why_not(problem, "triton", c, capability) and c.num_warps * 16 <= c.block_m
            and (c.num_warps == 8 or not c.maxnreg) and c.num_stages >= 5]  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """Everything the gathered kernel is specialised on; scales and models that agree on it share the binary."""

    head_dim: int
    dtype: str
    logit_bound: float | None
    config: TritonConfig
    epilogue: int
    masked: bool
    capability: tuple[int, int]

    @property
    def problem(self) -> AttentionProblem:
        """The smallest problem that needs it."""
        return AttentionProblem(ScaleSchedule(((1, 1),)), 0, 1, 1, self.head_dim, self.dtype, 1.0, self.logit_bound)


def compile_binary(job: Binary) -> tuple[int, int, int]:
    """(registers, shared bytes, spilled bytes) of the binary, which is then in Triton's cache on disk."""
    from sparvar_kernels.binary import compile_for, resources, source
    from sparvar_kernels.gathered_triton import gathered_kernel
    from sparvar_kernels.layer_triton import gathered_constants, gathered_types

    constants = gathered_constants(job.problem, job.config, epilogue=job.epilogue, bias=False, masked=job.masked)
    made = source(gathered_kernel, gathered_types(DTYPES[job.dtype]), constants, True)
    found = resources(compile_for(made, job.capability, job.config.options))
    return found.registers, found.shared_bytes, found.spill_bytes


def compile_payload(payload: dict[str, Any]) -> tuple[int, int, int]:
    """`compile_binary` of a binary as JSON values: what a worker process is asked."""
    config, capability = TritonConfig(**payload["config"]), tuple(payload["capability"])
    return compile_binary(Binary(**{**payload, "config": config, "capability": capability}))


def compile_all(jobs: Sequence[Binary], processes: int, say: Callable[[str], None]) -> dict[Binary, tuple[int, int, int] | str]:
    """Every distinct binary, compiled by processes that see no GPU; a compiler that raises, hangs or crashes is a text."""
    distinct = {str(i): job for i, job in enumerate(dict.fromkeys(jobs))}
    found: dict[Binary, tuple[int, int, int] | str] = {}
    environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with Pool(f"{__name__}:compile_payload", [environment] * min(processes, len(distinct))) as pool:
        for outcome in pool.run(Job(key, asdict(job), COMPILE_S) for key, job in distinct.items()):
            job = distinct[outcome.key]
            found[job] = f"{outcome.failure}: {outcome.detail}" if outcome.failure else tuple(outcome.value)  # type: ignore
            say(f"compiling: {len(found)}/{len(distinct)}")
    return found


class Bench:
    """One layer of a policy at one scale, on the inputs q, k, v (None: random ones).

    `call(attention(config))` is the attention of that scale; decision scales it depends on are run by `attention`.
    """

    def __init__(
        self, policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int,
        inputs: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.problems, self.layer, self.scale_index = policy, problems, layer, scale_index
        self.problem = problems[scale_index]
        self.q, self.k, self.v = random_inputs(self.problem) if inputs is None else inputs

    def attention(self, config: TritonConfig) -> SparseAttention:
        """Ready to be called at the scale; raises whatever a launch raises."""
        p = self.problem
        launches = {s: Launch("triton", config) for s in range(len(p.schedule))}
        attend = SparseAttention(
            self.policy, p.schedule, softmax_scale=p.softmax_scale, logit_bound=p.logit_bound, launches=launches
        )  # fmt: skip
        for s in decision_scales(self.policy, self.layer, self.scale_index):
            d = self.problems[s]
            attend(self.q[:, :, : d.num_queries], self.k[:, :, : d.num_keys], self.v[:, :, : d.num_keys], self.layer, s)
        return attend

    def call(self, attend: SparseAttention) -> Tensor:
        return attend(self.q, self.k, self.v, self.layer, self.scale_index)

    def dense(self) -> Tensor:
        return dense_attention(self.q, self.k, self.v, self.problem)


def variants_of(policy: Policy, layer: int, scale_index: int) -> set[Variant]:
    return {policy.variant(layer, h, scale_index) for h in range(len(policy.heads[layer]))}


def decision_scales(policy: Policy, layer: int, scale_index: int) -> list[int]:
    """Scales that must run before `scale_index` in this layer."""
    decisions = (getattr(v, "decision_scale", None) for v in variants_of(policy, layer, scale_index))
    return sorted({s for s in decisions if s is not None})


def distinct_layers(policy: Policy, scale_index: int) -> dict[int, int]:
    """First layer of each kind -> how many layers are like it, at one scale."""
    kinds: dict[tuple[Variant, ...], int] = {}
    counts: dict[int, int] = {}
    for layer, letters in enumerate(policy.heads):
        kind = tuple(policy.variant(layer, h, scale_index) for h in range(len(letters)))
        first = kinds.setdefault(kind, layer)
        counts[first] = counts.get(first, 0) + 1
    return counts


def binaries(
    problem: AttentionProblem, variants: set[Variant], configs: list[TritonConfig], capability: tuple[int, int]
) -> list[Binary]:
    """What timing `configs` on these variants needs; the residual adds an epilogue, lists of odd lengths a mask."""
    residual = any(getattr(v, "decision_scale", None) is not None and getattr(v, "residual", True) for v in variants)
    masked = any(not isinstance(v, Cs4a) for v in variants)
    p = problem
    return [Binary(p.head_dim, p.dtype, p.logit_bound, c, int(residual), masked, capability) for c in configs]


def tune_scale(
    workload: Workload, policy: Policy, scale_index: int, say: Callable[[str], None], configs: list[TritonConfig], dense_name: str
) -> tuple[Row, list[tuple[TritonConfig, float | str]]]:
    """The row of one scale, and the screening time (ms, mean over layers) or failure of every configuration."""
    problems = {s: workload.problem(s) for s in range(len(workload.schedule))}
    layers = distinct_layers(policy, scale_index)
    benches = {layer: Bench(policy, problems, layer, scale_index) for layer in layers}
    screened: list[tuple[TritonConfig, float | str]] = []
    for i, config in enumerate(configs):
        try:
            total = 0.0
            for layer, count in layers.items():
                attend = benches[layer].attention(config)
                spent = interleaved({"this": lambda: benches[layer].call(attend)}, SCREENED)["this"]  # noqa: B023
                total += median(spent) * count
            screened.append((config, total / len(policy.heads)))
        except Exception as error:  # out of shared memory or registers: data, not the end
            screened.append((config, f"{type(error).__name__}: {error}"[:200]))
        best = min((ms for _, ms in screened if isinstance(ms, float)), default=float("nan"))
        say(f"scale {scale_index}: configuration {i + 1}/{len(configs)}, best {best:.4f} ms a layer")
    ranked = sorted(((ms, i) for i, (_, ms) in enumerate(screened) if isinstance(ms, float)), key=lambda at: at[0])
    if not ranked:
        raise ValueError(f"scale {scale_index}: no configuration ran; the first said {screened[0][1]}")
    names = [screened[i][0] for _, i in ranked[:FINALISTS]]
    sums: dict[str, list[float]] = {}
    for layer, count in layers.items():
        ways: dict[str, Callable[[], object]] = {"dense": benches[layer].dense}
        for j, config in enumerate(names):
            attend = benches[layer].attention(config)
            ways[str(j)] = lambda attend=attend, bench=benches[layer]: bench.call(attend)  # type: ignore[misc]
        for name, spent in interleaved(ways, ROUNDS).items():
            share = [ms * count / len(policy.heads) for ms in spent]
            sums[name] = [a + b for a, b in zip(sums[name], share, strict=True)] if name in sums else share
    won = min(range(len(names)), key=lambda j: median(sums[str(j)]))
    tuned, dense = sums[str(won)], sums["dense"]
    row = Row(
        scale_index, "triton", tuple(sorted(vars(names[won]).items())), "measured", dense_name,
        timing(tuned), timing(dense), paired_speedup(dense, tuned),
    )  # fmt: skip
    return row, screened


def measured_profile(
    model: Model, gpu: Gpu, preset: str, resolution: str, aspect: str, policy: Policy, images: int, seed: int,
    say: Callable[[str], None], status: Callable[[str], None],
) -> Profile:  # fmt: skip
    """The profile of a policy nobody verified on this model, with every sparse scale timed on this machine's GPU.

    images: how many at once. Raises ValueError when no configuration runs.
    """
    workload = Workload.of(model, resolution, aspect)
    workload = replace(workload, batch=workload.batch * images)
    capability = torch.cuda.get_device_capability()
    scales = sorted({r.scale_index for r in policy.rules})
    configs: dict[int, list[TritonConfig]] = {}
    jobs: list[Binary] = []
    for s in scales:
        problem = workload.problem(s)
        configs[s] = space(problem, capability)
        for layer in distinct_layers(policy, s):
            jobs += binaries(problem, variants_of(policy, layer, s), configs[s], capability)
    begun = time.monotonic()
    compile_all(jobs, os.cpu_count() or 2, status)
    say(f"[{time.monotonic() - begun:4.0f} s] {len(set(jobs))} binaries compiled")
    rows = []
    for s in scales:
        row, screened = tune_scale(workload, policy, s, status, configs[s], DENSE_NAME)
        rows.append(row)
        failed = sum(isinstance(ms, str) for _, ms in screened)
        assert row.tuned and row.dense and row.speedup
        say(f"[{time.monotonic() - begun:4.0f} s] scale {s}: {row.dense.p50_ms:.3f} -> {row.tuned.p50_ms:.3f} ms a layer, "
            f"{row.speedup.median:.2f}x ({row.speedup.low:.2f}..{row.speedup.high:.2f}), {len(screened)} configurations, "
            f"{failed} failed")  # fmt: skip
    return Profile(
        schema=SCHEMA, created=datetime.date.today().isoformat(), preset=preset, state="measured", policy=policy,
        policy_state="unverified", policy_source=PAPER_SOURCE, evidence=None,
        workload=workload, silicon=silicon(gpu, True), versions=versions(), kernel_hash=kernel_hash(gpu),
        generation=None, rows=tuple(rows), seed=seed, trials=sum(len(c) for c in configs.values()),
        notes=(UNVERIFIED, "times are of eager calls on random inputs, planning done, events on the device"),
    )  # fmt: skip
