"""Four pictures made one of twice the sides: what a sub-pixel convolution ends with (Shi et al. 2016, section 3.2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like
from sparvar_kernels.path.pictures import biased, channels_last, why_not_pictures

PHASES = 4  # pixels of even and odd rows and columns


def interleaved(phases: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, C, 2 H, 2 W] of phases' dtype in new memory, channels_last: every pixel from the phase of its row and column.

    phases  [B, 4 C, H + 1, W + 1] fp32, bf16 or fp16, dense and channels_last: out[:, c, 2 i + a, 2 j + b] is
            phases[:, (2 a + b) C + c, i + a, j + b], as a 2 x 2 convolution with a border of 1 makes all four at once.
    bias    [C] of any of these dtypes, contiguous, of the convolution that made them; None is 0. It and the sum are rounded to
            phases' dtype, as PyTorch's separate pass on a GPU does.

    On a GPU this is one kernel on the device of phases that never waits, so it can be captured in a CUDA graph. Raises
    ValueError, in one line, for anything else than the above.
    """
    device = phases.device
    check_plain({"phases": phases, "bias": bias}, device)
    forms = form(phases), form(bias)
    reason = why_not_interleaved(*forms)
    if reason:
        raise ValueError(reason)
    batch, channels, height, width = (n - m for n, m in zip(phases.shape, (0, 0, 1, 1), strict=True))
    channels //= PHASES
    shape, last = (batch, channels, 2 * height, 2 * width), torch.channels_last
    out = torch.empty(shape, dtype=phases.dtype, device=device, memory_format=last)
    if out.numel() == 0:
        return out
    if not by_triton(device):
        for a in (0, 1):
            for b in (0, 1):
                own = (2 * a + b) * channels
                phase = phases[:, own : own + channels, a : height + a, b : width + b]
                out[:, :, a::2, b::2] = biased(phase, bias)
        return out
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.interleaved import interleaved_launch

    run, grid, sizes = interleaved_launch(*forms, device)
    on_device(device, run, grid, *map(pointer, (phases, phases if bias is None else bias, out)), *sizes)
    return out


@lru_cache(maxsize=4096)
def why_not_interleaved(phases: Form, bias: Form) -> str | None:
    """Why tensors of these forms cannot be interleaved, or None."""
    assert phases is not None
    shape, strides, _, _ = phases
    reason = why_not_pictures("phases", phases)
    if reason:
        return reason
    if shape[1] % PHASES or min(shape[2:]) < 1:
        return f"phases: got {tuple(shape)}, want [B, 4 C, H + 1, W + 1]"
    if 0 not in shape and not channels_last(shape, strides):
        return f"phases: got strides {tuple(strides)} for {tuple(shape)}, want it dense and channels_last"
    return why_not_like("bias", bias, FLOATS, (shape[1] // PHASES,))
