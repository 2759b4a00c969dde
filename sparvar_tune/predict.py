"""A profile where nothing can be measured: the paper's policy, unverified, with a predicted schedule."""

from __future__ import annotations

import datetime

from sparvar_kernels.registry import KERNELS
from sparvar_kernels.variants import Dense
from sparvar_tune import profiles, schema
from sparvar_tune.costmodel import predict_layer_ms, predict_ms
from sparvar_tune.gpus import Gpu
from sparvar_tune.machine import is_here, silicon, versions
from sparvar_tune.models import Model
from sparvar_tune.policies import PAPER_SOURCE, UNVERIFIED, paper_policy

DENSE_NAME = "FlashAttention-2, predicted"


def predict_profile(model: Model, gpu: Gpu, preset: str, resolution: str, aspect: str) -> schema.Profile:
    """The profile; raises ValueError where a roofline says nothing (the CPU) or the schedule is too short."""
    workload = schema.Workload.of(model, resolution, aspect)
    policy = paper_policy(workload.schedule, model.layers, model.heads)
    rows = []
    config = KERNELS["triton"].config()
    for s in sorted({r.scale_index for r in policy.rules}):
        problem = workload.problem(s)
        rows.append(schema.Row(
            s, "triton", tuple(sorted(vars(config).items())), "predicted", DENSE_NAME,
            tuned_predicted_ms=predict_layer_ms(policy, problem, gpu),
            dense_predicted_ms=predict_ms(Dense(), problem, gpu, model.heads),
        ))  # fmt: skip
    why = "this GPU is not in this machine" if not is_here(gpu) else "the model cannot be run here"
    return schema.Profile(
        schema=schema.SCHEMA, created=datetime.date.today().isoformat(), preset=preset, state="predicted", policy=policy,
        policy_state="unverified", policy_source=PAPER_SOURCE, evidence=None, workload=workload,
        silicon=silicon(gpu, False), versions=versions(), kernel_hash=profiles.kernel_hash(gpu), generation=None,
        rows=tuple(rows), seed=0, trials=0,
        notes=(f"times are from a roofline model because {why}", UNVERIFIED),
    )  # fmt: skip
