"""Profiles for the models of these tests: the tiny pocketvar on this machine, and the look-alikes of the public models."""

from __future__ import annotations

import dataclasses

import tiny
from examples import example

from sparvar_kernels import Policy, Pooled, Reuse, Rule
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.catalog.gpus import find_gpu
from sparvar_tune.profile import identity, machine, schema
from sparvar_tune.runtime.tuned import Tuned

GRIDS = tuple((s, s) for s in tiny.SIDES)


def profile(**changes) -> schema.Profile:
    base = example()
    base = dataclasses.replace(
        base, policy=Policy(("AB", "BB"), (Rule(5, "A", Pooled(3, 2)), Rule(6, "A", Reuse(4)), Rule(6, "B", Pooled(3, 2)))),
        workload=dataclasses.replace(base.workload, grids=GRIDS, layers=2, heads=2, head_dim=32),
        kernel_hash=identity.kernel_hash(find_gpu("cpu")),
        silicon=machine.silicon(find_gpu("cpu"), True), versions=machine.versions(),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def tuned_for(driven, model: str, policy: Policy, **workload) -> Tuned:
    _, parts = adapters.recognise(driven.model)
    schedule = parts.schedule or ScaleSchedule(tuple(driven.grids()))
    base = example()
    w = dataclasses.replace(
        base.workload, model=model, grids=schedule.grids, prefix=schedule.prefix, layers=4, heads=2, head_dim=16,
        softmax_scale=parts.softmax_scale, logit_bound=parts.logit_bound and 100.0,
        **{"weights_sha256": adapters.weights_sha256(driven.model), **workload},
    )  # fmt: skip
    return Tuned(find_gpu("cpu"), dataclasses.replace(base, policy=policy, rows=(), workload=w), None, ())
