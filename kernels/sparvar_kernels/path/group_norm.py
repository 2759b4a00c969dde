"""What a picture decoder does between two convolutions: group norm and SiLU, in one pass behind its statistics."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like


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
        x = x if add is None else x + add.to(x.dtype)[:, None, None]
        return out.copy_(_group_norm_silu(x, groups, weight, bias, eps, silu))
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


def channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether memory is dense in the order B, H, W, C."""
    return _dense([(shape[i], strides[i]) for i in (0, 2, 3, 1)])


def _dense(axes: list[tuple[int, int]]) -> bool:
    """Whether axes (length, stride), the slowest first, lie without a gap."""
    step = 1
    for n, stride in reversed(axes):
        if n > 1 and stride != step:
            return False
        step *= n
    return True


@lru_cache(maxsize=4096)
def why_not_group_norm(x: Form, weight: Form, bias: Form, add: Form, groups: int, out_dtype: torch.dtype) -> str | None:
    """Why tensors of these forms cannot be normalised, or None."""
    assert x is not None
    shape, _, dtype, _ = x
    if len(shape) != 4 or shape[1] < 1:
        return f"x: got {tuple(shape)}, want [B, C, H, W] with C >= 1"
    if dtype not in FLOATS:
        return f"x: got {dtype}, want {' or '.join(map(str, FLOATS))}"
    if out_dtype not in FLOATS:
        return f"out_dtype: got {out_dtype}, want one of {', '.join(map(str, FLOATS))}"
    if groups < 1 or shape[1] % groups:
        return f"groups: got {groups} for {shape[1]} channels, want a divisor of them"
    reason = why_not_laid("x", x)
    if reason:
        return reason
    vectors = ("weight", weight), ("bias", bias), ("add", add)
    reasons = (why_not_like(name, t, FLOATS, (shape[1],)) for name, t in vectors)
    return next((reason for reason in reasons if reason), None)


def why_not_laid(name: str, x: Form) -> str | None:
    """Why pictures [B, C, H, W] lie in memory as no pass takes them, or are too many or too large, or None."""
    assert x is not None
    shape, strides, _, _ = x
    if 0 not in shape and not channels_last(shape, strides) and not _dense(list(zip(shape, strides, strict=True))):
        return f"{name}: got strides {tuple(strides)} for {tuple(shape)}, want it contiguous, in channels_last or the usual order"
    if shape[0] >= 1 << 16 or shape[2] * shape[3] >= 1 << 30:
        return f"{name}: got {tuple(shape)}, want fewer than 65536 pictures of fewer than 2**30 pixels"
    return None


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
