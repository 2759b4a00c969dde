"""A picture of twice the sides, every pixel four times: what a picture decoder convolves after each level."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import Form, by_triton, check_plain, form, on_device
from sparvar_kernels.path.pictures import channels_last, why_not_pictures


def doubled(x: Tensor) -> Tensor:
    """[B, C, 2 H, 2 W] of x's dtype in new memory, channels_last: equal bits to nearest interpolation by 2.

    x  [B, C, H, W] fp32, bf16 or fp16, dense and channels_last.

    PyTorch's own, which runs in fp32 under autocast, finds the place of every number by itself. On a GPU this is one kernel on
    the device of x that never waits, so it can be captured in a CUDA graph. Raises ValueError, in one line, for anything else
    than the above.
    """
    device = x.device
    check_plain({"x": x}, device)
    reason = why_not_doubled(form(x))
    if reason:
        raise ValueError(reason)
    batch, channels, height, width = x.shape
    shape, last = (batch, channels, 2 * height, 2 * width), torch.channels_last
    if x.numel() and not by_triton(device):
        return F.interpolate(x.float(), scale_factor=2, mode="nearest").to(x.dtype).contiguous(memory_format=last)
    out = torch.empty(shape, dtype=x.dtype, device=device, memory_format=last)
    if x.numel() == 0:
        return out
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.doubled import doubled_launch

    run, grid, sizes = doubled_launch(form(x), device)
    on_device(device, run, grid, pointer(x), pointer(out), *sizes)
    return out


@lru_cache(maxsize=4096)
def why_not_doubled(x: Form) -> str | None:
    """Why a tensor of this form cannot be doubled, or None."""
    assert x is not None
    reason = why_not_pictures("x", x)
    if reason is None and 0 not in x[0] and not channels_last(x[0], x[1]):
        return f"x: got strides {tuple(x[1])} for {tuple(x[0])}, want it dense and channels_last"
    return reason
