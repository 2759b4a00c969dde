"""Binaries of the gathered kernel, made ahead of time by processes that never touch a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparvar_kernels.configs import TritonConfig
from sparvar_kernels.problem import DTYPES, AttentionProblem
from sparvar_kernels.scales import ScaleSchedule
from sparvar_kernels.variants import Cs4a, Dense, Pooled, Variant
from sparvar_tune.workers import Job, Pool

COMPILE_S = 180.0  # no kernel of ours takes a tenth of it


@dataclass(frozen=True)
class Binary:
    """Everything the gathered kernel is specialised on; scales and models that agree on it share the binary."""

    head_dim: int
    dtype: str
    logit_bound: float | None
    config: TritonConfig
    epilogue: int
    masked: bool
    bias: bool
    capability: tuple[int, int]

    @property
    def problem(self) -> AttentionProblem:
        """The smallest problem that needs it."""
        return AttentionProblem(ScaleSchedule(((1, 1),)), 0, 1, 1, self.head_dim, self.dtype, 1.0, self.logit_bound)


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
    from sparvar_kernels.binary import compile_for, resources, source
    from sparvar_kernels.gathered_triton import gathered_kernel
    from sparvar_kernels.layer_triton import gathered_constants, gathered_types

    config, capability = TritonConfig(**payload["config"]), tuple(payload["capability"])
    job = Binary(**{**payload, "config": config, "capability": capability})
    constants = gathered_constants(job.problem, job.config, epilogue=job.epilogue, bias=job.bias, masked=job.masked)
    made = source(gathered_kernel, gathered_types(DTYPES[job.dtype]), constants, True)
    return asdict(resources(compile_for(made, job.capability, job.config.options)))


def compile_all(jobs: Iterable[Binary], processes: int, say: Callable[[str], None]) -> dict[Binary, Compiled]:
    """Every distinct binary; a compiler that raises, hangs or crashes is a failure of that binary alone."""
    distinct = {str(i): job for i, job in enumerate(dict.fromkeys(jobs))}
    found: dict[Binary, Compiled] = {}
    if not distinct:
        return found
    environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with Pool(f"{__name__}:compile_payload", [environment] * min(processes, len(distinct))) as pool:
        for outcome in pool.run(Job(key, asdict(job), COMPILE_S) for key, job in distinct.items()):
            value: Any = outcome.value
            failure = f"{outcome.failure}: {outcome.detail}"[:300]
            found[distinct[outcome.key]] = Compiled(failure=failure) if outcome.failure else Compiled(**value)
            say(f"compiling: {len(found)}/{len(distinct)}")
    return found


def binaries(
    problem: AttentionProblem, variants: Iterable[Variant], configs: Sequence[TritonConfig], capability: tuple[int, int]
) -> list[Binary]:
    """What timing `configs` on one layer's variants needs: a launch for every decision scale they look back at.

    A residual adds an epilogue, lists of odd lengths a mask, pooled keys a bias.
    """
    by_decision: dict[int | None, list[Variant]] = {}
    kinds: set[tuple[bool, bool, bool]] = set()  # epilogue, masked, bias
    for v in variants:
        if isinstance(v, Pooled):
            kinds.add((False, True, True))
        elif not isinstance(v, Dense):
            by_decision.setdefault(getattr(v, "decision_scale", None), []).append(v)
    free = by_decision.pop(None, [])
    for i, group in enumerate(by_decision.values() or [free] * bool(free)):
        together = group + (free if i == 0 and by_decision else [])  # lists without a residual ride along
        residual = any(getattr(v, "residual", True) and getattr(v, "decision_scale", None) is not None for v in together)
        kinds.add((residual, any(not isinstance(v, Cs4a) for v in together), False))
    p = problem
    return [
        Binary(p.head_dim, p.dtype, None if bias else p.logit_bound, config, int(residual), masked, bias, capability)
        for config in configs for residual, masked, bias in sorted(kinds)
    ]  # fmt: skip
