"""Four channels_last pictures made one of twice the sides, with a bias: one read, one write."""

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
def interleaved_kernel(  # type: ignore[no-untyped-def]
    phases_ptr, bias_ptr, out_ptr, stride_b, stride_phases, stride_line, size, width,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (SPAN pixels by channels, picture) of the picture that is written. width: of that picture."""
    first = tl.program_id(0) // tl.cdiv(ALL, CHANNELS) * SPAN
    to, mask, c = picture_tile(out_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, LAST, EVEN)
    pixel = first + tl.arange(0, SPAN)
    row = pixel // width
    column = pixel - row * width
    a, b = row % 2, column % 2
    line = (row // 2 + a).to(tl.int64) * (width // 2 + 1) + (column // 2 + b)  # of a picture a row and a column larger
    base = phases_ptr + tl.program_id(1).to(tl.int64) * stride_phases
    at = base + (line * 4 + (a * 2 + b))[:, None] * ALL + c[None, :]
    x = with_bias(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"), bias_ptr, c, ALL, BIAS)
    tl.store(to, x.to(out_ptr.dtype.element_ty), mask=mask)


def interleaved_build(shape: Cut, dtype: torch.dtype, bias: torch.dtype | None, aligned: bool = True) -> PathBuild:
    """What a call launches; shape: of the picture that is written."""
    types = {"phases_ptr": f"*{TYPES[dtype]}", "bias_ptr": f"*{TYPES[bias or dtype]}", "out_ptr": f"*{TYPES[dtype]}"}
    types |= {"stride_b": "i64", "stride_phases": "i64", "stride_line": "i32", "size": "i32", "width": "i32"}
    constants = {**shape.tile, "BIAS": bias is not None}
    return PathBuild.of(interleaved_kernel, types, constants, {"num_warps": shape.warps, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def interleaved_launch(
    phases: Form, bias: Form, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], tuple[int, int, int, int, int]]:
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert phases is not None
    batch, channels, height, width = phases[0]
    shape = Cut(batch, channels // 4, 4 * (height - 1) * (width - 1), True)
    aligned = shape.aligned and not any(t[3] for t in (phases, bias) if t is not None)
    build = interleaved_build(shape, phases[2], None if bias is None else bias[2], aligned)
    sizes = shape.channels * shape.size, channels * height * width, shape.channels, shape.size, 2 * (width - 1)
    return launcher(build, device), (shape.tiles, batch, 1), sizes
