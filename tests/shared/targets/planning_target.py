"""What a GPU worker does on the CPU before it times anything: plans launches of a layer."""

from __future__ import annotations

import torch

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.triton.work import build_stage
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile.schema import Workload

MODEL = MODELS["infinity-8b"]
WORKLOAD = Workload.of(MODEL, MODEL.default_resolution, "1.000")
POLICY = paper_policy(WORKLOAD.schedule, MODEL.layers, MODEL.heads)


def plan(_: object) -> int:
    """Plans the last scale of one layer of each kind; how many threads torch took for it."""
    problem, heads = WORKLOAD.problem(12), tuple(range(MODEL.heads))
    for layer in (0, MODEL.layers - 1):
        variant = POLICY.variant(layer, 0, 12)
        build_stage([(variant, heads)], problem, TritonConfig(), "cpu", [None], [None])
    return torch.get_num_threads()
