"""The facts of a profile: for each of its scales what one layer's attention takes, and how fast it is against dense.

Where its silicon is not in this machine, that is what its kernels take when they are compiled for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.dense import dense_attention
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.launch_search.compiling import Binary
from sparvar_tune.launch_search.layer_call import decision_scales, distinct_layers, random_inputs
from sparvar_tune.profile.machine import is_here, silicon, version_of
from sparvar_tune.profile.schema import Profile, Row
from sparvar_tune.profile.store import name_of
from sparvar_tune.regression import binaries
from sparvar_tune.regression.baseline import Fact
from sparvar_tune.regression.counts import counted
from sparvar_tune.regression.ratios import cpu_ratio, gpu_ratio, one_thread, ratio
from sparvar_tune.runtime import launch_of

Call = Callable[[], torch.Tensor]


def measure(profile: Profile, gpu: Gpu, status: Callable[[str], None]) -> list[Fact]:
    """Every fact there is on this machine. Raises ValueError where there is none: a GPU that is elsewhere, and no Triton."""
    here = is_here(gpu)
    with_triton = gpu.device == "cuda" and version_of("triton") is not None
    if not here and not with_triton:
        todo = "pip install 'sparvar-tune[gpu]'"
        raise ValueError(f"bench: {gpu.slug} is not in this machine, and compiling for it wants Triton: {todo}")
    found = list[Fact]()
    for i, row in enumerate(profile.rows):
        what = f"{profile.workload.model} scale {row.scale_index}"
        status(f"{what}: {i + 1}/{len(profile.rows)}")
        if here:
            found += called(profile, row, gpu, what)
    if with_triton:
        status("compiling")
        found += compiled(profile, gpu)
    return [replace(fact, of=f"{gpu.slug}/{name_of(profile)}") for fact in found]


def busiest(policy: Policy, scale_index: int) -> int:
    """The first of the layers that have most heads sparse at a scale."""
    rules = {r.head_class for r in policy.rules if r.scale_index == scale_index}
    return max(distinct_layers(policy, scale_index), key=lambda layer: sum(h in rules for h in policy.heads[layer]))


def called(profile: Profile, row: Row, gpu: Gpu, what: str) -> list[Fact]:
    """Counts of a call, and its ratio to dense, of the busiest layer on random inputs."""
    versions = f"torch {torch.__version__.partition('+')[0]}"
    if gpu.device == "cuda":
        ours, dense = calls(profile, row, "cuda")
        found, under = gpu_ratio(ours, dense), f"{silicon(gpu, True).name}, {versions}, triton {version_of('triton')}"
    else:
        with one_thread():
            ours, dense = calls(profile, row, "cpu")
            found, under = cpu_ratio(ours, dense), f"{silicon(gpu, True).name}, 1 thread, {versions}"
    return [*counted(ours).facts(what, f"{versions} on {gpu.device}"), ratio(f"{what}: speed-up over dense", found, under)]


def calls(profile: Profile, row: Row, device: str) -> tuple[Call, Call]:
    """(sparse, dense): one layer's attention at a row's scale, its decision scales run before."""
    w, s, policy = profile.workload, row.scale_index, profile.policy
    problem, layer = w.problem(s), busiest(policy, s)
    q, k, v = random_inputs(problem, device=device)
    attend = SparseAttention(
        policy, w.schedule, softmax_scale=w.softmax_scale, logit_bound=w.logit_bound,
        launches={r.scale_index: launch_of(r) for r in profile.rows},
    )  # fmt: skip
    for d in (w.problem(at) for at in decision_scales(policy, layer, s)):
        attend(q[:, :, : d.num_queries], k[:, :, : d.num_keys], v[:, :, : d.num_keys], layer, d.scale_index)
    return lambda: attend(q, k, v, layer, s), lambda: dense_attention(q, k, v, problem)


def compiled(profile: Profile, gpu: Gpu) -> list[Fact]:
    """What the kernels of its rows take on its silicon."""
    w, capability = profile.workload, gpu.capability
    assert capability is not None, "a GPU of the table has one"
    jobs: dict[str, list[Binary]] = {}
    for row in profile.rows:
        config = launch_of(row).config
        assert isinstance(config, TritonConfig), "a GPU's row has a GPU kernel's configuration"
        jobs[f"{w.model} scale {row.scale_index}"] = binaries.wanted(
            profile.policy, w.problems(), busiest(profile.policy, row.scale_index), row.scale_index, capability, config
        )
    made = binaries.compiled([job for group in jobs.values() for job in group])
    return [fact for what, group in jobs.items() for fact in binaries.facts(what, made, group)]
