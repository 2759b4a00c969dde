"""What SwiGLU does between its products."""

from __future__ import annotations

from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_contiguous, why_not_like


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """gate = silu(gate) * up, in place; returns gate.

    gate, up  of one shape and dtype (bf16, fp16 or fp32), contiguous: the outputs of SwiGLU's first two products.

    Arithmetic is fp32, rounded once. On a GPU this is one kernel on the device of gate that never waits, so it can be captured
    in a CUDA graph. Raises ValueError, in one line, for anything else than the above.
    """
    device = gate.device
    forms = form(gate), form(up)
    check_plain({"gate": gate, "up": up}, device)
    reason = why_not_gated_silu(*forms)
    if reason:
        raise ValueError(reason)
    if gate.numel() == 0:
        return gate
    if not by_triton(device):
        return gate.copy_(F.silu(gate.float()).mul_(up))
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.gated_silu import gated_silu_launch

    run, grid, many = gated_silu_launch(*forms, device)
    on_device(device, run, grid, pointer(gate), pointer(up), many)
    return gate


@lru_cache(maxsize=4096)
def why_not_gated_silu(gate: Form, up: Form) -> str | None:
    """Why tensors of these forms cannot be gated, or None."""
    assert gate is not None and up is not None
    if not gate[0]:
        return "gate: got a number, want one axis or more"
    shape = tuple(gate[0])
    reason = why_not_like("gate", gate, FLOATS, shape) or why_not_like("up", up, (gate[2],), shape)
    if reason:
        return reason
    return why_not_contiguous("gate", gate) or why_not_contiguous("up", up)
