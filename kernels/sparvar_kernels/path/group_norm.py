"""What a picture decoder does between two convolutions: group norm and SiLU, in one pass behind its statistics."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like
from sparvar_kernels.path.pictures import biased, channels_last, why_not_pictures


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *, silu: bool = True,
    out_dtype: torch.dtype | None = None, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu(group_norm(x + add)): [B, C, H, W] of `out_dtype` (x's where None) in new memory of x's memory format.

    x             [B, C, H, W] fp32, bf16 or fp16, dense: channels_last (where convolutions are fastest) or contiguous.
    groups        C / groups neighbouring channels have one mean and one variance, over H and W, too.
    weight, bias  [C] of any of these dtypes, contiguous: y * weight + bias; None is 1 and 0.
    silu          False leaves the norm alone, as attention needs it.
    add           [C] of any of these dtypes, contiguous: the bias of the convolution that made x. It and the sum are rounded to
                  the dtype of x before anything else sees them, as PyTorch adds a bias on a GPU; None is 0.

    All else is fp32, rounded once. The variance is summed from differences to means of parts (Chan, Golub and LeVeque 1979),
    so a mean far from zero costs it nothing. x is read twice and the output written once. Equal calls give equal bits.
    On a GPU these are three kernels on the device of x that never wait, so they can be captured in a CUDA graph.
    Raises ValueError, in one line, for anything else than the above.
    """
    device = x.device
    check_plain({"x": x, "weight": weight, "bias": bias, "add": add}, device)
    forms = form(x), form(weight), form(bias), form(add)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    reason = why_not_group_norm(*forms, groups, out_dtype)
    if reason:
        raise ValueError(reason)
    last = channels_last(x.shape, x.stride())
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(x.shape, dtype=out_dtype, device=device, memory_format=layout)
    if x.numel() == 0:
        return out
    if not by_triton(device):
        return out.copy_(_group_norm_silu(biased(x, add), groups, weight, bias, eps, silu))
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.group_norm import group_norm_launch

    launch = group_norm_launch(*forms, groups, out_dtype, last, silu, device)
    parts = torch.empty(launch.parts, dtype=torch.float32, device=device)
    moments = torch.empty(x.shape[0], x.shape[1], 2, dtype=torch.float32, device=device)
    scale, shift, added = (pointer(x if t is None else t) for t in (weight, bias, add))
    first = pointer(x), added, pointer(parts), *launch.sizes
    second = pointer(parts), scale, pointer(moments), *launch.sizes, eps
    third = pointer(x), pointer(moments), shift, added, pointer(out), *launch.sizes
    on_device(device, launch.run, first, second, third)
    return out


@lru_cache(maxsize=4096)
def why_not_group_norm(x: Form, weight: Form, bias: Form, add: Form, groups: int, out_dtype: torch.dtype) -> str | None:
    """Why tensors of these forms cannot be normalised, or None."""
    assert x is not None
    reason, shape = why_not_pictures("x", x), x[0]
    if reason:
        return reason
    if out_dtype not in FLOATS:
        return f"out_dtype: got {out_dtype}, want one of {', '.join(map(str, FLOATS))}"
    if groups < 1 or shape[1] % groups:
        return f"groups: got {groups} for {shape[1]} channels, want a divisor of them"
    vectors = ("weight", weight), ("bias", bias), ("add", add)
    reasons = (why_not_like(name, t, FLOATS, (shape[1],)) for name, t in vectors)
    return next((reason for reason in reasons if reason), None)


def _group_norm_silu(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """The same on a CPU, in fp32. PyTorch's own cancels on channels_last: mean of squares - squared mean."""
    y = x.float().unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(y, (2, 3, 4), correction=0, keepdim=True)
    y = ((y - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    if weight is not None:
        y = y * weight.float().view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.float().view(1, -1, 1, 1)
    return F.silu(y) if silu else y
