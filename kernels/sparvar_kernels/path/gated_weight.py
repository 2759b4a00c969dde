"""A weight whose outputs are multiplied by a gate, for each row of a batch its own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_contiguous, why_not_like


def gated_weight(weight: Tensor, gate: Tensor) -> Tensor:
    """[B, N, K] in weight's dtype: gate[b, n] * weight[n, k], an fp32 product rounded once.

    weight    [N, K] fp32, bf16 or fp16, contiguous.
    gate      [B, N] fp32, N contiguous.

    On a GPU one kernel that reads the weight once and never waits. Raises ValueError, in one line, for anything else.
    """
    device = weight.device
    check_plain({"weight": weight, "gate": gate}, device)
    forms = form(weight), form(gate)
    reason = why_not_gated_weight(*forms)
    if reason:
        raise ValueError(reason)
    out = weight.new_empty(len(gate), *weight.shape)
    if out.numel() == 0:
        return out
    if not by_triton(device):
        return out.copy_(gate[:, :, None] * weight.float())
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.gated_weight import gated_weight_launch

    run, grid, rest = gated_weight_launch(*forms, device)
    on_device(device, run, grid, pointer(weight), pointer(gate), pointer(out), *rest)
    return out


@lru_cache(maxsize=4096)
def why_not_gated_weight(weight: Form, gate: Form) -> str | None:
    """Why tensors of these forms cannot be multiplied, or None."""
    assert weight is not None and gate is not None
    if len(weight[0]) != 2:
        return f"weight: got {tuple(weight[0])}, want [N, K]"
    if len(gate[0]) != 2:
        return f"gate: got {tuple(gate[0])}, want [B, {weight[0][0]}]"
    return (
        why_not_like("weight", weight, FLOATS, tuple(weight[0]))
        or why_not_contiguous("weight", weight)
        or why_not_like("gate", gate, (torch.float32,), (gate[0][0], weight[0][0]))
    )
