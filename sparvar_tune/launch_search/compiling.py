"""Binaries of the Triton kernels, made ahead of time by processes that never touch a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.registry import KERNELS, default_config
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import Policy, plan_layers
from sparvar_tune.launch_search.layer_call import decision_scales
from sparvar_tune.launch_search.process_pool import Job, Pool
from sparvar_tune.profile.identity import code_of_row
from sparvar_tune.profile.schema import MachineCode

if TYPE_CHECKING:  # Triton is optional on a CPU
    from sparvar_kernels.backends.triton.binary import Build

COMPILE_S = 180.0  # no kernel of ours takes a tenth of it


@dataclass(frozen=True)
class Binary:
    """Everything a kernel is specialised on, and for which GPUs; scales and models that agree on it share the binary."""

    build: Build
    capability: tuple[int, int]


@dataclass(frozen=True)
class Compiled:
    """What a binary takes (registers and spilled bytes a thread, shared bytes a program); `code` is the hash of its
    instructions. Everything but `failure` is zero or empty where the compiler raised, hung or crashed.
    """

    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    code: str = ""
    failure: str | None = None

    def why_not(self) -> str | None:
        return "code: want it exactly when nothing failed" if bool(self.code) != (self.failure is None) else None


def compile_payload(payload: dict[str, Any]) -> dict[str, Any]:
    """What a worker process is asked: compiles a `Binary` of JSON values, which is then in Triton's cache on disk."""
    from sparvar_kernels.backends.triton.binary import Build, compile_for, resources

    fields = payload["build"]
    pairs = {name: tuple((k, v) for k, v in fields[name]) for name in ("types", "constants", "options")}
    build = Build(**{**fields, **pairs})
    return asdict(resources(compile_for(build, tuple(payload["capability"]))))


def compilers(processes: int) -> Pool:
    """Processes that compile and see no GPU; each is started when there is a job for it."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Pool(f"{__name__}:compile_payload", [environment] * max(1, processes))


def compile_all(jobs: Iterable[Binary], pool: Pool, say: Callable[[str], None]) -> dict[Binary, Compiled]:
    """Every distinct binary; a compiler that raises, hangs or crashes is a failure of that binary alone."""
    distinct = {str(i): job for i, job in enumerate(dict.fromkeys(jobs))}
    found: dict[Binary, Compiled] = {}
    for outcome in pool.run(Job(key, asdict(job), COMPILE_S) for key, job in distinct.items()):
        value: Any = outcome.value
        failure = f"{outcome.failure}: {outcome.detail}"[:300]
        found[distinct[outcome.key]] = Compiled(failure=failure) if outcome.failure else Compiled(**value)
        say(f"compiling: {len(found)}/{len(distinct)}")
    return found


def binaries(
    policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int, config: TritonConfig,
    capability: tuple[int, int],
) -> list[Binary]:  # fmt: skip
    """What calling one layer of a policy at a scale launches there with `config`, and at the decision scales it looks back at.

    Found by planning the layer on the CPU as a call would on the GPU. Raises ValueError where Triton is missing.
    """
    return list(dict.fromkeys(
        b for s in (*decision_scales(policy, layer, scale_index), scale_index)
        for b in own_binaries(policy, problems, layer, s, scale_index, config, capability)
    ))  # fmt: skip


def own_binaries(
    policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, at: int, scale_index: int, config: TritonConfig,
    capability: tuple[int, int],
) -> list[Binary]:  # fmt: skip
    """What a layer launches at the scale `at` alone, where `scale_index` has the configuration `config`."""
    layers = KERNELS["triton"].load()
    schedule = problems[scale_index].schedule
    configs = [config if s == scale_index else default_config(problems[s], "triton", capability) for s in range(len(schedule))]
    planned = layers.Layer(plan_layers(policy, schedule)[layer], [problems[s] for s in range(len(schedule))], configs, "cpu")
    found = []
    for build in planned.builds(at):
        found.append(Binary(build, capability))
        if build.kernel.endswith(".mass_kernel") and problems[at].num_queries % 16:  # a dense pass may pad its log-sum-exp
            found.append(Binary(replace(build, aligned=not build.aligned), capability))
    return found


def row_binaries(
    policy: Policy, problems: Mapping[int, AttentionProblem], layers: Iterable[int], scale_index: int, config: TritonConfig,
    capability: tuple[int, int],
) -> list[Binary]:  # fmt: skip
    """Every binary a row of a profile launches: one layer of each kind at its scale."""
    found = (own_binaries(policy, problems, layer, scale_index, scale_index, config, capability) for layer in layers)
    return list(dict.fromkeys(b for group in found for b in group))


def machine_code(made: Mapping[Binary, Compiled], wanted: Collection[Binary], triton: str | None) -> MachineCode | None:
    """The identity of these binaries, None where one of them does not compile."""
    if triton is None or not wanted or any(made[b].failure for b in wanted):
        return None
    major, minor = next(iter(wanted)).capability
    return MachineCode(triton, f"sm_{major}{minor}", code_of_row(made[b].code for b in wanted))
