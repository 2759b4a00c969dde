"""A residual sum of pictures and the biases of the convolutions before it in one pass."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.group_norm import Cut, picture_tile, with_bias
from sparvar_kernels.path.triton.launch import PathBuild


@triton.jit
def biased_sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr, update_ptr, x_bias_ptr, bias_ptr, stride_b, stride_line, size,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    X_BIAS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (SPAN pixels by channels, picture): two reads, one write."""
    first = tl.program_id(0) // tl.cdiv(ALL, CHANNELS) * SPAN
    at, mask, c = picture_tile(x_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, LAST, EVEN)
    x = with_bias(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"), x_bias_ptr, c, ALL, X_BIAS)
    at, mask, c = picture_tile(update_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, LAST, EVEN)
    update = with_bias(tl.load(at, mask=mask, other=0.0), bias_ptr, c, ALL, BIAS)
    tl.store(at, (x + update).to(update_ptr.dtype.element_ty), mask=mask)


def biased_sum_build(
    shape: Cut, dtype: torch.dtype, x_bias: torch.dtype | None, bias: torch.dtype | None, aligned: bool = True
) -> PathBuild:
    """What a call launches."""
    types = {"x_ptr": f"*{TYPES[dtype]}", "update_ptr": f"*{TYPES[dtype]}"}
    types |= {"x_bias_ptr": f"*{TYPES[x_bias or dtype]}", "bias_ptr": f"*{TYPES[bias or dtype]}"}
    types |= {"stride_b": "i64", "stride_line": "i32", "size": "i32"}
    constants = {**shape.tile, "X_BIAS": x_bias is not None, "BIAS": bias is not None}
    return PathBuild.of(biased_sum_kernel, types, constants, {"num_warps": shape.warps, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def biased_sum_launch(
    x: Form, update: Form, x_bias: Form, bias: Form, last: bool, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], tuple[int, int, int]]:
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert x is not None
    batch, channels, height, width = x[0]
    shape = Cut(batch, channels, height * width, last)
    aligned = shape.aligned and not any(t[3] for t in (x, update, x_bias, bias) if t is not None)
    beside, own = (None if t is None else t[2] for t in (x_bias, bias))
    build = biased_sum_build(shape, x[2], beside, own, aligned)
    return launcher(build, device), (shape.tiles, batch, 1), (shape.channels * shape.size, shape.line, shape.size)
