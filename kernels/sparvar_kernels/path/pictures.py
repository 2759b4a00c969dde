"""What passes over a decoder's pictures share: how these may lie in memory, and the bias of the convolution that made them."""

from __future__ import annotations

from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, C, H, W] + bias [C], both and the sum rounded to the dtype of x, as PyTorch adds a convolution's on a GPU."""
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


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


def why_not_pictures(name: str, x: Form) -> str | None:
    """Why a pass cannot take a tensor as pictures [B, C, H, W], by its shape, dtype, layout or size, or None."""
    assert x is not None
    shape, strides, dtype, _ = x
    if len(shape) != 4 or shape[1] < 1:
        return f"{name}: got {tuple(shape)}, want [B, C, H, W] with C >= 1"
    if dtype not in FLOATS:
        return f"{name}: got {dtype}, want {' or '.join(map(str, FLOATS))}"
    if 0 not in shape and not channels_last(shape, strides) and not _dense(list(zip(shape, strides, strict=True))):
        return f"{name}: got strides {tuple(strides)} for {tuple(shape)}, want it contiguous, in channels_last or the usual order"
    if shape[0] >= 1 << 16 or shape[2] * shape[3] >= 1 << 30:
        return f"{name}: got {tuple(shape)}, want fewer than 65536 pictures of fewer than 2**30 pixels"
    return None
