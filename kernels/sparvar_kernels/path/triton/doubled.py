"""Nearest interpolation by 2 of channels_last pictures: one read, four writes."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.group_norm import Cut, picture_tile
from sparvar_kernels.path.triton.launch import PathBuild


@triton.jit
def doubled_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, stride_b, stride_line, size, width,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (SPAN pixels by channels, picture)."""
    first = tl.program_id(0) // tl.cdiv(ALL, CHANNELS) * SPAN
    at, mask, c = picture_tile(x_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, True, EVEN)
    x = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    pixel = first + tl.arange(0, SPAN)
    row = pixel // width
    upper = row.to(tl.int64) * 4 * width + (pixel - row * width) * 2  # the first of the four, in a picture 2 * width wide
    to = out_ptr + tl.program_id(1).to(tl.int64) * 4 * stride_b + upper[:, None] * stride_line + c[None, :]
    tl.store(to, x, mask=mask)
    tl.store(to + stride_line, x, mask=mask)
    below = to + 2 * width.to(tl.int64) * stride_line
    tl.store(below, x, mask=mask)
    tl.store(below + stride_line, x, mask=mask)


def doubled_build(shape: Cut, dtype: torch.dtype, aligned: bool = True) -> PathBuild:
    """What a call launches; shape: of the picture that is read."""
    types = {"x_ptr": f"*{TYPES[dtype]}", "out_ptr": f"*{TYPES[dtype]}"}
    types |= {"stride_b": "i64", "stride_line": "i32", "size": "i32", "width": "i32"}
    constants = {"SPAN": shape.span, "CHANNELS": shape.wide, "ALL": shape.channels, "EVEN": shape.even}
    return PathBuild.of(doubled_kernel, types, constants, {"num_warps": shape.warps, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def doubled_launch(x: Form, device: torch.device) -> tuple[Launcher, tuple[int, int, int], tuple[int, int, int, int]]:
    """The binary for a tensor of this form, how many programs it is, and its arguments behind the pointers."""
    assert x is not None
    batch, channels, height, width = x[0]
    shape = Cut(batch, channels, height * width, True)
    build = doubled_build(shape, x[2], shape.aligned and not x[3])
    return launcher(build, device), (shape.tiles, batch, 1), (channels * shape.size, channels, shape.size, width)
