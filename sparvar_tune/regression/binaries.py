"""What compiled kernels take on five kinds of GPU, none of which need be here: registers, shared memory, spills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.registry import default_config
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_tune.launch_search.compiling import Binary, Compiled, compile_all, compilers, own_binaries
from sparvar_tune.profile.machine import version_of
from sparvar_tune.regression.baseline import Fact, count

TARGETS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))  # A100; L40S and RTX 4090; H100 and H200; B200; RTX 5090


def wanted(
    policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int, capability: tuple[int, int],
    config: TritonConfig | None = None,
) -> list[Binary]:  # fmt: skip
    """What a layer launches at a scale; config None: what a GPU of the capability gets without a profile."""
    chosen = config or default_config(problems[scale_index], "triton", capability)
    assert isinstance(chosen, TritonConfig)
    return own_binaries(policy, problems, layer, scale_index, scale_index, chosen, capability)


def compiled(jobs: Sequence[Binary], processes: int = 1) -> dict[Binary, Compiled]:
    """Each of them, in processes that see no GPU; those that Triton has in its cache take no time."""
    pool = compilers(processes)
    try:
        return compile_all(jobs, pool, lambda text: None)
    finally:
        pool.close()


def facts(what: str, made: Mapping[Binary, Compiled], jobs: Sequence[Binary], under: str | None = None) -> list[Fact]:
    """For each kernel and target the most that one of its binaries takes. Raises ValueError where one did not compile."""
    under = under or f"triton {version_of('triton')}"
    most: dict[str, Fact] = {}
    for job in jobs:
        found, target = made[job], f"sm_{job.capability[0]}{job.capability[1]}"
        if found.failure:
            raise ValueError(f"{what}: {job.build.kernel} on {target}: {found.failure}")
        place = f"{what}: {job.build.kernel.partition('.')[2]} on {target}"
        takes = {"registers a thread": found.registers, "shared bytes": found.shared_bytes, "spilled bytes": found.spill_bytes}
        for name, value in takes.items():
            fact = count(f"{place}: {name}", value, under)
            if fact.name not in most or most[fact.name].value < fact.value:
                most[fact.name] = fact
    return list(most.values())
