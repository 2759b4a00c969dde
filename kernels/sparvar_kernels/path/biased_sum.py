"""What ends a residual block of a picture decoder: the biases of its last convolutions and the sum, in one pass."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like
from sparvar_kernels.path.pictures import biased, channels_last, why_not_pictures


def biased_sum(x: Tensor, update: Tensor, x_bias: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """update = (x + x_bias) + (update + bias), in place; returns update.

    x, update     [B, C, H, W] of one dtype (bf16, fp16 or fp32) and one dense memory format: channels_last or contiguous; each in
                  memory of its own.
    x_bias, bias  [C] of any of these dtypes, contiguous: of the convolutions that made them; None is 0.

    A bias and each of the three sums are rounded to the dtype of x, as PyTorch's separate passes on a GPU do: equal bits.
    On a GPU this is one kernel on the device of x that never waits, so it can be captured in a CUDA graph.
    Raises ValueError, in one line, for anything else than the above.
    """
    device = x.device
    tensors = {"x": x, "update": update, "x_bias": x_bias, "bias": bias}
    check_plain(tensors, device)
    forms = tuple(form(t) for t in tensors.values())
    reason = why_not_biased_sum(*forms)
    if reason:
        raise ValueError(reason)
    if update.numel() == 0:
        return update
    if not by_triton(device):
        return update.copy_(biased(x, x_bias) + biased(update, bias))
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.biased_sum import biased_sum_launch

    run, grid, sizes = biased_sum_launch(*forms, channels_last(x.shape, x.stride()), device)
    given = (x if t is None else t for t in tensors.values())
    on_device(device, run, grid, *map(pointer, given), *sizes)
    return update


@lru_cache(maxsize=4096)
def why_not_biased_sum(x: Form, update: Form, x_bias: Form, bias: Form) -> str | None:
    """Why tensors of these forms cannot be summed, or None."""
    assert x is not None and update is not None
    reason, (shape, strides, dtype, _) = why_not_pictures("x", x), x
    if reason:
        return reason
    if update[0] != shape or update[2] != dtype:
        return f"update: got {tuple(update[0])} {update[2]}, want {tuple(shape)} {dtype} like x"
    reason = why_not_pictures("update", update)
    if reason:
        return reason
    if channels_last(shape, strides) != channels_last(shape, update[1]):
        return f"update: got strides {update[1]}, want the memory format of x, whose strides are {strides}"
    vector = (shape[1],)
    return why_not_like("x_bias", x_bias, FLOATS, vector) or why_not_like("bias", bias, FLOATS, vector)
