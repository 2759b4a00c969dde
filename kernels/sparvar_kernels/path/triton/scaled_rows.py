"""A row's largest value, its scale and its 8-bit form in one pass, behind GELU, SwiGLU's gate or a norm."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.scaled_rows import FORMATS
from sparvar_kernels.path.triton.launch import PathBuild

FIRST = {"none": 0, "gelu": 1, "silu": 2}
EIGHT = {"e4m3": "*fp8e4nv", "int8": "*i8"}  # Triton's names
EACH_THREAD = 16  # numbers of a row a thread holds


@triton.jit
def store_scaled(  # type: ignore[no-untyped-def]
    y, rows_ptr, scales_ptr, row, mask, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr
):
    """Row `row` of the scaled form of y [BLOCK] fp32, 0 behind CHANNELS. WHOLE: of whole numbers."""
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-12)
    rows, scale = y * tl.div_rn(LARGEST + 0.0, largest), tl.div_rn(largest, LARGEST + 0.0)
    if WHOLE:
        rows = (rows + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23: to the nearest whole number, ties to even
        scale += tl.sum(y * 0.0, 0)  # NaN where one is not finite, which a whole number cannot say
    tl.store(rows_ptr + row * CHANNELS + tl.arange(0, BLOCK), rows.to(rows_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + row, scale)


@triton.jit
def scaled_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, up_ptr, rows_ptr, scales_ptr, FIRST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    at = row * CHANNELS + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < CHANNELS
    y = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if FIRST == 1:  # 0.5 (1 + tanh u) is 1 / (1 + exp(-2 u))
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * u))
    if FIRST == 2:
        up = tl.load(up_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if FIRST > 0:  # as a pass of its own would have left it
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    store_scaled(y, rows_ptr, scales_ptr, row, mask, CHANNELS, BLOCK, LARGEST, WHOLE)


def scaled_rows_build(
    dtype: torch.dtype, channels: int, first: str = "none", fmt: str = "e4m3", aligned: bool = True
) -> PathBuild:  # fmt: skip
    """What a call launches; aligned: addresses and rows are multiples of 16 bytes."""
    types = {"x_ptr": f"*{TYPES[dtype]}", "up_ptr": f"*{TYPES[dtype]}", "rows_ptr": EIGHT[fmt], "scales_ptr": "*fp32"}
    block = triton.next_power_of_2(channels)
    constants = {"FIRST": FIRST[first], "CHANNELS": channels, "BLOCK": block}
    constants |= {"LARGEST": int(FORMATS[fmt].largest), "WHOLE": fmt == "int8"}
    options = {"num_warps": min(max(triton.next_power_of_2(block // (32 * EACH_THREAD)), 1), 16), "num_stages": 1}
    if fmt == "int8":  # rounded as a product first, as the rule says, and not within one fused multiply-add
        options["enable_fp_fusion"] = False
    return PathBuild.of(scaled_rows_kernel, types, constants, options, aligned)


@lru_cache(maxsize=4096)
def scaled_rows_launch(x: Form, up: Form, first: str, fmt: str, device: torch.device) -> tuple[Launcher, tuple[int, int, int]]:
    """The binary for tensors of this form, and how many programs it is."""
    assert x is not None
    channels = x[0][-1]
    aligned = channels % ALIGNMENT == 0 and not any(t[3] for t in (x, up) if t is not None)
    return launcher(scaled_rows_build(x[2], channels, first, fmt, aligned), device), (x[0].numel() // channels, 1, 1)
