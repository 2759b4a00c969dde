"""A profile where nothing can be measured: a policy with a predicted schedule."""

from __future__ import annotations

import datetime
from dataclasses import replace

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.models import Model
from sparvar_tune.launch_search.choose import space
from sparvar_tune.launch_search.cost_model import binary_key, dense_ms, load_binaries, load_fit, scale_ms, works
from sparvar_tune.launch_search.layer_call import distinct_layers
from sparvar_tune.policy_search.menu import PAPER_SOURCE, UNVERIFIED, paper_policy
from sparvar_tune.profile import schema
from sparvar_tune.profile.identity import stamp
from sparvar_tune.profile.machine import is_here, silicon, versions

DENSE_NAME = "dense attention, predicted"


def predict_profile(
    model: Model, gpu: Gpu, preset: str, resolution: str, aspect: str, images: int = 1, source: schema.Profile | None = None
) -> schema.Profile:
    """The profile of `source`'s policy, or else of the paper's.

    Raises ValueError where nothing can be predicted (the CPU; binaries nobody compiled) or the schedule is too short.
    """
    workload = source.workload if source else schema.Workload.of(model, resolution, aspect)
    workload = replace(workload, batch=workload.batch * images)
    policy = source.policy if source else paper_policy(workload.schedule, model.layers, model.heads)
    rows, tried = [], 0
    for s in sorted({r.scale_index for r in policy.rules}):
        times = predict_scale(policy, workload, s, gpu)
        config = min(times, key=lambda c: times[c])
        tried += len(times)
        rows.append(schema.Row(
            s, "triton", config.to_row(), "predicted", DENSE_NAME,
            tuned_predicted_ms=times[config], dense_predicted_ms=dense_ms(workload.problem(s), gpu, model.heads),
        ))  # fmt: skip
    return schema.Profile(
        schema=schema.SCHEMA, created=datetime.date.today().isoformat(), preset=preset, state="predicted", policy=policy,
        policy_state="measured" if source else "unverified",
        policy_source=f"searched on {source.silicon.gpu} ({source.created})" if source else PAPER_SOURCE,
        evidence=source.evidence if source else None, workload=workload,
        silicon=silicon(gpu, False), versions=versions(),
        **stamp(policy, rows, gpu), generation=None,
        rows=tuple(rows), seed=0, trials=tried, notes=_notes(gpu, workload, source is None),
    )  # fmt: skip


def predict_scale(policy: Policy, workload: schema.Workload, scale_index: int, gpu: Gpu) -> dict[TritonConfig, float]:
    """Milliseconds a layer, averaged over layers, of every configuration whose binaries are known."""
    problems = workload.problems()
    kinds, taken = distinct_layers(policy, scale_index), load_binaries()
    times: dict[TritonConfig, float] = {}
    if not (gpu.bf16_tflops and gpu.capability):
        raise ValueError(f"gpu {gpu.slug}: no rates in the table to predict from; measure it instead")
    for config in space(problems[scale_index], gpu.capability):
        needed = {binary_key(w, config, gpu) for layer in kinds for w in works(policy, problems, layer, scale_index, config)}
        if needed <= taken.keys():
            times[config] = scale_ms(policy, problems, kinds, scale_index, config, gpu, taken)
    if not times:
        raise ValueError(
            f"scale {scale_index}: no binary of its kernels is known for {gpu.slug}; on a machine with Triton run "
            "python -m lab.cost_fit binaries"
        )
    return times


def _notes(gpu: Gpu, workload: schema.Workload, unverified: bool) -> tuple[str, ...]:
    fit = load_fit()
    why = "this GPU is not in this machine" if not is_here(gpu) else "the model cannot be run here"
    seen = "of an H200 it never saw"
    error = f"off by {fit.error_other_gpu:.0%} (median) on launches and {fit.error_layers:.0%} on whole layers {seen}"
    here = "" if gpu.family == "hopper" else f"; no {gpu.family} GPU was ever measured, so here the error is larger and unknown"
    notes = [f"times are predicted because {why}: by a model fitted on {fit.gpu}, {error}{here}"]
    if workload.dtype == "fp32":
        notes.append("no fp32 launch is in that model's fit")
    return (*notes, UNVERIFIED) if unverified else tuple(notes)
